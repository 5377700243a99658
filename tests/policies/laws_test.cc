// The equations of the smaller policies, by hand.
#include <gtest/gtest.h>

#include <cmath>

#include "policies/policy_rig.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::RigOptions;
using moectl::testing::stats_of;

RigOptions bias(std::map<std::string, OptionValue> options) {
  return {.experts = 2, .top_k = 1, .options = std::move(options)};
}
RigOptions scalar(Actuator actuator, std::map<std::string, OptionValue> options) {
  return {.actuator = actuator, .experts = 2, .top_k = 1, .options = std::move(options)};
}

// Counts (30, 10): e = ∓10 tokens = ∓0.5 of the mean = ∓0.25 of all; RMS(e) = 10.
TEST(ProportionalBias, Normalisations) {
  const auto first = [](const char* normalise) {
    PolicyRig rig("proportional_bias", bias({{"step", 0.5}, {"normalise", std::string(normalise)}}));
    rig.step(stats_of(rig.shape(), {30, 10}));
    return rig.value[1];
  };
  EXPECT_DOUBLE_EQ(first("none"), 0.5 * 0.25);
  EXPECT_DOUBLE_EQ(first("mean"), 0.5 * 0.5);
  EXPECT_DOUBLE_EQ(first("rms"), 0.5);
}

// Counts (70, 10, 10, 10) of 25 wanted: e / c̄ = (-1.8, .6, .6, .6), RMS √(27²/3) = 15.588… of 25 = 1.0392.
TEST(ProportionalBias, LargeErrorsAreClippedUnlessAsked) {
  const auto first = [](const char* normalise, double clip) {
    PolicyRig rig("proportional_bias", {.experts = 4,
                                        .top_k = 1,
                                        .options = {{"step", 0.5},
                                                    {"normalise", std::string(normalise)},
                                                    {"clip", clip},
                                                    {"zero_mean_move", false}}});
    rig.step(stats_of(rig.shape(), {70, 10, 10, 10}));
    return rig.value[0];
  };
  EXPECT_DOUBLE_EQ(first("mean", 1), -0.5);
  EXPECT_DOUBLE_EQ(first("mean", 1.5), -0.75);
  EXPECT_DOUBLE_EQ(first("mean", 4), -0.5 * 1.8);
  EXPECT_DOUBLE_EQ(first("rms", 1), -0.5);
  EXPECT_NEAR(first("rms", 2), -0.5 * std::sqrt(3.0), 1e-12);  // √N is never reached
}

// An expert that should get nothing has an error of -1 as soon as it gets anything; the others' steps do not feel it.
TEST(ProportionalBias, AnExpertWithTargetZeroIsPushedAway) {
  PolicyRig rig("proportional_bias",
                {.experts = 3,
                 .top_k = 1,
                 .options = {{"step", 0.5}, {"normalise", std::string("mean")}, {"zero_mean_move", false}},
                 .targets = {0.5, 0.5, 0}});
  rig.step(stats_of(rig.shape(), {30, 10, 40}));
  EXPECT_DOUBLE_EQ(rig.value[0], 0.5 * 10 / 40);
  EXPECT_DOUBLE_EQ(rig.value[2], -0.5);
}

TEST(ProportionalBias, TheStepHalves) {
  PolicyRig rig("proportional_bias", bias({{"step", 1.0}, {"half_life", 1.0}}));
  rig.step(stats_of(rig.shape(), {30, 10}));
  rig.step(stats_of(rig.shape(), {30, 10}));
  EXPECT_DOUBLE_EQ(rig.value[1], 0.5 + 0.25);
}

TEST(ProportionalBias, AtBalanceRmsDoesNotDivideByZero) {
  PolicyRig rig("proportional_bias", bias({{"normalise", std::string("rms")}}));
  rig.step(stats_of(rig.shape(), {10, 10}));
  EXPECT_EQ(rig.value, std::vector<double>(2, 0.0));
}

