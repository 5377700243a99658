#include "watch/health.h"
#include "watch/watch_fields.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <numeric>
#include <random>

#include "moectl/monitor.h"

namespace moectl {
namespace {

std::string check_health(const HealthOptions& options) {
  return text_of(problem_in(options));
}

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Not;
using Counts = std::vector<std::int64_t>;

// A monitor fed with loads.
class Watched {
 public:
  explicit Watched(HealthOptions health = {}, StatsShape shape = {16, 2, {}}, MetricsOptions metrics = {})
      : shape_(shape),
        metrics_options_(std::move(metrics)),
        monitor_(shape, {.trends = true, .health = std::move(health)}, metrics_options_) {}
  void step(const Counts& counts) {
    RoutingStats stats(shape_);
    std::int64_t sum = 0;
    for (const auto c : counts) sum += c;
    ASSERT_TRUE(stats.add_counts(counts, (sum + shape_.top_k - 1) / shape_.top_k));
    step(stats);
  }
  void step(const RoutingStats& stats) {
    metrics_ = measure(stats, metrics_options_);
    monitor_.observe(stats, metrics_);
    transitions_ += monitor_.health() != last_;
    last_ = monitor_.health();
  }
  LayerMonitor& monitor() { return monitor_; }
  const StatsShape& shape() const { return shape_; }
  Health health() const { return monitor_.health(); }
  int transitions() const { return transitions_; }
  std::vector<std::string> alerts() const { return {monitor_.alerts().begin(), monitor_.alerts().end()}; }

 private:
  StatsShape shape_;
  MetricsOptions metrics_options_;
  LayerMonitor monitor_;
  Metrics metrics_;
  Health last_ = Health::kNoData;
  int transitions_ = 0;
};

// Poisson counts about a mean of 256 an expert, in proportion to `share`.
Counts sampled(const std::vector<double>& share, std::mt19937_64& random) {
  Counts counts;
  for (const double s : share) {
    counts.push_back(s > 0 ? std::poisson_distribution<std::int64_t>(4096 * s)(random) : 0);
  }
  return counts;
}

/// Tokens with two experts each.
std::int64_t tokens_of(const Counts& counts) {
  return (std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) + 1) / 2;
}

std::vector<double> uniform() {
  return std::vector<double>(16, 1.0 / 16);
}

void run(Watched& watched, const std::vector<double>& share, int steps, std::mt19937_64& random) {
  for (int t = 0; t < steps; ++t) watched.step(sampled(share, random));
}

// ---- States ----

TEST(FieldCases, D3_HealthStatesHaveOneOrderOfSeverity) {
  // What reports call the worst of several.
  constexpr std::string_view kNames[] = {"no_data",    "healthy",     "weak_specialization", "stagnant",
                                         "imbalanced", "oscillating", "collapsing",          "collapsed"};
  ASSERT_EQ(std::size(kNames), std::size_t{kHealthCount});
  for (int h = 0; h < kHealthCount; ++h) {
    EXPECT_EQ(name_of(static_cast<Health>(h)), kNames[h]);
    EXPECT_EQ(health_of(kNames[h]), static_cast<Health>(h));
  }
  EXPECT_EQ(health_of("well"), std::nullopt);
}

TEST(Health, BalancedIsHealthy) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    std::mt19937_64 random(seed);
    Watched watched;
    EXPECT_EQ(watched.health(), Health::kNoData);
    for (int t = 0; t < 300; ++t) {
      watched.step(sampled(uniform(), random));
      ASSERT_EQ(watched.health(), Health::kHealthy) << seed << " " << t;
      ASSERT_THAT(watched.alerts(), IsEmpty()) << seed << " " << t;
    }
  }
}

