// Percentiles without a whole sort.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

namespace moectl {

/// Percentiles, in ascending order of their shares, interpolated between order statistics: the median of two values is
/// their mean. Reorders the values; only the needed part is sorted.
class Percentiles {
 public:
  /// `values` must not be empty, and must be numbers.
  explicit Percentiles(std::span<double> values) : values_(values) {}
  double next(double share) {
    const double at = share * static_cast<double>(values_.size() - 1);
    const auto below = static_cast<std::size_t>(at);
    const double part = at - static_cast<double>(below), low = order_statistic(below);
    return part > 0 ? low + part * (order_statistic(below + 1) - low) : low;
  }

 private:
  double order_statistic(std::size_t rank) {
    if (rank >= placed_) {
      const auto from = [this](std::size_t i) { return values_.begin() + static_cast<std::ptrdiff_t>(i); };
      std::nth_element(from(placed_), from(rank), values_.end());
      placed_ = rank + 1;
    }
    return values_[rank];
  }
  std::span<double> values_;
  std::size_t placed_ = 0;  // values before it are at most those after it
};

}  // namespace moectl
