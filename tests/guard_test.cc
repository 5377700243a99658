#include "moectl/guard.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "moectl/controller.h"
#include "moectl/simulation.h"
#include "test_paths.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using Counts = std::vector<std::int64_t>;

GuardOptions quick() {
  GuardOptions options;
  options.enabled = true;
  options.warmup = 0;
  options.confirm = 3;
  options.dwell = 2;
  options.patience = 20;
  options.cooldown = 5;
  return options;
}

ControllerConfig guarded(const GuardOptions& guard) {
  ControllerConfig config;
  config.model.layers = 1;
  config.model.experts = 4;
  config.model.top_k = 1;
  config.expert_bias.limits = {.min = -4, .max = 4, .rate = 0.1, .center = true};
  config.aux_loss_weight.initial = 0.01;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 0.1, .rate = 1};
  config.guard = guard;
  return config;
}

const LayerReport& feed(Controller& controller, const Counts& counts) {
  const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  controller.record(0, [&](RoutingStats& sums) { sums.add_counts(counts, total); });
  return controller.step().layers[0];
}

const Counts kPile = {97, 1, 1, 1}, kEven = {25, 25, 25, 25};

TEST(Guard, OptionsNameKeyValueAndConstraint) {
  EXPECT_EQ(check_guard({}), "");
  const auto wrong = [](auto&& change) {
    GuardOptions options;
    change(options);
    return check_guard(options);
  };
  EXPECT_EQ(wrong([](GuardOptions& o) { o.entropy_fall = 0; }), "entropy_fall: 0: must be in (0, 1]");
  EXPECT_EQ(wrong([](GuardOptions& o) { o.confirm = 0; }), "confirm: 0: must be at least 1");
  EXPECT_EQ(wrong([](GuardOptions& o) { o.cooldown = -1; }), "cooldown: -1: must be at least 0");
  EXPECT_THAT(wrong([](GuardOptions& o) { o.aux_factor = 0.5; }),
              HasSubstr("aux_factor: 0.5: must be at least 1"));
  EXPECT_THAT(wrong([](GuardOptions& o) { o.bias_step = -1; }), HasSubstr("bias_step: -1"));
}

TEST(Guard, IntervenesOnceConfirmedAndHandsBackOnceBalanced) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 2; ++i) {
    const LayerReport& seen = feed(controller, kPile);
    EXPECT_EQ(seen.guard.state, GuardState::kWatching);
    EXPECT_NE(seen.guard.trigger, GuardTrigger::kNone);
    EXPECT_FALSE(seen.actuators[0].reasons.has(Reason::kGuard));
  }
  const LayerReport& third = feed(controller, kPile);
  EXPECT_EQ(third.guard.state, GuardState::kIntervening);
  EXPECT_EQ(third.guard.trigger, GuardTrigger::kFhs);
  EXPECT_GT(third.guard.value, third.guard.threshold);
  for (const ActuatorReport& actuator : third.actuators) EXPECT_TRUE(actuator.reasons.has(Reason::kGuard));
  EXPECT_LT(controller.bias(0)[0], 0);
  EXPECT_NEAR(controller.aux_loss_weight(0), 0.01 * std::exp(1.0), 1e-12);  // at the rate
  feed(controller, kPile);
  feed(controller, kPile);
  EXPECT_NEAR(controller.aux_loss_weight(0), 0.1, 1e-12);  // ten times, and no more
  EXPECT_GT(controller.temperature(0), 1);
  const std::vector<double> bias(controller.bias(0).begin(), controller.bias(0).end());
  for (int i = 0; i < 2; ++i) feed(controller, kEven);
  EXPECT_EQ(controller.report().layers[0].guard.state, GuardState::kHandingBack);
  for (int i = 0; i < 6; ++i) feed(controller, kEven);
  EXPECT_EQ(controller.report().layers[0].guard.state, GuardState::kWatching);
  EXPECT_NEAR(controller.aux_loss_weight(0), 0.01, 1e-11);
  EXPECT_NEAR(controller.temperature(0), 1, 1e-9);
  EXPECT_NEAR(controller.bias(0)[0], bias[0], 1e-12);  // what balanced stays
}

TEST(Guard, RollsBackWhatDoesNotHelp) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 3; ++i) feed(controller, kPile);
  for (int i = 0; i < 20; ++i) feed(controller, kPile);
  EXPECT_EQ(controller.report().layers[0].guard.state, GuardState::kRollingBack);
  EXPECT_LT(controller.bias(0)[0], -1);
  int steps = 0;
  while (controller.report().layers[0].guard.state == GuardState::kRollingBack && steps++ < 100) {
    feed(controller, kPile);
  }
  EXPECT_EQ(controller.report().layers[0].guard.state, GuardState::kCooldown);
  EXPECT_NEAR(controller.bias(0)[0], 0, 1e-8);
  EXPECT_NEAR(controller.aux_loss_weight(0), 0.01, 1e-10);
}

TEST(Guard, NeverOverridesALimitOrAFreeze) {
  Controller controller(guarded(quick()));
  double last = 0;
  for (int i = 0; i < 60; ++i) {
    feed(controller, kPile);
    EXPECT_LE(std::abs(controller.bias(0)[0] - last), 0.1 + 1e-12);
    EXPECT_LE(controller.aux_loss_weight(0), 0.1);
    last = controller.bias(0)[0];
  }
  Controller frozen(guarded(quick()));
  frozen.freeze(0);
  for (int i = 0; i < 10; ++i) feed(frozen, kPile);
  EXPECT_EQ(frozen.bias(0)[0], 0);
  EXPECT_EQ(frozen.report().layers[0].guard.state, GuardState::kWatching);
}