// v = ∓0.5: Δ = ∓5e-4 tanh(1); m = 0.5 Δ, then 0.75 Δ.
TEST(TanhMomentumBias, StepsByHand) {
  PolicyRig rig("tanh_momentum_bias", bias({}));
  const double delta = 5e-4 * std::tanh(1.0);
  rig.step(stats_of(rig.shape(), {30, 10}));
  EXPECT_NEAR(rig.value[1], 0.5 * delta, 1e-18);
  rig.step(stats_of(rig.shape(), {30, 10}));
  EXPECT_NEAR(rig.value[1], 1.25 * delta, 1e-18);
}

TEST(TanhMomentumBias, AHoldClearsTheMomentum) {
  PolicyRig rig("tanh_momentum_bias", bias({}));
  LimitReport held;
  held.add(Reason::kSkippedStep);
  rig.propose(stats_of(rig.shape(), {30, 10}));
  rig.settle({0, 0}, held);
  rig.step(stats_of(rig.shape(), {10, 10}));
  EXPECT_EQ(rig.value[1], 0);
}

// A move that a limit shortened is made none the less: the momentum stays.
TEST(TanhMomentumBias, ALimitKeepsTheMomentum) {
  PolicyRig rig("tanh_momentum_bias", bias({}));
  LimitReport limited;
  limited.add(Reason::kRate);
  rig.propose(stats_of(rig.shape(), {30, 10}));
  rig.settle({0, 0}, limited);
  rig.step(stats_of(rig.shape(), {10, 10}));
  EXPECT_NEAR(rig.value[1], 0.25 * 5e-4 * std::tanh(1.0), 1e-18);
}

TEST(Multiplicative, FactorByTheSignBeyondTheTolerance) {
  PolicyRig rig("multiplicative", scalar(Actuator::kAuxLossWeight,
                                         {{"target", 0.5}, {"factor", 2.0}, {"error_tolerance", 0.1}}));
  rig.step(stats_of(rig.shape(), {30, 10}));  // load_cv = 0.5, inside
  EXPECT_EQ(rig.value[0], 0.01);
  rig.step(stats_of(rig.shape(), {32, 8}));  // 0.6
  EXPECT_EQ(rig.value[0], 0.02);
  rig.step(stats_of(rig.shape(), {28, 12}));  // 0.4
  rig.step(stats_of(rig.shape(), {28, 12}));
  EXPECT_EQ(rig.value[0], 0.005);
}

// load_cv .5, then .1: averaged, .3, which is not below the target yet.
TEST(Multiplicative, FollowsTheAverage) {
  PolicyRig rig("multiplicative",
                scalar(Actuator::kAuxLossWeight, {{"target", 0.25}, {"factor", 2.0}, {"ema", 0.5}}));
  rig.step(stats_of(rig.shape(), {30, 10}));
  EXPECT_EQ(rig.value[0], 0.02);
  rig.step(stats_of(rig.shape(), {22, 18}));
  EXPECT_EQ(rig.value[0], 0.04);
  rig.step(stats_of(rig.shape(), {22, 18}));  // .2
  EXPECT_EQ(rig.value[0], 0.02);
}

TEST(Multiplicative, ReversesIfTheActuatorRaisesTheMetric) {
  PolicyRig rig("multiplicative",
                scalar(Actuator::kRouterTemperature,
                       {{"target", 0.25}, {"factor", 2.0}, {"effect", std::string("raises")}}));
  rig.step(stats_of(rig.shape(), {30, 10}));
  EXPECT_EQ(rig.value[0], 0.5);
  rig.step(stats_of(rig.shape(), {20, 20}));
  EXPECT_EQ(rig.value[0], 1);
}

