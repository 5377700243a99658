#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "altered_state.h"
#include "moectl/simulation.h"
#include "policies/policy_rig.h"
#include "test_paths.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::RigOptions;
using moectl::testing::stats_of;

// The constants of the essay, for tests by hand.
constexpr double kDoubtSq = 0.25, kFirstQ = 0.05, kFirstStep = 1e-3, kGap = 0.25;

double at_rest(double q) {
  return (std::sqrt(q * q + 4 * q) - q) / 2;
}
// What the drift learns from an innovation at a q.
double drift_learning(double share, double q) {
  return share * at_rest(q) * at_rest(q) / (2 - at_rest(q));
}

PolicyRig gap_rig(int experts, int delay = 0, bool rescue = false) {
  return PolicyRig("adaptive_bias",
                   RigOptions{.experts = experts,
                              .top_k = 1,
                              .delay = delay,
                              .options = {{"form", std::string("gap")}, {"rescue", rescue}}});
}
// Each token has a gap of kGap. No width was set for near gaps, so every slope is one over it.
RoutingStats gap_window(const PolicyRig& rig, const std::vector<std::int64_t>& counts) {
  std::vector<std::int64_t> experts;
  for (std::size_t i = 0; i < counts.size(); ++i)
    experts.insert(experts.end(), static_cast<std::size_t>(counts[i]), static_cast<std::int64_t>(i));
  std::vector<float> top(2 * experts.size(), 0.5F);
  for (std::size_t t = 0; t < top.size(); t += 2) top[t] = 0.75F;
  RoutingStats stats(rig.shape());
  EXPECT_TRUE(stats.add({.experts = experts, .top_values = top}));
  return stats;
}

// N = 2, k = 1, counts (30, 10): e = (-0.5, 0.5), R = floor² = 1/40, P = 1/4 - R. No gap in the stats, so counts only.
TEST(AdaptiveBias, FirstStepsByHandCountsOnly) {
  PolicyRig rig("adaptive_bias", RigOptions{.experts = 2, .top_k = 1});
  rig.step(stats_of(rig.shape(), {30, 10}));
  const double noise = 0.025;
  double variance = 0.25 - noise, gain = variance / ((1 + kDoubtSq) * variance + noise);
  variance = (1 - gain) * variance + kFirstQ * noise;
  double drift = drift_learning(0.25, kFirstQ) * 0.5 * kFirstStep;
  double wanted = gain * 0.5 * kFirstStep + drift;
  EXPECT_NEAR(rig.value[0], -wanted, 1e-15);
  EXPECT_NEAR(rig.value[1], wanted, 1e-15);
  // The same errors again: the innovations are alike, so q rises by 0.2 in the logarithm and so does the inverse slope.
  rig.step(stats_of(rig.shape(), {30, 10}));
  const double q = kFirstQ * std::exp(0.2), step = kFirstStep * std::exp(0.2);
  gain = variance / ((1 + kDoubtSq) * variance + noise);
  drift += drift_learning(0.25, q) * 0.5 * step;
  wanted += gain * 0.5 * step + drift;
  EXPECT_NEAR(rig.value[1], wanted, 1e-15);
}

TEST(AdaptiveBias, GapFormStepsInGaps) {
  PolicyRig rig = gap_rig(4);
  rig.step(gap_window(rig, {3, 1, 0, 0}));
  // e = (-2, 0, 1, 1), clipped (-1, 0, 1, 1); R = 3/4, as large as the mean square: P = q R.
  const double step = (kFirstQ / ((1 + kDoubtSq) * kFirstQ + 1) + drift_learning(0.25, kFirstQ)) * kGap,
               mean = step / 4;
  EXPECT_NEAR(rig.value[0], -step - mean, 1e-15);
  EXPECT_NEAR(rig.value[1], -mean, 1e-15);
  EXPECT_NEAR(rig.value[2], step - mean, 1e-15);
}

TEST(AdaptiveBias, WithoutAGapTheGapFormHolds) {
  PolicyRig rig("adaptive_bias",
                RigOptions{.experts = 2, .top_k = 1, .options = {{"form", std::string("gap")}}});
  rig.step(stats_of(rig.shape(), {30, 10}));
  EXPECT_EQ(rig.value[1], 0);
}

