// Autocast: bfloat16 for the matrix products of a forward pass, as long as it lives, on this thread.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/version.h>

class Autocast {
 public:
  explicit Autocast(c10::DeviceType device, bool on = true) : device_(device), on_(on) {
    if (!on_) return;
    set(true);
    at::autocast::increment_nesting();
  }
  ~Autocast() {
    if (!on_) return;
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    set(false);
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  void set(bool on) const {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 4)
    at::autocast::set_autocast_dtype(device_, at::kBFloat16);
    at::autocast::set_autocast_enabled(device_, on);
#else
    if (device_ == c10::DeviceType::CPU) {
      at::autocast::set_autocast_cpu_dtype(at::kBFloat16);
      at::autocast::set_cpu_enabled(on);
    } else {
      at::autocast::set_autocast_gpu_dtype(at::kBFloat16);
      at::autocast::set_enabled(on);
    }
#endif
  }
  c10::DeviceType device_;
  bool on_;
};
