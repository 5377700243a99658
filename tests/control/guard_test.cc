#include "control/guard.h"

#include "control/config_fields.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <sstream>

#include "altered_state.h"
#include "moectl/controller.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"
#include "temp_dir.h"
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
  controller.record_with(0, [&](RoutingStats& sums) { sums.add_counts(counts, total); });
  return controller.step().layers[0];
}

const Counts kPile = {97, 1, 1, 1}, kEven = {25, 25, 25, 25};

TEST(Guard, OptionsNameKeyValueAndConstraint) {
  EXPECT_FALSE(check_fields(GuardOptions()));
  const auto wrong = [](auto&& change) {
    GuardOptions options;
    change(options);
    return text_of(check_fields(options));
  };
  EXPECT_EQ(wrong([](GuardOptions& o) { o.entropy_fall = 0; }), "entropy_fall: 0: must be in (0, 1]");
  EXPECT_EQ(wrong([](GuardOptions& o) { o.confirm = 0; }), "confirm: 0: must be at least 1");
  EXPECT_EQ(wrong([](GuardOptions& o) { o.cooldown = -1; }), "cooldown: -1: must be at least 0");
  EXPECT_EQ(wrong([](GuardOptions& o) { o.patience = 1'000'000'000'000; }), "");
  EXPECT_THAT(wrong([](GuardOptions& o) { o.patience = std::numeric_limits<std::int64_t>::max(); }),
              HasSubstr("patience: 9.22337e+18: must be at most 1e12"));
  EXPECT_THAT(wrong([](GuardOptions& o) { o.aux_factor = 0.5; }),
              HasSubstr("aux_factor: 0.5: must be at least 1"));
  EXPECT_THAT(wrong([](GuardOptions& o) { o.bias_step = -1; }), HasSubstr("bias_step: -1"));
}

// Every expert gets every token: the largest load is all that there is, and nothing is wrong.
TEST(Guard, IgnoresALayerWhereAllExpertsAreChosen) {
  ControllerConfig config = guarded(quick());
  config.model.top_k = config.model.experts;
  Controller controller(config);
  for (int step = 0; step < 20; ++step) {
    controller.record_with(0, [](RoutingStats& sums) { sums.add_counts(kEven, 25); });
    const LayerReport& report = controller.step().layers[0];
    ASSERT_EQ(report.guard.state, GuardState::kWatching) << step;
    EXPECT_EQ(report.guard.trigger, GuardTrigger::kNone) << step;
  }
}

// One signal alone, the others set so that they cannot act.
GuardOptions only(GuardTrigger signal) {
  GuardOptions options = quick();
  options.fhs = signal == GuardTrigger::kFhs;
  if (signal != GuardTrigger::kEntropyFall) options.entropy_fall = 1;
  if (signal != GuardTrigger::kDeadExperts) options.max_dead_share = 1;
  if (signal != GuardTrigger::kMaxLoad) options.max_token_share = 1;
  options.lost_after = signal == GuardTrigger::kLostBalance ? 10 : 1000000;
  return options;
}

// Feeds the same counts until the guard intervenes; returns how many steps that took, or -1.
int steps_to_intervention(Controller& controller, const Counts& counts, int most) {
  for (int i = 1; i <= most; ++i) {
    if (feed(controller, counts).guard.state == GuardState::kIntervening) return i;
  }
  return -1;
}

TEST(Guard, RecognisesFhsAboveOneUnlessNoiseExplainsIt) {
  Controller controller(guarded(only(GuardTrigger::kFhs)));
  EXPECT_EQ(steps_to_intervention(controller, kPile, 10), 3);
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.trigger, GuardTrigger::kFhs);
  EXPECT_EQ(seen.cause, GuardCause::kTriggered);
  // B = 1 - Σ √(p/N), W = 1 - Σ p^1.5 for k = 1.
  const double b = 1 - (std::sqrt(.97) + 3 * std::sqrt(.01)) / 2;
  const double w = 1 - (std::pow(.97, 1.5) + 3 * std::pow(.01, 1.5));
  EXPECT_NEAR(seen.value, b / w, 1e-9);
  EXPECT_EQ(seen.threshold, 1);
  // Two tokens that chance sent to one expert: FHS is above 1 as well, and says nothing (B = 1/2, its gate is at 0.65).
  Controller few(guarded(only(GuardTrigger::kFhs)));
  EXPECT_EQ(steps_to_intervention(few, {2, 0, 0, 0}, 50), -1);
  EXPECT_GT(few.report().layers[0].metrics->fhs.value_or(0), 1);
}

TEST(Guard, RecognisesFallingEntropy) {
  Controller controller(guarded(only(GuardTrigger::kEntropyFall)));
  for (int i = 0; i < 10; ++i) feed(controller, kEven);
  EXPECT_EQ(steps_to_intervention(controller, {70, 10, 10, 10}, 10), 3);
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.trigger, GuardTrigger::kEntropyFall);
  const double entropy = -(.7 * std::log(.7) + .3 * std::log(.1)) / std::log(4.0);
  EXPECT_NEAR(seen.value, entropy, 1e-9);
  // The slow average has taken in two of the three uneven steps.
  EXPECT_NEAR(seen.threshold, entropy + (1 - entropy) * .99 * .99 - .15, 1e-9);
}

