// Plans that move few experts.
#pragma once

#include <span>

#include "moectl/placement.h"

namespace moectl::placing {

/// From the placement of single copies, the best single move or exchange again and again, as long as moves are left.
/// `o`: global, with its defaults filled in and moves enough for the slots that may not stay free.
Placement plan_few_moves(std::span<const double> loads, const PlacementOptions& o);

}  // namespace moectl::placing
