// The simulated router: does it do what its essay says, fast or slow, and always the same?
#include "moectl/simulation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "allocation_counter.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

std::vector<double> zeros(int n) {
  return std::vector<double>(static_cast<std::size_t>(n), 0.0);
}

std::vector<double> loads(const RoutingBatch& batch, int experts) {
  std::vector<double> counts = zeros(experts);
  for (std::int64_t e : batch.experts) counts[static_cast<std::size_t>(e)] += 1;
  for (double& c : counts) c *= experts / static_cast<double>(batch.experts.size());
  return counts;
}

// The gap-unit integral policy at its plain fixed gain, which balances any of these plants.
void integrate(std::vector<double>& bias, const RoutingBatch& batch, int k, double gain = 0.25) {
  const int n = static_cast<int>(bias.size());
  const std::size_t width = static_cast<std::size_t>(k) + 1;
  double gap = 0;
  const std::size_t tokens = batch.top_values.size() / width;
  for (std::size_t t = 0; t < tokens; ++t) {
    gap += static_cast<double>(batch.top_values[t * width + width - 2] -
                               batch.top_values[t * width + width - 1]);
  }
  gap *= k / static_cast<double>(tokens);
  const std::vector<double> load = loads(batch, n);
  for (std::size_t i = 0; i < bias.size(); ++i) bias[i] += gain * gap * std::max(-1.0, 1 - load[i]);
}

double max_of(const std::vector<double>& values) {
  return *std::max_element(values.begin(), values.end());
}

RoutingStats stats_of(const RoutingBatch& batch, int experts, int k, StatsNeeds needs) {
  RoutingStats stats({experts, k, needs});
  EXPECT_TRUE(stats.add(batch));
  return stats;
}

// FNV-1a over everything that a batch says.
std::uint64_t digest(const RoutingBatch& batch, std::uint64_t hash = 14695981039346656037ULL) {
  const auto bytes = [&](const void* data, std::size_t size) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (std::size_t i = 0; i < size; ++i) hash = (hash ^ p[i]) * 1099511628211ULL;
  };
  bytes(batch.experts.data(), batch.experts.size_bytes());
  bytes(batch.top_values.data(), batch.top_values.size_bytes());
  bytes(batch.probabilities.data(), batch.probabilities.size_bytes());
  bytes(batch.domain_ids.data(), batch.domain_ids.size_bytes());
  return hash;
}

TEST(Simulation, SameSeedSameBitsOtherSeedOthers) {
  SimulationOptions options;
  options.sequence_length = 128;
  options.probabilities = true;
  options.mixture_spread = 1;
  options.jitter = 0.2;
  SimulationOptions other = options;
  other.seed = 2;
  SimulatedRouter a(options), b(options), c(other), second_layer(options, 1);
  std::vector<double> bias = zeros(16);
  for (int step = 0; step < 20; ++step) {
    const RoutingBatch batch = a.route(bias, 1e-2, 1.1);
    const std::uint64_t bits = digest(batch);
    EXPECT_EQ(bits, digest(b.route(bias, 1e-2, 1.1)));
    EXPECT_NE(bits, digest(c.route(bias, 1e-2, 1.1)));
    EXPECT_NE(bits, digest(second_layer.route(bias, 1e-2, 1.1)));
    integrate(bias, batch, 2);
  }
}

// The bits of a run, written down: other compilers, flags and machines must draw the same.
// What is two steps late is there at the third.
TEST(Simulation, LateRoutingIsLateByDelaySteps) {
  ControllerConfig config;
  config.model.layers = 1;
  config.model.experts = 4;
  config.model.top_k = 1;
  config.model.delay = 2;
  SimulationOptions plant = simulation_options(config);
  plant.tokens = 64;
  Controller controller(config);
  simulate(controller, plant, 5, [](const StepReport& report) {
    EXPECT_EQ(report.layers[0].actuators[0].reasons.has(Reason::kNoData), report.step < 2) << report.step;
  });
}

// Late stats tell the slope of the loads as those in time do, once gaps have been seen.
TEST(Simulation, LateRoutingTellsTheSlope) {
  for (const int delay : {0, 2}) {
    ControllerConfig config;
    config.model.layers = 1;
    config.model.experts = 4;
    config.model.top_k = 1;
    config.model.delay = delay;
    config.expert_bias.policy = "adaptive_bias";
    SimulationOptions plant = simulation_options(config);
    plant.tokens = 256;
    Controller controller(config);
    simulate(controller, plant, 10, [](const StepReport&) {});
    EXPECT_TRUE(controller.report().layers[0].responsiveness.scaled) << delay;
  }
}