TEST(Guard, RecognisesDeadExperts) {
  GuardOptions options = only(GuardTrigger::kDeadExperts);
  ControllerConfig config = guarded(options);
  Controller controller(config);
  const int steps = steps_to_intervention(controller, {34, 33, 33, 0}, 200);
  EXPECT_EQ(steps, config.monitor.dead_after + options.confirm - 1);
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.trigger, GuardTrigger::kDeadExperts);
  EXPECT_EQ(seen.value, 1);
  EXPECT_EQ(seen.threshold, 1);  // a quarter of four
}

TEST(Guard, RecognisesAnExpertThatMostTokensChoose) {
  Controller controller(guarded(only(GuardTrigger::kMaxLoad)));
  EXPECT_EQ(steps_to_intervention(controller, {79, 7, 7, 7}, 100), -1);
  EXPECT_EQ(steps_to_intervention(controller, {85, 5, 5, 5}, 10), 3);
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.trigger, GuardTrigger::kMaxLoad);
  EXPECT_NEAR(seen.value, .85, 1e-12);
  EXPECT_NEAR(seen.threshold, .8, 1e-12);
}

// Loads smoothed by 0.05 a step: after n uneven steps of MaxVio 1.4 the smoothed one is 1.4 (1 - 0.95^n), above 1
// from n = 25 on. It is so for ten steps at n = 34, and confirmed at 36.
TEST(Guard, RecognisesALastingLossOfBalance) {
  const Counts uneven = {60, 20, 10, 10};
  Controller controller(guarded(only(GuardTrigger::kLostBalance)));
  for (int i = 0; i < 10; ++i) feed(controller, kEven);
  EXPECT_EQ(steps_to_intervention(controller, uneven, 100), 36);
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.trigger, GuardTrigger::kLostBalance);
  EXPECT_NEAR(seen.value, 1.4 * (1 - std::pow(.95, 36)), 1e-9);
  EXPECT_EQ(seen.threshold, 1);

  Controller never(guarded(only(GuardTrigger::kLostBalance)));  // what never balanced has nothing to lose
  EXPECT_EQ(steps_to_intervention(never, uneven, 300), -1);

  Controller returning(guarded(only(GuardTrigger::kLostBalance)));  // a policy on its way back is left alone
  for (int i = 0; i < 10; ++i) feed(returning, kEven);
  EXPECT_EQ(steps_to_intervention(returning, uneven, 26), -1);
  EXPECT_EQ(steps_to_intervention(returning, {50, 25, 15, 10}, 100), -1);
}

// All experts but one are even among themselves: the policy has shown that it balances, and lost hold of that one.
TEST(Guard, RecognisesOneOverloadedExpertInABalancedLayer) {
  Controller controller(guarded(only(GuardTrigger::kLostBalance)));
  EXPECT_EQ(steps_to_intervention(controller, {52, 16, 16, 16}, 5), -1);
  EXPECT_EQ(steps_to_intervention(controller, {58, 14, 14, 14}, 100),
            7);  // lost from the first step, confirmed at 12
  EXPECT_EQ(controller.report().layers[0].guard.trigger, GuardTrigger::kLostBalance);
  Controller uneven(
      guarded(only(GuardTrigger::kLostBalance)));  // the second has more than 1.25 × the others' mean
  EXPECT_EQ(steps_to_intervention(uneven, {52, 22, 13, 13}, 5), -1);
  EXPECT_EQ(steps_to_intervention(uneven, {58, 20, 11, 11}, 300), -1);
  Controller nothing(guarded(only(GuardTrigger::kLostBalance)));  // experts without a token are not balanced
  EXPECT_EQ(steps_to_intervention(nothing, {99, 1, 0, 0}, 5), -1);
  EXPECT_EQ(steps_to_intervention(nothing, {100, 0, 0, 0}, 300), -1);
}

// One expert after another is overloaded, each for a step: smoothed loads stay even. MaxVio is 2.4 at each step and smoothed 2.4 (1 - 0.9^n),
// above twice 1 from n = 18 on; lost for ten steps at 27, confirmed at 29. What stays below twice is how data differ.
TEST(Guard, RecognisesExpertsThatAlternate) {
  const auto in_turn = [](std::int64_t most, int steps) {
    Controller controller(guarded(only(GuardTrigger::kLostBalance)));
    for (int i = 0; i < 10; ++i) feed(controller, kEven);
    for (int i = 0; i < steps; ++i) {
      Counts counts(4, (100 - most) / 3);
      counts[static_cast<std::size_t>(i % 4)] = most;
      if (feed(controller, counts).guard.state == GuardState::kIntervening) return i + 1;
    }
    return -1;
  };
  EXPECT_EQ(in_turn(85, 100), 29);
  EXPECT_EQ(in_turn(70, 300), -1);
}

