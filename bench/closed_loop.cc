#include "closed_loop.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <thread>

#include "moectl/controller.h"

namespace moectl::bench {

ControllerConfig config_for(const Law& law, const SimulationOptions& plant) {
  ControllerConfig config;
  config.model.layers = plant.layers;
  config.model.experts = plant.experts;
  config.model.top_k = plant.top_k;
  config.model.tokens_per_step = plant.tokens;
  config.model.score_space = plant.score_space;
  config.log.per_expert = false;
  config.expert_bias.policy = law.policy;
  for (const auto& [name, value] : law.options) config.expert_bias.options.set(name, value);
  const double unit = plant.score_scale * (plant.score_space == ScoreSpace::kLogit ? 8 : 1);
  config.expert_bias.limits.min = -16 * unit;
  config.expert_bias.limits.max = 16 * unit;
  config.expert_bias.limits.rate = unit;
  return config;
}

Series run(const ControllerConfig& config, const SimulationOptions& plant, std::int64_t steps) {
  Series series;
  Controller controller(config);
  simulate(controller, plant, steps, [&](const StepReport& report) {
    double vio = 0, floor = 0, cv = 0, floor_cv = 0;
    int seen = 0;
    for (const LayerReport& layer : report.layers) {
      const Metrics& m = *layer.metrics;
      if (!m.max_vio) continue;
      ++seen;
      vio += *m.max_vio;
      floor += floor_max_vio(m).value_or(0);
      cv += *m.load_cv;
      floor_cv += m.sampling_floor_cv ? *m.sampling_floor_cv : m.noise_floor_cv.value_or(0);
    }
    if (seen == 0) return;
    series.max_vio.push_back(vio / seen);
    series.floor.push_back(floor / seen);
    series.cv.push_back(cv / seen);
    series.floor_cv.push_back(floor_cv / seen);
    const LayerReport& first = report.layers.front();
    series.lowest_load.push_back(first.metrics->min_load.value_or(0) * config.model.experts);
    series.aux_weight.push_back(controller.aux_loss_weight(0));
    series.limited += !first.actuators[0].reasons.empty();
  });
  return series;
}

double mean(const std::vector<double>& values, std::size_t first, std::size_t last) {
  last = std::min(last, values.size());
  if (first >= last) return 0;
  return std::accumulate(values.begin() + static_cast<std::ptrdiff_t>(first),
                         values.begin() + static_cast<std::ptrdiff_t>(last), 0.0) /
         static_cast<double>(last - first);
}

double over_floor(const Series& series, std::size_t first, std::size_t last) {
  return mean(series.max_vio, first, last) / mean(series.floor, first, last);
}

int settle(const Series& series, std::size_t from, std::size_t to) {
  to = std::min(to, series.max_vio.size());
  const double bound = 1.6 * mean(series.floor, from, to);
  int in_row = 0;
  for (std::size_t step = from; step < to; ++step) {
    std::vector<double> window(
        series.max_vio.begin() + static_cast<std::ptrdiff_t>(std::max(step, from + 4) - 4),
        series.max_vio.begin() + static_cast<std::ptrdiff_t>(step + 1));
    std::sort(window.begin(), window.end());
    in_row = window[window.size() / 2] < bound ? in_row + 1 : 0;
    if (in_row == 20) return static_cast<int>(step - 19 - from);
  }
  return -1;
}

double excess_area(const Series& series, std::size_t event) {
  const std::size_t size = series.max_vio.size();
  const double base = mean(series.max_vio, size - 100, size);
  double area = 0;
  for (std::size_t i = event; i < event + 100 && i < size; ++i)
    area += std::max(0.0, series.max_vio[i] - base);
  return area;
}

void in_parallel(std::size_t count, const std::function<void(std::size_t)>& work) {
  std::atomic<std::size_t> next{0};
  std::vector<std::thread> threads;
  const unsigned cores = std::max(1U, std::thread::hardware_concurrency());
  for (unsigned i = 0; i < cores; ++i) {
    threads.emplace_back([&] {
      for (std::size_t job = next++; job < count; job = next++) work(job);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace moectl::bench
