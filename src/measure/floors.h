// The floors of balance: what loads still show whose tokens choose their experts by the targets.
#pragma once

#include <algorithm>
#include <limits>
#include <span>

#include "moectl/load_targets.h"

namespace moectl {

/// MaxVio of a CV floor f: linear · f + square · f², where it grows with f. From the top of the parabola on, which few
/// experts have (square < 0) and only targets of less than a token a step reach, it stays what it is there.
struct Floors {
  double unit_cv = 0;  ///< CV floor of one token; of T tokens, over √T.
  double linear = 0, square = 0;
  double most_cv() const {
    return square < 0 ? -linear / (2 * square) : std::numeric_limits<double>::infinity();
  }
  double max_vio(double cv) const {
    const double f = std::min(cv, most_cv());
    return linear * f + square * f * f;
  }
};
Floors floors_of(const LoadTargets& targets, int top_k);

/// Expected largest of independent normals with these standard deviations, not all 0. Absolute error below 1e-6 of the
/// widest.
double expected_largest(std::span<const double> deviations);

}  // namespace moectl
