// SideStream and Mark: work of a device beside the stream that the model computes on, and points in streams
// to wait for; through c10's device-generic interfaces, so that no device's own headers are needed. On
// devices without streams and events (the CPU) all work is done when the call that orders it returns.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>

#include <chrono>
#include <cstdint>
#include <optional>

namespace moectl {

class SideStream {
 public:
  explicit SideStream(c10::Device device);

  /// Whether copies may be left to the device: it has streams to order them and events to wait for.
  bool asynchronous() const { return stream_.has_value(); }
  /// Runs `order` with this as the thread's current stream of the device.
  template <class Order>
  void run(Order&& order) const {
    std::optional<c10::StreamGuard> guard;
    if (stream_) guard.emplace(*stream_);
    order();
  }

 private:
  std::optional<c10::Stream> stream_;
};

/// A point in the work of a stream. Not thread-safe.
class Mark {
 public:
  explicit Mark(c10::Device device);

  /// Puts the mark behind all that the thread's current stream holds by now.
  void set();
  /// What the thread's current stream is given from now on waits, on the device, until the mark is passed.
  void hold_current_stream() const;
  /// The thread waits until the mark is passed. Throws ReductionError after `timeout`.
  void wait(std::optional<std::chrono::milliseconds> timeout = std::nullopt) const;

 private:
  c10::Device device_;
  std::optional<c10::Event> event_;
};

/// Host memory for asynchronous copies: pinned where the device can, zero-filled.
at::Tensor host_buffer(std::int64_t size, at::ScalarType type, c10::Device device);

}  // namespace moectl
