#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "moectl/simulation.h"
#include "policies/policy_rig.h"
#include "test_paths.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::RigOptions;
using moectl::testing::stats_of;

// Part of an error e that may be noise of variance n², 1/(1 + (e/4n)⁴): only this part feeds the trend.
double part_of_noise(double e, double noise_sq) {
  return 1 / (1 + std::pow(e * e / (16 * noise_sq), 2));
}

// N = 2, k = 1, counts (30, 10): e = (-0.5, 0.5), floor² = 1/40. No gap in the stats, so counts only: g = 1e-3, F = 2g.
TEST(AdaptiveBias, FirstStepsByHandCountsOnly) {
  PolicyRig rig("adaptive_bias", RigOptions{.experts = 2, .top_k = 1});
  rig.step(stats_of(rig.shape(), {30, 10}));
  // Nothing to compare with, so the noise is the floor, .025, and nothing has lasted. The trend learns g/16F of the
  // step.
  double trend = 1e-3 / 32 * part_of_noise(0.5, 0.025) * 0.5;
  double wanted = 0.5e-3 + trend;
  EXPECT_NEAR(rig.value[0], -wanted, 1e-15);
  EXPECT_NEAR(rig.value[1], wanted, 1e-15);
  // The same errors again: r_1 = 1, so g = 1e-3 · exp(0.1), and F rises by .1 of the part of .5 that is no noise. No
  // error is unlike the last: n² stays at the floor. Three tenths of that part count as lasting.
  rig.step(stats_of(rig.shape(), {30, 10}));
  const double risen = 1e-3 * std::exp(0.1);
  const double sure = 1 - part_of_noise(0.5, 0.025), far_risen = 2e-3 * std::exp(0.1 * sure);
  trend += risen * risen / (16 * far_risen) * (1 - sure) * 0.5;
  wanted += (risen + (far_risen - risen) * 0.3 * sure) * 0.5 + trend;
  EXPECT_NEAR(rig.value[1], wanted, 1e-15);
  // Reversed: r_1 = r_2 = -1. a_1 = 0.2·1 = 0.2 after the second step, then 0.2 + 0.2·(-1 - 0.2) = -0.04; a_2
  // = -0.2. Neither is below -0.8, so the drive is r_1 = -1, g is back at 1e-3 and no trend is shed.
  // n² = .025 + .1 (4 · .025 - .025); F falls by .1 of the part of .5 that is no noise. Of what lasted .7 are left.
  rig.step(stats_of(rig.shape(), {10, 30}));
  const double noise = part_of_noise(0.5, 0.0325);
  const double far_gain = far_risen * std::exp(-0.1 * (1 - noise));
  const double lasting = 0.7 * 0.3 * sure;
  trend -= 1e-3 * 1e-3 / (16 * far_gain) * noise * 0.5;
  wanted += -0.5 * (1e-3 + (far_gain - 1e-3) * lasting) + trend;
  EXPECT_NEAR(rig.value[1], wanted, 1e-15);
}

TEST(AdaptiveBias, GapFormStepsInGaps) {
  PolicyRig rig("adaptive_bias",
                RigOptions{.experts = 4, .top_k = 1, .options = {{"form", std::string("gap")}}});
  RoutingStats stats(rig.shape());
  const std::vector<std::int64_t> experts = {0, 0, 0, 1};
  const std::vector<float> top = {0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F};
  ASSERT_TRUE(stats.add({.experts = experts, .top_values = top}));
  rig.step(stats);
  // e = (-2, 0, 1, 1), clipped (-1, 0, 1, 1); step 0.25 · 1 · 0.25. The trend takes a half of a sixteenth of what may
  // be noise, not clipped; n² = floor² = 3/4.
  const double step = 0.0625;
  const double down = -step - step / 32 * 2 * part_of_noise(2, 0.75);
  const double up = step + step / 32 * part_of_noise(1, 0.75);
  const double mean = (down + 2 * up) / 4;
  EXPECT_NEAR(rig.value[0], down - mean, 1e-15);
  EXPECT_NEAR(rig.value[1], -mean, 1e-15);
  EXPECT_NEAR(rig.value[2], up - mean, 1e-15);
}