TEST(Health, ImbalanceCollapseAndRecovery) {
  std::mt19937_64 random(1);
  Watched watched;
  run(watched, uniform(), 50, random);
  std::vector<double> skewed(16, 0.5 / 14);  // two experts at a quarter each: CV 1.3
  skewed[0] = skewed[1] = 0.25;
  run(watched, skewed, 60, random);
  EXPECT_EQ(watched.health(), Health::kImbalanced);
  std::vector<double> two(16, 0.002);  // the least that k = 2 allows, nearly
  two[0] = two[1] = 0.486;
  run(watched, two, 60, random);
  EXPECT_EQ(watched.health(), Health::kCollapsed);
  EXPECT_TRUE(watched.monitor().has(FailureMode::kExpertCollapse));
  EXPECT_THAT(watched.alerts(), Contains("expert_collapse"));
  run(watched, uniform(), 150, random);
  EXPECT_EQ(watched.health(), Health::kHealthy);
  EXPECT_THAT(watched.alerts(), IsEmpty());
}

TEST(Health, FallingEntropyIsCollapsingBeforeItIsCollapsed) {
  std::mt19937_64 random(2);
  Watched watched;
  int collapsing_at = -1, collapsed_at = -1;
  for (int t = 0; t < 400; ++t) {
    std::vector<double> share(16);
    double sum = 0;
    for (std::size_t i = 0; i < 16; ++i) sum += share[i] = std::exp(-static_cast<double>(i) * 0.004 * t);
    for (double& s : share) s /= sum;
    watched.step(sampled(share, random));
    if (collapsing_at < 0 && watched.health() == Health::kCollapsing) collapsing_at = t;
    if (collapsed_at < 0 && watched.health() == Health::kCollapsed) collapsed_at = t;
  }
  EXPECT_GT(collapsing_at, 0);
  EXPECT_GT(collapsed_at, collapsing_at + 20);
}

TEST(Health, OscillationIsNamed) {
  for (const int half_period : {1, 2, 4, 8}) {
    std::mt19937_64 random(3);
    Watched watched;
    for (int t = 0; t < 200; ++t) {
      std::vector<double> share = uniform();
      const double swing = t / half_period % 2 == 0 ? 0.4 : -0.4;
      for (std::size_t i = 0; i < 16; ++i) share[i] *= 1 + (i % 2 == 0 ? swing : -swing);
      watched.step(sampled(share, random));
    }
    EXPECT_EQ(watched.health(), Health::kOscillating) << half_period;
    EXPECT_THAT(watched.alerts(), ElementsAre("routing_oscillation")) << half_period;
  }
}

// Every period from 2 to 6, of the roundest and of the sharpest shape, around a circle of experts.
TEST(Health, OscillationsOfEveryShortPeriodAreNamed) {
  for (const bool pulse : {false, true}) {
    for (int period = 2; period <= 6; ++period) {
      std::mt19937_64 random(static_cast<std::uint64_t>(period));
      Watched watched;
      for (int t = 0; t < 200; ++t) {
        std::vector<double> share = uniform();
        double sum = 0;
        for (std::size_t i = 0; i < 16; ++i) {
          const int phase = (t + static_cast<int>(i)) % period;
          sum += share[i] *=
              pulse ? (phase == 0 ? 2.5 : 1) : 1 + 0.4 * std::cos(2 * std::numbers::pi * phase / period);
        }
        for (double& s : share) s /= sum;
        watched.step(sampled(share, random));
      }
      EXPECT_EQ(watched.health(), Health::kOscillating) << period << (pulse ? " pulses" : " cosines");
      EXPECT_THAT(watched.alerts(), ElementsAre("routing_oscillation")) << period;
    }
  }
}

TEST(Health, DeadExpertsAreASilentLossOfCapacity) {
  std::mt19937_64 random(4);
  Watched watched;
  std::vector<double> one_dead(16, 1.0 / 15);
  one_dead[7] = 0;
  run(watched, one_dead, 60, random);
  EXPECT_EQ(watched.health(), Health::kImbalanced);  // MaxVio shows nothing: by the CV
  EXPECT_THAT(watched.alerts(), ElementsAre("silent_capacity_loss"));
}

