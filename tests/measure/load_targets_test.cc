// What loads are held against where experts are not wanted equally: by hand, and the floors against closed forms and
// against an integration that is slow and plain.
#include "moectl/load_targets.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <random>

#include "measure/floors.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using Counts = std::vector<std::int64_t>;
using Shares = std::vector<double>;

Metrics measured(const Counts& counts, const MetricsOptions& options) {
  RoutingStats stats({static_cast<int>(counts.size()), 1, {}});
  EXPECT_TRUE(stats.add_counts(counts, std::accumulate(counts.begin(), counts.end(), std::int64_t{0})));
  return measure(stats, options);
}

TEST(LoadTargets, RelativeLoadsByHand) {
  const LoadTargets targets(3, Shares{0.75, 0.25, 0});
  EXPECT_FALSE(targets.equal());
  EXPECT_EQ(targets.wanted(), 2);
  EXPECT_EQ(targets.relative(0, 60, 100), 0.8);
  EXPECT_EQ(targets.relative(1, 30, 100), 1.2);
  EXPECT_EQ(targets.relative(2, 0, 100), 1);     // nothing is wanted, nothing is there
  EXPECT_EQ(targets.relative(2, 10, 100), 1.2);  // ten too many, of a mean target of fifty
  EXPECT_FALSE(targets.is_wanted(2));
  const LoadTargets equal(4);
  EXPECT_TRUE(equal.equal());
  EXPECT_EQ(equal.wanted(), 4);
  EXPECT_EQ(equal.relative(3, 50, 100), 2);
  EXPECT_THAT(equal.shares(), IsEmpty());
}

TEST(LoadTargets, EqualOnesAreNone) {
  EXPECT_TRUE(LoadTargets(3, Shares(3, 1.0 / 3)).equal());
  EXPECT_THAT(LoadTargets(3, Shares(3, 1.0 / 3)).shares(), IsEmpty());
}

TEST(LoadTargets, AreChecked) {
  EXPECT_THROW(LoadTargets(0), std::invalid_argument);
  EXPECT_THROW(LoadTargets(2, Shares{1}), std::invalid_argument);
  EXPECT_THROW(LoadTargets(2, Shares{1.25, -0.25}), std::invalid_argument);
  EXPECT_THROW(LoadTargets(2, Shares{std::nan(""), 1}), std::invalid_argument);
  EXPECT_THROW(LoadTargets(2, Shares{0.5, 0.4}), std::invalid_argument);
  EXPECT_THROW(LoadTargets(2, Shares{0, 0}), std::invalid_argument);
  try {
    LoadTargets(2, Shares{0.5, 0.4});
  } catch (const std::invalid_argument& e) {
    EXPECT_STREQ(e.what(), "targets: sum 0.9: must sum to 1 within 1e-6");
  }
  // As many digits as it takes to see what is wrong.
  try {
    LoadTargets(2, Shares{1, -1e-9});
  } catch (const std::invalid_argument& e) {
    EXPECT_STREQ(e.what(), "targets[1]: -1e-09: must be 0 to 1");
  }
}

// Halves for two of three, of 100: relative loads 1.2 and .6, and ten where none are wanted are .2 of the mean target.
TEST(MetricsWithAZeroTarget, DivideByNothing) {
  const MetricsOptions options{.targets = {0.5, 0.5, 0}};
  const Metrics m = measured({60, 30, 10}, options);
  EXPECT_DOUBLE_EQ(*m.max_vio, 1.2 - 1);
  EXPECT_NEAR(*m.load_cv, std::sqrt((0.04 + 0.16 + 0.04) / 2), 1e-15);
  EXPECT_EQ(m.hot_experts, 1);  // 10 > 1.25 · 0; 60 is not above 62.5
  EXPECT_EQ(m.cold_experts, 0);
  EXPECT_DOUBLE_EQ(*m.noise_floor_cv, 0.1);  // each of the two has variance 1 a token
  // The larger of two is 1/√π, √2 as their sum is fixed.
  const double z = normal_quantile(1.625 / 2.25);
  EXPECT_NEAR(*m.noise_floor_max_vio, 0.1 * std::sqrt(2 / std::numbers::pi) + 0.01 * (z * z - 1) / 6, 1e-7);

  const Metrics on_target = measured({50, 50, 0}, options);
  EXPECT_EQ(on_target.max_vio, 0);
  EXPECT_EQ(on_target.load_cv, 0);
  EXPECT_EQ(on_target.hot_experts, 0);
  EXPECT_EQ(on_target.cold_experts, 0);
  EXPECT_EQ(on_target.fhs_alarm, 0);
  // Everything where nothing is wanted: never "below the mean, so balanced".
  const Metrics astray = measured({0, 0, 100}, options);
  EXPECT_EQ(astray.max_vio, 2);
  EXPECT_DOUBLE_EQ(*astray.load_cv, std::sqrt((1 + 1 + 4) / 2.0));
}

