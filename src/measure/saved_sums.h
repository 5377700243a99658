// Sums in a saved state.
#pragma once

#include <string_view>

#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl {

/// Writes or reads `stats`, which must have the shape that was saved; of constant length. Throws StateError.
void exchange_sums(StateIo& io, std::string_view name, RoutingStats& stats);

}  // namespace moectl
