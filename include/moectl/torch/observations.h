// Observations of single experts beside their load: gradient norms and losses, from tensors. Observations that a run
// does not collect (config: `collect`) are ignored at no cost. Latencies are plain numbers:
//   controller.controller().record(layer, [&](moectl::RoutingStats& sums) { sums.add_latencies(seconds); });
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

}  // namespace moectl
