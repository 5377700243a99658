// The relative load error of an expert.
#pragma once

namespace moectl::policies {

/// `missing` assignments over those wanted. An expert that should get nothing has too much as soon as it gets anything:
/// -1, with nothing to divide by.
inline double relative_error(double wanted, double missing) {
  if (wanted > 0) return missing / wanted;
  return missing < 0 ? -1 : 0;
}

}  // namespace moectl::policies
