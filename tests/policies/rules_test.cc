// The published red flags, one by one: each acts past its threshold, from its step on, and on nothing less; at 8, 16,
// 64 and 256 experts.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "policies/policy_rig.h"

namespace moectl {
namespace {

struct Size {
  int experts, top_k;
};
constexpr Size kSizes[] = {{8, 1}, {16, 2}, {64, 6}, {256, 8}};

// Loads of all experts, relative to their mean: `many` of them at `load`, the others alike.
std::vector<double> two_levels(int experts, int many, double load) {
  std::vector<double> loads(static_cast<std::size_t>(experts),
                            experts > many ? (experts - many * load) / (experts - many) : 0);
  std::fill_n(loads.begin(), many, load);
  return loads;
}

// What a layer with these loads measures: exact, whatever batch would show it.
Metrics measured(Size size, const std::vector<double>& loads) {
  const StatsShape shape{.experts = size.experts, .top_k = size.top_k, .needs = {}};
  const std::int64_t tokens = 10'000'000LL * size.experts;
  std::vector<std::int64_t> counts;
  std::int64_t total = 0;
  for (const double load : loads) {
    counts.push_back(std::llround(load * static_cast<double>(tokens / size.experts * size.top_k)));
    total += counts.back();
  }
  RoutingStats stats(shape);
  counts.front() += tokens * size.top_k - total;
  stats.add_counts(counts, tokens);
  Metrics metrics = measure(stats);
  metrics.dead_experts = 0;  // the monitor's
  return metrics;
}

struct Fix {
  double weight = 1, temperature = 1;
  bool operator==(const Fix&) const = default;
  friend void PrintTo(const Fix& fix, std::ostream* out) { *out << fix.weight << ", " << fix.temperature; }
};
constexpr Fix kNone, kCollapse{5, 1.2}, kLikelyCollapse{2, 1.2}, kImbalance{2, 1}, kSuperexpert{1.5, 1.1},
    kSevere{1.5, 1};

// What `rules` makes of actuators at 1 that saw these metrics once.
Fix fix_of(Size size, const Metrics& metrics, std::int64_t step = 0, bool specialize = false,
           const Metrics* worst = nullptr, std::vector<double> targets = {}) {
  PolicyOptions options;
  const PolicyDescription& rules = *PolicyRegistry::builtin().find("rules");
  for (const OptionSpec& spec : rules.options) options.set(spec.name, spec.default_value);
  options.set("confirm", std::int64_t{1});
  options.set("specialize", specialize);
  const StatsShape shape{.experts = size.experts, .top_k = size.top_k, .needs = {}};
  const RoutingStats stats(shape);
  const LayerMonitor monitor(shape, MonitorOptions{});
  if (targets.empty()) targets.assign(static_cast<std::size_t>(size.experts), 1.0 / size.experts);
  Fix fix;
  for (const auto& [actuator, value] :
       {std::pair{Actuator::kAuxLossWeight, &fix.weight}, {Actuator::kRouterTemperature, &fix.temperature}}) {
    const auto policy = rules.make({.actuator = actuator,
                                    .experts = size.experts,
                                    .top_k = size.top_k,
                                    .initial = 1,
                                    .min = 0,
                                    .max = 100},
                                   options);
    policy->propose({.step = step,
                     .layer = worst == nullptr ? 0 : -1,
                     .stats = stats,
                     .metrics = metrics,
                     .worst = worst == nullptr ? metrics : *worst,
                     .monitor = monitor,
                     .targets = targets,
                     .info = {}},
                    {value, 1});
  }
  return fix;
}

Fix fix_of(Size size, const std::vector<double>& loads, std::int64_t step = 0) {
  return fix_of(size, measured(size, loads), step);
}

class Rule : public ::testing::TestWithParam<Size> {
 protected:
  const Size size = GetParam();
  const int n = size.experts, k = size.top_k;
};
INSTANTIATE_TEST_SUITE_P(Of, Rule, ::testing::ValuesIn(kSizes), [](const auto& info) {
  return std::to_string(info.param.experts) + "x" + std::to_string(info.param.top_k);
});

// m experts that share all have the entropy ln m, which lies a third of the way from ln k to ln N at m = k^⅔ N^⅓: 2.0,
// 4.0, 13.2 and 25.4 experts. One fewer is a collapse. As many more have a CV above 1 still, or above 1.5.
TEST_P(Rule, CollapseByEntropy) {
  const double border = std::pow(k, 2.0 / 3) * std::pow(n, 1.0 / 3);
  const int fewer = static_cast<int>(std::ceil(border - 1e-9)) - 1,
            more = static_cast<int>(border + 1e-9) + 1;
  EXPECT_EQ(fix_of(size, two_levels(n, fewer, 1.0 * n / fewer)), kCollapse) << fewer;
  EXPECT_NE(fix_of(size, two_levels(n, more, 1.0 * n / more)), kCollapse) << more;
}

// At 16 experts, top-2, the scale gives what is published: 0.5 ln 16.
TEST(Rules, TheEntropyIsThePublishedOneAtSixteenExperts) {
  Metrics metrics = measured({16, 2}, two_levels(16, 1, 1));
  for (const auto& [entropy, fix] : {std::pair{0.499, kCollapse}, {0.501, kNone}}) {
    metrics.entropy = entropy * std::log(16.0);
    EXPECT_EQ(fix_of({16, 2}, metrics), fix) << entropy;
  }
}

TEST_P(Rule, CollapseByDeadExperts) {
  Metrics metrics = measured(size, two_levels(n, 1, 1));
  metrics.dead_experts = n / 4;
  EXPECT_EQ(fix_of(size, metrics), kNone);
  metrics.dead_experts = n / 4 + 1;
  EXPECT_EQ(fix_of(size, metrics), kCollapse);
  metrics.dead_experts = std::nullopt;  // not known is no alarm
  EXPECT_EQ(fix_of(size, metrics), kNone);
}

// One expert that 69 or 71 % of the tokens choose, the others alike.
TEST_P(Rule, CollapseByLargestLoad) {
  EXPECT_EQ(fix_of(size, two_levels(n, 1, 0.71 * n / k)), kCollapse);
  EXPECT_NE(fix_of(size, two_levels(n, 1, 0.69 * n / k)), kCollapse);
}

// A CV of (a - 1) √(m / (N - m)) comes from m experts at a times the mean.
double load_of_cv(int experts, int many, double cv) {
  return 1 + cv * std::sqrt(static_cast<double>(experts - many) / many);
}

TEST_P(Rule, LikelyCollapse) {
  EXPECT_EQ(fix_of(size, two_levels(n, n / 8, load_of_cv(n, n / 8, 1.51))), kLikelyCollapse);
  EXPECT_EQ(fix_of(size, two_levels(n, n / 8, load_of_cv(n, n / 8, 1.49))), (Fix{2, 1.1}))
      << "the weight's by imbalance, the temperature's by the superexpert";
}

TEST_P(Rule, Imbalance) {
  EXPECT_EQ(fix_of(size, two_levels(n, n / 4, load_of_cv(n, n / 4, 1.01))), kImbalance);
  EXPECT_EQ(fix_of(size, two_levels(n, n / 4, load_of_cv(n, n / 4, 0.99))), kNone);
}

TEST_P(Rule, Superexpert) {
  EXPECT_EQ(fix_of(size, two_levels(n, 1, 3.01)), kSuperexpert);
  EXPECT_EQ(fix_of(size, two_levels(n, 1, 2.99)), kNone);
}

TEST_P(Rule, DroppedTokensOfALoadThatIsUneven) {
  Metrics metrics = measured(size, two_levels(n, n / 2, 1.61));
  const auto fix = [&](std::int64_t step = 1000) { return fix_of(size, metrics, step); };
  EXPECT_EQ(fix(), kNone) << "not reported";
  metrics.drop_rate = 0.03;
  EXPECT_EQ(fix(), kNone);
  metrics.drop_rate = 0.031;
  EXPECT_EQ(fix(), kSuperexpert);
  EXPECT_EQ(fix(999), kNone);
  metrics = measured(size, two_levels(n, n / 2, 1.59));
  metrics.drop_rate = 0.3;
  EXPECT_EQ(fix(), kNone) << "the capacity's fault";
}

TEST_P(Rule, SevereImbalance) {
  EXPECT_EQ(fix_of(size, two_levels(n, n / 2, 1.81), 1000), kSevere);
  EXPECT_EQ(fix_of(size, two_levels(n, n / 2, 1.81), 999), kNone);
  EXPECT_EQ(fix_of(size, two_levels(n, n / 2, 1.79), 1000), kNone);
}

TEST_P(Rule, WeakSpecializationIfAsked) {
  const Metrics even = measured(size, two_levels(n, n / 2, 1.19)),
                uneven = measured(size, two_levels(n, n / 2, 1.21));
  EXPECT_EQ(fix_of(size, even, 2000, true), (Fix{0.5, 1}));
  EXPECT_EQ(fix_of(size, even, 2000), kNone);
  EXPECT_EQ(fix_of(size, even, 1999, true), kNone);
  EXPECT_EQ(fix_of(size, uneven, 2000, true), kNone);
  // The other published signs hold with it.
  EXPECT_GT(*even.entropy_normalized, 0.95);
  EXPECT_LT(*even.kl_to_uniform, 0.15);
}

// A balanced router is left alone, also where all experts, or nearly all, get every token.
TEST(Rules, LeaveABalancedRouterAlone) {
  for (const auto& [experts, top_k] : {std::pair{8, 1}, {16, 2}, {256, 8}, {8, 6}, {8, 7}, {8, 8}, {1, 1}}) {
    const Metrics metrics = measured({experts, top_k}, two_levels(experts, 1, 1));
    EXPECT_EQ(fix_of({experts, top_k}, metrics, 10000), kNone) << experts << ", " << top_k;
  }
  Metrics rounded = measured({8, 8}, two_levels(8, 1, 1));
  rounded.entropy = std::nextafter(std::log(8.0), 0);
  EXPECT_EQ(fix_of({8, 8}, rounded), kNone);
}

TEST(Rules, ByDefaultTheWorstLayerDecidesForTheModel) {
  const Metrics quiet = measured({16, 2}, two_levels(16, 1, 1)),
                worst = measured({16, 2}, two_levels(16, 3, 16.0 / 3));
  EXPECT_EQ(fix_of({16, 2}, quiet, 0, false, &worst), kCollapse);
  EXPECT_EQ(fix_of({16, 2}, worst, 0, false, &quiet), kNone);
}

// The table is printed from the rules themselves, each with where it was published.
TEST(Rules, EachRuleNamesItsSource) {
  const std::string& table = PolicyRegistry::builtin().find("rules")->details;
  std::size_t rules = 0;
  for (std::size_t at = table.find("\n  "); at != std::string::npos; at = table.find("\n  ", at + 1)) {
    const std::string start = table.substr(at + 3, 2);
    if (start[0] == ' ' || start[0] == '[' || start == "on") continue;  // a source
    ++rules;
    EXPECT_EQ(table.compare(table.find('\n', at + 1), 8, "\n      ["), 0) << table.substr(at, 80);
  }
  EXPECT_EQ(rules, 9U);
  EXPECT_NE(table.find("  collapse: entropy < ln k + 0.333 ln(N/k), weight x 5, temperature x 1.2\n"),
            table.npos);
  EXPECT_NE(table.find("  weak specialization: load_cv < 0.2, from step 2000, weight / 2\n"), table.npos);
}

// Two of sixteen experts have a target of 0.45 each, two a target of 0: entropy 1.20 of ln 16 = 2.77 on target, which
// of equal experts is a collapse. A third of the way from ln 2 to it lies at .862, and a quarter of fourteen are dead
// from four on.
TEST(Rules, AreReadAgainstUnequalTargets) {
  const Size size{16, 2};
  std::vector<double> targets(16, 0.1 / 12);
  targets[0] = targets[1] = 0.45;
  targets[14] = targets[15] = 0;
  const double entropy = *metrics_on_target({16, 2, {}}, {.targets = targets}).entropy;
  EXPECT_NEAR(entropy, -0.9 * std::log(0.45) - 0.1 * std::log(0.1 / 12), 1e-12);
  Metrics metrics;
  metrics.dead_experts = 0;
  metrics.max_load = 0.45;
  metrics.max_to_mean = 1;
  metrics.load_cv = 0.3;
  const auto fix = [&](double value, double dead) {
    metrics.entropy = value;
    metrics.dead_experts = dead;
    return fix_of(size, metrics, 0, false, nullptr, targets);
  };
  EXPECT_EQ(fix(entropy, 0), kNone);
  EXPECT_EQ(fix_of(size, metrics), kCollapse);
  const double third = std::log(2) + (entropy - std::log(2)) / 3;
  EXPECT_EQ(fix(third + 0.001, 0), kNone);
  EXPECT_EQ(fix(third - 0.001, 0), kCollapse);
  EXPECT_EQ(fix(entropy, 3), kNone);
  EXPECT_EQ(fix(entropy, 4), kCollapse);
}

// All that is wanted is wanted of k experts: the entropy on target is ln k, but for its rounding, and no sign of
// anything.
TEST(Rules, DoNotReadTheRoundingOfAnEntropy) {
  for (const auto& [experts, top_k] : {std::pair{8, 2}, {8, 3}, {12, 7}, {64, 6}}) {
    std::vector<double> targets(static_cast<std::size_t>(experts), 0.0);
    std::fill_n(targets.begin(), top_k, 1.0 / top_k);
    RoutingStats stats({experts, top_k, {}});
    std::vector<std::int64_t> counts(targets.size(), 0);
    std::fill_n(counts.begin(), top_k, 2048);
    ASSERT_TRUE(stats.add_counts(counts, 2048));
    Metrics metrics = measure(stats, {.targets = targets});
    metrics.dead_experts = 0;
    EXPECT_EQ(fix_of({experts, top_k}, metrics, 0, false, nullptr, targets), kNone)
        << experts << ' ' << top_k;
    *metrics.entropy -= 1e-12;
    EXPECT_EQ(fix_of({experts, top_k}, metrics, 0, false, nullptr, targets), kNone)
        << experts << ' ' << top_k;
  }
}

}  // namespace
}  // namespace moectl