// 1024 tokens for 256 experts: chance alone shows a MaxVio of 1.70, f z √(256/255) + f² (z² - 1)/6 with f = √(255/1024)
// and z = 2.8146. Twice that counts as balanced, so that a collapse that is over is seen to be over.
TEST(Guard, TheBalancedBoundIsAtLeastTwoFloors) {
  GuardOptions options = quick();
  options.dwell = 10;
  options.patience = 200;
  ControllerConfig config = guarded(options);
  config.model.experts = 256;
  Controller controller(config);
  Counts pile(256, 1);
  pile[0] = 769;
  ASSERT_EQ(steps_to_intervention(controller, pile, 3), 3);
  std::mt19937_64 random(11);
  double vio = 0;
  std::vector<GuardState> seen = {GuardState::kIntervening};
  for (int i = 0; i < 300; ++i) {
    Counts counts(256, 0);
    for (int token = 0; token < 1024; ++token) ++counts[random() % 256];
    const LayerReport& report = feed(controller, counts);
    if (report.guard.state != seen.back()) {
      seen.push_back(report.guard.state);
      EXPECT_EQ(report.guard.cause, GuardCause::kBalanced);
      EXPECT_NEAR(report.guard.threshold, 2 * 1.6953, 1e-3);
    }
    vio += *report.metrics->max_vio / 300;
  }
  EXPECT_GT(vio, 1.5);
  EXPECT_THAT(seen, ::testing::ElementsAre(GuardState::kIntervening, GuardState::kHandingBack,
                                           GuardState::kWatching));
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
  EXPECT_EQ(controller.report().layers[0].guard.cause, GuardCause::kBalanced);
  EXPECT_EQ(controller.report().layers[0].guard.value, 0);  // MaxVio
  EXPECT_EQ(controller.report().layers[0].guard.threshold, 1);
  for (int i = 0; i < 100 && controller.report().layers[0].guard.state == GuardState::kHandingBack; ++i) {
    feed(controller, kEven);
  }
  EXPECT_EQ(controller.report().layers[0].guard.state, GuardState::kWatching);
  EXPECT_NEAR(controller.aux_loss_weight(0), 0.01, 1e-11);
  EXPECT_NEAR(controller.temperature(0), 1, 1e-9);
  EXPECT_NEAR(controller.bias(0)[0], bias[0], 1e-12);  // what balanced stays
}

// Feeds the same counts until the guard is in a state; returns how many steps that took, or -1.
int steps_to(GuardState state, Controller& controller, const Counts& counts, int most) {
  for (int i = 1; i <= most; ++i) {
    if (feed(controller, counts).guard.state == state) return i;
  }
  return -1;
}

// Scalars go back by a quarter of the way at a time. Where the balance is lost the guard is a rung higher again, holds
// on there, for twice as long the next time, and tries again.
TEST(Guard, ReturnsToTheLastBalancedStepAndHoldsLongerEachTime) {
  GuardOptions options = quick();
  options.dwell = 10;
  options.patience = 60;
  ControllerConfig config = guarded(options);
  config.aux_loss_weight.limits.rate = 10;
  Controller controller(config);
  const auto aux = [&] { return std::log10(controller.aux_loss_weight(0) / 0.01); };
  for (int i = 0; i < 4; ++i) feed(controller, kPile);
  ASSERT_NEAR(aux(), 1, 1e-12);
  ASSERT_EQ(steps_to(GuardState::kHandingBack, controller, kEven, 20), 10);
  EXPECT_NEAR(aux(), 0.75, 1e-12);
  for (int i = 0; i < 9; ++i) feed(controller, kEven);
  EXPECT_NEAR(aux(), 0.75, 1e-12);
  const GuardReport& seen = controller.report().layers[0].guard;
  feed(controller, kEven);
  EXPECT_NEAR(aux(), 0.5, 1e-12);
  EXPECT_EQ(seen.cause, GuardCause::kBalanced);
  // MaxVio of the pile is 2.88; smoothed, 2.88 (1 - 0.9^n) is above 1 from n = 5 on, and confirmed at 7.
  EXPECT_EQ(steps_to(GuardState::kHolding, controller, kPile, 20), 7);
  EXPECT_EQ(seen.cause, GuardCause::kLost);
  EXPECT_NEAR(seen.value, 2.88 * (1 - std::pow(.9, 7)), 1e-9);
  EXPECT_EQ(seen.threshold, 1);
  EXPECT_NEAR(aux(), 0.75, 1e-12);  // the last that held
  EXPECT_EQ(steps_to(GuardState::kHandingBack, controller, kEven, 1000), 120);
  EXPECT_EQ(seen.cause, GuardCause::kRested);
  EXPECT_EQ(seen.value, 120);
  EXPECT_EQ(seen.threshold, 120);
  ASSERT_GT(steps_to(GuardState::kHolding, controller, kPile, 20), 0);
  EXPECT_EQ(steps_to(GuardState::kHandingBack, controller, kEven, 1000), 240);
  ASSERT_GT(steps_to(GuardState::kWatching, controller, kEven, 100), 30);
  EXPECT_EQ(seen.cause, GuardCause::kBalanced);
  EXPECT_NEAR(aux(), 0, 1e-9);
  EXPECT_NEAR(controller.temperature(0), 1, 1e-9);
}