TEST(Health, DroppedTokensAreASilentLossOfCapacity) {
  std::mt19937_64 random(5);
  Watched watched;
  for (int t = 0; t < 60; ++t) {
    RoutingStats stats(watched.shape());
    const Counts counts = sampled(uniform(), random);
    ASSERT_TRUE(stats.add_counts(counts, tokens_of(counts)));
    stats.set_scalar(RoutingStats::kDropTokens, stats.tokens());
    stats.set_scalar(RoutingStats::kDropped, 300);  // 7 %
    watched.step(stats);
  }
  EXPECT_THAT(watched.alerts(), ElementsAre("silent_capacity_loss"));
}

TEST(Health, ExpertsThatServeOneDomainAreBrittle) {
  for (const bool exclusive : {true, false}) {
    std::mt19937_64 random(6);
    Watched watched({}, {16, 2, {.domains = 4}});
    for (int t = 0; t < 60; ++t) {
      RoutingStats stats(watched.shape());
      Counts experts, domains;
      for (int token = 0; token < 2048; ++token) {
        const auto domain = static_cast<std::int64_t>(random() % 4);
        const std::int64_t base = exclusive ? domain * 4 : static_cast<std::int64_t>(random() % 4) * 4;
        const auto first = static_cast<std::int64_t>(random() % 4);
        experts.insert(experts.end(), {base + first, base + (first + 1) % 4});
        domains.push_back(domain);
      }
      ASSERT_TRUE(stats.add({.experts = experts, .domain_ids = domains}));
      watched.step(stats);
    }
    if (exclusive) {
      EXPECT_THAT(watched.alerts(), ElementsAre("brittle_specialization"));
    } else {
      EXPECT_THAT(watched.alerts(), IsEmpty());
    }
  }
}

TEST(Health, ASlowExpertIsABottleneck) {
  std::mt19937_64 random(7);
  Watched watched({}, {16, 2, {.latencies = true}});
  for (int t = 0; t < 60; ++t) {
    RoutingStats stats(watched.shape());
    const Counts counts = sampled(uniform(), random);
    ASSERT_TRUE(stats.add_counts(counts, tokens_of(counts)));
    std::vector<double> seconds(16, 1e-3);
    seconds[9] = 5e-3;
    ASSERT_TRUE(stats.add_latencies(seconds));
    watched.step(stats);
  }
  EXPECT_THAT(watched.alerts(), ElementsAre("inference_bottleneck"));
}

TEST(Health, AnExpertWithTokensButWithoutLearningIsStagnant) {
  std::mt19937_64 random(8);
  Watched watched({}, {16, 2, {.gradients = true, .losses = true}});
  for (int t = 0; t < 120; ++t) {
    RoutingStats stats(watched.shape());
    const Counts counts = sampled(uniform(), random);
    ASSERT_TRUE(stats.add_counts(counts, tokens_of(counts)));
    std::vector<double> norms(16, 1.0), losses(16);
    norms[5] = 0.001;
    for (std::size_t i = 0; i < 16; ++i) {
      losses[i] = static_cast<double>(counts[i]) * (i == 5 ? 3.0 : 3.0 - 0.01 * t);
    }
    ASSERT_TRUE(stats.add_grad_norms(norms));
    ASSERT_TRUE(stats.add_expert_losses(losses, counts));
    watched.step(stats);
  }
  EXPECT_EQ(watched.health(), Health::kStagnant);
}

TEST(Health, WeakSpecializationOnlyWhenAskedFor) {
  for (const bool asked : {true, false}) {
    std::mt19937_64 random(9);
    Watched watched({.weak_specialization = asked}, {16, 2, {.domains = 2}});
    for (int t = 0; t < 60; ++t) {
      RoutingStats stats(watched.shape());
      Counts experts, domains;
      for (int token = 0; token < 2048; ++token) {
        const auto first = static_cast<std::int64_t>(random() % 16);
        experts.insert(experts.end(), {first, (first + 1) % 16});
        domains.push_back(token % 2);
      }
      ASSERT_TRUE(stats.add({.experts = experts, .domain_ids = domains}));
      watched.step(stats);
    }
    EXPECT_EQ(watched.health(), asked ? Health::kWeakSpecialization : Health::kHealthy);
  }
}

