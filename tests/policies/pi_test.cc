#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "policies/policy_rig.h"
#include "test_paths.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::RigOptions;
using moectl::testing::stats_of;

RigOptions aux(std::map<std::string, OptionValue> options) {
  return {.actuator = Actuator::kAuxLossWeight, .experts = 2, .top_k = 1, .options = std::move(options)};
}

// N = 2, counts (3, 1): load_cv = 0.5. Target 0.25: e = clip((0.5 - 0.25)/0.25) = 1.
TEST(Pi, StepsByHand) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")},
                           {"target", 0.25},
                           {"ema", 1.0},
                           {"kp", 2.0},
                           {"ki", 0.5},
                           {"dead_band", 0.0}}));
  rig.step(stats_of(rig.shape(), {3, 1}));
  EXPECT_NEAR(rig.value[0], 0.01 * std::exp(0.5), 1e-15);  // no kick at first, ki · 1
  rig.step(stats_of(rig.shape(), {1, 1}));                 // e = -1: kp · (-2) + ki · (-1)
  EXPECT_NEAR(rig.value[0], 0.01 * std::exp(0.5 - 4.5), 1e-15);
}

TEST(Pi, ANextMoveMakesUpForAKickThatACooldownHeldBack) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")},
                           {"target", 0.25},
                           {"ema", 1.0},
                           {"kp", 2.0},
                           {"ki", 0.0},
                           {"dead_band", 0.0}}));
  rig.step(stats_of(rig.shape(), {3, 1}));
  LimitReport held;
  held.add(Reason::kCooldown);
  rig.propose(stats_of(rig.shape(), {1, 1}));
  rig.settle({0.01}, held);
  rig.step(stats_of(rig.shape(), {1, 1}));
  EXPECT_NEAR(rig.value[0], 0.01 * std::exp(-4.0), 1e-15);
}

TEST(Pi, StaysPutInsideItsDeadBand) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")}, {"target", 0.5}, {"dead_band", 0.1}}));
  for (int i = 0; i < 20; ++i) rig.step(stats_of(rig.shape(), {i % 2 == 0 ? 302 : 298, 100}));
  EXPECT_EQ(rig.value[0], 0.01);
}

// A router that answers sluggishly: excess → f(w) with a time constant of `lag` decisions, f falling by
// `slope` in logarithms; the measured CV² carries sampling noise.
struct Closed {
  double settled_step = -1, overshoot = 0, last = 0, weight = 0;
};
Closed close_loop(double first_weight, double slope, double lag, double target) {
  ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/pi.yaml");
  config.model.layers = 1;
  config.model.experts = 16;
  config.model.top_k = 1;
  config.aux_loss_weight.initial = first_weight;
  config.aux_loss_weight.limits.cadence = 10;
  config.aux_loss_weight.options.set("target", target);
  Controller controller(config);
  std::mt19937_64 random(17);
  const auto f = [&](double w) { return 0.2 * std::pow(w / 0.01, -slope); };
  double excess = f(first_weight);
  Closed out;
  const std::int64_t tokens = 20000;
  for (int decision = 0; decision < 400; ++decision) {
    excess += (f(controller.aux_loss_weight(0)) - excess) / lag;
    for (int step = 0; step < 10; ++step) {
      std::vector<std::int64_t> counts(16);
      for (std::size_t i = 0; i < 16; ++i) {
        const double share = (1 + excess * (i % 2 == 0 ? 1 : -1)) / 16;
        std::normal_distribution<double> noise(0, std::sqrt(static_cast<double>(tokens) * share));
        counts[i] = std::max<std::int64_t>(
            0, static_cast<std::int64_t>(std::lround(static_cast<double>(tokens) * share + noise(random))));
      }
      std::int64_t total = 0;
      for (const auto c : counts) total += c;
      controller.record(0, [&](RoutingStats& sums) { sums.add_counts(counts, total); });
      controller.step();
    }
    if (std::abs(excess / target - 1) > 0.15) {
      out.settled_step = -1;
    } else if (out.settled_step < 0) {
      out.settled_step = decision;
    }
    const bool from_above = f(first_weight) > target;
    out.overshoot = std::max(out.overshoot, from_above ? 1 - excess / target : excess / target - 1);
  }
  out.last = excess;
  out.weight = controller.aux_loss_weight(0);
  return out;
}

