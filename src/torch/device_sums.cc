#include "torch/device_sums.h"

#include <algorithm>
#include <cstddef>
#include <utility>

#include "torch/group_reduction.h"
#include "torch/routing_sums.h"

namespace moectl {
namespace {

void add_to(std::span<std::int64_t> sums, const ::torch::Tensor& terms) {
  const std::int64_t* term = terms.data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < terms.numel(); ++i) sums[static_cast<std::size_t>(i)] += term[i];
}

}  // namespace

DeviceSums::DeviceSums(const Controller& controller, ::torch::Device device)
    : begins_{0}, device_(device), side_(device), recorded_(device), left_(device) {
  const ::torch::NoGradGuard no_grad;
  for (const int layer : controller.layers()) {
    shapes_.push_back(controller.shape(layer));
    begins_.push_back(begins_.back() + static_cast<std::int64_t>(shapes_.back().flat_size()));
  }
  for (::torch::Tensor& sums : sums_) {
    sums = ::torch::zeros({begins_.back()}, ::torch::dtype(::torch::kLong).device(device));
  }
  own_ = host_buffer(begins_.back(), ::torch::kLong, device);
  drained_ = host_buffer(begins_.back(), ::torch::kLong, device);
}

::torch::Tensor DeviceSums::of_layer(const ::torch::Tensor& all, std::size_t layer) const {
  return all.narrow(0, begins_[layer], begins_[layer + 1] - begins_[layer]);
}

void DeviceSums::add(std::size_t layer, const ::torch::Tensor& indices, const RecordOptions& options,
                     double gap_width) {
  if (indices.numel() == 0) return;
  const ::torch::NoGradGuard no_grad;
  of_layer(sums_[filling_], layer).add_(routing_sums(shapes_[layer], indices, options, gap_width, device_));
}

void DeviceSums::drain(Controller& controller) {
  const ::torch::NoGradGuard no_grad;
  drained_.copy_(sums_[filling_], /*non_blocking=*/side_.asynchronous());
  Mark arrived(device_);
  arrived.set();
  sums_[filling_].zero_();
  arrived.wait();
  for (std::size_t l = 0; l < shapes_.size(); ++l) {
    controller.record_with(controller.layers()[l],
                           [&](RoutingStats& sums) { add_to(sums.flat(), of_layer(drained_, l)); });
  }
}

void DeviceSums::clear() {
  const ::torch::NoGradGuard no_grad;
  sums_[filling_].zero_();
}

Reduction::Wait DeviceSums::exchange(std::span<std::int64_t> payload, std::span<std::int64_t> own,
                                     const Reduction& reduction) {
  const ::torch::NoGradGuard no_grad;
  const auto* group = reduction.target<GroupReduction>();
  if (group != nullptr && group->device() != device_) group = nullptr;
  const ::torch::Tensor leaving = sums_[filling_];
  recorded_.set();
  if (group != nullptr && !payload_.defined()) {
    payload_ = host_buffer(static_cast<std::int64_t>(payload.size()), ::torch::kLong, device_);
    joined_ = ::torch::empty(payload_.sizes(), leaving.options());
  }
  side_.run([&] {
    recorded_.hold_current_stream();
    own_.copy_(leaving, /*non_blocking=*/side_.asynchronous());
    if (group != nullptr) {
      std::copy(payload.begin(), payload.end(), payload_.data_ptr<std::int64_t>());
      joined_.copy_(payload_, /*non_blocking=*/side_.asynchronous());
      joined_.narrow(0, 0, leaving.numel()).add_(leaving);
    }
    left_.set();
  });
  Reduction::Wait sum;
  if (group != nullptr) {
    sum = group->start(payload, [&](::torch::Tensor& sums) {
      left_.hold_current_stream();
      sums.copy_(joined_, /*non_blocking=*/side_.asynchronous());
    });
  }
  filling_ ^= 1;  // nothing can fail any more

  return [self = shared_from_this(), leaving, payload, own, reduction, sum = std::move(sum)] {
    const ::torch::NoGradGuard no_grad;
    self->left_.wait();
    leaving.zero_();
    add_to(own, self->own_);
    add_to(payload, self->own_);
    if (sum) {
      sum();
    } else if (reduction) {
      reduction(payload);
    }
  };
}

}  // namespace moectl