// Soon after handing back the biases come first: the scalars rise by a tenth a step, and only while smoothed MaxVio is
// high. The guard then holds on, and gives up on what does not help.
TEST(Guard, ARelapseIsAnsweredByBiasesFirst) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 5; ++i) feed(controller, kPile);
  ASSERT_GT(steps_to(GuardState::kWatching, controller, kEven, 100), 0);
  const Counts uneven = {60, 20, 10, 10};
  const double aux = controller.aux_loss_weight(0), bias = controller.bias(0)[0];
  ASSERT_GT(steps_to(GuardState::kHolding, controller, uneven, 20), 0);
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.trigger, GuardTrigger::kRelapse);
  EXPECT_EQ(seen.cause, GuardCause::kTriggered);
  EXPECT_GT(seen.value, 1);
  EXPECT_EQ(seen.threshold, 1);
  EXPECT_NEAR(controller.aux_loss_weight(0), aux, 1e-12);
  EXPECT_LT(controller.bias(0)[0], bias);
  feed(controller, uneven);
  EXPECT_NEAR(controller.aux_loss_weight(0), aux * std::pow(10, 0.1), 1e-9);
  EXPECT_EQ(steps_to(GuardState::kRollingBack, controller, uneven, 100), 19);  // 20 steps of patience
  EXPECT_EQ(seen.cause, GuardCause::kNoHelp);
  ASSERT_GT(steps_to(GuardState::kCooldown, controller, uneven, 100), 0);
  EXPECT_NEAR(controller.aux_loss_weight(0), aux, 1e-9);
  EXPECT_NEAR(controller.bias(0)[0], bias, 1e-8);
}

// Near balance steps had become small, and a relapse goes on with those, no smaller than 1/256 of the rate.
TEST(Guard, ARelapseStartsWithTheLastBiasSteps) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 5; ++i) feed(controller, kPile);
  const GuardReport& seen = controller.report().layers[0].guard;
  int step = 0;
  for (; step < 200 && (step < 20 || seen.state != GuardState::kWatching); ++step) {
    feed(controller, step % 2 == 0 ? Counts{26, 24, 26, 24} : Counts{24, 26, 24, 26});
  }
  ASSERT_EQ(seen.state, GuardState::kWatching);
  const double bias = controller.bias(0)[0];
  ASSERT_GT(steps_to(GuardState::kHolding, controller, {60, 20, 10, 10}, 20), 0);
  EXPECT_EQ(seen.trigger, GuardTrigger::kRelapse);
  EXPECT_NEAR(controller.bias(0)[0], bias - 0.1 / 256, 0.02 / 256);
}

TEST(Guard, RollsBackAnInterventionThatDoesNotHelp) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 3; ++i) feed(controller, kPile);
  for (int i = 0; i < 20; ++i) feed(controller, kPile);
  const GuardReport& given_up = controller.report().layers[0].guard;
  EXPECT_EQ(given_up.state, GuardState::kRollingBack);
  EXPECT_EQ(given_up.trigger, GuardTrigger::kFhs);
  EXPECT_EQ(given_up.cause, GuardCause::kNoHelp);
  EXPECT_NEAR(given_up.value, 2.88, 1e-9);  // smoothed MaxVio, the same as at the start
  EXPECT_NEAR(given_up.threshold, 0.7 * 2.88, 1e-9);
  EXPECT_LT(controller.bias(0)[0], -1);
  EXPECT_GT(controller.temperature(0), 1.2);
  int steps = 0;
  while (controller.report().layers[0].guard.state == GuardState::kRollingBack && steps++ < 100) {
    feed(controller, kPile);
  }
  EXPECT_EQ(controller.report().layers[0].guard.state, GuardState::kCooldown);
  EXPECT_EQ(controller.report().layers[0].guard.cause, GuardCause::kUndone);
  EXPECT_NEAR(controller.bias(0)[0], 0, 1e-8);
  EXPECT_NEAR(controller.aux_loss_weight(0), 0.01, 1e-10);
  EXPECT_NEAR(controller.temperature(0), 1, 1e-8);
}

TEST(Guard, KeepsAnInterventionThatHelpedInPart) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 3; ++i) feed(controller, kPile);
  for (int i = 0; i < 20; ++i)
    feed(controller, {60, 20, 10, 10});  // MaxVio 2.88 → 1.4: under 0.7 of it, above 1
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.state, GuardState::kHandingBack);
  EXPECT_EQ(seen.cause, GuardCause::kHelped);
  EXPECT_NEAR(seen.value, 1.4 + 1.48 * std::pow(.9, 20), 1e-9);
  EXPECT_NEAR(seen.threshold, 0.7 * 2.88, 1e-9);
}

