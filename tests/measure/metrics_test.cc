#include "moectl/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numbers>
#include <numeric>
#include <random>
#include <set>
#include <string>

#include "allocation_counter.h"

namespace moectl {
namespace {

using Counts = std::vector<std::int64_t>;

RoutingStats stats_of(const Counts& counts, int top_k = 1, std::int64_t tokens = -1) {
  RoutingStats stats({static_cast<int>(counts.size()), top_k, {}});
  if (tokens < 0) tokens = std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) / top_k;
  EXPECT_TRUE(stats.add_counts(counts, tokens));
  return stats;
}

Metrics metrics_of(const Counts& counts, int top_k = 1, const MetricsOptions& options = {}) {
  return measure(stats_of(counts, top_k), options);
}

double value(const Metrics& metrics, std::string_view name) {
  const MetricField* field = find_metric(name);
  EXPECT_NE(field, nullptr) << name;
  const Metrics::Value found = metrics.*(field->value);
  EXPECT_TRUE(found.has_value()) << name;
  return found.value_or(std::numeric_limits<double>::quiet_NaN());
}

void expect_values(const Metrics& metrics, const std::map<std::string, double>& expected,
                   double tolerance = 1e-12) {
  for (const auto& [name, want] : expected) {
    EXPECT_NEAR(value(metrics, name), want, tolerance * std::max(1.0, std::abs(want))) << name;
  }
}

// ---- Values by hand ----

TEST(Metrics, OfSixteenFourFourOne) {
  expect_values(metrics_of({16, 4, 4, 1}), {{"entropy", 1.0008048470763757},
                                            {"entropy_normalized", 0.7219280948873623},
                                            {"effective_experts", 2.7204705103003883},
                                            {"kl_to_uniform", 0.38548951404351484},
                                            {"load_std", 23.043437243605823},
                                            {"load_cv", 0.921737489744233},
                                            {"max_load", 0.64},
                                            {"min_load", 0.04},
                                            {"max_to_mean", 2.56},
                                            {"max_vio", 1.56},
                                            {"gini", 0.45},
                                            {"utilization_variance", 33.1875},
                                            {"inactive_experts", 0},
                                            {"inactive_fraction", 0},
                                            {"hot_experts", 1},
                                            {"cold_experts", 0},
                                            // capacity ⌈1.25 · 25/4⌉ = 8
                                            {"predicted_drop_rate", 8.0 / 25},
                                            {"straggler_slowdown", 2.56}});
}

TEST(Metrics, UniformLoadIsExact) {
  for (const int n : {1, 2, 3, 7, 16, 100, 255, 512}) {
    const Metrics m = metrics_of(Counts(static_cast<std::size_t>(n), 1000));
    for (const char* zero :
         {"kl_to_uniform", "load_std", "load_cv", "max_vio", "gini", "utilization_variance",
          "inactive_experts", "hot_experts", "cold_experts", "predicted_drop_rate"}) {
      EXPECT_EQ(value(m, zero), 0) << zero << " of " << n;
    }
    for (const char* one : {"max_to_mean", "straggler_slowdown"})
      EXPECT_EQ(value(m, one), 1) << one << " of " << n;
    EXPECT_NEAR(value(m, "entropy"), std::log(n), 1e-14);
    EXPECT_NEAR(value(m, "effective_experts"), n, 1e-12 * n);
    if (n > 1) {
      EXPECT_EQ(value(m, "entropy_normalized"), 1);
    } else {
      EXPECT_FALSE(m.entropy_normalized);
      EXPECT_FALSE(m.noise_floor_max_vio);
    }
  }
}

TEST(Metrics, OneHotLoadIsExact) {
  for (const int n : {2, 3, 7, 16, 100, 512}) {
    for (const std::int64_t load : {std::int64_t{1}, std::int64_t{999}, std::int64_t{1} << 53}) {
      Counts counts(static_cast<std::size_t>(n), 0);
      counts[static_cast<std::size_t>(n) / 2] = load;
      const Metrics m = metrics_of(counts);
      EXPECT_EQ(value(m, "entropy"), 0);
      EXPECT_EQ(value(m, "entropy_normalized"), 0);
      EXPECT_EQ(value(m, "effective_experts"), 1);
      EXPECT_EQ(value(m, "max_load"), 1);
      EXPECT_EQ(value(m, "min_load"), 0);
      EXPECT_EQ(value(m, "max_to_mean"), n);
      expect_values(m, {{"kl_to_uniform", std::log(n)},
                        {"load_cv", std::sqrt(n - 1.0)},
                        {"gini", (n - 1.0) / n},
                        {"inactive_experts", n - 1},
                        {"inactive_fraction", (n - 1.0) / n},
                        {"hot_experts", 1},
                        {"cold_experts", n - 1}});
    }
  }
}

TEST(Metrics, WithoutTokensEverythingIsAbsent) {
  for (const int n : {1, 16}) {
    const Metrics m = metrics_of(Counts(static_cast<std::size_t>(n), 0));
    for (const MetricField& field : metric_fields())
      EXPECT_FALSE((m.*(field.value)).has_value()) << field.name;
  }
}

TEST(Metrics, CorruptedCountsGiveNoMetrics) {
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  for (const Counts& counts : {Counts{-1, 5, 5}, Counts{huge, huge, huge}, Counts{huge, 1, 0}}) {
    RoutingStats stats({3, 1, {}});
    std::copy(counts.begin(), counts.end(), stats.mutable_array(RoutingStats::kCounts).begin());
    stats.set_scalar(RoutingStats::kTokens, 10);
    const Metrics m = measure(stats);
    for (const MetricField& field : metric_fields())
      EXPECT_FALSE((m.*(field.value)).has_value()) << field.name;
  }
}

TEST(Metrics, LoadsUpToTheLargestCountStayExact) {
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max() / 2;
  const Metrics m = metrics_of({huge, 0, 0, huge});
  expect_values(m, {{"gini", 0.5}, {"load_cv", 1}, {"max_load", 0.5}, {"entropy", std::log(2)}});
}

// Two counts near 2^53 that differ by 2: neither the mean nor the squares are exact in double.
TEST(Metrics, SmallDifferencesOfHugeCountsSurvive) {
  const std::int64_t base = std::int64_t{1} << 53;
  const Metrics m = metrics_of({base + 1, base - 1, base + 1, base - 1});
  EXPECT_EQ(value(m, "utilization_variance"), 1);
  EXPECT_NEAR(value(m, "load_cv") * static_cast<double>(base), 1, 1e-12);
  EXPECT_NEAR(value(m, "gini") * static_cast<double>(base), 0.5, 1e-12);
}

TEST(Metrics, DropRateIsWhatTheRouterMeasured) {
  RoutingStats stats({4, 1, {}});
  const Counts experts = {0, 0, 0, 1};
  EXPECT_FALSE(measure(stats_of({3, 1, 0, 0})).drop_rate);
  ASSERT_TRUE(stats.add({.experts = experts, .dropped = 1}));
  EXPECT_EQ(value(measure(stats), "drop_rate"), 0.25);
}

TEST(Metrics, CapacityIsRoundedUpInDoubleFromLeftToRight) {
  // 1.1 · 50 is 55.00000000000001 in double, so the capacity of 5 experts is 12, not 11.
  EXPECT_DOUBLE_EQ(value(metrics_of({14, 12, 10, 8, 6}, 1, {.capacity_factor = 1.1}), "predicted_drop_rate"),
                   2.0 / 50);
  EXPECT_EQ(value(metrics_of({14, 10, 6}, 1, {.capacity_factor = 1e300}), "predicted_drop_rate"), 0);
}

TEST(Metrics, HotAndColdAreStrict) {
  // mean 100: hot above 125, cold under 10.
  const Metrics m = metrics_of({125, 126, 10, 9, 230});
  EXPECT_EQ(value(m, "hot_experts"), 2);
  EXPECT_EQ(value(m, "cold_experts"), 1);
}

TEST(Metrics, StragglerSlowdownFollowsThePlacement) {
  const Counts counts = {10, 30, 20, 20};
  EXPECT_EQ(value(metrics_of(counts), "straggler_slowdown"), 1.5);
  EXPECT_EQ(value(metrics_of(counts, 1, {.placement = {0, 0, 1, 1}}), "straggler_slowdown"), 1);
  EXPECT_EQ(value(metrics_of(counts, 1, {.placement = {0, 1, 1, 0}}), "straggler_slowdown"), 1.25);
}

// ---- Floors ----

TEST(Metrics, NoiseFloorsAreThoseSimulatedElsewhere) {
  // Simulated with uniform k of N: mean CV and mean MaxVio.
  struct Case {
    int tokens, experts, top_k;
    double max_vio, cv;
  };
  for (const Case& c : {Case{2048, 16, 2, .108, .058}, Case{2048, 64, 6, .166, .069},
                        Case{8192, 64, 8, .070, .029}, Case{8192, 256, 8, .177, .062}}) {
    const double cv = *noise_floor_cv(c.experts, c.top_k, c.tokens);
    EXPECT_NEAR(cv, c.cv, 0.001);
    EXPECT_NEAR(*max_vio_of_cv(c.experts, cv), c.max_vio, 0.03 * c.max_vio + 0.0005);
  }
  EXPECT_NEAR(*noise_floor_cv(16, 2, 2048), 0.058463396668342, 1e-14);
  EXPECT_FALSE(noise_floor_cv(16, 2, 0));
  EXPECT_FALSE(max_vio_of_cv(1, 0.1));
}

// Tokens that choose k of N uniformly and independently: the mean CV² is the floor squared, and the mean
// MaxVio is within 3 % of the formula.
TEST(Metrics, NoiseFloorsAreThoseOfSimulatedRouting) {
  std::mt19937_64 random(1);
  const int n = 16, k = 2, tokens = 512, runs = 400;
  double cv_sq = 0, max_vio = 0;
  for (int run = 0; run < runs; ++run) {
    Counts experts;
    for (int t = 0; t < tokens; ++t) {
      const auto a = static_cast<std::int64_t>(random() % 16);
      experts.push_back(a);
      experts.push_back((a + 1 + static_cast<std::int64_t>(random() % 15)) % 16);
    }
    RoutingStats stats({n, k, {}});
    ASSERT_TRUE(stats.add({.experts = experts}));
    const Metrics m = measure(stats);
    cv_sq += *m.load_cv * *m.load_cv / runs;
    max_vio += *m.max_vio / runs;
  }
  EXPECT_NEAR(std::sqrt(cv_sq) / *noise_floor_cv(n, k, tokens), 1, 0.03);
  EXPECT_NEAR(max_vio / *max_vio_of_cv(n, *noise_floor_cv(n, k, tokens)), 1, 0.03);
}

TEST(Metrics, SamplingFloorByHand) {
  // Three sequences of 2 assignments on 2 experts: (2,0), (1,1), (0,2). c = (3,3), p = ½, n_j = 2.
  // var_i = 3/2 Σ_j (c_ji - 1)² = 3/2 · 2 = 3; floor = √3 / 3.
  RoutingStats stats({2, 1, {.sequences = true}});
  const Counts experts = {0, 0, 0, 1, 1, 1};
  ASSERT_TRUE(stats.add({.experts = experts, .sequence_length = 2}));
  const Metrics m = measure(stats);
  EXPECT_NEAR(*m.sampling_floor_cv, std::sqrt(3.0) / 3, 1e-15);
  EXPECT_NEAR(*m.sampling_floor_max_vio, *max_vio_of_cv(2, std::sqrt(3.0) / 3), 1e-15);
  EXPECT_EQ(*m.excess_cv, 0);  // load_cv is 0
  EXPECT_NEAR(*signed_excess_cv_sq(m), -1.0 / 3, 1e-15);
  EXPECT_EQ(floor_of(m).max_vio, m.sampling_floor_max_vio);
  EXPECT_TRUE(floor_of(m).sampling);
}

TEST(Metrics, SamplingFloorNeedsTwoSequences) {
  RoutingStats stats({2, 1, {.sequences = true}});
  const Counts experts = {0, 1, 1, 1};
  ASSERT_TRUE(stats.add({.experts = experts, .sequence_length = 4}));
  const Metrics m = measure(stats);
  EXPECT_FALSE(m.sampling_floor_cv || m.sampling_floor_max_vio);
  EXPECT_NEAR(*m.excess_cv, std::sqrt(0.25 - 0.25), 1e-15);  // noise floor √(1/4), load_cv ½
  EXPECT_EQ(floor_of(m).max_vio, m.noise_floor_max_vio);
  EXPECT_FALSE(floor_of(m).sampling);
}

// Copies of whole sequences are perfectly correlated tokens: only the number of sequences counts.
TEST(Metrics, SamplingFloorOfRepeatedTokensCountsSequences) {
  std::mt19937_64 random(5);
  const int n = 8, repeats = 50, sequences = 64, runs = 60;
  double ratio = 0;
  for (int run = 0; run < runs; ++run) {
    Counts experts;
    for (int j = 0; j < sequences; ++j) {
      experts.insert(experts.end(), repeats, static_cast<std::int64_t>(random() % n));
    }
    RoutingStats stats({n, 1, {.sequences = true}});
    ASSERT_TRUE(stats.add({.experts = experts, .sequence_length = repeats}));
    ratio += *measure(stats).sampling_floor_cv / *noise_floor_cv(n, 1, sequences) / runs;
  }
  EXPECT_NEAR(ratio, 1, 0.05);
}

TEST(Metrics, ExcessIsWhatIsAboveTheFloor) {
  const Metrics m = metrics_of({160, 40, 40, 10});
  const double floor = std::sqrt(3.0 / 250);
  EXPECT_NEAR(*m.excess_cv, std::sqrt(0.921737489744233 * 0.921737489744233 - floor * floor), 1e-13);
}

TEST(Metrics, NormalQuantile) {
  EXPECT_EQ(normal_quantile(0.5), 0);
  EXPECT_NEAR(normal_quantile(0.975), 1.95996398454005423552, 1e-13);
  EXPECT_NEAR(normal_quantile(0.999), 3.09023230616781354154, 1e-12);
  EXPECT_NEAR(normal_quantile(1e-10), -6.36134090240405620470, 1e-12);
  EXPECT_NEAR(normal_quantile(0.03), -1.88079360815125093887, 1e-13);
  for (int i = 1; i < 20000; ++i) {
    const double p = i / 20000.0;
    EXPECT_NEAR(0.5 * std::erfc(-normal_quantile(p) / std::sqrt(2.0)), p, 1e-13);
  }
  for (const double bad : {0.0, 1.0, -1.0, 2.0, std::numeric_limits<double>::quiet_NaN()}) {
    EXPECT_THROW(normal_quantile(bad), std::invalid_argument);
  }
}

// ---- A second, straightforward implementation, over random vectors ----

std::map<std::string, double> reference(const Counts& c, const MetricsOptions& options) {
  const auto n = static_cast<long double>(c.size());
  long double s = 0;
  for (const auto x : c) s += static_cast<long double>(x);
  std::vector<long double> p;
  for (const auto x : c) p.push_back(static_cast<long double>(x) / s);
  long double entropy = 0, kl = 0, variance = 0, gini = 0;
  for (const auto x : p) {
    if (x > 0) entropy -= x * std::log(x), kl += x * std::log(n * x);
    for (const auto y : p) gini += std::abs(x - y) / (2 * n);
  }
  for (const auto x : c) {  // of counts: loads would lose the small differences of huge counts
    variance += (static_cast<long double>(x) - s / n) * (static_cast<long double>(x) - s / n) / n;
  }
  const long double top = *std::max_element(p.begin(), p.end());
  const double mean = static_cast<double>(s) / static_cast<double>(c.size());
  double inactive = 0, hot = 0, cold = 0;
  long double drops = 0;
  const double capacity =
      std::ceil(options.capacity_factor * static_cast<double>(s) / static_cast<double>(c.size()));
  for (const auto x : c) {
    inactive += x == 0;
    hot += static_cast<double>(x) > options.capacity_factor * mean;
    cold += static_cast<double>(x) < options.cold_fraction * mean;
    drops += std::max(0.0L, static_cast<long double>(x) - static_cast<long double>(capacity));
  }
  std::map<std::string, long double> r = {{"entropy", entropy},
                                          {"effective_experts", std::exp(entropy)},
                                          {"kl_to_uniform", kl},
                                          {"load_std", 100 * std::sqrt(variance) / s},
                                          {"load_cv", n * std::sqrt(variance) / s},
                                          {"max_load", top},
                                          {"min_load", *std::min_element(p.begin(), p.end())},
                                          {"max_to_mean", n * top},
                                          {"max_vio", n * top - 1},
                                          {"gini", gini},
                                          {"utilization_variance", variance},
                                          {"inactive_experts", inactive},
                                          {"inactive_fraction", inactive / n},
                                          {"hot_experts", hot},
                                          {"cold_experts", cold},
                                          {"predicted_drop_rate", drops / s},
                                          {"straggler_slowdown", n * top}};
  if (c.size() > 1) r["entropy_normalized"] = entropy / std::log(n);
  // Geometry, and the floor of as many tokens as there are assignments (k = 1).
  long double bias = 0, kept = 0;
  for (const auto x : p) {
    bias += (std::sqrt(x) - std::sqrt(1 / n)) * (std::sqrt(x) - std::sqrt(1 / n)) / 2;
    kept += x * std::sqrt(x);
  }
  r["fsi"] = 4 * std::asin(std::sqrt(bias / 2));
  r["fsi_max"] = 2 * std::acos(1 / std::sqrt(n));
  if (c.size() > 1 && 1 - kept > 1e-3L) r["fhs"] = bias / (1 - kept);  // else 1 - kept is mostly rounding
  r["noise_floor_cv"] = std::sqrt((n - 1) / s);
  std::map<std::string, double> out;
  for (const auto& [name, v] : r) out[name] = static_cast<double>(v);
  return out;
}

Counts random_counts(std::size_t n, std::mt19937_64& random) {
  Counts counts(n);
  const int kind = static_cast<int>(random() % 8);
  const auto below = [&](std::uint64_t limit) { return static_cast<std::int64_t>(random() % limit); };
  for (auto& c : counts) {
    switch (kind) {
      case 0:  // small, many ties
        c = below(4);
        break;
      case 1:  // about a real step's
        c = 200 + below(100);
        break;
      case 2:  // mostly zeros
        c = below(10) == 0 ? below(1000) : 0;
        break;
      case 3:  // skewed over many orders of magnitude
        c = static_cast<std::int64_t>(std::exp(std::normal_distribution<double>(5, 3)(random)));
        break;
      case 4:  // huge: a window of a long run
        c = below(std::uint64_t{1} << 53);
        break;
      case 5:  // huge and nearly equal
        c = (std::int64_t{1} << 53) - below(1 << 20);
        break;
      case 6:  // uniform
        c = 77;
        break;
      default:  // each digit of the sort
        c = std::int64_t{1} << below(54);
    }
  }
  if (std::all_of(counts.begin(), counts.end(), [](auto c) { return c == 0; }))
    counts[static_cast<std::size_t>(below(n)) % counts.size()] = 1;
  return counts;
}

TEST(Metrics, AgreeWithAStraightforwardImplementation) {
  std::mt19937_64 random(20240815);
  for (std::size_t n = 1; n <= 512; n += n < 40 ? 1 : 1 + random() % 23) {
    Measurer measurer({static_cast<int>(n), 1, {}}, {});
    for (int trial = 0; trial < 24; ++trial) {
      const Counts counts = random_counts(n, random);
      Metrics m;
      measurer.measure(stats_of(counts), m);
      for (const auto& [name, want] : reference(counts, {})) {
        ASSERT_NEAR(value(m, name), want, 1e-12 * std::max(1.0, std::abs(want)))
            << name << " of " << n << " experts, trial " << trial;
      }
    }
  }
}

TEST(Metrics, DoNotDependOnTheOrderOfExperts) {
  std::mt19937_64 random(9);
  for (int trial = 0; trial < 200; ++trial) {
    Counts counts = random_counts(1 + random() % 64, random);
    const Metrics before = metrics_of(counts);
    std::shuffle(counts.begin(), counts.end(), random);
    const Metrics after = metrics_of(counts);
    EXPECT_EQ(before.gini, after.gini);  // exact integers
    EXPECT_NEAR(*before.entropy, *after.entropy, 1e-13);
    EXPECT_NEAR(*before.load_cv, *after.load_cv, 1e-13 * (1 + *before.load_cv));
  }
}

// ---- The table of names ----

TEST(Metrics, EveryFieldHasOneName) {
  std::set<std::string_view> names;
  for (const MetricField& field : metric_fields()) {
    EXPECT_TRUE(names.insert(field.name).second) << field.name;
    EXPECT_EQ(find_metric(field.name), &field);
    EXPECT_FALSE(field.formula.empty()) << field.name;
  }
  EXPECT_EQ(metric_fields().size() * sizeof(Metrics::Value), sizeof(Metrics));  // none forgotten
  EXPECT_EQ(find_metric("no_such_metric"), nullptr);
}

// ---- Misuse ----

TEST(Metrics, OptionsOutOfRangeThrow) {
  const StatsShape shape{4, 1, {}};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {0.0, -1.0, nan, std::numeric_limits<double>::infinity()}) {
    EXPECT_THROW(Measurer(shape, {.capacity_factor = bad}), std::invalid_argument);
  }
  for (const double bad : {-0.1, 1.1, nan})
    EXPECT_THROW(Measurer(shape, {.cold_fraction = bad}), std::invalid_argument);
  for (const std::vector<int>& bad : {std::vector<int>{0, 1}, {0, 0, 0, 4}, {0, 0, 0, -1}}) {
    EXPECT_THROW(Measurer(shape, {.placement = bad}), std::invalid_argument);
  }
  EXPECT_THROW(Measurer({0, 1, {}}, {}), std::invalid_argument);
  Metrics m;
  EXPECT_THROW(Measurer(shape, {}).measure(RoutingStats({5, 1, {}}), m), std::invalid_argument);
}

