// GroupReduction: the controller's sums over a c10d process group, in tensors on the group's device.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "moectl/torch/process_group.h"

namespace moectl {

class GroupReduction {
 public:
  GroupReduction(StartAllReduce start, int ranks, const ReductionOptions& options);

  c10::Device device() const;
  /// Starts to sum a payload of the host.
  Reduction::Wait operator()(std::span<std::int64_t> payload) const;
  /// Starts to sum what `fill` puts into a tensor on device(); it only orders that, on the current stream.
  /// When the wait is called the payload must hold this rank's share, which the sums then replace.
  Reduction::Wait start(std::span<std::int64_t> payload, const std::function<void(at::Tensor&)>& fill) const;

 private:
  struct Buffers;
  struct Shared;
  std::shared_ptr<Shared> shared_;
};

}  // namespace moectl
