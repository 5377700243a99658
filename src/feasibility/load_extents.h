// What the loads of N experts can be: the extremal load vectors of each measure of imbalance, and from them how far one
// measure can go at a given value of another.
#pragma once

#include "moectl/feasibility.h"
#include "moectl/load_targets.h"

namespace moectl {

/// Where loads live: N of them, none above `cap`, which is 1/k or what a band leaves of it.
struct Room {
  int experts;
  double cap;
};
Room room_of(const LoadSpace& space);

/// Measures of imbalance. All grow with it, so that the extent of one at a given value of another grows with that
/// value. kMax is a share of all assignments, kIdle a number of experts, kKl nats from uniform. The last three are
/// relative to unequal targets: the CV of relative loads, MaxVio, and experts that are wanted but dead.
enum LoadAxis : int { kCv, kMax, kGini, kIdle, kKl, kRelativeCv, kMaxVio, kDead, kLoadAxisCount };
inline bool is_relative(LoadAxis axis) {
  return axis >= kRelativeCv;
}

/// What a measure can be in this room.
Extent whole(LoadAxis axis, const Room& room);
/// What a relative one can be.
Extent whole_relative(LoadAxis axis, const LoadSpace& space, const LoadTargets& targets);
/// What `y` can be at a given value of `x`, an axis before it in the enumeration. Values outside the room are clipped.
Extent extent_at(LoadAxis x, double value, LoadAxis y, const Room& room);

/// Throws std::invalid_argument unless 1 ≤ top_k ≤ experts.
void check_space(const LoadSpace& space);

}  // namespace moectl