TEST(Metrics, MeasuringAllocatesNothing) {
  std::mt19937_64 random(2);
  RoutingStats stats({256, 1, {.sequences = true}});
  Counts experts(4096);
  for (auto& e : experts) e = static_cast<std::int64_t>(random() % 256);
  ASSERT_TRUE(stats.add({.experts = experts, .sequence_length = 128}));
  Measurer measurer(stats.shape(), {.placement = std::vector<int>(256, 3)});
  Metrics m;
  EXPECT_EQ(testing::allocations_of([&] { measurer.measure(stats, m); }), 0);
  EXPECT_TRUE(m.sampling_floor_cv);
}

// Three quarters are wanted for expert 0 of two, and 60 of 100 go there: loads of .8 and 1.6 targets.
TEST(MetricsWithTargets, CompareLoadsWithThem) {
  const StatsShape shape{.experts = 2, .top_k = 1, .needs = {}};
  RoutingStats stats(shape);
  const std::vector<std::int64_t> counts = {60, 40};
  ASSERT_TRUE(stats.add_counts(counts, 100));
  const Metrics m = measure(stats, {.targets = {0.75, 0.25}});
  EXPECT_DOUBLE_EQ(*m.max_to_mean, 1.6);
  EXPECT_DOUBLE_EQ(*m.max_vio, 1.6 - 1);
  EXPECT_DOUBLE_EQ(*m.load_cv, std::sqrt((0.2 * 0.2 + 0.6 * 0.6) / 2));
  // One token: relative variances 1/.75 - 1 and 1/.25 - 1.
  EXPECT_DOUBLE_EQ(*m.noise_floor_cv, std::sqrt((1.0 / 3 + 3) / 2 / 100));
  EXPECT_DOUBLE_EQ(*m.excess_cv, std::sqrt(0.2 - (1.0 / 3 + 3) / 200));
  // Of two independent normals the larger is √((a² + b²)/2π); √2 as their sum is fixed. The rest is the f² term.
  const double f = *m.noise_floor_cv, z = normal_quantile(1.625 / 2.25);
  EXPECT_NEAR(*m.noise_floor_max_vio,
              std::sqrt((1.0 / 3 + 3) / (2 * std::numbers::pi) * 2 / 100) + f * f * (z * z - 1) / 6, 1e-7);
  // What says nothing of targets does not know of them.
  const Metrics plain = measure(stats);
  EXPECT_EQ(m.entropy, plain.entropy);
  EXPECT_EQ(m.max_load, plain.max_load);
  EXPECT_EQ(m.fhs, plain.fhs);
}

