#include "moectl/stats.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "allocation_counter.h"
#include "test_sums.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;

constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();

StatsNeeds everything(int domains = 2) {
  StatsNeeds needs = every_input(domains);
  needs.required_bins = needs.required_local = true;
  return needs;
}

// ---- Values by hand ----

TEST(RoutingStats, CountsEveryChoice) {
  RoutingStats stats({4, 2, {}});
  const std::vector<std::int64_t> experts = {0, 1, 1, 2, 0, 1};
  EXPECT_TRUE(stats.add({.experts = experts}));
  EXPECT_THAT(stats.counts(), ElementsAre(2, 3, 1, 0));
  EXPECT_EQ(stats.tokens(), 3);
  EXPECT_EQ(stats.assignments(), 6);
  EXPECT_TRUE(stats.valid());
}

TEST(RoutingStats, PaddingIsNotCounted) {
  RoutingStats stats({4, 2, everything()});
  const std::vector<std::int64_t> experts = {0, 1, 1, 2, 0, 3};
  const std::vector<std::uint8_t> mask = {1, 0, 255};
  const std::vector<std::int64_t> domains = {1, 7, 0};  // what padding holds does not matter
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> values = {3, 2, 1, nan, nan, nan, 2, 1.5F, 1};
  const std::vector<float> scores = {3, 2, 1, 0, nan, nan, nan, nan, 2, 1, 0, 1.5F};
  const std::vector<float> rows = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1};
  EXPECT_TRUE(stats.add({.experts = experts,
                         .mask = mask,
                         .sequence_length = 3,
                         .top_values = values,
                         .biased_scores = scores,
                         .probabilities = rows,
                         .domain_ids = domains}));
  EXPECT_THAT(stats.counts(), ElementsAre(2, 1, 0, 1));
  EXPECT_EQ(stats.tokens(), 2);
  EXPECT_EQ(*stats.mean_gap(), 0.75);
  EXPECT_THAT(stats.domain_counts(0), ElementsAre(1, 0, 0, 1));
  EXPECT_THAT(stats.domain_counts(1), ElementsAre(1, 1, 0, 0));
  EXPECT_EQ(stats.scalar(RoutingStats::kSequenceLenSq), 16);
  EXPECT_THAT(stats.array(RoutingStats::kProbSum), ElementsAre(1 << 24, 0, 0, 1 << 24));
  for (int expert = 0; expert < 4; ++expert) {
    const auto bins = stats.margins(expert);
    EXPECT_EQ(std::accumulate(bins.begin(), bins.end(), std::int64_t{0}), 2);
  }
}

TEST(RoutingStats, SequenceSums) {
  RoutingStats stats({3, 1, {.sequences = true}});
  // Sequences (0,0,1), (2,2,2): c = {2,1,0}, {0,0,3}.
  const std::vector<std::int64_t> experts = {0, 0, 1, 2, 2, 2};
  EXPECT_TRUE(stats.add({.experts = experts, .sequence_length = 3}));
  EXPECT_EQ(stats.scalar(RoutingStats::kSequences), 2);
  EXPECT_EQ(stats.scalar(RoutingStats::kSequenceLenSq), 18);
  EXPECT_THAT(stats.array(RoutingStats::kSequenceSq), ElementsAre(4, 1, 9));
  EXPECT_THAT(stats.array(RoutingStats::kSequenceCross), ElementsAre(6, 3, 9));
  EXPECT_TRUE(stats.has_sequences());
}

TEST(RoutingStats, SequenceIdsMayHaveAnyLengthAndGaps) {
  RoutingStats stats({3, 2, {.sequences = true}});
  const std::vector<std::int64_t> experts = {0, 1, 0, 2, 1, 2, 0, 1};
  const std::vector<std::int64_t> ids = {-4, 7, 7, 9};
  EXPECT_TRUE(stats.add({.experts = experts, .sequence_ids = ids}));
  EXPECT_EQ(stats.scalar(RoutingStats::kSequences), 3);
  EXPECT_EQ(stats.scalar(RoutingStats::kSequenceLenSq), 4 + 16 + 4);
  EXPECT_THAT(stats.array(RoutingStats::kSequenceSq), ElementsAre(1 + 1 + 1, 1 + 1 + 1, 4));
}

