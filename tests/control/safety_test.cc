#include "control/safety.h"
#include "control/config_check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "allocation_counter.h"

namespace moectl {
namespace {

std::string check_limits(Actuator actuator, const Limits& limits, double initial) {
  return text_of(problem_in(actuator, limits, initial));
}

using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pointwise;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

Limits bias_limits(double range = 16, double rate = 0.01, bool center = false) {
  return {.min = -range, .max = range, .rate = rate, .center = center};
}

double mean_of(const std::vector<double>& v) {
  return std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
}

// One actuator and its limiter, stepped by hand.
class Rig {
 public:
  Rig(Actuator actuator, const Limits& limits, std::vector<double> start, const SafetyOptions& options = {},
      double safe = 0)
      : limiter_(actuator, limits, options, static_cast<int>(start.size()), safe),
        applied(std::move(start)) {}
  LimitReport step(std::vector<double> wanted, LimitContext context = {}) {
    context.step = now++;
    return limiter_.apply(context, wanted, applied);
  }

 private:
  SafetyLimiter limiter_;

 public:
  std::vector<double> applied;
  std::int64_t now = 0;
};

LimitReport only(Reason reason) {
  LimitReport report;
  report.add(reason);
  return report;
}

TEST(Reasons, EveryNameReadsBack) {
  for (int i = 0; i < kReasonCount; ++i) {
    const auto reason = static_cast<Reason>(i);
    EXPECT_EQ(reason_of(name_of(reason)), reason);
  }
  EXPECT_EQ(reason_of("nonsense"), std::nullopt);
  EXPECT_EQ(name_of(Reason::kSkippedStep), "skipped_step");
}

TEST(Reasons, HeldMeansThatTheLastValueStays) {
  EXPECT_TRUE(only(Reason::kDeadband).held());
  EXPECT_TRUE(only(Reason::kInvalid).held());
  EXPECT_FALSE(only(Reason::kRate).held());
  EXPECT_FALSE(LimitReport().held());
  LimitReport fallback = only(Reason::kInvalid);
  fallback.add(Reason::kFallback);
  EXPECT_FALSE(fallback.held());
}

TEST(CheckLimits, NamesKeyValueAndConstraint) {
  const Actuator bias = Actuator::kExpertBias, aux = Actuator::kAuxLossWeight,
                 t = Actuator::kRouterTemperature;
  EXPECT_EQ(check_limits(bias, default_limits(bias), 0), "");
  EXPECT_EQ(check_limits(aux, default_limits(aux), 0.01), "");
  EXPECT_EQ(check_limits(aux, default_limits(aux, 0.0), 0), "");
  EXPECT_EQ(check_limits(t, default_limits(t), 1), "");
  EXPECT_THAT(check_limits(aux, default_limits(aux), 0), HasSubstr("initial: 0: must lie in [min, max]"));
  EXPECT_THAT(check_limits(bias, bias_limits(1, 0), 0), HasSubstr("rate: 0: must be above 0"));
  EXPECT_THAT(check_limits(bias, bias_limits(1, kNaN), 0), HasSubstr("rate: nan"));
  EXPECT_THAT(check_limits(bias, {.min = 1, .max = -1, .rate = 1}, 0),
              HasSubstr("min: 1: must not exceed max (-1)"));
  EXPECT_THAT(check_limits(bias, {.min = 1, .max = 2, .rate = 1, .center = true}, 1),
              HasSubstr("must hold 0"));
  EXPECT_EQ(check_limits(bias, {.min = -1, .max = 0, .rate = 1, .center = true}, 0), "");
  EXPECT_EQ(check_limits(bias, {.min = 0, .max = 1, .rate = 1, .center = true}, 0), "");
  EXPECT_THAT(check_limits(aux, {.min = 0, .max = 1, .rate = 1, .center = true}, 0), HasSubstr("center"));
  EXPECT_THAT(check_limits(aux, {.min = -1, .max = 1, .rate = 1}, 0), HasSubstr("min: -1"));
  EXPECT_THAT(check_limits(t, {.min = 0, .max = 1, .rate = 1}, 1),
              HasSubstr("must be from 1e-9 to 1e9 for router_temperature"));
  EXPECT_THAT(check_limits(bias, {.min = -2e9, .max = 1, .rate = 1}, 0),
              HasSubstr("min: -2e+09: must be from -1e9 to 1e9"));
  EXPECT_THAT(check_limits(bias, {.min = -1, .max = 2e9, .rate = 1}, 0),
              HasSubstr("max: 2e+09: must be from -1e9 to 1e9"));
  EXPECT_THAT(check_limits(bias, bias_limits(1, 2e9), 0),
              HasSubstr("rate: 2e+09: must be above 0 and at most 1e9"));
  EXPECT_THAT(check_limits(aux, {.min = 0, .max = 1, .rate = 101}, 0),
              HasSubstr("rate: 101: must be above 0 and at most 100"));
  EXPECT_THAT(check_limits(bias, {.min = -kInf, .max = 1, .rate = 1}, 0), HasSubstr("min: -inf"));
  EXPECT_THAT(check_limits(bias, {.min = -1, .max = 1, .rate = 1, .deadband = -1}, 0),
              HasSubstr("deadband: -1"));
  EXPECT_THAT(check_limits(bias, {.min = -1, .max = 1, .rate = 1, .warmup = -1}, 0), HasSubstr("warmup: -1"));
  EXPECT_THAT(check_limits(bias, {.min = -1, .max = 1, .rate = 1, .cadence = 0}, 0), HasSubstr("cadence: 0"));
  EXPECT_THAT(check_limits(bias, {.min = -1, .max = 1, .rate = 1, .cooldown = -1}, 0),
              HasSubstr("cooldown: -1"));
  EXPECT_THROW(SafetyLimiter(bias, bias_limits(), {}, 0, 0), std::invalid_argument);
  EXPECT_THROW(SafetyLimiter(bias, bias_limits(), {}, 2, 17), std::invalid_argument);
}

// As limits.h and docs/limits.md have them.
TEST(CheckLimits, DefaultsAreTheDocumentedOnes) {
  struct Default {
    Actuator actuator;
    double min, max, rate;
  };
  for (const Default& of : {Default{Actuator::kExpertBias, -16, 16, 1},
                            {Actuator::kAuxLossWeight, 1e-4, 0.1, 0.1},
                            {Actuator::kRouterTemperature, 0.1, 10, 0.1}}) {
    const Limits limits = default_limits(of.actuator);
    EXPECT_EQ(limits.min, of.min);
    EXPECT_EQ(limits.max, of.max);
    EXPECT_EQ(limits.rate, of.rate);
    EXPECT_EQ(limits.center, of.actuator == Actuator::kExpertBias);
  }
}

TEST(Limiter, SizesMustFit) {
  SafetyLimiter limiter(Actuator::kExpertBias, bias_limits(), {}, 2, 0);
  std::vector<double> two(2), three(3);
  EXPECT_THROW(limiter.apply({}, three, two), std::invalid_argument);
  EXPECT_THROW(limiter.apply({}, two, three), std::invalid_argument);
}

TEST(Limiter, PassesWhatIsWithinLimits) {
  Rig rig(Actuator::kExpertBias, bias_limits(), {0, 0.5});
  EXPECT_TRUE(rig.step({0.005, 0.495}).empty());
  EXPECT_THAT(rig.applied, ElementsAre(0.005, 0.495));
}

TEST(Limiter, ShortensToTheRateThenToTheRange) {
  Rig rig(Actuator::kExpertBias, bias_limits(1, 0.25), {0, 0.875});
  LimitReport both = only(Reason::kRate);
  both.add(Reason::kRange);
  EXPECT_EQ(rig.step({5, 5}), both);
  EXPECT_THAT(rig.applied, ElementsAre(0.25, 1));
}

TEST(Limiter, ScalarsMoveByRatio) {
  Rig rig(Actuator::kAuxLossWeight, {.min = 1e-4, .max = 0.1, .rate = 0.1}, {0.01}, {}, 0.01);
  EXPECT_EQ(rig.step({1}), only(Reason::kRate));
  EXPECT_DOUBLE_EQ(rig.applied[0], 0.01 * std::exp(0.1));
  EXPECT_EQ(rig.step({0}), only(Reason::kRate));
  EXPECT_DOUBLE_EQ(rig.applied[0], 0.01);
  for (int i = 0; i < 100; ++i) rig.step({-1});
  EXPECT_EQ(rig.applied[0], 1e-4);
  EXPECT_EQ(rig.step({0}), only(Reason::kRange));
}

TEST(Limiter, AnAuxWeightOfZeroStaysOff) {
  Rig rig(Actuator::kAuxLossWeight, default_limits(Actuator::kAuxLossWeight, 0.0), {0});
  rig.step({0.05});
  EXPECT_EQ(rig.applied[0], 0);
}

TEST(Limiter, CentringRemovesTheCommonShift) {
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1, true), {0, 0, 0});
  EXPECT_TRUE(rig.step({5.25, 5, 4.75}).empty());
  EXPECT_THAT(rig.applied, ElementsAre(0.25, 0, -0.25));
}