// The value for step t is decided at step t - 1; the rig starts from 0.01.
TEST(Schedule, WarmsUpHoldsAndDecays) {
  const auto at = [](const char* shape, std::int64_t step) {
    PolicyRig rig("schedule", scalar(Actuator::kAuxLossWeight, {{"peak", 0.05},
                                                                {"warmup", std::int64_t{4}},
                                                                {"final", 0.0005},
                                                                {"decay_start", std::int64_t{10}},
                                                                {"decay_steps", std::int64_t{10}},
                                                                {"shape", std::string(shape)}}));
    rig.now = step - 1;
    rig.step(stats_of(rig.shape(), {1, 1}));
    return rig.value[0];
  };
  EXPECT_DOUBLE_EQ(at("linear", 1), 0.02);
  EXPECT_DOUBLE_EQ(at("linear", 4), 0.05);
  EXPECT_DOUBLE_EQ(at("linear", 9), 0.05);
  EXPECT_DOUBLE_EQ(at("linear", 12), 0.0401);
  EXPECT_DOUBLE_EQ(at("linear", 15), 0.02525);
  EXPECT_DOUBLE_EQ(at("cosine", 15), 0.02525);
  EXPECT_NEAR(at("exponential", 15), 0.005, 1e-15);
  for (const char* shape : {"linear", "cosine", "exponential"}) {
    EXPECT_DOUBLE_EQ(at(shape, 20), 0.0005);
    EXPECT_DOUBLE_EQ(at(shape, 1000), 0.0005);
  }
}

TEST(Schedule, WithoutAFinalItStaysAtItsPeak) {
  PolicyRig rig("schedule", scalar(Actuator::kAuxLossWeight, {{"peak", 0.05}, {"warmup", std::int64_t{4}}}));
  for (const double wanted : {0.02, 0.03, 0.04, 0.05, 0.05, 0.05}) {
    rig.step(stats_of(rig.shape(), {1, 1}));
    EXPECT_DOUBLE_EQ(rig.value[0], wanted);
  }
}

// A decay of no length is a switch.
TEST(Schedule, SwitchesAtOnce) {
  PolicyRig rig("schedule", scalar(Actuator::kAuxLossWeight,
                                   {{"peak", 0.05}, {"final", 0.001}, {"decay_start", std::int64_t{3}}}));
  for (const double wanted : {0.05, 0.05, 0.001, 0.001}) {
    rig.step(stats_of(rig.shape(), {1, 1}));
    EXPECT_DOUBLE_EQ(rig.value[0], wanted);
  }
}

RoutingStats soft(const StatsShape& shape, float p) {
  RoutingStats stats(shape);
  const std::vector<std::int64_t> experts = {0, 1};
  const std::vector<float> probabilities = {p, 1 - p, 1 - p, p};
  stats.add({.experts = experts, .probabilities = probabilities});
  return stats;
}

TEST(EntropyTemperature, RaisesTheTemperatureOfATooDecidedRouter) {
  PolicyRig rig("entropy_temperature",
                scalar(Actuator::kRouterTemperature, {{"target", 0.7}, {"gain", 0.5}}));
  rig.step(soft(rig.shape(), 1.0F));  // entropy 0
  EXPECT_NEAR(rig.value[0], std::exp(0.5 * 0.7), 1e-6);
  PolicyRig even("entropy_temperature",
                 scalar(Actuator::kRouterTemperature, {{"target", 0.7}, {"gain", 0.5}}));
  even.step(soft(even.shape(), 0.5F));  // entropy ln 2 = all there is
  EXPECT_NEAR(even.value[0], std::exp(-0.5 * 0.3), 1e-6);
}

TEST(EntropyTemperature, RestsWithinItsToleranceAndAverages) {
  PolicyRig rig("entropy_temperature", scalar(Actuator::kRouterTemperature,
                                              {{"target", 0.7}, {"gain", 0.5}, {"error_tolerance", 0.31}}));
  rig.step(soft(rig.shape(), 0.5F));  // entropy 1, .3 too much
  EXPECT_EQ(rig.value[0], 1);
  for (int i = 0; i < 3; ++i) rig.step(soft(rig.shape(), 1.0F));  // averages .9, .81, .729
  EXPECT_EQ(rig.value[0], 1);
  for (int i = 0; i < 5; ++i) rig.step(soft(rig.shape(), 1.0F));
  EXPECT_NEAR(rig.value[0], 1, 0) << "average .43 lies inside";
  rig.step(soft(rig.shape(), 1.0F));
  EXPECT_NEAR(rig.value[0], std::exp(0.5 * (0.7 - std::pow(0.9, 9))), 1e-6);
}

