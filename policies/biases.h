// What several places do to the biases of a layer. A shift that all have in common moves no token.
#pragma once

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
  Double8 most = splat(0), size = splat(0);
  for_each_eight(b.size(), [&](std::size_t i, auto at) {
    const Double8 then = at.get(&b[i]), change = at.keep(at.get(&a[i]) - then - shift);
    most = larger(most, larger(change, -change));
    size = larger(size, larger(then, -then));
  });
  return largest_of(most) > kRounding * largest_of(size);
}

}  // namespace moectl::policies
