// The C++ half of python_cost.py: what a record of 8192 tokens × 8 choices and a step of 58 layers × 256 experts cost.
// Prints two lines "name microseconds".
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <span>
#include <vector>

#include "moectl/controller.h"

namespace {

constexpr int kRepeats = 300;

moectl::Controller controller_of(int layers, int experts) {
  moectl::ControllerConfig config;
  config.model = {.layers = layers, .experts = experts, .top_k = 8};
  config.expert_bias.policy = "adaptive_bias";
  return moectl::Controller(config);
}

/// Median time of one call, microseconds; `prepare` is not counted.
template <class Prepare, class Call>
double median_of(Prepare prepare, Call call) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int i = 0; i < kRepeats; ++i) {
    prepare(i);
    const auto begin = Clock::now();
    call();
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
  }
  std::nth_element(times.begin(), times.begin() + kRepeats / 2, times.end());
  return times[kRepeats / 2];
}

}  // namespace

int main() {
  auto recording = controller_of(1, 64);
  std::vector<std::int64_t> experts;
  for (std::int64_t i = 0; i < 8192 * 8; ++i) experts.push_back(i * 7919 % 64);
  const auto nothing = [](int) {};
  std::printf("record %.2f\n", median_of(nothing, [&] { recording.record(0, {.experts = experts}); }));

  auto stepping = controller_of(58, 256);
  // The counts of all layers of four steps, made before, as in Python: what they drive out of the caches is the same.
  std::vector<std::vector<std::int64_t>> counts(4);
  for (int step = 0; step < 4; ++step)
    for (int layer = 0; layer < 58; ++layer)
      for (int i = 0; i < 256; ++i)
        counts[static_cast<std::size_t>(step)].push_back(100 + (i * 7 + step * 13 + layer) % 200);
  const auto record_counts = [&](int step) {
    const std::span all = counts[static_cast<std::size_t>(step % 4)];
    for (int layer = 0; layer < 58; ++layer) {
      const auto own = all.subspan(static_cast<std::size_t>(layer) * 256, 256);
      const std::int64_t sum = std::accumulate(own.begin(), own.end(), std::int64_t{0});
      stepping.record_with(layer, [&](moectl::RoutingStats& stats) { stats.add_counts(own, (sum + 7) / 8); });
    }
  };
  std::printf("step %.2f\n", median_of(record_counts, [&] { stepping.step({.loss = 2.0}); }));
}
