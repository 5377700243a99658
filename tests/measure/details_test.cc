// Percentiles of the load, churn, imbalance of single sequences, and the numbers that a host reports.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "allocation_counter.h"
#include "moectl/metrics.h"
#include "moectl/simulation.h"

namespace moectl {
namespace {

RoutingStats counted(const std::vector<std::int64_t>& counts, std::int64_t tokens, int top_k,
                     const StatsNeeds& needs = {}) {
  RoutingStats stats({static_cast<int>(counts.size()), top_k, needs});
  EXPECT_TRUE(stats.add_counts(counts, tokens));
  return stats;
}

TEST(Details, PercentilesOfTheLoadByHand) {
  const RoutingStats stats = counted({8, 4, 2, 2}, 8, 2);
  const Metrics m = measure(stats, {.details = true});
  // Relative loads (1/2, 1/2, 1, 2).
  EXPECT_DOUBLE_EQ(*m.load_p5, 0.5);
  EXPECT_DOUBLE_EQ(*m.load_p25, 0.5);
  EXPECT_DOUBLE_EQ(*m.load_p50, 0.75);
  EXPECT_DOUBLE_EQ(*m.load_p75, 1.25);
  EXPECT_DOUBLE_EQ(*m.load_p95, 1.85);
  EXPECT_DOUBLE_EQ(*m.minority_share, 0.5);
  EXPECT_DOUBLE_EQ(*m.balancedness, 0.5);
  EXPECT_FALSE(measure(stats).load_p50) << "they sort: only where they are asked for";
  const Metrics one = measure(counted({5}, 5, 1), {.details = true});
  EXPECT_EQ(one.load_p5, 1);
  EXPECT_EQ(one.load_p95, 1);
}

TEST(Details, WithTargetsLoadsAreRelativeToThemAndUnwantedExpertsAreLeftOut) {
  const Metrics m = measure(counted({8, 4, 3, 1}, 16, 1), {.details = true, .targets = {0.5, 0.25, 0.25, 0}});
  // 8/8, 4/4, 3/4.
  EXPECT_DOUBLE_EQ(*m.minority_share, 0.75);
  EXPECT_DOUBLE_EQ(*m.load_p50, 1);
  EXPECT_DOUBLE_EQ(*m.load_p25, 0.875);
}

TEST(Details, BalancednessIsMeanOverLargestDeviceLoad) {
  const Metrics m = measure(counted({8, 4, 2, 2}, 8, 2), {.placement = {0, 1, 1, 1}});
  EXPECT_DOUBLE_EQ(*m.balancedness, 1);
  EXPECT_DOUBLE_EQ(*measure(counted({8, 4, 2, 2}, 8, 2), {.placement = {0, 0, 1, 1}}).balancedness, 8.0 / 12);
}

TEST(Details, TheImbalanceOfSequencesIsSeenWhereTheirSumIsEven) {
  // Each of two sequences uses one expert alone: the sum is even.
  RoutingStats stats({2, 1, {.sequences = true}});
  const std::vector<std::int64_t> apart = {0, 0, 0, 0, 1, 1, 1, 1}, mixed = {0, 1, 0, 1, 0, 1, 0, 1};
  ASSERT_TRUE(stats.add({.experts = apart, .sequence_length = 4}));
  EXPECT_DOUBLE_EQ(*measure(stats).load_cv, 0);
  EXPECT_DOUBLE_EQ(*measure(stats).sequence_cv, 1);
  stats.clear();
  ASSERT_TRUE(stats.add({.experts = mixed, .sequence_length = 4}));
  EXPECT_DOUBLE_EQ(*measure(stats).sequence_cv, 0);
  // Sequences of 4 and 2 tokens, CVs 0 and 1, weighted 16 to 4.
  stats.clear();
  const std::vector<std::int64_t> uneven = {0, 1, 0, 1, 0, 0}, ids = {0, 0, 0, 0, 1, 1};
  ASSERT_TRUE(stats.add({.experts = uneven, .sequence_ids = ids}));
  EXPECT_DOUBLE_EQ(*measure(stats).sequence_cv, std::sqrt(4.0 / 20));
  EXPECT_FALSE(measure(counted({4, 4}, 8, 1)).sequence_cv);
}

TEST(Details, NumbersOfTheHostAreMeansOverObservationsAndAbsentWithoutAny) {
  RoutingStats stats = counted({4, 4}, 8, 1);
  EXPECT_TRUE(stats.add_value("router_similarity", 0.25));
  EXPECT_TRUE(stats.add_value("router_similarity", 0.75));
  EXPECT_TRUE(stats.add_value("router_condition", std::numeric_limits<double>::infinity()));
  EXPECT_TRUE(stats.add_value("z_loss", 9));
  for (const double bad : {-1.0, std::nan("")}) EXPECT_FALSE(stats.add_value("gradient_ratio", bad)) << bad;
  EXPECT_TRUE(stats.valid());
  EXPECT_EQ(stats.invalid_records(), 0);
  const Metrics m = measure(stats);
  EXPECT_EQ(m.router_similarity, 0.5);
  EXPECT_EQ(m.router_condition, kFixedMax) << "a singular router is to be seen";
  EXPECT_EQ(m.z_loss, 9);
  EXPECT_FALSE(m.gradient_ratio);
  EXPECT_FALSE(m.expert_output_norm);
  EXPECT_THROW(stats.add_value("router_conditon", 1), std::invalid_argument);
  for (const RoutingStats::RecordedValue& value : RoutingStats::recorded_values())
    EXPECT_TRUE(find_metric(value.name)) << value.name;
}

TEST(Churn, ByHand) {
  // 2 of 8 gaps are near, within 0.1, at the first two experts, which move apart by 0.1: λ = -ln(¾)/0.1, R = λ · ¼ · 0.1/½.
  RoutingStats stats = counted({8, 4, 2, 2}, 8, 2, {.gap = true});
  const auto near = stats.mutable_array(RoutingStats::kGapNear);
  near[0] = near[1] = 1;
  stats.set_scalar(RoutingStats::kGapTokens, 8);
  stats.set_scalar(RoutingStats::kGapSum, to_fixed(1.6));
  stats.set_scalar(RoutingStats::kGapWidthSum, to_fixed(0.8));
  std::vector<std::pair<double, double>> scratch;
  const auto churn = [&](const std::vector<double>& change) {
    return estimate_churn(stats, change, scratch);
  };
  EXPECT_NEAR(*churn({-0.05, 0.05, 0, 0}), 1 - std::sqrt(0.75), 1e-6);
  EXPECT_NEAR(*churn({0.05, -0.05, 0, 0}), 1 - std::sqrt(0.75), 1e-6);
  EXPECT_EQ(churn({0, 0, 0, 0}), 0);
  EXPECT_EQ(churn({1, 1, 1, 1}), 0) << "a common move changes no choice";
  EXPECT_NEAR(*churn({-100, 100, 0, 0}), 1, 1e-12);
  EXPECT_EQ(churn({0, std::nan(""), 0, 0}), std::nullopt);
  EXPECT_THROW(churn({0, 0}), std::invalid_argument);
  near[1] = 0;
  near[0] = 2;
  EXPECT_EQ(churn({-0.05, 0.05, 0, 0}), std::nullopt) << "with whom it changes is not known";
  EXPECT_EQ(estimate_churn(counted({4, 4}, 8, 1), std::vector<double>(2), scratch), std::nullopt);
}

// Against the tokens themselves: route, move the biases, choose again from the same scores.
TEST(Churn, IsNearTheShareOfTokensThatChange) {
  double worst = 1, log_sum = 0, rows = 0;
  for (const auto& [experts, top_k] : {std::pair{16, 2}, std::pair{64, 6}}) {
    for (const double size : {0.003, 0.01, 0.03}) {
      SimulatedRouter router(
          {.experts = experts, .top_k = top_k, .tokens = 4096, .biased_scores = true, .forming = 0});
      const auto n = static_cast<std::size_t>(experts), k = static_cast<std::size_t>(top_k);
      const std::vector<double> none(n, 0.0);
      RoutingStats stats({experts, top_k, {.gap = true}});
      stats.add(router.route(none));
      stats.set_gap_width(*stats.next_gap_width());
      stats.clear();
      const RoutingBatch batch = router.route(none);
      ASSERT_TRUE(stats.add(batch));
      std::mt19937_64 random(static_cast<std::uint64_t>(experts));
      std::normal_distribution<double> normal(0, size);
      std::vector<double> change(n);
      for (double& c : change) c = normal(random);
      std::vector<std::pair<double, double>> scratch;
      std::optional<double> estimate;
      estimate_churn(stats, change, scratch);
      EXPECT_EQ(testing::allocations_of([&] { estimate = estimate_churn(stats, change, scratch); }), 0);
      ASSERT_TRUE(estimate);
      double changed = 0;
      const auto tokens = static_cast<std::size_t>(stats.tokens());
      for (std::size_t t = 0; t < tokens; ++t) {
        std::vector<std::pair<double, std::int64_t>> moved(n);
        for (std::size_t i = 0; i < n; ++i) {
          moved[i] = {-(static_cast<double>(batch.biased_scores[t * n + i]) + change[i]),
                      static_cast<std::int64_t>(i)};
        }
        std::sort(moved.begin(), moved.end());
        std::vector<std::int64_t> before(batch.experts.begin() + static_cast<std::ptrdiff_t>(t * k),
                                         batch.experts.begin() + static_cast<std::ptrdiff_t>((t + 1) * k)),
            after;
        for (std::size_t j = 0; j < k; ++j) after.push_back(moved[j].second);
        std::sort(before.begin(), before.end());
        std::sort(after.begin(), after.end());
        changed += before != after ? 1 : 0;
      }
      const double ratio = *estimate / (changed / static_cast<double>(tokens));
      RecordProperty("ratio_" + std::to_string(experts) + "_" + std::to_string(size), std::to_string(ratio));
      std::printf("N = %d, size %g: estimate %.4f, counted %.4f\n", experts, size, *estimate,
                  changed / static_cast<double>(tokens));
      worst = std::max({worst, ratio, 1 / ratio});
      log_sum += std::log(ratio);
      rows += 1;
    }
  }
  EXPECT_LT(worst, 1.3);
  EXPECT_NEAR(log_sum / rows, 0, 0.2);
}

}  // namespace
}  // namespace moectl
