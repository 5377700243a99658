// What makes a record unusable: field, index and value of the first offence, in words. Searched for only after a record
// was found bad, so that good records pay nothing.
#pragma once

#include <cstdint>
#include <string_view>

#include "moectl/stats.h"

namespace moectl {

/// "experts[17] = 99: must be in [0, 64)". An index of -1 stands for a value that is not in an array.
Offence offence_at(std::string_view field, std::int64_t index, std::int64_t value,
                   std::string_view constraint);
Offence offence_at(std::string_view field, std::int64_t index, double value, std::string_view constraint);
/// "gap_sum: the sum is beyond its range".
Offence overflow_of(std::string_view field);

/// The first offence of a batch whose sizes fit; empty if there is none.
Offence first_offence(const StatsShape& shape, const RoutingBatch& batch);
Offence first_offence(const StatsShape& shape, const TokenLosses& batch);
/// Why sums are not valid(); empty if invalid records are the only reason.
Offence first_offence(const RoutingStats& sums);

}  // namespace moectl
