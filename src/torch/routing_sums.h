// routing_sums: what RoutingStats::add counts, by tensor operations on the tensors' own device.
#pragma once

#include <torch/torch.h>

#include "moectl/stats.h"
#include "moectl/torch/controller.h"

namespace moectl {

/// The sums of one micro-batch in the flat form of RoutingStats, int64 [shape.flat_size()], on `device`; of a
/// malformed one, nothing but one invalid record. No operation waits for the device: none has a result whose
/// size depends on values, none brings a value to the host. The tensors must have passed check_record and
/// hold at least one token. `gap_width`: below it a gap counts as near (RoutingStats::set_gap_width).
///
/// The same bits as on the host, but for one thing: a token's probabilities are added up in another order, so
/// that a term of their sums can round to the neighbouring 2^-24.
::torch::Tensor routing_sums(const StatsShape& shape, const ::torch::Tensor& indices,
                             const RecordOptions& options, double gap_width, ::torch::Device device);

}  // namespace moectl