TEST(RoutingStats, SequencesOfPaddingOnlyAreNone) {
  RoutingStats stats({2, 1, {.sequences = true}});
  const std::vector<std::int64_t> experts = {0, 1, 0, 1};
  const std::vector<std::uint8_t> mask = {1, 1, 0, 0};
  EXPECT_TRUE(stats.add({.experts = experts, .mask = mask, .sequence_length = 2}));
  EXPECT_EQ(stats.scalar(RoutingStats::kSequences), 1);
}

TEST(RoutingStats, ProbabilitiesAreNormalisedRowByRow) {
  RoutingStats stats({2, 1, {.probabilities = true}});
  const std::vector<std::int64_t> experts = {0, 1};
  const std::vector<float> rows = {0.5F, 0.5F, 3.0F, 1.0F};
  EXPECT_TRUE(stats.add({.experts = experts, .probabilities = rows}));
  ASSERT_TRUE(stats.has_probabilities());
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kProbSum)[0]), 1.25);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kProbSum)[1]), 0.75);
  EXPECT_NEAR(from_fixed(stats.array(RoutingStats::kSqrtProbSum)[0]), std::sqrt(0.5) + std::sqrt(0.75), 1e-7);
  const double entropy = std::log(2.0) - 0.75 * std::log(0.75) - 0.25 * std::log(0.25);
  EXPECT_NEAR(from_fixed(stats.scalar(RoutingStats::kTokenEntropySum)), entropy, 1e-7);
}

TEST(RoutingStats, OneHotProbabilitiesHaveNoEntropy) {
  for (const int n : {1, 2, 3, 5}) {
    RoutingStats stats({n, 1, {.probabilities = true}});
    std::vector<float> row(static_cast<std::size_t>(n), 0.0F);
    row.back() = 1;
    const std::vector<std::int64_t> experts = {n - 1};
    EXPECT_TRUE(stats.add({.experts = experts, .probabilities = row}));
    EXPECT_EQ(stats.scalar(RoutingStats::kTokenEntropySum), 0) << n;
    EXPECT_EQ(stats.array(RoutingStats::kSqrtProbSum).back(), 1 << 24) << n;
  }
}

TEST(RoutingStats, PerExpertObservations) {
  RoutingStats stats({2, 1, everything()});
  const std::vector<double> norms = {0.5, 2}, seconds = {0.25, 0};
  const std::vector<std::int64_t> tokens = {3, 0};
  EXPECT_TRUE(stats.add_grad_norms(norms));
  EXPECT_TRUE(stats.add_grad_norms(norms));
  EXPECT_TRUE(stats.add_latencies(seconds));
  EXPECT_TRUE(stats.add_expert_losses(norms, tokens));
  EXPECT_EQ(stats.scalar(RoutingStats::kGradRecords), 2);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kGradNormSum)[1]), 4);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kLatencySum)[0]), 0.25);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kExpertLossSum)[0]), 0.5);
  EXPECT_EQ(stats.array(RoutingStats::kExpertLossTokens)[0], 3);
}

