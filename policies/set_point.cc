#include "policies/set_point.h"

#include <algorithm>
#include <initializer_list>

namespace moectl::policies {

SetPoint SetPoint::from(const PolicyOptions& options) {
  return {.metric = find_metric(options.text("metric")),
          .target = options.number("target"),
          .raises = options.text("effect") == "raises",
          .worst = options.text("over_layers") == "worst",
          .ema = options.number("ema"),
          .error_tolerance = options.number("error_tolerance")};
}

StatsNeeds SetPoint::needs() const {
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
                                  &Metrics::tail_sensitivity, &Metrics::tail_correlation})};
}

std::vector<OptionSpec> SetPoint::options(std::string_view metric, double target, double ema,
                                          double error_tolerance) {
  std::vector<std::string> names;
  for (const MetricField& field : metric_fields()) names.emplace_back(field.name);
  return {
      {.name = "metric",
       .default_value = std::string(metric),
       .unit = "",
       .description = "the process variable; pi averages excess_cv signed, in squares",
       .choices = names},
      {.name = "target",
       .default_value = target,
       .unit = "of the metric",
       .description = "where the metric should be",
       .min = -1e6,
       .max = 1e6},
      {.name = "effect",
       .default_value = std::string("lowers"),
       .unit = "",
       .description = "what raising the actuator does to the metric",
       .choices = {"lowers", "raises"}},
      {.name = "over_layers",
       .default_value = std::string("mean"),
       .unit = "",
       .description = "for scope: model, the mean over layers or the worst one",
       .choices = {"mean", "worst"}},
      {.name = "ema",
       .default_value = ema,
       .unit = "",
       .description = "weight of the newest window in the averaged metric",
       .min = 1e-3,
       .max = 1},
      {.name = "error_tolerance",
       .default_value = error_tolerance,
       .unit = "of the target",
       .description = "errors no larger than this move nothing",
       .min = 0,
       .max = 10},
  };
}

}  // namespace moectl::policies
