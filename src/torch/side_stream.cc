#include "torch/side_stream.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <thread>

#include "moectl/controller.h"

namespace moectl {
namespace {

/// A stream from the device's pool, or nothing if the device has no streams: backends then throw.
std::optional<c10::Stream> pooled_stream(c10::Device device) {
  try {
    return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

c10::Stream current_stream(c10::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

}  // namespace

SideStream::SideStream(c10::Device device) : stream_(pooled_stream(device)) {}

Mark::Mark(c10::Device device) : device_(device) {
  if (pooled_stream(device)) event_.emplace(device.type());
}

void Mark::set() {
  if (event_) event_->record(current_stream(device_));
}

void Mark::hold_current_stream() const {
  if (event_) event_->block(current_stream(device_));
}

void Mark::wait(std::optional<std::chrono::milliseconds> timeout) const {
  if (!event_) return;
  // Only later versions of c10 can block on an event; all can ask it.
  const auto start = std::chrono::steady_clock::now();
  while (!event_->query()) {
    if (timeout && std::chrono::steady_clock::now() - start > *timeout) {
      throw ReductionError("the sums did not leave the device within the time-out");
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

at::Tensor host_buffer(std::int64_t size, at::ScalarType type, c10::Device device) {
  const auto options = at::TensorOptions().dtype(type);
  if (!device.is_cpu()) {
    try {
      return at::zeros({size}, options.pinned_memory(true));
    } catch (const c10::Error&) {
      // This device has no pinned memory: copies then take a detour, and are correct all the same.
    }
  }
  return at::zeros({size}, options);
}

}  // namespace moectl