// Hand-computed: wanted (9, 0, 0), rate 1: the first is cut to 1, so the others must share -1.
TEST(Limiter, CentringHoldsUnderClipping) {
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1, true), {0, 0, 0});
  EXPECT_EQ(rig.step({9, 0, 0}), only(Reason::kRate));
  EXPECT_THAT(rig.applied, Pointwise(DoubleNear(1e-15), std::vector<double>{1, -0.5, -0.5}));
}

// To the bit, though the rest that rounding leaves of a sum could be given to one of them.
TEST(Limiter, ExpertsThatAreAlikeMoveAlike) {
  for (std::size_t n = 3; n < 40; ++n) {
    Rig rig(Actuator::kExpertBias, bias_limits(16, 1, true), std::vector<double>(n, 0.0));
    std::vector<double> wanted(n, 0.0);
    wanted.back() = 9;
    rig.step(wanted);
    EXPECT_EQ(rig.applied.back(), 1);
    for (std::size_t i = 1; i + 1 < n; ++i) EXPECT_EQ(rig.applied[i], rig.applied[0]) << n;
  }
}

TEST(Limiter, OneExpertGoesToZeroWhenCentred) {
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1, true), {0.5});
  rig.step({3});
  EXPECT_EQ(rig.applied[0], 0);
}

