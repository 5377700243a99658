#include "closed_loop.h"

#include <algorithm>
#include <atomic>
#include <span>
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
    const StepFigures figures = figures_of(report);
    if (!figures.max_vio) return;
    series.steps.push_back(figures);
    const RoutingStats& stats = *report.layers.front().stats;
    std::vector<double>& loads = series.loads.emplace_back(stats.counts().begin(), stats.counts().end());
    for (double& load : loads) load *= config.model.experts / static_cast<double>(stats.assignments());
  });
  return series;
}

Figures figures_between(const Series& series, std::size_t from, std::size_t to) {
  to = std::min(to, series.steps.size());
  return compute_figures(std::span(series.steps).subspan(from, to - from));
}

int settle(const Series& series, std::size_t from, std::size_t to) {
  const auto step = figures_between(series, from, to).settle;
  return step ? static_cast<int>(*step - series.steps[from].step) : -1;
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