TEST(RoutingStats, LossesOfTokensByExpertAndDomain) {
  RoutingStats stats({3, 2, everything()});
  const std::vector<std::int64_t> experts = {0, 1, 1, 2, 0, 2, 2, 1};
  const std::vector<float> losses = {1, -2.5F, std::numeric_limits<float>::quiet_NaN(), 0.25F};
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1};  // of what has no loss, nothing else matters
  const std::vector<std::int64_t> domains = {1, 0, 9, 1};
  ASSERT_TRUE(
      stats.add_token_losses({.experts = experts, .losses = losses, .mask = mask, .domain_ids = domains}));
  const auto one = [](double value) { return static_cast<std::int64_t>(value * 16777216); };
  using S = RoutingStats;
  EXPECT_THAT(stats.array(S::kExpertLossSum), ElementsAre(one(1), one(-1.25), one(-2.25)));
  EXPECT_THAT(stats.array(S::kExpertLossTokens), ElementsAre(1, 3, 2));
  EXPECT_THAT(stats.array(S::kDomainLossSum),
              ElementsAre(0, one(-2.5), one(-2.5), one(1), one(1.25), one(.25)));
  EXPECT_THAT(stats.array(S::kDomainLossTokens), ElementsAre(0, 1, 1, 1, 2, 1));
  EXPECT_TRUE(stats.valid()) << "losses may be negative";
  // The same from sums formed elsewhere, to the bit; of domains not known nothing is added to them.
  RoutingStats sums(stats.shape());
  ASSERT_TRUE(sums.add_token_losses({.experts = experts, .losses = losses, .mask = mask}));
  EXPECT_THAT(sums.array(S::kDomainLossTokens), ::testing::Each(0));
  ASSERT_TRUE(
      sums.add_domain_losses(0, std::vector<double>{0, -2.5, -2.5}, std::vector<std::int64_t>{0, 1, 1}));
  ASSERT_TRUE(
      sums.add_domain_losses(1, std::vector<double>{1, 1.25, .25}, std::vector<std::int64_t>{1, 2, 1}));
  EXPECT_THAT(sums.flat(), ElementsAreArray(stats.flat()));
  // Where only one of the two is wanted, only that is kept.
  RoutingStats by_expert({3, 2, {.losses = true, .domains = 2}}),
      by_domain({3, 2, {.domain_losses = true, .domains = 2}});
  for (RoutingStats* other : {&by_expert, &by_domain}) {
    ASSERT_TRUE(
        other->add_token_losses({.experts = experts, .losses = losses, .mask = mask, .domain_ids = domains}));
    for (const S::Array which :
         {S::kExpertLossSum, S::kExpertLossTokens, S::kDomainLossSum, S::kDomainLossTokens}) {
      if (other->array(which).empty()) continue;
      EXPECT_THAT(other->array(which), ElementsAreArray(stats.array(which)));
    }
  }
  EXPECT_EQ(by_expert.flat().size() + 6, by_domain.flat().size());
}

TEST(RoutingStats, FixedPointRoundsTiesToEven) {
  EXPECT_EQ(to_fixed(1.0), 1 << 24);
  EXPECT_EQ(to_fixed(0.5 * kFixedUnit), 0);
  EXPECT_EQ(to_fixed(1.5 * kFixedUnit), 2);
  EXPECT_EQ(to_fixed(2.5 * kFixedUnit), 2);
  EXPECT_EQ(to_fixed(-1.5 * kFixedUnit), -2);
  EXPECT_EQ(to_fixed(kFixedMax), std::int64_t{1} << 48);
  EXPECT_FALSE(fits_fixed(std::numeric_limits<double>::quiet_NaN()));
  EXPECT_FALSE(fits_fixed(std::numeric_limits<double>::infinity()));
  EXPECT_FALSE(fits_fixed(kFixedMax * 1.01));
}

TEST(RoutingStats, AGapOfTheLargestValueThatFitsIsCounted) {
  RoutingStats stats({2, 1, {.gap = true}});
  const std::vector<std::int64_t> experts = {0};
  const auto most = static_cast<float>(kFixedMax);
  EXPECT_TRUE(stats.add({.experts = experts, .top_values = std::vector<float>{most, 0}}));
  EXPECT_EQ(stats.mean_gap(), kFixedMax);
  EXPECT_FALSE(stats.add({.experts = experts, .top_values = std::vector<float>{most, -2}}));
}

TEST(RoutingStats, WhatTwoNeedTogetherIsAllThatEitherNeeds) {
  using Flag = bool StatsNeeds::*;
  for (const Flag flag :
       {&StatsNeeds::gap, &StatsNeeds::sequences, &StatsNeeds::probabilities, &StatsNeeds::gradients,
        &StatsNeeds::losses, &StatsNeeds::domain_losses, &StatsNeeds::latencies, &StatsNeeds::margins,
        &StatsNeeds::required_bins, &StatsNeeds::required_local}) {
    StatsNeeds one, none, both;
    one.*flag = true;
    both = none;
    EXPECT_EQ(both |= one, one);
    EXPECT_EQ(both |= none, one);
  }
  StatsNeeds together{.domains = 2, .split_sequences = 8};
  together |= {.domains = 5, .split_sequences = 3};
  EXPECT_EQ(together, (StatsNeeds{.domains = 5, .split_sequences = 8}));
  together |= {.domains = 1, .split_sequences = 9};
  EXPECT_EQ(together, (StatsNeeds{.domains = 5, .split_sequences = 9}));
}

