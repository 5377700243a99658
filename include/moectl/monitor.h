// LayerMonitor: the history of one layer, from which come smoothed loads, dead experts, trends and health.
// Time is counted in control steps; a step without data changes nothing but the count of such steps.
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
  double dead_fraction = 0.01;  ///< Of the mean load, with unequal targets of the expert's own; [0, 1).
  int dead_after = 20;          ///< Steps, ≥ 1.
  int trend_window = 50;        ///< Steps, ≥ 4.
  /// Trends of the load vector and of every metric: what `oscillating` and `shift` need. The cost of a second
  /// set of metrics, so off unless asked for.
  bool trends = false;
  HealthOptions health{};
};

class LayerMonitor {
 public:
  /// Throws std::invalid_argument on options out of range. `metrics`: what the layer is measured with; its targets say
  /// from which load on an expert is dead, and what healthy is held against.
  LayerMonitor(const StatsShape& shape, const MonitorOptions& options, const MetricsOptions& metrics = {});
  ~LayerMonitor();
  LayerMonitor(LayerMonitor&&) noexcept;
  LayerMonitor& operator=(LayerMonitor&&) noexcept;

  /// Takes in one step and completes the metrics that need history. `loss` is the step's, for the
  /// correlations. Does not allocate.
  void observe(const RoutingStats& stats, Metrics& metrics, std::optional<double> loss = std::nullopt);
  /// A step without usable data.
  void observe_nothing();

  /// EMA of p_i, started at the first observed load. [N]; all zero before the first step with data.
  std::span<const double> smoothed_load() const;
  /// EMA of each metric, started at its first value; absent before it.
  const Metrics& smoothed() const;
  /// For each expert, how many steps in a row its smoothed load has been under dead_fraction of its target. [N]
  std::span<const std::int64_t> steps_below() const;
  bool is_dead(int expert) const;
  std::int64_t steps_observed() const;
  /// Share of the steps with recorded gradients in which each expert had one above 0. [N]; empty before the
  /// first such step.
  std::span<const double> update_frequency() const;

  Health health() const;
  bool has(FailureMode mode) const;
  /// Failure modes, alerts and broken bands that stand now.
  std::span<const std::string_view> alerts() const;
  std::string_view phase() const;

  /// Trend of one metric over the window; computed when asked for. Absent unless `trends` is on.
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

/// Copies what only a monitor can know from one set of metrics to another: of a step to those of a window
/// that ends with it.
void copy_history(const Metrics& from, Metrics& to);

}  // namespace moectl
