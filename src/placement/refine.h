// Our own planner of one node: EPLB's rules, then copies of one expert apart, and exchanges while they make the loads more even.
#pragma once

#include <span>
#include <vector>

#include "moectl/placement.h"
#include "placement/layout.h"

namespace moectl::placing {

/// The samples of one expert over their mean, 1 where it has none.
void append_shares(std::span<const double> samples, Index experts, Index e, std::vector<double>& shares);

/// Steps 2 and 3 for one node. `shares`: by expert, the samples over their mean [N × rows]. `o`: with its defaults filled in.
Layout plan_node(std::span<const double> loads, std::span<const double> shares, const PlacementOptions& o);

}  // namespace moectl::placing
