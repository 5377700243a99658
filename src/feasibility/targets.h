// The set-points that a config's policies steer to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "moectl/config.h"

namespace moectl {

struct Target {
  Actuator actuator;
  std::string metric;
  double value;
  std::int64_t cadence;  ///< Steps whose sums one decision sees.
};

/// Of every policy with the options `metric` and `target`.
std::vector<Target> targets_of(const ControllerConfig& config);

}  // namespace moectl
