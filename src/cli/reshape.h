// Recorded sums in the shape that a controller or another record has.
#pragma once

#include <string>
#include <vector>

#include "moectl/stats.h"

namespace moectl::cli {

/// The same sums in another shape with as many experts: what `needs` does not ask for is dropped, what was
/// not recorded stays absent. Domains are matched by name.
RoutingStats reshaped(const RoutingStats& stats, const std::vector<std::string>& domains,
                      const StatsNeeds& needs, const std::vector<std::string>& wanted_domains);

}  // namespace moectl::cli