// What the run log holds of each decision of an intervention that is rolled back and of one that is handed back.
TEST(Guard, EachDecisionIsInTheLogWithItsNumbers) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  const ControllerConfig config = guarded(quick());
  {
    RunLogWriter writer(path, config);
    Controller controller(config);
    controller.set_log([&](const StepReport& report) { writer.write(report); });
    for (int i = 0; i < 60; ++i)
      feed(controller, kPile);  // intervenes, rolls back, rests, and intervenes again
    for (int i = 0; i < 60; ++i) feed(controller, kEven);
  }
  struct Seen {
    std::string state, trigger, cause;
    double value, threshold;
  };
  std::vector<Seen> decisions;
  std::istringstream lines(TempDir::read(path));
  std::string before = "watching";
  for (std::string line; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    if (!record.contains("step")) continue;
    Seen now{"watching", "none", "none", 0, 0};
    if (record.contains("guard")) {
      const auto& g = record["guard"];
      now = {g["state"], g["trigger"], g["cause"], g["value"], g["threshold"]};
    }
    if (now.state != before) decisions.push_back(now);
    before = now.state;
  }
  std::vector<std::string> told;
  for (const Seen& d : decisions) told.push_back(d.state + " " + d.cause);
  EXPECT_THAT(told, ::testing::ElementsAre("intervening triggered", "rolling_back no_help", "cooldown undone",
                                           "watching rested", "intervening triggered",
                                           "handing_back balanced", "watching balanced"));
  ASSERT_EQ(decisions.size(), 7U);
  for (const int i : {0, 1, 4}) {
    EXPECT_EQ(decisions[static_cast<std::size_t>(i)].trigger, "fhs") << i;
    EXPECT_GT(decisions[static_cast<std::size_t>(i)].value, decisions[static_cast<std::size_t>(i)].threshold)
        << i;
  }
  EXPECT_LE(decisions[2].value, decisions[2].threshold);
  EXPECT_EQ(decisions[3].value, 5);
  EXPECT_EQ(decisions[3].threshold, 5);
  EXPECT_EQ(decisions[5].threshold, 1);
  EXPECT_LE(decisions[6].value, 1);
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

// Whatever is counted, whatever state the guard is in: range, rate and centre hold for all three actuators.
TEST(Guard, HoldsTheLimitsOfAllThreeActuatorsOnHostileCounts) {
  std::mt19937_64 random(7);
  std::map<GuardState, int> visited;
  for (int run = 0; run < 40; ++run) {
    ControllerConfig config = guarded(quick());
    config.guard.aux_factor = 1000;
    config.guard.temperature_factor = 100;
    config.guard.bias_step = run % 2 == 0 ? 1 : 1e6;
    config.expert_bias.limits = {.min = -0.5, .max = 0.5, .rate = 0.07, .center = true};
    config.aux_loss_weight.limits = {.min = 1e-3, .max = 0.05, .rate = 0.2};
    config.router_temperature.limits = {.min = 0.8, .max = 2, .rate = 0.05};
    Controller controller(config);
    std::vector<double> bias(controller.bias(0).begin(), controller.bias(0).end());
    double aux = controller.aux_loss_weight(0), temperature = controller.temperature(0);
    Counts counts = kEven;
    for (int step = 0; step < 300; ++step) {
      if (random() % 12 == 0) {
        for (auto& c : counts) c = static_cast<std::int64_t>(random() % 4 == 0 ? 0 : random() % 1000);
        if (random() % 3 == 0) counts = kPile;
        if (random() % 3 == 0) counts = kEven;
      }
      ++visited[feed(controller, counts).guard.state];
      double sum = 0;
      for (std::size_t i = 0; i < bias.size(); ++i) {
        const double now = controller.bias(0)[i];
        ASSERT_LE(std::abs(now), 0.5);
        ASSERT_LE(std::abs(now - bias[i]), 0.07 + 1e-12);
        sum += now;
        bias[i] = now;
      }
      ASSERT_NEAR(sum, 0, 1e-9);
      ASSERT_GE(controller.aux_loss_weight(0), 1e-3);
      ASSERT_LE(controller.aux_loss_weight(0), 0.05);
      ASSERT_LE(std::abs(std::log(controller.aux_loss_weight(0) / aux)), 0.2 + 1e-12);
      ASSERT_GE(controller.temperature(0), 0.8);
      ASSERT_LE(controller.temperature(0), 2);
      ASSERT_LE(std::abs(std::log(controller.temperature(0) / temperature)), 0.05 + 1e-12);
      aux = controller.aux_loss_weight(0);
      temperature = controller.temperature(0);
    }
  }
  EXPECT_EQ(visited.size(), 6U);  // all states
}

