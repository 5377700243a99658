// Observations beside the load, from tensors. Of single experts: gradient norms and losses; those that a run does not
// collect (config: `collect`) are ignored at no cost. Of a layer: how well its router tells experts apart, the norm of
// what its experts put out, and what its balance loss weighs beside the task's; they are metrics (docs/metrics.md) that are
// absent until they are recorded, and steps between take no notice. The router's losses come with RecordOptions.
// Latencies are plain numbers:
//   controller.controller().record_with(layer, [&](moectl::RoutingStats& sums) { sums.add_latencies(seconds); });
#pragma once

#include <torch/torch.h>

#include <vector>

#include "moectl/torch/controller.h"

namespace moectl {

/// After the backward pass, before gradients are clipped: one observation of the norm of each expert's
/// gradient. `parameters` are [N, ...] each, one slice per expert; an expert without tokens counts as
/// zero. Waits for an accelerator, so do not call it at every step there. Throws std::invalid_argument on other shapes.
void record_gradients(TorchController& controller, int layer, const std::vector<::torch::Tensor>& parameters);
/// The same for experts that are modules of their own: the parameters of each. [N]
void record_gradients(TorchController& controller, int layer,
                      const std::vector<std::vector<::torch::Tensor>>& experts);

/// Adds the losses of the micro-batch's tokens, once they are known: each counts for the token's k experts, and for its
/// domain at each of them. `indices` as recorded, `losses` [T]; of `options`, mask and domain_ids are used. Waits for
/// an accelerator. Throws std::invalid_argument on shapes that do not fit.
void record_losses(TorchController& controller, int layer, const ::torch::Tensor& indices,
                   const ::torch::Tensor& losses, const RecordOptions& options = {});

/// Of a router's weight [N, d]: `router_similarity`, the mean absolute cosine between the rows of two experts (N > 1), and
/// `router_condition`, the largest over the smallest singular value. A weight that is not finite is left out. Takes a
/// singular value decomposition and waits for an accelerator: every few hundred steps. Throws std::invalid_argument on
/// another shape.
void record_router(TorchController& controller, int layer, const ::torch::Tensor& weight);

/// `expert_output_norm`: the mean norm of the rows of `outputs` [..., d], what experts put out for one assignment each, before
/// the gate. One observation a call, none without rows or where the mean is not finite. Waits for an accelerator.
void record_expert_outputs(TorchController& controller, int layer, const ::torch::Tensor& outputs);

/// `gradient_ratio` of every layer: the norm of the gradient of `balance_loss` in the router's weight over that of
/// `task_loss`. Both losses are scalars with their weights, summed over all layers, before the backward pass that follows;
/// `weights` are the routers', in the order of Controller::layers(). Makes two backward passes of its own, down to the first
/// router, which accumulate no gradient: every few hundred steps. A weight that needs no gradient, or that neither loss
/// reaches, is left out; one that only the balance loss reaches counts as kFixedMax. Over ranks the metric is the mean of
/// the ranks' ratios. Waits for an accelerator. Throws std::invalid_argument.
void record_gradient_ratios(TorchController& controller, const std::vector<::torch::Tensor>& weights,
                            const ::torch::Tensor& balance_loss, const ::torch::Tensor& task_loss);

}  // namespace moectl
