// Means over steps, with intervals that allow for steps that are alike.
#pragma once

#include <algorithm>
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
/// neighbouring steps (batch means), with Student's t. Blocks that are still alike, r the correlation of neighbours, hold less
/// than they seem to: the interval is √((1 + r)/(1 - r)) times as wide. An r from few blocks is too low by about (1 + 3r)/n
/// (Kendall 1954, "Note on bias in the estimation of autocorrelation").
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
    double weight = 0, mean = 0, square = 0, beside = 0, last = 0;
    for (const auto& [s, w] : blocks_) {
      weight += w;
      mean += s;
    }
    mean /= weight;
    for (const auto& [s, w] : blocks_) {
      const double away = (s / w - mean) * (w / weight);
      square += away * away;
      beside += away * last;
      last = away;
    }
    const double count = static_cast<double>(n), freedom = count - 1;
    const double seen = square > 0 ? beside / square : 0;
    const double alike = std::clamp(seen + (1 + 3 * seen) / count, 0.0, 0.95);
    // t at 97.5 %, Cornish-Fisher's first terms: within 2 % from 3 degrees of freedom on.
    const double z = 1.959964;
    const double t = z + (z * z * z + z) / (4 * freedom) +
                     (5 * std::pow(z, 5) + 16 * z * z * z + 3 * z) / (96 * freedom * freedom) +
                     (3 * std::pow(z, 7) + 19 * std::pow(z, 5) + 17 * z * z * z - 15 * z) /
                         (384 * freedom * freedom * freedom);
    const double half = t * std::sqrt(square * count / freedom * (1 + alike) / (1 - alike));
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
