#include "moectl/monitor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "allocation_counter.h"
#include "test_sums.h"
#include "watch/trend.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using Counts = std::vector<std::int64_t>;

Metrics observe(LayerMonitor& monitor, const Counts& counts) {
  RoutingStats stats({static_cast<int>(counts.size()), 1, {}});
  EXPECT_TRUE(stats.add_counts(counts, std::accumulate(counts.begin(), counts.end(), std::int64_t{0})));
  Metrics metrics = measure(stats);
  monitor.observe(stats, metrics);
  return metrics;
}

TEST(LayerMonitor, SmoothsTheLoadFromItsFirstValue) {
  LayerMonitor monitor({2, 1, {}}, {.ema = 0.5});
  EXPECT_THAT(monitor.smoothed_load(), ElementsAre(0, 0));
  observe(monitor, {1, 3});
  EXPECT_THAT(monitor.smoothed_load(), ElementsAre(0.25, 0.75));
  observe(monitor, {3, 1});
  EXPECT_THAT(monitor.smoothed_load(), ElementsAre(0.5, 0.5));
  observe(monitor, {4, 0});
  EXPECT_THAT(monitor.smoothed_load(), ElementsAre(0.75, 0.25));
  EXPECT_EQ(monitor.steps_observed(), 3);
}

TEST(LayerMonitor, AnExpertIsDeadAfterLongEnough) {
  LayerMonitor monitor({4, 1, {}}, {.ema = 1, .dead_fraction = 0.1, .dead_after = 3});
  for (int step = 1; step <= 5; ++step) {
    const Metrics m = observe(monitor, {100, 100, 100, 0});
    EXPECT_EQ(*m.dead_experts, step >= 3 ? 1 : 0) << step;
    EXPECT_EQ(monitor.is_dead(3), step >= 3);
    EXPECT_EQ(monitor.steps_below()[3], step);
  }
  // mean load ¼, threshold 0.025: 100 of 4000 is not under it.
  EXPECT_EQ(*observe(monitor, {1300, 1300, 1300, 100}).dead_experts, 0);
  EXPECT_EQ(monitor.steps_below()[3], 0);
}

// At ema 0.1 a load of zero falls under 1 % of the mean after ⌈ln 0.01 / ln 0.9⌉ = 44 steps, and is dead 20 steps on.
TEST(LayerMonitor, DefaultsTakeSixtyFourSteps) {
  LayerMonitor monitor({4, 1, {}}, {});
  EXPECT_EQ(*observe(monitor, {1, 1, 1, 1}).dead_experts, 0);
  int step = 1;
  while (*observe(monitor, {1, 1, 1, 0}).dead_experts == 0 && step < 1000) ++step;
  EXPECT_EQ(step, 44 + 19);
}

TEST(LayerMonitor, AStepWithoutDataChangesNothing) {
  LayerMonitor monitor({2, 1, {}}, {.ema = 0.5, .dead_after = 1});
  observe(monitor, {1, 0});
  const Metrics m = observe(monitor, {0, 0});
  EXPECT_FALSE(m.dead_experts);
  EXPECT_THAT(monitor.smoothed_load(), ElementsAre(1, 0));
  EXPECT_EQ(monitor.steps_observed(), 1);
  EXPECT_EQ(monitor.steps_below()[1], 1);
}

TEST(LayerMonitor, ContinuesBitForBitAfterLoading) {
  const StatsShape shape{3, 1, {}};
  LayerMonitor a(shape, {}), b(shape, {});
  for (int step = 0; step < 30; ++step) observe(a, {step, 7, step * step});
  StateIo out;
  a.exchange(out);
  const std::string bytes = out.bytes();
  StateIo in(bytes);
  b.exchange(in);
  in.finish();
  for (int step = 0; step < 30; ++step) {
    observe(a, {1, 2, step});
    observe(b, {1, 2, step});
  }
  EXPECT_EQ(std::vector(a.smoothed_load().begin(), a.smoothed_load().end()),
            std::vector(b.smoothed_load().begin(), b.smoothed_load().end()));
  EXPECT_EQ(std::vector(a.steps_below().begin(), a.steps_below().end()),
            std::vector(b.steps_below().begin(), b.steps_below().end()));
  EXPECT_EQ(a.steps_observed(), b.steps_observed());
  EXPECT_EQ(a.smoothed().entropy, b.smoothed().entropy);
  LayerMonitor other({4, 1, {}}, {});
  StateIo again(bytes);
  EXPECT_THROW(other.exchange(again), StateError);
  EXPECT_EQ(other.steps_observed(), 0);
}

