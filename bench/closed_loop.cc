#include "closed_loop.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <span>
#include <thread>

#include "moectl/controller.h"
#include "simulated_loop.h"

namespace moectl::bench {

ControllerConfig config_for(const Law& law, const SimulationOptions& plant) {
  std::map<std::string, OptionValue> options;
  for (const auto& [name, value] : law.options) options[name] = value;
  return moectl::config_for(plant, law.policy, options, 16, 1);
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