// A favoured expert's preference grows no faster than twice its share would let it, however much it gets.
TEST(Simulation, FavouredExpertsLearnBoundedly) {
  SimulationOptions options;
  options.experts = 16;
  options.top_k = 1;
  options.tokens = 256;
  options.rich = 0.001;
  options.scenario = Scenario::kCollapse;
  options.collapse = CollapseKind::kColdStart;
  SimulatedRouter router(options, 0);
  const std::vector<double> bias(16, 0.0);
  router.route(bias);
  for (int step = 1; step < 30; ++step) {
    const std::vector<double> before(router.preferences().begin(), router.preferences().end());
    router.route(bias);
    double most = 0;
    for (std::size_t i = 0; i < 16; ++i) {
      const double task = options.task_pull * (router.wanted_preferences()[i] - before[i]);
      most = std::max(most, router.preferences()[i] - before[i] - task);
    }
    EXPECT_NEAR(most, 30 * options.rich, 1e-12) << step;  // locked in: thirty times as fast
  }
}

TEST(Simulation, TheBitsOfASeedAreTheseEverywhere) {
  const auto bits = [](SimulatedGate gate, Scenario scenario) {
    SimulationOptions options;
    options.gate = gate;
    options.scenario = scenario;
    options.event_step = 5;
    options.experts = 13;
    options.tokens = 512;
    options.sequence_length = 64;
    options.capacity_factor = 1.25;
    options.probabilities = true;
    options.mixture_spread = 0.5;
    options.seed = 7;
    SimulatedRouter router(options);
    std::vector<double> bias = zeros(13);
    std::uint64_t hash = 1;
    for (int step = 0; step < 12; ++step) {
      hash = digest(router.route(bias, 1e-2, 1.25), hash);
      bias[static_cast<std::size_t>(step)] += 0.0625;
    }
    return hash;
  };
  EXPECT_EQ(bits(SimulatedGate::kSigmoid, Scenario::kNoise), 1834203243309674644U);
  EXPECT_EQ(bits(SimulatedGate::kSoftmax, Scenario::kDrift), 18038012704432880040U);
}

TEST(Simulation, LookingAtTheNextMixtureChangesNothing) {
  SimulationOptions options;
  options.mixture_spread = 1;
  SimulatedRouter looked(options), plain(options);
  for (int step = 0; step < 5; ++step) {
    looked.next_mixture();
    EXPECT_EQ(digest(looked.route(zeros(16))), digest(plain.route(zeros(16))));
  }
}

TEST(Simulation, SelectsTheLargestBiasedScores) {
  for (SimulatedGate gate : {SimulatedGate::kSoftmax, SimulatedGate::kSigmoid}) {
    for (ScoreSpace space : {ScoreSpace::kProbability, ScoreSpace::kLogit}) {
      SimulationOptions options;
      options.gate = gate;
      options.score_space = space;
      options.experts = 13;
      options.top_k = 3;
      options.tokens = 257;
      options.probabilities = true;
      options.score_scale = 3;
      SimulatedRouter router(options);
      std::vector<double> bias = zeros(13);
      for (std::size_t i = 0; i < 13; ++i) bias[i] = 0.05 * static_cast<double>(i % 5);
      const RoutingBatch batch = router.route(bias);
      for (std::size_t t = 0; t < 257; ++t) {
        const auto chosen = batch.experts.subspan(3 * t, 3);
        const auto top = batch.top_values.subspan(4 * t, 4);
        EXPECT_EQ(std::set<std::int64_t>(chosen.begin(), chosen.end()).size(), 3U);
        EXPECT_TRUE(std::is_sorted(top.rbegin(), top.rend()));
        const auto p = batch.probabilities.subspan(13 * t, 13);
        EXPECT_NEAR(std::accumulate(p.begin(), p.end(), 0.0), 1.0, 1e-5);
        if (space == ScoreSpace::kLogit || gate == SimulatedGate::kSigmoid) continue;
        // A softmax's biased scores can be formed again from its probabilities.
        std::vector<double> v(13);
        for (std::size_t i = 0; i < 13; ++i) v[i] = 3 * static_cast<double>(p[i]) + bias[i];
        std::sort(v.rbegin(), v.rend());
        for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(static_cast<double>(top[i]), v[i], 1e-5);
      }
    }
  }
}

