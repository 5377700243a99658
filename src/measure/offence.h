// What makes a record unusable: field, index and value of the first offence, in words. Searched for only after a record
// was found bad, so that good records pay nothing.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "moectl/stats.h"

namespace moectl {

/// "experts[17] = 99: must be in [0, 64)". An index of -1 stands for a value that is not in an array.
Offence offence_at(std::string_view field, std::int64_t index, std::int64_t value,
                   std::string_view constraint);
Offence offence_at(std::string_view field, std::int64_t index, double value, std::string_view constraint);
/// "gap_sum: the sum is beyond its range".
Offence overflow_of(std::string_view field);

/// What counts that were summed elsewhere say: whether they can be true, and Σ_t k_t².
struct CheckedCounts {
  Offence offence;
  std::int64_t choices_sq = 0;
};
/// The one check of counts, of a trace and of a program: each at least 0, in sum at most tokens · top_k. `choices_sq`,
/// if given, must be a Σ_t k_t² of tokens with this sum; else it is formed: k² for each token where the sum is tokens · k,
/// otherwise that of numbers k_t as even as they can be.
CheckedCounts check_counts(const StatsShape& shape, std::span<const std::int64_t> counts, std::int64_t tokens,
                           std::optional<std::int64_t> choices_sq);

/// The first offence of a batch whose sizes fit; empty if there is none.
Offence first_offence(const StatsShape& shape, const RoutingBatch& batch);
Offence first_offence(const StatsShape& shape, const TokenLosses& batch);
/// Whether tokens can have such sums, none of which is negative: no part is more than its whole, as the tokens with a
/// domain than all tokens, and the near gaps of an expert than its assignments. Sums by expert that the host forms itself
/// (losses, norms, latencies) and sums over sequences are not compared.
bool fit_together(const RoutingStats& sums);
/// Why sums are not valid(); empty if invalid records are the only reason.
Offence first_offence(const RoutingStats& sums);

}  // namespace moectl
