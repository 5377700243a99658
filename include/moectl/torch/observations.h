// What the host sees of single experts beside their load: gradient norms and losses, from tensors. What a run
// does not collect (config: `collect`) is passed over at no cost. Latencies are plain numbers:
//   controller.controller().record(layer, [&](moectl::RoutingStats& sums) { sums.add_latencies(seconds); });
#pragma once

#include <torch/torch.h>

#include <vector>

#include "moectl/torch/controller.h"

namespace moectl {

/// After the backward pass, before gradients are clipped: one observation of the norm of each expert's
/// gradient. `parameters` are [N, ...] each, a slice an expert; one that no token reached counts as zero.
/// Waits for an accelerator: there, not at every step. Throws std::invalid_argument on other shapes.
void record_gradients(TorchController& controller, int layer, const std::vector<::torch::Tensor>& parameters);
/// The same for experts that are modules of their own: the parameters of each. [N]
void record_gradients(TorchController& controller, int layer,
                      const std::vector<std::vector<::torch::Tensor>>& experts);

/// Once the losses of the micro-batch's tokens are known: each goes to the token's experts, and to its domain
/// at each of them. `indices` as recorded, `losses` [T]; of `options` mask and domain_ids are taken. Waits for
/// an accelerator. Throws std::invalid_argument on shapes that do not fit.
void record_losses(TorchController& controller, int layer, const ::torch::Tensor& indices,
                   const ::torch::Tensor& losses, const RecordOptions& options = {});

}  // namespace moectl
