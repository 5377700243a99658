// A saved state of every policy: of one length for a config, the same bytes after save and load, and safe to load
// whatever numbers it holds.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "altered_state.h"
#include "moectl/controller.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using testing::state_entries;
using testing::StateEntry;
using testing::with_number;

struct Case {
  std::string name;
  ControllerConfig config;
};

ControllerConfig plain() {
  ControllerConfig config;
  config.model.layers = 2;
  config.model.experts = 6;
  config.model.top_k = 2;
  config.monitor.trend_window = 12;
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
  return config;
}

std::vector<Case> cases() {
  std::vector<Case> cases;
  for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
    for (const Actuator actuator : policy->actuators) {
      cases.push_back({policy->name + "_" + std::string(name_of(actuator)), with(actuator, policy->name)});
    }
  }
  const Actuator bias = Actuator::kExpertBias;
  cases.push_back({"rescue", with(bias, "adaptive_bias", {{"rescue", true}})});
  cases.push_back({"feedforward", with(bias, "adaptive_bias", {{"feedforward", std::string("tags")}})});
  cases.back().config.model.domains = {"a", "b"};
  cases.push_back({"delay", with(bias, "adaptive_bias")});
  cases.back().config.model.delay = 3;
  cases.push_back({"quantile_delay", with(bias, "quantile_bias")});
  cases.back().config.model.delay = 2;
  cases.push_back({"quantile_k3", with(bias, "quantile_bias", {{"form", std::string("k3")}, {"gain", 1.0}})});
  cases.back().config.model.delay = 1;
  cases.back().config.lag = 1;
  cases.push_back(
      {"quantile_local_mean", with(bias, "quantile_bias", {{"form", std::string("local_mean")}})});
  // Everything that a controller can hold beside its policies.
  ControllerConfig full = with(Actuator::kAuxLossWeight, "pi");
  full.aux_loss_weight.scope = Scope::kModel;
  full.aux_loss_weight.limits.cadence = 4;
  full.expert_bias.policy = "adaptive_bias";
  full.expert_bias.limits.cadence = 3;
  full.lag = 1;
  full.guard.enabled = true;
  full.monitor.trends = true;
  full.monitor.health.bands = {{"load_cv", {0, 0.5}}};
  full.monitor.health.alerts = {{.metric = "max_vio", .above = 0.2}};
  full.safety.rollback.emplace();
  full.safety.oscillation.emplace();
  full.collect.gradients = full.collect.losses = full.collect.latencies = full.collect.probabilities = true;
  cases.push_back({"full", full});
  return cases;
}

class SavedState : public ::testing::TestWithParam<Case> {
 protected:
  static void record(Controller& controller, std::mt19937_64& random, std::int64_t micro_batch = -1) {
    const auto n = static_cast<std::size_t>(controller.config().model.experts);
    const auto k = static_cast<std::size_t>(controller.config().model.top_k);
    const StatsNeeds& needs = controller.shape(0).needs;
    constexpr std::size_t kTokens = 24;
    for (int l = 0; l < controller.config().model.layers; ++l) {
      std::vector<std::int64_t> experts, domains;
      std::vector<float> top, scores;
      for (std::size_t t = 0; t < kTokens; ++t) {
        const std::size_t first = random() % 3 == 0 ? 0 : random() % n;
        for (std::size_t j = 0; j < k; ++j) experts.push_back(static_cast<std::int64_t>((first + j) % n));
        for (std::size_t j = 0; j <= k; ++j) top.push_back(0.5F - 0.1F * static_cast<float>(j));
        for (std::size_t i = 0; i < n; ++i) scores.push_back(static_cast<float>(random() % 100) / 600);
        domains.push_back(static_cast<std::int64_t>(random() % 2));
      }
      RoutingBatch batch{.experts = experts, .sequence_length = 8, .top_values = top};
      if (needs.biased_scores()) batch.biased_scores = scores;
      if (needs.probabilities) batch.probabilities = scores;
      if (needs.domains > 0) batch.domain_ids = domains;
      controller.record(l, batch, micro_batch);
      if (needs.gradients) {
        const std::vector<double> values(n, 0.01 * static_cast<double>(1 + random() % 50));
        controller.record_with(l, [&](RoutingStats& stats) {
          stats.add_grad_norms(values);
          stats.add_latencies(values);
          stats.add_expert_losses(values, std::vector<std::int64_t>(n, 4));
        });
      }
    }
  }
  static void step(Controller& controller, std::mt19937_64& random) {
    record(controller, random);
    const std::vector<std::int64_t> mixture = {static_cast<std::int64_t>(random() % 50), 20};
    StepInfo info{.loss = 3.0 + 0.01 * static_cast<double>(random() % 100)};
    if (!controller.config().model.domains.empty()) info.next_mixture = mixture;
    controller.step(info);
  }
};

