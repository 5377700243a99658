// What several places do to the biases of a layer. A shift that all have in common moves no token.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

#include "base/lanes.h"

namespace moectl::policies {

/// Takes out the mean.
inline void centre(std::span<double> biases) {
  const double mean = sum_of(biases) / static_cast<double>(biases.size());
  for_each_eight(biases.size(),
                 [&](std::size_t i, auto at) { at.put(&biases[i], at.get(&biases[i]) - mean); });
}

/// Whether `a` and `b`, of equal length, differ by more than a common shift and what rounding explains.
inline bool differ(std::span<const double> a, std::span<const double> b) {
  constexpr double kRounding = 1e-12;
  const double shift = (sum_of(a) - sum_of(b)) / static_cast<double>(b.size());
  double most = 0, size = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    most = std::max(most, std::abs(a[i] - b[i] - shift));
    size = std::max(size, std::abs(b[i]));
  }
  return most > kRounding * size;
}

}  // namespace moectl::policies
