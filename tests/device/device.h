// The device of these tests: the first GPU, or the CPU in the accelerator's way of counting where there is none. And
// batches with everything that can go with them.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "moectl/torch/controller.h"

namespace moectl {

inline ::torch::Device the_device() {
  static const ::torch::Device device =
      ::torch::cuda::is_available() ? ::torch::Device(::torch::kCUDA, 0) : ::torch::Device(::torch::kCPU);
  return device;
}

inline bool has_gpu() {
  return !the_device().is_cpu();
}

inline TorchOptions on_device() {
  return {.device = the_device(), .count_by_operators = true};
}

constexpr int kLayers = 2, kExperts = 7, kTopK = 2;

/// Without `probabilities` all sums are whole numbers or sums of given values, so that every bit of a run is the host's.
inline ControllerConfig device_config(int lag = 0, bool probabilities = false) {
  ControllerConfig config;
  config.lag = lag;
  config.model.layers = kLayers;
  config.model.experts = kExperts;
  config.model.top_k = kTopK;
  config.model.domains = {"prose", "code", "tables"};
  config.collect = {
      .gap = true, .sequences = true, .probabilities = probabilities, .margins = true, .pairs = true};
  config.expert_bias.policy = "adaptive_bias";
  config.expert_bias.limits = {.min = -16, .max = 16, .rate = 1, .center = true};
  return config;
}

struct Batch {
  ::torch::Tensor indices;
  RecordOptions options;
};

/// Depends on `seed` alone: drawn on the CPU, with all that may or may not be given.
inline Batch batch_of(int seed) {
  using ::torch::Tensor;
  ::torch::manual_seed(static_cast<std::uint64_t>(seed));
  const auto chance = [](double p) { return ::torch::rand({1}).item<double>() < p; };
  const std::int64_t sequences = ::torch::randint(1, 6, {1}).item<std::int64_t>();
  const std::int64_t length = ::torch::randint(1, 9, {1}).item<std::int64_t>();
  const std::int64_t tokens = sequences * length;
  const Tensor scores = ::torch::randn({sequences, length, kExperts}) * 2;
  const auto [values, indices] = scores.topk(kTopK + 1, -1);
  Batch batch{indices.narrow(-1, 0, kTopK).contiguous(), {}};
  batch.options.top_values = values.contiguous();
  batch.options.biased_scores = scores;
  if (chance(0.3)) scores.select(-1, 3).fill_(-std::numeric_limits<float>::infinity());
  batch.options.probabilities = scores.softmax(-1);
  batch.options.domain_ids = ::torch::randint(0, 3, {sequences, length}, ::torch::kLong);
  batch.options.dropped = ::torch::randint(0, 5, {}, ::torch::kLong);
  if (chance(0.5)) batch.options.balance_loss = ::torch::rand({}) + 1;
  if (chance(0.5)) batch.options.z_loss = ::torch::rand({}) * 30;
  if (chance(0.5)) batch.options.mask = ::torch::rand({sequences, length}) < 0.7;
  if (chance(0.4)) {
    batch.indices = batch.indices.view({tokens, kTopK});
    if (chance(0.8))
      batch.options.sequence_ids = std::get<0>(::torch::randint(-3, 4, {tokens}, ::torch::kLong).sort());
  }
  if (chance(0.1)) batch.options.mask = ::torch::zeros({tokens}, ::torch::kBool);
  if (chance(0.1)) batch.indices.view({-1})[0] = -1;  // a slot that is not routed
  if (chance(0.1)) batch.options.biased_scores = Tensor();
  if (chance(0.1)) batch.options.top_values = batch.options.biased_scores = Tensor();
  if (chance(0.1)) batch.options.probabilities = Tensor();
  if (chance(0.1)) batch.options.domain_ids = Tensor();
  if (chance(0.1)) batch.options.dropped = Tensor();
  return batch;
}

/// One in twenty is an invalid record.
inline Batch hostile_batch_of(int seed) {
  Batch batch = batch_of(seed);
  if (seed % 20 == 7) batch.indices.view({-1})[0] = kExperts;
  return batch;
}

inline Batch moved(const Batch& batch, ::torch::Device device) {
  const auto move = [&](const ::torch::Tensor& tensor) {
    return tensor.defined() ? tensor.to(device) : tensor;
  };
  const RecordOptions& o = batch.options;
  return {move(batch.indices),
          {.top_values = move(o.top_values),
           .probabilities = move(o.probabilities),
           .biased_scores = move(o.biased_scores),
           .scores = move(o.scores),
           .mask = move(o.mask),
           .sequence_ids = move(o.sequence_ids),
           .domain_ids = move(o.domain_ids),
           .dropped = move(o.dropped),
           .balance_loss = move(o.balance_loss),
           .z_loss = move(o.z_loss),
           .micro_batch = o.micro_batch}};
}

inline std::vector<std::int64_t> flat(const LayerReport& layer) {
  const auto sums = layer.stats->flat();
  return {sums.begin(), sums.end()};
}

/// The state at the end of a run with everything that interferes: micro-batches recorded twice, passes that must not
/// count, saving and loading halfway (`save_at` < 0: not). The same for every way of counting and any reduction of one rank.
inline std::string state_after(int steps, int lag, const TorchOptions& options, int save_at,
                               const Reduction& reduction = {}, bool probabilities = false) {
  const auto make = [&] {
    auto controller = std::make_unique<TorchController>(device_config(lag, probabilities), options);
    if (reduction) controller->controller().set_reduction(reduction);
    return controller;
  };
  auto controller = make();
  for (int step = 0; step < steps; ++step) {
    for (int part = 0; part < 3; ++part) {
      for (int layer = 0; layer < kLayers; ++layer) {
        Batch batch = moved(hostile_batch_of((step * 3 + part) * kLayers + layer), options.device);
        batch.options.micro_batch = part;
        controller->record(layer, batch.indices, batch.options);
        controller->record(layer, batch.indices, batch.options);  // recomputation
        const ::torch::NoGradGuard evaluation;
        controller->record(layer, batch.indices, batch.options);
      }
      if (step == save_at && part == 1) {
        const std::string state = controller->save();
        controller = make();
        controller->load(state);
      }
    }
    controller->step({.loss = 3 - 0.01 * step});
  }
  return controller->save();
}

}  // namespace moectl