TEST(Limiter, IfAZeroMeanIsOutOfReachItComesAsNearAsTheRateAllows) {
  // Loaded uncentred: all at 4. Nothing within 1 of them has mean zero, so all go down by 1.
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1, true), {4, 4, 4});
  rig.step({4, 4, 4});
  EXPECT_THAT(rig.applied, ElementsAre(3, 3, 3));
}

TEST(Limiter, AValueOutsideANarrowedRangeComesInsideAtOnce) {
  Rig rig(Actuator::kExpertBias, bias_limits(1, 0.01), {3, -5});
  EXPECT_EQ(rig.step({3, -5}), only(Reason::kRange));
  EXPECT_THAT(rig.applied, ElementsAre(1, -1));
  Rig scalar(Actuator::kAuxLossWeight, {.min = 0.1, .max = 0.2, .rate = 0.01}, {5}, {}, 0.1);
  EXPECT_EQ(scalar.step({5}), only(Reason::kRange));
  EXPECT_EQ(scalar.applied[0], 0.2);
}

TEST(Limiter, EveryHoldHasItsReason) {
  Limits limits = bias_limits(16, 1);
  limits.warmup = 2;
  Rig rig(Actuator::kExpertBias, limits, {0});
  EXPECT_EQ(rig.step({1}), only(Reason::kWarmup));
  EXPECT_EQ(rig.step({1}), only(Reason::kWarmup));
  EXPECT_EQ(rig.step({1}, {.valid = false}), only(Reason::kInvalid));
  EXPECT_EQ(rig.step({kNaN}), only(Reason::kInvalid));
  EXPECT_EQ(rig.step({-kInf}), only(Reason::kInvalid));
  EXPECT_EQ(rig.step({1}, {.has_data = false}), only(Reason::kNoData));
  EXPECT_EQ(rig.step({1}, {.skipped = true}), only(Reason::kSkippedStep));
  EXPECT_EQ(rig.step({1}, {.frozen = true}), only(Reason::kFrozen));
  EXPECT_EQ(rig.step({1}, {.at_cadence = false}), only(Reason::kCadence));
  EXPECT_THAT(rig.applied, ElementsAre(0));
  EXPECT_TRUE(rig.step({1}).empty());
  EXPECT_THAT(rig.applied, ElementsAre(1));
}

TEST(Limiter, CooldownFollowsAMove) {
  Limits limits = bias_limits(16, 1);
  limits.cooldown = 2;
  Rig rig(Actuator::kExpertBias, limits, {0});
  EXPECT_TRUE(rig.step({0}).empty());  // no move, no cooldown
  EXPECT_TRUE(rig.step({0.5}).empty());
  EXPECT_EQ(rig.step({1}), only(Reason::kCooldown));
  EXPECT_EQ(rig.step({1}), only(Reason::kCooldown));
  EXPECT_TRUE(rig.step({1}).empty());
  EXPECT_THAT(rig.applied, ElementsAre(1));
}