// In at .05 nats of what the token, or its domain, says of the expert; out at .1.
TEST(Health, WeakSpecializationIsLeftLaterThanItIsEntered) {
  for (const auto which : {&Metrics::expert_token_information, &Metrics::domain_information}) {
    const auto state_after = [which](std::vector<double> information) {
      HealthMonitor monitor({.experts = 16, .top_k = 2, .needs = {}},
                            {.dwell = 2, .weak_specialization = true});
      Metrics metrics;
      metrics.entropy_normalized = 0.99;
      std::int64_t step = 0;
      for (const double nats : information) {
        metrics.*which = nats;
        for (int i = 0; i < 5; ++i) monitor.observe(step++, &metrics, metrics, 0);
      }
      return monitor.state();
    };
    EXPECT_EQ(state_after({0.04}), Health::kWeakSpecialization);
    EXPECT_EQ(state_after({0.07}), Health::kHealthy);
    EXPECT_EQ(state_after({0.04, 0.07}), Health::kWeakSpecialization);
    EXPECT_EQ(state_after({0.04, 0.11}), Health::kHealthy);
  }
}

TEST(Health, LongWithoutDataIsNoData) {
  std::mt19937_64 random(10);
  Watched watched;
  run(watched, uniform(), 30, random);
  for (int t = 0; t < 19; ++t) watched.monitor().observe_nothing();
  EXPECT_EQ(watched.health(), Health::kHealthy);
  watched.monitor().observe_nothing();
  EXPECT_EQ(watched.health(), Health::kNoData);
  run(watched, uniform(), 1, random);
  EXPECT_EQ(watched.health(), Health::kHealthy);
}

// ---- It never flaps ----

TEST(Health, NoiseAroundAThresholdMakesOneTransitionADwellAtMost) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    const int dwell = 20, steps = 2000;
    Watched watched({.dwell = dwell});
    std::vector<std::int64_t> changes;
    Health last = watched.health();
    for (int t = 0; t < steps; ++t) {
      // Two experts whose share walks about the edge of "imbalanced".
      const double share = std::clamp(0.21 + 0.08 * normal(random), 0.05, 0.45);
      std::vector<double> p(16, (1 - 2 * share) / 14);
      p[0] = p[1] = share;
      watched.step(sampled(p, random));
      if (watched.health() != last) changes.push_back(t);
      last = watched.health();
    }
    for (std::size_t i = 2; i < changes.size(); ++i) EXPECT_GE(changes[i] - changes[i - 1], dwell) << seed;
  }
}

TEST(Latch, WaitsPersistsAndDwells) {
  Latch latch;
  for (int t = 0; t < 3; ++t) EXPECT_FALSE(latch.update(true, false, 4, 10));
  EXPECT_FALSE(latch.update(false, true, 4, 10));  // the run is broken
  for (int t = 0; t < 3; ++t) EXPECT_FALSE(latch.update(true, false, 4, 10));
  EXPECT_TRUE(latch.update(true, false, 4, 10));
  for (int t = 0; t < 9; ++t) EXPECT_TRUE(latch.update(false, true, 4, 10)) << t;
  EXPECT_FALSE(latch.update(false, true, 4, 10));
}

TEST(Latch, NeverChangesTwiceInADwell) {
  std::mt19937_64 random(11);
  for (const int after : {1, 3, 20}) {
    Latch latch;
    int last_change = -1000;
    bool on = false;
    for (int t = 0; t < 20000; ++t) {
      const bool enter = random() % 8 < 7;
      latch.update(enter, random() % 8 < 7, after, 20);
      if (latch.on() == on) continue;
      EXPECT_GE(t - last_change, 20);
      last_change = t;
      on = latch.on();
    }
    EXPECT_GT(last_change, 0);
  }
}

// ---- Alerts, bands, phases ----

