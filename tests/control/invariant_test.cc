// The invariant of moectl/limits.h over random limits and proposals, the ends of both included. A slice of it is here with
// every run of the tests; MOECTL_PROPOSALS=10000000 runs as many as that.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "control/config_check.h"
#include "control/safety.h"

namespace moectl {
namespace {

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : random_(seed) {}
  std::uint64_t below(std::uint64_t end) { return random_() % end; }
  bool chance(double p) { return uniform(0, 1) < p; }
  double uniform(double low, double high) {
    return low + (high - low) * static_cast<double>(random_() >> 11) * 0x1p-53;
  }
  /// Of any magnitude.
  double size(double low, double high) { return std::exp(uniform(std::log(low), std::log(high))); }
  double hostile() {
    constexpr double kEnds[] = {std::numeric_limits<double>::quiet_NaN(),
                                std::numeric_limits<double>::infinity(),
                                -std::numeric_limits<double>::infinity(),
                                std::numeric_limits<double>::max(),
                                std::numeric_limits<double>::lowest(),
                                std::numeric_limits<double>::denorm_min(),
                                -0.0,
                                0,
                                1e9,
                                -1e9};
    return kEnds[below(std::size(kEnds))];
  }

 private:
  std::mt19937_64 random_;
};

Limits drawn_limits(Actuator actuator, Draw& draw) {
  Limits limits;
  const bool bias = actuator == Actuator::kExpertBias;
  const double least = actuator == Actuator::kRouterTemperature ? 1e-9 : 1e-300;
  limits.min = bias ? (draw.chance(0.1) ? -1e9 : -draw.size(1e-12, 1e9)) : draw.size(least, 1e9);
  limits.max = bias ? (draw.chance(0.1) ? 1e9 : draw.size(1e-12, 1e9)) : draw.size(limits.min, 1e9);
  if (draw.chance(0.05)) limits.max = std::max(limits.min, bias ? 0.0 : limits.min);
  limits.rate = draw.chance(0.1) ? (bias ? 1e9 : 100) : draw.size(1e-15, bias ? 1e9 : 100);
  limits.center = bias && draw.chance(0.5);
  limits.deadband = draw.chance(0.2) ? limits.rate * draw.uniform(0, 2) : 0;
  limits.warmup = draw.chance(0.1) ? 3 : 0;
  limits.cooldown = draw.chance(0.1) ? static_cast<std::int64_t>(draw.below(4)) : 0;
  return limits;
}

TEST(Invariant, HoldsForRandomLimitsAndProposals) {
  const char* const wanted_number = std::getenv("MOECTL_PROPOSALS");
  const std::int64_t proposals = wanted_number != nullptr ? std::atoll(wanted_number) : 300000;
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  Draw draw(wanted_number != nullptr ? 2 : 1);
  std::int64_t made = 0, moves = 0, jumps = 0, refused = 0;
  while (made < proposals) {
    const Actuator actuator = kActuators[draw.below(3)];
    const bool bias = actuator == Actuator::kExpertBias;
    const Limits limits = drawn_limits(actuator, draw);
    const double start =
        bias ? std::clamp(0.0, limits.min, limits.max) : draw.uniform(limits.min, limits.max);
    if (problem_in(actuator, limits, start)) {
      ++refused;
      continue;
    }
    SafetyOptions options;
    if (draw.chance(0.3)) options.rollback = RollbackOptions{.loss_jump = 0.5, .drop_jump = 0.1};
    if (draw.chance(0.3)) options.oscillation.emplace();
    options.fallback = draw.chance(0.5) ? Fallback::kInitial : Fallback::kHold;
    options.fallback_after = static_cast<std::int64_t>(draw.below(4));
    const auto n = bias ? 1 + draw.below(8) : 1;
    SafetyLimiter limiter(actuator, limits, options, static_cast<int>(n), start);
    std::vector<double> applied(n, start), wanted(n);
    for (std::int64_t step = 0; step < 16; ++step, ++made) {
      const double scale = draw.chance(0.5) ? limits.rate : draw.size(1e-300, 1e300);
      for (std::size_t i = 0; i < n; ++i) {
        wanted[i] = draw.chance(0.03) ? draw.hostile() : applied[i] + scale * draw.uniform(-2, 2);
      }
      if (draw.chance(0.1)) std::fill(wanted.begin(), wanted.end(), wanted[0]);
      LimitContext context{.step = step,
                           .valid = !draw.chance(0.03),
                           .has_data = !draw.chance(0.03),
                           .skipped = draw.chance(0.03),
                           .frozen = draw.chance(0.02),
                           .at_cadence = !draw.chance(0.1)};
      if (draw.chance(0.5)) context.loss = draw.chance(0.1) ? draw.hostile() : draw.uniform(0, 5);
      if (draw.chance(0.3)) context.drop_rate = draw.chance(0.1) ? draw.hostile() : draw.uniform(0, 1);
      if (bias && draw.chance(0.2)) context.reach = draw.size(1e-12, 1e9);
      const std::vector<double> before = applied;
      const LimitReport report = limiter.apply(context, wanted, applied);
      const bool jumped = report.has(Reason::kRollback) || report.has(Reason::kFallback);
      jumps += jumped;
      if (report.held()) {
        ASSERT_EQ(applied, before);
      }
      double sum = 0, largest = 0;
      for (std::size_t i = 0; i < n; ++i) {
        ASSERT_TRUE(std::isfinite(applied[i]));
        ASSERT_GE(applied[i], limits.min);
        ASSERT_LE(applied[i], limits.max);
        sum += applied[i];
        largest = std::max(largest, std::abs(applied[i]));
        moves += applied[i] != before[i];
        if (jumped || applied[i] == before[i]) continue;
        if (bias) {
          ASSERT_LE(std::abs(applied[i] - before[i]),
                    limits.rate + 2 * kEpsilon * (std::abs(before[i]) + limits.rate));
        } else {
          ASSERT_LE(std::abs(std::log(applied[i] / before[i])),
                    limits.rate + 8 * kEpsilon * (1 + limits.rate));
        }
      }
      if (limits.center && !jumped) {
        ASSERT_LE(std::abs(sum), 64 * kEpsilon * static_cast<double>(n) * (largest + limits.rate));
      }
    }
  }
  EXPECT_GT(moves, made / 2);
  EXPECT_GT(jumps, made / 1000);
  EXPECT_LT(refused, made / 16);  // of 16 proposals each
  RecordProperty("proposals", std::to_string(made));
}

}  // namespace
}  // namespace moectl
