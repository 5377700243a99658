#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <mutex>
#include <numeric>
#include <span>
#include <thread>

#include "moectl/simulation.h"
#include "policies/policy_rig.h"
#include "test_paths.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
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

// Decisions without margins are decisions: the biases in force at them are kept, too. With a delay of one the third
// decision's margins were formed under the second's biases, which were moved by hand.
TEST(QuantileBias, CountsDecisionsWithoutMargins) {
  PolicyRig rig("quantile_bias",
                RigOptions{.experts = 2, .top_k = 1, .delay = 1, .options = {{"gain", 1.0}}});
  RoutingStats nothing(rig.shape());
  nothing.add_counts(std::vector<std::int64_t>{4, 4}, 8);
  rig.step(nothing);
  rig.value = {3, -3};
  rig.step(nothing);
  EXPECT_THAT(rig.value, ::testing::ElementsAre(3, -3));
  rig.value = {0, 0};
  rig.step(tokens_with(rig.shape(), kDifferences));  // q = ∓.625, from (3, -3)
  EXPECT_THAT(rig.value, ::testing::ElementsAre(2.375, -2.375));
}

// Two tokens in eight are wanted for expert 0 and it has them: no move, though a half would be too few.
TEST(QuantileBias, RestsWhenTheLoadMeetsItsTarget) {
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1, .targets = {0.75, 0.25}});
  rig.step(tokens_with(rig.shape(), kDifferences));
  EXPECT_EQ(rig.value[0], 0);
  EXPECT_EQ(rig.value[1], 0);
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

// One full step balances the very batch it was computed from when only two experts compete.
TEST(QuantileBias, AFullStepBalancesTheBatch) {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal(0.7F, 1);
  std::vector<float> differences(400);
  for (float& d : differences) d = normal(random);
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1, .options = {{"gain", 1.0}}});
  for (int i = 0; i < 8; ++i) {
    std::vector<float> biased = differences;
    for (float& d : biased) d += static_cast<float>(rig.value[0] - rig.value[1]);
    rig.step(tokens_with(rig.shape(), biased));
  }
  const auto chosen = std::count_if(differences.begin(), differences.end(), [&](float d) {
    return d + static_cast<float>(rig.value[0] - rig.value[1]) > 0;
  });
  EXPECT_NEAR(static_cast<double>(chosen), 200, 1);
}

ControllerConfig config_of() {
  ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/quantile_bias.yaml");
  config.model.layers = 1;
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

// On the plant: settled and near the noise floor, before and after a domain switches on.
TEST(QuantileBias, StaysNearTheNoiseFloor) {
  const ControllerConfig config = config_of();
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
  EXPECT_LT(before, 1.3);
  EXPECT_LT(after, 1.3);
}

// Two ranks with half of each batch decide what one process with all of it decides, to the bit: histograms add.
TEST(QuantileBias, HistogramsOfTwoRanksAreThatOfAll) {
  const ControllerConfig config = config_of();
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

// No token chooses expert 2 and none is wanted of it: its smallest margin, 3, is not a way to go.
TEST(QuantileBias, ExpertsWithTargetZeroDoNotRise) {
  PolicyRig rig("quantile_bias",
                RigOptions{.experts = 3, .top_k = 1, .options = {{"gain", 1.0}}, .targets = {0.5, 0.5, 0}});
  const std::vector<std::int64_t> experts = {0, 0, 1, 1};
  const std::vector<float> scores = {9, 5, 2, 8, 5, 2, 5, 8, 2, 5, 9, 2};
  const std::vector<float> top = {9, 5, 8, 5, 8, 5, 9, 5};
  RoutingStats stats(rig.shape());
  ASSERT_TRUE(stats.add({.experts = experts, .top_values = top, .biased_scores = scores}));
  rig.step(stats);
  EXPECT_EQ(rig.value[2], 0);
}

}  // namespace
}  // namespace moectl