TEST(Health, AlertsFollowTheirRules) {
  Watched watched({.dwell = 5,
                   .alerts = {{.name = "severe_imbalance", .metric = "load_cv", .above = 1.0, .for_steps = 3},
                              {.metric = "max_load", .above = 0.4},
                              {.metric = "entropy_normalized", .below = 0.5}}});
  Counts skewed(16, 10), even(16, 100);
  skewed[0] = 150;  // CV 1.8, max_load .5
  watched.step(even);
  EXPECT_THAT(watched.alerts(), IsEmpty());
  watched.step(skewed);
  EXPECT_THAT(watched.alerts(), ElementsAre("max_load above 0.4"));
  watched.step(skewed);
  EXPECT_THAT(watched.alerts(), Not(Contains("severe_imbalance")));
  watched.step(skewed);
  EXPECT_THAT(watched.alerts(), ElementsAre("severe_imbalance", "max_load above 0.4"));
  for (int t = 0; t < 10; ++t) watched.step(even);
  EXPECT_THAT(watched.alerts(), IsEmpty());
}

TEST(Health, AlertsBeginAtTheirStep) {
  Watched watched({.dwell = 5, .alerts = {{.metric = "max_load", .above = 0.4, .after = 2}}});
  Counts skewed(16, 10);
  skewed[0] = 150;
  for (int t = 0; t < 4; ++t) {
    watched.step(skewed);
    EXPECT_EQ(watched.alerts().size(), t < 2 ? 0U : 1U) << t;
  }
}

// The slope counts after two dwells of data, also of data from before a resume.
TEST(Health, ASavedMonitorDetectsACollapseAsEarly) {
  const auto load = [](int t) {
    Counts counts(16, 4000 - 80 * t);
    counts[0] = counts[1] = counts[2] = counts[3] = 4000 + 240 * t;
    return counts;
  };
  const HealthOptions options = {.dwell = 10};
  bool collapsing = false;
  for (const int saved_at : {18, 22, 26, 30}) {
    Watched straight(options), resumed(options);
    for (int t = 0; t < 48; ++t) {
      if (t == saved_at) {
        StateIo out;
        straight.monitor().exchange(out);
        const std::string bytes = out.bytes();
        StateIo in(bytes);
        resumed.monitor().exchange(in);
      }
      straight.step(load(t));
      if (t >= saved_at) {
        resumed.step(load(t));
        EXPECT_EQ(straight.health(), resumed.health()) << saved_at << ", " << t;
      }
    }
    collapsing |= straight.health() == Health::kCollapsing;
  }
  EXPECT_TRUE(collapsing);
}

TEST(Health, BandsFollowThePhase) {
  const HealthOptions options = {.dwell = 2,
                                 .bands = {{"load_cv", {0, 2.0}}, {"gini", {0, 1}}},
                                 .phases = {{.name = "early", .until = 10, .bands = {{"load_cv", {0, 0.5}}}},
                                            {.name = "mid", .until = 20, .bands = {}},
                                            {.name = "late", .bands = {{"load_cv", {0, 0.5}}}}}};
  EXPECT_EQ(bands_at(options, 0).at("load_cv").high, 0.5);
  EXPECT_EQ(bands_at(options, 9).at("load_cv").high, 0.5);
  EXPECT_EQ(bands_at(options, 10).at("load_cv").high, 2.0);
  EXPECT_EQ(bands_at(options, 20).at("load_cv").high, 0.5);
  EXPECT_EQ(bands_at(options, 20).size(), 2U);
  Watched watched(options);
  Counts skewed(16, 10);
  skewed[0] = skewed[1] = 40;  // CV .72
  for (int t = 0; t < 30; ++t) {
    watched.step(skewed);
    EXPECT_EQ(watched.monitor().phase(), t < 10 ? "early" : t < 20 ? "mid" : "late") << t;
    const bool broken = (t >= 1 && t < 11) || t >= 21;
    EXPECT_EQ(watched.alerts().empty(), !broken) << t;
    if (broken) {
      EXPECT_THAT(watched.alerts(), ElementsAre("band:load_cv"));
    }
  }
}