TEST(Guard, EvenRoutingAndAShortOverloadLeaveItWatching) {
  Controller controller(guarded(quick()));
  for (int i = 0; i < 100; ++i) {
    const LayerReport& seen = feed(controller, i % 10 < 2 ? kPile : kEven);  // never three in a row
    ASSERT_EQ(seen.guard.state, GuardState::kWatching) << i;
  }
}

TEST(Guard, SavedAndLoadedItContinuesWithTheSameBits) {
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

// At every step of handing back, losing the balance, holding, handing back again.
TEST(Guard, SavedWhileHandingBackItContinuesWithTheSameBits) {
  std::map<GuardState, int> loaded;
  for (int at = 3; at < 90; ++at) {
    Controller first(guarded(quick()));
    const auto counts = [](int i) { return i < 3 || (i >= 8 && i < 14) ? kPile : kEven; };
    for (int i = 0; i < at; ++i) feed(first, counts(i));
    ++loaded[first.report().layers[0].guard.state];
    Controller second(guarded(quick()));
    second.load(first.save());
    for (int i = at; i < 120; ++i) {
      feed(first, counts(i));
      feed(second, counts(i));
      ASSERT_EQ(first.save(), second.save()) << at << " " << i;
    }
  }
  EXPECT_GT(loaded[GuardState::kHolding], 10);
  EXPECT_GT(loaded[GuardState::kHandingBack], 5);
}

// With a cadence, a decision may come at a step that brings no data: it goes by the load of the step before.
TEST(Guard, ADecisionWithoutDataIsTheSameAfterLoading) {
  ControllerConfig config = guarded(quick());
  config.expert_bias.limits.cadence = 2;
  Controller first(config);
  for (int i = 0; i < 5; ++i) feed(first, kPile);  // decides at steps 1, 3, 5
  ASSERT_EQ(first.report().layers[0].guard.state, GuardState::kIntervening);
  Controller second(config);
  second.load(first.save());
  const double before = first.bias(0)[0];
  first.step();
  second.step();
  EXPECT_LT(first.bias(0)[0], before);
  EXPECT_EQ(first.save(), second.save());
}

// Two layers share one weight. The second collapses while the first's guard has raised it: what it goes back to is what
// it was before either.
TEST(Guard, GuardsThatShareAnActuatorRestoreItsValue) {
  ControllerConfig config = guarded(quick());
  config.guard.dwell = 5;
  config.guard.patience = 40;
  config.model.layers = 2;
  config.aux_loss_weight.scope = Scope::kModel;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 1, .rate = 0.2};
  const auto step = [](Controller& controller, int i) {
    for (int layer = 0; layer < 2; ++layer) {
      const bool piled = i >= 10 + 8 * layer && i < 30 + 8 * layer;
      controller.record_with(layer, [&](RoutingStats& sums) { sums.add_counts(piled ? kPile : kEven, 100); });
    }
    controller.step();
  };
  Controller first(config), second(config);
  double most = 0;
  bool both = false;
  for (int i = 0; i < 300; ++i) {
    if (i == 16) second.load(first.save());  // the first layer's guard acts, the second's does not yet
    step(first, i);
    if (i >= 16) {
      step(second, i);
      ASSERT_EQ(first.save(), second.save()) << i;
    }
    most = std::max(most, first.aux_loss_weight(1));
    const auto layers = first.report().layers;
    both = both || (layers[0].guard.state == GuardState::kIntervening &&
                    layers[1].guard.state == GuardState::kIntervening);
  }
  EXPECT_TRUE(both);
  EXPECT_NEAR(most, 0.1, 1e-9);  // aux_factor times what it was, and no more
  EXPECT_NEAR(first.aux_loss_weight(0), 0.01, 1e-9);
  for (const LayerReport& layer : first.report().layers) EXPECT_EQ(layer.guard.state, GuardState::kWatching);
}

// The first layer is taking its weight back when the second collapses and wants all of it: the second's wish counts.
TEST(Guard, AmongGuardsThatShareAnActuatorTheLargestMoveDecides) {
  ControllerConfig config = guarded(quick());
  config.guard.dwell = 10;
  config.guard.patience = 100;
  config.model.layers = 2;
  config.aux_loss_weight.scope = Scope::kModel;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 1, .rate = 10};
  for (const std::size_t early : {0U, 1U}) {
    Controller controller(config);
    const auto step = [&](bool early_piled, bool late_piled) {
      for (std::size_t layer = 0; layer < 2; ++layer) {
        const bool piled = layer == early ? early_piled : late_piled;
        controller.record_with(static_cast<int>(layer),
                               [&](RoutingStats& sums) { sums.add_counts(piled ? kPile : kEven, 100); });
      }
      return controller.step().layers;
    };
    for (int i = 0; i < 4; ++i) step(true, false);
    for (int i = 0; i < 22; ++i) step(false, false);  // handing back, on the second rung
    ASSERT_NEAR(controller.aux_loss_weight(0), 0.01 * std::pow(10, 0.5), 1e-9) << early;
    for (int i = 0; i < 3; ++i) step(false, true);
    const auto layers = controller.report().layers;
    EXPECT_EQ(layers[early].guard.state, GuardState::kHandingBack) << early;
    EXPECT_EQ(layers[1 - early].guard.state, GuardState::kIntervening) << early;
    EXPECT_NEAR(controller.aux_loss_weight(0), 0.1, 1e-9) << early;
  }
}

