#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <mutex>
#include <numeric>
#include <span>
#include <thread>
#include <tuple>

#include "allocation_counter.h"
#include "moectl/simulation.h"
#include "policies/policy_rig.h"
#include "test_paths.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::random_stats;
using moectl::testing::RigOptions;

// Eight tokens choose one of two experts; v_0 - v_1 is given for each. With two experts the margin of one is
// half the difference, and minus that for the other.
RoutingStats tokens_with(const StatsShape& shape, std::span<const float> differences) {
  std::vector<std::int64_t> experts;
  std::vector<float> top, scores;
  for (const float d : differences) {
    experts.push_back(d > 0 ? 0 : 1);
    top.insert(top.end(), {std::max(d, 0.0F), std::min(d, 0.0F)});
    scores.insert(scores.end(), {d, 0.0F});
  }
  RoutingStats stats(shape);
  EXPECT_TRUE(stats.add({.experts = experts, .top_values = top, .biased_scores = scores}));
  return stats;
}

// Six tokens choose expert 0 and two expert 1; four are wanted for each.
// Histogram: margins of expert 0 are -d/2 = -.5 (four times), -1, -2; two too many, all in [-.75, -.5) of
// which the nearest two of four reach to -.5 - 2/4 · .25 = -.625. Expert 1 mirrors it: bins are closed at the
// end nearer to zero, so +.5 lies in [.5, .75): +.625.
const std::vector<float> kDifferences = {1, 1, 1, 1, 2, 4, -1, -1};

TEST(QuantileBias, HistogramStepByHand) {
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1, .options = {{"gain", 0.5}}});
  rig.step(tokens_with(rig.shape(), kDifferences));
  EXPECT_DOUBLE_EQ(rig.value[0], -0.3125);
  EXPECT_DOUBLE_EQ(rig.value[1], 0.3125);
}

// Exact: margins against the runner-up. Expert 0: v_(2) - v = -1 (four times), -2, -4, 0, 0: the fifth
// smallest of
// {-4, -2, -1, -1, -1, -1, 0, 0} is -1. Expert 1: {0 six times, -1, -1}: the fifth smallest is 0. Mean out:
// ∓.5.
TEST(QuantileBias, ExactStepByHand) {
  PolicyRig rig(
      "quantile_bias",
      RigOptions{.experts = 2, .top_k = 1, .options = {{"form", std::string("exact")}, {"gain", 1.0}}});
  rig.step(tokens_with(rig.shape(), kDifferences));
  EXPECT_DOUBLE_EQ(rig.value[0], -0.5);
  EXPECT_DOUBLE_EQ(rig.value[1], 0.5);
}

// Of 49 tokens a 49th is one, though 49 · (1/49.) is less in doubles: the second smallest margin counts. With v_0 - v_1
// = d the margins of expert 0 are -d, and 0 where it is runner-up.
TEST(QuantileBias, ExactLosesNoTokenToRounding) {
  ASSERT_LT(1 / 49. * 49, 1);
  std::vector<float> differences(49, -1);
  for (int t = 0; t < 4; ++t) differences[static_cast<std::size_t>(t)] = static_cast<float>(t + 1);
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2,
                                            .top_k = 1,
                                            .options = {{"form", std::string("exact")}, {"gain", 1.0}},
                                            .targets = {1 / 49., 48 / 49.}});
  rig.step(tokens_with(rig.shape(), differences));
  EXPECT_DOUBLE_EQ(rig.value[0] - rig.value[1], -3);
}

// An expert that no token can choose goes no farther than the histogram would send it.
TEST(QuantileBias, ExactMovesNoFartherThanTheHistogram) {
  const RigOptions options{
      .experts = 3, .top_k = 1, .options = {{"form", std::string("exact")}, {"gain", 1.0}}};
  PolicyRig rig("quantile_bias", options);
  RoutingStats stats = moectl::testing::stats_of(rig.shape(), {2, 2, 0});
  const float far = 1e30F;
  stats.set_margin_rows({-1, 0, far, -1, 0, far, 0, -1, far, 0, -1, far});
  stats.set_scalar(RoutingStats::kMarginTokens, 4);
  rig.step(stats);
  EXPECT_DOUBLE_EQ(rig.value[2] - rig.value[0], margin_edge(kMarginBins / 2) + 1);  // expert 0 goes by -1
}

