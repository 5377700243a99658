// Controller::step on layers whose load answers: all load metrics, monitor, policy, limits and the record in memory.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "moectl/controller.h"
#include "step_plant.h"

namespace moectl {
namespace {

ControllerConfig config_of(const benchmark::State& state, const char* policy, double rate) {
  ControllerConfig config;
  config.model.layers = static_cast<int>(state.range(0));
  config.model.experts = static_cast<int>(state.range(1));
  config.model.top_k = 8;
  config.expert_bias.policy = policy;
  config.expert_bias.limits = {.min = -1000, .max = 1000, .rate = rate, .center = true};
  return config;
}

// `drift`: how far the loads that the router wants move in a step.
void run(benchmark::State& state, const char* policy, double drift, double rate) {
  const ControllerConfig config = config_of(state, policy, rate);
  Controller controller(config);
  const int layers = config.model.layers;
  bench::StepPlant plant(controller.shape(0), layers, drift);
  for (auto _ : state) {
    for (int l = 0; l < layers; ++l) controller.record(l, plant.route(l, controller.bias(l)));
    const auto start = std::chrono::steady_clock::now();
    benchmark::DoNotOptimize(controller.step().layers.data());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    state.SetIterationTime(took.count());
  }
  state.SetItemsProcessed(state.iterations() * state.range(0) * state.range(1));
}

void BM_Step(benchmark::State& state) {
  run(state, "adaptive_bias", 0, 1);
}
BENCHMARK(BM_Step)
    ->ArgNames({"layers", "experts"})
    ->Args({58, 256})
    ->Args({58, 1024})
    ->Args({100, 4096})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

// The rate limit acts on every layer, so that centring has to be solved for.
void BM_StepLimited(benchmark::State& state) {
  run(state, "adaptive_bias", 0.1, 1e-5);
}
BENCHMARK(BM_StepLimited)
    ->ArgNames({"layers", "experts"})
    ->Args({58, 256})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

// What the check of the response adds to a step: the same loop with and without it, in turn. The counter is the median of
// a step with it over one without it, less 1.
void run_check(benchmark::State& state, double drift) {
  ControllerConfig config = config_of(state, "adaptive_bias", 1);
  Controller with(config);
  config.safety.responsiveness = false;
  Controller without(config);
  const int layers = config.model.layers;
  bench::StepPlant plants[] = {{with.shape(0), layers, drift}, {with.shape(0), layers, drift}};
  std::vector<double> seconds[2];
  for (auto _ : state) {
    const std::size_t first = seconds[0].size() % 2;  // each is first as often
    double both = 0;
    for (const std::size_t which : {first, 1 - first}) {
      Controller& controller = which == 0 ? with : without;
      for (int l = 0; l < layers; ++l) controller.record(l, plants[which].route(l, controller.bias(l)));
      const auto start = std::chrono::steady_clock::now();
      benchmark::DoNotOptimize(controller.step().layers.data());
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      seconds[which].push_back(took.count());
      both += took.count();
    }
    state.SetIterationTime(both);
  }
  const auto median = [](std::vector<double>& of) {
    std::nth_element(of.begin(), of.begin() + static_cast<std::ptrdiff_t>(of.size() / 2), of.end());
    return of[of.size() / 2];
  };
  const double on = median(seconds[0]), off = median(seconds[1]);
  const Metrics& metrics = *with.report().layers[0].metrics;
  state.counters["floors"] = *metrics.load_cv / *metrics.noise_floor_cv;
  state.counters["without_us"] = 1e6 * off;
  state.counters["check_share"] = on / off - 1;
}

void BM_StepCheckBalanced(benchmark::State& state) {
  run_check(state, 0);
}
void BM_StepCheckImbalanced(benchmark::State& state) {
  run_check(state, 0.1);
}
BENCHMARK(BM_StepCheckBalanced)
    ->ArgNames({"layers", "experts"})
    ->Args({58, 256})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();
BENCHMARK(BM_StepCheckImbalanced)
    ->ArgNames({"layers", "experts"})
    ->Args({58, 256})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

void BM_StepSign(benchmark::State& state) {
  run(state, "sign_bias", 0, 1);
}
BENCHMARK(BM_StepSign)
    ->ArgNames({"layers", "experts"})
    ->Args({58, 256})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

}  // namespace
}  // namespace moectl