TEST(Simulation, EveryExpertWhenKIsN) {
  SimulationOptions options;
  options.experts = 3;
  options.top_k = 3;
  options.tokens = 64;
  SimulatedRouter router(options);
  const RoutingBatch batch = router.route(zeros(3));
  EXPECT_THAT(loads(batch, 3), ::testing::Each(1.0));
  EXPECT_TRUE(batch.top_values.empty());
}

TEST(Simulation, BalancedIndependentTokensShowTheNoiseFloor) {
  SimulationOptions options;
  options.affinity_walk = options.forming = 0;  // a population that stands still: only sampling noise is left
  SimulatedRouter router(options);
  std::vector<double> bias = zeros(16);
  double cv_sq = 0;
  for (int step = 0; step < 600; ++step) {
    const RoutingBatch batch = router.route(bias);
    integrate(bias, batch, 2, step < 200 ? 0.25 : 0.02);
    if (step < 300) continue;
    for (double load : loads(batch, 16)) cv_sq += (load - 1) * (load - 1) / 16 / 300;
  }
  EXPECT_NEAR(std::sqrt(cv_sq), *noise_floor_cv(16, 2, 2048), 0.05 * 0.0585);
}

TEST(Simulation, SequencesLiftTheSamplingFloorAsTextDoes) {
  SimulationOptions options;
  options.sequence_length = 128;
  SimulatedRouter router(options);
  std::vector<double> bias = zeros(16);
  double ratio = 0;
  for (int step = 0; step < 300; ++step) {
    const RoutingBatch batch = router.route(bias);
    integrate(bias, batch, 2);
    if (step < 200) continue;
    const Metrics m = measure(stats_of(batch, 16, 2, {.sequences = true}));
    ratio += *m.sampling_floor_cv / *m.noise_floor_cv / 100;
  }
  EXPECT_GT(ratio, 2.5);
  EXPECT_LT(ratio, 4.5);
}

TEST(Simulation, UncontrolledIsAsUnbalancedAsTraining) {
  for (std::uint64_t seed : {1U, 2U, 3U}) {
    SimulationOptions options;
    options.seed = seed;
    SimulatedRouter router(options);
    double vio = 0;
    for (int step = 0; step < 500; ++step) {
      const std::vector<double> load = loads(router.route(zeros(16)), 16);
      if (step >= 400) vio += (max_of(load) - 1) / 100;
    }
    EXPECT_GT(vio, 2.5) << seed;
    EXPECT_LT(vio, 6.5) << seed;
  }
}

// The integral policy's stability limit lies where seven router types had it, 0.7 to 1.4 in units of the gap.
TEST(Simulation, CriticalGainInGaps) {
  for (SimulatedGate gate : {SimulatedGate::kSoftmax, SimulatedGate::kSigmoid}) {
    for (ScoreSpace space : {ScoreSpace::kProbability, ScoreSpace::kLogit}) {
      const auto steady_vio = [&](double gain) {
        SimulationOptions options;
        options.gate = gate;
        options.score_space = space;
        SimulatedRouter router(options);
        std::vector<double> bias = zeros(16);
        double vio = 0;
        for (int step = 0; step < 300; ++step) {
          const RoutingBatch batch = router.route(bias);
          integrate(bias, batch, 2, step < 100 ? 0.25 : gain);
          if (step >= 200) vio += (max_of(loads(batch, 16)) - 1) / 100;
        }
        return vio;
      };
      const double floor = *max_vio_of_cv(16, *noise_floor_cv(16, 2, 2048));
      EXPECT_LT(steady_vio(0.25), 1.25 * floor) << name_of(gate) << name_of(space);
      EXPECT_GT(steady_vio(2.0), 3 * floor) << name_of(gate) << name_of(space);
    }
  }
}

TEST(Simulation, AuxLossPullsTowardsBalanceAndCosts) {
  double previous_vio = 1e9, previous_cost = -1;
  for (double weight : {0.0, 1e-3, 1e-2, 1e-1}) {
    SimulationOptions options;
    SimulatedRouter router(options);
    double vio = 0;
    for (int step = 0; step < 600; ++step) {
      const std::vector<double> load = loads(router.route(zeros(16), weight), 16);
      if (step >= 500) vio += (max_of(load) - 1) / 100;
    }
    EXPECT_LT(vio, previous_vio) << weight;
    EXPECT_GT(router.displacement(), previous_cost) << weight;
    previous_vio = vio;
    previous_cost = router.displacement();
  }
}