// Decisions without margins are decisions: the biases in force at them are kept, too. With a delay of one the third
// decision's margins were formed under the second's biases, which were moved by hand.
TEST(QuantileBias, CountsDecisionsWithoutMargins) {
  PolicyRig rig(
      "quantile_bias",
      RigOptions{
          .experts = 2, .top_k = 1, .delay = 1, .options = {{"form", std::string("exact")}, {"gain", 1.0}}});
  RoutingStats nothing(rig.shape());
  nothing.add_counts(std::vector<std::int64_t>{4, 4}, 8);
  rig.step(nothing);
  rig.value = {3, -3};
  rig.step(nothing);
  EXPECT_THAT(rig.value, ::testing::ElementsAre(3, -3));
  rig.value = {0, 0};
  rig.step(tokens_with(rig.shape(), kDifferences));  // q = (-1, 0), from (3, -3)
  EXPECT_THAT(rig.value, ::testing::ElementsAre(2.5, -2.5));
}

// Two tokens in eight are wanted for expert 0 and it has them: no move, though a half would be too few.
TEST(QuantileBias, RestsWhenTheLoadMeetsItsTarget) {
  for (const char* form : {"histogram", "exact"}) {
    PolicyRig rig(
        "quantile_bias",
        RigOptions{
            .experts = 2, .top_k = 1, .options = {{"form", std::string(form)}}, .targets = {0.75, 0.25}});
    rig.step(tokens_with(rig.shape(), kDifferences));
    EXPECT_EQ(rig.value[0], 0) << form;
    EXPECT_EQ(rig.value[1], 0) << form;
  }
}

TEST(QuantileBias, HoldsWithoutMargins) {
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1});
  RoutingStats stats(rig.shape());
  const std::vector<std::int64_t> counts = {30, 10};
  ASSERT_TRUE(stats.add_counts(counts, 40));
  rig.value = {0.5, -0.25};
  rig.step(stats);
  EXPECT_THAT(rig.value, ::testing::ElementsAre(0.5, -0.25));
}

// One decision late: the second window was still routed under the first biases (0), so what it asks for is
// the same place, of which half is there already.
TEST(QuantileBias, CountsFromTheBiasesAtRouting) {
  PolicyRig rig("quantile_bias",
                RigOptions{.experts = 2, .top_k = 1, .delay = 1, .options = {{"gain", 0.5}}});
  rig.step(tokens_with(rig.shape(), kDifferences));
  EXPECT_DOUBLE_EQ(rig.value[0], -0.3125);
  rig.step(tokens_with(rig.shape(), kDifferences));
  EXPECT_DOUBLE_EQ(rig.value[0], -0.3125 - 0.5 * (0.625 - 0.3125));
}

// One full step of either form balances the very batch it was computed from when only two experts compete.
TEST(QuantileBias, AFullStepBalancesTheBatch) {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal(0.7F, 1);
  std::vector<float> differences(400);
  for (float& d : differences) d = normal(random);
  for (const char* form : {"histogram", "exact"}) {
    PolicyRig rig(
        "quantile_bias",
        RigOptions{.experts = 2, .top_k = 1, .options = {{"form", std::string(form)}, {"gain", 1.0}}});
    for (int i = 0; i < 8; ++i) {
      std::vector<float> biased = differences;
      for (float& d : biased) d += static_cast<float>(rig.value[0] - rig.value[1]);
      rig.step(tokens_with(rig.shape(), biased));
    }
    const auto chosen = std::count_if(differences.begin(), differences.end(), [&](float d) {
      return d + static_cast<float>(rig.value[0] - rig.value[1]) > 0;
    });
    EXPECT_NEAR(static_cast<double>(chosen), 200, 1) << form;
  }
}

