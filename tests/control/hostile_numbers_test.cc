// Numbers at the ends of their types: in configs, in what a step reports, in what a collective returns.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "measure/offence.h"
#include "moectl/controller.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
const std::string kModel = "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\n";

void record(Controller& controller) {
  controller.record_with(0, [](RoutingStats& sums) {
    sums.add_counts(std::vector<std::int64_t>{8, 4, 2, 2}, 8);
  });
}

// Steps are added to steps: none may be so many that a sum turns negative, which once meant no cooldown at all.
TEST(HostileNumbers, NoKeyOfStepsReachesAnOverflow) {
  for (const std::string key :
       {"safety: {rollback: {cooldown: N}}", "safety: {rollback: {within: N}}", "safety: {fallback_after: N}",
        "expert_bias: {limits: {cooldown: N}}", "expert_bias: {limits: {cadence: N}}",
        "expert_bias: {limits: {warmup: N}}", "guard: {dwell: N}", "guard: {cooldown: N}",
        "guard: {patience: N}", "health: {alerts: [{metric: max_vio, above: 1, after: N}]}",
        "health: {phases: [{name: a, until: N}, {name: b}]}", "log: {every: N}",
        "log: {rotate_mb: 1, keep: N}"}) {
    std::string text = kModel + key + '\n';
    const std::size_t at = text.find('N', kModel.size());
    text.replace(at, 1, std::to_string(kMost));
    EXPECT_THAT([&] { parse_config(text); }, ThrowsMessage<ConfigError>(HasSubstr(": must be at most 1e12")))
        << key;
  }
}

TEST(HostileNumbers, TheLongestCooldownIsOne) {
  Controller controller(parse_config(kModel +
                                     "expert_bias: {policy: sign_bias, limits: {rate: 0.1}}\n"
                                     "safety: {rollback: {cooldown: 1000000000000, loss_jump: 0.5}}\n"));
  for (int step = 0; step < 40; ++step) {
    record(controller);
    controller.step({.loss = step == 20 ? 9.0 : 2.0});
    const LimitReport& why = controller.report().layers[0].actuators[0].reasons;
    EXPECT_EQ(why.has(Reason::kRollback), step == 20) << step;
    EXPECT_EQ(why.has(Reason::kCooldown), step > 20) << step;
  }
}

// A loss that no average can hold counts as absent: averages stay numbers, which a state can carry.
TEST(HostileNumbers, LossesAtTheEndsOfADoubleMakeAStateThatLoads) {
  const ControllerConfig config =
      parse_config(kModel + "expert_bias: {policy: adaptive_bias}\nsafety: {rollback: {}}\nhealth: {}\n");
  Controller controller(config);
  for (const double loss : {2.0, -1.7e308, 1.7e308, -1.7e308, 1.7e308, 2.0}) {
    record(controller);
    controller.step({.loss = loss, .gradient_norm = -loss});
  }
  Controller other(config);
  EXPECT_NO_THROW(other.load(controller.save()));
  EXPECT_EQ(other.save(), controller.save());
}

// A collective that returns nonsense: the layer holds, and the notice says why.
TEST(HostileNumbers, CountsAboveTheChoicesOfAllTokensAreInvalid) {
  for (const int lag : {0, 1}) {
    for (const std::int64_t wrong : {kMost, std::int64_t{1} << 61, std::int64_t{17}}) {
      Controller controller(
          parse_config(kModel + "lag: " + std::to_string(lag) + "\nexpert_bias: {policy: sign_bias}\n"));
      bool broken = false;
      controller.set_reduction([&](std::span<std::int64_t> payload) {
        // The counts stand where four numbers are those that were recorded.
        for (std::size_t i = 0; broken && i + 3 < payload.size(); ++i) {
          if (payload[i] == 8 && payload[i + 1] == 4 && payload[i + 2] == 2 && payload[i + 3] == 2)
            payload[i] = wrong;
        }
      });
      record(controller);
      controller.step();
      broken = true;
      record(controller);
      controller.step();
      broken = false;
      if (lag == 1) {
        record(controller);
        controller.step();
      }
      const StepReport& report = controller.report();
      EXPECT_TRUE(report.layers[0].actuators[0].reasons.has(Reason::kInvalid)) << wrong << ' ' << lag;
      ASSERT_EQ(report.notices.size(), 1U);
      EXPECT_THAT(std::string(report.notices[0].text), HasSubstr("counts: ")) << wrong;
    }
  }
}