// The pull is -aux_pull · α · ∂L/∂z_i averaged over tokens, L = N Σ f_i P_i with f held: against differences
// of L, formed from the logits that the probabilities give back.
TEST(Simulation, AuxLossGradientIsSwitchs) {
  constexpr std::size_t kN = 8, kTokens = 512;
  constexpr double kTemperature = 1.5, kWeight = 0.5;
  for (SimulatedGate gate : {SimulatedGate::kSoftmax, SimulatedGate::kSigmoid}) {
    SimulationOptions options;
    options.gate = gate;
    options.probabilities = true;
    options.task_pull = options.rich = options.affinity_walk = 0;
    options.aux_pull = 2;
    options.experts = kN;
    options.tokens = kTokens;
    SimulatedRouter router(options);
    const RoutingBatch batch = router.route(zeros(kN), kWeight, kTemperature);
    const std::vector<double> f = loads(batch, kN);  // N f_i
    const auto loss = [&](std::size_t moved, double by) {
      double sum = 0;
      for (std::size_t t = 0; t < kTokens; ++t) {
        // The largest sigmoid of the row is the first top value; a softmax's sum is 1.
        double largest = 0, total = 0, weighted = 0;
        for (std::size_t i = 0; i < kN; ++i) {
          largest = std::max(largest, static_cast<double>(batch.probabilities[kN * t + i]));
        }
        const double scale =
            gate == SimulatedGate::kSoftmax ? 1 : static_cast<double>(batch.top_values[3 * t]) / largest;
        for (std::size_t i = 0; i < kN; ++i) {
          const double y = scale * static_cast<double>(batch.probabilities[kN * t + i]);
          double odds = gate == SimulatedGate::kSoftmax ? y : y / (1 - y);
          if (i == moved) odds *= std::exp(by / kTemperature);
          const double again = gate == SimulatedGate::kSoftmax ? odds : odds / (1 + odds);
          total += again;
          weighted += f[i] * again;
        }
        sum += weighted / total;
      }
      return sum / kTokens;
    };
    double largest = 0;
    for (std::size_t i = 0; i < kN; ++i) {
      const double slope = (loss(i, 1e-3) - loss(i, -1e-3)) / 2e-3;
      const double moved = router.preferences()[i] - router.wanted_preferences()[i];
      EXPECT_NEAR(moved, -2 * kWeight * slope, 1e-5) << name_of(gate) << i;
      largest = std::max(largest, std::abs(moved));
    }
    EXPECT_GT(largest, 1e-2);
  }
}

TEST(Simulation, TemperatureMovesLoadOnlyWithJitterOrBiasInScoreSpace) {
  SimulationOptions options;
  options.score_space = ScoreSpace::kLogit;
  std::vector<double> bias = zeros(16);
  bias[3] = 0.5;
  const auto counts_at = [&](double temperature) {
    SimulatedRouter router(options);
    return loads(router.route(bias, 0, temperature), 16);
  };
  EXPECT_EQ(counts_at(1), counts_at(4));
  options.jitter = 0.5;
  EXPECT_NE(counts_at(1), counts_at(4));
  options.jitter = 0;
  options.score_space = ScoreSpace::kProbability;
  EXPECT_NE(counts_at(1), counts_at(4));
  bias[3] = 0;
  EXPECT_EQ(counts_at(1), counts_at(4));
}

TEST(Simulation, CapacityDropsTheOverflow) {
  SimulationOptions options;
  options.capacity_factor = 1.25;
  SimulatedRouter router(options);
  const RoutingBatch batch = router.route(zeros(16));
  double over = 0;
  for (double load : loads(batch, 16)) over += std::max(0.0, load - 1.25) * 256;  // capacity 320 is whole
  ASSERT_TRUE(batch.dropped.has_value());
  EXPECT_EQ(*batch.dropped, static_cast<std::int64_t>(std::lround(over)));
  EXPECT_GT(*batch.dropped, 0);
  options.capacity_factor = 0;
  EXPECT_FALSE(SimulatedRouter(options).route(zeros(16)).dropped.has_value());
}

