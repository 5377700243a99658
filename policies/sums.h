// Sums over experts in four lanes: the order is fixed, so the bits are the same everywhere, and the additions
// need not wait for each other.
#pragma once

#include <array>
#include <cstddef>
#include <span>

namespace moectl::policies {

inline double sum_of(std::span<const double> v) {
  std::array<double, 4> lanes{};
  std::size_t i = 0;
  for (; i + 4 <= v.size(); i += 4) {
    for (std::size_t lane = 0; lane < 4; ++lane) lanes[lane] += v[i + lane];
  }
  for (; i < v.size(); ++i) lanes[0] += v[i];
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

/// Both must have the same length.
inline double dot(std::span<const double> a, std::span<const double> b) {
  std::array<double, 4> lanes{};
  std::size_t i = 0;
  for (; i + 4 <= a.size(); i += 4) {
    for (std::size_t lane = 0; lane < 4; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
  }
  for (; i < a.size(); ++i) lanes[0] += a[i] * b[i];
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

}  // namespace moectl::policies