// Thirty windows with errors near the noise, all alike, of each proposal `share` made. What the last proposes is K e / s,
// and K follows from q.
double last_move(double share) {
  PolicyRig rig = gap_rig(2);
  double move = 0;
  for (int i = 0; i < 30; ++i) {
    const std::vector<double> before = rig.value;
    std::vector<double> applied = rig.propose(gap_window(rig, {21, 19}));
    move = applied[1] - before[1];
    for (std::size_t e = 0; e < 2; ++e) applied[e] = before[e] + share * (applied[e] - before[e]);
    rig.settle(applied);
  }
  return move;
}

TEST(AdaptiveBias, ALimitedMoveDoesNotRaiseTheGain) {
  EXPECT_GT(last_move(1), 2 * last_move(0.5));
  EXPECT_NEAR(last_move(0.5) / (0.05 * kGap), at_rest(kFirstQ), 0.1);
}

// Errors of chance while nothing is applied: what they say of the gain is not believed.
TEST(AdaptiveBias, AHoldDoesNotWearTheGainDown) {
  const auto first_move = [](int held) {
    PolicyRig rig = gap_rig(16);
    std::mt19937_64 random(3);
    const auto noisy = [&] {
      std::vector<std::int64_t> counts(16, 100);
      for (std::int64_t& c : counts) c += static_cast<std::int64_t>(random() % 41) - 20;
      return counts;
    };
    for (int i = 0; i < held; ++i) {
      const std::vector<double> before = rig.value;
      rig.propose(gap_window(rig, noisy()));
      LimitReport why;
      why.add(Reason::kShadow);
      rig.settle(before, why);
    }
    std::vector<std::int64_t> counts = noisy();
    counts[0] += 30, counts[1] -= 30;
    return std::abs(rig.propose(gap_window(rig, counts))[1]);
  };
  EXPECT_GT(first_move(400), 0.5 * first_move(20));
}

// The load of a move is seen three steps later. Until then it is expected, and the move is not made again.
TEST(AdaptiveBias, MovesUnderWayAreNotRepeated) {
  PolicyRig late = gap_rig(2, 3), in_time = gap_rig(2);
  for (int i = 0; i < 4; ++i) {
    late.step(gap_window(late, {30, 10}));
    in_time.step(gap_window(in_time, {30, 10}));
  }
  const double whole = 0.5 * kGap;
  EXPECT_LT(late.value[1], 1.1 * whole);
  EXPECT_GT(late.value[1], 0.8 * whole);
  EXPECT_GT(in_time.value[1], 2 * whole);
}

// At rest a step is a small part of an error. An error of more than four deviations is believed at once.
TEST(AdaptiveBias, ASurpriseIsBelievedAtOnce) {
  const auto part_of_error = [](std::int64_t error) {
    PolicyRig rig = gap_rig(4);
    std::mt19937_64 random(1);
    for (int i = 0; i < 100; ++i) {  // noise at the floor, and the load answers
      std::vector<std::int64_t> counts(4, 100);
      for (std::size_t e = 0; e < 4; ++e)
        counts[e] += std::lround(100 * rig.value[e] / kGap) + static_cast<std::int64_t>(random() % 31) - 15;
      rig.step(gap_window(rig, counts));
    }
    const double before = rig.value[1];
    rig.step(gap_window(rig, {100 + error, 100 - error, 100, 100}));
    return (rig.value[1] - before) / (kGap * static_cast<double>(error) / 100);
  };
  EXPECT_LT(part_of_error(9), 0.5);
  EXPECT_GT(part_of_error(80), 0.7);
}

// An expert without load: each step goes 1.3 times farther than the one before.
TEST(AdaptiveBias, AnExpertThatStaysWithoutLoadIsMovedFartherAtEachStep) {
  PolicyRig rig = gap_rig(4);
  std::vector<double> moves;
  for (int i = 0; i < 6; ++i) {
    const double before = rig.value[3] - rig.value[0];
    rig.step(gap_window(rig, {133, 133, 134, 0}));
    moves.push_back(rig.value[3] - rig.value[0] - before);
  }
  for (std::size_t i = 3; i < moves.size(); ++i) EXPECT_NEAR(moves[i] / moves[i - 1], 1.3, 0.1) << i;
}