// Favour comes from the tokens an expert was trained on. At a capacity of its share no expert gets more than that.
TEST(Simulation, DroppedTokensTrainNothing) {
  SimulationOptions options;
  options.capacity_factor = 1;
  options.task_pull = options.affinity_walk = 0;
  SimulatedRouter router(options);
  const std::vector<double> load = loads(router.route(zeros(16)), 16);
  for (std::size_t i = 0; i < 16; ++i) {
    const double moved = router.preferences()[i] - router.wanted_preferences()[i];
    EXPECT_NEAR(moved, options.rich * (std::min(load[i], 1.0) - 1), 1e-15) << i;
  }
  EXPECT_GT(max_of(load), 2);
}

TEST(Simulation, PreferencesStayInTheirBounds) {
  SimulationOptions options;
  options.rich = 2;  // so much that nothing else counts
  SimulatedRouter router(options);
  for (int step = 0; step < 40; ++step) router.route(zeros(16));
  const std::vector<double> preferences(router.preferences().begin(), router.preferences().end());
  EXPECT_EQ(max_of(preferences), 12);
  EXPECT_EQ(*std::min_element(preferences.begin(), preferences.end()), -12);
}

// With one domain no mixture varies: what is left of scenario noise is its jitter.
TEST(Simulation, NoiseJitters) {
  SimulationOptions steady, noise;
  steady.domains = noise.domains = 1;
  noise.scenario = Scenario::kNoise;
  steady.event_step = noise.event_step = 2;
  SimulatedRouter a(steady), b(noise);
  for (int step = 0; step < 4; ++step) {
    const std::uint64_t bits = digest(a.route(zeros(16)));
    if (step < 2) {
      EXPECT_EQ(digest(b.route(zeros(16))), bits);
    } else {
      EXPECT_NE(digest(b.route(zeros(16))), bits);
    }
  }
}

TEST(Simulation, NextMixtureIsTheNextBatch) {
  for (std::int64_t length : {0, 128}) {
    SimulationOptions options;
    options.sequence_length = length;
    options.mixture_spread = 1;
    options.scenario = Scenario::kShift;
    options.event_step = 10;
    SimulatedRouter router(options);
    std::set<std::vector<std::int64_t>> seen;
    for (int step = 0; step < 20; ++step) {
      const auto mixture = router.next_mixture();
      const std::vector<std::int64_t> promised(mixture.begin(), mixture.end());
      const RoutingBatch batch = router.route(zeros(16));
      std::vector<std::int64_t> got(4, 0);
      for (std::int64_t d : batch.domain_ids) ++got[static_cast<std::size_t>(d)];
      EXPECT_EQ(got, promised);
      seen.insert(got);
      EXPECT_EQ(got[3] > 0, step >= 10);  // the last domain switches on at the event
    }
    EXPECT_GT(seen.size(), 10U);
  }
}

// MaxVio of the balanced router at the last step before the event, and at the first after it.
std::pair<double, double> around_event(SimulationOptions options) {
  options.event_step = 150;
  SimulatedRouter router(options);
  std::vector<double> bias = zeros(options.experts);
  double before = 0, after = 0;
  for (int step = 0; step < 153; ++step) {
    const RoutingBatch batch = router.route(bias);
    const double vio = max_of(loads(batch, options.experts)) - 1;
    if (step >= 147 && step < 150) before += vio / 3;
    if (step >= 150) after += vio / 3;
    if (step < 149) integrate(bias, batch, options.top_k);
  }
  return {before, after};
}

TEST(Simulation, ScenariosStrikeAtTheEvent) {
  SimulationOptions options;
  options.scenario = Scenario::kSteady;
  auto [before, after] = around_event(options);
  EXPECT_LT(after, 1.5 * before);
  options.scenario = Scenario::kShift;
  std::tie(before, after) = around_event(options);
  EXPECT_GT(after, 3 * before);
  options.scenario = Scenario::kNoise;
  std::tie(before, after) = around_event(options);
  EXPECT_GT(after, 1.5 * before);
  options.scenario = Scenario::kCollapse;
  for (CollapseKind kind : {CollapseKind::kDeadThird, CollapseKind::kPoisonedBias, CollapseKind::kRunaway}) {
    options.collapse = kind;
    std::tie(before, after) = around_event(options);
    EXPECT_GT(after, 3 * before) << name_of(kind);
  }
}

