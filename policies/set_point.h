// SetPoint: the options of policies that hold a metric at a target: the metric, its layers, the direction in which the
// actuator moves it, its averaging, and the tolerated error.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/policy.h"
#include "policies/choice.h"

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

inline SetPoint SetPoint::from(const PolicyOptions& options) {
  return {.metric = find_metric(options.text("metric")),
          .target = options.number("target"),
          .raises = options.text("effect") == "raises",
          .worst = options.text("over_layers") == "worst",
          .ema = options.number("ema"),
          .error_tolerance = options.number("error_tolerance")};
}

inline StatsNeeds SetPoint::needs() const {
  const auto is_one_of = [this](std::initializer_list<Metrics::Value Metrics::*> fields) {
    return std::find(fields.begin(), fields.end(), metric->value) != fields.end();
  };
  return {.sequences = is_one_of({&Metrics::sequence_cv}),
          .probabilities = is_one_of({&Metrics::token_entropy, &Metrics::router_entropy,
                                      &Metrics::expert_token_information, &Metrics::token_entropy_slope,
                                      &Metrics::importance_cv, &Metrics::routing_variance,
                                      &Metrics::router_fsi, &Metrics::router_fhs}),
          .gradients = is_one_of({&Metrics::grad_norm_variance}),
          .latencies = is_one_of({&Metrics::latency_p50, &Metrics::latency_p95, &Metrics::latency_p99,
                                  &Metrics::tail_sensitivity, &Metrics::tail_correlation}),
          .pairs = is_one_of({&Metrics::pair_lift})};
}

inline std::vector<OptionSpec> SetPoint::options(std::string_view metric, double target, double ema,
                                                 double error_tolerance) {
  std::vector<std::string> names;
  for (const MetricField& field : metric_fields()) names.emplace_back(field.name);
  return {
      choice("metric", metric,
             "the metric to hold; pi averages load_cv² - floor² for excess_cv, which may be negative", names),
      {"target", target, "of the metric", "where the metric should be", -1e6, 1e6},
      choice("effect", "lowers", "what raising the actuator does to the metric", {"lowers", "raises"}),
      choice("over_layers", "mean", "for scope: model, the mean over layers or the worst one",
             {"mean", "worst"}),
      {"ema", ema, "", "weight of the newest window in the averaged metric", 1e-3, 1},
      {"error_tolerance", error_tolerance, "of the target", "errors no larger than this move nothing", 0, 10},
  };
}

}  // namespace moectl::policies
