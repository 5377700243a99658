#pragma once

#include <optional>
#include <string>

#include "moectl/config.h"
#include "moectl/simulation.h"

namespace moectl::simulated {

/// An option that makes no sense, as a member of SimulationOptions.
struct Fault {
  std::string option, value, constraint;
};
std::optional<Fault> find_fault(const SimulationOptions& options);
/// Throws std::invalid_argument: "SimulationOptions: name = value: constraint".
void check(const SimulationOptions& options);
/// What a config must say of the simulated model.
ModelConfig model_of(const SimulationOptions& options);

}  // namespace moectl::simulated