TEST(Limiter, DeadbandHoldsSmallMovesAndIgnoresACommonShift) {
  Limits limits = bias_limits(16, 1, true);
  limits.deadband = 0.1;
  Rig rig(Actuator::kExpertBias, limits, {0, 0});
  EXPECT_EQ(rig.step({7.1, 6.9}), only(Reason::kDeadband));
  EXPECT_TRUE(rig.step({7.125, 6.875}).empty());
  EXPECT_THAT(rig.applied, ElementsAre(0.125, -0.125));
}

TEST(Limiter, FallsBackAfterTooMuchBadDataUntilDataAreGood) {
  SafetyOptions options;
  options.fallback_after = 3;
  options.fallback = Fallback::kInitial;
  Rig rig(Actuator::kExpertBias, bias_limits(16, 0.5), {8, -8}, options, 0);
  EXPECT_EQ(rig.step({kNaN, 0}), only(Reason::kInvalid));
  EXPECT_EQ(rig.step({}, {.valid = false}), only(Reason::kInvalid));
  EXPECT_THAT(rig.applied, ElementsAre(8, -8));
  const LimitReport third = rig.step({}, {.valid = false});
  EXPECT_TRUE(third.has(Reason::kFallback) && third.has(Reason::kInvalid));
  EXPECT_THAT(rig.applied, ElementsAre(0, 0));
  EXPECT_EQ(rig.step({8, -8}), only(Reason::kRate));  // good again: back at the rate
  EXPECT_THAT(rig.applied, ElementsAre(0.5, -0.5));
}

TEST(Limiter, GoodDataBetweenRestartTheCountToTheFallback) {
  SafetyOptions options;
  options.fallback_after = 2;
  options.fallback = Fallback::kInitial;
  Rig rig(Actuator::kExpertBias, bias_limits(16, 0.5), {8}, options, 0);
  for (int i = 0; i < 10; ++i) {
    EXPECT_FALSE(rig.step({}, {.valid = false}).has(Reason::kFallback));
    rig.step({8});
  }
  EXPECT_THAT(rig.applied, ElementsAre(8));
}

TEST(Limiter, RollsBackWhenTheLossJumpsAfterAMove) {
  SafetyOptions options;
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = 3, .cooldown = 4};
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1), {2}, options);
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(rig.step({2}, {.loss = 3.0}).empty());
  EXPECT_TRUE(rig.step({3}, {.loss = 3.0}).empty());
  EXPECT_EQ(rig.step({3}, {.loss = 4.0}), only(Reason::kRollback));
  EXPECT_THAT(rig.applied, ElementsAre(2));
  for (int i = 0; i < 4; ++i) EXPECT_EQ(rig.step({3}, {.loss = 4.0}), only(Reason::kCooldown)) << i;
  EXPECT_TRUE(rig.step({3}, {.loss = 3.5}).empty());
}

// Losses 3 and 3.4 have the average 3.04: the newest counts for a tenth.
TEST(Limiter, AJumpIsMeasuredFromTheAverageOfTheLoss) {
  SafetyOptions options;
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = 3, .cooldown = 4};
  for (const auto& [loss, jumps] : {std::pair{3.53, false}, {3.55, true}}) {
    Rig rig(Actuator::kExpertBias, bias_limits(16, 1), {2}, options);
    EXPECT_TRUE(rig.step({2}, {.loss = 3.0}).empty());
    EXPECT_TRUE(rig.step({3}, {.loss = 3.4}).empty());
    EXPECT_EQ(rig.step({3}, {.loss = loss}).has(Reason::kRollback), jumps) << loss;
  }
}

TEST(Limiter, AJumpLongAfterAMoveIsNotBlamedOnIt) {
  SafetyOptions options;
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = 3, .cooldown = 4};
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1), {2}, options);
  rig.step({3}, {.loss = 3.0});
  for (int i = 0; i < 3; ++i) rig.step({3}, {.loss = 3.0});
  EXPECT_TRUE(rig.step({3}, {.loss = 9.0}).empty());
}

TEST(Limiter, RollsBackOnDropsToo) {
  SafetyOptions options;
  options.rollback.emplace();
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1), {0}, options);
  rig.step({0}, {.drop_rate = 0.01});
  rig.step({1}, {.drop_rate = 0.01});
  EXPECT_EQ(rig.step({1}, {.drop_rate = 0.2}), only(Reason::kRollback));
}

