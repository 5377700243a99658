// The floors of balance: the imbalance of loads whose tokens choose experts at random, with the targets as
// probabilities.
#pragma once

#include <algorithm>
#include <limits>
#include <span>

#include "moectl/load_targets.h"

namespace moectl {

/// MaxVio of a CV floor f: linear · f + square · f² while that grows with f, then constant. With few experts (square <
/// 0) the parabola has a maximum, which only targets of less than one token per step reach.
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
