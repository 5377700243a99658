// Actuators that would steer one variable together, and what a set-point can ask of a metric.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "feasibility/targets.h"
#include "moectl/feasibility.h"

namespace moectl {

/// What the metric can be at N and k, whatever the router does; infinite where it has no end. Absent where no end is known.
std::optional<Extent> bounds_of(std::string_view metric, const LoadSpace& space);
/// "from 0 to 2.646".
std::string text_of(const Extent& bounds);
/// True if the metric follows from the loads: what biases steer.
bool is_load_metric(std::string_view metric);

/// A set-point beyond its metric's bounds.
std::optional<Conflict> judge_bounds(const Target& target, const LoadSpace& space);
/// Two policies that steer one variable, and actuators that the guard cannot move.
struct ActuatorJudgement {
  std::vector<Conflict> conflicts;
  std::vector<std::string> notes;  ///< What works, though not as it may have been meant.
};
ActuatorJudgement judge_actuators(const ControllerConfig& config);
/// Which policy may hold which variable, a line each.
const std::vector<std::string>& actuator_recipe();

}  // namespace moectl