TEST(Limiter, UndoesAllMovesThatCouldHaveCausedTheJump) {
  SafetyOptions options;
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = 5, .cooldown = 0};
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1), {0}, options);
  for (int i = 1; i <= 20; ++i) rig.step({0.5 * i}, {.loss = 3.0});
  const double before = rig.applied[0];
  rig.step({11}, {.loss = 4.0});
  EXPECT_LE(rig.applied[0], before - 5 * 0.5);
  EXPECT_GE(rig.applied[0], before - 10 * 0.5);
}

// Whenever the jump comes: the moves of the last `within` steps are undone, and never more than twice as many.
TEST(Limiter, ARollbackUndoesNoMoreMovesThanItMust) {
  constexpr int kWithin = 3;
  SafetyOptions options;
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = kWithin, .cooldown = 0};
  for (int jump = 2 * kWithin; jump < 8 * kWithin; ++jump) {
    Rig rig(Actuator::kExpertBias, bias_limits(64, 2), {0}, options);
    for (int step = 0; step < jump; ++step) rig.step({1.0 + step}, {.loss = 3.0});
    EXPECT_EQ(rig.step({0}, {.loss = 4.0}), only(Reason::kRollback));
    EXPECT_LE(rig.applied[0], jump - kWithin) << jump;
    EXPECT_GE(rig.applied[0], jump - 2 * kWithin) << jump;
  }
}

// The averages of loss and drops are part of the state: the first step after a resume can be seen to be a jump.
TEST(Limiter, AMoveBeforeASaveIsRolledBackAfterIt) {
  SafetyOptions options;
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = 3, .cooldown = 4};
  for (const LimitContext& jump : {LimitContext{.step = 2, .loss = 4.0}, {.step = 2, .drop_rate = 0.5}}) {
    SafetyLimiter limiter(Actuator::kExpertBias, bias_limits(16, 1), options, 1, 0),
        resumed(Actuator::kExpertBias, bias_limits(16, 1), options, 1, 0);
    std::vector<double> applied = {2};
    const std::vector<double> stay = {2}, move = {3};
    limiter.apply({.step = 0, .loss = 3.0, .drop_rate = 0.01}, stay, applied);
    limiter.apply({.step = 1, .loss = 3.0, .drop_rate = 0.01}, move, applied);
    StateIo out;
    limiter.exchange(out);
    const std::string bytes = out.bytes();
    StateIo in(bytes);
    resumed.exchange(in);
    EXPECT_EQ(resumed.apply(jump, move, applied), only(Reason::kRollback));
    EXPECT_THAT(applied, ElementsAre(2));
  }
}

// The mean of adopted biases leaves once, at the next decision, and no value that is put back brings it back.
TEST(Limiter, ACommonMeanLeavesOnceWhateverComesBetween) {
  SafetyOptions options;
  options.fallback = Fallback::kInitial;
  options.fallback_after = 1;
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = 3, .cooldown = 0};
  const std::vector<double> adopted = {0.875, 1.125}, even = {0, 0}, centred = {-0.125, 0.125};
  SafetyLimiter fallen(Actuator::kExpertBias, bias_limits(2, 0.25, true), options, 2, 0), rolled = fallen;
  std::vector<double> applied = adopted;
  fallen.start_from(applied);
  EXPECT_TRUE(fallen.apply({.step = 0, .valid = false}, even, applied).has(Reason::kFallback));
  EXPECT_EQ(fallen.apply({.step = 1}, even, applied), LimitReport());
  EXPECT_EQ(applied, even);
  applied = adopted;
  rolled.start_from(applied);
  EXPECT_EQ(rolled.apply({.step = 0, .loss = 3.0}, centred, applied), LimitReport());
  EXPECT_EQ(applied, centred);
  EXPECT_EQ(rolled.apply({.step = 1, .loss = 3.0}, even, applied), LimitReport());
  EXPECT_EQ(rolled.apply({.step = 2, .loss = 9.0}, even, applied), only(Reason::kRollback));
  EXPECT_EQ(applied, centred);
  EXPECT_TRUE(rolled.fits());
}

TEST(Limiter, BacksOffWhileMovesKeepReversing) {
  SafetyOptions options;
  options.oscillation.emplace();
  Rig rig(Actuator::kExpertBias, bias_limits(16, 10), {0}, options);
  bool shortened = false;
  for (int i = 0; i < 200; ++i) shortened |= rig.step({i % 2 == 0 ? 1.0 : -1.0}).has(Reason::kOscillation);
  EXPECT_TRUE(shortened);
  const double before = rig.applied[0];
  rig.step({1});
  EXPECT_NEAR(rig.applied[0] - before, options.oscillation->min_gain * (1 - before), 1e-12);
  // A steady direction earns the gain back.
  for (int i = 0; i < 400; ++i) rig.step({rig.applied[0] + 1e-3});
  EXPECT_TRUE(rig.step({rig.applied[0] + 1e-3}).empty());
}

