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
                           {"error_tolerance", 0.0}}));
  rig.step(stats_of(rig.shape(), {3, 1}));
  EXPECT_NEAR(rig.value[0], 0.01 * std::exp(0.5), 1e-15);  // no kick at first, ki · 1
  rig.step(stats_of(rig.shape(), {1, 1}));                 // e = -1: kp · (-2) + ki · (-1)
  EXPECT_NEAR(rig.value[0], 0.01 * std::exp(0.5 - 4.5), 1e-15);
}

TEST(Pi, TheNextMoveMakesUpForOneThatACooldownHeld) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")},
                           {"target", 0.25},
                           {"ema", 1.0},
                           {"kp", 2.0},
                           {"ki", 0.0},
                           {"error_tolerance", 0.0}}));
  rig.step(stats_of(rig.shape(), {3, 1}));
  LimitReport held;
  held.add(Reason::kCooldown);
  rig.propose(stats_of(rig.shape(), {1, 1}));
  rig.settle({0.01}, held);
  rig.step(stats_of(rig.shape(), {1, 1}));
  EXPECT_NEAR(rig.value[0], 0.01 * std::exp(-4.0), 1e-15);
}

// N = 2, counts (1 + c, 1 - c): load_cv = c; target 0.4. With ema = 1, e = ε.
TEST(Pi, MovesWhenEvidenceIsComplete) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")},
                           {"target", 0.4},
                           {"ema", 1.0},
                           {"kp", 1.0},
                           {"ki", 0.1},
                           {"error_tolerance", 0.1}}));
  const auto window = [&](double error) {
    const auto odd = static_cast<std::int64_t>(std::llround(0.4 * (1 + error) * 1e9));
    return stats_of(rig.shape(), {1000000000 + odd, 1000000000 - odd});
  };
  // Alternating ±.05: every second difference is ±.2, σ² = .04/6, σ = .0816.
  for (int i = 0; i < 200; ++i) rig.step(window(i % 2 == 0 ? 0.05 : -0.05));
  ASSERT_EQ(rig.value[0], 0.01);
  // .25, .15, .25 …: second differences .4, -.4 (the jump) and then ±.2 again, so that σ goes .088, .093, .092,
  // .092, .091 and S grows by 1.71, .54, 1.63, .54 and 1.64: complete at the fifth.
  const double before = rig.value[0];
  for (int i = 0; i < 5; ++i) {
    ASSERT_EQ(rig.value[0], before) << i;
    rig.step(window(i % 2 == 0 ? 0.25 : 0.15));
  }
  // kp (e beyond the band) + ki (sum of the errors of five decisions).
  EXPECT_NEAR(std::log(rig.value[0] / before), 0.15 + 0.1 * (0.25 + 0.15 + 0.25 + 0.15 + 0.25), 1e-6);
}

TEST(Pi, StaysPutWithinItsTolerance) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")}, {"target", 0.5}, {"error_tolerance", 0.1}}));
  for (int i = 0; i < 20; ++i) rig.step(stats_of(rig.shape(), {i % 2 == 0 ? 302 : 298, 100}));
  EXPECT_EQ(rig.value[0], 0.01);
}

// A router that answers sluggishly: excess → f(w) with a time constant of `lag` decisions, f falling by
// `slope` in logarithms; the measured CV² carries sampling noise.
struct Loop {
  double first_weight = 0.01, slope = 0.5, lag = 4;
  unsigned seed = 17;
  int decisions = 400;
};
struct Closed {
  int settled = -1;  // decision from which on the excess stays within 15 % of the target
  double overshoot = 0, last = 0;
  int moves = 0;  // of the weight in the last 100 decisions
};
Closed close_loop(const Loop& loop) {
  constexpr double kTarget = 0.2;
  ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/pi.yaml");
  config.model.layers = 1;
  config.model.experts = 16;
  config.model.top_k = 1;
  config.aux_loss_weight.initial = loop.first_weight;
  config.aux_loss_weight.limits.cadence = 10;
  config.aux_loss_weight.options.set("target", kTarget);
  Controller controller(config);
  std::mt19937_64 random(loop.seed);
  const auto f = [&](double w) { return kTarget * std::pow(w / 0.01, -loop.slope); };
  double excess = f(loop.first_weight);
  Closed out;
  const std::int64_t tokens = 20000;
  for (int decision = 0; decision < loop.decisions; ++decision) {
    const double before = controller.aux_loss_weight(0);
    excess += (f(before) - excess) / loop.lag;
    for (int step = 0; step < 10; ++step) {
      std::vector<std::int64_t> counts(16);
      for (std::size_t i = 0; i < 16; ++i) {
        const double share = std::max(0.0, 1 + excess * (i % 2 == 0 ? 1 : -1)) / 16;
        std::normal_distribution<double> noise(0, std::sqrt(static_cast<double>(tokens) * share));
        counts[i] = std::max<std::int64_t>(
            0, static_cast<std::int64_t>(std::lround(static_cast<double>(tokens) * share + noise(random))));
      }
      std::int64_t total = 0;
      for (const auto c : counts) total += c;
      controller.record_with(0, [&](RoutingStats& sums) { sums.add_counts(counts, total); });
      controller.step();
    }
    out.moves += decision >= loop.decisions - 100 && controller.aux_loss_weight(0) != before;
    if (std::abs(excess / kTarget - 1) > 0.15) {
      out.settled = -1;
    } else if (out.settled < 0) {
      out.settled = decision;
    }
    const bool from_above = f(loop.first_weight) > kTarget;
    out.overshoot = std::max(out.overshoot, from_above ? 1 - excess / kTarget : excess / kTarget - 1);
  }
  out.last = excess;
  return out;
}

