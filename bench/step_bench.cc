// Controller::step on layers whose load answers: all load metrics, monitor, policy, limits and the record in memory.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cmath>
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

// Two loops, with the check of the response and without it, a step of each in turn. Returns the median of a step with it over
// that of one without, less 1, and adds the latter to `without`.
double check_share(ControllerConfig config, double drift, bool checked_first, double& without) {
  constexpr int kSettle = 200, kSteps = 400;
  const int layers = config.model.layers;
  std::vector<Controller> loops;
  std::vector<bench::StepPlant> plants;
  for (const bool checked : {checked_first, !checked_first}) {
    config.safety.responsiveness = checked;
    loops.emplace_back(config);
    plants.emplace_back(loops.back().shape(0), layers, drift);
  }
  std::vector<double> seconds[2];
  for (int step = 0; step < kSettle + kSteps; ++step) {
    for (const bool second : {step % 2 != 0, step % 2 == 0}) {
      const std::size_t which = second ? 1 : 0;
      Controller& loop = loops[which];
      for (int l = 0; l < layers; ++l) loop.record(l, plants[which].route(l, loop.bias(l)));
      const auto start = std::chrono::steady_clock::now();
      benchmark::DoNotOptimize(loop.step().layers.data());
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      if (step >= kSettle) seconds[which].push_back(took.count());
    }
  }
  const auto median = [](std::vector<double>& of) {
    std::nth_element(of.begin(), of.begin() + kSteps / 2, of.end());
    return of[kSteps / 2];
  };
  const double on = median(seconds[checked_first ? 0 : 1]), off = median(seconds[checked_first ? 1 : 0]);
  without += off;
  return on / off - 1;
}

// What the check adds to a step. Where a loop lies in memory is worth some percent, more than the check may cost: so pairs
// are made anew, and the one with the check is made first in every other pair. The mean over pairs, and its standard error.
void run_check(benchmark::State& state, double drift) {
  constexpr int kPairs = 6;
  for (auto _ : state) {
    double sum = 0, squares = 0, without = 0;
    for (int pair = 0; pair < kPairs; ++pair) {
      const double share = check_share(config_of(state, "adaptive_bias", 1), drift, pair % 2 == 0, without);
      sum += share;
      squares += share * share;
    }
    const double mean = sum / kPairs;
    state.SetIterationTime(without / kPairs);
    state.counters["check_share"] = mean;
    state.counters["standard_error"] = std::sqrt((squares / kPairs - mean * mean) / (kPairs - 1));
  }
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
    ->Iterations(1)
    ->UseManualTime();
BENCHMARK(BM_StepCheckImbalanced)
    ->ArgNames({"layers", "experts"})
    ->Args({58, 256})
    ->Unit(benchmark::kMicrosecond)
    ->Iterations(1)
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