// Should a value in force ever be no number, a shortened move from it would be none either: nothing moves, and the reason
// is reported.
TEST(Limiter, WhatIsNoNumberIsNotPutInForce) {
  SafetyOptions options;
  options.oscillation.emplace();
  Rig rig(Actuator::kExpertBias, bias_limits(16, 10), {0, 0}, options);
  bool shortened = false;
  for (int i = 0; i < 50; ++i) {
    const double to = i % 2 == 0 ? 1.0 : -1.0;
    shortened |= rig.step({to, -to}).has(Reason::kOscillation);
  }
  ASSERT_TRUE(shortened);
  rig.applied[0] = kNaN;
  const double other = rig.applied[1];
  const LimitReport report = rig.step({1, -1});
  EXPECT_TRUE(report.has(Reason::kInvalid));
  EXPECT_TRUE(report.held());
  EXPECT_EQ(rig.applied[1], other);
}

TEST(Limiter, SteadyMovesAreNotOscillation) {
  SafetyOptions options;
  options.oscillation.emplace();
  Rig rig(Actuator::kExpertBias, bias_limits(16, 10), {0, 0}, options);
  for (int i = 0; i < 100; ++i) {
    EXPECT_TRUE(rig.step({rig.applied[0] + 0.01, rig.applied[1] - 0.01}).empty());
  }
}

// What a rollback undid is no move that the next one could reverse.
TEST(Limiter, ARollbackIsNoHalfOfAnOscillation) {
  SafetyOptions options;
  options.oscillation = OscillationOptions{.threshold = 0.05};
  options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1, .within = 3, .cooldown = 0};
  Rig rig(Actuator::kExpertBias, bias_limits(16, 1), {0}, options);
  for (int i = 0; i < 10; ++i) EXPECT_TRUE(rig.step({0}, {.loss = 3.0}).empty());
  EXPECT_TRUE(rig.step({1}, {.loss = 3.0}).empty());
  EXPECT_EQ(rig.step({1}, {.loss = 4.0}), only(Reason::kRollback));
  EXPECT_TRUE(rig.step({-1}, {.loss = 3.2}).empty());
  EXPECT_EQ(rig.step({0}, {.loss = 3.2}), only(Reason::kOscillation)) << "a reversal is noticed";
}

// From the mean of the proposal, whichever side of it is the farther one.
TEST(Limiter, NoBiasGoesFartherFromTheMeanThanTheReach) {
  struct Place {
    double scale, shift;  // of all biases; a negative scale mirrors them
  };
  for (const Place& place : {Place{1, 0}, {-1, 0}, {1, 5}, {-1, 5}, {0.125, 0}, {-0.125, 5}}) {
    const auto at = [&](std::vector<double> values) {
      for (double& v : values) v = v * place.scale + place.shift;
      return values;
    };
    const auto step = [&](const std::vector<double>& from, const std::vector<double>& wanted,
                          const std::vector<double>& good = {}) {
      const std::vector<double> known = at(good);
      Rig rig(Actuator::kExpertBias, bias_limits(64, 16), at(from));
      const bool reached =
          rig.step(at(wanted), {.reach = 2 * std::abs(place.scale), .known_good = known}).has(Reason::kReach);
      for (double& v : rig.applied) v = (v - place.shift) / place.scale;
      return std::pair{reached, rig.applied};
    };
    const auto is = [](bool reached, std::vector<double> values) {
      return ::testing::Pair(reached, Pointwise(DoubleNear(1e-12), values));
    };
    EXPECT_THAT(step({0, 0, 0, 0}, {-1.5, 0.5, 0.5, 0.5}), is(false, {-1.5, 0.5, 0.5, 0.5}));
    EXPECT_THAT(step({0, 0, 0, 0}, {-3, 1, 1, 1}), is(true, {-5.0 / 3, 1, 1, 1})) << "2 from their mean, 1/3";
    EXPECT_THAT(step({-3, 1, 1, 1}, {-3, 1, 1, 1}), is(false, {-3, 1, 1, 1})) << "there already";
    EXPECT_THAT(step({-3, 1, 1, 1}, {-6, 2, 2, 2}), is(true, {-2, 2, 2, 2}));
    EXPECT_THAT(step({0, 0, 0, 0}, {-3, 1, 1, 1}, {-2.5, 0.5, 1, 1}), is(true, {1 - 10.0 / 3, 1, 1, 1}));
  }
}