TEST(AdaptiveBias, WithoutAGapTheGapFormHolds) {
  PolicyRig rig("adaptive_bias",
                RigOptions{.experts = 2, .top_k = 1, .options = {{"form", std::string("gap")}}});
  rig.step(stats_of(rig.shape(), {30, 10}));
  EXPECT_EQ(rig.value[1], 0);
}

TEST(AdaptiveBias, ALimitedMoveDoesNotRaiseTheGain) {
  PolicyRig rig("adaptive_bias", RigOptions{.experts = 2, .top_k = 1});
  LimitReport limited;
  limited.add(Reason::kRate);
  for (int i = 0; i < 50; ++i) rig.step(stats_of(rig.shape(), {30, 10}), {}, limited);
  rig.value.assign(2, 0.0);
  rig.step(stats_of(rig.shape(), {30, 10}));
  // Nor does it teach a trend: what there is comes from the first window, before any limit was heard of.
  // Neither gain has risen, but an error that has lasted for so long is met with F.
  const double noise = part_of_noise(0.5, 0.025), lasting = (1 - noise) * (1 - std::pow(0.7, 50));
  EXPECT_NEAR(rig.value[1], 0.5e-3 * (1 + lasting) + 1e-3 / 32 * noise * 0.5, 1e-15);
}

TEST(AdaptiveBias, ADeclaredDelayDividesTheFirstGain) {
  PolicyRig rig("adaptive_bias", RigOptions{.experts = 2, .top_k = 1, .delay = 3});
  rig.step(stats_of(rig.shape(), {30, 10}));
  const double step = 0.5e-3 / 4;  // and of the trend a quarter of that again
  EXPECT_NEAR(rig.value[1], step + step / (32 * 4) * part_of_noise(0.5, 0.025), 1e-15);
}

// Both gains rise while a large error stays; then g falls, as errors near the noise alternate, and F is left high. An
// error that comes from far gets little of F at once and most of it when it stays; never, if it changes sides.
TEST(AdaptiveBias, FarErrorsGetALargerStepOnlyWhenTheyPersist) {
  const auto moves_per_error = [](bool stays) {
    PolicyRig rig("adaptive_bias", RigOptions{.experts = 2, .top_k = 1, .options = {{"per_expert", false}}});
    for (int i = 0; i < 30; ++i) rig.step(stats_of(rig.shape(), {6000, 2000}));
    for (int i = 0; i < 60; ++i) {
      rig.step(i % 2 == 0 ? stats_of(rig.shape(), {4020, 3980}) : stats_of(rig.shape(), {3980, 4020}));
    }
    std::vector<double> moves;
    for (int i = 0; i < 6; ++i) {
      const bool less = stays || i % 2 == 0;
      const double before = rig.value[1];
      rig.step(less ? stats_of(rig.shape(), {5000, 3000}) : stats_of(rig.shape(), {3000, 5000}));
      moves.push_back((rig.value[1] - before) / (less ? 0.25 : -0.25));
    }
    return moves;
  };
  const std::vector<double> lasting = moves_per_error(true), swinging = moves_per_error(false);
  EXPECT_LT(lasting[0], 0.1 * lasting[5]);
  for (std::size_t i = 1; i < lasting.size(); ++i) EXPECT_GT(lasting[i], lasting[i - 1]) << i;
  EXPECT_GT(lasting[2] - lasting[1], lasting[5] - lasting[4]);
  for (const double move : swinging) EXPECT_LT(move, 0.1 * lasting[5]);
}

