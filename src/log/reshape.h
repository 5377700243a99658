// Recorded sums in the shape that a controller or another record has.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "moectl/stats.h"

namespace moectl {

/// The same sums in another shape with as many experts: what `needs` does not ask for is dropped, what was
/// not recorded stays absent. Domains are matched by name.
RoutingStats reshaped(const RoutingStats& stats, const std::vector<std::string>& domains,
                      const StatsNeeds& needs, const std::vector<std::string>& wanted_domains);

/// Adds the tokens that chose both of two experts to those of the same layer, where `more` has them; sums of another shape
/// begin anew.
void add_pairs(std::optional<RoutingStats>& sum, const RoutingStats& more);

/// Adds the recorded sums `more` of as many experts and the same top-k to `sum`; both name their domains, sorted. A sum that has to
/// cover every token is absent where one of the two lacks it; one that carries its own number of observations covers those of both.
void add_recorded(RoutingStats& sum, std::vector<std::string>& domains, const RoutingStats& more,
                  const std::vector<std::string>& more_domains);

/// Throws LogError, which says what was `added` up of which layer, unless the sum is in its range.
void require_range(const RoutingStats& sum, int layer, const std::string& added);

}  // namespace moectl