TEST(QuantileBias, ExactIsSavedPermutedAndDoesNotAllocate) {
  const RigOptions options{.delay = 2, .options = {{"form", std::string("exact")}}};
  PolicyRig a("quantile_bias", options), b("quantile_bias", options);
  std::vector<RoutingStats> windows;
  for (std::uint64_t seed = 0; seed < 20; ++seed) windows.push_back(random_stats(a.shape(), 256, seed));
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

ControllerConfig config_of(const char* form) {
  ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/quantile_bias.yaml");
  config.model.layers = 1;
  config.expert_bias.options.set("form", std::string(form));
  return config;
}

// One step of two ranks in two threads: the sum is taken once both have given their share.
void two_ranks_step(Controller& first, Controller& second) {
  std::vector<std::int64_t> sum;
  std::barrier all(2);
  std::mutex mutex;
  const Reduction reduction = [&](std::span<std::int64_t> share) {
    {
      const std::lock_guard lock(mutex);
      sum.resize(share.size(), 0);
      for (std::size_t i = 0; i < share.size(); ++i) sum[i] += share[i];
    }
    all.arrive_and_wait();
    std::copy(sum.begin(), sum.end(), share.begin());
    all.arrive_and_wait();
    if (const std::lock_guard lock(mutex); !sum.empty()) sum.clear();
    all.arrive_and_wait();
  };
  first.set_reduction(reduction);
  second.set_reduction(reduction);
  std::thread other([&] { second.step(); });
  first.step();
  other.join();
}

// On the plant: settled and near the noise floor, before and after a domain switches on. The exact form raises biases
// by centring only and so goes half as far at a decision: with the histogram's gain it trails the forming router, with
// twice that it does not.
TEST(QuantileBias, StaysNearTheNoiseFloor) {
  for (const auto& [form, gain, bound] :
       {std::tuple{"histogram", 0.3, 1.3}, std::tuple{"exact", 0.3, 1.45}, std::tuple{"exact", 0.6, 1.3}}) {
    ControllerConfig config = config_of(form);
    config.expert_bias.options.set("gain", gain);
    Controller controller(config);
    SimulationOptions plant = simulation_options(config);
    plant.scenario = Scenario::kShift;
    plant.event_step = 150;
    double before = 0, after = 0;
    simulate(controller, plant, 300, [&](const StepReport& report) {
      const Metrics& m = *report.layers[0].metrics;
      const double ratio = *m.max_vio / *m.noise_floor_max_vio;
      if (report.step >= 50 && report.step < 150) before += ratio / 100;
      if (report.step >= 200) after += ratio / 100;
    });
    EXPECT_LT(before, bound) << form << " " << gain;
    EXPECT_LT(after, bound) << form << " " << gain;
  }
}

// Two ranks with half of each batch decide what one process with all of it decides, to the bit: histograms add.
TEST(QuantileBias, HistogramsOfTwoRanksAreThatOfAll) {
  const ControllerConfig config = config_of("histogram");
  SimulationOptions plant = simulation_options(config);
  plant.tokens = 128;
  plant.biased_scores = true;
  Controller alone(config), first(config), second(config);
  SimulatedRouter router(plant);
  for (int step = 0; step < 10; ++step) {
    const RoutingBatch batch = router.route(alone.bias(0));
    const auto half = [&](std::size_t which) {
      const auto part = [&](auto all) { return all.subspan(which * all.size() / 2, all.size() / 2); };
      return RoutingBatch{.experts = part(batch.experts),
                          .top_values = part(batch.top_values),
                          .biased_scores = part(batch.biased_scores)};
    };
    alone.record(0, half(0));
    alone.record(0, half(1));
    alone.step();
    first.record(0, half(0));
    second.record(0, half(1));
    two_ranks_step(first, second);
    ASSERT_THAT(first.bias(0), ::testing::ElementsAreArray(alone.bias(0))) << step;
    ASSERT_THAT(second.bias(0), ::testing::ElementsAreArray(alone.bias(0))) << step;
  }
  EXPECT_NE(alone.bias(0)[0], 0);
}

// What was recorded and not yet decided on is part of the state, margins included.
TEST(QuantileBias, ExactResumesWithARecordInHand) {
  const ControllerConfig config = config_of("exact");
  Controller a(config), b(config);
  SimulationOptions plant = simulation_options(config);
  plant.tokens = 64;
  plant.biased_scores = true;
  SimulatedRouter router(plant);
  for (int i = 0; i < 5; ++i) {
    a.record(0, router.route(a.bias(0)));
    a.step();
  }
  a.record(0, router.route(a.bias(0)));
  b.load(a.save());
  EXPECT_EQ(a.save(), b.save());
  a.step();
  b.step();
  EXPECT_THAT(b.bias(0), ::testing::ElementsAreArray(a.bias(0)));
  EXPECT_NE(b.bias(0)[0], 0);
  EXPECT_THROW(a.set_reduction([](std::span<std::int64_t>) {}), std::invalid_argument);
}

// No token chooses expert 2 and none is wanted of it: its smallest margin, 3, is not a way to go.
TEST(QuantileBias, ExpertsWithTargetZeroDoNotRise) {
  for (const char* form : {"histogram", "exact"}) {
    PolicyRig rig("quantile_bias", RigOptions{.experts = 3,
                                              .top_k = 1,
                                              .options = {{"form", std::string(form)}, {"gain", 1.0}},
                                              .targets = {0.5, 0.5, 0}});
    const std::vector<std::int64_t> experts = {0, 0, 1, 1};
    const std::vector<float> scores = {9, 5, 2, 8, 5, 2, 5, 8, 2, 5, 9, 2};
    const std::vector<float> top = {9, 5, 8, 5, 8, 5, 9, 5};
    RoutingStats stats(rig.shape());
    ASSERT_TRUE(stats.add({.experts = experts, .top_values = top, .biased_scores = scores}));
    rig.step(stats);
    EXPECT_EQ(rig.value[2], 0) << form;
  }
}

}  // namespace
}  // namespace moectl