TEST(MetricsWithTargets, EqualTargetsChangeNoBit) {
  const StatsShape shape{.experts = 3, .top_k = 2, .needs = {}};
  RoutingStats stats(shape);
  const std::vector<std::int64_t> counts = {50, 30, 20};
  ASSERT_TRUE(stats.add_counts(counts, 50));
  const Metrics with = measure(stats, {.targets = std::vector<double>(3, 1.0 / 3)}), without = measure(stats);
  for (const MetricField& field : metric_fields())
    EXPECT_EQ(with.*field.value, without.*field.value) << field.name;
}

TEST(MetricsWithTargets, ALoadThatMeetsItsTargetsIsNoCollapse) {
  const StatsShape shape{.experts = 16, .top_k = 2, .needs = {}};
  std::vector<double> targets(16, 0.1 / 13);
  std::vector<std::int64_t> counts(16, 76);
  for (std::size_t i = 0; i < 3; ++i) {
    targets[i] = 0.3;
    counts[i] = 3000;
  }
  RoutingStats stats(shape);
  ASSERT_TRUE(stats.add_counts(counts, 5000));
  EXPECT_EQ(measure(stats).fhs_alarm, 1);
  EXPECT_EQ(measure(stats, {.targets = targets}).fhs_alarm, 0);
  std::swap(targets[0], targets[15]);  // the same load, wanted elsewhere
  EXPECT_EQ(measure(stats, {.targets = targets}).fhs_alarm, 1);
}