// The bias that is needed moves on by half a floor a step. A filter without a drift trails that by the move over its gain.
TEST(AdaptiveBias, ATrendIsNotTrailed) {
  PolicyRig rig = gap_rig(2);
  std::mt19937_64 random(1);
  const double floor = 1 / std::sqrt(2000.0), move = 0.5 * floor * kGap;
  std::normal_distribution<double> noise(0, floor);
  double trailed = 0;
  for (int i = 0; i < 400; ++i) {
    const double error = (move * i - rig.value[1]) / kGap + noise(random);
    const auto missing = static_cast<std::int64_t>(std::lround(1000 * std::clamp(error, -1.0, 1.0)));
    if (i >= 100) trailed += (move * i - rig.value[1]) / 300;
    rig.step(gap_window(rig, {1000 + missing, 1000 - missing}));
  }
  EXPECT_LT(std::abs(trailed), move);  // without a drift: 1.3
}

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

// Expert 3 gets nothing for three windows: then it goes half of what its margins say that it lacks. Four tokens, one wanted
// for each expert; its margins are .125, .375, .375, .75 from a threshold of .625, so one token lies below x at the far
// edge of the bin [.125, .1875).
TEST(AdaptiveBias, RescueMovesHalfTheDistanceOfTheMargins) {
  const std::vector<std::int64_t> experts = {0, 1, 2, 0};
  const std::vector<float> top = {0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F, 0.75F, 0.5F};
  const std::vector<float> scores = {0.75F, 0.5F, 0,     0.5F,  0.5F,  0.75F, 0,    0.25F,
                                     0.5F,  0,    0.75F, 0.25F, 0.75F, 0.5F,  0.5F, -0.125F};
  const auto values_with = [&](bool rescue) {
    PolicyRig rig = gap_rig(4, 0, rescue);
    std::vector<std::vector<double>> values;
    for (int i = 0; i < 3; ++i) {
      RoutingStats stats(rig.shape());
      EXPECT_TRUE(stats.add({.experts = experts, .top_values = top, .biased_scores = scores}));
      values.push_back(rig.step(stats));
    }
    return values;
  };
  const std::vector<std::vector<double>> with = values_with(true), without = values_with(false);
  EXPECT_EQ(with[1], without[1]);
  // Only expert 3 differs, before the mean goes out.
  EXPECT_NEAR(with[2][3] - with[2][0] - (with[1][3] - without[2][0]), 0.5 * 0.1875,
              1e-12 + std::abs(with[2][0] - without[2][0]) * 1.34);
  for (const std::size_t i : {1U, 2U})
    EXPECT_NEAR(with[2][i] - with[2][0], without[2][i] - without[2][0], 1e-12) << i;
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
  PolicyRig rig("adaptive_bias",
                RigOptions{.experts = 4,
                           .top_k = 1,
                           .domains = 2,
                           .options = {{"form", std::string("gap")}, {"feedforward", std::string("tags")}}});
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
    for (const std::uint64_t seed : {1u, 2u, 3u}) {
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

// A softmax whose loads are seen eight steps late, and said to be. Two experts that take tokens from each other answer
// at up to twice their slopes, which is as far as the filter is stable: so one of these seeds stays at 1.6 floors.
TEST(AdaptiveBias, ADeclaredDelayOfEightStepsUnderASoftmaxStaysNearTheFloor) {
  double mean = 0;
  for (const std::uint64_t seed : {3u, 4u, 102u, 103u}) {
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
    EXPECT_LT(ratio / 100, 1.75) << seed;
    mean += ratio / 400;
  }
  EXPECT_LT(mean, 1.25);
}

// Not declared: found from the errors. Before, a softmax swung at several floors.
TEST(AdaptiveBias, AnUndeclaredDelayIsFound) {
  for (const SimulatedGate gate : {SimulatedGate::kSoftmax, SimulatedGate::kSigmoid}) {
    for (const int delay : {1, 4}) {
      ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/adaptive_bias.yaml");
      config.model.layers = 1;
      Controller controller(config);
      SimulationOptions options = simulation_options(config);
      options.gate = gate;
      options.scenario = Scenario::kDelay;
      options.delay = delay;
      double ratio = 0;
      simulate(controller, options, 300, [&](const StepReport& report) {
        if (report.step >= 200)
          ratio += *report.layers[0].metrics->max_vio / *report.layers[0].metrics->noise_floor_max_vio;
      });
      EXPECT_LT(ratio / 100, 1.3) << static_cast<int>(gate) << ' ' << delay;
    }
  }
}

// Errors that turn every twelve windows, under a limit that lets no move through. Of them being above four times the noise
// (3.85 and 4.81, by hand from 400 tokens of 4 experts) depends whether lags beyond four may tell of a swing.
TEST(AdaptiveBias, ASlowSwingIsLookedForOnlyWhereErrorsAreAboveTheNoise) {
  const auto gain = [](std::int64_t off) {
    PolicyRig rig = gap_rig(4);
    double part = 0;
    for (int i = 0; i < 96; ++i) {
      const std::int64_t d = i / 12 % 2 == 0 ? off : -off;
      const std::vector<double> before = rig.value;
      const double to = rig.propose(gap_window(rig, {100 + d, 100 - d, 100 + d, 100 - d}))[1];
      part = 100 * to / (static_cast<double>(d) * kGap);
      rig.settle(before);
    }
    return part;
  };
  EXPECT_NEAR(gain(17), at_rest(kFirstQ), 0.03);
  EXPECT_LT(gain(19), 0.5 * at_rest(kFirstQ));
}

// Counts only: errors of two experts stay the same whatever is done, so their slopes are believed to be smaller than those
// of the others. With a delay errors stay alike anyway, and say nothing of a slope.
TEST(AdaptiveBias, SlopesOfExpertsWhoseErrorsStayAlikeFallUnlessThereIsADelay) {
  for (const int delay : {0, 1}) {
    PolicyRig rig(
        "adaptive_bias",
        RigOptions{.experts = 4, .top_k = 1, .delay = delay, .options = {{"form", std::string("counts")}}});
    for (int i = 0; i < 12; ++i) rig.step(stats_of(rig.shape(), {120, 80, 100, 100}));
    const std::string state = rig.save();
    std::vector<double> share(4);
    for (const moectl::testing::StateEntry& entry : moectl::testing::state_entries(state)) {
      if (entry.name == "slope.share")
        std::memcpy(share.data(), &moectl::testing::state_body(state)[entry.at], 4 * sizeof(double));
    }
    EXPECT_NEAR(share[0], share[1], 1e-9);
    EXPECT_NEAR(share[2], share[3], 1e-9);
    if (delay == 0) {
      EXPECT_LT(share[0], 0.8 * share[2]);
    } else {
      EXPECT_EQ(share[0], 1);
      EXPECT_EQ(share[2], 1);
    }
  }
}

// What the policy says of options that do not fit the model; empty = they do.
TEST(AdaptiveBias, OptionsThatDoNotFitTheModelAreRefusedWithTheReason) {
  const PolicyDescription& description = *PolicyRegistry::builtin().find("adaptive_bias");
  struct Case {
    std::string form, feedforward;
    bool rescue;
    PolicyContext context;
    std::string says;
  };
  const std::string late = "needs routing that is not late (model.delay: 0, lag: 0)";
  const Case cases[] = {
      {"gap", "off", false, {.experts = 4, .top_k = 3}, ""},
      {"gap", "off", false, {.experts = 4, .top_k = 4}, "form: gap: needs top_k below the number of experts"},
      {"auto", "off", false, {.experts = 4, .top_k = 4}, ""},
      {"auto", "tags", false, {.experts = 4, .top_k = 1, .domains = 2}, ""},
      {"auto",
       "tags",
       false,
       {.experts = 4, .top_k = 1, .domains = 1},
       "feedforward: tags: needs at least two domains in model.domains"},
      {"counts", "tags", false, {.experts = 4, .top_k = 1, .domains = 2}, "feedforward: tags: needs the gap"},
      {"auto",
       "tags",
       false,
       {.experts = 4, .top_k = 1, .domains = 2, .delay = 1},
       "feedforward: tags: " + late},
      {"auto",
       "tags",
       false,
       {.experts = 4, .top_k = 1, .domains = 2, .cadence = 2},
       "feedforward: tags: needs a decision for every batch, since each has a mixture of its own "
       "(limits.cadence: 1)"},
      {"auto", "off", false, {.experts = 4, .top_k = 1, .delay = 1, .cadence = 2}, ""},
      {"auto", "off", true, {.experts = 4, .top_k = 1, .delay = 1}, "rescue: true: " + late},
      {"auto", "off", true, {.experts = 4, .top_k = 3}, ""},
      {"auto",
       "off",
       true,
       {.experts = 4, .top_k = 4},
       "rescue: true: needs top_k below the number of experts"},
  };
  for (const Case& one : cases) {
    PolicyOptions options;
    options.set("form", one.form);
    options.set("feedforward", one.feedforward);
    options.set("rescue", one.rescue);
    EXPECT_EQ(description.check(one.context, options), one.says);
  }
}

// The essay's ranges hold for what comes from a file too.
TEST(AdaptiveBias, AStateBeyondTheRangesOfTheEssayIsRefused) {
  PolicyRig rig = gap_rig(4);
  for (int i = 0; i < 3; ++i) rig.step(gap_window(rig, {13, 11, 9, 7}));
  const std::string state = rig.save();
  const auto loads = [&](const char* name, double value) {
    PolicyRig other = gap_rig(4);
    try {
      other.load(moectl::testing::with_number(state, name, 0, value));
      return true;
    } catch (const StateError&) {
      return false;
    }
  };
  struct Range {
    const char* name;
    double least, most;
  };
  for (const Range& range :
       {Range{"adaptive.q", 1e-4, 10}, Range{"adaptive.drift_share", 0.003, 0.25},
        Range{"adaptive.noise", 1, 1e100}, Range{"adaptive.variance", 0, 1e100},
        Range{"adaptive.farther", 1, 4}, Range{"adaptive.errors", -1, 1},
        Range{"adaptive.past_biases", -1e100, 1e100}, Range{"adaptive.estimate", -1e100, 1e100},
        Range{"adaptive.drift", -1e100, 1e100}}) {
    EXPECT_TRUE(loads(range.name, range.least)) << range.name;
    EXPECT_TRUE(loads(range.name, range.most)) << range.name;
    EXPECT_FALSE(loads(range.name, std::nextafter(range.least, -1e300))) << range.name;
    EXPECT_FALSE(loads(range.name, std::nextafter(range.most, 1e300))) << range.name;
  }
}

struct Plant {
  const char* name;
  int experts, top_k;
  SimulatedGate gate;
  ScoreSpace space;
  const char* form;
};

class AdaptiveOnARouter : public ::testing::TestWithParam<Plant> {};

// Closed on the simulated router with a domain that switches on: within 1.3 × the noise floor before and after.
TEST_P(AdaptiveOnARouter, StaysNearTheNoiseFloor) {
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
    Routers, AdaptiveOnARouter,
    ::testing::Values(Plant{"sigmoid16", 16, 2, SimulatedGate::kSigmoid, ScoreSpace::kProbability, "gap"},
                      Plant{"softmax16", 16, 2, SimulatedGate::kSoftmax, ScoreSpace::kProbability, "gap"},
                      Plant{"logit64", 64, 6, SimulatedGate::kSigmoid, ScoreSpace::kLogit, "gap"},
                      Plant{"counts16", 16, 2, SimulatedGate::kSigmoid, ScoreSpace::kProbability, "counts"},
                      Plant{"top1of8", 8, 1, SimulatedGate::kSigmoid, ScoreSpace::kProbability, "gap"}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moectl
