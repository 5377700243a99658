#include "moectl/margins.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "moectl/controller.h"
#include "moectl/stats.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
using Bins = std::array<std::int64_t, kMarginBins>;

TEST(Margins, EdgesAreHalfOctavesFromZero) {
  EXPECT_EQ(margin_edge(0), 0);
  EXPECT_EQ(margin_edge(1), 1.5 / (1 << 20));
  EXPECT_EQ(margin_edge(2), 2.0 / (1 << 20));
  EXPECT_EQ(margin_edge(40), 1);
  EXPECT_EQ(margin_edge(41), 1.5);
  EXPECT_EQ(margin_edge(63), 3072);
  EXPECT_EQ(margin_edge(64), 4096);
}

TEST(Margins, ABinHoldsItsLowerEdgeAndNoneStraddlesZero) {
  for (std::size_t distance = 0; distance < kMarginBins / 2; ++distance) {
    const auto edge = static_cast<float>(margin_edge(distance));
    EXPECT_EQ(margin_bin(edge), 64 + distance);
    const float below = std::nextafter(static_cast<float>(margin_edge(distance + 1)), 0.0F);
    EXPECT_EQ(margin_bin(below), 64 + distance);
    EXPECT_EQ(margin_bin(-below), 63 - distance);
  }
  EXPECT_EQ(margin_bin(0.0F), 64U);
  EXPECT_EQ(margin_bin(-0.0F), 64U);
  EXPECT_EQ(margin_bin(-std::numeric_limits<float>::denorm_min()), 63U);
  EXPECT_EQ(margin_bin(kInf), 127U);
  EXPECT_EQ(margin_bin(-kInf), 0U);
  EXPECT_EQ(margin_bin(1e30F), 127U);
}

// 10 selected: 4 in [-1.5, -1), 6 in [-.75, -.5); not selected: 8 in [.25, .375), 2 beyond 3072.
TEST(Margins, QuantilesByHand) {
  Bins bins{};
  bins[margin_bin(-1.25F)] = 4;
  bins[margin_bin(-0.6F)] = 6;
  bins[margin_bin(0.3F)] = 8;
  bins[margin_bin(5000)] = 2;
  EXPECT_EQ(margin_quantile(bins, 10), 0);
  EXPECT_EQ(margin_quantile(bins, 12), 0.25 + 2.0 / 8 * 0.125);
  EXPECT_EQ(margin_quantile(bins, 18), 0.375);
  EXPECT_EQ(margin_quantile(bins, 19), 3072 + 0.5 * 1024);
  EXPECT_EQ(margin_quantile(bins, 25), 4096) << "more than there are";
  EXPECT_EQ(margin_quantile(bins, 7), -(0.5 + 3.0 / 6 * 0.25));
  EXPECT_EQ(margin_quantile(bins, 4), -0.75);
  EXPECT_EQ(margin_quantile(bins, 1), -(1 + 3.0 / 4 * 0.5));
  EXPECT_EQ(margin_quantile(bins, 0), -1.5);
  EXPECT_EQ(margin_quantile(Bins{}, 0), 0);
}

// Two tokens, three experts, k = 1. Token 0: v = (3, 1, 2), θ = 2.5; token 1: v = (0, -inf, 4), θ = 2.
const std::vector<std::int64_t> kExperts = {0, 2};
const std::vector<float> kTop = {3, 2, 4, 0};
const std::vector<float> kScores = {3, 1, 2, 0, -kInf, 4};
RoutingBatch batch() {
  return {.experts = kExperts, .top_values = kTop, .biased_scores = kScores};
}
StatsShape shape() {
  return {
      .experts = 3, .top_k = 1, .needs = {.margins = true, .required_bins = true, .required_local = true}};
}

std::int64_t required(const RoutingStats& stats, int expert, std::size_t bin) {
  const std::int64_t word = stats.required_bins(expert)[bin / 2];
  return bin % 2 == 0 ? word & 0xffffffff : word >> 32;
}