StatsNeeds all_sums() {
  StatsNeeds needs{
      .gap = true, .sequences = true, .probabilities = true, .margins = true, .pairs = true, .domains = 2};
  needs.required_bins = true;
  return needs;
}

/// Eight tokens of four experts, with everything that a router can report of them.
RoutingStats eight_tokens() {
  RoutingStats stats({4, 2, all_sums()});
  std::vector<std::int64_t> experts, domains;
  std::vector<float> top, scores, probabilities;
  for (std::int64_t t = 0; t < 8; ++t) {
    experts.insert(experts.end(), {t % 4, (t + 1) % 4});
    domains.push_back(t % 2);
    top.insert(top.end(), {3, 2, 1.5F});
    for (std::int64_t i = 0; i < 4; ++i) {
      scores.push_back(i == t % 4 ? 3.F : i == (t + 1) % 4 ? 2.F : 1.5F);
      probabilities.push_back(0.25F);
    }
  }
  stats.set_gap_width(1);
  EXPECT_TRUE(stats.add({.experts = experts,
                         .sequence_length = 4,
                         .top_values = top,
                         .biased_scores = scores,
                         .probabilities = probabilities,
                         .domain_ids = domains,
                         .dropped = 1}));
  return stats;
}

// Each sum that is part of another is compared with it, and the message names both.
TEST(HostileNumbers, NoPartIsMoreThanItsWhole) {
  using S = RoutingStats;
  ASSERT_TRUE(eight_tokens().valid());
  const auto refused = [](const std::function<void(S&)>& change, const std::string& words) {
    S stats = eight_tokens();
    change(stats);
    EXPECT_FALSE(stats.valid()) << words;
    EXPECT_EQ(first_offence(stats).words(), words);
  };
  const auto scalar = [&](S::Scalar which, std::int64_t value, const std::string& words) {
    refused([=](S& stats) { stats.set_scalar(which, value); }, words);
  };
  scalar(S::kGapTokens, 9, "gap_tokens: must be at most tokens (8)");
  scalar(S::kSequenceTokens, 9, "sequence_tokens: must be at most tokens (8)");
  scalar(S::kBeyondSplit, kMost, "beyond_split: must be at most tokens (8)");
  scalar(S::kProbTokens, 9, "prob_tokens: must be at most tokens (8)");
  scalar(S::kDropTokens, kMost, "drop_tokens: must be at most tokens (8)");
  scalar(S::kDomainTokens, 9, "domain_tokens: must be at most tokens (8)");
  scalar(S::kMarginTokens, 9, "margin_tokens: must be at most tokens (8)");
  scalar(S::kPairTokens, 9, "pair_tokens: must be at most tokens (8)");
  scalar(S::kChoicesSq, 33, "choices_sq: must be at most the assignments * top_k (32)");
  scalar(S::kDropped, 17, "dropped: must be at most the assignments (16)");
  scalar(S::kTokenEntropySum, std::int64_t{13} << 24,
         "token_entropy_sum: must be at most ln(experts) for each token (12)");
  const auto element = [&](S::Array which, std::size_t at, std::int64_t value, const std::string& words) {
    refused([=](S& stats) { stats.mutable_array(which)[at] = value; }, words);
  };
  element(S::kGapNear, 2, 5, "gap_near of expert 2: must be at most the count (4)");
  element(S::kGapNear, 2, 3, "gap_near: the sum: must be at most gap_tokens (8)");
  scalar(S::kSequences, 9, "sequences: must be at most tokens (8)");
  element(S::kSequenceCross, 1, kMost, "sequence_cross: the sum: must be at most sequence_len_sq (128)");
  element(S::kSequenceCross, 1, 0, "sequence_len_sq: must be at most the sum of sequence_cross (96)");
  element(S::kSequenceSq, 1, kMost, "sequence_sq of expert 1: must be at most sequence_cross (32)");
  element(S::kDomainCounts, 5, 3,
          "domain_counts: the sum over domains of expert 1: must be at most the count (4)");
  element(S::kDomainCounts, 1, kMost,
          "domain_counts: the sum over domains of expert 1: must be at most the count (4)");
  element(S::kMargins, 3 * kMarginBins, kMost, "margins: the sum of expert 3: must be at most tokens (8)");
  element(S::kPairs, 1, 9, "pairs: the sum: must be at most pair_tokens * top_k (top_k - 1)/2 (8)");
  element(S::kRequiredBins, kRequiredWords, std::int64_t{9} << 32,
          "required_bins: the sum of expert 1: must be at most tokens (8)");
}

