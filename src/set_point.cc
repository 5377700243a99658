#include "set_point.h"

namespace moectl::policies {

SetPoint SetPoint::from(const PolicyOptions& options) {
  return {.metric = find_metric(options.text("metric")),
          .target = options.number("target"),
          .raises = options.text("effect") == "raises",
          .worst = options.text("over_layers") == "worst"};
}

std::vector<OptionSpec> SetPoint::options(std::string_view metric, double target) {
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
       .description = "for scope: model, the mean over layers or the largest",
       .choices = {"mean", "worst"}},
  };
}

OptionSpec ema_option(double weight) {
  return {.name = "ema",
          .default_value = weight,
          .unit = "",
          .description = "weight of the newest window in the averaged metric",
          .min = 1e-3,
          .max = 1};
}

}  // namespace moectl::policies