TEST(LayerMonitor, OptionsOutOfRangeThrow) {
  const StatsShape shape{2, 1, {}};
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {0.0, 1.5, -1.0, nan}) {
    EXPECT_THROW(LayerMonitor(shape, {.ema = bad}), std::invalid_argument);
  }
  for (const double bad : {1.0, -0.1, nan}) {
    EXPECT_THROW(LayerMonitor(shape, {.dead_fraction = bad}), std::invalid_argument);
  }
  EXPECT_THROW(LayerMonitor(shape, {.dead_after = 0}), std::invalid_argument);
  EXPECT_THROW(LayerMonitor(shape, {.trend_window = 3}), std::invalid_argument);
  EXPECT_THROW(LayerMonitor(shape, {.health = {.dwell = 0}}), std::invalid_argument);
  LayerMonitor monitor(shape, {});
  EXPECT_THROW(observe(monitor, {1, 2, 3}), std::invalid_argument);
}

TEST(LayerMonitor, SmoothsEveryMetricFromItsFirstValue) {
  LayerMonitor monitor({2, 1, {}}, {.ema = 0.5});
  EXPECT_FALSE(monitor.smoothed().max_load);
  observe(monitor, {3, 1});
  EXPECT_EQ(*monitor.smoothed().max_load, 0.75);
  observe(monitor, {2, 2});
  EXPECT_EQ(*monitor.smoothed().max_load, 0.625);
  EXPECT_FALSE(monitor.smoothed().drop_rate);
}

TEST(LayerMonitor, EntropySlopeOverTheWindow) {
  LayerMonitor monitor({2, 1, {}}, {.trend_window = 4});
  EXPECT_FALSE(observe(monitor, {1, 1}).entropy_slope);
  std::vector<double> entropies = {std::log(2.0)};
  for (int step = 2; step < 10; ++step) {
    const Metrics m = observe(monitor, {step, 1});
    entropies.push_back(*m.entropy);
    if (entropies.size() > 4) entropies.erase(entropies.begin());
    EXPECT_EQ(*m.entropy_slope, *slope(entropies));
    EXPECT_LT(*m.entropy_slope, 0);
  }
}

TEST(LayerMonitor, TrendsOfEveryMetricAndItsCorrelationWithTheLoss) {
  const StatsShape shape{2, 1, {}};
  LayerMonitor monitor(shape, {.trends = true});
  for (int step = 0; step < 20; ++step) {
    RoutingStats stats(shape);
    ASSERT_TRUE(stats.add_counts(Counts{100 + step, 100 - step}, 200));
    Metrics metrics = measure(stats);
    monitor.observe(stats, metrics, 3 - 0.1 * step);
  }
  const LayerMonitor::Trend trend = monitor.trend(*find_metric("max_load"));
  EXPECT_NEAR(*trend.slope, 1.0 / 200, 1e-15);
  EXPECT_NEAR(*trend.loss_correlation, -1, 1e-12);
  EXPECT_EQ(trend.ema, monitor.smoothed().max_load);
  EXPECT_FALSE(monitor.trend(*find_metric("drop_rate")).slope);
  EXPECT_FALSE(LayerMonitor(shape, {}).trend(*find_metric("max_load")).slope);
}

// Records of a file: gradients stand in every tenth, and the first of a layer may have none.
TEST(LayerMonitor, RecordsMayHoldWhatTheFirstOneDidNot) {
  const StatsShape bare{.experts = 4, .top_k = 1, .needs = {}};
  StatsShape full = bare;
  full.needs = {.gradients = true, .losses = true, .latencies = true};
  StatsShape with_losses = bare;
  with_losses.needs = {.losses = true};
  for (const StatsShape& first : {bare, with_losses}) {
    LayerMonitor monitor(first, {}, {});
    for (const StatsShape& shape : {first, full, bare, full}) {
      RoutingStats stats(shape);
      ASSERT_TRUE(stats.add_counts(Counts{1, 2, 3, 4}, 10));
      stats.add_grad_norms(std::vector<double>{1, 2, 0, 4});  // what is not among the needs is ignored
      stats.add_latencies(std::vector<double>{1, 2, 3, 4});
      Metrics metrics = measure(stats);
      monitor.observe(stats, metrics);
    }
    EXPECT_THAT(monitor.update_frequency(), ::testing::ElementsAre(1, 1, 0, 1));
  }
}

