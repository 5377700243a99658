// Which bands of a config are in force together, and with which set-points.
#include <algorithm>
#include <string>
#include <utility>

#include "base/format.h"
#include "feasibility/targets.h"
#include "moectl/config.h"
#include "moectl/feasibility.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

// Set-points on the metrics of single steps; those of longer windows are no function of the same loads.
Bands set_points(const ControllerConfig& config) {
  Bands points;
  for (const Target& target : targets_of(config)) {
    if (target.cadence == 1) points[target.metric] = {target.value, target.value};
  }
  return points;
}

void judge_one(const LoadSpace& space, const std::string& where, Bands bands, const Bands& points,
               Feasibility& found) {
  for (const auto& [metric, point] : points) {
    const auto band = bands.find(metric);
    if (band == bands.end()) {
      bands[metric] = point;
    } else if (point.low < band->second.low || point.low > band->second.high) {
      const Band& wanted = band->second;
      found.conflicts.push_back({{metric},
                                 where + "the set-point of " + metric + ", " + exact(point.low) +
                                     ", lies outside its band [" + exact(wanted.low) + ", " +
                                     exact(wanted.high) + "]",
                                 "a set-point of " + exact(std::clamp(point.low, wanted.low, wanted.high))});
    }
  }
  Feasibility one = judge(space, bands);
  for (Conflict& conflict : one.conflicts) {
    conflict.message = where + conflict.message;
    found.conflicts.push_back(std::move(conflict));
  }
  found.undecided_together |= one.undecided_together;
  const auto keep = [](std::vector<std::string>& from, std::vector<std::string>& to) {
    for (std::string& metric : from) {
      if (std::find(to.begin(), to.end(), metric) == to.end()) to.push_back(std::move(metric));
    }
  };
  keep(one.not_judged, found.not_judged);
  keep(one.judged_alone, found.judged_alone);
}

}  // namespace

std::vector<Target> targets_of(const ControllerConfig& config) {
  std::vector<Target> targets;
  for (const Actuator which : kActuators) {
    const ActuatorConfig& actuator = config.actuator(which);
    const auto& options = actuator.options.values();
    const auto metric = options.find("metric"), target = options.find("target");
    if (metric == options.end() || target == options.end()) continue;
    const auto* name = std::get_if<std::string>(&metric->second);
    const auto* value = std::get_if<double>(&target->second);
    if (name && value && find_metric(*name))
      targets.push_back({which, *name, *value, actuator.limits.cadence});
  }
  return targets;
}

Feasibility judge_bands(const ControllerConfig& config) {
  const HealthOptions& health = config.monitor.health;
  const LoadSpace space{config.model.experts, config.model.top_k, config.model.tokens_per_step,
                        config.model.targets};
  const Bands points = set_points(config);
  Feasibility found;
  if (health.phases.empty()) {
    if (!health.bands.empty()) judge_one(space, "health.bands: ", health.bands, points, found);
    return found;
  }
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < health.phases.size(); ++i) {
    const Phase& phase = health.phases[i];
    const std::string name = phase.name.empty() ? "" : " (" + phase.name + ")";
    judge_one(space, "health.phases[" + std::to_string(i) + "]" + name + ": ", bands_at(health, begin),
              points, found);
    begin = phase.until;
  }
  // The common bands alone rule what comes after the last phase.
  if (health.phases.back().until >= 0) judge_one(space, "health.bands: ", health.bands, points, found);
  return found;
}

}  // namespace moectl
