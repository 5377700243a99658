// The floors of balance: what loads still show whose tokens choose their experts by the targets.
#pragma once

#include "moectl/load_targets.h"

namespace moectl {

/// MaxVio of a CV floor f: linear · f + square · f².
struct Floors {
  double unit_cv = 0;  ///< CV floor of one token; of T tokens, over √T.
  double linear = 0, square = 0;
};
Floors floors_of(const LoadTargets& targets, int top_k);

/// Expected largest of independent normals with these standard deviations, not all 0. Absolute error below 1e-6 of the
/// widest.
double expected_largest(std::span<const double> deviations);

}  // namespace moectl
