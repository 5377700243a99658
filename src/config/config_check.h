// What makes a whole ControllerConfig usable, wherever it came from. Internal: users call validate().
#pragma once

#include <optional>

#include "config/config_yaml.h"
#include "moectl/config.h"
#include "moectl/policy.h"

namespace moectl {

/// Fills in the policies' options not given, and returns the first thing that is wrong.
std::optional<ConfigProblem> complete(ControllerConfig& config, const PolicyRegistry& registry);

/// The names of the policies that can serve the actuator, for "did you mean".
std::vector<std::string> policies_for(Actuator actuator, const PolicyRegistry& registry);

/// "unknown policy; did you mean …" for a name that is not in the registry, or cannot serve the actuator;
/// else empty.
std::string policy_fault(const std::string& name, Actuator actuator, const PolicyRegistry& registry);

/// A number as messages and files show it: the shortest form that reads back exactly.
std::string shown(double value);

}  // namespace moectl
