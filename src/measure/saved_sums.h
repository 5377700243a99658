// Sums in a saved state: the payload, and the rows of margins, which are not part of the payload.
#pragma once

#include <string_view>

#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl {

/// Writes or reads `stats`, which has the shape that was saved. Of a constant length but for rows of margins, one for
/// each token recorded. Throws StateError.
void exchange_sums(StateIo& io, std::string_view name, RoutingStats& stats);

}  // namespace moectl
