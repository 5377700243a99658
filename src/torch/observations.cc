#include "moectl/torch/observations.h"

#include <cmath>
#include <span>
#include <stdexcept>
#include <string>

#include "torch/host_batch.h"

namespace moectl {
namespace {

using ::torch::Tensor;

bool wanted(const TorchController& controller, bool collected) {
  return collected && TorchController::recording() && controller.controller().config().mode != Mode::kOff;
}

void require_experts(std::size_t found, const StatsShape& shape) {
  if (found == static_cast<std::size_t>(shape.experts)) return;
  throw std::invalid_argument("experts: " + std::to_string(found) + ": must be " +
                              std::to_string(shape.experts) + ", as the config says");
}

void add_norms(TorchController& controller, int layer, const Tensor& squares) {
  const Tensor norms = squares.sqrt().to(::torch::kCPU, ::torch::kDouble).contiguous();
  controller.controller().record(layer, [&](RoutingStats& sums) {
    sums.add_grad_norms({norms.data_ptr<double>(), static_cast<std::size_t>(norms.numel())});
  });
}

}  // namespace

void record_gradients(TorchController& controller, int layer, const std::vector<Tensor>& parameters) {
  const StatsShape& shape = controller.controller().shape(layer);
  for (const Tensor& parameter : parameters) {
    require_experts(parameter.dim() > 0 ? static_cast<std::size_t>(parameter.size(0)) : 0, shape);
  }
  if (!wanted(controller, shape.needs.gradients)) return;
  const ::torch::NoGradGuard no_grad;
  Tensor squares = ::torch::zeros({shape.experts}, ::torch::kDouble);
  for (const Tensor& parameter : parameters) {
    if (!parameter.grad().defined()) continue;
    const Tensor square = parameter.grad().reshape({shape.experts, -1}).to(::torch::kFloat).square().sum(1);
    squares = squares.to(square.device()) + square;
  }
  add_norms(controller, layer, squares);
}

void record_gradients(TorchController& controller, int layer,
                      const std::vector<std::vector<Tensor>>& experts) {
  const StatsShape& shape = controller.controller().shape(layer);
  require_experts(experts.size(), shape);
  if (!wanted(controller, shape.needs.gradients)) return;
  const ::torch::NoGradGuard no_grad;
  std::vector<Tensor> squares;
  for (const std::vector<Tensor>& parameters : experts) {
    Tensor sum = ::torch::zeros({}, ::torch::kDouble);
    for (const Tensor& parameter : parameters) {
      if (!parameter.grad().defined()) continue;
      const Tensor square = parameter.grad().to(::torch::kFloat).square().sum();
      sum = sum.to(square.device()) + square;
    }
    squares.push_back(sum);
  }
  // An expert without a gradient has no device to be on.
  for (Tensor& sum : squares) sum = sum.to(squares.front().device());
  add_norms(controller, layer, ::torch::stack(squares));
}

void record_losses(TorchController& controller, int layer, const Tensor& indices, const Tensor& losses,
                   const RecordOptions& options) {
  const StatsShape& shape = controller.controller().shape(layer);
  RecordOptions given;
  given.mask = options.mask;
  given.domain_ids = options.domain_ids;
  check_record(shape, indices, given);
  if (!losses.defined() || losses.numel() * shape.top_k != indices.numel()) {
    throw std::invalid_argument("losses: must have one element a token");
  }
  if (!wanted(controller, shape.needs.losses || shape.needs.domain_losses)) return;
  const HostBatch host(shape, indices, given);
  const RoutingBatch& batch = host.batch();
  const Tensor values = losses.detach().to(::torch::kCPU, ::torch::kFloat).contiguous();
  controller.controller().record(layer, [&](RoutingStats& sums) {
    sums.add_token_losses({.experts = batch.experts,
                           .losses = {values.data_ptr<float>(), static_cast<std::size_t>(values.numel())},
                           .mask = batch.mask,
                           .domain_ids = batch.domain_ids});
  });
}

}  // namespace moectl
