// BatchCounts: what each expert serves in the global batch, for a balance loss that asks for no more than that.
//
// The balance loss N Σ f_i P_i of a micro-batch asks the tokens of that micro-batch to be spread evenly, though they may
// all be of one domain; with f of the global batch, experts may specialise (2501.11873). f must be known before the
// backward pass, so the router has a collective of its own in its forward pass. The counts that the controller sums after
// the step come too late for this: a loss on the last step's counts is another law, which lags by a step.
//
//   BatchCounts counts(sum_over(group));
//   router->forward(tokens, {.actuators = …, .counts_over_batch = counts.of(layer, micro_batch)});
//   ...                                    // backward, optimizer
//   counts.next_step();
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <utility>

#include "moectl/torch/router.h"

namespace moectl {

/// Adds an int64 tensor over all ranks, in place. sum_over() of process_group.h makes one.
using SumOverRanks = std::function<void(::torch::Tensor&)>;

/// f of a micro-batch is formed from its tokens on all ranks and from those of the step's micro-batches that were routed
/// before it; with one micro-batch a step, from the whole global batch. All ranks route the same layers and micro-batches
/// in the same order. Thread-safe if `sum` is.
class BatchCounts {
 public:
  /// Without `sum` one process is all there is.
  explicit BatchCounts(SumOverRanks sum = {}) : sum_(std::move(sum)) {}
  /// For one forward pass. `micro_batch` numbers the micro-batches of a step: a second pass of one, as activation
  /// checkpointing makes it, gets the counts of the first, and starts no collective; so the numbers of a step must be
  /// distinct. With gradients off it returns the counts given. Takes and returns int64 [N] on the device of the router,
  /// where `sum` must be able to add; what `sum` throws has added nothing. Refers to this object.
  CountsOverBatch of(int layer, std::int64_t micro_batch = 0);
  /// Once an optimizer step.
  void next_step();

 private:
  ::torch::Tensor add(int layer, std::int64_t micro_batch, const ::torch::Tensor& counts);

  SumOverRanks sum_;
  std::mutex mutex_;
  std::map<int, ::torch::Tensor> so_far_;                            // by layer
  std::map<std::pair<int, std::int64_t>, ::torch::Tensor> answers_;  // by (layer, micro-batch)
};

}  // namespace moectl
