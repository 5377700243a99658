// Controller::step with adaptive_bias: reduce, all load metrics, monitor, policy, safety and the record in
// memory.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
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
    // A fifth of the gaps lies near.
    one.set_scalar(RoutingStats::kGapWidthSum, to_fixed(0.002) * (total / shape.top_k));
    const auto near = one.mutable_array(RoutingStats::kGapNear);
    for (std::size_t e = 0; e < near.size(); ++e) near[e] = counts[e] / (5 * shape.top_k);
  }
  return stats;
}

ControllerConfig config_of(const benchmark::State& state, const char* policy, double rate) {
  ControllerConfig config;
  config.model.layers = static_cast<int>(state.range(0));
  config.model.experts = static_cast<int>(state.range(1));
  config.model.top_k = 8;
  config.expert_bias.policy = policy;
  config.expert_bias.limits = {.min = -1000, .max = 1000, .rate = rate, .center = true};
  return config;
}

void run(benchmark::State& state, const char* policy, double skew, double rate) {
  const ControllerConfig config = config_of(state, policy, rate);
  Controller controller(config);
  const int layers = config.model.layers;
  const std::vector<RoutingStats> steps = make_steps(controller.shape(), layers, skew);
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

// What the check of the response adds to a step: the same steps with and without it, in turn. The counter is the
// median of a step with it over one without it, less 1. Balanced loads scatter as sampling alone makes them.
void run_check(benchmark::State& state, double skew) {
  ControllerConfig config = config_of(state, "adaptive_bias", 100);
  Controller with(config);
  config.safety.responsiveness = false;
  Controller without(config);
  const int layers = config.model.layers;
  const std::vector<RoutingStats> steps = make_steps(with.shape(), layers, skew);
  std::size_t next = 0;
  std::vector<double> seconds[2];
  for (auto _ : state) {
    double both = 0;
    for (int which = 0; which < 2; ++which) {
      Controller& controller = which == 0 ? with : without;
      for (int l = 0; l < layers; ++l)
        controller.record(l, steps[(next + static_cast<std::size_t>(l)) % steps.size()]);
      const auto start = std::chrono::steady_clock::now();
      benchmark::DoNotOptimize(controller.step().layers.data());
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      seconds[which].push_back(took.count());
      both += took.count();
    }
    next += static_cast<std::size_t>(layers);
    state.SetIterationTime(both);
  }
  const auto median = [](std::vector<double>& of) {
    std::nth_element(of.begin(), of.begin() + static_cast<std::ptrdiff_t>(of.size() / 2), of.end());
    return of[of.size() / 2];
  };
  const double on = median(seconds[0]), off = median(seconds[1]);
  state.counters["without_us"] = 1e6 * off;
  state.counters["check_share"] = on / off - 1;
}

void BM_StepCheckBalanced(benchmark::State& state) {
  run_check(state, 1 / std::sqrt(2048.0));
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
  run(state, "sign_bias", 0.1, 100);
}
BENCHMARK(BM_StepSign)->ArgNames({"layers", "experts"})->Args({58, 256})->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace moectl
