// The library's two hot calls beside the same work in tensor operations, in one run: ./dev bench prints the ratios.
#include <benchmark/benchmark.h>
#include <torch/torch.h>

#include <chrono>
#include <random>
#include <vector>

#include "moectl/controller.h"
#include "moectl/torch/controller.h"
#include "step_plant.h"

namespace {

constexpr int kLayers = 58, kExperts = 256, kTopK = 8, kTokens = 8192;

// ---- record: [8192, 8] int64 choices of 256 experts → counts ----

std::vector<std::int64_t> random_choices() {
  std::mt19937_64 random(1);
  std::vector<std::int64_t> choices(std::size_t{kTokens} * kTopK);
  for (auto& expert : choices) expert = static_cast<std::int64_t>(random() % kExperts);
  return choices;
}

void record_plain_increments(benchmark::State& state) {
  const std::vector<std::int64_t> choices = random_choices();
  std::vector<std::int64_t> counts(kExperts);
  for (auto _ : state) {
    for (const std::int64_t expert : choices) ++counts[static_cast<std::size_t>(expert)];
    benchmark::DoNotOptimize(counts.data());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(record_plain_increments)->Unit(benchmark::kMicrosecond);

void record_moectl(benchmark::State& state) {
  const std::vector<std::int64_t> choices = random_choices();
  moectl::RoutingStats stats({.experts = kExperts, .top_k = kTopK, .needs = {}});
  for (auto _ : state) {
    stats.add({.experts = choices});
    benchmark::DoNotOptimize(stats.flat().data());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(record_moectl)->Unit(benchmark::kMicrosecond);

// With the k+1 largest scores of each token, which tell the gap and how dense the scores lie at the threshold.
void record_moectl_top_values(benchmark::State& state) {
  const std::vector<std::int64_t> choices = random_choices();
  std::mt19937_64 random(3);
  std::uniform_real_distribution<float> step(0, 0.02F);
  std::vector<float> values(std::size_t{kTokens} * (kTopK + 1));
  for (std::size_t i = 0; i < values.size(); ++i)
    values[i] = i % (kTopK + 1) == 0 ? 0.9F : values[i - 1] - step(random);
  moectl::RoutingStats stats({.experts = kExperts, .top_k = kTopK, .needs = {.gap = true}});
  stats.set_gap_width(0.02);
  for (auto _ : state) {
    stats.add({.experts = choices, .top_values = values});
    benchmark::DoNotOptimize(stats.flat().data());
    benchmark::ClobberMemory();
  }
}
BENCHMARK(record_moectl_top_values)->Unit(benchmark::kMicrosecond);

void record_torch_bincount(benchmark::State& state) {
  std::vector<std::int64_t> choices = random_choices();
  const torch::Tensor indices =
      torch::from_blob(choices.data(), {static_cast<std::int64_t>(choices.size())}, torch::kInt64);
  for (auto _ : state) benchmark::DoNotOptimize(torch::bincount(indices, {}, kExperts));
}
BENCHMARK(record_torch_bincount)->Unit(benchmark::kMicrosecond);

// ---- step: counts of 58 layers × 256 experts → metrics and new biases ----

std::vector<std::vector<std::int64_t>> random_loads(int layers, int experts) {
  std::mt19937_64 random(2);
  std::poisson_distribution<std::int64_t> load(256);
  std::vector<std::vector<std::int64_t>> loads(static_cast<std::size_t>(layers));
  for (auto& layer : loads) {
    layer.resize(static_cast<std::size_t>(experts));
    std::int64_t sum = 0;
    for (auto& count : layer) sum += count = load(random);
    layer.back() += (kTopK - sum % kTopK) % kTopK;  // a whole number of tokens
  }
  return loads;
}

// Everything a step does: take in the sums, all load metrics, adaptive_bias, limits, the record in memory.
void step_moectl(benchmark::State& state) {
  const int layers = static_cast<int>(state.range(0));
  moectl::ControllerConfig config;
  config.model.layers = layers;
  config.model.experts = static_cast<int>(state.range(1));
  config.model.top_k = kTopK;
  config.expert_bias.policy = "adaptive_bias";
  config.expert_bias.limits.rate = 1;
  moectl::Controller controller(config);
  moectl::bench::StepPlant plant(controller.shape(0), layers, 0);
  std::vector<moectl::RoutingStats> stats(static_cast<std::size_t>(layers),
                                          moectl::RoutingStats(controller.shape(0)));
  for (auto _ : state) {
    for (int layer = 0; layer < layers; ++layer)
      stats[static_cast<std::size_t>(layer)] = plant.route(layer, controller.bias(layer));
    const auto start = std::chrono::steady_clock::now();
    for (int layer = 0; layer < layers; ++layer)
      controller.record(layer, stats[static_cast<std::size_t>(layer)]);
    benchmark::DoNotOptimize(&controller.step());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    state.SetIterationTime(took.count());
  }
  state.SetItemsProcessed(state.iterations() * layers * state.range(1));
}
BENCHMARK(step_moectl)
    ->Args({kLayers, kExperts})
    ->Args({100, 4096})
    ->Unit(benchmark::kMicrosecond)
    ->UseManualTime();

// What is there at every step beside the controller's own: are the handed-out tensors (three a layer) still the
// controller's, and what do they hold now. Two experts, so that few values are written.
void step_wiring(benchmark::State& state) {
  moectl::ControllerConfig config;
  config.mode = moectl::Mode::kOff;
  config.model.layers = kLayers;
  config.model.experts = 2;
  config.model.top_k = 1;
  moectl::TorchController controller(config);
  for (auto _ : state) benchmark::DoNotOptimize(&controller.step());
  state.SetItemsProcessed(state.iterations() * kLayers);
}
BENCHMARK(step_wiring)->Unit(benchmark::kNanosecond);

// One record of all scores, with the check of four tokens' choices and without.
void record_scores(benchmark::State& state) {
  const torch::NoGradGuard no_grad;
  torch::manual_seed(1);
  const torch::Tensor scores = torch::rand({kTokens, kExperts});
  const auto best = scores.topk(kTopK + 1, 1);
  moectl::RecordOptions details{.top_values = std::get<0>(best).contiguous()};
  if (state.range(0) > 0) details.biased_scores = scores;
  if (state.range(0) > 1) details.scores = scores;
  const torch::Tensor indices = std::get<1>(best).narrow(1, 0, kTopK).contiguous();
  moectl::ControllerConfig config;
  config.model.layers = kLayers;
  config.model.experts = kExperts;
  config.model.top_k = kTopK;
  config.expert_bias.policy = "adaptive_bias";
  moectl::TorchController controller(config);
  const torch::AutoGradMode grad(true);
  for (auto _ : state) controller.record(0, indices, details);
}
BENCHMARK(record_scores)->DenseRange(0, 2)->Unit(benchmark::kMicrosecond);

torch::Tensor stacked_loads() {
  std::vector<torch::Tensor> rows;
  for (auto& counts : random_loads(kLayers, kExperts)) rows.push_back(torch::tensor(counts, torch::kInt64));
  return torch::stack(rows);
}

// The same metrics and the published sign_bias method, every operation over all layers at once.
void step_torch_stacked(benchmark::State& state) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor counts = stacked_loads();
  torch::Tensor bias = torch::zeros({kLayers, kExperts}, torch::kFloat64);
  const torch::Tensor ranks = torch::arange(kExperts, torch::kFloat64) * 2 - (kExperts - 1);
  for (auto _ : state) {
    const torch::Tensor loads = counts.to(torch::kFloat64);
    const torch::Tensor sum = loads.sum(1, true), mean = sum / kExperts;
    const torch::Tensor p = loads / sum;
    const torch::Tensor entropy = -torch::xlogy(p, p).sum(1);
    const torch::Tensor sorted = std::get<0>(p.sort(1));
    torch::Tensor results[] = {
        entropy,
        entropy / std::log(kExperts),
        entropy.exp(),
        std::log(kExperts) - entropy,
        p.std(1, false) * 100,
        p.std(1, false) * kExperts,
        std::get<0>(p.max(1)),
        std::get<0>(p.min(1)),
        std::get<0>(p.max(1)) * kExperts - 1,
        (sorted * ranks).sum(1) / kExperts,
        loads.var(1, false),
        (loads == 0).sum(1),
        (loads > 1.25 * mean).sum(1),
        (loads < 0.1 * mean).sum(1),
        (loads - (1.25 * mean).ceil()).clamp_min(0).sum(1) / sum.squeeze(1),
    };
    bias.add_((mean - loads).sign_(), 1e-3);
    benchmark::DoNotOptimize(results);
  }
}
BENCHMARK(step_torch_stacked)->Unit(benchmark::kMicrosecond);

// The published sign_bias method alone, over all layers at once, as Megatron-LM runs it.
void step_torch_sign_stacked(benchmark::State& state) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor loads = stacked_loads().to(torch::kFloat32);
  torch::Tensor bias = torch::zeros({kLayers, kExperts});
  for (auto _ : state) bias.add_((loads.mean(1, true) - loads).sign(), 1e-3);
}
BENCHMARK(step_torch_sign_stacked)->Unit(benchmark::kMicrosecond);

// The published sign_bias method alone, as training loops run it: layer by layer.
void step_torch_sign_by_layer(benchmark::State& state) {
  const torch::NoGradGuard no_grad;
  std::vector<torch::Tensor> loads, biases;
  for (const torch::Tensor& row : stacked_loads().unbind(0)) {
    loads.push_back(row.to(torch::kFloat32));
    biases.push_back(torch::zeros({kExperts}));
  }
  for (auto _ : state) {
    for (std::size_t layer = 0; layer < loads.size(); ++layer) {
      biases[layer].add_((loads[layer].mean() - loads[layer]).sign(), 1e-3);
    }
  }
}
BENCHMARK(step_torch_sign_by_layer)->Unit(benchmark::kMicrosecond);

}  // namespace