TEST_P(SavedState, HasOneLengthAndComesBackAsTheSameBytes) {
  std::mt19937_64 random(3);
  Controller controller(GetParam().config);
  const std::size_t length = controller.save().size();
  for (const std::int64_t at : {0, 1, 7, 50, 200}) {
    while (controller.steps() < at) step(controller, random);
    const std::string state = controller.save();
    EXPECT_EQ(state.size(), length) << at;
    Controller other(GetParam().config);
    other.load(state);
    EXPECT_EQ(other.save(), state) << at;
  }
  for (std::int64_t micro_batch = 0; micro_batch < 64; ++micro_batch) {
    record(controller, random, micro_batch);
    EXPECT_EQ(controller.save().size(), length) << micro_batch;
  }
}

// Behind a checksum that fits: a number of any entry is refused, or the run goes on within its limits.
TEST_P(SavedState, WhateverItsNumbersItIsRefusedOrTheRunStaysWithinItsLimits) {
  std::mt19937_64 random(5);
  Controller controller(GetParam().config);
  for (int i = 0; i < 30; ++i) step(controller, random);
  record(controller, random, 7);
  const std::string state = controller.save();
  const auto inside = [](const Limits& limits, double x) { return x >= limits.min && x <= limits.max; };
  const auto load = [&](const StateEntry& entry, const std::string& altered) {
    Controller loaded(GetParam().config);
    try {
      loaded.load(altered);
    } catch (const StateError&) {
      return;
    }
    for (int i = 0; i < 3; ++i) {
      step(loaded, random);
      for (int l = 0; l < 2; ++l) {
        for (const double b : loaded.bias(l)) {
          ASSERT_TRUE(entry.name == "applied" ? std::isfinite(b)
                                              : inside(loaded.config().expert_bias.limits, b))
              << entry.name << " " << b;
        }
        if (entry.name == "applied") continue;  // while a hold is in force it stays
        ASSERT_TRUE(inside(loaded.config().aux_loss_weight.limits, loaded.aux_loss_weight(l))) << entry.name;
        ASSERT_TRUE(inside(loaded.config().router_temperature.limits, loaded.temperature(l))) << entry.name;
      }
    }
    // What it saves it loads: no number of its own has left the range that it is read with.
    const std::string after = loaded.save();
    ASSERT_NO_THROW(loaded.load(after)) << entry.name;
  };
  for (const StateEntry& entry : state_entries(state)) {
    if (entry.count == 0) continue;
    for (const std::size_t element : {std::size_t{0}, random() % entry.count}) {
      if (entry.type == 'i') {
        for (const std::int64_t x :
             {std::int64_t{-1}, std::int64_t{1} << 40, std::numeric_limits<std::int64_t>::min(),
              std::numeric_limits<std::int64_t>::max()}) {
          load(entry, with_number(state, entry, element, x));
        }
      } else if (entry.type == 'd') {
        for (const double x : {std::nan(""), -HUGE_VAL, HUGE_VAL, -1.0, 1e160, -1.7e308, 1.7e308}) {
          load(entry, with_number(state, entry, element, x));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(EveryPolicy, SavedState, ::testing::ValuesIn(cases()),
                         [](const auto& one) { return one.param.name; });

// The mean of adopted biases is taken out at once. A state that tells another mean does not move them.
TEST(SavedStates, AMeanThatTheBiasesDoNotHaveMovesNothing) {
  ControllerConfig config = with(Actuator::kExpertBias, "sign_bias");
  config.expert_bias.limits.rate = 0.01;
  Controller controller(config);
  const std::string state = controller.save();
  const auto n = static_cast<std::size_t>(config.model.experts);
  std::vector<std::int64_t> experts;
  for (std::size_t i = 0; i < n * static_cast<std::size_t>(config.model.top_k); ++i)
    experts.push_back(static_cast<std::int64_t>(i % n));
  for (const double common : {-0.9, 0.3, 1e9}) {
    Controller loaded(config);
    loaded.load(with_number(state, "limiter.common", 0, common));
    loaded.record(0, {.experts = experts});
    loaded.step();
    for (const double b : loaded.bias(0)) EXPECT_LE(std::abs(b), 0.0101) << common;
  }
}

// What once wrote out of bounds, turned negative or was taken for a gain.
TEST(SavedStates, NumbersThatNoRunCanHaveAreRefusedByName) {
  Controller controller(with(Actuator::kExpertBias, "adaptive_bias"));
  const std::string state = controller.save();
  const auto refused = [&](std::string_view entry, auto number) {
    try {
      controller.load(with_number(state, entry, 0, number));
    } catch (const StateError& error) {
      EXPECT_THAT(error.what(), HasSubstr("'" + std::string(entry) + "'"));
      EXPECT_EQ(controller.save(), state) << "the running one is left alone";
      return true;
    }
    return false;
  };
  const std::int64_t most = std::numeric_limits<std::int64_t>::max();
  EXPECT_TRUE(refused("steps", most));
  EXPECT_TRUE(refused("steps", std::int64_t{-1}));
  EXPECT_TRUE(refused("whiteness.decisions", std::int64_t{-1}));
  EXPECT_TRUE(refused("whiteness.decisions", most));
  EXPECT_TRUE(refused("adaptive.q", std::nan("")));
  EXPECT_TRUE(refused("adaptive.q", -1.0));
  EXPECT_TRUE(refused("whiteness.innovations", std::nan("")));
  EXPECT_TRUE(refused("adaptive.drift_share", 0.0));
  EXPECT_TRUE(refused("limiter.invalid_in_row", most));
  EXPECT_TRUE(refused("limiter.last_move_step", most));
  EXPECT_TRUE(refused("monitor.below", most));
  EXPECT_TRUE(refused("history.size", std::int64_t{13}));
  EXPECT_TRUE(refused("health.state", std::int64_t{8}));
  EXPECT_TRUE(refused("micro_batches", std::int64_t{-2}));
  EXPECT_TRUE(refused("applied", HUGE_VAL));
  EXPECT_TRUE(refused("response.newest", std::int64_t{3}));
  EXPECT_TRUE(refused("response.state", std::int64_t{kResponseCount}));
  EXPECT_TRUE(refused("response.decision", most));
  EXPECT_TRUE(refused("response.seen", most));
  EXPECT_TRUE(refused("response.nap", most));
  EXPECT_TRUE(refused("response.clock", std::int64_t{-1}));
  EXPECT_TRUE(refused("response.slope", -1.0));
  EXPECT_TRUE(refused("response.load", std::nan("")));
  EXPECT_TRUE(refused("response.held", std::int64_t{1}));
  EXPECT_THROW(
      controller.load(with_number(state, "response.state", 0, static_cast<std::int64_t>(Response::kAnswers))),
      StateError);
  EXPECT_FALSE(refused("adaptive.past_biases", std::int64_t{5}));
}

// More micro-batches than there is room for: longer by an id and a fingerprint for each, and complete.
TEST(SavedStates, ManyMicroBatchesAreAllRemembered) {
  Controller controller(plain());
  const std::vector<std::int64_t> experts = {0, 1};
  for (std::int64_t id = 0; id < 100; ++id) controller.record(0, {.experts = experts}, id);
  const std::string state = controller.save();
  Controller other(plain());
  EXPECT_EQ(state.size(), other.save().size() + 64 * 16);
  other.load(state);
  EXPECT_EQ(other.save(), state);
  for (std::int64_t id = 0; id < 100; ++id) other.record(0, {.experts = experts}, id);
  EXPECT_EQ(other.save(), state) << "each has been recorded already";
}

}  // namespace
}  // namespace moectl
