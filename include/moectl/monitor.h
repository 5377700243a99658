// LayerMonitor: the history of one layer, from which come smoothed loads and dead experts.
// Time is counted in control steps with data; a step without data changes nothing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl {

struct MonitorOptions {
  double ema = 0.1;             ///< Weight of the newest value in every moving average, (0, 1].
  double dead_fraction = 0.01;  ///< Of the mean load, [0, 1).
  int dead_after = 20;          ///< Steps, ≥ 1.
};

class LayerMonitor {
 public:
  LayerMonitor(const StatsShape& shape, const MonitorOptions& options);

  /// Takes in one step and completes the metrics that need history (`dead_experts`). Does not allocate.
  void observe(const RoutingStats& stats, Metrics& metrics);

  /// EMA of p_i, started at the first observed load. [N]; all zero before the first step with data.
  std::span<const double> smoothed_load() const { return smoothed_; }
  /// For each expert, how many steps in a row its smoothed load has been under dead_fraction / N. [N]
  std::span<const std::int64_t> steps_below() const { return below_; }
  bool is_dead(int expert) const { return below_[static_cast<std::size_t>(expert)] >= options_.dead_after; }
  std::int64_t steps_observed() const { return observed_; }

  void save(StateWriter& out) const;
  void load(StateReader& in);

 private:
  MonitorOptions options_;
  std::vector<double> smoothed_;
  std::vector<std::int64_t> below_;
  std::int64_t observed_ = 0;
};

}  // namespace moectl