// A proposal that is clipped on one side has another mean, and what is in force may stay: step by step, the biases would
// creep as far as they are pushed.
TEST(Limiter, BiasesDoNotCreepBeyondTheReach) {
  std::mt19937_64 random(20261130);
  std::uniform_real_distribution<double> part(0, 1);
  for (int trial = 0; trial < 200; ++trial) {
    const bool centred = trial % 2 == 0;
    const std::size_t n = 2 + random() % 15, few = 1 + random() % (n - 1);
    Limits limits = bias_limits(64, centred ? std::pow(10, 2 * part(random) - 1) : 64);
    limits.center = centred;
    Rig rig(Actuator::kExpertBias, limits, std::vector<double>(n, 0.0));
    const double push = std::pow(10, 2 * part(random) - 1);
    double farthest = 0;
    bool reached = false;
    for (int i = 0; i < 300; ++i) {
      std::vector<double> wanted = rig.applied;
      for (std::size_t e = 0; e < few; ++e) wanted[e] += push * part(random);
      reached |= rig.step(wanted, {.reach = 1.0}).has(Reason::kReach);
      const double mean =
          std::accumulate(rig.applied.begin(), rig.applied.end(), 0.0) / static_cast<double>(n);
      for (const double v : rig.applied) farthest = std::max(farthest, std::abs(v - mean));
    }
    EXPECT_TRUE(reached) << trial;
    EXPECT_LE(farthest, 1 + 1e-9) << trial;
  }
}

// The invariant, over hostile proposals, contexts and limits.
TEST(LimiterProperty, WhateverComesInWhatIsAppliedIsFiniteInRangeAndWithinItsRate) {
  std::mt19937_64 random(20260101);
  const auto chance = [&](double p) { return std::bernoulli_distribution(p)(random); };
  const auto uniform = [&](double lo, double hi) {
    return std::uniform_real_distribution<double>(lo, hi)(random);
  };
  const std::vector<double> hostile = {kNaN, kInf, -kInf, 1e308, -1e308, 1e-308, 0.0, -0.0, 1e17, -3.0};
  int centred_checks = 0, moves = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    const Actuator actuator = kActuators[random() % 3];
    const bool bias = actuator == Actuator::kExpertBias;
    Limits limits;
    const double width = std::pow(10.0, uniform(-4, 4));
    limits.min = bias ? -width * uniform(0, 1) : 1e-3 * uniform(0.1, 1);
    limits.max = bias ? width * uniform(0, 1) : limits.min * std::pow(10.0, uniform(0, 4));
    limits.rate = std::pow(10.0, uniform(-5, 2));
    limits.center = bias && chance(0.5);
    limits.deadband = chance(0.3) ? limits.rate * uniform(0, 2) : 0;
    limits.warmup = chance(0.2) ? 5 : 0;
    limits.cooldown = chance(0.2) ? 2 : 0;
    SafetyOptions options;
    if (chance(0.3)) options.rollback.emplace();
    if (chance(0.3)) options.oscillation.emplace();
    options.fallback_after = chance(0.5) ? 4 : 0;
    options.fallback = chance(0.5) ? Fallback::kInitial : Fallback::kHold;
    const int n = bias ? 1 + static_cast<int>(random() % 9) : 1;
    const double start = bias ? 0.0 : limits.min;
    SafetyLimiter limiter(actuator, limits, options, n, start);
    std::vector<double> applied(static_cast<std::size_t>(n), start), wanted(applied.size());
    for (std::int64_t step = 0; step < 40; ++step) {
      const double scale = std::pow(10.0, uniform(-6, 6));
      for (double& w : wanted) w = chance(0.05) ? hostile[random() % hostile.size()] : scale * uniform(-1, 1);
      if (chance(0.2)) std::fill(wanted.begin(), wanted.end(), wanted[0]);
      LimitContext context{.step = step,
                           .valid = !chance(0.1),
                           .has_data = !chance(0.1),
                           .skipped = chance(0.1),
                           .frozen = chance(0.05),
                           .at_cadence = chance(0.8)};
      if (chance(0.5)) context.loss = chance(0.1) ? hostile[random() % hostile.size()] : uniform(0, 5);
      if (chance(0.5)) context.drop_rate = uniform(0, 1);
      const std::vector<double> before = applied;
      const LimitReport report = limiter.apply(context, wanted, applied);
      const bool excepted = report.has(Reason::kRollback) || report.has(Reason::kFallback);
      if (report.held()) {
        EXPECT_EQ(applied, before);
      }
      for (std::size_t i = 0; i < applied.size(); ++i) {
        ASSERT_TRUE(std::isfinite(applied[i])) << trial << " " << step;
        ASSERT_GE(applied[i], limits.min);
        ASSERT_LE(applied[i], limits.max);
        if (excepted) continue;
        const double moved =
            bias ? std::abs(applied[i] - before[i]) : std::abs(std::log(applied[i] / before[i]));
        ASSERT_LE(moved, limits.rate * (1 + 1e-12) + 1e-12 * width) << trial << " " << step;
        moves += moved > 0;
      }
      if (limits.center && !excepted) {
        ASSERT_NEAR(mean_of(applied), 0, 1e-12 * std::max(1.0, width)) << trial << " " << step;
        ++centred_checks;
      }
    }
  }
  EXPECT_GT(centred_checks, 5000);
  EXPECT_GT(moves, 10000);
}

