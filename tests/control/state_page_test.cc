// docs/state-format.md against saved states of every policy with every option that is a choice: each entry stands on
// the page with its type, its shape and whether it is always there, and no other entry stands there.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "altered_state.h"
#include "base/format.h"
#include "moectl/controller.h"
#include "moectl/metrics.h"
#include "test_paths.h"

namespace moectl {
namespace {

using testing::state_body;

constexpr int kSteps = 12;

// ---- The states ----

ControllerConfig plain() {
  ControllerConfig config;
  config.model.layers = 2;
  config.model.experts = 6;
  config.model.top_k = 2;
  config.model.domains = {"a", "b"};
  config.monitor.trend_window = 10;
  config.metrics.details = true;
  return config;
}

ControllerConfig with(Actuator actuator, const std::string& policy,
                      const std::map<std::string, OptionValue>& options = {}) {
  ControllerConfig config = plain();
  ActuatorConfig& own = config.actuator(actuator);
  own.policy = policy;
  own.limits = default_limits(actuator);
  if (is_multiplicative(actuator)) own.initial = actuator == Actuator::kAuxLossWeight ? 0.01 : 1;
  for (const auto& [name, value] : options) own.options.set(name, value);
  if (const auto form = options.find("form");
      form != options.end() && form->second == OptionValue(std::string("k3")))
    own.options.set("gain", 1.0);
  return config;
}

/// Every policy on every actuator, with each value of its options that are flags or choices.
std::vector<ControllerConfig> of_policies() {
  std::vector<ControllerConfig> configs;
  for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
    for (const Actuator actuator : policy->actuators) {
      configs.push_back(with(actuator, policy->name));
      for (const OptionSpec& option : policy->options) {
        if (option.name == "metric") continue;  // changes no entry
        for (const std::string& choice : option.choices)
          configs.push_back(with(actuator, policy->name, {{option.name, choice}}));
        if (const bool* flag = std::get_if<bool>(&option.default_value))
          configs.push_back(with(actuator, policy->name, {{option.name, !*flag}}));
      }
    }
  }
  return configs;
}

/// What a controller can hold beside its policies.
std::vector<ControllerConfig> of_features() {
  ControllerConfig full = with(Actuator::kAuxLossWeight, "pi");
  full.aux_loss_weight.scope = Scope::kModel;
  full.aux_loss_weight.limits.cadence = 4;
  full.expert_bias.policy = "adaptive_bias";
  full.lag = 1;
  full.model.delay = 1;
  full.guard.enabled = true;
  full.monitor.trends = true;
  full.monitor.health.bands = {{"load_cv", {0, 0.5}}};
  full.monitor.health.alerts = {{.metric = "max_vio", .above = 0.2}};
  full.safety.rollback.emplace();
  full.safety.oscillation.emplace();
  full.collect.gradients = full.collect.losses = full.collect.latencies = full.collect.probabilities = true;
  ControllerConfig windows = with(Actuator::kExpertBias, "quantile_bias");
  windows.expert_bias.limits.cadence = 3;
  windows.model.delay = 2;
  ControllerConfig late = with(Actuator::kExpertBias, "quantile_bias", {{"form", std::string("k3")}});
  late.model.delay = 2;
  late.aux_loss_weight = full.aux_loss_weight;
  late.aux_loss_weight.limits.cadence = 1;
  ControllerConfig bare = with(Actuator::kExpertBias, "sign_bias");
  bare.safety.responsiveness = false;
  bare.guard.enabled = true;
  ControllerConfig shadow = full;
  shadow.mode = Mode::kShadow;
  return {full, windows, late, bare, shadow};
}

void run(Controller& controller) {
  std::mt19937_64 random(3);
  constexpr std::size_t kTokens = 24;
  const auto n = static_cast<std::size_t>(controller.config().model.experts);
  for (int step = 0; step < kSteps; ++step) {
    for (int l = 0; l < controller.config().model.layers; ++l) {
      const StatsNeeds& needs = controller.shape(l).needs;
      std::vector<std::int64_t> experts, domains;
      std::vector<float> top, scores;
      for (std::size_t t = 0; t < kTokens; ++t) {
        const std::size_t first = random() % 3 == 0 ? 0 : random() % n;
        for (std::size_t j = 0; j < 2; ++j) experts.push_back(static_cast<std::int64_t>((first + j) % n));
        for (std::size_t j = 0; j < 3; ++j) top.push_back(0.5F - 0.1F * static_cast<float>(j));
        for (std::size_t i = 0; i < n; ++i) scores.push_back(static_cast<float>(random() % 100) / 600);
        domains.push_back(static_cast<std::int64_t>(random() % 2));
      }
      RoutingBatch batch{.experts = experts, .sequence_length = 8, .top_values = top};
      if (needs.biased_scores()) batch.biased_scores = scores;
      if (needs.probabilities) batch.probabilities = scores;
      if (needs.domains > 0) batch.domain_ids = domains;
      controller.record(l, batch, step % 2);
      if (!needs.gradients) continue;
      const std::vector<double> values(n, 0.02);
      controller.record_with(l, [&](RoutingStats& stats) {
        stats.add_grad_norms(values);
        stats.add_latencies(values);
        stats.add_expert_losses(values, std::vector<std::int64_t>(n, 4));
      });
    }
    const std::vector<std::int64_t> mixture = {static_cast<std::int64_t>(random() % 48), 20};
    controller.step({.loss = 3.0 - 0.01 * step, .next_mixture = mixture});
  }
}

// ---- Their entries ----

struct Found {
  char type;
  std::size_t count, times;
  std::string example;
};
/// By the section's path, "" for the state itself, and the name.
using Place = std::pair<std::string, std::string>;
using Entries = std::map<Place, Found>;

std::string general(const std::string& section) {
  for (const Actuator actuator : kActuators) {
    if (section == name_of(actuator)) return "ACTUATOR";
  }
  return section.starts_with("layer ") ? "layer ID" : section;
}

/// A layer's actuator and the model's hold the same entries.
std::string inside(const std::string& path, const std::string& section) {
  return path.empty() || section == "ACTUATOR" ? section : path + '/' + section;
}

std::string example_of(std::string_view data, char type, std::size_t count) {
  if (type == 't') return std::string(data.substr(0, data.find('\n')));
  std::string text;
  for (std::size_t i = 0; i < std::min<std::size_t>(count, 2); ++i) {
    double number = 0;
    std::int64_t integer = 0;
    std::memcpy(&number, &data[8 * i], 8);
    std::memcpy(&integer, &data[8 * i], 8);
    text += (i > 0 ? ", " : "") + (type == 'd' ? brief(number, 3) : std::to_string(integer));
  }
  return text + (count > 2 ? ", …" : "");
}

/// Each section once, in `sections`: the entries of one are complete by themselves.
void add_entries(std::string_view body, const std::string& path,
                 std::vector<std::pair<std::string, Entries>>& sections) {
  Entries own;
  for (std::size_t at = 0; at < body.size();) {
    std::uint32_t length = 0;
    std::uint64_t count = 0;
    std::memcpy(&length, &body[at], 4);
    std::string name(body.substr(at + 4, length));
    const char type = body[at + 4 + length];
    std::memcpy(&count, &body[at + 5 + length], 8);
    at += 13 + length;
    const std::size_t size = count * (type == 'd' || type == 'i' ? 8 : 1);
    if (type == 's') {
      name = general(name);
      add_entries(body.substr(at, size), inside(path, name), sections);
      count = 0;
    }
    const auto [it, added] = own.insert(
        {{path, name}, {type, count, 0, type == 's' ? "" : example_of(body.substr(at, size), type, count)}});
    ++it->second.times;
    EXPECT_TRUE(it->second.type == type && (it->second.count == count || type == 's'))
        << path << '/' << name << ": of two kinds in one section";
    at += size;
  }
  sections.emplace_back(path, own);
}

// ---- The page ----

struct Row {
  std::string type, shape, unit, meaning, present, example;
};

std::map<Place, Row> page() {
  std::map<Place, Row> rows;
  std::ifstream in(MOECTL_SOURCE_DIR "/docs/state-format.md");
  std::string section;
  bool in_table = false;
  for (std::string line; std::getline(in, line);) {
    if (line.starts_with("#")) {
      in_table = line.starts_with("### ") && line.find('`') != std::string::npos;
      const std::size_t from = line.find('`') + 1;
      section = in_table ? line.substr(from, line.find('`', from) - from) : "";
      if (section == "state") section.clear();
    }
    if (!in_table || !line.starts_with("| `")) continue;
    std::vector<std::string> cells;
    std::istringstream cut(line.substr(1));
    for (std::string cell; std::getline(cut, cell, '|');) {
      const std::size_t from = cell.find_first_not_of(' '), to = cell.find_last_not_of(' ');
      cells.push_back(from == std::string::npos ? "" : cell.substr(from, to - from + 1));
    }
    EXPECT_EQ(cells.size(), 7U) << line;
    if (cells.size() != 7) continue;
    const std::string name = cells[0].substr(1, cells[0].size() - 2);
    const bool fresh =
        rows.insert({{section, name}, {cells[1], cells[2], cells[3], cells[4], cells[5], cells[6]}}).second;
    EXPECT_TRUE(fresh) << "twice on the page: " << section << '/' << name;
  }
  return rows;
}

constexpr std::string_view kSeveral = ", several times";

/// Whether a shape such as "2 × N or 0" allows so many elements, with the config's values of the symbols.
bool allows(std::string shape, std::size_t count, const std::map<std::string, std::size_t>& symbols) {
  if (shape.ends_with(kSeveral)) shape.resize(shape.size() - kSeveral.size());
  if (shape == "any") return true;
  for (std::size_t from = 0; from <= shape.size();) {
    const std::size_t to = std::min(shape.find(" or ", from), shape.size());
    std::istringstream factors(shape.substr(from, to - from));
    std::size_t product = 1;
    for (std::string factor; factors >> factor;) {
      if (factor == "×") continue;
      std::size_t number = 0;
      if (const auto it = symbols.find(factor); it != symbols.end()) {
        number = it->second;
      } else if (std::from_chars(factor.data(), factor.data() + factor.size(), number).ec != std::errc()) {
        ADD_FAILURE() << "no symbol: " << factor;
      }
      product *= number;
    }
    if (product == count) return true;
    from = to + 4;
  }
  return false;
}

const std::map<std::string, char> kTypes = {
    {"number", 'd'}, {"integer", 'i'}, {"flag", 'i'}, {"text", 't'}, {"section", 's'}};

TEST(StatePage, HasEveryEntryOfEveryStateAndNoOther) {
  const std::map<Place, Row> rows = page();
  std::vector<ControllerConfig> configs = of_policies();
  for (ControllerConfig& config : of_features()) configs.push_back(config);
  std::map<Place, std::size_t> holders;      // sections that hold the entry
  std::map<std::string, std::size_t> times;  // how often each section was seen
  Entries unknown;
  std::set<Place> repeated;
  for (const ControllerConfig& config : configs) {
    Controller controller(config);
    run(controller);
    const std::size_t delay = static_cast<std::size_t>(controller.config().delay());
    const auto cadence = static_cast<std::size_t>(controller.config().expert_bias.limits.cadence);
    const auto n = static_cast<std::size_t>(config.model.experts), metrics = metric_fields().size();
    const std::size_t sums = RoutingStats(controller.shape(0)).flat().size();
    const std::map<std::string, std::size_t> symbols = {
        {"N", n},
        {"P", static_cast<std::size_t>(config.model.layers) * (sums + 2) + 13 + config.model.domains.size()},
        {"(D+13)", config.model.domains.size() + 13},
        {"L", static_cast<std::size_t>(config.model.layers)},
        {"D", config.model.domains.size()},
        {"W", static_cast<std::size_t>(config.monitor.trend_window)},
        {"M", sums},
        {"Q", metrics},
        {"(Q+1)", metrics + 1},
        {"d", (delay + cadence / 2) / cadence},
        {"delay", delay},
        {"(d+1)", (delay + cadence / 2) / cadence + 1},
        {"(d+6)", (delay + cadence / 2) / cadence + 6},
        {"(delay+3)", delay + 3}};
    for (const std::string& state : {controller.save(), controller.save_layer(0)}) {
      std::vector<std::pair<std::string, Entries>> sections;
      const std::string body = state_body(state);
      add_entries(body, "", sections);
      for (const auto& [section, entries] : sections) {
        ++times[section];
        for (const auto& [place, found] : entries) {
          ++holders[place];
          if (found.times > 1) repeated.insert(place);
          const auto it = rows.find(place);
          if (it == rows.end()) {
            if (unknown[place].example.empty()) unknown[place] = found;
            continue;
          }
          const Row& row = it->second;
          const auto type = kTypes.find(row.type);
          ASSERT_NE(type, kTypes.end()) << row.type;
          EXPECT_EQ(type->second, found.type) << section << '/' << place.second;
          if (found.type == 'd' || found.type == 'i') {
            EXPECT_TRUE(allows(row.shape, found.count, symbols))
                << section << '/' << place.second << ": " << row.shape << " on the page, " << found.count
                << " in the state";
          }
        }
      }
    }
  }
  for (const auto& [place, found] : unknown) {
    ADD_FAILURE() << "not on the page: " << place.first << " | " << place.second << " | " << found.type
                  << " | " << found.count << " | " << found.times << " | " << found.example;
  }
  for (const auto& [place, row] : rows) {
    const auto held = holders.find(place);
    if (held == holders.end()) {
      ADD_FAILURE() << "in no state: " << place.first << '/' << place.second;
      continue;
    }
    EXPECT_EQ(row.present == "always", held->second == times[place.first])
        << place.first << '/' << place.second << ": " << row.present << ", in " << held->second << " of "
        << times[place.first];
    EXPECT_EQ(row.shape.ends_with(kSeveral), repeated.count(place) > 0) << place.first << '/' << place.second;
  }
}

TEST(StatePage, EveryRowIsComplete) {
  const std::map<Place, Row> rows = page();
  EXPECT_GT(rows.size(), 150U);
  for (const auto& [place, row] : rows) {
    const std::string where = place.first + '/' + place.second;
    EXPECT_NE(row.meaning, "") << where;
    EXPECT_NE(row.present, "") << where;
    if (row.type == "section") continue;
    EXPECT_GE(row.example.size(), 3U) << where;
    EXPECT_TRUE(row.example.starts_with('`') && row.example.ends_with('`')) << where;
    if (row.type == "text") continue;
    std::istringstream values(row.example.substr(1, row.example.size() - 2));
    for (std::string value; std::getline(values >> std::ws, value, ',');) {
      if (value == "…") continue;
      double number = 0;
      const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
      EXPECT_TRUE(error == std::errc() && end == value.data() + value.size()) << where << ": " << value;
      if (row.type != "number") {
        EXPECT_EQ(number, static_cast<double>(static_cast<std::int64_t>(number))) << where;
      }
      if (row.type == "flag") {
        EXPECT_TRUE(number == 0 || number == 1) << where;
      }
    }
  }
}

}  // namespace
}  // namespace moectl
