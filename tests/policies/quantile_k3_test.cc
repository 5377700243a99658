// `quantile_bias` with `form: k3` against a second implementation, written from the published rule: for every token the
// (k+1)-th largest biased score less the unbiased scores, sorted, and the rule of the histogram applied to the sorted
// values. All inputs are multiples of 2^-12, so that both see the same numbers to the bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "allocation_counter.h"
#include "moectl/figures.h"
#include "moectl/simulation.h"
#include "policies/policy_rig.h"
#include "simulated_loop.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::random_stats;
using moectl::testing::RigOptions;

const std::map<std::string, OptionValue> kK3 = {{"form", std::string("k3")}, {"gain", 1.0}};

struct Batch {
  std::size_t experts, top_k, tokens;
  std::vector<double> scores;  // unbiased [tokens × experts]
};

Batch random_batch(std::size_t experts, std::size_t top_k, std::size_t tokens, std::uint64_t seed) {
  Batch batch{experts, top_k, tokens, {}};
  std::mt19937_64 random(seed);
  for (std::size_t i = 0; i < tokens * experts; ++i)
    batch.scores.push_back(std::ldexp(static_cast<double>(random() % 4097), -12));
  return batch;
}

std::vector<double> random_biases(std::size_t experts, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> biases;
  for (std::size_t i = 0; i < experts; ++i)
    biases.push_back(std::ldexp(static_cast<double>(random() % 8192) - 4096, -12));
  return biases;
}

RoutingStats routed(const StatsShape& shape, const Batch& batch, const std::vector<double>& bias) {
  std::vector<std::int64_t> experts;
  std::vector<float> top, biased;
  for (std::size_t t = 0; t < batch.tokens; ++t) {
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t i = 0; i < batch.experts; ++i) {
      const double v = batch.scores[t * batch.experts + i] + bias[i];
      biased.push_back(static_cast<float>(v));
      order.emplace_back(-v, i);
    }
    std::sort(order.begin(), order.end());
    for (std::size_t j = 0; j < batch.top_k; ++j)
      experts.push_back(static_cast<std::int64_t>(order[j].second));
    for (std::size_t j = 0; j <= batch.top_k; ++j) top.push_back(static_cast<float>(-order[j].first));
  }
  RoutingStats stats(shape);
  EXPECT_TRUE(stats.add({.experts = experts, .top_values = top, .biased_scores = biased}));
  return stats;
}

std::vector<double> published(const Batch& batch, const std::vector<double>& bias,
                              const std::vector<double>& targets) {
  const double low = *std::min_element(bias.begin(), bias.end()) - 1;
  const double range = *std::max_element(bias.begin(), bias.end()) + 1 - low;
  std::vector<double> cutoffs;
  for (std::size_t t = 0; t < batch.tokens; ++t) {
    std::vector<double> biased;
    for (std::size_t i = 0; i < batch.experts; ++i)
      biased.push_back(batch.scores[t * batch.experts + i] + bias[i]);
    std::sort(biased.begin(), biased.end(), std::greater<>());
    cutoffs.push_back(biased[batch.top_k]);
  }
  std::vector<double> next;
  for (std::size_t i = 0; i < batch.experts; ++i) {
    std::vector<double> bins;  // of all tokens, in rising order
    for (std::size_t t = 0; t < batch.tokens; ++t) {
      const double required = cutoffs[t] - batch.scores[t * batch.experts + i];
      bins.push_back(std::clamp(std::floor((required - low) / range * 1000), 0.0, 999.0));
    }
    std::sort(bins.begin(), bins.end());
    const double wanted = targets[i] * static_cast<double>(batch.tokens * batch.top_k);
    const double bin = bins[static_cast<std::size_t>(std::ceil(wanted)) - 1];
    const auto [first, last] = std::equal_range(bins.begin(), bins.end(), bin);
    const double part =
        (wanted - static_cast<double>(first - bins.begin())) / static_cast<double>(last - first);
    next.push_back(low + (bin + part) * (range / 1000));
  }
  return next;
}

// Differences between experts, because the mean is taken out of one and not of the other.
TEST(QuantileK3, AgreesWithASecondImplementation) {
  struct Shape {
    int experts, top_k;
    std::size_t tokens;
  };
  for (const auto& [experts, top_k, tokens] : {Shape{8, 2, 64}, Shape{16, 2, 1000}, Shape{7, 3, 101}}) {
    const auto n = static_cast<std::size_t>(experts);
    for (std::uint64_t seed = 1; seed <= 10; ++seed) {
      PolicyRig rig("quantile_bias", RigOptions{.experts = experts, .top_k = top_k, .options = kK3});
      const Batch batch = random_batch(n, static_cast<std::size_t>(top_k), tokens, seed);
      rig.value = random_biases(n, 100 + seed);
      const std::vector<double> wanted = published(batch, rig.value, rig.targets);
      const std::vector<double> got = rig.step(routed(rig.shape(), batch, rig.value));
      double mean = 0;
      for (const double b : wanted) mean += b / static_cast<double>(n);
      // The mean alone is a sum, whose order is not part of the rule.
      for (std::size_t i = 0; i < n; ++i)
        ASSERT_NEAR(got[i], wanted[i] - mean, 1e-15) << experts << ' ' << seed;
    }
  }
}