TEST(Health, WrongOptionsAreNamed) {
  EXPECT_EQ(check_health({}), "");
  EXPECT_EQ(check_health({.dwell = 0}), "dwell: 0: must be at least 1");
  EXPECT_EQ(check_health({.bands = {{"load_cvv", {0, 1}}}}), "bands.load_cvv: load_cvv: must be a metric");
  EXPECT_EQ(check_health({.bands = {{"load_cv", {1, 0}}}}), "bands.load_cv: [1, 0]: must be ascending");
  EXPECT_EQ(check_health({.phases = {{.until = 5}, {.until = 5}}}), "phases[1].until: 5: must be above 5");
  EXPECT_EQ(check_health({.phases = {{}, {}}}),
            "phases[0].until: missing: must be given in all phases but the last");
  EXPECT_EQ(check_health({.alerts = {{.metric = "load_cv"}}}),
            "alerts[0]: load_cv: must have either above or below");
  EXPECT_EQ(check_health({.alerts = {{.metric = "cv", .above = 1.0}}}),
            "alerts[0].metric: cv: must be a metric");
  EXPECT_EQ(check_health({.alerts = {{.metric = "load_cv", .above = 1.0, .for_steps = 0}}}),
            "alerts[0].for: 0: must be at least 1");
  EXPECT_THROW(Watched({.dwell = 0}), std::invalid_argument);
}

TEST(Health, ContinuesBitForBitAfterLoading) {
  std::mt19937_64 random(12);
  const HealthOptions options = {
      .dwell = 7, .bands = {{"load_cv", {0, 0.1}}}, .alerts = {{.metric = "max_vio", .above = 0.2}}};
  Watched a(options), b(options);
  std::vector<double> skewed(16, 0.5 / 14);
  skewed[0] = skewed[1] = 0.25;
  run(a, skewed, 33, random);
  StateIo out;
  a.monitor().exchange(out);
  const std::string bytes = out.bytes();
  StateIo in(bytes);
  b.monitor().exchange(in);
  in.finish();
  for (int t = 0; t < 100; ++t) {
    const Counts counts = sampled(uniform(), random);
    a.step(counts);
    b.step(counts);
    ASSERT_EQ(a.health(), b.health()) << t;
    ASSERT_EQ(a.alerts(), b.alerts()) << t;
  }
}

// ---- Review of the auxiliary loss ----

TEST(AuxLossReview, Verdicts) {
  using Verdict = AuxLossReview::Verdict;
  const auto verdict = [](std::size_t n, double first, double last, double excess_sq, double excess_sq_at_low,
                          bool healthy) {
    std::vector<AuxLossSample> samples;
    for (std::size_t i = 0; i < n; ++i) {
      const double weight = i < n / 2 ? first : last;
      samples.push_back({weight, weight < first ? excess_sq_at_low : excess_sq, healthy || i % 4 != 0});
    }
    return review_aux_loss(samples).verdict;
  };
  EXPECT_EQ(verdict(199, .01, .01, 0, 0, true), Verdict::kNotEnoughEvidence);
  EXPECT_EQ(verdict(400, 0, 0, 0, 0, true), Verdict::kAlreadyOff);
  EXPECT_EQ(verdict(400, .01, .01, 0.36, 0, true), Verdict::kRaise);
  EXPECT_EQ(verdict(400, .01, .01, 0.04, 0, true), Verdict::kKeep);
  EXPECT_EQ(verdict(400, .01, .01, 0, 0, false), Verdict::kKeep);
  EXPECT_EQ(verdict(400, .01, .01, 0.0025, 0, true), Verdict::kLower);
  EXPECT_EQ(verdict(400, .01, .002, 0.0025, 0.0025, true), Verdict::kSwitchOff);
  EXPECT_EQ(verdict(400, .01, 0, 0.0025, 0.0025, true), Verdict::kSwitchOff);
  EXPECT_EQ(verdict(400, .01, .002, -0.03, 0.03, true), Verdict::kLower);  // rose as the weight fell
}

// ---- Unequal targets. ----

// Two experts have a target of 0.45 each: entropy 1.21 of the 2.77 of 16 equal ones, a quarter of the way from ln 2,
// and the busiest device does 7.2 times the mean.
const std::vector<double> kTwoCarry = [] {
  std::vector<double> targets(16, 0.1 / 14);
  targets[0] = targets[1] = 0.45;
  return targets;
}();

