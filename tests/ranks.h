// Ranks in threads of one process.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <span>
#include <stdexcept>
#include <vector>

#include "moectl/controller.h"

namespace moectl {

/// Ranks that meet in an all-reduce.
class Ranks {
 public:
  explicit Ranks(int size) : size_(size) {}
  Reduction reduction() {
    return [this](std::span<std::int64_t> payload) {
      std::unique_lock lock(mutex_);
      if (failing) throw std::runtime_error("link down");
      if (sum_.empty()) sum_.assign(payload.size(), 0);
      if (sum_.size() != payload.size()) throw std::runtime_error("sizes differ");
      for (std::size_t i = 0; i < payload.size(); ++i) sum_[i] += payload[i];
      const int round = round_;
      if (++arrived_ == size_) {
        result_ = sum_;
        sum_.clear();
        arrived_ = 0;
        ++round_;
        all_.notify_all();
      } else {
        all_.wait(lock, [&] { return round_ != round; });
      }
      std::copy(result_.begin(), result_.end(), payload.begin());
    };
  }
  bool failing = false;

 private:
  int size_, arrived_ = 0, round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_;
  std::vector<std::int64_t> sum_, result_;
};

}  // namespace moectl
