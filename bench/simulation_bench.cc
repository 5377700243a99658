// The simulated router: control steps a second. Budget: ≥ 1000 at 16 experts × 2048 tokens, k = 2, on one
// core, with the counting that a controller does (items_per_second below).
#include <benchmark/benchmark.h>

#include <vector>

#include "moectl/simulation.h"
#include "moectl/stats.h"

namespace {

void route_and_count(benchmark::State& state, moectl::SimulatedGate gate, moectl::ScoreSpace space,
                     double aux_weight) {
  moectl::SimulationOptions options;
  options.experts = static_cast<int>(state.range(0));
  options.top_k = static_cast<int>(state.range(1));
  options.tokens = state.range(2);
  options.gate = gate;
  options.score_space = space;
  moectl::SimulatedRouter router(options);
  moectl::RoutingStats stats({options.experts, options.top_k, {.gap = true}});
  const std::vector<double> bias(static_cast<std::size_t>(options.experts), 0.0);
  for (auto _ : state) {
    stats.clear();
    stats.add(router.route(bias, aux_weight));
    benchmark::DoNotOptimize(stats.counts().data());
  }
  state.SetItemsProcessed(state.iterations());
}

void sizes(benchmark::internal::Benchmark* bench) {
  bench->Args({16, 2, 2048})->Args({64, 6, 8192})->Args({256, 8, 8192})->Unit(benchmark::kMicrosecond);
}

BENCHMARK_CAPTURE(route_and_count, sigmoid, moectl::SimulatedGate::kSigmoid, moectl::ScoreSpace::kProbability,
                  0.0)
    ->Apply(sizes);
BENCHMARK_CAPTURE(route_and_count, softmax, moectl::SimulatedGate::kSoftmax, moectl::ScoreSpace::kProbability,
                  0.0)
    ->Apply(sizes);
BENCHMARK_CAPTURE(route_and_count, logit, moectl::SimulatedGate::kSigmoid, moectl::ScoreSpace::kLogit, 0.0)
    ->Apply(sizes);
BENCHMARK_CAPTURE(route_and_count, with_aux_loss, moectl::SimulatedGate::kSoftmax,
                  moectl::ScoreSpace::kProbability, 0.01)
    ->Apply(sizes);

}  // namespace