TEST(Simulation, DeadSinksAsManyExpertsAsAsked) {
  SimulationOptions options;
  options.scenario = Scenario::kDead;
  options.sunk_experts = 3;
  options.event_step = 50;
  SimulatedRouter router(options);
  std::vector<double> bias = zeros(16);
  for (int step = 0; step < 50; ++step) integrate(bias, router.route(bias), 2);
  const std::vector<double> before(router.preferences().begin(), router.preferences().end());
  const std::vector<double> load = loads(router.route(bias), 16);
  EXPECT_EQ(std::count_if(load.begin(), load.end(), [](double l) { return l < 0.5; }), 3);
  int sunk = 0;
  for (std::size_t i = 0; i < 16; ++i) sunk += router.preferences()[i] < before[i] - 5.9;
  EXPECT_EQ(sunk, 3);
}

// With the lock-in of scenario collapse, an uncontrolled router runs to the stops; without, the same start heals.
TEST(Simulation, RichGetRicherLocksInACollapse) {
  SimulationOptions options;
  options.scenario = Scenario::kCollapse;
  options.collapse = CollapseKind::kColdStart;
  SimulatedRouter router(options);
  std::vector<double> load;
  for (int step = 0; step < 800; ++step) load = loads(router.route(zeros(16)), 16);
  EXPECT_GT(max_of(load), 6);  // of at most 8
  EXPECT_GT(std::count_if(load.begin(), load.end(), [](double l) { return l < 0.1; }), 4);
}

TEST(Simulation, DriftMovesWhatSteadyLeaves) {
  SimulationOptions options;
  options.event_step = 0;
  const auto travelled = [&](Scenario scenario) {
    options.scenario = scenario;
    SimulatedRouter router(options);
    const std::vector<double> start(router.wanted_preferences().begin(), router.wanted_preferences().end());
    for (int step = 0; step < 100; ++step) router.route(zeros(16));
    double square = 0;
    for (std::size_t i = 0; i < 16; ++i) square += std::pow(router.wanted_preferences()[i] - start[i], 2);
    return square / 16;
  };
  EXPECT_EQ(travelled(Scenario::kSteady), 0);
  EXPECT_GT(travelled(Scenario::kDrift), 0.05);
}

// A formed router that nothing happens to renews its affinities all the same.
TEST(Simulation, AffinitiesWalkInSteadyTimesToo) {
  SimulationOptions walking, still;
  walking.affinity_walk = 1e-3;
  still.affinity_walk = 0;
  walking.forming = still.forming = walking.rich = still.rich = 0;
  SimulatedRouter a(walking), b(still);
  double first = 0, later = 0;
  for (int step = 0; step < 101; ++step) {
    const std::vector<double> x = loads(a.route(zeros(16)), 16), y = loads(b.route(zeros(16)), 16);
    double distance = 0;
    for (std::size_t i = 0; i < 16; ++i) distance += std::abs(x[i] - y[i]) / 16;
    if (step == 0) first = distance;
    if (step == 100) later = distance;
  }
  EXPECT_EQ(first, 0);
  EXPECT_GT(later, 0.05);  // a tenth of the variance is new, and the tokens are the same
}

TEST(Simulation, RoutesWithoutAllocating) {
  SimulationOptions options;
  options.sequence_length = 128;
  options.scenario = Scenario::kDrift;
  options.event_step = 0;
  SimulatedRouter router(options);
  const std::vector<double> bias = zeros(16);
  router.route(bias, 0.01);
  EXPECT_EQ(testing::allocations_of([&] {
              for (int step = 0; step < 3; ++step) {
                router.next_mixture();
                router.route(bias, 0.01);
              }
            }),
            0);
}

TEST(Simulation, BatchSizeCanChange) {
  SimulationOptions options;
  options.sequence_length = 64;
  SimulatedRouter router(options);
  EXPECT_EQ(router.route(zeros(16)).experts.size(), 4096U);
  router.set_tokens(20480);
  const RoutingBatch batch = router.route(zeros(16));
  EXPECT_EQ(batch.experts.size(), 40960U);
  EXPECT_EQ(batch.domain_ids.size(), 20480U);
  EXPECT_THROW(router.set_tokens(100), std::invalid_argument);
}