TEST(MarginStats, CountEveryTokenForEveryExpert) {
  RoutingStats stats(shape());
  ASSERT_TRUE(stats.add(batch()));
  ASSERT_TRUE(stats.has_margins());
  const auto holds = [&](int expert, float margin) { return stats.margins(expert)[margin_bin(margin)]; };
  EXPECT_EQ(holds(0, -0.5F), 1);
  EXPECT_EQ(holds(0, 2.0F), 1);
  EXPECT_EQ(holds(1, 1.5F), 1);
  EXPECT_EQ(holds(1, kInf), 1);
  EXPECT_EQ(holds(2, 0.5F), 1);
  EXPECT_EQ(holds(2, -2.0F), 1);
  // Required biases are v_{k+1} - v, as the biases are zero: of token 0, against 2, -1, 1, 0, and of token 1, against 0,
  // 0, ∞, -4. Bins of .002 from -1 on.
  EXPECT_EQ(required(stats, 0, 0), 1);
  EXPECT_EQ(required(stats, 0, 500), 1);
  EXPECT_EQ(required(stats, 1, 999), 2) << "1 is the end of the range";
  EXPECT_EQ(required(stats, 2, 500), 1);
  EXPECT_EQ(required(stats, 2, 0), 1);
  // Two tokens and three experts: ⌊2/3⌋ = 0, the smallest.
  EXPECT_EQ(stats.required_local(0), -1);
  EXPECT_EQ(stats.required_local(1), 1);
  EXPECT_EQ(stats.required_local(2), -4);
  EXPECT_TRUE(stats.valid());
}

TEST(MarginStats, AreAbsentUnlessEveryTokenHasThem) {
  RoutingStats stats(shape());
  ASSERT_TRUE(stats.add(batch()));
  const std::vector<std::int64_t> one = {1};
  ASSERT_TRUE(stats.add({.experts = one}));
  EXPECT_FALSE(stats.has_margins());
  EXPECT_FALSE(stats.has_required_bins());
  EXPECT_FALSE(stats.has_required_local());
  stats.clear();
  EXPECT_FALSE(stats.has_margins());
  ASSERT_TRUE(stats.add(batch()));
  EXPECT_TRUE(stats.has_required_bins());
  EXPECT_TRUE(stats.has_required_local());
}

TEST(MarginStats, MaskedTokensAndNoNeedLeaveNothing) {
  RoutingStats stats(shape());
  const std::vector<std::uint8_t> mask = {0, 1};
  const std::vector<float> broken = {kNaN, kNaN, kNaN, 0, -kInf, 4};
  ASSERT_TRUE(stats.add({.experts = kExperts, .mask = mask, .top_values = kTop, .biased_scores = broken}));
  EXPECT_TRUE(stats.has_margins());
  EXPECT_EQ(required(stats, 0, 500), 1);
  EXPECT_EQ(required(stats, 0, 0), 0);
  // Too few tokens may choose expert 1: it is where it was.
  EXPECT_EQ(stats.required_local(0), 0);
  EXPECT_EQ(stats.required_local(1), 0);
  EXPECT_EQ(stats.required_local(2), -4);
  RoutingStats plain({.experts = 3, .top_k = 1, .needs = {}});
  ASSERT_TRUE(plain.add(batch()));
  EXPECT_FALSE(plain.has_margins());
  EXPECT_FALSE(plain.has_required_bins());
  EXPECT_FALSE(plain.has_required_local());
  EXPECT_THROW(plain.margins(0), std::invalid_argument);
  EXPECT_THROW(plain.required_bins(0), std::invalid_argument);
  EXPECT_THROW(plain.required_local(0), std::invalid_argument);
}

TEST(MarginStats, BadScoresMakeTheRecordInvalidAndAddNothing) {
  for (const float bad : {kNaN, kInf}) {
    RoutingStats stats(shape());
    std::vector<float> scores = kScores;
    scores[4] = bad;
    EXPECT_FALSE(stats.add({.experts = kExperts, .top_values = kTop, .biased_scores = scores}));
    EXPECT_EQ(stats.tokens(), 0);
    EXPECT_EQ(required(stats, 0, 0), 0);
    EXPECT_EQ(stats.invalid_records(), 1);
  }
  RoutingStats stats(shape());
  EXPECT_THROW(stats.add({.experts = kExperts, .biased_scores = kScores}), std::invalid_argument);
  const std::vector<float> few = {1, 2};
  EXPECT_THROW(stats.add({.experts = kExperts, .top_values = kTop, .biased_scores = few}),
               std::invalid_argument);
}

// Bins are counted from the biases that tokens were routed under: other bins do not add, and say so.
TEST(RequiredBins, AddOnlyToThoseOfTheSameRange) {
  RoutingStats stats(shape()), others(shape()), same(shape());
  others.set_routed_under(std::vector<double>{0.5, 0, 0});
  ASSERT_TRUE(stats.add(batch()) && others.add(batch()) && same.add(batch()));
  stats += same;
  EXPECT_TRUE(stats.has_required_bins());
  EXPECT_EQ(required(stats, 0, 0), 2);
  stats += others;
  EXPECT_FALSE(stats.has_required_bins());
  ASSERT_TRUE(stats.add(batch()));
  EXPECT_FALSE(stats.has_required_bins());
  EXPECT_TRUE(stats.valid());
  // A bias of a half is taken out of the scores: what expert 0 requires is higher by it.
  EXPECT_EQ(others.required_range(), (RequiredRange{-1, 2.5}));
  EXPECT_EQ(required(others, 0, 200), 1);
  EXPECT_EQ(required(others, 0, 600), 1);
  others.drop_required();
  EXPECT_FALSE(others.has_required_bins());
}

