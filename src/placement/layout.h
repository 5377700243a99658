// Copies of experts on the devices of one node: what EPLB's rules and our own planner work on.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace moectl::placing {

using Index = std::size_t;
inline Index at(int i) {
  return static_cast<Index>(i);
}

using Devices = std::vector<std::vector<int>>;  // the items (copies) on each device

/// Copies of the experts of a node, and the devices on which they are.
struct Layout {
  std::vector<int> expert_of_copy;
  std::vector<double> weights;  // load of each copy
  Devices devices;

  double largest() const {
    double most = 0;
    for (const auto& items : devices) {
      double sum = 0;
      for (const int item : items) sum += weights[at(item)];
      most = std::max(most, sum);
    }
    return most;
  }
};

}  // namespace moectl::placing
