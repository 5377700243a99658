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

// A plant: the relative load of an expert rises by 100 a unit of its bias, and scatters as sampling makes it. In each
// step the router wants loads that have moved by `drift`.
class Plant {
 public:
  Plant(const StatsShape& shape, int layers, double drift)
      : drift_(drift),
        wanted_(static_cast<std::size_t>(layers),
                std::vector<double>(static_cast<std::size_t>(shape.experts), 0.0)),
        sums_(shape) {}

  const RoutingStats& route(int layer, std::span<const double> bias) {
    constexpr double kTokens = 2048, kSlope = 100, kNear = 0.2, kWidth = kNear / kSlope;
    const std::span<std::int64_t> counts = sums_.mutable_array(RoutingStats::kCounts);
    const std::span<std::int64_t> near = sums_.mutable_array(RoutingStats::kGapNear);
    std::vector<double>& wanted = wanted_[static_cast<std::size_t>(layer)];
    double mean = 0;
    for (const double b : bias) mean += b / static_cast<double>(bias.size());
    std::int64_t total = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      wanted[i] = 0.9 * wanted[i] + drift_ * normal_(random_);
      const double load = std::max(0.0, 1 + wanted[i] + kSlope * (bias[i] - mean));
      const double seen = kTokens * load + std::sqrt(kTokens * load) * normal_(random_);
      total += counts[i] = std::llround(std::max(0.0, seen));
      near[i] = std::llround(kNear * seen / sums_.top_k());
    }
    const std::int64_t missing = (sums_.top_k() - total % sums_.top_k()) % sums_.top_k();
    counts[0] += missing;
    const std::int64_t tokens = (total + missing) / sums_.top_k();
    sums_.set_scalar(RoutingStats::kTokens, tokens);
    sums_.set_scalar(RoutingStats::kChoicesSq, tokens * sums_.top_k() * sums_.top_k());
    sums_.set_scalar(RoutingStats::kGapTokens, tokens);
    sums_.set_scalar(RoutingStats::kGapSum, to_fixed(1 / kSlope) * tokens);
    sums_.set_scalar(RoutingStats::kGapWidthSum, to_fixed(kWidth) * tokens);
    return sums_;
  }

 private:
  double drift_;
  std::vector<std::vector<double>> wanted_;
  RoutingStats sums_;
  std::mt19937_64 random_{1};
  std::normal_distribution<double> normal_;
};

// What the check of the response adds to a step: the same loop with and without it, in turn. The counter is the median of
// a step with it over one without it, less 1.
void run_check(benchmark::State& state, double drift) {
  ControllerConfig config = config_of(state, "adaptive_bias", 1);
  Controller with(config);
  config.safety.responsiveness = false;
  Controller without(config);
  const int layers = config.model.layers;
  Plant plants[] = {{with.shape(0), layers, drift}, {with.shape(0), layers, drift}};
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
  run(state, "sign_bias", 0.1, 100);
}
BENCHMARK(BM_StepSign)->ArgNames({"layers", "experts"})->Args({58, 256})->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace moectl