// Errors that stay: with noise to hide in, the trend adds to the step; far from it, it hardly does.
TEST(AdaptiveBias, TheTrendLearnsOnlyFromErrorsNearTheNoise) {
  const auto extra = [](std::int64_t unit) {
    PolicyRig rig("adaptive_bias", RigOptions{.experts = 2, .top_k = 1, .options = {{"adaptation", 0.0}}});
    for (int i = 0; i < 20; ++i) rig.step(stats_of(rig.shape(), {12 * unit, 8 * unit}));
    return rig.value[1] / (20 * 0.2e-3) - 1;  // beyond 20 integral steps of e = .2
  };
  // Σ_{j ≤ 20} j / 16 steps are added to 20: 10.5 / 16 of them, if all of the error may be noise.
  EXPECT_NEAR(extra(1), 10.5 / 16, 0.02);
  EXPECT_LT(extra(10000), 0.001);
}

// Expert 3 gets nothing for three windows: then it goes half of what its margins say it lacks. Four tokens, one wanted
// for each expert; its margins are .125, .375, .375, .75 from a threshold of .625, so one token lies below x at the far
// edge of the bin [.125, .1875): move .5 · .1875 where an integral step would be .25 gaps.
// One expert should receive all tokens, and does after thirty steps: biases that drifted until then must stop.
TEST(AdaptiveBias, TrendsDecayWhenTargetsAreMetExactly) {
  for (const double off : {0.0, 4e-7}) {  // as far as targets may be from their sum
    PolicyRig rig("adaptive_bias", RigOptions{.experts = 4, .top_k = 1, .targets = {1 - off, 0, 0, 0}});
    const auto step_with = [&](std::int64_t astray) {
      RoutingStats stats(rig.shape());
      stats.add_counts(std::vector<std::int64_t>{2048 - astray, astray, 0, 0}, 2048);
      return rig.step(stats)[0];
    };
    for (std::int64_t step = 0; step < 30; ++step) step_with(60 - 2 * step);
    const double arrived = step_with(0);
    EXPECT_GT(step_with(0), arrived);  // there is a trend
    double last = 0;
    for (int step = 0; step < 300; ++step) last = step_with(0);
    const double settled = last;
    for (int step = 0; step < 1000; ++step) last = step_with(0);
    EXPECT_NEAR(last, settled, 0.05 * std::abs(settled)) << off;
  }
}

TEST(AdaptiveBias, RescueMovesHalfTheDistanceOfTheMargins) {
  const auto rig_with = [](bool rescue) {
    return PolicyRig("adaptive_bias", RigOptions{.experts = 4,
                                                 .top_k = 1,
                                                 .options = {{"form", std::string("gap")},
                                                             {"adaptation", 0.0},
                                                             {"per_expert", false},
                                                             {"rescue", rescue}}});
  };
  const std::vector<std::int64_t> experts = {0, 1, 2, 0};
  const std::vector<float> top = {0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F};
  const std::vector<float> scores = {0.75F, 0.5F, 0,     0.5F,  0.5F,  0.75F, 0,    0.25F,
                                     0.5F,  0,    0.75F, 0.25F, 0.75F, 0.5F,  0.5F, -0.125F};
  const auto window = [&](const PolicyRig& rig) {
    RoutingStats stats(rig.shape());
    EXPECT_TRUE(stats.add({.experts = experts, .top_values = top, .biased_scores = scores}));
    return stats;
  };
  PolicyRig with = rig_with(true), without = rig_with(false);
  const double step = 0.25 * 0.25;  // gain times gap; e_3 = 1
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(with.value, without.value) << i;
    with.step(window(with));
    without.step(window(without));
  }
  // The mean goes out of both, a quarter of the difference. Three windows have taught a trend, which ends here.
  const double trend = 3 * step / 16 * part_of_noise(1, 0.75);
  EXPECT_NEAR(with.value[3] - without.value[3], 0.75 * (0.5 * 0.1875 - step - trend), 1e-15);
}

