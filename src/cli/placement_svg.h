// A picture of a placement: what each device carries on the steps that the plan has not seen, before and after.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "moectl/placement.h"

namespace moectl::cli {

struct DrawnLayer {
  int layer = 0;
  Placement today, plan;
  Placement start;                               ///< From which moves are counted.
  std::vector<double> loads;                     ///< Of the experts on those steps [N], in any unit.
  double balanced_today = 0, balanced_plan = 0;  ///< Mean over those steps.
};

/// A row a layer, with a bar a device: the copies on it, one over another, by their load over the mean device load. What moves
/// has a colour of its own. At most kMostDrawn layers; the others are named in the last line.
std::string placement_svg(std::span<const DrawnLayer> layers);
inline constexpr std::size_t kMostDrawn = 16;

}  // namespace moectl::cli
