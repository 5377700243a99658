// `moectl simulate --like TRACE`: what a trace says of the simulated router, and what the fit found.
#pragma once

#include <string>

#include "simulation/fit.h"

namespace moectl::cli {

/// Of the training records of a trace or run log, "-" = standard input: of about its later half. No layers if none has
/// tokens.
TraceMoments moments_of(const std::string& path);

/// On standard error.
void print_fit(const SimulationFit& fit, const std::string& path);

}  // namespace moectl::cli
