#pragma once

#include <optional>
#include <string>

#include "moectl/simulation.h"

namespace moectl::simulated {

/// An option that makes no sense, as a member of SimulationOptions.
struct Fault {
  std::string option, value, constraint;
};
std::optional<Fault> find_fault(const SimulationOptions& options);
/// Throws std::invalid_argument: "SimulationOptions: name = value: constraint".
void check(const SimulationOptions& options);

}  // namespace moectl::simulated