TEST(LimiterProperty, SavedAndLoadedItContinuesWithTheSameBits) {
  std::mt19937_64 random(7);
  SafetyOptions options;
  options.rollback.emplace();
  options.oscillation.emplace();
  options.fallback_after = 3;
  options.fallback = Fallback::kInitial;
  Limits limits = bias_limits(1, 0.1, true);
  limits.cooldown = 1;
  SafetyLimiter limiter(Actuator::kExpertBias, limits, options, 4, 0);
  std::vector<double> applied(4, 0.0);
  const auto step = [&](SafetyLimiter& which, std::int64_t now, std::vector<double>& value,
                        std::uint64_t seed) {
    std::mt19937_64 local(seed);
    std::normal_distribution<double> normal;
    std::vector<double> wanted(4);
    for (double& w : wanted) w = normal(local);
    return which.apply({.step = now, .valid = local() % 5 != 0, .loss = 3 + normal(local)}, wanted, value);
  };
  for (std::int64_t now = 0; now < 37; ++now) step(limiter, now, applied, random());
  StateIo out;
  limiter.exchange(out);
  const std::string bytes = out.bytes();
  SafetyLimiter resumed(Actuator::kExpertBias, limits, options, 4, 0);
  StateIo in(bytes);
  resumed.exchange(in);
  in.finish();
  std::vector<double> other = applied;
  for (std::int64_t now = 37; now < 200; ++now) {
    const std::uint64_t seed = random();
    EXPECT_EQ(step(limiter, now, applied, seed), step(resumed, now, other, seed));
    ASSERT_EQ(applied, other);
  }
}

// Halfway to a back-off: what was seen of it is kept.
TEST(Limiter, ASavedOscillationGoesOn) {
  SafetyOptions options;
  options.oscillation.emplace();
  SafetyLimiter limiter(Actuator::kExpertBias, bias_limits(16, 10), options, 1, 0);
  std::vector<double> applied = {0};
  std::int64_t now = 0;
  const auto step = [&now](SafetyLimiter& which, std::vector<double>& value) {
    const std::vector<double> wanted = {now % 2 == 0 ? 1.0 : -1.0};
    return which.apply({.step = now}, wanted, value);
  };
  for (; now < 6; ++now) EXPECT_TRUE(step(limiter, applied).empty()) << now;
  StateIo out;
  limiter.exchange(out);
  const std::string bytes = out.bytes();
  SafetyLimiter resumed(Actuator::kExpertBias, bias_limits(16, 10), options, 1, 0);
  StateIo in(bytes);
  resumed.exchange(in);
  std::vector<double> other = applied;
  for (; now < 12; ++now) {
    EXPECT_EQ(step(limiter, applied), step(resumed, other)) << now;
    EXPECT_EQ(applied, other) << now;
  }
  EXPECT_LT(std::abs(applied[0]), 1) << "it was shortened by now";
}

TEST(Limiter, DoesNotAllocate) {
  SafetyOptions options;
  options.rollback.emplace();
  options.oscillation.emplace();
  SafetyLimiter limiter(Actuator::kExpertBias, bias_limits(1, 0.1, true), options, 64, 0);
  std::vector<double> applied(64, 0.0), wanted(64);
  std::iota(wanted.begin(), wanted.end(), -32.0);
  EXPECT_EQ(moectl::testing::allocations_of([&] {
              for (std::int64_t step = 0; step < 20; ++step) {
                limiter.apply({.step = step, .loss = step == 10 ? 30.0 : 3.0}, wanted, applied);
              }
            }),
            0);
}

}  // namespace
}  // namespace moectl
