// Tokens with different numbers of experts: slots that are not routed, floors, and the one check of counts.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/stats.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using Indices = std::vector<std::int64_t>;

TEST(FieldCases, C2_ASlotOfMinusOneIsNotRouted) {
  RoutingStats stats({.experts = 4, .top_k = 2, .needs = {.sequences = true, .domains = 2}});
  // Tokens with 2, 1, 0 (padding), 1 and 2 experts, in two sequences.
  const Indices experts = {0, 1, 3, -1, -1, -1, -1, 3, 2, 3}, ids = {5, 5, 5, 8, 8},
                domains = {0, 0, 1, 1, 1};
  ASSERT_TRUE(stats.add({.experts = experts, .sequence_ids = ids, .domain_ids = domains}))
      << stats.offence().words();
  EXPECT_TRUE(stats.valid());
  EXPECT_THAT(stats.counts(), ElementsAre(1, 1, 1, 3));
  EXPECT_EQ(stats.tokens(), 4);
  EXPECT_EQ(stats.choices_sq(), 4 + 1 + 1 + 4);
  EXPECT_EQ(stats.mean_choices(), 1.5);
  EXPECT_EQ(stats.scalar(RoutingStats::kSequences), 2);
  EXPECT_EQ(stats.scalar(RoutingStats::kSequenceLenSq), 9 + 9);  // assignments, not slots
  EXPECT_TRUE(stats.has_sequences());
  EXPECT_THAT(stats.domain_counts(0), ElementsAre(1, 1, 0, 1));
  EXPECT_THAT(stats.domain_counts(1), ElementsAre(0, 0, 1, 2));
  EXPECT_TRUE(stats.has_domains());
  // Any other index that is no expert is still bad data.
  const Indices below = {0, -2}, beyond = {0, 4};
  EXPECT_FALSE(stats.add({.experts = below}));
  EXPECT_FALSE(stats.add({.experts = beyond}));
}

// The token's own threshold lies behind its last routed slot, and a token without any is as if it were masked.
TEST(FieldCases, C2_GapMarginsAndProbabilitiesAreThoseOfTheRoutedSlots) {
  const StatsShape shape{.experts = 3,
                         .top_k = 2,
                         .needs = {.gap = true, .probabilities = true, .losses = true, .margins = true}};
  const std::vector<float> top = {9, 7, 4, 9, 7, 4, 5, 2, 1}, scores = {9, 7, 4, 4, 7, 9, 1, 2, 5};
  const std::vector<float> probabilities = {.5F, .25F, .25F, .5F, .25F, .25F, 1, 0, 0}, losses = {1, 2, 4};
  RoutingStats slots(shape), masked(shape), short_one({.experts = 3, .top_k = 1, .needs = shape.needs});
  for (RoutingStats* stats : {&slots, &masked, &short_one}) stats->set_gap_width(2.5);
  const Indices one_slot = {0, 1, 2, -1, -1, -1}, full = {0, 1, 2, 1, 2, 1};
  const std::vector<std::uint8_t> mask = {1, 1, 0};
  ASSERT_TRUE(slots.add(
      {.experts = one_slot, .top_values = top, .biased_scores = scores, .probabilities = probabilities}));
  ASSERT_TRUE(slots.add_token_losses({.experts = one_slot, .losses = losses}));
  EXPECT_EQ(slots.tokens(), 2);
  EXPECT_EQ(slots.mean_gap(), (3.0 + 2.0) / 2);
  EXPECT_THAT(slots.array(RoutingStats::kGapNear),
              ElementsAre(0, 0, 1));  // of the second token's only choice
  EXPECT_THAT(slots.array(RoutingStats::kExpertLossTokens), ElementsAre(1, 1, 1));
  // The second token alone is a token of a top-1 router.
  const Indices alone = {2};
  ASSERT_TRUE(short_one.add({.experts = alone,
                             .top_values = std::span(top).subspan(3, 2),
                             .biased_scores = std::span(scores).subspan(3, 3)}));
  ASSERT_TRUE(masked.add({.experts = full,
                          .mask = mask,
                          .top_values = top,
                          .biased_scores = scores,
                          .probabilities = probabilities}));
  EXPECT_THAT(slots.array(RoutingStats::kProbSum), ElementsAreArray(masked.array(RoutingStats::kProbSum)));
  for (int expert = 0; expert < 3; ++expert) {
    std::int64_t tokens = 0;
    for (std::size_t bin = 0; bin < kMarginBins; ++bin) {
      tokens += slots.margins(expert)[bin];
      if (short_one.margins(expert)[bin] > 0) {
        EXPECT_GT(slots.margins(expert)[bin], 0);
      }
    }
    EXPECT_EQ(tokens, 2);
  }
}

/// k_t experts for a token, expert i with probability k_t w_i exactly: systematic sampling in random order.
Indices choose(int choices, const std::vector<double>& shares, std::mt19937_64& random) {
  std::vector<std::size_t> order(shares.size());
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), random);
  double next = std::uniform_real_distribution<double>()(random), sum = 0;
  Indices chosen;
  for (const std::size_t expert : order) {
    sum += choices * shares[expert];
    if (std::ssize(chosen) == choices || sum <= next) continue;
    chosen.push_back(static_cast<std::int64_t>(expert));
    next += 1;
  }
  chosen.resize(static_cast<std::size_t>(choices), static_cast<std::int64_t>(order.back()));
  return chosen;
}

struct Measured {
  double cv_sq = 0, max_vio = 0, floor_sq = 0, floor_max_vio = 0;
};