// Each half of a word holds up to 2^29 tokens, and the ranks' words add up without a carry.
TEST(RequiredBins, ArePackedExactlyUpToTheirBound) {
  RoutingStats stats({.experts = 2, .top_k = 1, .needs = {.required_bins = true}});
  stats.set_scalar(RoutingStats::kTokens, kMostRequiredTokens);
  stats.set_scalar(RoutingStats::kMarginTokens, kMostRequiredTokens);
  const auto words = stats.mutable_array(RoutingStats::kRequiredBins);
  words[0] = kMostRequiredTokens;  // all tokens of expert 0 in its first bin, all of expert 1 in its second
  words[kRequiredWords] = kMostRequiredTokens << 32;
  EXPECT_TRUE(stats.valid());
  EXPECT_TRUE(stats.has_required_bins());
  EXPECT_EQ(required(stats, 0, 0), kMostRequiredTokens);
  EXPECT_EQ(required(stats, 1, 0), 0);
  EXPECT_EQ(required(stats, 1, 1), kMostRequiredTokens);
  stats.set_scalar(RoutingStats::kTokens, kMostRequiredTokens + 1);
  stats.set_scalar(RoutingStats::kMarginTokens, kMostRequiredTokens + 1);
  EXPECT_FALSE(stats.has_required_bins());
}

TEST(RequiredBins, TheBiasIsLinearWithinTheBinThatReachesIt) {
  std::array<std::int64_t, kRequiredWords> words{};
  words[0] = 2 | (std::int64_t{4} << 32);
  words[499] = std::int64_t{3} << 32;
  const RequiredRange range{-1, 2};
  EXPECT_EQ(required_bias(range, words, 1), -1 + 0.5 * 0.002);
  EXPECT_EQ(required_bias(range, words, 2), -1 + 1 * 0.002);
  EXPECT_EQ(required_bias(range, words, 3), -1 + 1.25 * 0.002);
  EXPECT_EQ(required_bias(range, words, 9), -1 + 1000 * 0.002);
  EXPECT_EQ(required_bias(range, words, 99), -1 + 1000 * 0.002) << "more than there are";
  EXPECT_EQ(required_bias(range, words, 0), -1);
}

// However a batch is cut into records, the histogram is the same to the bit, and has c_i tokens below zero.
TEST(MarginStats, AddInAnyOrder) {
  constexpr int kN = 8, kK = 2, kTokens = 300;
  const StatsShape wide{.experts = kN, .top_k = kK, .needs = {.margins = true}};
  std::mt19937_64 random(7);
  std::normal_distribution<float> normal;
  std::vector<std::int64_t> experts;
  std::vector<float> top, scores;
  for (int t = 0; t < kTokens; ++t) {
    std::vector<std::pair<float, std::int64_t>> row;
    for (int i = 0; i < kN; ++i) {
      row.emplace_back(normal(random), i);
      scores.push_back(row.back().first);
    }
    std::sort(row.rbegin(), row.rend());
    for (int j = 0; j < kK; ++j) experts.push_back(row[static_cast<std::size_t>(j)].second);
    for (int j = 0; j <= kK; ++j) top.push_back(row[static_cast<std::size_t>(j)].first);
  }
  const auto part = [&](std::size_t from, std::size_t to) {
    RoutingStats stats(wide);
    const auto cut = [&](const auto& all, std::size_t width) {
      return std::span(all).subspan(from * width, (to - from) * width);
    };
    EXPECT_TRUE(stats.add(
        {.experts = cut(experts, kK), .top_values = cut(top, kK + 1), .biased_scores = cut(scores, kN)}));
    return stats;
  };
  const RoutingStats whole = part(0, kTokens);
  RoutingStats sum = part(200, kTokens);
  sum += part(0, 1);
  sum += part(1, 200);
  EXPECT_TRUE(std::ranges::equal(whole.flat(), sum.flat()));
  for (int i = 0; i < kN; ++i) {
    const auto bins = whole.margins(i);
    std::int64_t below = 0, all = 0;
    for (std::size_t b = 0; b < kMarginBins; ++b) {
      all += bins[b];
      if (b < kMarginBins / 2) below += bins[b];
    }
    EXPECT_EQ(below, whole.counts()[static_cast<std::size_t>(i)]);
    EXPECT_EQ(all, kTokens);
  }
}

}  // namespace
}  // namespace moectl
