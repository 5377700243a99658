// FakeStreams: while it lives, the CPU claims to have streams and events, as an accelerator does, and all
// that is asked of them is written down. Work is still done at once, so results are right whatever the order;
// what is proved is who waits for what.
#pragma once

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace moectl {

class FakeStreams {
 public:
  struct Entry {
    enum What { kRecord, kBlock, kQuery } what;
    int event;             // numbered from 1 in the order of their first record
    c10::StreamId stream;  // 0 = the default stream; that of a query is the current one
  };

  FakeStreams() : guard_(*this), real_(slot().exchange(&guard_)) {}
  ~FakeStreams() { slot().store(real_); }
  FakeStreams(const FakeStreams&) = delete;
  FakeStreams& operator=(const FakeStreams&) = delete;

  /// What was asked since the last call.
  std::vector<Entry> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(log_, {});
  }
  /// Every event says so many times that it has not passed.
  void set_delay(int queries) { delay_ = queries; }

 private:
  struct Event {
    int number;
    int asked = 0;
  };

  class Guard : public c10::impl::DeviceGuardImplInterface {
   public:
    explicit Guard(FakeStreams& log) : log_(log) {}
    c10::DeviceType type() const override { return c10::kCPU; }
    c10::Device exchangeDevice(c10::Device) const override { return c10::Device(c10::kCPU, -1); }
    c10::Device getDevice() const override { return c10::Device(c10::kCPU, -1); }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::Stream getStream(c10::Device) const noexcept override { return stream(current()); }
    c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
    c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(++log_.streams_); }
    c10::Stream exchangeStream(c10::Stream next) const noexcept override {
      return stream(std::exchange(current(), next.id()));
    }
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }

    void record(void** event, const c10::Stream& on, const c10::DeviceIndex,
                const c10::EventFlag) const override {
      const std::lock_guard lock(log_.mutex_);
      if (*event == nullptr) *event = new Event{++log_.events_};
      static_cast<Event*>(*event)->asked = 0;
      log_.log_.push_back({Entry::kRecord, static_cast<Event*>(*event)->number, on.id()});
    }
    void block(void* event, const c10::Stream& on) const override {
      const std::lock_guard lock(log_.mutex_);
      log_.log_.push_back({Entry::kBlock, static_cast<Event*>(event)->number, on.id()});
    }
    bool queryEvent(void* event) const override {
      const std::lock_guard lock(log_.mutex_);
      log_.log_.push_back({Entry::kQuery, static_cast<Event*>(event)->number, current()});
      return ++static_cast<Event*>(event)->asked > log_.delay_;
    }
    void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
      delete static_cast<Event*>(event);
    }

   private:
    static c10::Stream stream(c10::StreamId id) {
      return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kCPU, -1), id);
    }
    static c10::StreamId& current() {
      static thread_local c10::StreamId current = 0;
      return current;
    }
    FakeStreams& log_;
  };

  static std::atomic<const c10::impl::DeviceGuardImplInterface*>& slot() {
    return c10::impl::device_guard_impl_registry[static_cast<std::size_t>(c10::kCPU)];
  }

  std::mutex mutex_;
  std::vector<Entry> log_;
  std::atomic<c10::StreamId> streams_{0};
  int events_ = 0;
  std::atomic<int> delay_{0};
  Guard guard_;
  const c10::impl::DeviceGuardImplInterface* real_;
};

}  // namespace moectl