/// Means over batches of independent tokens whose number of experts is drawn from `choices`.
Measured measured_on(const std::vector<int>& choices, const std::vector<double>& shares, bool equal) {
  constexpr int kBatches = 600, kTokens = 400;
  const auto most = static_cast<std::size_t>(*std::max_element(choices.begin(), choices.end()));
  const StatsShape shape{static_cast<int>(shares.size()), static_cast<int>(most), {}};
  MetricsOptions options;
  if (!equal) options.targets = shares;
  Measurer measurer(shape, options);
  std::mt19937_64 random(7);
  Measured mean;
  for (int batch = 0; batch < kBatches; ++batch) {
    Indices experts;
    for (int t = 0; t < kTokens; ++t) {
      Indices token = choose(choices[random() % choices.size()], shares, random);
      token.resize(most, -1);
      experts.insert(experts.end(), token.begin(), token.end());
    }
    RoutingStats stats(shape);
    EXPECT_TRUE(stats.add({.experts = experts}));
    Metrics metrics;
    measurer.measure(stats, metrics);
    mean.cv_sq += *metrics.load_cv * *metrics.load_cv / kBatches;
    mean.max_vio += *metrics.max_vio / kBatches;
    mean.floor_sq += *metrics.noise_floor_cv * *metrics.noise_floor_cv / kBatches;
    mean.floor_max_vio += *metrics.noise_floor_max_vio / kBatches;
  }
  return mean;
}

// The standard error of the mean CV² over 600 batches of 16 experts is √(2/15/600) = 1.5 %.
TEST(FieldCases, C2_TheFloorOfVariableChoicesIsTheOneMeasured) {
  const std::vector<double> even(16, 1.0 / 16);
  std::vector<double> uneven = {.15, .15, .1, .1};
  uneven.resize(16, .5 / 12);
  for (const std::vector<int>& choices :
       {std::vector<int>{4}, std::vector<int>{1, 6}, std::vector<int>{0, 1, 2, 3, 4, 5, 6}}) {
    const Measured of_even = measured_on(choices, even, true),
                   of_uneven = measured_on(choices, uneven, false);
    EXPECT_NEAR(of_even.cv_sq / of_even.floor_sq, 1, 0.05) << choices.size();
    EXPECT_NEAR(of_even.max_vio / of_even.floor_max_vio, 1, 0.05) << choices.size();
    EXPECT_NEAR(of_uneven.cv_sq / of_uneven.floor_sq, 1, 0.05) << choices.size();
    EXPECT_NEAR(of_uneven.max_vio / of_uneven.floor_max_vio, 1, 0.06) << choices.size();
  }
}

TEST(FieldCases, C2_VariableChoicesHaveTheFloorOfTheirSquares) {
  RoutingStats stats({.experts = 8, .top_k = 4, .needs = {}});
  Indices experts;
  for (int t = 0; t < 30; ++t) experts.insert(experts.end(), {t % 8, (t + 1) % 8, (t + 3) % 8, (t + 4) % 8});
  for (int t = 0; t < 40; ++t) experts.insert(experts.end(), {t % 8, -1, -1, -1});
  ASSERT_TRUE(stats.add({.experts = experts}));
  const double s = 160, squares = 30 * 16 + 40;
  EXPECT_DOUBLE_EQ(*measure(stats).noise_floor_cv, std::sqrt(8 / s - squares / (s * s)));
}

// W = 0 exactly where all tokens choose alike, and never below it.
TEST(FieldCases, C2_FhsOfVariableChoicesIsNeverBelowItsRange) {
  RoutingStats stats({.experts = 16, .top_k = 8, .needs = {}});
  Indices experts;
  for (int t = 0; t < 64; ++t) experts.insert(experts.end(), {0, -1, -1, -1, -1, -1, -1, -1});
  for (int t = 0; t < 8; ++t) experts.insert(experts.end(), {0, 1, 2, 3, 4, 5, 6, 7});
  ASSERT_TRUE(stats.add({.experts = experts}));
  const double p0 = 72.0 / 128, p1 = 8.0 / 128, mean = 128.0 / 72;
  const double w = 1 - std::sqrt(mean) * (std::pow(p0, 1.5) + 7 * std::pow(p1, 1.5));
  const double b = (std::pow(std::sqrt(p0) - .25, 2) + 7 * std::pow(std::sqrt(p1) - .25, 2) + 8 * .0625) / 2;
  EXPECT_NEAR(*measure(stats).fhs, b / w, 1e-9);
}

TEST(FieldCases, C2_CountsThatCannotBeTrueAreRefused) {
  RoutingStats stats({.experts = 2, .top_k = 2, .needs = {}});
  const auto says = [&](const Indices& counts, std::int64_t tokens,
                        std::optional<std::int64_t> squares = std::nullopt) {
    stats.clear();
    EXPECT_FALSE(stats.add_counts(counts, tokens, squares));
    EXPECT_FALSE(stats.valid());
    return std::string(stats.offence().words());
  };
  EXPECT_EQ(says({4, 3}, 3), "counts: sum 7: must be at most tokens * top_k (6)");
  EXPECT_EQ(says({1, 0}, 0), "counts: sum 1: must be at most tokens * top_k (0)");
  EXPECT_EQ(says({3, 2}, 3, 8),
            "choices_sq = 8: must be from 9 to 9, the sums of squares of 3 numbers up to 2 that sum to 5");
  stats.clear();
  ASSERT_TRUE(stats.add_counts(Indices{3, 2}, 3));  // two tokens with two experts, one with one
  EXPECT_EQ(stats.choices_sq(), 9);
  stats.clear();
  ASSERT_TRUE(stats.add_counts(Indices{2, 2}, 4, 8));  // two with two, two with none
  EXPECT_EQ(stats.choices_sq(), 8);
  stats.clear();
  ASSERT_TRUE(stats.add_counts(Indices{2, 2}, 4));
  EXPECT_EQ(stats.choices_sq(), 4);
}

}  // namespace
}  // namespace moectl
