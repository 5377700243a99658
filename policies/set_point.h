// SetPoint: the options of policies that hold a metric at a target: the metric, its layers, the direction in which the
// actuator moves it, its averaging, and the tolerated error.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/policy.h"

namespace moectl::policies {

struct SetPoint {
  const MetricField* metric = nullptr;
  double target = 0;
  bool raises = false;         ///< Raising the actuator raises the metric.
  bool worst = false;          ///< For `scope: model`, the worst over layers instead of the mean.
  double ema = 1;              ///< Weight of the newest window in the averaged metric.
  double error_tolerance = 0;  ///< Relative to the target.

  /// From options that `options` declared.
  static SetPoint from(const PolicyOptions& options);
  /// With these defaults.
  static std::vector<OptionSpec> options(std::string_view metric, double target, double ema,
                                         double error_tolerance);

  /// The sums without which the metric is absent.
  StatsNeeds needs() const;
  const Metrics& metrics(const LayerView& layer) const { return worst ? layer.worst : layer.metrics; }
  /// Measured value minus target, with the sign reversed if `raises`: a positive error asks for more of the actuator.
  double error(double measured) const { return raises ? target - measured : measured - target; }
};

}  // namespace moectl::policies
