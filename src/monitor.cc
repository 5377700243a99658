#include "moectl/monitor.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moectl {

LayerMonitor::LayerMonitor(const StatsShape& shape, const MonitorOptions& options)
    : options_(options),
      smoothed_(static_cast<std::size_t>(std::max(0, shape.experts)), 0.0),
      below_(static_cast<std::size_t>(std::max(0, shape.experts)), 0) {
  if (shape.experts < 1) {
    throw std::invalid_argument("experts: " + std::to_string(shape.experts) + ": must be at least 1");
  }
  if (!(options.ema > 0 && options.ema <= 1)) {
    throw std::invalid_argument("ema: " + std::to_string(options.ema) + ": must be above 0 and at most 1");
  }
  if (!(options.dead_fraction >= 0 && options.dead_fraction < 1)) {
    throw std::invalid_argument("dead_fraction: " + std::to_string(options.dead_fraction) +
                                ": must be at least 0 and below 1");
  }
  if (options.dead_after < 1) {
    throw std::invalid_argument("dead_after: " + std::to_string(options.dead_after) + ": must be at least 1");
  }
}

void LayerMonitor::observe(const RoutingStats& stats, Metrics& metrics) {
  metrics.dead_experts.reset();
  if (!metrics.max_load) return;  // no data
  const std::span<const std::int64_t> counts = stats.counts();
  if (counts.size() != smoothed_.size()) {
    throw std::invalid_argument("stats: " + std::to_string(counts.size()) + " experts: must be " +
                                std::to_string(smoothed_.size()));
  }
  const double assignments = static_cast<double>(stats.assignments());
  const double weight = observed_ == 0 ? 1.0 : options_.ema;
  const double threshold = options_.dead_fraction / static_cast<double>(counts.size());
  std::int64_t dead = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    smoothed_[i] += weight * (static_cast<double>(counts[i]) / assignments - smoothed_[i]);
    below_[i] = smoothed_[i] < threshold ? below_[i] + 1 : 0;
    dead += below_[i] >= options_.dead_after ? 1 : 0;
  }
  ++observed_;
  metrics.dead_experts = static_cast<double>(dead);
}

void LayerMonitor::save(StateWriter& out) const {
  out.put("monitor.observed", observed_);
  out.put("monitor.smoothed", std::span<const double>(smoothed_));
  out.put("monitor.below", std::span<const std::int64_t>(below_));
}

void LayerMonitor::load(StateReader& in) {
  // Read everything before anything is taken over: a bad state leaves the monitor as it was.
  std::vector<double> smoothed(smoothed_.size());
  std::vector<std::int64_t> below(below_.size());
  const std::int64_t observed = in.get_int("monitor.observed");
  in.get("monitor.smoothed", std::span<double>(smoothed));
  in.get("monitor.below", std::span<std::int64_t>(below));
  observed_ = observed;
  smoothed_ = std::move(smoothed);
  below_ = std::move(below);
}

}  // namespace moectl
