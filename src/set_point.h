// What the laws of a scalar share that hold a metric at a target: which metric, of which layers, and which
// way the actuator moves it.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "moectl/policy.h"

namespace moectl::policies {

struct SetPoint {
  const MetricField* metric = nullptr;
  double target = 0;
  bool raises = false;  ///< Raising the actuator raises the metric.
  bool worst = false;   ///< For `scope: model`, the largest over layers instead of the mean.

  /// From options that `options` declared.
  static SetPoint from(const PolicyOptions& options);
  static std::vector<OptionSpec> options(std::string_view metric, double target);

  const Metrics& metrics(const LayerView& layer) const { return worst ? layer.worst : layer.metrics; }
  /// What is measured less the target, turned so that a positive error asks for more of the actuator.
  double error(double measured) const { return raises ? target - measured : measured - target; }
};

/// The averaging that they share as well.
OptionSpec ema_option(double weight);

}  // namespace moectl::policies