// Sums of any honest batches fit together: with padding, empty slots, an expert chosen twice, and over steps and ranks.
TEST(HostileNumbers, SumsOfWhatWasRoutedFitTogether) {
  std::mt19937_64 random(20261130);
  const auto below = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n); };
  const auto score = [&] { return static_cast<float>(below(1 << 20)) / (1 << 10); };
  RoutingStats over_steps({6, 3, all_sums()});
  for (int batch = 0; batch < 2000; ++batch) {
    const std::size_t tokens = 1 + static_cast<std::size_t>(below(40));
    std::vector<std::int64_t> experts, domains, sequences;
    std::vector<std::uint8_t> mask;
    std::vector<float> top, scores, probabilities;
    for (std::size_t t = 0; t < tokens; ++t) {
      sequences.push_back(t == 0 ? 0 : sequences.back() + (below(4) == 0 ? 1 : 0));
      const std::int64_t slots = below(4);
      for (std::int64_t j = 0; j < 3; ++j) experts.push_back(j < slots ? below(6) : -1);
      domains.push_back(below(2));
      mask.push_back(below(8) == 0 ? 0 : 1);
      const float start = score();
      for (int j = 0; j < 4; ++j) top.push_back(start - static_cast<float>(j) * score());
      std::sort(top.end() - 4, top.end(), std::greater<>());
      for (int i = 0; i < 6; ++i) scores.push_back(score());
      for (int i = 0; i < 6; ++i) probabilities.push_back(1 + score());
    }
    RoutingStats stats({6, 3, all_sums()});
    stats.set_gap_width(static_cast<double>(score()));
    RoutingBatch given{.experts = experts, .mask = mask};
    if (below(2)) given.domain_ids = domains;
    if (below(2)) given.sequence_ids = sequences;
    if (below(2)) given.top_values = top;
    if (!given.top_values.empty() && below(2)) given.biased_scores = scores;
    if (below(2)) given.probabilities = probabilities;
    ASSERT_TRUE(stats.add(given)) << stats.offence().words();
    ASSERT_TRUE(stats.valid()) << first_offence(stats).words();
    if (below(50) == 0) stats.drop_required();
    over_steps += stats;
    ASSERT_TRUE(over_steps.valid()) << first_offence(over_steps).words();
  }
}

TEST(HostileNumbers, ASumOverMoreRanksThanThereAreIsAnError) {
  for (const std::int64_t ranks : {std::int64_t{0}, std::int64_t{-1}, kMost, (std::int64_t{1} << 20) + 1}) {
    Controller controller(parse_config(kModel + "expert_bias: {policy: sign_bias}\n"));
    int calls = 0;
    std::vector<std::int64_t> before;
    controller.set_reduction([&](std::span<std::int64_t> payload) {
      if (++calls == 1) return;  // the comparison of configs
      for (std::size_t i = payload.size() - 16; i < payload.size(); ++i) {
        if (payload[i] == 1) {  // the first word behind the sums: this rank
          payload[i] = ranks;
          return;
        }
      }
    });
    record(controller);
    EXPECT_THROW(controller.step(), ReductionError) << ranks;
  }
}

}  // namespace
}  // namespace moectl