TEST(LayerMonitor, TailSensitivityByHand) {
  const StatsShape shape{2, 1, {.latencies = true}};
  LayerMonitor monitor(shape, {});
  Metrics metrics;
  for (const std::int64_t first : {100, 120, 150, 110}) {
    RoutingStats stats(shape);
    ASSERT_TRUE(stats.add_counts(Counts{first, 200 - first}, 200));
    const double max_to_mean = static_cast<double>(first) / 100;
    ASSERT_TRUE(stats.add_latencies(std::vector<double>{1 + 2 * max_to_mean, 0.5}));
    metrics = measure(stats);
    monitor.observe(stats, metrics);
  }
  EXPECT_NEAR(*metrics.tail_sensitivity, 2, 1e-5);
  EXPECT_NEAR(*metrics.tail_correlation, 1, 1e-9);
}

TEST(LayerMonitor, UpdateFrequency) {
  const StatsShape shape{2, 1, {.gradients = true}};
  LayerMonitor monitor(shape, {});
  EXPECT_TRUE(monitor.update_frequency().empty()) << "no step yet";
  for (int step = 0; step < 4; ++step) {
    RoutingStats stats(shape);
    ASSERT_TRUE(stats.add_counts(Counts{1, 1}, 2));
    ASSERT_TRUE(stats.add_grad_norms(std::vector<double>{1, step == 0 ? 1.0 : 0.0}));
    Metrics metrics = measure(stats);
    monitor.observe(stats, metrics);
  }
  EXPECT_THAT(monitor.update_frequency(), ElementsAre(1, 0.25));
}

// As many experts as the benchmark of the whole set has, and all that can be collected.
TEST(LayerMonitor, MeasuringAndObservingEverythingAllocatesNothing) {
  constexpr std::size_t kExperts = 256, kTokens = 512;
  const StatsShape shape{kExperts, 2, every_input(4)};
  std::mt19937_64 random(12);
  Counts experts, domains;
  for (std::size_t t = 0; t < kTokens; ++t) {
    // Two experts meet often enough for a lift.
    const auto first = t % 4 == 0 ? std::int64_t{0} : static_cast<std::int64_t>(random() % kExperts);
    experts.insert(experts.end(), {first, (first + 1) % static_cast<std::int64_t>(kExperts)});
    domains.push_back(first % 4);
  }
  std::vector<float> rows(kTokens * kExperts), losses(kTokens, 2.0F), top(kTokens * 3);
  for (float& p : rows) p = static_cast<float>(random() % 100 + 1);
  for (std::size_t i = 0; i < top.size(); ++i) top[i] = static_cast<float>(3 - i % 3);
  std::vector<double> values(kExperts);
  for (double& value : values) value = static_cast<double>(random() % 1000 + 1) * 1e-3;
  RoutingStats stats(shape);
  Measurer measurer(shape, {.details = true});
  LayerMonitor monitor(shape, {.trends = true, .health = {.bands = {{"load_cv", {0, 0.1}}}}});
  Metrics metrics;
  EXPECT_EQ(testing::allocations_of([&] {
              for (int step = 0; step < 60; ++step) {
                stats.clear();
                stats.add({.experts = experts,
                           .sequence_length = 64,
                           .top_values = top,
                           .probabilities = rows,
                           .domain_ids = domains,
                           .dropped = 1,
                           .balance_loss = 1,
                           .z_loss = 9});
                stats.add_token_losses({.experts = experts, .losses = losses, .domain_ids = domains});
                stats.add_grad_norms(values);
                stats.add_latencies(values);
                for (const auto& value : RoutingStats::recorded_values()) stats.add_value(value.name, 1);
                measurer.measure(stats, metrics);
                monitor.observe(stats, metrics, 2.0);
              }
            }),
            0);
  // And it was all of it: only what is known of whole windows is absent.
  for (const MetricField& field : metric_fields()) {
    EXPECT_EQ((metrics.*field.value).has_value(),
              field.name != "max_vio_global" && field.name != "churn" && field.name != "tail_sensitivity" &&
                  field.name != "tail_correlation" && field.name != "path_efficiency")
        << field.name;
  }
}

