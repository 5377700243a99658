// What makes a whole ControllerConfig usable, wherever it came from. Internal: users call validate().
#pragma once

#include <optional>

#include "base/fields.h"
#include "moectl/config.h"
#include "moectl/policy.h"

namespace moectl {

/// Fills in the policies' options not given, and returns the first thing that is wrong.
std::optional<ConfigProblem> complete(ControllerConfig& config, const PolicyRegistry& registry);
/// Of one actuator: the key is one of its limits, or "initial".
std::optional<ConfigProblem> problem_in(Actuator actuator, const Limits& limits, double initial);

/// "unknown policy; did you mean …" for a name that is not in the registry, or cannot serve the actuator;
/// else empty.
std::string policy_fault(const std::string& name, Actuator actuator, const PolicyRegistry& registry);

/// "; did you mean 'x'?" with the nearest of the known words, or empty if none is near.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& known);

}  // namespace moectl
