// What follows from the field lists, key by key: a new key is covered without a word here.
#include <gmock/gmock.h>

#include <cmath>
#include <fstream>
#include <set>
#include <sstream>

#include "config/config_explain.h"
#include "control/config_keys.h"
#include "test_paths.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// Nothing is switched off or left out, so that every key can be changed.
ControllerConfig full_config() {
  ControllerConfig config = parse_config(R"(version: 1
model: {layers: 2, experts: 4, top_k: 2, tokens_per_step: 100}
health:
  bands: {load_cv: [0, 1]}
  phases: [{name: early, until: 5, bands: {gini: [0, 0.5]}}, {}]
  alerts: [{name: a, metric: max_vio, above: 1}, {name: b, metric: entropy, below: 1}]
expert_bias: {policy: sign_bias, limits: {center: false}}
aux_loss_weight: {policy: pi, initial: 0.01, options: {metric: load_cv, target: 0.5}}
router_temperature: {policy: fixed}
safety: {rollback: on, oscillation: on}
log: {rotate_mb: 1}
)");
  return config;
}

// visit(path, field, value) for every key that holds a value.
template <class T, class Visit>
void for_each_value(const std::string& path, const FieldInfo& field, T& value, const Visit& visit) {
  if constexpr (kHasFields<T>) {
    for_each_field(value, [&](const FieldInfo& inner, auto& v) {
      for_each_value((path.empty() ? "" : path + '.') + std::string(inner.key), inner, v, visit);
    });
  } else if constexpr (kIsOptional<T>) {
    if (value) for_each_value(path, field, *value, visit);
  } else if constexpr (kIsList<T>) {
    for (std::size_t i = 0; i < value.size(); ++i) {
      for_each_value(path + '[' + std::to_string(i) + ']', field, value[i], visit);
    }
  } else if constexpr (!std::is_same_v<T, PolicyOptions>) {
    visit(path, field, value);
  }
}

template <class Visit>
void for_each_value(ControllerConfig& config, const Visit& visit) {
  for_each_value("", FieldInfo{}, config, visit);
}