// Domains that alternate at random, told to the policy one batch ahead: closer to the floor than without.
TEST(AdaptiveBias, FeedforwardCancelsTheEffectOfTheMixture) {
  const auto steady = [](const char* feedforward) {
    ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/adaptive_bias.yaml");
    config.model.layers = 1;
    config.model.domains = {"a", "b", "c", "d"};
    config.expert_bias.options.set("feedforward", std::string(feedforward));
    Controller controller(config);
    SimulationOptions options = simulation_options(config);
    options.mixture_spread = 1;
    options.sequence_length = 0;
    double ratio = 0;
    simulate(controller, options, 500, [&](const StepReport& report) {
      const Metrics& m = *report.layers[0].metrics;
      if (report.step >= 300) ratio += *m.max_vio / *m.noise_floor_max_vio / 200;
    });
    return ratio;
  };
  const double with = steady("tags"), without = steady("off");
  EXPECT_LT(with, 0.85 * without) << with << " " << without;
}

// While a layer is frozen no plan acts. Learnt from as if they had, batches of nearly one domain each make its effect
// seem twice as large as it is.
TEST(AdaptiveBias, FeedforwardLearnsNothingFromAFrozenStep) {
  const auto after_a_freeze = [](const char* feedforward) {
    double vio = 0;
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/adaptive_bias.yaml");
      config.model.layers = 1;
      config.model.domains = {"a", "b"};
      config.expert_bias.options.set("feedforward", std::string(feedforward));
      Controller controller(config);
      SimulationOptions options = simulation_options(config);
      options.seed = seed;
      options.mixture_spread = 5;
      options.cluster_spread = 0.3;
      simulate(controller, options, 367, [&](const StepReport& report) {
        if (report.step == 300) controller.freeze(0);
        if (report.step == 360) controller.freeze(0, false);
        if (report.step > 361) vio += *report.layers[0].metrics->max_vio / 15;
      });
    }
    return vio;
  };
  const double with = after_a_freeze("tags"), without = after_a_freeze("off");
  EXPECT_LT(with, 0.6 * without) << with << " " << without;
}

TEST(AdaptiveBias, AHeldStepKeepsTheFeedforwardInForce) {
  PolicyRig rig("adaptive_bias", RigOptions{.experts = 4,
                                            .top_k = 1,
                                            .domains = 2,
                                            .options = {{"form", std::string("gap")},
                                                        {"feedforward", std::string("tags")},
                                                        {"adaptation", 0.0}}});
  const std::vector<std::int64_t> a = {1, 0}, b = {0, 1}, both = {1, 1};
  const auto window = [&](int domain) {
    RoutingStats stats(rig.shape());
    const std::vector<std::int64_t> experts =
        domain == 0 ? std::vector<std::int64_t>{0, 0, 1, 1} : std::vector<std::int64_t>{2, 2, 3, 3};
    const std::vector<std::int64_t> domains(4, domain);
    const std::vector<float> top = {0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F};
    EXPECT_TRUE(stats.add({.experts = experts, .top_values = top, .domain_ids = domains}));
    return stats;
  };
  rig.step(window(0), {.next_mixture = both});
  for (int i = 0; i < 40; ++i) rig.step(window(i % 2), {.next_mixture = i % 2 == 0 ? b : a});
  const std::vector<double> in_force = rig.value;
  LimitReport held;
  held.add(Reason::kSkippedStep);
  rig.propose(window(0), {.next_mixture = b});
  rig.settle(in_force, held);
  // An even window with an unknown mixture: no step and no feed-forward; what is left is the policy's own b,
  // whose experts 0 and 1 are treated alike, as are 2 and 3, and which the alternation has kept near zero.
  RoutingStats even(rig.shape());
  const std::vector<std::int64_t> experts = {0, 1, 2, 3};
  ASSERT_TRUE(even.add({.experts = experts}));
  const std::vector<double> own = rig.step(even);
  EXPECT_GT(std::abs(in_force[0] - own[0]), 1e-3);
  EXPECT_NEAR(own[0], own[1], 1e-12);
}

