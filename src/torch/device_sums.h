// DeviceSums: counting on an accelerator without waiting for it. Sums build up in tensors on the device; a
// step copies them out beside the model's own work and takes them when they have long arrived.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <span>

#include "moectl/controller.h"
#include "moectl/torch/controller.h"
#include "torch/side_stream.h"

namespace moectl {

class DeviceSums : public std::enable_shared_from_this<DeviceSums> {
 public:
  DeviceSums(int layers, const StatsShape& shape, ::torch::Device device);

  ::torch::Device device() const { return device_; }
  /// Adds a micro-batch to the layer's sums: orders operations and waits for none. Different layers in parallel.
  /// `gap_width` as in routing_sums().
  void add(int layer, const ::torch::Tensor& indices, const RecordOptions& options, double gap_width);
  /// Waits for all that was added and hands it to the controller.
  void drain(Controller& controller);
  /// Forgets all that was added.
  void clear();
  /// The controller's exchange with `lag: 1`: what was added leaves the device on a side stream, over the
  /// group if `reduction` is one of this device; nothing waits until the step after.
  Reduction::Wait exchange(std::span<std::int64_t> payload, std::span<std::int64_t> own,
                           const Reduction& reduction);

 private:
  StatsShape shape_;
  ::torch::Device device_;
  SideStream side_;
  // [layers, flat size] each. One takes what is recorded; the other's sums are on their way, or it is zero.
  ::torch::Tensor sums_[2];
  int filling_ = 0;
  // Of the sums on their way: the host's payload and the device's sums, on the host; and both together on the device.
  ::torch::Tensor payload_, own_, joined_;
  ::torch::Tensor drained_;  // on the host
  Mark recorded_, left_;
};

}  // namespace moectl