std::string fault_of(ControllerConfig config) {
  try {
    validate(config);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

// Values beside the one that is there; not all of them are allowed.
template <class T>
std::vector<T> others(const FieldInfo& field, const T& value) {
  if constexpr (std::is_same_v<T, bool>) {
    return {!value};
  } else if constexpr (std::is_enum_v<T>) {
    const auto choices = choices_of(T{});
    return {choices.begin(), choices.end()};
  } else if constexpr (std::is_arithmetic_v<T>) {
    if (is_absent(field, value)) return {};
    return {static_cast<T>(value + 1), static_cast<T>(value / 2), static_cast<T>(value - 1), T{1}, T{0}};
  } else if constexpr (std::is_same_v<T, std::string>) {
    return {"fixed", "schedule", "gini", "other"};
  } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
    return {{"one", "two"}};
  } else if constexpr (std::is_same_v<T, std::vector<double>>) {
    return {{0.1, 0.2, 0.3, 0.4}};
  } else if constexpr (std::is_same_v<T, Initial>) {
    return {Initial(value / 2 + 0.001), Initial(value + 0.25)};
  } else if constexpr (std::is_same_v<T, Bands>) {
    return {{{"max_vio", {0, 2}}}};
  } else {
    return {T{0, 0, 1, 1}};
  }
}

// What cannot be changed alone: biases belong to layers, and scalars have no mean.
const std::set<std::string> kFixedKeys = {"expert_bias.scope", "aux_loss_weight.limits.center",
                                          "router_temperature.limits.center"};

struct Changed {
  std::string path;
  const FieldInfo* field;
  ControllerConfig config;
};

// The full config with one key changed, for each key.
std::vector<Changed> changes() {
  std::vector<Changed> all;
  ControllerConfig config = full_config();
  for_each_value(config, [&](const std::string& path, const FieldInfo& field, auto& value) {
    const auto before = value;
    bool found = kFixedKeys.count(path) > 0;
    for (const auto& other : others(field, before)) {
      if (found || other == before) continue;
      value = other;
      ControllerConfig copy = config;
      for (const Actuator which : kActuators) {  // options belong to a policy
        if (path == std::string(name_of(which)) + ".policy") copy.actuator(which).options = {};
      }
      if (!fault_of(copy).empty()) continue;
      validate(copy);
      all.push_back({path, &field, copy});
      found = true;
    }
    if constexpr (std::is_arithmetic_v<std::remove_const_t<decltype(before)>>)
      found |= is_absent(field, before);
    EXPECT_TRUE(found) << path << ": no other value is allowed";
    value = before;
  });
  EXPECT_GT(all.size(), 90U);
  return all;
}

TEST(Fields, AValueOutsideItsRangeIsRefusedWithItsKey) {
  ControllerConfig config = full_config();
  int tried = 0;
  for_each_value(config, [&](const std::string& path, const FieldInfo& field, auto& value) {
    using T = std::remove_reference_t<decltype(value)>;
    if constexpr (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>) {
      const T before = value;
      if (is_absent(field, before)) return;
      const auto refused = [&](double wrong) {
        value = static_cast<T>(wrong);
        EXPECT_THAT(fault_of(config), StartsWith(path + ": " + shown(value) + ": must be "))
            << field.range.low;
        ++tried;
      };
      const Range& range = field.range;
      if (range.low > -1e308) refused(range.above_low ? range.low : range.low - 1);
      if (range.high < 1e308) refused(range.below_high ? range.high : range.high + 1);
      if (std::is_same_v<T, double>) refused(std::nan(""));
      value = before;
    }
  });
  EXPECT_GT(tried, 100);
}

TEST(Fields, EveryKeyIsReadBackAsItWasWritten) {
  for (const Changed& changed : changes()) {
    const ControllerConfig again = parse_config(to_yaml(changed.config));
    EXPECT_EQ(to_yaml(again), to_yaml(changed.config)) << changed.path;
    EXPECT_NE(to_yaml(again), to_yaml(full_config())) << changed.path;
    EXPECT_EQ(to_json(parse_config(to_json(changed.config))), to_json(changed.config)) << changed.path;
  }
}

TEST(Fields, WhatMustBeSharedIsCompared) {
  const StatsShape shape{4, 2, {}};
  ControllerConfig full = full_config();
  validate(full);
  for (const Changed& changed : changes()) {
    const Shared shared = changed.field->shared;
    EXPECT_EQ(describe_for_ranks(changed.config, 7) != describe_for_ranks(full, 7), shared >= Shared::kRanks)
        << changed.path;
    EXPECT_EQ(describe_for_state(changed.config, shape) != describe_for_state(full, shape),
              shared >= Shared::kPresent)
        << changed.path;
  }
}

TEST(Fields, OptionsOfPoliciesAreCompared) {
  const StatsShape shape{4, 2, {}};
  ControllerConfig config = full_config(), other = full_config();
  other.aux_loss_weight.options.set("target", 0.25);
  EXPECT_NE(describe_for_ranks(config, 7), describe_for_ranks(other, 7));
  EXPECT_THAT(describe_for_state(other, shape), HasSubstr("aux_loss_weight.options.target: 0.25\n"));
}

// A state depends on which metrics have a band, not on where the bands lie.
TEST(Fields, BandsMayMoveBetweenRunsButNotBetweenRanks) {
  const StatsShape shape{4, 2, {}};
  ControllerConfig config = full_config(), other = full_config();
  other.monitor.health.bands["load_cv"] = {0, 0.5};
  EXPECT_EQ(describe_for_state(config, shape), describe_for_state(other, shape));
  EXPECT_NE(describe_for_ranks(config, 7), describe_for_ranks(other, 7));
}

TEST(Fields, EveryKeyIsDescribed) {
  for (const ConfigKey& key : keys_of(full_config(), true)) {
    EXPECT_FALSE(key.field->doc.empty()) << key.path;
    EXPECT_EQ(key.field->doc.find('\n'), std::string::npos) << key.path;
    EXPECT_THAT(explain(full_config(), PolicyRegistry::builtin()), HasSubstr(key.path + ": ")) << key.path;
  }
}

TEST(Fields, TheReferenceIsUpToDate) {
  std::ifstream file(MOECTL_SOURCE_DIR "/docs/config.md", std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_TRUE(text.str() == config_reference(PolicyRegistry::builtin()))
      << "docs/config.md: write it anew with: moectl check --reference > docs/config.md";
}

}  // namespace
}  // namespace moectl