// ---- What not every token contributed to is absent ----

TEST(RoutingStats, PartialSumsAreAbsent) {
  RoutingStats stats({3, 1, everything()});
  EXPECT_FALSE(stats.mean_gap() || stats.dropped() || stats.has_sequences() || stats.has_probabilities());
  const std::vector<std::int64_t> experts = {0, 1}, domains = {0, 1};
  const std::vector<float> values = {2, 1, 4, 1}, rows = {1, 0, 0, 0, 1, 0};
  const RoutingBatch full = {.experts = experts,
                             .sequence_length = 2,
                             .top_values = values,
                             .probabilities = rows,
                             .domain_ids = domains,
                             .dropped = 1};
  EXPECT_TRUE(stats.add(full));
  EXPECT_EQ(*stats.mean_gap(), 2);
  EXPECT_EQ(*stats.dropped(), 1);
  EXPECT_TRUE(stats.has_sequences() && stats.has_probabilities() && stats.has_domains());
  EXPECT_EQ(stats.domain_tokens(1), 1);
  EXPECT_TRUE(stats.add({.experts = experts}));
  EXPECT_FALSE(stats.mean_gap() || stats.dropped() || stats.has_sequences() || stats.has_probabilities() ||
               stats.has_domains());
  EXPECT_EQ(stats.tokens(), 4);
}

TEST(RoutingStats, WhatIsNotNeededIsNotKept) {
  RoutingStats stats({3, 1, {}});
  EXPECT_EQ(stats.flat().size(), RoutingStats::kScalarCount + 3U);
  const std::vector<std::int64_t> experts = {0, 1}, domains = {0, 99};
  const std::vector<float> values = {2, 1, 4, 1};
  EXPECT_TRUE(stats.add(
      {.experts = experts, .sequence_length = 2, .top_values = values, .domain_ids = domains, .dropped = 0}));
  EXPECT_FALSE(stats.mean_gap() || stats.has_sequences() || stats.has_domains());
  EXPECT_TRUE(stats.dropped());  // a single number: always kept
}

// ---- Malformed data: nothing but the counter of invalid records changes ----

class Malformed : public ::testing::TestWithParam<bool> {};

void expect_rejected(RoutingStats& stats, const RoutingBatch& batch) {
  std::vector<std::int64_t> expected(stats.flat().begin(), stats.flat().end());
  ++expected[RoutingStats::kInvalidRecords];
  EXPECT_FALSE(stats.add(batch));
  EXPECT_THAT(stats.flat(), ElementsAreArray(expected));
  EXPECT_FALSE(stats.valid());
  // Scratch space is clean again: the next good record counts as if nothing had happened.
  RoutingStats fresh(stats.shape());
  const std::vector<std::int64_t> good(static_cast<std::size_t>(stats.top_k()) * 64, 0);
  const std::vector<std::int64_t> before(stats.counts().begin(), stats.counts().end());
  EXPECT_TRUE(stats.add({.experts = good}));
  EXPECT_EQ(stats.counts()[0], before[0] + std::ssize(good));
  for (std::size_t i = 1; i < before.size(); ++i) EXPECT_EQ(stats.counts()[i], before[i]);
}