TEST(Pi, SettlesOnASluggishRouterFromBothSides) {
  for (const double first : {3e-4, 0.08}) {
    for (const double slope : {0.3, 0.6}) {
      for (const double lag : {4.0, 10.0}) {
        const Closed loop = close_loop(first, slope, lag, 0.2);
        EXPECT_GE(loop.settled_step, 0) << first << " " << slope << " " << lag << ": " << loop.last;
        EXPECT_LT(loop.settled_step, 150) << first << " " << slope << " " << lag;
        EXPECT_LT(loop.overshoot, 0.5) << first << " " << slope << " " << lag;
      }
    }
  }
}

// load_cv is .5 for (3, 1) and .3 for (13, 7): errors of ±.25 at a target of .4, five decisions each. With kp
// = ki = 0 only the relay moves the weight: it starts at the sixth decision, downwards, and the wave in force
// is that of the errors turned round and one decision late, so |U|/|E| = .7/.25 over cycles of ten decisions.
TEST(Pi, AutotuneReadsItsGainsFromTheSwing) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")},
                           {"target", 0.4},
                           {"ema", 1.0},
                           {"kp", 0.0},
                           {"ki", 0.0},
                           {"dead_band", 0.1},
                           {"autotune", true}}));
  PolicyRig resumed = PolicyRig("pi", aux({{"metric", std::string("load_cv")},
                                           {"target", 0.4},
                                           {"ema", 1.0},
                                           {"kp", 0.0},
                                           {"ki", 0.0},
                                           {"dead_band", 0.1},
                                           {"autotune", true}}));
  const RoutingStats uneven = stats_of(rig.shape(), {3, 1}), even = stats_of(rig.shape(), {13, 7});
  const auto window = [&](int decision) { return decision / 5 % 2 == 0 ? uneven : even; };
  for (int decision = 0; decision < 30; ++decision) {
    rig.step(window(decision));
    const double swing = decision < 5 ? 0 : (decision / 5 % 2 == 0 ? 0.7 : -0.7);
    ASSERT_NEAR(std::log(rig.value[0] / 0.01), swing, 1e-12) << decision;
    if (decision == 17) {
      resumed.load(rig.save());
      resumed.value = rig.value;
      resumed.now = rig.now;
    } else if (decision > 17) {
      resumed.step(window(decision));
      ASSERT_EQ(resumed.value, rig.value);
    }
  }
  rig.step(uneven);  // the third turn upwards: two whole cycles, and the swing is taken back
  EXPECT_NEAR(rig.value[0], 0.01, 1e-14);
  const double kp = 0.7 / 0.25 / 3.2, ki = kp / 10;
  rig.step(even);
  EXPECT_NEAR(std::log(rig.value[0] / 0.01), kp * -0.5 + ki * -0.25, 1e-12);
}

TEST(Pi, AutotuneThatNeverSeesATurnKeepsTheGainsGiven) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")},
                           {"target", 0.25},
                           {"ema", 1.0},
                           {"kp", 0.0},
                           {"ki", 0.5},
                           {"autotune", true}}));
  for (int i = 0; i < 500; ++i) {
    rig.step(stats_of(rig.shape(), {3, 1}));
    rig.value[0] = std::min(rig.value[0], 0.1);
  }
  const double before = rig.value[0];
  EXPECT_NEAR(std::log(rig.step(stats_of(rig.shape(), {3, 1}))[0] / before), 0.5, 1e-12);
}

TEST(Pi, AtABoundItDoesNotWindUp) {
  // A target out of reach: the weight goes to its bound and stays; relieved, it leaves it within a few
  // decisions.
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")}, {"target", 0.25}, {"ema", 1.0}}));
  for (int i = 0; i < 1000; ++i) {
    std::vector<double> wanted = rig.propose(stats_of(rig.shape(), {3, 1}));
    LimitReport range;
    if (wanted[0] > 0.1) range.add(Reason::kRange);
    rig.settle({std::min(wanted[0], 0.1)}, range);
  }
  EXPECT_EQ(rig.value[0], 0.1);
  rig.step(stats_of(rig.shape(), {1, 1}));
  EXPECT_LT(rig.value[0], 0.1);
}

}  // namespace
}  // namespace moectl
