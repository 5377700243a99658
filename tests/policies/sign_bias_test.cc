// sign_bias against the published methods, replayed step by step.
#include <gtest/gtest.h>

#include <numeric>
#include <random>

#include "policies/policy_rig.h"
#include "test_paths.h"
#include "test_sums.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::RigOptions;
using moectl::testing::stats_of;
using Counts = std::vector<std::int64_t>;

// Megatron-Core: offset = mean(counts) - counts; bias += sign(offset) * rate.
std::vector<double> megatron(std::vector<double> bias, const Counts& counts, double rate) {
  long double total = 0;
  for (const auto c : counts) total += static_cast<long double>(c);
  for (std::size_t i = 0; i < bias.size(); ++i) {
    const long double offset =
        total / static_cast<long double>(counts.size()) - static_cast<long double>(counts[i]);
    bias[i] += rate * (offset > 0 ? 1 : (offset < 0 ? -1 : 0));
  }
  return bias;
}

// torchtitan: delta = rate * sign(mean - counts); delta -= mean(delta); bias += delta.
std::vector<double> torchtitan(const std::vector<double>& bias, const Counts& counts, double rate) {
  std::vector<double> delta = megatron(std::vector<double>(bias.size(), 0.0), counts, rate);
  const double mean = std::accumulate(delta.begin(), delta.end(), 0.0) / static_cast<double>(delta.size());
  std::vector<double> out = bias;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] += delta[i] - mean;
  return out;
}

void replay(bool centred) {
  std::mt19937_64 random(3);
  PolicyRig rig(
      "sign_bias",
      RigOptions{.experts = 7, .top_k = 1, .options = {{"zero_mean_move", centred}, {"step", 1e-3}}});
  std::vector<double> expected(7, 0.0);
  for (int step = 0; step < 500; ++step) {
    Counts counts(7);
    for (auto& c : counts) c = static_cast<std::int64_t>(random() % 12);
    counts[0] += 1;
    rig.step(stats_of(rig.shape(), counts));
    expected = centred ? torchtitan(expected, counts, 1e-3) : megatron(expected, counts, 1e-3);
    for (std::size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(rig.value[i], expected[i], 1e-12) << step;
  }
}

TEST(SignBias, WithoutZeroMeanMovesItEqualsMegatron) {
  replay(false);
}
TEST(SignBias, WithZeroMeanMovesItEqualsTorchtitan) {
  replay(true);
}

TEST(SignBias, ThePublishedConfigEqualsTheMethodThroughTheWholeLoop) {
  Controller controller(load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/sign_bias.yaml"));
  std::mt19937_64 random(4);
  std::vector<std::vector<double>> expected(3, std::vector<double>(16, 0.0));
  for (int step = 0; step < 200; ++step) {
    for (int l = 0; l < 3; ++l) {
      Counts counts(16);
      for (auto& c : counts) c = static_cast<std::int64_t>(2 * (random() % 20));
      counts[5] += 40;
      controller.record_with(l, [&](RoutingStats& sums) {
        sums.add_counts(counts, std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) / 2);
      });
      auto& e = expected[static_cast<std::size_t>(l)];
      e = megatron(e, counts, 1e-3);
    }
    controller.step();
    for (int l = 0; l < 3; ++l) {
      EXPECT_TRUE(controller.report().layers[static_cast<std::size_t>(l)].actuators[0].reasons.empty());
      for (std::size_t i = 0; i < 16; ++i) {
        ASSERT_NEAR(controller.bias(l)[i], expected[static_cast<std::size_t>(l)][i], 1e-12);
      }
    }
  }
}

// Megatron #7081: cast to bf16, 40840 and 40960 are both 40960 and the sign of the update is lost.
TEST(SignBias, NoCountIsRoundedBeforeTheComparison) {
  PolicyRig rig("sign_bias", RigOptions{.experts = 2, .top_k = 1, .options = {{"zero_mean_move", false}}});
  const std::int64_t big = std::int64_t{1} << 53;
  rig.step(stats_of(rig.shape(), {big, big + 1}));
  EXPECT_EQ(rig.value[0], 1e-3);
  EXPECT_EQ(rig.value[1], -1e-3);
  PolicyRig bf16("sign_bias", RigOptions{.experts = 3, .top_k = 1, .options = {{"zero_mean_move", false}}});
  bf16.step(stats_of(bf16.shape(), {40840, 40960, 41080}));
  EXPECT_EQ(bf16.value, (std::vector<double>{1e-3, 0, -1e-3}));
}

// By hand: of 20 assignments the targets are 10, 6 and 4.
TEST(SignBias, UnevenTargetsAreComparedExpertByExpert) {
  PolicyRig rig(
      "sign_bias",
      RigOptions{
          .experts = 3, .top_k = 1, .options = {{"zero_mean_move", false}}, .targets = {0.5, 0.3, 0.2}});
  rig.step(stats_of(rig.shape(), {11, 6, 3}));
  EXPECT_EQ(rig.value, (std::vector<double>{-1e-3, 0, 1e-3}));
}

TEST(SignBias, OptionsOutsideTheirRangesAreRefused) {
  ControllerConfig config = config_of_biases("sign_bias", 1, 4, 1);
  for (const double step : {0.0, 1e6}) {
    config.expert_bias.options.set("step", step);
    EXPECT_NO_THROW(Controller{config}) << step;
  }
  for (const double step : {-1e-3, 1.01e6}) {
    config.expert_bias.options.set("step", step);
    EXPECT_THROW(Controller{config}, ConfigError) << step;
  }
  config.expert_bias.options.set("step", 1e-3);
  config.expert_bias.options.set("freeze_after", std::int64_t{0});
  EXPECT_NO_THROW(Controller{config});
  config.expert_bias.options.set("freeze_after", std::int64_t{-1});
  EXPECT_THROW(Controller{config}, ConfigError);
}

TEST(SignBias, FreezesAfterTheGivenStep) {
  for (const auto& [after, moves] : {std::pair{3, 3}, {1, 1}, {0, 6}}) {  // 0: never
    PolicyRig rig("sign_bias",
                  RigOptions{.experts = 2, .top_k = 1, .options = {{"freeze_after", std::int64_t{after}}}});
    for (int step = 0; step < 6; ++step) rig.step(stats_of(rig.shape(), {3, 1}));
    EXPECT_NEAR(rig.value[1], moves * 1e-3, 1e-15) << after;
  }
}

}  // namespace
}  // namespace moectl
