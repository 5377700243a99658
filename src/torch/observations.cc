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

void add_value(TorchController& controller, int layer, const char* name, double value) {
  controller.controller().record_with(layer, [&](RoutingStats& sums) { sums.add_value(name, value); });
}

/// Norms of the loss's gradient in each of the weights [weights], 0 where it does not reach.
Tensor gradient_norms(const Tensor& loss, const std::vector<Tensor>& weights) {
  std::vector<Tensor> norms(weights.size(), ::torch::zeros({}, ::torch::kDouble));
  if (loss.requires_grad()) {
    const auto gradients = ::torch::autograd::grad({loss}, weights, {}, /*retain_graph=*/true,
                                                   /*create_graph=*/false, /*allow_unused=*/true);
    for (std::size_t i = 0; i < norms.size(); ++i) {
      if (gradients[i].defined()) norms[i] = gradients[i].to(::torch::kDouble).norm();
    }
  }
  for (Tensor& norm : norms) norm = norm.to(weights.front().device());
  return ::torch::stack(norms).cpu();
}

void add_norms(TorchController& controller, int layer, const Tensor& squares) {
  const Tensor norms = squares.sqrt().to(::torch::kCPU, ::torch::kDouble).contiguous();
  controller.controller().record_with(layer, [&](RoutingStats& sums) {
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
  controller.controller().record_with(layer, [&](RoutingStats& sums) {
    sums.add_token_losses({.experts = batch.experts,
                           .losses = {values.data_ptr<float>(), static_cast<std::size_t>(values.numel())},
                           .mask = batch.mask,
                           .domain_ids = batch.domain_ids});
  });
}

void record_router(TorchController& controller, int layer, const Tensor& weight) {
  require_experts(weight.defined() && weight.dim() == 2 ? static_cast<std::size_t>(weight.size(0)) : 0,
                  controller.controller().shape(layer));
  if (!wanted(controller, true)) return;
  const ::torch::NoGradGuard no_grad;
  const Tensor rows = weight.detach().to(::torch::kDouble);
  if (!rows.isfinite().all().item<bool>()) return;
  const Tensor singular = at::linalg_svdvals(rows);
  add_value(controller, layer, "router_condition", (singular[0] / singular[-1]).item<double>());
  const auto n = static_cast<double>(rows.size(0));
  if (n < 2) return;
  const Tensor unit = rows / rows.norm(2, 1, /*keepdim=*/true).clamp_min(1e-300);
  const Tensor cosines = unit.matmul(unit.t()).fill_diagonal_(0).abs();
  add_value(controller, layer, "router_similarity", cosines.sum().item<double>() / (n * (n - 1)));
}

void record_expert_outputs(TorchController& controller, int layer, const Tensor& outputs) {
  (void)controller.controller().shape(layer);
  if (!outputs.defined() || outputs.dim() < 1)
    throw std::invalid_argument("outputs: must be [..., d], a row for each assignment");
  if (!wanted(controller, true) || outputs.numel() == 0) return;
  const ::torch::NoGradGuard no_grad;
  const double mean = outputs.detach().to(::torch::kFloat).norm(2, -1).mean().item<double>();
  if (std::isfinite(mean)) add_value(controller, layer, "expert_output_norm", mean);
}

void record_gradient_ratios(TorchController& controller, const std::vector<Tensor>& weights,
                            const Tensor& balance_loss, const Tensor& task_loss) {
  const std::vector<int>& layers = controller.controller().layers();
  if (weights.size() != layers.size()) {
    throw std::invalid_argument("weights: " + std::to_string(weights.size()) +
                                ": must be one for each of the " + std::to_string(layers.size()) + " layers");
  }
  for (const Tensor* loss : {&balance_loss, &task_loss}) {
    if (!loss->defined() || loss->numel() != 1)
      throw std::invalid_argument("balance_loss, task_loss: must be one number each");
  }
  if (!wanted(controller, true)) return;
  std::vector<Tensor> reached;
  std::vector<int> of_layer;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (!weights[i].defined() || !weights[i].requires_grad()) continue;
    reached.push_back(weights[i]);
    of_layer.push_back(layers[i]);
  }
  if (reached.empty()) return;
  const Tensor ratios = gradient_norms(balance_loss, reached) / gradient_norms(task_loss, reached);
  // 0/0 is no number, and left out.
  for (std::size_t i = 0; i < of_layer.size(); ++i) {
    add_value(controller, of_layer[i], "gradient_ratio", ratios[static_cast<std::int64_t>(i)].item<double>());
  }
}

}  // namespace moectl
