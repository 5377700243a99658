// The relative load error of an expert.
#pragma once

namespace moectl::policies {

/// `missing` assignments divided by the target. For an expert with target 0: -1 if it received any token, else 0.
inline double relative_error(double wanted, double missing) {
  if (wanted > 0) return missing / wanted;
  return missing < 0 ? -1 : 0;
}

}  // namespace moectl::policies
