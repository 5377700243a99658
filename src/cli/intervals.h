// Means over steps, with intervals that allow for steps that are alike.
#pragma once

#include <cmath>
#include <cstddef>
#include <optional>
#include <vector>

namespace moectl::cli {

/// A mean with its 95 % interval.
struct Estimate {
  double mean = 0;
  std::optional<double> low, high;  ///< Absent where there are too few steps.
};

/// Weighted mean of a series. Neighbouring steps are alike, so the interval comes from the scatter of the means of blocks of
/// neighbouring steps (batch means), with Student's t.
class BlockMeans {
 public:
  void add(double value, double weight = 1) {
    if (!(weight > 0)) return;
    sum_ += value * weight;
    weight_ += weight;
    last_.first += value * weight;
    last_.second += weight;
    if (++in_last_ < block_) return;
    blocks_.push_back(last_);
    last_ = {};
    in_last_ = 0;
    if (blocks_.size() < 2 * kBlocks) return;
    // Twice as long blocks: memory stays the same however long the series is.
    for (std::size_t i = 0; i < kBlocks; ++i) {
      blocks_[i] = {blocks_[2 * i].first + blocks_[2 * i + 1].first,
                    blocks_[2 * i].second + blocks_[2 * i + 1].second};
    }
    blocks_.resize(kBlocks);
    block_ *= 2;
  }
  bool empty() const { return !(weight_ > 0); }
  double weight() const { return weight_; }
  Estimate estimate() const {
    Estimate e;
    if (empty()) return e;
    e.mean = sum_ / weight_;
    const auto n = blocks_.size();
    if (n < 4) return e;
    double weight = 0, mean = 0, square = 0;
    for (const auto& [s, w] : blocks_) {
      weight += w;
      mean += s;
    }
    mean /= weight;
    for (const auto& [s, w] : blocks_)
      square += (s / w - mean) * (s / w - mean) * (w / weight) * (w / weight);
    const double freedom = static_cast<double>(n) - 1;
    // t at 97.5 %, Cornish-Fisher's first terms: within 2 % from 3 degrees of freedom on.
    const double z = 1.959964;
    const double t = z + (z * z * z + z) / (4 * freedom) +
                     (5 * std::pow(z, 5) + 16 * z * z * z + 3 * z) / (96 * freedom * freedom) +
                     (3 * std::pow(z, 7) + 19 * std::pow(z, 5) + 17 * z * z * z - 15 * z) /
                         (384 * freedom * freedom * freedom);
    const double half = t * std::sqrt(square * static_cast<double>(n) / freedom);
    e.low = e.mean - half;
    e.high = e.mean + half;
    return e;
  }

 private:
  static constexpr std::size_t kBlocks = 16;
  double sum_ = 0, weight_ = 0;
  std::vector<std::pair<double, double>> blocks_;  // Σ of weight · value, Σ of weight
  std::pair<double, double> last_;
  std::size_t block_ = 1, in_last_ = 0;
};

}  // namespace moectl::cli
