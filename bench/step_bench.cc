// Controller::step with adaptive_bias: reduce, all load metrics, monitor, policy, safety and the record in
// memory.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>
#include <vector>

#include "moectl/controller.h"

namespace moectl {
namespace {

// Loads with a spread of `skew` and a gap as a sigmoid gate shows it, new every step.
std::vector<RoutingStats> make_steps(const StatsShape& shape, int layers, double skew) {
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  std::vector<RoutingStats> stats;
  for (int i = 0; i < 4 * layers; ++i) {
    RoutingStats& one = stats.emplace_back(shape);
    std::vector<std::int64_t> counts(static_cast<std::size_t>(shape.experts));
    std::int64_t total = 0;
    for (auto& c : counts) total += c = std::llround(2048 * std::exp(skew * normal(random)));
    counts[0] += (shape.top_k - total % shape.top_k) % shape.top_k;
    total += (shape.top_k - total % shape.top_k) % shape.top_k;
    one.add_counts(counts, total / shape.top_k);
    one.set_scalar(RoutingStats::kGapSum, to_fixed(0.01) * (total / shape.top_k));
    one.set_scalar(RoutingStats::kGapTokens, total / shape.top_k);
  }
  return stats;
}

void run(benchmark::State& state, const char* policy, double skew, double rate) {
  ControllerConfig config;
  config.model.layers = static_cast<int>(state.range(0));
  config.model.experts = static_cast<int>(state.range(1));
  config.model.top_k = 8;
  config.expert_bias.policy = policy;
  config.expert_bias.limits = {.min = -1000, .max = 1000, .rate = rate, .center = true};
  Controller controller(config);
  const int layers = config.model.layers;
  const std::vector<RoutingStats> steps = make_steps(controller.shape(0), layers, skew);
  std::size_t next = 0;
  for (auto _ : state) {
    state.PauseTiming();
    for (int l = 0; l < layers; ++l) controller.record(l, steps[next++ % steps.size()]);
    state.ResumeTiming();
    benchmark::DoNotOptimize(controller.step().layers.data());
  }
  state.SetItemsProcessed(state.iterations() * state.range(0) * state.range(1));
}

void BM_Step(benchmark::State& state) {
  run(state, "adaptive_bias", 0.1, 100);
}
BENCHMARK(BM_Step)
    ->ArgNames({"layers", "experts"})
    ->Args({58, 256})
    ->Args({58, 1024})
    ->Args({100, 4096})
    ->Unit(benchmark::kMicrosecond);

// The rate limit acts on every layer, so that centring has to be solved for.
void BM_StepLimited(benchmark::State& state) {
  run(state, "adaptive_bias", 1.0, 1e-5);
}
BENCHMARK(BM_StepLimited)->ArgNames({"layers", "experts"})->Args({58, 256})->Unit(benchmark::kMicrosecond);

void BM_StepSign(benchmark::State& state) {
  run(state, "sign_bias", 0.1, 100);
}
BENCHMARK(BM_StepSign)->ArgNames({"layers", "experts"})->Args({58, 256})->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace moectl
