// The slope at the threshold: what a unit of bias does to an expert's load, from small gaps alone.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/simulation.h"
#include "moectl/stats.h"

namespace moectl {
namespace {

TEST(LoadSlope, ByHand) {
  RoutingStats stats({4, 1, {.gap = true}});
  stats.set_gap_width(0.125);
  const std::vector<std::int64_t> experts = {0, 0, 1, 1, 2, 2, 3, 3};
  // Gaps .0625, 1, .0625, .0625, .5, .5, .125 (not below the width), 1.
  const std::vector<float> top = {1, .9375F, 1, 0, 1, .9375F, 1, .9375F, 1, .5F, 1, .5F, 1, .875F, 1, 0};
  ASSERT_TRUE(stats.add({.experts = experts, .top_values = top}));
  std::vector<double> slope(4, -1);
  ASSERT_TRUE(stats.load_slope(slope));
  // 3 of 8 gaps are near: -ln(5/8)/(3/8) times N/(k T h) = 4 for each near token.
  const double each = -std::log(5.0 / 8) / (3.0 / 8) * 4;
  EXPECT_NEAR(slope[0], each, 1e-12);
  EXPECT_NEAR(slope[1], 2 * each, 1e-12);
  EXPECT_EQ(slope[2], 0);
  EXPECT_EQ(slope[3], 0);
}

TEST(LoadSlope, IsAbsentWithoutNearGaps) {
  RoutingStats stats({4, 1, {.gap = true}});
  std::vector<double> slope(4, -1);
  const std::vector<std::int64_t> experts = {0, 1};
  const std::vector<float> top = {1, .5F, 1, .5F};
  ASSERT_TRUE(stats.add({.experts = experts, .top_values = top}));
  EXPECT_FALSE(stats.load_slope(slope));
  EXPECT_NEAR(*stats.next_gap_width(), -std::log(0.8) * 0.5, 1e-12);
  ASSERT_TRUE(stats.add({.experts = experts}));  // tokens without gaps
  EXPECT_FALSE(stats.load_slope(slope));
  EXPECT_FALSE(stats.next_gap_width().has_value());
  EXPECT_THAT(slope, ::testing::Each(-1));
}

TEST(LoadSlope, SumsOfParts) {
  RoutingStats whole({4, 1, {.gap = true}}), part = whole, other = whole;
  for (RoutingStats* stats : {&whole, &part, &other}) stats->set_gap_width(0.3);
  const std::vector<std::int64_t> experts = {0, 1, 2, 3, 1, 1};
  const std::vector<float> top = {1, .9F, 1, .8F, 1, .1F, 1, .75F, 1, .5F, 1, .99F};
  const auto add = [&](RoutingStats& to, std::size_t from, std::size_t count) {
    ASSERT_TRUE(to.add({.experts = std::span(experts).subspan(from, count),
                        .top_values = std::span(top).subspan(2 * from, 2 * count)}));
  };
  add(whole, 0, 6);
  add(part, 0, 2);
  add(other, 2, 4);
  part += other;
  EXPECT_TRUE(std::ranges::equal(part.flat(), whole.flat()));
}

struct Router {
  SimulatedGate gate;
  ScoreSpace space;
  int experts, top_k;
  bool balanced;
};

void PrintTo(const Router& r, std::ostream* out) {
  *out << name_of(r.gate) << (r.space == ScoreSpace::kLogit ? " logits " : " ") << r.experts << '/' << r.top_k
       << (r.balanced ? " balanced" : "");
}

std::vector<Router> routers() {
  std::vector<Router> out;
  for (const bool balanced : {true, false}) {
    for (const auto& [experts, top_k] :
         {std::pair{8, 1}, {8, 6}, {16, 2}, {64, 1}, {64, 6}, {256, 8}, {256, 1}, {512, 8}}) {
      out.push_back({SimulatedGate::kSoftmax, ScoreSpace::kProbability, experts, top_k, balanced});
      out.push_back({SimulatedGate::kSigmoid, ScoreSpace::kProbability, experts, top_k, balanced});
      out.push_back({SimulatedGate::kSigmoid, ScoreSpace::kLogit, experts, top_k, balanced});
    }
  }
  return out;
}

class LoadSlopeOf : public ::testing::TestWithParam<Router> {};

// The truth: how many tokens an expert gains or loses if its bias alone moves by a small step, by all scores.
TEST_P(LoadSlopeOf, IsWithinAQuarterOfTheFiniteDifference) {
  const Router& router = GetParam();
  const auto n = static_cast<std::size_t>(router.experts), k = static_cast<std::size_t>(router.top_k);
  SimulatedRouter simulated({.experts = router.experts,
                             .top_k = router.top_k,
                             .tokens = 4096,
                             .gate = router.gate,
                             .score_space = router.space,
                             .seed = 90417,
                             .biased_scores = true});
  RoutingStats stats({router.experts, router.top_k, {.gap = true}});
  std::vector<double> bias(n, 0.0), slope(n, 0.0), found(n, 0.0), truth(n, 0.0), moved(n, 0.0);
  constexpr int kSettle = 40, kMeasured = 12;
  for (int step = 0; step < kSettle + kMeasured; ++step) {
    const RoutingBatch batch = simulated.route(bias);
    stats.clear();
    ASSERT_TRUE(stats.add(batch));
    const double mean_load = static_cast<double>(stats.assignments()) / static_cast<double>(n);
    const double gap = *stats.mean_gap() * router.top_k;
    const double width = *stats.next_gap_width();
    stats.set_gap_width(width);
    if (step < kSettle) {
      for (std::size_t i = 0; i < n && router.balanced; ++i) {
        bias[i] += .25 * gap * std::max(-1.0, 1 - static_cast<double>(stats.counts()[i]) / mean_load);
      }
      continue;
    }
    ASSERT_TRUE(stats.load_slope(slope));
    const double delta = width / 2;
    for (std::size_t i = 0; i < n; ++i) found[i] += slope[i] / kMeasured;
    const std::size_t tokens = batch.experts.size() / k;
    for (std::size_t t = 0; t < tokens; ++t) {
      const float* top = &batch.top_values[t * (k + 1)];
      for (std::size_t i = 0; i < n; ++i) {
        const float score = batch.biased_scores[t * n + i];
        const double distance = score >= top[k - 1] ? score - top[k] : top[k - 1] - score;
        if (distance >= delta) continue;
        truth[i] += 1 / (2 * delta * mean_load * kMeasured);
        moved[i] += 1;
      }
    }
  }
  double all_found = 0, all_truth = 0;
  std::vector<double> ratios;
  for (std::size_t i = 0; i < n; ++i) {
    all_found += found[i];
    all_truth += truth[i];
    if (moved[i] >= 20) ratios.push_back(found[i] / truth[i]);
  }
  EXPECT_NEAR(all_found / all_truth, 1, 0.25);
  ASSERT_FALSE(ratios.empty());
  std::sort(ratios.begin(), ratios.end());
  EXPECT_NEAR(ratios[ratios.size() / 2], 1, 0.25);
  RecordProperty("layer", std::to_string(all_found / all_truth));
  RecordProperty("median", std::to_string(ratios[ratios.size() / 2]));
}

INSTANTIATE_TEST_SUITE_P(Routers, LoadSlopeOf, ::testing::ValuesIn(routers()));

}  // namespace
}  // namespace moectl
