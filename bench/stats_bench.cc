// Counting and measuring against the least that could be done: a plain loop of increments over the same
// memory.

#include "moectl/stats.h"

#include <benchmark/benchmark.h>

#include <random>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/monitor.h"

namespace moectl {
namespace {

constexpr int kExperts = 256, kTopK = 8, kTokens = 8192, kLayers = 58;

std::vector<std::int64_t> random_indices() {
  std::mt19937_64 random(1);
  std::vector<std::int64_t> indices(kTokens * kTopK);
  for (auto& index : indices) index = static_cast<std::int64_t>(random() % kExperts);
  return indices;
}

void plain_increments(benchmark::State& state) {
  const std::vector<std::int64_t> indices = random_indices();
  std::vector<std::int64_t> counts(kExperts);
  for (auto _ : state) {
    for (const std::int64_t index : indices) ++counts[static_cast<std::size_t>(index)];
    benchmark::DoNotOptimize(counts.data());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(plain_increments)->Unit(benchmark::kMicrosecond);

void record(benchmark::State& state) {
  const std::vector<std::int64_t> indices = random_indices();
  RoutingStats stats({kExperts, kTopK, {}});
  for (auto _ : state) {
    stats.add({.experts = indices});
    benchmark::DoNotOptimize(stats.flat().data());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(record)->Unit(benchmark::kMicrosecond);

void record_sequences(benchmark::State& state) {
  const std::vector<std::int64_t> indices = random_indices();
  RoutingStats stats({kExperts, kTopK, {.sequences = true}});
  for (auto _ : state) {
    stats.add({.experts = indices, .sequence_length = 1024});
    benchmark::DoNotOptimize(stats.flat().data());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(record_sequences)->Unit(benchmark::kMicrosecond);

// All load metrics of one step: `layers` layers of `experts`.
void measure(benchmark::State& state) {
  const int layers = static_cast<int>(state.range(0)), experts = static_cast<int>(state.range(1));
  std::mt19937_64 random(2);
  std::poisson_distribution<std::int64_t> load(kTokens * kTopK / kExperts);
  std::vector<RoutingStats> stats(static_cast<std::size_t>(layers), RoutingStats({experts, kTopK, {}}));
  std::vector<std::int64_t> counts(static_cast<std::size_t>(experts));
  for (RoutingStats& layer : stats) {
    std::int64_t sum = 0;
    for (auto& count : counts) sum += count = load(random);
    layer.add_counts(counts, (sum + kTopK - 1) / kTopK);
  }
  Measurer measurer(stats.front().shape(), {});
  Metrics metrics;
  for (auto _ : state) {
    for (const RoutingStats& layer : stats) {
      measurer.measure(layer, metrics);
      benchmark::DoNotOptimize(metrics);
    }
  }
}
BENCHMARK(measure)->Args({kLayers, kExperts})->Args({100, 4096})->Unit(benchmark::kMicrosecond);

// Everything there is to know: all optional sums, trends and health. To be set against measure_and_watch:
// four domains alone are four more entropies of each layer.
void measure_and_watch_everything(benchmark::State& state) {
  const StatsShape shape{kExperts,
                         kTopK,
                         {.gap = true,
                          .sequences = true,
                          .probabilities = true,
                          .gradients = true,
                          .losses = true,
                          .domain_losses = true,
                          .latencies = true,
                          .domains = 4}};
  std::mt19937_64 random(3);
  constexpr std::size_t kSample = 512;
  std::vector<std::int64_t> indices(kSample * kTopK), domains(kSample);
  for (auto& index : indices) index = static_cast<std::int64_t>(random() % kExperts);
  for (auto& domain : domains) domain = static_cast<std::int64_t>(random() % 4);
  std::vector<float> probabilities(kSample * kExperts);
  for (auto& p : probabilities) p = static_cast<float>(1 + random() % 100);
  std::vector<double> values(kExperts);
  for (auto& value : values) value = static_cast<double>(1 + random() % 100) * 1e-3;
  const std::vector<float> losses(kSample, 2.0F);
  RoutingStats stats(shape);
  stats.add({.experts = indices,
             .sequence_length = 64,
             .probabilities = probabilities,
             .domain_ids = domains,
             .dropped = 0});
  stats.add_grad_norms(values);
  stats.add_latencies(values);
  stats.add_token_losses({.experts = indices, .losses = losses, .domain_ids = domains});
  const std::vector<RoutingStats> layers(kLayers, stats);
  std::vector<LayerMonitor> monitors;
  for (int l = 0; l < kLayers; ++l) {
    monitors.emplace_back(shape, MonitorOptions{.trends = true, .health = {.bands = {{"load_cv", {0, 1}}}}});
  }
  Measurer measurer(shape, {});
  Metrics metrics;
  for (auto _ : state) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      measurer.measure(layers[l], metrics);
      monitors[l].observe(layers[l], metrics, 2.0);
      benchmark::DoNotOptimize(metrics);
    }
  }
}
BENCHMARK(measure_and_watch_everything)->Unit(benchmark::kMicrosecond);

// What every controller pays by default: load metrics, smoothing, dead experts, health.
void measure_and_watch(benchmark::State& state) {
  std::mt19937_64 random(4);
  std::poisson_distribution<std::int64_t> load(kTokens * kTopK / kExperts);
  RoutingStats stats({kExperts, kTopK, {}});
  std::vector<std::int64_t> counts(kExperts);
  std::int64_t sum = 0;
  for (auto& count : counts) sum += count = load(random);
  stats.add_counts(counts, (sum + kTopK - 1) / kTopK);
  const std::vector<RoutingStats> layers(kLayers, stats);
  std::vector<LayerMonitor> monitors;
  for (int l = 0; l < kLayers; ++l) monitors.emplace_back(stats.shape(), MonitorOptions{});
  Measurer measurer(stats.shape(), {});
  Metrics metrics;
  for (auto _ : state) {
    for (std::size_t l = 0; l < layers.size(); ++l) {
      measurer.measure(layers[l], metrics);
      monitors[l].observe(layers[l], metrics);
      benchmark::DoNotOptimize(metrics);
    }
  }
}
BENCHMARK(measure_and_watch)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace moectl