TEST(Rules, ActOnceConfirmedThenWait) {
  const auto run = [](Actuator actuator, int steps) {
    PolicyRig rig("rules", scalar(actuator, {{"confirm", std::int64_t{3}}, {"wait", std::int64_t{10}}}));
    for (int i = 0; i < steps; ++i)
      rig.step(stats_of(rig.shape(), {40, 0}));  // one expert takes all: collapse
    return rig.value[0];
  };
  EXPECT_DOUBLE_EQ(run(Actuator::kAuxLossWeight, 2), 0.01);
  EXPECT_DOUBLE_EQ(run(Actuator::kAuxLossWeight, 3), 0.05);
  EXPECT_DOUBLE_EQ(run(Actuator::kAuxLossWeight, 12), 0.05);
  EXPECT_DOUBLE_EQ(run(Actuator::kAuxLossWeight, 13), 0.25);
  EXPECT_DOUBLE_EQ(run(Actuator::kRouterTemperature, 3), 1.2);
}

TEST(Rules, AreConfirmedAnewAfterEachMove) {
  PolicyRig rig("rules",
                scalar(Actuator::kAuxLossWeight, {{"confirm", std::int64_t{3}}, {"wait", std::int64_t{0}}}));
  for (const double wanted : {0.01, 0.01, 0.05, 0.05, 0.05, 0.25}) {
    rig.step(stats_of(rig.shape(), {40, 0}));
    EXPECT_DOUBLE_EQ(rig.value[0], wanted);
  }
}

TEST(Rules, AnEvenRouterIsLeftAloneUnlessAsked) {
  for (const bool specialize : {false, true}) {
    PolicyRig rig("rules", {.actuator = Actuator::kAuxLossWeight, .options = {{"specialize", specialize}}});
    rig.now = 2000;
    for (int i = 0; i < 5; ++i) rig.step(stats_of(rig.shape(), std::vector<std::int64_t>(16, 10)));
    EXPECT_DOUBLE_EQ(rig.value[0], specialize ? 0.005 : 0.01);
  }
}

// Of 40 choices 20, 20 and none are wanted: errors 0, 5/20 and, of the last, -1.
TEST(BiasPolicies, ExpertsWithTargetZeroArePushedAwayWithoutADivision) {
  const std::vector<double> targets = {0.5, 0.5, 0};
  for (const char* law : {"proportional_bias", "tanh_momentum_bias", "sign_bias"}) {
    RigOptions options{.experts = 3, .top_k = 1, .targets = targets};
    PolicyRig rig(law, options);
    rig.step(stats_of(rig.shape(), {20, 15, 5}));
    EXPECT_LT(rig.value[2], rig.value[0]) << law;
    EXPECT_LT(rig.value[0], rig.value[1]) << law;
  }
  PolicyRig proportional("proportional_bias",
                         RigOptions{.experts = 3,
                                    .top_k = 1,
                                    .options = {{"step", 0.01}, {"zero_mean_move", false}},
                                    .targets = targets});
  proportional.step(stats_of(proportional.shape(), {20, 15, 5}));
  EXPECT_DOUBLE_EQ(proportional.value[0], 0);
  EXPECT_DOUBLE_EQ(proportional.value[1], 0.01 * 5 / 20);
  EXPECT_DOUBLE_EQ(proportional.value[2], -0.01);
  PolicyRig tanh("tanh_momentum_bias", RigOptions{.experts = 3, .top_k = 1, .targets = targets});
  tanh.step(stats_of(tanh.shape(), {20, 15, 5}));
  const double fall = std::tanh(2 * -1.0), rise = std::tanh(2 * 0.25), mean = (fall + rise) / 3;
  EXPECT_NEAR(tanh.value[2], 5e-4 * 0.5 * (fall - mean), 1e-18);
  // At rest when it has nothing.
  PolicyRig rest("proportional_bias", RigOptions{.experts = 3, .top_k = 1, .targets = targets});
  rest.step(stats_of(rest.shape(), {20, 20, 0}));
  EXPECT_EQ(rest.value, std::vector<double>(3, 0));
}

}  // namespace
}  // namespace moectl