TEST_P(Malformed, AnIndexOutOfRangeAnywhereRejectsTheRecord) {
  for (const int n : {1, 2, 3, 5, 16, 100, 256, 300, 1025}) {
    std::mt19937_64 random(static_cast<std::uint64_t>(n));
    for (const std::int64_t bad : {std::int64_t{n}, std::int64_t{n} + 1, std::int64_t{-2}, kMin, kMax,
                                   std::int64_t{1} << 32, std::int64_t{2} * n, std::int64_t{-n - 1}}) {
      RoutingStats stats({n, 1, GetParam() ? everything() : StatsNeeds{}});
      std::vector<std::int64_t> experts(8192 + 3);
      for (auto& e : experts) e = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
      ASSERT_TRUE(stats.add({.experts = experts}));
      experts[random() % experts.size()] = bad;
      SCOPED_TRACE(std::to_string(n) + " experts, index " + std::to_string(bad));
      expect_rejected(stats, {.experts = experts});
      std::vector<std::uint8_t> mask(experts.size(), 1);
      expect_rejected(stats, {.experts = experts, .mask = mask});
      expect_rejected(stats, {.experts = experts, .sequence_length = std::ssize(experts) / 5});
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Needs, Malformed, ::testing::Bool());

TEST(RoutingStats, MalformedOptionalInputsRejectTheRecord) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const std::vector<std::int64_t> experts = {0, 1};
  RoutingStats stats({3, 1, everything()});
  const auto rejected = [&stats](const RoutingBatch& batch, const char* field) {
    expect_rejected(stats, batch);
    RoutingStats alone(stats.shape());
    alone.add(batch);
    EXPECT_THAT(std::string(alone.offence().words()), ::testing::StartsWith(field));
  };
  for (const std::vector<float>& values :
       {std::vector<float>{2, 1, nan, 1}, {2, 1, 1, nan}, {inf, 1, 2, 1}, {2, -inf, 2, 1}, {1, 2, 2, 1}}) {
    rejected({.experts = experts, .top_values = values}, "top_values[");
  }
  for (const std::vector<float>& rows : {std::vector<float>{1, 0, 0, nan, 1, 1},
                                         {1, 0, 0, -1, 1, 1},
                                         {0, 0, 0, 1, 0, 0},
                                         {inf, 0, 0, 1, 0, 0}}) {
    rejected({.experts = experts, .probabilities = rows}, "probabilities[");
  }
  for (const std::vector<std::int64_t>& ids : {std::vector<std::int64_t>{1, 0}, {0, -1}}) {
    rejected({.experts = experts, .sequence_ids = ids}, "sequence_ids[");
  }
  for (const std::vector<std::int64_t>& ids : {std::vector<std::int64_t>{0, 2}, {-1, 0}, {kMin, kMax}}) {
    rejected({.experts = experts, .domain_ids = ids}, "domain_ids[");
  }
  rejected({.experts = experts, .dropped = -1}, "dropped");
}

TEST(RoutingStats, MalformedSumsRejectTheRecord) {
  RoutingStats stats({2, 1, everything()});
  const auto rejected = [&](bool returned) {
    static std::int64_t before = 0;
    EXPECT_FALSE(returned);
    EXPECT_EQ(stats.invalid_records(), ++before);
    EXPECT_EQ(stats.tokens() + stats.assignments() + stats.scalar(RoutingStats::kGradRecords), 0);
  };
  rejected(stats.add_counts(std::vector<std::int64_t>{1, -1}, 1));
  rejected(stats.add_counts(std::vector<std::int64_t>{1, 1}, -2));
  rejected(stats.add_counts(std::vector<std::int64_t>{kMax, 1}, 1));
  rejected(stats.add_counts(std::vector<std::int64_t>{kMin, kMin}, 1));
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  for (const double bad : {nan, inf, -inf, -1.0, 1e30}) {
    rejected(stats.add_grad_norms(std::vector<double>{1, bad}));
    rejected(stats.add_latencies(std::vector<double>{bad, 1}));
  }
  const std::vector<std::int64_t> ones = {1, 1};
  for (const double bad : {nan, inf, -inf, 1e30, -1e30}) {
    rejected(stats.add_expert_losses(std::vector<double>{1, bad}, ones));
    rejected(stats.add_domain_losses(1, std::vector<double>{bad, 1}, ones));
    const auto narrow = static_cast<float>(bad);
    rejected(stats.add_token_losses({.experts = ones, .losses = std::vector<float>{1, narrow}}));
  }
  rejected(stats.add_expert_losses(std::vector<double>{1, 1}, std::vector<std::int64_t>{1, -1}));
  rejected(stats.add_domain_losses(0, std::vector<double>{1, 0.5}, std::vector<std::int64_t>{1, -1}));
  const std::vector<float> losses = {1, 1};
  for (const std::int64_t bad : {std::int64_t{-2}, std::int64_t{2}, kMin, kMax}) {
    const std::vector<std::int64_t> wrong = {1, bad};
    rejected(stats.add_token_losses({.experts = wrong, .losses = losses}));
    rejected(stats.add_token_losses({.experts = ones, .losses = losses, .domain_ids = wrong}));
  }
}

TEST(RoutingStats, OverflowIsNoticedNotUndefined) {
  RoutingStats a({2, 1, {}});
  EXPECT_TRUE(a.add_counts(std::vector<std::int64_t>{kMax, 0}, kMax));
  EXPECT_TRUE(a.valid());
  RoutingStats b = a;
  b += a;
  EXPECT_FALSE(b.valid());
  RoutingStats c({2, 1, {}});  // no single sum overflows, only their total
  c.mutable_array(RoutingStats::kCounts)[0] = kMax;
  c.mutable_array(RoutingStats::kCounts)[1] = kMax;
  EXPECT_FALSE(c.valid());
  // Losses of either sign are good; half way to an overflow they are not.
  constexpr std::int64_t kHalf = std::int64_t{1} << 62;
  for (const auto& [sum, good] : {std::pair{-kHalf, true},
                                  {kHalf - 1, true},
                                  {-kHalf - 1, false},
                                  {kHalf, false},
                                  {kMax, false},
                                  {kMin, false}}) {
    for (const RoutingStats::Array which : {RoutingStats::kExpertLossSum, RoutingStats::kDomainLossSum}) {
      RoutingStats d({2, 1, everything()});
      d.mutable_array(which)[1] = sum;
      EXPECT_EQ(d.valid(), good) << sum;
    }
  }
}

// ---- Misuse throws, and changes nothing ----

TEST(RoutingStats, SizesThatDoNotFitThrow) {
  RoutingStats stats({4, 2, everything()});
  const std::vector<std::int64_t> four(4, 0), three(3, 0);
  const std::vector<std::uint8_t> mask(3, 1);
  const std::vector<float> floats(5, 1);
  const auto throws = [&](const RoutingBatch& batch) {
    EXPECT_THROW(stats.add(batch), std::invalid_argument);
  };
  throws({.experts = three});
  throws({.experts = four, .mask = mask});
  throws({.experts = four, .sequence_ids = three});
  throws({.experts = four, .domain_ids = three});
  throws({.experts = four, .top_values = floats});
  throws({.experts = four, .probabilities = floats});
  throws({.experts = four, .sequence_length = 3});
  throws({.experts = four, .sequence_length = -1});
  throws({.experts = four, .sequence_length = 1, .sequence_ids = std::span(four).first(2)});
  EXPECT_THROW(stats.add_counts(three, 1), std::invalid_argument);
  EXPECT_THROW(stats.add_grad_norms(std::vector<double>(3)), std::invalid_argument);
  EXPECT_THROW(stats += RoutingStats({4, 2, {}}), std::invalid_argument);
  EXPECT_THROW(stats.domain_counts(2), std::invalid_argument);
  EXPECT_THROW(RoutingStats().add({.experts = four}), std::invalid_argument);
  EXPECT_EQ(stats.invalid_records(), 0);
  EXPECT_THROW(RoutingStats({0, 1, {}}), std::invalid_argument);
  EXPECT_THROW(RoutingStats({4, 0, {}}), std::invalid_argument);
  EXPECT_THROW(RoutingStats({4, 5, {}}), std::invalid_argument);
  EXPECT_THROW(RoutingStats({4, 1, {.domains = -1}}), std::invalid_argument);
  RoutingStats full({2, 2, everything()});
  EXPECT_THROW(full.add({.experts = four, .top_values = std::vector<float>(6, 1)}), std::invalid_argument);
}

TEST(RoutingStats, AnEmptyBatchAddsNothing) {
  RoutingStats stats({4, 2, everything()});
  EXPECT_TRUE(stats.add({}));
  EXPECT_THAT(stats.flat(), ::testing::Each(0));
}

// ---- Sums have the same bits in whatever order and grouping they were formed ----

struct Data {
  std::vector<std::int64_t> experts, ids, domains;
  std::vector<std::uint8_t> mask;
  std::vector<float> values, rows;
};

Data random_data(int n, int k, std::size_t sequences, std::size_t length, std::mt19937_64& random) {
  Data data;
  const std::size_t tokens = sequences * length;
  std::vector<std::int64_t> order(static_cast<std::size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::uniform_real_distribution<float> uniform(0, 1);
  for (std::size_t t = 0; t < tokens; ++t) {
    std::shuffle(order.begin(), order.end(), random);
    data.experts.insert(data.experts.end(), order.begin(), order.begin() + k);
    data.ids.push_back(static_cast<std::int64_t>(t / length));
    data.domains.push_back(static_cast<std::int64_t>(random() % 2));
    data.mask.push_back(random() % 8 != 0);
    std::vector<float> values(static_cast<std::size_t>(k) + 1);
    for (auto& v : values) v = uniform(random);
    std::sort(values.rbegin(), values.rend());
    data.values.insert(data.values.end(), values.begin(), values.end());
    for (int i = 0; i < n; ++i) data.rows.push_back(uniform(random));
  }
  return data;
}

RoutingBatch batch_of(const Data& data, int n, int k, std::size_t from, std::size_t to) {
  const auto part = [&](const auto& all, std::size_t width) {
    return std::span(all).subspan(from * width, (to - from) * width);
  };
  const auto nn = static_cast<std::size_t>(n), kk = static_cast<std::size_t>(k);
  return {.experts = part(data.experts, kk),
          .mask = part(data.mask, 1),
          .sequence_ids = part(data.ids, 1),
          .top_values = part(data.values, kk + 1),
          .probabilities = part(data.rows, nn),
          .domain_ids = part(data.domains, 1),
          .dropped = static_cast<std::int64_t>(to - from)};
}

TEST(RoutingStats, AnyGroupingAndOrderGivesTheSameBits) {
  std::mt19937_64 random(7);
  for (const auto& [n, k] : {std::pair{2, 1}, {5, 2}, {16, 2}, {33, 4}}) {
    const std::size_t sequences = 24, length = 10;
    const Data data = random_data(n, k, sequences, length, random);
    RoutingStats whole({n, k, everything()});
    ASSERT_TRUE(whole.add(batch_of(data, n, k, 0, sequences * length)));
    for (int trial = 0; trial < 20; ++trial) {
      // Cut between sequences, deal the pieces to three ranks in random order, join the ranks in random
      // order.
      std::vector<std::size_t> cuts = {0, sequences};
      for (int i = 0; i < 5; ++i) cuts.push_back(random() % sequences);
      std::sort(cuts.begin(), cuts.end());
      std::vector<std::size_t> pieces(cuts.size() - 1);
      std::iota(pieces.begin(), pieces.end(), 0);
      std::shuffle(pieces.begin(), pieces.end(), random);
      std::vector<RoutingStats> ranks(3, RoutingStats({n, k, everything()}));
      for (const std::size_t p : pieces) {
        ASSERT_TRUE(ranks[random() % 3].add(batch_of(data, n, k, cuts[p] * length, cuts[p + 1] * length)));
      }
      std::shuffle(ranks.begin(), ranks.end(), random);
      RoutingStats sum = ranks[0];
      for (std::size_t i = 0; i < sum.flat().size(); ++i)
        sum.flat()[i] += ranks[1].flat()[i];  // as a collective does
      sum += ranks[2];
      EXPECT_THAT(sum.flat(), ElementsAreArray(whole.flat()));
    }
  }
}

TEST(RoutingStats, AgreesWithCountingTokenByToken) {
  std::mt19937_64 random(11);
  for (const auto& [n, k] : {std::pair{1, 1}, {3, 3}, {7, 2}, {16, 2}, {256, 8}, {1500, 3}}) {
    const std::size_t sequences = 6, length = 64;
    const Data data = random_data(n, k, sequences, length, random);
    std::vector<std::vector<std::int64_t>> by_sequence(
        sequences, std::vector<std::int64_t>(static_cast<std::size_t>(n), 0));
    for (std::size_t t = 0; t < sequences * length; ++t) {
      for (int j = 0; j < k; ++j) {
        by_sequence[t / length][static_cast<std::size_t>(
            data.experts[t * static_cast<std::size_t>(k) + static_cast<std::size_t>(j)])] += 1;
      }
    }
    RoutingStats stats({n, k, {.sequences = true}});
    ASSERT_TRUE(stats.add({.experts = data.experts, .sequence_length = static_cast<std::int64_t>(length)}));
    const std::int64_t each = static_cast<std::int64_t>(length) * k;
    for (std::size_t i = 0; i < static_cast<std::size_t>(n); ++i) {
      std::int64_t count = 0, square = 0;
      for (const auto& sequence : by_sequence) {
        count += sequence[i];
        square += sequence[i] * sequence[i];
      }
      ASSERT_EQ(stats.counts()[i], count);
      ASSERT_EQ(stats.array(RoutingStats::kSequenceSq)[i], square);
      ASSERT_EQ(stats.array(RoutingStats::kSequenceCross)[i], each * count);
    }
    RoutingStats plain({n, k, {}});
    ASSERT_TRUE(plain.add({.experts = data.experts}));
    EXPECT_THAT(plain.counts(), ElementsAreArray(stats.counts()));
  }
}

// However many experts there are, and however long the record: around the sizes at which it is counted in another way.
TEST(RoutingStats, LongAndShortRecordsAreCountedAlike) {
  std::mt19937_64 random(13);
  for (const int n : {1, 2, 3, 255, 256, 257, 1024, 1025, 1500, 2049}) {
    RoutingStats stats({n, 1, {}});
    std::vector<std::int64_t> expected(static_cast<std::size_t>(n), 0);
    const std::size_t lane = std::bit_ceil(static_cast<std::size_t>(n));
    for (const std::size_t tokens : {8 * lane + 3, std::size_t{5}, 8 * lane - 1, 8 * lane, std::size_t{1}}) {
      std::vector<std::int64_t> experts(tokens);
      for (auto& expert : experts) {
        expert = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n));
        ++expected[static_cast<std::size_t>(expert)];
      }
      ASSERT_TRUE(stats.add({.experts = experts}));
      EXPECT_THAT(stats.counts(), ElementsAreArray(expected)) << n << ' ' << tokens;
    }
  }
}