TEST(Guard, EvenRoutingAndAPassingPileLeaveItWatching) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 100; ++i) {
    const LayerReport& seen = feed(controller, i % 10 < 2 ? kPile : kEven);  // never three in a row
    ASSERT_EQ(seen.guard.state, GuardState::kWatching) << i;
  }
}

TEST(Guard, SavedAndLoadedItGoesOnWithTheSameBits) {
  for (const int at : {2, 5, 12, 24, 40}) {
    Controller first(guarded(quick()));
    for (int i = 0; i < at; ++i) feed(first, kPile);
    Controller second(guarded(quick()));
    second.load(first.save());
    for (int i = 0; i < 60; ++i) {
      const Counts& counts = i % 20 < 12 ? kPile : kEven;
      feed(first, counts);
      feed(second, counts);
      ASSERT_EQ(first.save(), second.save()) << at << " " << i;
    }
  }
}

// On the simulated router: a law too slow for a collapse, with and without the guard.
struct Outcome {
  double max_vio = 0;
  int interventions = 0;
};
Outcome run_plant(const char* config_name, Scenario scenario, CollapseKind kind, bool guard,
                  std::uint64_t seed) {
  ControllerConfig config =
      load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/" + config_name + ".yaml");
  config.model.layers = 1;
  config.expert_bias.limits.rate = 0.05;
  config.guard.enabled = guard;
  Controller controller(config);
  SimulationOptions options = simulation_options(config);
  options.scenario = scenario;
  options.collapse = kind;
  options.event_step = 200;
  options.seed = seed;
  Outcome out;
  GuardState last = GuardState::kWatching;
  simulate(controller, options, 600, [&](const StepReport& report) {
    const LayerReport& layer = report.layers[0];
    if (layer.guard.state == GuardState::kIntervening && last != GuardState::kIntervening)
      ++out.interventions;
    last = layer.guard.state;
    if (report.step >= 560) out.max_vio += *layer.metrics->max_vio / 40;
  });
  return out;
}

TEST(GuardOnThePlant, RecoversACollapseThatTheLawAloneDoesNot) {
  const Outcome with = run_plant("sign_bias", Scenario::kCollapse, CollapseKind::kDeadThird, true, 3);
  const Outcome without = run_plant("sign_bias", Scenario::kCollapse, CollapseKind::kDeadThird, false, 3);
  EXPECT_GE(with.interventions, 1);
  EXPECT_LT(with.max_vio, 0.5);
  EXPECT_GT(without.max_vio, 1.0);
}

// All three actuators are fixed, so the guard is the only one to act, and whatever made the router collapse goes on.
// bench/collapse.cc runs it over hundreds of seeds.
TEST(GuardOnThePlant, RecoversAloneWhatNothingElseHolds) {
  int recovered = 0, without = 0, runs = 0;
  for (const CollapseKind kind : {CollapseKind::kRunaway, CollapseKind::kColdStart, CollapseKind::kDeadThird,
                                  CollapseKind::kPoisonedBias}) {
    for (const std::uint64_t seed : {1, 2, 3}) {
      const auto max_vio = [&](bool guard) {
        ControllerConfig config;
        config.model = {
            .layers = 1, .experts = 16, .top_k = 2, .tokens_per_step = 512, .domains = {}, .targets = {}};
        config.expert_bias.limits = {.min = -16, .max = 16, .rate = 1};
        config.aux_loss_weight.initial = 1e-3;
        config.guard.enabled = guard;
        Controller controller(config);
        SimulationOptions plant = simulation_options(controller.config());
        plant.gate = seed % 2 == 0 ? SimulatedGate::kSigmoid : SimulatedGate::kSoftmax;
        plant.scenario = Scenario::kCollapse;
        plant.collapse = kind;
        plant.event_step = 200;
        plant.seed = seed;
        double sum = 0;
        simulate(controller, plant, 600, [&](const StepReport& report) {
          if (report.step >= 550) sum += *report.layers[0].metrics->max_vio / 50;
        });
        return sum;
      };
      ++runs;
      recovered += max_vio(true) <= 1;
      without += max_vio(false) <= 1;
    }
  }
  EXPECT_GE(recovered, runs - 1);
  EXPECT_LE(without, runs / 5);
}

TEST(GuardOnThePlant, DoesNoHarmWhereTheLawRecoversByItself) {
  for (const CollapseKind kind :
       {CollapseKind::kRunaway, CollapseKind::kColdStart, CollapseKind::kPoisonedBias}) {
    EXPECT_LT(run_plant("sign_bias", Scenario::kCollapse, kind, true, 3).max_vio, 0.5) << name_of(kind);
  }
}

TEST(GuardOnThePlant, LeavesHealthyRunsAlone) {
  for (const Scenario scenario : {Scenario::kSteady, Scenario::kShift, Scenario::kNoise}) {
    for (const char* policy : {"sign_bias", "adaptive_bias"}) {
      EXPECT_EQ(run_plant(policy, scenario, CollapseKind::kRunaway, true, 5).interventions, 0)
          << policy << " " << name_of(scenario);
    }
  }
}

}  // namespace
}  // namespace moectl
