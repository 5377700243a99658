// Bands: the wanted ranges of metrics.
#pragma once

#include <limits>
#include <map>
#include <string>

namespace moectl {

/// Wanted range of a metric, both ends included.
struct Band {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  friend bool operator==(const Band&, const Band&) = default;
};
/// By name of the metric.
using Bands = std::map<std::string, Band>;

}  // namespace moectl