TEST(RoutingStats, ClearKeepsTheShape) {
  RoutingStats stats({3, 1, {}});
  ASSERT_TRUE(stats.add_counts(std::vector<std::int64_t>{1, 2, 3}, 6));
  stats.clear();
  EXPECT_EQ(stats.tokens(), 0);
  EXPECT_THAT(stats.counts(), ElementsAre(0, 0, 0));
}

TEST(RoutingStats, AddingAllocatesNothing) {
  std::mt19937_64 random(3);
  const Data data = random_data(16, 2, 8, 32, random);
  RoutingStats stats({16, 2, everything(8)}), other = stats;
  const std::vector<float> losses(256, -1.5F);
  const RoutingBatch batch = batch_of(data, 16, 2, 0, 256);
  const std::vector<double> values(16, 1.0);
  EXPECT_EQ(testing::allocations_of([&] {
              stats.add(batch);
              stats.add({.experts = data.experts, .sequence_length = 32});
              stats.add_counts(other.counts(), 0);
              stats.add_grad_norms(values);
              stats.add_token_losses({.experts = data.experts, .losses = losses, .domain_ids = data.domains});
              stats.add_expert_losses(values, other.counts());
              stats += other;
              stats.clear();
            }),
            0);
}

}  // namespace
}  // namespace moectl
