// What the files of RoutingStats share: sums that wrap around, and checks of what callers give.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

#include "moectl/stats.h"

namespace moectl {

// Sums wrap around on overflow. A wrapped sum is negative, so valid() detects it, and addition stays associative.
inline std::int64_t wrapping_add(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
}

inline std::int64_t wrapping_product(std::int64_t a, std::int64_t b) {
  return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
}

// Whether numbers of at least 0 sum to more than `most`. Ordinary numbers take one pass without a branch.
inline bool sum_exceeds(std::span<const std::int64_t> values, std::int64_t most) {
  std::int64_t any = 0, sum = 0;
  for (const std::int64_t value : values) {
    any |= value;
    sum = wrapping_add(sum, value);
  }
  // So many numbers below 2^36 stay below 2^62.
  if (any < std::int64_t{1} << 36 && values.size() <= std::size_t{1} << 26) return sum > most;
  for (const std::int64_t value : values) {
    if ((most -= value) < 0) return true;
  }
  return false;
}

// Negative if the value is beyond ±2^62, where the two highest bits differ: on the way to an overflow, or back from one.
inline std::int64_t beyond_half(std::int64_t value) {
  return value ^ static_cast<std::int64_t>(static_cast<std::uint64_t>(value) << 1);
}

inline constexpr std::int64_t kNotRouted = -1;  // an index that is no expert

inline void require_size(const char* name, std::size_t found, std::size_t expected) {
  if (found != expected) {
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(found) + " elements: must be " +
                                std::to_string(expected));
  }
}

inline void check_domain(const StatsShape& shape, int domain) {
  if (domain < 0 || domain >= shape.needs.domains) {
    throw std::invalid_argument("domain: " + std::to_string(domain) + ": must be 0 to " +
                                std::to_string(shape.needs.domains - 1));
  }
}

/// `collected`: whether the stats hold `what`.
inline void check_expert(int expert, int experts, bool collected, const char* what) {
  if (collected && expert >= 0 && expert < experts) return;
  throw std::invalid_argument("expert: " + std::to_string(expert) + ": must be 0 to " +
                              std::to_string(experts - 1) + " of stats that collect " + what);
}

}  // namespace moectl