TEST(Pi, SettlesOnASluggishRouterFromBothSides) {
  for (const double first : {3e-4, 0.08}) {
    for (const double slope : {0.3, 0.6}) {
      for (const double lag : {4.0, 10.0}) {
        const Closed loop = close_loop({.first_weight = first, .slope = slope, .lag = lag});
        EXPECT_GE(loop.settled, 0) << first << " " << slope << " " << lag << ": " << loop.last;
        EXPECT_LT(loop.settled, 150) << first << " " << slope << " " << lag;
        EXPECT_LT(loop.overshoot, 0.5) << first << " " << slope << " " << lag;
      }
    }
  }
}

// The router does not change any more, its statistics scatter: from then on nothing moves.
TEST(Pi, AtRestWithinItsToleranceNothingMoves) {
  for (const double lag : {2.0, 10.0}) {
    for (unsigned seed = 1; seed <= 6; ++seed) {
      const Closed loop = close_loop({.first_weight = 0.002, .lag = lag, .seed = seed});
      EXPECT_NEAR(loop.last, 0.2, 0.2 * 0.08) << lag << " " << seed;
      EXPECT_EQ(loop.moves, 0) << lag << " " << seed;
    }
  }
}

// A metric of single windows that scatter by three times the tolerance: the mean is right, so nothing moves for
// long; when the mean is off target, it moves.
TEST(Pi, NoiseBeyondTheToleranceIsNoReasonToMove) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")}, {"target", 0.4}, {"error_tolerance", 0.05}}));
  std::mt19937_64 random(3);
  std::normal_distribution<double> noise(0, 0.06);
  const auto window = [&](double mean) {
    const auto odd = static_cast<std::int64_t>(std::lround(1e6 * std::clamp(mean + noise(random), 0.0, 1.0)));
    return stats_of(rig.shape(), {1000000 + odd, 1000000 - odd});
  };
  for (int i = 0; i < 100; ++i) rig.step(window(0.4));
  int moves = 0;
  for (int i = 0; i < 300; ++i) {
    const double before = rig.value[0];
    moves += rig.step(window(0.4))[0] != before;
  }
  EXPECT_LE(moves, 15);
  const double before = rig.value[0];
  for (int i = 0; i < 60; ++i) rig.step(window(0.52));
  EXPECT_GT(rig.value[0], 1.5 * before);
}

// A target out of reach: the weight goes to its bound and stays there exactly, however the error scatters; and
// leaves it at the first error that is less than all before.
TEST(Pi, AtABoundItDoesNotWindUp) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")}, {"target", 0.25}, {"ema", 1.0}}));
  const auto step = [&](std::int64_t a) {
    const std::vector<double> wanted = rig.propose(stats_of(rig.shape(), {a, 200 - a}));
    LimitReport range;
    if (wanted[0] > 0.1) range.add(Reason::kRange);
    rig.settle({std::min(wanted[0], 0.1)}, range);
  };
  std::mt19937_64 random(5);
  for (int i = 0; i < 1000; ++i) {
    step(132 + static_cast<std::int64_t>(random() % 16));  // errors .28 to .88
    if (i > 100) {
      ASSERT_EQ(rig.value[0], 0.1) << i;
    }
  }
  step(126);  // 0.04: inside the tolerance, and yet so much less than before that less weight will do
  EXPECT_LT(rig.value[0], 0.1);
}

// At its bound nothing was moved, so an error that seems to vanish by itself is noise, and the integral goes on: one
// window's fall of .08 is outweighed by it.
TEST(Pi, AtABoundNoErrorVanishesByItself) {
  PolicyRig rig("pi", aux({{"metric", std::string("load_cv")}, {"target", 0.25}, {"ema", 1.0}, {"kp", 0.5}}));
  const auto step = [&](std::int64_t a) {
    const std::vector<double> wanted = rig.propose(stats_of(rig.shape(), {a, 200 - a}));
    LimitReport range;
    if (wanted[0] > 0.1) range.add(Reason::kRange);
    rig.settle({std::min(wanted[0], 0.1)}, range);
  };
  for (int i = 0; i < 100; ++i) step(140);  // error .6
  ASSERT_EQ(rig.value[0], 0.1);
  step(138);  // .52: the change by -.5 · .08, the integral by .15 · .52
  EXPECT_EQ(rig.value[0], 0.1);
}

// Also evidence that less will do is saved.
TEST(Pi, SavedBeforeAMoveDownItContinuesWithTheSameBits) {
  const auto options = aux({{"metric", std::string("load_cv")}, {"target", 0.25}});
  for (int saved_at = 1; saved_at < 40; ++saved_at) {
    PolicyRig a("pi", options), b("pi", options);
    std::mt19937_64 random(11);
    for (int i = 0; i < 60; ++i) {
      const auto odd = static_cast<std::int64_t>(21 + random() % 5);  // errors -.16 to 0
      if (i == saved_at) {
        b.load(a.save());
        b.value = a.value;
        b.now = a.now;
      }
      const RoutingStats stats = stats_of(a.shape(), {100 + odd, 100 - odd});
      a.step(stats);
      if (i < saved_at) continue;
      b.step(stats);
      ASSERT_EQ(a.value, b.value) << saved_at << " " << i;
    }
    EXPECT_LT(a.value[0], 0.01);
  }
}

}  // namespace
}  // namespace moectl