// Independent tokens that choose by the targets: the floors are what they show.
TEST(MetricsWithTargets, FloorsAreThoseOfRandomTokens) {
  std::vector<double> targets(16, 0.4 / 12);
  for (std::size_t i = 0; i < 4; ++i) targets[i] = 0.15;
  std::mt19937_64 random(11);
  std::discrete_distribution<std::size_t> choose(targets.begin(), targets.end());
  const StatsShape shape{.experts = 16, .top_k = 1, .needs = {}};
  Measurer measurer(shape, {.targets = targets});
  double squares = 0, vio = 0;
  Metrics m;
  for (int run = 0; run < 400; ++run) {
    std::vector<std::int64_t> counts(16, 0);
    for (int t = 0; t < 2048; ++t) ++counts[choose(random)];
    RoutingStats stats(shape);
    ASSERT_TRUE(stats.add_counts(counts, 2048));
    measurer.measure(stats, m);
    squares += *m.load_cv * *m.load_cv / 400;
    vio += *m.max_vio / 400;
  }
  EXPECT_NEAR(std::sqrt(squares), *m.noise_floor_cv, 0.02 * *m.noise_floor_cv);
  EXPECT_NEAR(vio, *m.noise_floor_max_vio, 0.06 * *m.noise_floor_max_vio);
}

TEST(MetricsWithTargets, AreChecked) {
  const StatsShape shape{.experts = 2, .top_k = 1, .needs = {}};
  EXPECT_THROW(Measurer(shape, {.targets = {1.0}}), std::invalid_argument);
  EXPECT_THROW(Measurer(shape, {.targets = {-0.5, 1.5}}), std::invalid_argument);
  EXPECT_THROW(Measurer(shape, {.targets = {0.0, 0.0}}), std::invalid_argument);
  EXPECT_THROW(Measurer(shape, {.targets = {0.5, 0.25}}), std::invalid_argument);
  EXPECT_THROW(Measurer(shape, {.targets = {std::nan(""), 1.0}}), std::invalid_argument);
}

}  // namespace
}  // namespace moectl
