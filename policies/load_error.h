// The relative load error of an expert.
#pragma once

#include "base/lanes.h"

namespace moectl::policies {

/// `missing` assignments divided by the target. For an expert with target 0: -1 if it received any token, else 0.
inline double relative_error(double wanted, double missing) {
  if (wanted > 0) return missing / wanted;
  return missing < 0 ? -1 : 0;
}

inline Double8 relative_error(const Double8& wanted, const Double8& missing) {
  const Double8 zero = splat(0), one = splat(1);
  return select(wanted, missing / select(wanted, wanted, one), select(-missing, -one, zero));
}

inline Double8 within(const Double8& v, const Double8& most) {
  return smaller(larger(v, -most), most);
}
/// Effects of moves are taken as at most this, so that squares of what a state may hold are numbers.
inline constexpr double kMostEffect = 1e50;

/// An error that says only "at least so far": an expert with under a tenth of its target, or with twice it or more. Errors
/// are within ±1.
inline constexpr double kFarBelow = 0.9;
inline Double8 is_far(const Double8& error) {
  return less(splat(kFarBelow), error) + less(error, splat(-1)) + equal(error, splat(-1));
}

}  // namespace moectl::policies
