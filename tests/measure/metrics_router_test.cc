// Metrics from what a router gives beyond counts, and the Fisher metrics.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <random>

#include "allocation_counter.h"
#include "moectl/metrics.h"
#include "test_sums.h"

namespace moectl {
namespace {

using Counts = std::vector<std::int64_t>;

Metrics of_counts(const Counts& counts, int top_k = 1) {
  RoutingStats stats({static_cast<int>(counts.size()), top_k, {}});
  std::int64_t sum = 0;
  for (const auto c : counts) sum += c;
  EXPECT_TRUE(stats.add_counts(counts, (sum + top_k - 1) / top_k));
  return measure(stats);
}

RoutingStats of_rows(const std::vector<float>& rows, int experts) {
  RoutingStats stats({experts, 1, {.probabilities = true}});
  const Counts chosen(rows.size() / static_cast<std::size_t>(experts), 0);
  EXPECT_TRUE(stats.add({.experts = chosen, .probabilities = rows}));
  return stats;
}

// ---- Fisher metrics: the tabulated values ----

TEST(Fisher, OfCounts) {
  const double pi = std::numbers::pi;
  struct Case {
    Counts counts;
    int top_k;
    double fsi, fhs;
  };
  Counts four_of_sixteen(16, 0), eight_of_sixteen(16, 0);
  std::fill_n(four_of_sixteen.begin(), 4, 10);
  std::fill_n(eight_of_sixteen.begin(), 8, 10);
  for (const Case& c : {Case{{1, 1, 1, 1}, 1, 0, 0}, Case{{7, 7, 0, 0}, 1, pi / 2, 1},
                        Case{{5, 0, 0, 0}, 1, 2 * pi / 3, 1e12}, Case{{16, 4, 4, 1}, 1, 0.902054, 25.0 / 88},
                        Case{{81, 9, 9, 1}, 1, 1.287002, 25.0 / 27}, Case{four_of_sixteen, 1, 2 * pi / 3, 1},
                        Case{eight_of_sixteen, 2, pi / 2, 2 - std::sqrt(2.0)}}) {
    const Metrics m = of_counts(c.counts, c.top_k);
    EXPECT_NEAR(*m.fsi, c.fsi, 1e-6);
    EXPECT_NEAR(*m.fhs, c.fhs, 1e-12 * std::max(1.0, c.fhs));
  }
  EXPECT_NEAR(*of_counts({16, 4, 4, 1}).fsi, 2 * std::acos(.8 / 2 + .4 / 2 + .4 / 2 + .2 / 2), 1e-14);
  EXPECT_NEAR(*of_counts({1, 1, 1, 1}).fsi_max, 2 * pi / 3, 1e-15);
}

TEST(Fisher, AbsentWhereNotDefined) {
  EXPECT_FALSE(of_counts({5}).fhs);
  EXPECT_FALSE(of_counts({5, 5}, 2).fhs);  // k = N: nothing to tell apart, nothing preferred
  EXPECT_EQ(*of_counts({5, 5}, 2).fsi, 0);
}

TEST(Fisher, NearUniformNothingCancels) {
  const std::int64_t base = std::int64_t{1} << 40;
  const Metrics m = of_counts({base + 1, base - 1});
  // p = ½ ± δ, δ = 1/(2 base): the distance is 2 arcsin 2δ.
  EXPECT_NEAR(*m.fsi * static_cast<double>(base), 1, 1e-3);
  EXPECT_GT(*m.fsi, 0);
}

TEST(Fisher, OfSoftTokens) {
  const Metrics apart = measure(of_rows({.5F, .5F, 0, 0, 0, 0, .5F, .5F}, 4));
  EXPECT_NEAR(*apart.router_fhs, 0, 1e-12);
  EXPECT_NEAR(*apart.router_fsi, 0, 1e-7);
  // The sums are in units of 2^-24, which B / W magnifies where W is small.
  const Metrics alike = measure(of_rows({.64F, .36F, 0, 0, .36F, .64F, 0, 0}, 4));
  EXPECT_NEAR(*alike.router_fhs, 15 + 10 * std::numbers::sqrt2, 1e-3);
  const std::vector<double> mean = {.5, .5, 0, 0}, roots = {.7, .7, 0, 0};
  EXPECT_NEAR(*fisher_ratio(displacement(mean, roots), 4), 15 + 10 * std::numbers::sqrt2, 1e-10);
}

// Hard choices given as probabilities are the counts: both ways agree.
TEST(Fisher, HardProbabilitiesAgreeWithCounts) {
  std::mt19937_64 random(8);
  for (int trial = 0; trial < 20; ++trial) {
    const int n = 2 + static_cast<int>(random() % 9);
    Counts counts(static_cast<std::size_t>(n), 0);
    std::vector<float> rows;
    for (int t = 0; t < 200; ++t) {
      const std::size_t e =
          std::min(random() % static_cast<std::size_t>(n), random() % static_cast<std::size_t>(n));
      counts[e] += 1;
      for (std::size_t i = 0; i < counts.size(); ++i) rows.push_back(i == e ? 1.0F : 0.0F);
    }
    const Metrics from_rows = measure(of_rows(rows, n)), from_counts = of_counts(counts);
    EXPECT_NEAR(*from_rows.router_fsi, *from_counts.fsi, 1e-12);
    EXPECT_NEAR(*from_rows.router_fhs, *from_counts.fhs, 1e-9);
  }
}

// A change of parameters that leaves the routing alone: all logits of a token shifted, experts renumbered.
TEST(Fisher, InvariantUnderParametersThatLeaveTheRoutingAlone) {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  const int n = 6, tokens = 100;
  std::vector<float> plain, shifted, renumbered;
  for (int t = 0; t < tokens; ++t) {
    std::vector<double> z(n);
    for (double& x : z) x = normal(random) + (&x == &z[0] ? 1 : 0);
    const double shift = 3 * normal(random);
    const auto softmax = [&](double by, bool reverse, std::vector<float>& out) {
      double sum = 0;
      for (const double x : z) sum += std::exp(x + by);
      for (int i = 0; i < n; ++i) {
        const double x = z[static_cast<std::size_t>(reverse ? n - 1 - i : i)];
        out.push_back(static_cast<float>(std::exp(x + by) / sum));
      }
    };
    softmax(0, false, plain);
    softmax(shift, false, shifted);
    softmax(0, true, renumbered);
  }
  const Metrics a = measure(of_rows(plain, n)), b = measure(of_rows(shifted, n)),
                c = measure(of_rows(renumbered, n));
  for (const Metrics& other : {b, c}) {
    EXPECT_NEAR(*a.router_fsi, *other.router_fsi, 1e-6);
    EXPECT_NEAR(*a.router_fhs, *other.router_fhs, 1e-5);
    EXPECT_NEAR(*a.token_entropy, *other.token_entropy, 1e-6);
  }
}

TEST(Fisher, DistanceBetweenLoads) {
  const std::vector<double> p = {1, 0}, q = {0, 1}, u = {.5, .5};
  EXPECT_NEAR(fisher_distance(p, q), std::numbers::pi, 1e-15);
  EXPECT_NEAR(fisher_distance(p, u), std::numbers::pi / 2, 1e-15);
  EXPECT_EQ(fisher_distance(u, u), 0);
}

// fhs > 1 needs B clear of the floor as well.
TEST(Fisher, AlarmNeedsMoreThanNoise) {
  EXPECT_EQ(*of_counts({100, 100, 1, 1}).fhs_alarm, 0);  // fhs just below 1
  EXPECT_EQ(*of_counts({1000, 10, 10, 10}).fhs_alarm, 1);
  EXPECT_EQ(*of_counts({250, 250, 250, 250}).fhs_alarm, 0);
  // Two tokens of k = 1 on one expert: fhs saturates, but so few tokens prove nothing.
  const Metrics few = of_counts({2, 0, 0, 0});
  EXPECT_EQ(*few.fhs, 1e12);
  EXPECT_EQ(*few.fhs_alarm, 0);  // B = ½, floor² / 8 · (1 + 3√(2/3)) = 3/2 / 8 · 3.449 = .647
}

// A load uniform over K experts crosses 1 only when K < √(kN).
TEST(Fisher, CrossesOneLate) {
  for (const auto& [n, k] : {std::pair{16, 1}, {16, 2}, {64, 4}, {100, 1}}) {
    for (int few = k; few <= n; ++few) {
      Counts counts(static_cast<std::size_t>(n), 0);
      std::fill_n(counts.begin(), few, 1000);
      const auto fhs = of_counts(counts, k).fhs;
      if (few * few == k * n) continue;  // exactly 1
      EXPECT_EQ(fhs && *fhs > 1, few * few < k * n) << n << " " << k << " " << few;
    }
  }
}

// ---- Routing distribution ----

TEST(RoutingDistribution, ByHand) {
  const Metrics m = measure(of_rows({1, 0, .5F, .5F}, 2));
  EXPECT_NEAR(*m.token_entropy, std::log(2.0) / 2, 1e-7);
  const double router = -.75 * std::log(.75) - .25 * std::log(.25);
  EXPECT_NEAR(*m.router_entropy, router, 1e-7);
  EXPECT_NEAR(*m.expert_token_information, router - std::log(2.0) / 2, 1e-7);
  EXPECT_NEAR(*m.importance_cv, .5, 1e-7);
}

TEST(RouterLosses, AreMeansOverTheMicroBatchesThatReportedThem) {
  const std::vector<std::int64_t> experts = {0, 1};
  RoutingStats stats({.experts = 2, .top_k = 1, .needs = {}});
  EXPECT_TRUE(stats.add({.experts = experts, .balance_loss = 1.25, .z_loss = 9}));
  EXPECT_TRUE(stats.add({.experts = experts, .balance_loss = 1.75}));
  EXPECT_TRUE(stats.add({.experts = experts}));
  Metrics m;
  Measurer(stats.shape(), {}).measure(stats, m);
  EXPECT_EQ(m.balance_loss, 1.5);
  EXPECT_EQ(m.z_loss, 9);
  for (const double bad : {std::nan(""), -1.0, HUGE_VAL}) {
    EXPECT_TRUE(stats.add({.experts = experts, .z_loss = bad})) << "nothing decides on it";
  }
  EXPECT_EQ(stats.z_loss(), 9);
}

TEST(RoutingDistribution, AbsentWithoutProbabilities) {
  const Metrics m = of_counts({1, 2, 3});
  EXPECT_FALSE(m.token_entropy || m.router_entropy || m.expert_token_information || m.importance_cv ||
               m.router_fsi || m.router_fhs);
  EXPECT_FALSE(m.domain_information || m.domain_exclusivity || m.grad_norm_variance || m.latency_p50);
}

// ---- Domains, gradients, latencies ----

TEST(Domains, ByHand) {
  RoutingStats stats({2, 1, {.domains = 2}});
  // Domain 0: expert 0 three times and expert 1 once; domain 1: the reverse. p = ½ each, w = ½ each.
  const Counts experts = {0, 0, 0, 1, 1, 1, 1, 0}, domains = {0, 0, 0, 0, 1, 1, 1, 1};
  ASSERT_TRUE(stats.add({.experts = experts, .domain_ids = domains}));
  const Metrics m = measure(stats);
  const double information = .75 * std::log(1.5) + .25 * std::log(.5);
  EXPECT_NEAR(*m.domain_information, information, 1e-15);
  EXPECT_NEAR(*m.domain_exclusivity, information / std::log(2.0), 1e-15);
}

TEST(Domains, ExclusiveExpertsAndSharedExperts) {
  RoutingStats exclusive({4, 1, {.domains = 2}}), shared({4, 1, {.domains = 2}}),
      single({4, 1, {.domains = 2}});
  const Counts by_domain = {0, 1, 2, 3}, both = {0, 1, 0, 1}, domains = {0, 0, 1, 1}, first = {0, 0, 0, 0};
  ASSERT_TRUE(exclusive.add({.experts = by_domain, .domain_ids = domains}));
  ASSERT_TRUE(shared.add({.experts = both, .domain_ids = domains}));
  ASSERT_TRUE(single.add({.experts = by_domain, .domain_ids = first}));
  EXPECT_NEAR(*measure(exclusive).domain_exclusivity, 1, 1e-15);
  EXPECT_NEAR(*measure(shared).domain_exclusivity, 0, 1e-15);
  EXPECT_EQ(*measure(single).domain_information, 0);
  EXPECT_FALSE(measure(single).domain_exclusivity);
}

TEST(Experts, GradientsAndLatencies) {
  RoutingStats stats({4, 1, {.gradients = true, .losses = true, .latencies = true}});
  ASSERT_TRUE(stats.add_counts(Counts{1, 1, 1, 1}, 4));
  ASSERT_TRUE(stats.add_grad_norms(std::vector<double>{1, 2, 3, 6}));
  ASSERT_TRUE(stats.add_grad_norms(std::vector<double>{1, 2, 3, 2}));
  ASSERT_TRUE(stats.add_latencies(std::vector<double>{4, 1, 2, 3}));
  ASSERT_TRUE(stats.add_expert_losses(std::vector<double>{2, 9, 0, 0}, Counts{4, 3, 0, 1}));
  const Metrics m = measure(stats);
  EXPECT_NEAR(*m.grad_norm_variance, (2.25 + .25 + .25 + 2.25) / 4, 1e-12);  // 1, 2, 3, 4
  EXPECT_NEAR(*m.latency_p50, 2.5, 1e-12);
  EXPECT_NEAR(*m.latency_p95, 3.85, 1e-12);
  EXPECT_NEAR(*m.latency_p99, 3.97, 1e-12);
  std::vector<double> values(4);
  for (const ExpertField& field : expert_fields()) {
    const bool given = field.values(stats, values);
    EXPECT_EQ(given, field.name != "importance" && field.name != "load_slope") << field.name;
    if (field.name == "expert_loss") {
      EXPECT_EQ(values[0], 0.5);
      EXPECT_EQ(values[1], 3);
      EXPECT_TRUE(std::isnan(values[2]));
      EXPECT_EQ(values[3], 0);
    }
  }
}

TEST(Domains, PerformanceByRoutedSubset) {
  RoutingStats stats({3, 1, {.domain_losses = true, .domains = 2}});
  const Counts experts = {0, 0, 1, 0, 1}, domains = {0, 0, 0, 1, 1};
  const std::vector<float> losses = {1, 2, 4, -3, 0.5F};
  ASSERT_TRUE(stats.add({.experts = experts, .domain_ids = domains}));
  ASSERT_EQ(domain_fields().size(), 2U);
  const DomainField &share = domain_fields()[0], &loss = domain_fields()[1];
  std::vector<double> values(3);
  EXPECT_FALSE(loss.values(stats, 0, values)) << "no loss was recorded";
  ASSERT_TRUE(stats.add_token_losses({.experts = experts, .losses = losses, .domain_ids = domains}));
  ASSERT_TRUE(share.values(stats, 0, values));
  EXPECT_THAT(values, ::testing::ElementsAre(0.4, 0.2, 0));
  ASSERT_TRUE(share.values(stats, 1, values));
  EXPECT_THAT(values, ::testing::ElementsAre(0.2, 0.2, 0));
  ASSERT_TRUE(loss.values(stats, 0, values));
  EXPECT_EQ(values[0], 1.5);
  EXPECT_EQ(values[1], 4);
  EXPECT_TRUE(std::isnan(values[2]));
  ASSERT_TRUE(loss.values(stats, 1, values));
  EXPECT_EQ(values[0], -3);
  EXPECT_EQ(values[1], 0.5);
  // A record without domains: shares are not known of all tokens.
  ASSERT_TRUE(stats.add({.experts = experts}));
  EXPECT_FALSE(share.values(stats, 0, values));
}

TEST(Experts, OptionalInputsLeaveTheRestAlone) {
  const Counts counts = {5, 3, 1, 1};
  RoutingStats rich({4, 1, every_input()});
  ASSERT_TRUE(rich.add_counts(counts, 10));
  const Metrics a = measure(rich), b = of_counts(counts);
  for (const MetricField& field : metric_fields())
    EXPECT_EQ(a.*(field.value), b.*(field.value)) << field.name;
}

TEST(Experts, MeasuringEverythingAllocatesNothing) {
  const int n = 8;
  RoutingStats stats({n, 1, every_input()});
  const Counts experts = {0, 1, 2, 3}, domains = {0, 1, 0, 1};
  const std::vector<float> rows(32, 0.125F);
  const std::vector<double> ones(8, 1);
  ASSERT_TRUE(
      stats.add({.experts = experts, .sequence_length = 2, .probabilities = rows, .domain_ids = domains}));
  ASSERT_TRUE(stats.add_grad_norms(ones));
  ASSERT_TRUE(stats.add_latencies(ones));
  Measurer measurer(stats.shape(), {});
  Metrics m;
  EXPECT_EQ(testing::allocations_of([&] { measurer.measure(stats, m); }), 0);
  EXPECT_TRUE(m.router_fsi && m.latency_p99 && m.domain_information);
}

}  // namespace
}  // namespace moectl
