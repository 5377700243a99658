// HostBatch: tensors as the spans that RoutingStats reads, without a copy where they lie right already.
#pragma once

#include <torch/torch.h>

#include <vector>

#include "moectl/stats.h"
#include "moectl/torch/controller.h"

namespace moectl {

/// Throws std::invalid_argument unless the tensors of one record fit `shape` and one another.
void check_record(const StatsShape& shape, const ::torch::Tensor& indices, const RecordOptions& options);

/// int64 [N] on the host. Throws std::invalid_argument if `counts` are not [N], or of a type that rounds counts.
::torch::Tensor whole_counts(const ::torch::Tensor& counts, int experts);

/// The views of one record and the tensors that keep their memory alive.
class HostBatch {
 public:
  /// Takes from `options` what `shape` collects. Throws std::invalid_argument on tensors whose shapes do not fit.
  HostBatch(const StatsShape& shape, const ::torch::Tensor& indices, const RecordOptions& options);
  const RoutingBatch& batch() const { return batch_; }

 private:
  const void* host(const ::torch::Tensor& tensor, ::torch::ScalarType type);

  RoutingBatch batch_;
  // Seven tensors at most can need a copy; undefined ones cost nothing, so no container is allocated.
  ::torch::Tensor held_[7];
  int held_count_ = 0;
};

}  // namespace moectl
