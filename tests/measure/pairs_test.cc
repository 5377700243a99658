// Co-selection: the tokens that chose both of two experts, and their lift.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "moectl/metrics.h"

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::IsEmpty;

using Indices = std::vector<std::int64_t>;

StatsShape shape_of(int experts, int top_k) {
  return {.experts = experts, .top_k = top_k, .needs = {.pairs = true}};
}

/// Each of the tokens {0, 1}, {1, 0}, {2, 3}, {0, 2}, so many times.
RoutingStats by_hand(int times) {
  RoutingStats stats(shape_of(4, 2));
  const Indices tokens = {0, 1, 1, 0, 2, 3, 0, 2};
  for (int i = 0; i < times; ++i) EXPECT_TRUE(stats.add({.experts = tokens}));
  return stats;
}

std::vector<ExpertPair> pairs_of(const RoutingStats& stats, std::size_t most) {
  std::vector<ExpertPair> pairs;
  paired_experts(stats, most, pairs);
  return pairs;
}

auto pair_of(int first, int second, std::int64_t tokens, double lift) {
  return AllOf(Field(&ExpertPair::first, first), Field(&ExpertPair::second, second),
               Field(&ExpertPair::tokens, tokens),
               Field(&ExpertPair::lift, ::testing::DoubleNear(lift, 1e-15)));
}

TEST(Pairs, TokensAndLiftByHand) {
  const RoutingStats stats = by_hand(20);
  ASSERT_TRUE(stats.has_pairs());
  EXPECT_EQ(stats.tokens_of_both(0, 1), 40);
  EXPECT_EQ(stats.tokens_of_both(1, 0), 40);
  EXPECT_EQ(stats.tokens_of_both(2, 3), 20);
  EXPECT_EQ(stats.tokens_of_both(1, 3), 0);
  // Of equal lifts and tokens the lower numbers first.
  EXPECT_THAT(pairs_of(stats, 99),
              ElementsAre(pair_of(2, 3, 20, 20 * 80 / (40.0 * 20)), pair_of(0, 1, 40, 40 * 80 / (60.0 * 40)),
                          pair_of(0, 2, 20, 20 * 80 / (60.0 * 40)), pair_of(0, 3, 0, 0), pair_of(1, 2, 0, 0),
                          pair_of(1, 3, 0, 0)));
  EXPECT_THAT(pairs_of(stats, 1), ElementsAre(pair_of(2, 3, 20, 2)));
  Metrics metrics;
  Measurer(stats.shape(), {}).measure(stats, metrics);
  EXPECT_DOUBLE_EQ(*metrics.pair_lift, 2);
}

// One token fewer, and the pair (2, 3) is expected 9.975 times.
TEST(Pairs, APairOfWhichFewTokensAreExpectedHasNoLift) {
  RoutingStats stats = by_hand(19);
  const Indices rest = {0, 1, 1, 0, 0, 2};
  ASSERT_TRUE(stats.add({.experts = rest}));
  EXPECT_THAT(pairs_of(stats, 1), ElementsAre(pair_of(0, 1, 40, 40 * 79 / (60.0 * 40))));
  EXPECT_THAT(pairs_of(by_hand(1), 9), IsEmpty());
  EXPECT_FALSE(largest_pair_lift(by_hand(1)));
}

TEST(Pairs, AreAbsentWhereATokenMayHaveNone) {
  RoutingStats one(shape_of(4, 1));
  const Indices tokens(40, 1);
  ASSERT_TRUE(one.add({.experts = tokens}));
  EXPECT_FALSE(largest_pair_lift(one));
  // Counts do not say which experts a token chose together.
  RoutingStats counts = by_hand(20);
  ASSERT_TRUE(counts.add_counts(Indices{20, 20, 20, 20}, 40));
  EXPECT_FALSE(counts.has_pairs());
  EXPECT_FALSE(largest_pair_lift(counts));
  EXPECT_FALSE(RoutingStats({.experts = 4, .top_k = 2, .needs = {}}).has_pairs());
  EXPECT_THROW(by_hand(1).tokens_of_both(2, 2), std::invalid_argument);
  EXPECT_THROW(by_hand(1).tokens_of_both(2, 4), std::invalid_argument);
  EXPECT_THROW(RoutingStats({.experts = 4, .top_k = 2, .needs = {}}).tokens_of_both(0, 1),
               std::invalid_argument);
}

// Against a count of sets: empty slots, padding, an expert twice; and in pieces as at once.
TEST(Pairs, AreThoseOfTheSetsThatTokensChose) {
  std::mt19937_64 random(18);
  for (int run = 0; run < 60; ++run) {
    const int n = 2 + static_cast<int>(random() % 9),
              k = 1 + static_cast<int>(random() % static_cast<unsigned>(std::min(n, 5)));
    RoutingStats whole(shape_of(n, k)), first(shape_of(n, k)), second(shape_of(n, k));
    std::map<std::pair<std::int64_t, std::int64_t>, std::int64_t> expected;
    Indices experts;
    std::vector<std::uint8_t> mask;
    constexpr std::size_t kTokens = 50;
    for (std::size_t t = 0; t < kTokens; ++t) {
      mask.push_back(random() % 5 != 0);
      std::set<std::int64_t> chosen;
      for (int j = 0; j < k; ++j) {
        experts.push_back(random() % 7 == 0 ? -1
                                            : static_cast<std::int64_t>(random() % static_cast<unsigned>(n)));
        if (mask.back() && experts.back() >= 0) chosen.insert(experts.back());
      }
      for (const std::int64_t a : chosen) {
        for (const std::int64_t b : chosen) {
          if (a < b) ++expected[{a, b}];
        }
      }
    }
    const auto part = [&](std::size_t from, std::size_t to) {
      const auto width = static_cast<std::size_t>(k);
      return RoutingBatch{.experts = std::span(experts).subspan(from * width, (to - from) * width),
                          .mask = std::span(mask).subspan(from, to - from)};
    };
    ASSERT_TRUE(whole.add(part(0, kTokens)));
    ASSERT_TRUE(first.add(part(0, 20)));
    ASSERT_TRUE(second.add(part(20, kTokens)));
    first += second;
    EXPECT_TRUE(std::ranges::equal(first.flat(), whole.flat()));
    std::size_t at = 0;
    for (int i = 0; i < n; ++i) {
      for (int j = i + 1; j < n; ++j) {
        EXPECT_EQ(whole.pair_index(i, j), at++);
        EXPECT_EQ(whole.tokens_of_both(j, i), (expected[{i, j}])) << i << ' ' << j << ", run " << run;
      }
    }
    EXPECT_EQ(whole.array(RoutingStats::kPairs).size(), at);
  }
}

}  // namespace
}  // namespace moectl
