// LayerMonitor: the history of one layer: smoothed loads, dead experts, trends and health. Time is counted in control
// steps; a step without data changes only the count of such steps.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "moectl/health.h"
#include "moectl/metrics.h"
#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl {

struct MonitorOptions {
  double ema = 0.1;             ///< Weight of the newest value in every moving average, (0, 1].
  double dead_fraction = 0.01;  ///< An expert is dead if its smoothed load is below this part of its target …
  int dead_after = 20;          ///< … for this many steps, ≥ 1. dead_fraction is in [0, 1).
  int trend_window = 50;        ///< Steps over which slopes and correlations are taken, ≥ 4.
  /// Trends of the load vector and of every metric, which `oscillating` and `shift` need. They cost as much as a second
  /// set of metrics, so they are off by default.
  bool trends = false;
  /// With `trends`: those of the load vector alone. trend() then has nothing, and a layer takes far less memory.
  bool loads_only = false;
  HealthOptions health{};
};

class LayerMonitor {
 public:
  /// Throws std::invalid_argument on options out of range. `metrics`: the options that the layer is measured with. Its
  /// targets define dead experts and the reference for health.
  LayerMonitor(const StatsShape& shape, const MonitorOptions& options, const MetricsOptions& metrics = {});
  ~LayerMonitor();
  LayerMonitor(LayerMonitor&&) noexcept;
  LayerMonitor& operator=(LayerMonitor&&) noexcept;

  /// Adds one step, and sets the metrics that need history. `loss` is the loss of the step, for the correlations. Does
  /// not allocate.
  void observe(const RoutingStats& stats, Metrics& metrics, std::optional<double> loss = std::nullopt);
  /// Adds a step without usable data.
  void observe_nothing();

  /// EMA of p_i [N], started at the first observed load; all zero before the first step with data.
  std::span<const double> smoothed_load() const;
  /// EMA of each metric, started at its first value; absent before it.
  const Metrics& smoothed() const;
  /// For each expert, the number of consecutive steps with a smoothed load below dead_fraction of its target. [N]
  std::span<const std::int64_t> steps_below() const;
  bool is_dead(int expert) const;
  std::int64_t steps_observed() const;
  /// Share of the steps with recorded gradients in which each expert had one above 0. [N]; empty before the
  /// first such step.
  std::span<const double> update_frequency() const;

  Health health() const;
  bool has(FailureMode mode) const;
  /// Failure modes, alerts and broken bands that hold now.
  std::span<const std::string_view> alerts() const;
  std::string_view phase() const;

  /// Trend of one metric over the window, computed at the call. Absent unless `trends` is on.
  struct Trend {
    std::optional<double> ema, slope, autocorrelation, sign_flips, loss_correlation;
  };
  Trend trend(const MetricField& field) const;

  /// Saves or loads. A state that cannot be loaded (StateError) leaves the monitor as it was.
  void exchange(StateIo& io);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// Copies history-based metrics, which only a monitor can set, from the step to the window ending with it.
void copy_history(const Metrics& from, Metrics& to);

}  // namespace moectl