TEST(Guard, ASavedValueThatIsNotFiniteIsRefused) {
  const auto guard = [] { return LayerGuard(quick(), {4, 1, {}}, LoadTargets(4)); };
  StateIo out;
  guard().exchange(out);
  const std::string state = out.bytes();
  const auto load = [&](double aux_before) {
    const std::string altered = testing::with_number(state, "guard.aux_before", 0, aux_before);
    StateIo in(altered);
    guard().exchange(in);
  };
  EXPECT_NO_THROW(load(0.01));
  EXPECT_THROW(load(std::nan("")), StateError);
  EXPECT_THROW(load(std::numeric_limits<double>::infinity()), StateError);
}

TEST(Guard, LosingBalanceIsSavedAndLoaded) {
  const Counts uneven = {60, 20, 10, 10};
  for (const int at :
       {5, 20, 40, 44, 80}) {  // balanced, then uneven, lost from step 35 on, intervening from 46 on
    Controller first(guarded(only(GuardTrigger::kLostBalance)));
    for (int i = 0; i < at; ++i) feed(first, i < 10 ? kEven : uneven);
    Controller second(guarded(only(GuardTrigger::kLostBalance)));
    second.load(first.save());
    for (int i = at; i < 120; ++i) {
      const Counts& counts = i < 10 || i > 100 ? kEven : uneven;
      feed(first, counts);
      feed(second, counts);
      ASSERT_EQ(first.save(), second.save()) << at << " " << i;
    }
  }
}

// On the simulated router: a policy too slow for a collapse, with and without the guard.
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

TEST(GuardOnTheRouter, RecoversACollapseThatThePolicyDoesNot) {
  const Outcome with = run_plant("sign_bias", Scenario::kCollapse, CollapseKind::kDeadThird, true, 3);
  const Outcome without = run_plant("sign_bias", Scenario::kCollapse, CollapseKind::kDeadThird, false, 3);
  EXPECT_GE(with.interventions, 1);
  EXPECT_LT(with.max_vio, 0.5);
  EXPECT_GT(without.max_vio, 1.0);
}