// Two sequences of 10, (6, 4, 0) and (4, 4, 2): variances 2 · 2·(1², 0, 1²) = (2, 0, 2) by hand: J/(J-1) Σ (c_j - p
// n_j)²
// = 2 (1 + 1), 0, 2 (1 + 1); in units of the targets 10 and 10 of 20, and of the mean target 10 for the third.
TEST(MetricsWithAZeroTarget, HaveASamplingFloor) {
  const StatsShape shape{3, 1, {.sequences = true}};
  RoutingStats stats(shape);
  std::vector<std::int64_t> experts;
  for (const Counts& counts : {Counts{6, 4, 0}, Counts{4, 4, 2}}) {
    for (std::size_t i = 0; i < 3; ++i)
      experts.insert(experts.end(), static_cast<std::size_t>(counts[i]), static_cast<std::int64_t>(i));
  }
  stats.add({.experts = experts, .sequence_length = 10});
  const Metrics m = measure(stats, {.targets = {0.5, 0.5, 0}});
  EXPECT_NEAR(*m.sampling_floor_cv, std::sqrt((4 / 100.0 + 0 + 4 / 100.0) / 2), 1e-12);
}

TEST(MetricsWithTargets, HotAndColdAreRelativeToTheTarget) {
  const MetricsOptions options{.cold_fraction = 0.5, .targets = {0.7, 0.2, 0.1}}, equal{.cold_fraction = 0.5};
  EXPECT_EQ(measured({700, 200, 100}, options).hot_experts, 0);
  EXPECT_EQ(measured({700, 200, 100}, options).cold_experts, 0);
  EXPECT_EQ(measured({700, 200, 100}, equal).hot_experts, 1);
  EXPECT_EQ(measured({700, 200, 100}, equal).cold_experts, 1);
  EXPECT_EQ(measured({340, 330, 330}, options).hot_experts, 2);
  EXPECT_EQ(measured({340, 330, 330}, options).cold_experts, 1);  // 340 < .5 · 700
}

TEST(MetricsOnTarget, ByHand) {
  const StatsShape shape{4, 2, {}};
  const Metrics m = metrics_on_target(shape, {.targets = {0.5, 0.25, 0.25, 0}});
  EXPECT_NEAR(*m.entropy, 1.5 * std::log(2), 1e-15);
  EXPECT_NEAR(*m.entropy_normalized, 0.75, 1e-15);
  EXPECT_NEAR(*m.effective_experts, std::pow(2, 1.5), 1e-14);
  EXPECT_NEAR(*m.kl_to_uniform, 0.5 * std::log(2), 1e-15);
  EXPECT_NEAR(*m.load_std, 100 * std::sqrt(0.125 / 4), 1e-13);
  EXPECT_NEAR(*m.gini, (3 * 0.5 + 0.25 - 0.25) / 4, 1e-15);
  EXPECT_EQ(m.max_load, 0.5);
  EXPECT_EQ(m.min_load, 0);
  EXPECT_EQ(m.inactive_experts, 1);
  EXPECT_EQ(m.straggler_slowdown, 2);
  EXPECT_EQ(m.max_vio, 0);
  const Metrics placed =
      metrics_on_target(shape, {.placement = {0, 0, 1, 1}, .targets = {0.5, 0.25, 0.25, 0}});
  EXPECT_EQ(placed.straggler_slowdown, 1.5);

  // It is what a load like that reads.
  RoutingStats stats(shape);
  ASSERT_TRUE(stats.add_counts(Counts{400, 200, 200, 0}, 400));
  const Metrics read = measure(stats, {.targets = {0.5, 0.25, 0.25, 0}});
  for (const auto value :
       {&Metrics::entropy, &Metrics::entropy_normalized, &Metrics::kl_to_uniform, &Metrics::load_std,
        &Metrics::load_cv, &Metrics::max_load, &Metrics::min_load, &Metrics::max_vio, &Metrics::gini,
        &Metrics::inactive_experts, &Metrics::inactive_fraction, &Metrics::straggler_slowdown}) {
    EXPECT_NEAR(*(read.*value), *(m.*value), 1e-13);
  }
  const Metrics equal = metrics_on_target(shape, {});
  EXPECT_EQ(equal.entropy_normalized, 1);
  EXPECT_EQ(equal.kl_to_uniform, 0);
  EXPECT_EQ(equal.gini, 0);
}

