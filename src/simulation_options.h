#pragma once

#include "moectl/simulation.h"

namespace moectl::simulated {

/// Throws std::invalid_argument: "SimulationOptions: name = value: constraint".
void check(const SimulationOptions& options);

}  // namespace moectl::simulated