// All three actuators are fixed, so the guard is the only one to act, and whatever made the router collapse goes on.
// bench/collapse.cc runs it over hundreds of seeds.
TEST(GuardOnTheRouter, RecoversTheBalanceAlone) {
  int recovered = 0, without = 0, runs = 0;
  for (const CollapseKind kind : {CollapseKind::kRunaway, CollapseKind::kColdStart, CollapseKind::kDeadThird,
                                  CollapseKind::kPoisonedBias}) {
    for (const std::uint64_t seed : {1u, 2u, 3u}) {
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

// What nothing else holds the guard goes on holding, with trials to let go twice as far apart each time.
TEST(GuardOnTheRouter, HoldsTheBalanceAloneWithoutCycling) {
  for (const CollapseKind kind :
       {CollapseKind::kRunaway, CollapseKind::kColdStart, CollapseKind::kDeadThird}) {
    ControllerConfig config;
    config.model = {
        .layers = 1, .experts = 16, .top_k = 2, .tokens_per_step = 512, .domains = {}, .targets = {}};
    config.expert_bias.limits = {.min = -16, .max = 16, .rate = 1};
    config.aux_loss_weight.initial = 1e-3;
    config.guard.enabled = true;
    config.guard.patience = 100;
    Controller controller(config);
    SimulationOptions plant = simulation_options(controller.config());
    plant.scenario = Scenario::kCollapse;
    plant.collapse = kind;
    plant.event_step = 200;
    plant.seed = 5;
    std::vector<std::int64_t> holds;
    GuardState before = GuardState::kWatching;
    std::int64_t since = 0;
    int interventions = 0, rolled_back = 0;
    double held_vio = 0, held_steps = 0;
    simulate(controller, plant, 3000, [&](const StepReport& report) {
      const LayerReport& layer = report.layers[0];
      const GuardState now = layer.guard.state;
      if (now != before) {
        if (before == GuardState::kHolding) holds.push_back(report.step - since);
        interventions += now == GuardState::kIntervening;
        rolled_back += now == GuardState::kRollingBack;
        since = report.step;
      }
      before = now;
      if (now == GuardState::kHolding) {
        held_vio += *layer.metrics->max_vio;
        held_steps += 1;
      }
    });
    EXPECT_EQ(interventions, 1) << name_of(kind);
    EXPECT_EQ(rolled_back, 0) << name_of(kind);
    ASSERT_GE(holds.size(), 2U) << name_of(kind);
    for (std::size_t i = 0; i < holds.size(); ++i) EXPECT_GE(holds[i], 200 << i) << name_of(kind);
    EXPECT_LT(held_vio / held_steps, 0.6) << name_of(kind);
  }
}

TEST(GuardOnTheRouter, DoesNoHarmWhenThePolicyRecovers) {
  for (const CollapseKind kind :
       {CollapseKind::kRunaway, CollapseKind::kColdStart, CollapseKind::kPoisonedBias}) {
    EXPECT_LT(run_plant("sign_bias", Scenario::kCollapse, kind, true, 3).max_vio, 0.5) << name_of(kind);
  }
}

TEST(GuardOnTheRouter, LeavesHealthyRunsAlone) {
  for (const Scenario scenario : {Scenario::kSteady, Scenario::kShift, Scenario::kNoise}) {
    for (const char* policy : {"sign_bias", "adaptive_bias"}) {
      EXPECT_EQ(run_plant(policy, scenario, CollapseKind::kRunaway, true, 5).interventions, 0)
          << policy << " " << name_of(scenario);
    }
  }
}

// ---- Unequal targets. ----

ControllerConfig guarded_with(const GuardOptions& guard, std::vector<double> targets) {
  ControllerConfig config = guarded(guard);
  config.model.targets = std::move(targets);
  return config;
}

// Expert 0 should receive .88 of the tokens; its threshold is .8 + .2 (.88 - .25)/.75 = .968. What is wanted less
// than an even share keeps .8.
TEST(GuardWithTargets, ALoadOnALargeTargetIsNoTrigger) {
  const std::vector<double> targets = {0.88, 0.04, 0.04, 0.04};
  Controller controller(guarded_with(only(GuardTrigger::kMaxLoad), targets));
  EXPECT_EQ(steps_to_intervention(controller, {88, 4, 4, 4}, 50), -1);
  EXPECT_EQ(steps_to_intervention(controller, {96, 2, 1, 1}, 50), -1);
  EXPECT_EQ(steps_to_intervention(controller, {97, 1, 1, 1}, 10), 3);
  const GuardReport& seen = controller.report().layers[0].guard;
  EXPECT_EQ(seen.trigger, GuardTrigger::kMaxLoad);
  EXPECT_NEAR(seen.value, 0.97, 1e-12);
  EXPECT_NEAR(seen.threshold, 0.968, 1e-12);
  Controller other(guarded_with(only(GuardTrigger::kMaxLoad), targets));
  EXPECT_EQ(steps_to_intervention(other, {5, 85, 5, 5}, 10), 3);
  EXPECT_NEAR(other.report().layers[0].guard.threshold, 0.8, 1e-12);
}

// From even loads to (.7, .1, .1, .1) the entropy falls from 1 to .678: twice as far as a collapse may go.
TEST(GuardWithTargets, EntropyMayFallToThatOfTheTargets) {
  Controller controller(guarded_with(only(GuardTrigger::kEntropyFall), {0.7, 0.1, 0.1, 0.1}));
  for (int i = 0; i < 10; ++i) feed(controller, kEven);
  EXPECT_EQ(steps_to_intervention(controller, {70, 10, 10, 10}, 50), -1);
  EXPECT_EQ(steps_to_intervention(controller, {85, 5, 5, 5}, 10), 3);
  const auto entropy = [](double large, double small) {
    return -(large * std::log(large) + 3 * small * std::log(small)) / std::log(4.0);
  };
  EXPECT_NEAR(controller.report().layers[0].guard.value, entropy(.85, .05), 1e-9);
  EXPECT_NEAR(controller.report().layers[0].guard.threshold, entropy(.7, .1) - .15, 1e-9);
}

// One of the two experts with a target above 0; relative to all four experts it would take two.
TEST(GuardWithTargets, DeadShareRefersToExpertsWithATarget) {
  GuardOptions options = only(GuardTrigger::kDeadExperts);
  options.max_dead_share = 0.5;
  Controller controller(guarded_with(options, {0, 0.5, 0.5, 0}));
  EXPECT_EQ(steps_to_intervention(controller, {0, 50, 50, 0}, 200), -1);
  const int steps = steps_to_intervention(controller, {0, 100, 0, 0}, 200);
  EXPECT_GT(steps, 0);
  EXPECT_EQ(controller.report().layers[0].guard.value, 1);
  EXPECT_EQ(controller.report().layers[0].guard.threshold, 1);  // half of two
}

// Nothing is wanted of expert 3, and it takes nearly all: the guard pushes it away, as far as any.
TEST(GuardWithTargets, ExpertsWithTargetZeroArePushedAway) {
  Controller controller(guarded_with(only(GuardTrigger::kMaxLoad), {0.4, 0.3, 0.3, 0}));
  ASSERT_EQ(steps_to_intervention(controller, {4, 3, 3, 90}, 10), 3);
  for (int i = 0; i < 3; ++i) feed(controller, {4, 3, 3, 90});
  const auto bias = controller.bias(0);
  EXPECT_LT(bias[3], bias[0] - 0.1);
  EXPECT_TRUE(std::isfinite(bias[0]));
}

}  // namespace
}  // namespace moectl