TEST(Simulation, RejectsInvalidOptions) {
  const auto rejects = [](auto change, const std::string& name) {
    SimulationOptions options;
    change(options);
    try {
      SimulatedRouter router(options);
      ADD_FAILURE() << name << " was accepted";
    } catch (const std::invalid_argument& error) {
      EXPECT_THAT(error.what(), ::testing::HasSubstr(name + " = "));
    }
  };
  rejects([](auto& o) { o.experts = 0; }, "experts");
  rejects([](auto& o) { o.top_k = 17; }, "top_k");
  rejects([](auto& o) { o.tokens = 0; }, "tokens");
  rejects([](auto& o) { o.sequence_length = 100; }, "sequence_length");
  rejects([](auto& o) { o.scenario = Scenario::kDelay; }, "delay");
  rejects([](auto& o) { o.scenario = Scenario::kShift, o.domains = 1; }, "domains");
  rejects([](auto& o) { o.scenario = Scenario::kDead, o.sunk_experts = 16; }, "sunk_experts");
  rejects(
      [](auto& o) { o.scenario = Scenario::kCollapse, o.collapse = CollapseKind::kDeadThird, o.experts = 2; },
      "experts");
  rejects([](auto& o) { o.clusters = 3; }, "clusters");
  rejects([](auto& o) { o.layers = 4097; }, "layers");
  rejects([](auto& o) { o.tokens = (std::int64_t{1} << 26) + 1; }, "tokens");
  rejects([](auto& o) { o.layers = 1000, o.experts = 30000; }, "clusters");
  rejects([](auto& o) { o.delay = 65536; }, "delay");
  rejects([](auto& o) { o.jitter = 1e4; }, "jitter");
  rejects([](auto& o) { o.capacity_factor = INFINITY; }, "capacity_factor");
  rejects([](auto& o) { o.token_spread = std::nan(""); }, "token_spread");
  rejects([](auto& o) { o.coherence = 1.1; }, "coherence");
  rejects([](auto& o) { o.score_scale = 0; }, "score_scale");
  rejects([](auto& o) { o.forming = -1; }, "forming");
  rejects([](auto& o) { o.affinity_walk = 0.1; }, "affinity_walk");

  SimulatedRouter router{SimulationOptions{}};
  std::vector<double> bias = zeros(16);
  EXPECT_THROW(router.route(zeros(15)), std::invalid_argument);
  EXPECT_THROW(router.route(bias, -1), std::invalid_argument);
  EXPECT_THROW(router.route(bias, 0, 0), std::invalid_argument);
  bias[7] = std::nan("");
  EXPECT_THROW(router.route(bias), std::invalid_argument);
}

TEST(Simulation, NamesReadBack) {
  for (int i = 0; i < 7; ++i) {
    const auto scenario = static_cast<Scenario>(i);
    EXPECT_EQ(scenario_of(name_of(scenario)), scenario);
  }
  EXPECT_EQ(gate_of("softmax"), SimulatedGate::kSoftmax);
  EXPECT_EQ(gate_of(name_of(SimulatedGate::kSigmoid)), SimulatedGate::kSigmoid);
  EXPECT_FALSE(scenario_of("Steady").has_value());
  for (int i = 0; i < 4; ++i) {
    const auto kind = static_cast<CollapseKind>(i);
    EXPECT_EQ(collapse_of(name_of(kind)), kind);
  }
  EXPECT_FALSE(collapse_of("cold").has_value());
}

TEST(Simulation, OnlyExpertsWithATargetSink) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    SimulationOptions options{.scenario = Scenario::kDead, .event_step = 0};
    options.seed = seed;
    options.targets.assign(16, 0.0);
    options.targets[3] = options.targets[11] = 0.4;
    options.targets[7] = 0.06;
    for (std::size_t i : {0U, 1U, 2U, 4U, 5U, 6U, 8U}) options.targets[i] = 0.02;
    SimulatedRouter router(options);
    const std::vector<double> before(router.preferences().begin(), router.preferences().end());
    router.route(std::vector<double>(16, 0.0));
    for (std::size_t i = 0; i < 16; ++i) {
      const bool sunk = router.preferences()[i] < before[i] - 3;
      EXPECT_TRUE(!sunk || i == 3 || i == 11) << i << ", seed " << seed;
    }
  }
  SimulationOptions wrong;
  wrong.targets = {1};
  EXPECT_THROW(SimulatedRouter{wrong}, std::invalid_argument);
}

}  // namespace
}  // namespace moectl