// Eight tokens, two experts, one each. Token t's score for expert 1 is 0, for expert 0 t/8 - 1/4: with biases of 0 the
// cutoff is the smaller of the two, and expert 0 requires min(s, 0) - s = -max(s, 0): -5/8 … 0, and 0 three times. The
// fourth smallest is -2/8. Range [-1, 1], bins of .002: it fills bin ⌊.75 · 500⌋ = 375, and its upper edge is taken.
// Expert 1 requires min(s, 0): -2/8, -1/8, then 0 six times; four are reached by two of the six in bin 500.
TEST(QuantileK3, StepByHand) {
  Batch batch{2, 1, 8, {}};
  for (int t = 0; t < 8; ++t) batch.scores.insert(batch.scores.end(), {t / 8.0 - 0.25, 0.0});
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1, .options = kK3});
  rig.step(routed(rig.shape(), batch, {0, 0}));
  const double first = -1 + 376 * 0.002, second = -1 + (500 + 2 / 6.0) * 0.002;
  EXPECT_NEAR(rig.value[0], (first - second) / 2, 1e-15);
  EXPECT_NEAR(rig.value[1], (second - first) / 2, 1e-15);
}

// One decision late: the second window was routed under the first biases, and what it requires does not depend on those
// in force now.
TEST(QuantileK3, CountsFromTheBiasesAtRouting) {
  PolicyRig rig("quantile_bias", RigOptions{.experts = 8, .top_k = 2, .delay = 1, .options = kK3});
  const Batch batch = random_batch(8, 2, 256, 5);
  const std::vector<double> zero(8, 0.0);
  const std::vector<double> first = rig.step(routed(rig.shape(), batch, zero));
  EXPECT_EQ(rig.step(routed(rig.shape(), batch, zero)), first);
}

TEST(QuantileK3, HoldsWithoutMargins) {
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1, .options = kK3});
  RoutingStats stats(rig.shape());
  stats.add_counts(std::vector<std::int64_t>{30, 10}, 40);
  rig.value = {0.5, -0.25};
  rig.step(stats);
  EXPECT_EQ(rig.value, (std::vector<double>{0.5, -0.25}));
}

TEST(QuantileK3, IsSavedAndDoesNotAllocate) {
  const RigOptions options{.delay = 2, .options = kK3};
  PolicyRig a("quantile_bias", options), b("quantile_bias", options);
  std::vector<RoutingStats> windows;
  for (std::uint64_t seed = 0; seed < 10; ++seed) windows.push_back(random_stats(a.shape(), 256, seed));
  for (const RoutingStats& stats : windows) a.step(stats);
  b.load(a.save());
  b.value = a.value;
  b.now = a.now;
  EXPECT_EQ(moectl::testing::allocations_of([&] {
              for (const RoutingStats& stats : windows) a.step(stats);
            }),
            0);
  for (const RoutingStats& stats : windows) b.step(stats);
  EXPECT_EQ(a.value, b.value);
}

TEST(QuantileK3, SettlesInFewStepsAndKeepsTheNoiseOfOneBatch) {
  SimulationOptions plant;
  ControllerConfig config = config_for(plant, "quantile_bias", kK3, 16, 32);
  config.safety.responsiveness = false;
  Controller controller(config);
  std::vector<StepFigures> steps;
  simulate(controller, plant, 200, [&](const StepReport& report) { steps.push_back(figures_of(report)); });
  const Figures figures = compute_figures(steps);
  EXPECT_GT(*figures.max_vio_over_floor, 1.1);
  EXPECT_LT(*figures.max_vio_over_floor, 1.6);
  double first = 0;
  for (std::size_t step = 4; step < 14; ++step)
    first += *steps[step].max_vio / *steps[step].floor_max_vio / 10;
  EXPECT_LT(first, 1.7);
}

std::string refusal(const RigOptions& options) {
  try {
    PolicyRig rig("quantile_bias", options);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(QuantileK3, RefusesWhatItsBinsCannotHold) {
  EXPECT_EQ(refusal({.score_space = ScoreSpace::kLogit, .options = kK3}),
            "quantile_bias: form: k3: bins scores within [0, 1], and logits are not (model.score_space: "
            "probability, or "
            "form: histogram)");
  EXPECT_EQ(refusal({.options = {{"form", std::string("k3")}}}),
            "quantile_bias: gain: must be 1 with form: k3, which replaces the bias");
}

}  // namespace
}  // namespace moectl
