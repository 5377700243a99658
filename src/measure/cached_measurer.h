// CachedMeasurer: metrics of records that mostly have the same shape, without a new Measurer for each record.
#pragma once

#include <optional>

#include "moectl/metrics.h"

namespace moectl {

class CachedMeasurer {
 public:
  Metrics measure(const RoutingStats& stats, const MetricsOptions& options) {
    if (!measurer_ || !(shape_ == stats.shape()) || !(options_ == options)) {
      shape_ = stats.shape();
      options_ = options;
      measurer_.emplace(shape_, options_);
    }
    Metrics metrics;
    measurer_->measure(stats, metrics);
    return metrics;
  }

 private:
  StatsShape shape_;
  MetricsOptions options_;
  std::optional<Measurer> measurer_;
};

}  // namespace moectl