TEST(LayerMonitor, ObservingAllocatesNothing) {
  const StatsShape shape{
      4, 1, {.probabilities = true, .gradients = true, .losses = true, .latencies = true, .domains = 2}};
  LayerMonitor monitor(shape, {.trends = true,
                               .health = {.dwell = 1,
                                          .bands = {{"load_cv", {0, 0.1}}},
                                          .phases = {{.name = "all", .bands = {{"max_load", {0, 0.1}}}}},
                                          .alerts = {{.metric = "load_cv", .above = 0.1}}}});
  RoutingStats stats(shape);
  const Counts experts = {0, 0, 0, 1}, domains = {0, 0, 1, 1};
  const std::vector<float> rows(16, 0.25F);
  const std::vector<double> ones(4, 1);
  ASSERT_TRUE(stats.add({.experts = experts, .probabilities = rows, .domain_ids = domains}));
  ASSERT_TRUE(stats.add_grad_norms(ones));
  ASSERT_TRUE(stats.add_latencies(ones));
  ASSERT_TRUE(stats.add_expert_losses(ones, Counts{1, 1, 1, 1}));
  Metrics metrics = measure(stats);
  EXPECT_EQ(testing::allocations_of([&] {
              for (int step = 0; step < 120; ++step) monitor.observe(stats, metrics, 1.0);
            }),
            0);
  EXPECT_FALSE(monitor.alerts().empty());
  EXPECT_TRUE(metrics.stagnant_experts);
}

// Targets .996, .002, .002 and 0 with dead_fraction .1: equal experts would be dead under .025, these under .0002.
TEST(LayerMonitor, AnExpertIsDeadByItsOwnTarget) {
  const StatsShape shape{4, 1, {}};
  const MetricsOptions metrics{.targets = {0.996, 0.002, 0.002, 0}};
  LayerMonitor monitor(shape, {.ema = 1, .dead_fraction = 0.1, .dead_after = 3}, metrics);
  const auto dead = [&](const Counts& counts) {
    RoutingStats stats(shape);
    EXPECT_TRUE(stats.add_counts(counts, std::accumulate(counts.begin(), counts.end(), std::int64_t{0})));
    Metrics m = measure(stats, metrics);
    monitor.observe(stats, m);
    return *m.dead_experts;
  };
  for (int t = 0; t < 5; ++t)
    EXPECT_EQ(dead({9997, 2, 1, 0}), t < 2 ? 0 : 1) << t;  // .0001 is under, .0002 is not
  EXPECT_TRUE(monitor.is_dead(2));
  for (int t = 0; t < 5; ++t) EXPECT_EQ(dead({9980, 20, 0, 0}), 1);
  for (int t = 0; t < 5; ++t) dead({10000, 0, 0, 0});
  EXPECT_TRUE(monitor.is_dead(1));
  EXPECT_FALSE(monitor.is_dead(3));  // its target is 0
  EXPECT_EQ(monitor.steps_below()[3], 0);
}

TEST(LayerMonitor, ExpertsWithTargetZeroAreNotStagnant) {
  const StatsShape shape{3, 1, {.gradients = true, .losses = true}};
  const std::vector<double> norms = {1, 1, 0}, losses = {100, 100, 0};
  const std::vector<std::int64_t> counts = {50, 50, 0};
  for (const bool wanted : {true, false}) {
    const MetricsOptions metrics{.targets = {0.5, wanted ? 0.499 : 0.5, wanted ? 0.001 : 0.0}};
    LayerMonitor monitor(shape, {.dead_fraction = 0, .trend_window = 4}, metrics);
    Metrics m;
    for (int t = 0; t < 20; ++t) {
      RoutingStats stats(shape);
      ASSERT_TRUE(stats.add_counts(counts, 100));
      ASSERT_TRUE(stats.add_grad_norms(norms));
      ASSERT_TRUE(stats.add_expert_losses(losses, counts));
      m = measure(stats, metrics);
      monitor.observe(stats, m);
    }
    EXPECT_EQ(m.stagnant_experts, wanted ? 1 : 0);
  }
}

// The slowest expert takes as many seconds as the largest load is even loads, whatever its target.
TEST(LayerMonitor, TheTailFollowsTheLoadAsSuch) {
  const StatsShape shape{2, 1, {.latencies = true}};
  const MetricsOptions options{.targets = {0.75, 0.25}};
  LayerMonitor monitor(shape, {}, options);
  Metrics m;
  for (const std::int64_t first : {50, 75, 60, 90}) {
    RoutingStats stats(shape);
    ASSERT_TRUE(stats.add_counts(Counts{first, 100 - first}, 100));
    ASSERT_TRUE(stats.add_latencies(std::vector<double>{static_cast<double>(first) / 50, 0.5}));
    m = measure(stats, options);
    monitor.observe(stats, m);
  }
  EXPECT_NEAR(*m.tail_sensitivity, 1, 1e-5);
  EXPECT_NEAR(*m.tail_correlation, 1, 1e-9);
}

}  // namespace
}  // namespace moectl