// What a rate limit below the swing of the mixture lets through of the feed-forward comes late, but does no harm.
TEST(AdaptiveBias, FeedforwardUnderATightRateDoesNoHarm) {
  const auto steady = [](const char* feedforward) {
    double ratio = 0;
    for (const std::uint64_t seed : {1, 2, 3}) {
      ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/adaptive_bias.yaml");
      config.model.layers = 1;
      config.model.domains = {"a", "b", "c", "d"};
      config.expert_bias.options.set("feedforward", std::string(feedforward));
      config.expert_bias.limits.rate = 0.01;
      Controller controller(config);
      SimulationOptions options = simulation_options(config);
      options.scenario = Scenario::kNoise;
      options.event_step = 100;
      options.seed = seed;
      simulate(controller, options, 600, [&](const StepReport& report) {
        if (report.step >= 300)
          ratio += *report.layers[0].metrics->max_vio / *report.layers[0].metrics->noise_floor_max_vio;
      });
    }
    return ratio / 900;
  };
  EXPECT_LT(steady("tags"), steady("off"));
}

// A softmax whose loads are seen eight steps late, and said to be: the gains must not grow faster than they are
// answered.
TEST(AdaptiveBias, ADeclaredDelayOfEightStepsUnderASoftmaxStaysNearTheFloor) {
  for (const std::uint64_t seed : {3, 4, 102, 103}) {
    ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/adaptive_bias.yaml");
    config.model.layers = 1;
    config.model.delay = 8;
    Controller controller(config);
    SimulationOptions options = simulation_options(config);
    options.gate = SimulatedGate::kSoftmax;
    options.scenario = Scenario::kDelay;
    options.seed = seed;
    double ratio = 0;
    simulate(controller, options, 600, [&](const StepReport& report) {
      if (report.step >= 500)
        ratio += *report.layers[0].metrics->max_vio / *report.layers[0].metrics->noise_floor_max_vio;
    });
    EXPECT_LT(ratio / 100, 1.5) << seed;
  }
}

struct Plant {
  const char* name;
  int experts, top_k;
  SimulatedGate gate;
  ScoreSpace space;
  const char* form;
};

class AdaptiveOnAPlant : public ::testing::TestWithParam<Plant> {};

// Closed on the simulated router with a domain that switches on: within 1.3 × the noise floor before and after.
TEST_P(AdaptiveOnAPlant, StaysNearTheNoiseFloor) {
  const Plant& p = GetParam();
  ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/adaptive_bias.yaml");
  config.model = {.layers = 1,
                  .experts = p.experts,
                  .top_k = p.top_k,
                  .tokens_per_step = 2048,
                  .score_space = p.space,
                  .delay = 0,
                  .domains = {},
                  .targets = {}};
  config.expert_bias.options.set("form", std::string(p.form));
  Controller controller(config);
  SimulationOptions options = simulation_options(config);
  options.gate = p.gate;
  options.scenario = Scenario::kShift;
  options.event_step = 150;
  double before = 0, after = 0;
  simulate(controller, options, 300, [&](const StepReport& report) {
    const Metrics& m = *report.layers[0].metrics;
    const double ratio = *m.max_vio / *m.noise_floor_max_vio;
    if (report.step >= 50 && report.step < 150) before += ratio / 100;
    if (report.step >= 200) after += ratio / 100;
  });
  EXPECT_LT(before, 1.3);
  EXPECT_LT(after, 1.3);
}

INSTANTIATE_TEST_SUITE_P(
    Routers, AdaptiveOnAPlant,
    ::testing::Values(Plant{"sigmoid16", 16, 2, SimulatedGate::kSigmoid, ScoreSpace::kProbability, "gap"},
                      Plant{"softmax16", 16, 2, SimulatedGate::kSoftmax, ScoreSpace::kProbability, "gap"},
                      Plant{"logit64", 64, 6, SimulatedGate::kSigmoid, ScoreSpace::kLogit, "gap"},
                      Plant{"counts16", 16, 2, SimulatedGate::kSigmoid, ScoreSpace::kProbability, "counts"},
                      Plant{"top1of8", 8, 1, SimulatedGate::kSigmoid, ScoreSpace::kProbability, "gap"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moectl