// Three of eight experts should receive all tokens, with an FHS of 2.5 on their targets. A token where none is wanted
// is clear of the noise of a thousand, and no collapse; a load that is nowhere near its targets is.
TEST(MetricsWithTargets, FewExpertsWithTargetsAreNoCollapse) {
  const MetricsOptions options{.targets = {0.6, 0.3, 0.1, 0, 0, 0, 0, 0}};
  const Metrics leaking = measured({599, 300, 100, 0, 0, 0, 0, 1}, options);
  EXPECT_GT(*leaking.fhs, 1);
  EXPECT_EQ(leaking.fhs_alarm, 0);
  EXPECT_EQ(measured({700, 250, 50, 0, 0, 0, 0, 0}, options).fhs_alarm, 0);
  EXPECT_EQ(measured({0, 0, 0, 0, 0, 100, 300, 600}, options).fhs_alarm, 1);
  EXPECT_EQ(measured({0, 0, 1000, 0, 0, 0, 0, 0}, options).fhs_alarm, 1);
  // All on the one that is wanted, but for a token.
  const MetricsOptions one{.targets = {1, 0, 0, 0}};
  EXPECT_EQ(measured({999, 0, 1, 0}, one).fhs_alarm, 0);
  EXPECT_EQ(measured({1, 0, 999, 0}, one).fhs_alarm, 1);
}

// One of two experts has a target of a millionth, of 100 tokens: CV floor 71, far beyond the maximum of MaxVio's
// parabola.
TEST(MetricsWithTargets, TheFloorOfMaxVioGrowsWithThatOfTheCv) {
  double last = 0;
  for (const double tiny : {0.1, 0.01, 1e-3, 1e-4, 1e-6, 1e-9}) {
    const Shares targets = {1 - tiny, tiny};
    const Metrics m = measured({100, 0}, {.targets = targets});
    EXPECT_GE(*m.noise_floor_max_vio, last * (1 - 1e-3)) << tiny;
    EXPECT_EQ(m.noise_floor_max_vio, noise_floor_max_vio(LoadTargets(2, targets), 1, 100));
    last = *m.noise_floor_max_vio;
  }
  EXPECT_GT(last, 1);
}

// One of 16 experts has a target of a millionth, so that the CV of relative loads is 4 by chance: a collapse is one all
// the same.
TEST(MetricsWithTargets, ATinyTargetDoesNotHideACollapse) {
  Shares targets(16, (1 - 1e-6) / 15);
  targets[0] = 1e-6;
  Counts counts(16, 1);
  counts[1] = 4000;
  const Metrics m = measured(counts, {.targets = targets});
  EXPECT_GT(*m.noise_floor_cv, 3);
  EXPECT_EQ(m.fhs_alarm, 1);
}

// ---- The expected largest of independent normals. ----

TEST(ExpectedLargest, OfTwoAndOfEqualOnesInClosedForm) {
  for (const double ratio : {1.0, 0.5, 0.1, 1e-2, 1e-4, 0.0}) {
    const double b = 3 * ratio;
    EXPECT_NEAR(expected_largest(Shares{3, b}), std::sqrt((9 + b * b) / (2 * std::numbers::pi)), 3e-6)
        << ratio;
  }
  EXPECT_NEAR(expected_largest(Shares(3, 2)), 3 / std::sqrt(std::numbers::pi), 1e-9);  // 1.5/√π of σ = 1
  // Tabulated: Tippett (1925), and Harter (1961) of a hundred.
  EXPECT_NEAR(expected_largest(Shares(10, 1)), 1.53875, 1e-5);
  EXPECT_NEAR(expected_largest(Shares(100, 1)), 2.50759, 1e-5);
  EXPECT_NEAR(expected_largest(Shares(1000, 1)), 3.24144, 1e-5);
}

TEST(ExpectedLargest, AgreesWithPlainIntegration) {
  std::mt19937_64 random(7);
  for (const double spread : {0.01, 1.0, 4.0, 9.0}) {  // e-folds
    for (const int n : {2, 5, 64}) {
      Shares deviations;
      for (int i = 0; i < n; ++i)
        deviations.push_back(std::exp(-std::uniform_real_distribution(0.0, spread)(random)));
      const double widest = *std::max_element(deviations.begin(), deviations.end());
      constexpr int kSteps = 40000;
      const double step = 18 * widest / kSteps;
      double sum = 0;
      for (int j = 0; j < kSteps; ++j) {
        const double x = -9 * widest + (j + 0.5) * step;
        double below = 1;
        for (const double d : deviations) below *= 0.5 * std::erfc(-x / (d * std::numbers::sqrt2));
        sum += (x > 0 ? 1 - below : -below) * step;
      }
      EXPECT_NEAR(expected_largest(deviations), sum, 2e-6 * widest) << spread << ", " << n;
    }
  }
}

}  // namespace
}  // namespace moectl
