// What counting costs on an accelerator: record for 8192 tokens × 8 of 256 experts beside the peers in one operator, and a
// step of 58 layers. On a CPU it runs the same operators there, which says nothing of an accelerator but that it runs.
//
//   device_bench            the first GPU, or the CPU where there is none
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/torch.h>
#include <torch/version.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "moectl/torch/controller.h"
#include "torch/operator_calls.h"

namespace {

using torch::Tensor;
using Clock = std::chrono::steady_clock;

constexpr int kLayers = 58, kExperts = 256, kTopK = 8, kTokens = 8192;
// Between two marks: fewer kernels in all than a stream takes before it makes the host wait.
constexpr int kCalls = 8;

double microseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

class Device {
 public:
  Device() : device_(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU) {
    if (device_.is_cpu()) return;
    a_ = torch::ones({8192, 8192}, torch::dtype(torch::kBFloat16).device(device_));
    b_ = torch::empty_like(a_);
  }
  torch::Device device() const { return device_; }

  void wait() const {
    if (device_.is_cpu()) return;
    c10::Event mark(device_.type());
    mark.record(stream());
    while (!mark.query()) {
    }
  }
  /// Time on the device of one call, in µs: kCalls between two events, behind work long enough that the host is ahead.
  double on_device(const std::function<void()>& call) const {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 5)
    if (!device_.is_cpu()) {
      c10::Event first(device_.type(), c10::EventFlag::BACKEND_DEFAULT),
          last(device_.type(), c10::EventFlag::BACKEND_DEFAULT);
      for (int i = 0; i < 100; ++i) torch::mm_out(b_, a_, a_);
      first.record(stream());
      for (int i = 0; i < kCalls; ++i) call();
      last.record(stream());
      wait();
      return 1e3 * first.elapsedTime(last) / kCalls;
    }
#endif
    return beside(call);
  }
  /// Time of one call, in µs, from its order to its end, many in a row: what a loop sees that does nothing else.
  double beside(const std::function<void()>& call) const {
    const int calls = device_.is_cpu() ? kCalls : 50;
    wait();
    const auto start = Clock::now();
    for (int i = 0; i < calls; ++i) call();
    wait();
    return microseconds_since(start) / calls;
  }
  /// Time that the host spends to order one call, in µs.
  double on_host(const std::function<void()>& call) const {
    wait();
    const auto start = Clock::now();
    for (int i = 0; i < kCalls; ++i) call();
    return microseconds_since(start) / kCalls;
  }

 private:
  c10::Stream stream() const {
    return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
  }

  torch::Device device_;
  Tensor a_;
  mutable Tensor b_;
};

double median_of_five(const std::function<double()>& measure) {
  std::vector<double> times;
  for (int i = 0; i < 5; ++i) times.push_back(measure());
  std::sort(times.begin(), times.end());
  return times[2];
}

std::size_t operators_of(const std::function<void()>& call, const char* name = nullptr) {
  const moectl::OperatorCalls calls;
  call();
  std::size_t count = 0;
  for (const moectl::OperatorCall& one : calls.all())
    count += one.depth == 0 && (name == nullptr || one.name == name);
  return count;
}

void row(const Device& device, const char* what, const std::function<void()>& call) {
  for (int i = 0; i < 3; ++i) call();
  device.wait();
  const std::size_t operators = operators_of(call);
  const double on_device = median_of_five([&] { return device.on_device(call); });
  const double host = median_of_five([&] { return device.on_host(call); });
  const double beside = median_of_five([&] { return device.beside(call); });
  std::printf("| %-44s | %6.1f | %6.1f | %6.1f | %4zu |\n", what, on_device, host, beside, operators);
  std::fflush(stdout);
}

moectl::ControllerConfig config_of(int layers, bool all, int lag = 1) {
  moectl::ControllerConfig config;
  config.lag = lag;
  config.model.layers = layers;
  config.model.experts = kExperts;
  config.model.top_k = kTopK;
  config.expert_bias.policy = "sign_bias";
  if (all) {
    config.collect.gap = config.collect.margins = config.collect.probabilities = config.collect.sequences =
        true;
    config.expert_bias.policy = "adaptive_bias";
  }
  return config;
}

}  // namespace

int main() {
  const Device device;
  const torch::Device where = device.device();
  std::printf("device: %s, LibTorch %s\n\n", where.str().c_str(), TORCH_VERSION);
  std::printf("record: 8192 tokens x 8 of 256 experts, medians of 5, in microseconds\n");
  std::printf("| %-44s | device | host   | both   | operators |\n|---|---|---|---|---|\n", "call");

  torch::manual_seed(1);
  const Tensor scores = torch::rand({8, kTokens / 8, kExperts}).to(where);
  const auto [values, best] = scores.topk(kTopK + 1, -1);
  const Tensor indices = best.narrow(-1, 0, kTopK).contiguous(), flat = indices.reshape(-1);
  const Tensor top_values = values.contiguous();
  const Tensor counts = torch::zeros({kExperts}, torch::dtype(torch::kLong).device(where));
  const Tensor ones = torch::ones_like(flat);
  const Tensor probabilities = scores.softmax(-1);

  row(device, "torch::bincount (waits for an accelerator)",
      [&] { (void)torch::bincount(flat, {}, kExperts); });
  row(device, "scatter_add_ of ones", [&] { counts.scatter_add_(0, flat, ones); });
  const moectl::TorchOptions options{.device = where, .count_by_operators = true};
  {
    moectl::TorchController controller(config_of(1, false), options);
    row(device, "record, counts alone", [&] { controller.record(0, indices.view({-1, kTopK})); });
  }
  {
    moectl::TorchController controller(config_of(1, true), options);
    row(device, "record, adaptive_bias and all that it collects", [&] {
      controller.record(0, indices,
                        {.top_values = top_values, .probabilities = probabilities, .biased_scores = scores});
    });
  }

  std::printf("\nstep: 58 layers x 256 experts, each recorded once before, medians of 5, in microseconds\n");
  std::printf(
      "| policy, lag | host, record of all layers | host, step | copies a step | KB out | KB back "
      "|\n|---|---|---|---|---|---|\n");
  for (const int lag : {0, 1}) {
    moectl::TorchController controller(config_of(kLayers, false, lag), options);
    const Tensor some = indices.view({-1, kTopK}).narrow(0, 0, 1024);
    double recording = 0;
    const auto record_all = [&] {
      device.wait();
      const auto start = Clock::now();
      for (int layer = 0; layer < kLayers; ++layer) controller.record(layer, some);
      recording = microseconds_since(start);
      if (lag == 1) device.wait();  // as behind the rest of a training step
    };
    const auto one = [&] {
      record_all();
      const auto start = Clock::now();
      controller.step();
      return microseconds_since(start);
    };
    for (int i = 0; i < 3; ++i) one();
    const double step = median_of_five(one);
    record_all();
    const std::size_t copies = operators_of([&] { controller.step(); }, "aten::copy_");
    const std::size_t out = sizeof(std::int64_t) * kLayers * controller.controller().shape(0).flat_size();
    const std::size_t back = sizeof(float) * kLayers * (kExperts + 2);
    std::printf("| sign_bias, lag %d | %.0f | %.0f | %zu | %.0f | %.0f |\n", lag, recording, step, copies,
                static_cast<double>(out) / 1e3, static_cast<double>(back) / 1e3);
  }
}