TEST(HealthWithTargets, TheSameLoadIsHealthyOnTargetAndCollapsedWithoutTargets) {
  std::mt19937_64 random(31);
  Watched wanted({}, {16, 2, {}}, {.targets = kTwoCarry}), unasked;
  for (int t = 0; t < 200; ++t) {
    const Counts counts = sampled(kTwoCarry, random);
    wanted.step(counts);
    unasked.step(counts);
    EXPECT_EQ(wanted.health(), Health::kHealthy) << t;
  }
  EXPECT_TRUE(wanted.alerts().empty()) << wanted.alerts()[0];
  EXPECT_EQ(unasked.health(), Health::kCollapsed);
  EXPECT_TRUE(unasked.monitor().has(FailureMode::kInferenceBottleneck));
}

// All of it on the two: their own targets are nearly met, and fourteen experts are dead.
TEST(HealthWithTargets, ACollapseIsDetectedWithUnequalTargets) {
  Watched watched({}, {16, 2, {}}, {.targets = kTwoCarry});
  Counts counts(16, 0);
  counts[0] = counts[1] = 2048;
  for (int t = 0; t < 200; ++t) watched.step(counts);
  EXPECT_EQ(watched.health(), Health::kCollapsed);
  // By the entropy alone, ln 2 of 1.21: with a few tokens to each of the others no expert is dead.
  Watched alive({}, {16, 2, {}}, {.targets = kTwoCarry});
  for (std::size_t i = 2; i < 16; ++i) counts[i] = 2;
  for (int t = 0; t < 200; ++t) alive.step(counts);
  EXPECT_EQ(alive.health(), Health::kCollapsed);
  EXPECT_FALSE(alive.monitor().has(FailureMode::kSilentCapacityLoss));
}

// Five of sixteen have target 0 and no tokens: none of these is dead, and 3 dead of 11 are more than a quarter.
TEST(HealthWithTargets, ExpertsWithTargetZeroAreNotDead) {
  std::vector<double> targets(16, 1.0 / 11);
  for (std::size_t i = 0; i < 5; ++i) targets[i] = 0;
  Counts counts(16, 100);
  for (std::size_t i = 0; i < 5; ++i) counts[i] = 0;
  Watched watched({}, {16, 2, {}}, {.targets = targets}), unasked;
  for (int t = 0; t < 200; ++t) {
    watched.step(counts);
    unasked.step(counts);
  }
  EXPECT_EQ(watched.health(), Health::kHealthy);
  EXPECT_TRUE(watched.alerts().empty());
  EXPECT_EQ(unasked.health(), Health::kCollapsed);
  for (std::size_t i = 13; i < 16; ++i) counts[i] = 0;
  for (int t = 0; t < 200; ++t) watched.step(counts);
  EXPECT_NEAR(*watched.monitor().smoothed().dead_experts, 3, 1e-3);
  EXPECT_EQ(watched.health(), Health::kCollapsed);
}

// Entropy .8 of ln N on target: a router that stands there and is uninformative about them is weakly specialised.
TEST(HealthWithTargets, WeakSpecializationIsRelativeToTheTargets) {
  StatsShape shape{4, 1, {.probabilities = true}};
  const std::vector<double> targets = {0.625, 0.125, 0.125, 0.125};
  Watched watched({.weak_specialization = true}, shape, {.targets = targets}),
      unasked({.weak_specialization = true}, shape);
  RoutingStats stats(shape);
  const std::vector<std::int64_t> experts = {0, 0, 0, 0, 0, 1, 2, 3};
  std::vector<float> rows;
  for (int t = 0; t < 8; ++t) rows.insert(rows.end(), {0.625F, 0.125F, 0.125F, 0.125F});
  stats.add({.experts = experts, .probabilities = rows});
  for (int t = 0; t < 100; ++t) {
    watched.step(stats);
    unasked.step(stats);
  }
  EXPECT_EQ(watched.health(), Health::kWeakSpecialization);
  EXPECT_NE(unasked.health(), Health::kWeakSpecialization);
}

}  // namespace
}  // namespace moectl
