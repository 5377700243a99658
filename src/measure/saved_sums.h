// Sums in a saved state: the payload, and the rows of margins, which are not part of the payload.
#pragma once

#include <string_view>

#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl {

void save_sums(StateWriter& out, std::string_view name, const RoutingStats& stats);
/// `stats` has the shape that was saved. Throws StateError.
void load_sums(StateReader& in, std::string_view name, RoutingStats& stats);

}  // namespace moectl
