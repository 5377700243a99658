// DeviceSums: counting on an accelerator without waiting for it. Sums build up in tensors on the device; a
// step copies them out beside the model's own work and takes them when they have long arrived.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moectl/controller.h"
#include "moectl/torch/controller.h"
#include "torch/side_stream.h"

namespace moectl {

class DeviceSums : public std::enable_shared_from_this<DeviceSums> {
 public:
  /// For all layers of the controller.
  DeviceSums(const Controller& controller, ::torch::Device device);

  ::torch::Device device() const { return device_; }
  /// Adds a micro-batch to the layer's sums, by its place among the controller's layers: orders operations and waits for none. Different layers in parallel.
  /// `gap_width` as in routing_sums().
  void add(std::size_t layer, const ::torch::Tensor& indices, const RecordOptions& options, double gap_width);
  /// Waits for all that was added and hands it to the controller.
  void drain(Controller& controller);
  /// Forgets all that was added.
  void clear();
  /// The controller's exchange with `lag: 1`: what was added leaves the device on a side stream, over the
  /// group if `reduction` is one of this device; nothing waits until the step after.
  Reduction::Wait exchange(std::span<std::int64_t> payload, std::span<std::int64_t> own,
                           const Reduction& reduction);

 private:
  ::torch::Tensor of_layer(const ::torch::Tensor& all, std::size_t layer) const;

  std::vector<StatsShape> shapes_;    // of the layers
  std::vector<std::int64_t> begins_;  // of their sums; then the end of the last one's
  ::torch::Device device_;
  SideStream side_;
  // The sums of all layers, one after another, each. One takes what is recorded; the other's sums are on their way, or it is zero.
  ::torch::Tensor sums_[2];
  int filling_ = 0;
  // Of the sums on their way: the host's payload and the device's sums, on the host; and both together on the device.
  ::torch::Tensor payload_, own_, joined_;
  ::torch::Tensor drained_;  // on the host
  Mark recorded_, left_;
};

}  // namespace moectl
