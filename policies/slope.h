// The slope of each expert: the relative rise of its load per unit of its bias.
//
// From the gap. A token's gap is the distance between its last chosen and its first rejected biased score. Count the tokens
// whose last choice is expert i and whose gap is below a small width; divide by the width and by the expert's load: that
// is the slope (RoutingStats::load_slope, which also corrects for the width). Near tokens and load are averaged with weight
// 0.3 each. Four tokens with the layer's mean slope are added, so that an expert with few tokens near the threshold has
// about the mean slope and no accidental one. Until a slope is known: one over the layer's gap, k mean(v_k - v_(k+1)).
//
// From counts only. s_i = x_i / u. u belongs to the layer: first 0.001, at most 0.25 (logits 0.01 and 100), at least 1e-6.
// x_i belongs to the expert: about 1 in the geometric mean, from 1/8 to 16. Both are tuned until innovations z are white: if
// they stay alike, the slope is smaller than believed; if they alternate, it is larger.
//
//   ln u  += 0.2 drive                                                 drive as in adaptive_bias.cc; over 1 + d with a delay
//   ρ_i   += 0.1 (2 z_i z_i(t-1) / (z_i² + z_i(t-1)²) - ρ_i)           each pair counts the same, whatever its size
//   ln x_i -= 0.1 ρ_i if ρ_i > 0.4, without a swing, a delay or a cut;  0.3 ρ_i if ρ_i < -0.4
//
// 0.4 is two and a half standard errors of ρ_i. The slope rises faster than it falls, because an expert that oscillates does
// more harm than one that is slow. q of the filter follows the same drive, but the first steps have nearly the largest
// gain whatever q is: only u can make those smaller or larger.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/lanes.h"
#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl::policies {

class Slope {
 public:
  /// `form`: gap, counts or auto, the gap if the first window has one.
  Slope(const std::string& form, bool logits, std::size_t experts)
      : form_fixed_(form != "auto"),
        form_known_(form_fixed_),
        uses_gap_(form == "gap"),
        counts_step_(logits ? 1e-2 : 1e-3),
        most_step_(logits ? 100 : 0.25),
        slope_(experts, 1 / counts_step_),
        near_load_(experts),
        load_(experts),
        now_(experts),
        share_(experts, 1.0),
        lag_similarity_(experts) {}

  /// Relative load per unit of bias, above 0 [N].
  std::span<const double> values() const { return slope_; }
  /// What a bias may move in a step, score units. Where all scores are equal, as in a router that starts at zero, the gap
  /// is no unit.
  double unit() const { return uses_gap_ && gap_ > kLeastStep * kLeastStep ? gap_ : counts_step_; }
  bool from_counts() const { return !uses_gap_; }

  /// False if no step can be made: the slope is to come from the gap, and none was ever seen.
  bool follow(const RoutingStats& stats) {
    const std::optional<double> mean = stats.mean_gap();
    const bool known = mean && *mean >= 0;
    if (!std::exchange(form_known_, true)) uses_gap_ = known;
    if (!uses_gap_) return true;
    if (known) gap_ += (gap_ > 0 ? 0.1 : 1) * (stats.mean_choices() * *mean - gap_);
    gap_seen_ |= known;
    if (stats.load_slope(now_)) {
      average(stats);
    } else if (mean_slope_ == 0) {
      std::fill(slope_.begin(), slope_.end(), 1 / unit());
    }
    return gap_seen_;
  }

  /// Counts only. `tuned`: by how much ln u rises; `z`, `last`: two in a row [N]; `swings`: the layer does.
  /// `limited`: the last move was cut, so innovations stay alike whatever the slope is.
  void learn(double tuned, std::span<const double> z, std::span<const double> last, bool swings,
             bool limited) {
    counts_step_ = std::clamp(counts_step_ * std::exp(tuned), kLeastStep, most_step_);
    double moved = 0;
    for (std::size_t i = 0; i < share_.size(); ++i) {
      const double square = z[i] * z[i] + last[i] * last[i];
      lag_similarity_[i] +=
          kAlikeEma * ((square > kLeastSquare ? 2 * z[i] * last[i] / square : 0) - lag_similarity_[i]);
      const bool alternate = lag_similarity_[i] < -kAlike;
      const bool alike = lag_similarity_[i] > kAlike && !swings && !limited;
      if (!alternate && !alike) continue;
      const double rate = alternate ? 0.3 : 0.1;
      const double before = share_[i];
      share_[i] = std::clamp(before * std::exp(-rate * lag_similarity_[i]), kLeastShare, kMostShare);
      moved += std::log(share_[i] / before);
    }
    const double common = std::exp(-moved / static_cast<double>(share_.size()));
    for (std::size_t i = 0; i < share_.size(); ++i) {
      share_[i] = std::clamp(share_[i] * common, kLeastShare, kMostShare);
      slope_[i] = share_[i] / counts_step_;
    }
  }

  void exchange(StateIo& io) {
    constexpr NumberRange not_negative{0, 1e12};
    bool form_known = form_known_, uses_gap = uses_gap_;
    io.value("slope.form_known", form_known);
    io.value("slope.uses_gap", uses_gap);
    if (!form_fixed_) form_known_ = form_known, uses_gap_ = uses_gap;  // an option stands above the state
    io.value("slope.gap_seen", gap_seen_);
    io.value("slope.gap", gap_, not_negative);
    io.value("slope.counts_step", counts_step_, {kLeastStep, most_step_});
    io.value("slope.near_share", near_share_, not_negative);
    io.value("slope.mean", mean_slope_, not_negative);
    io.values("slope.share", share_, {kLeastShare, kMostShare});
    io.values("slope.lag_similarity", lag_similarity_, {-1, 1});
    io.values("slope.near_load", near_load_, not_negative);
    io.values("slope.load", load_, not_negative);
    io.values("slope.values", slope_, {1e-12, 1e12});
  }

 private:
  static constexpr double kLeastStep = 1e-6;  // score units
  static constexpr double kEma = 0.3, kPriorNear = 4, kLeastSquare = 1e-10;
  static constexpr double kAlikeEma = 0.1, kAlike = 0.4, kLeastShare = 1.0 / 8, kMostShare = 16;

  void average(const RoutingStats& stats) {
    const double n = static_cast<double>(slope_.size()), weight = mean_slope_ == 0 ? 1 : kEma;
    const std::span<const std::int64_t> tokens_near = stats.array(RoutingStats::kGapNear),
                                        counts = stats.counts();
    const double near =
        sum_over(slope_.size(), [&](std::size_t i, auto at) { return at.get(&tokens_near[i]); });
    near_share_ += weight * (near / n - near_share_);
    mean_slope_ += weight * (sum_of(now_) / n - mean_slope_);
    const double scale = n / static_cast<double>(stats.assignments());
    const double prior = kPriorNear * weight / std::max(near_share_, 1e-9);
    for_each_eight(slope_.size(), [&](std::size_t i, auto at) {
      const Double8 old_near = at.get(&near_load_[i]), old_load = at.get(&load_[i]);
      const Double8 near_load = old_near + weight * (at.get(&now_[i]) - old_near);
      const Double8 load = old_load + weight * (scale * at.get(&counts[i]) - old_load);
      at.put(&near_load_[i], near_load);
      at.put(&load_[i], load);
      at.put(&slope_[i], (near_load + prior * mean_slope_) / (load + prior));
    });
  }

  bool form_fixed_, form_known_, uses_gap_, gap_seen_ = false;
  double gap_ = 0, counts_step_, most_step_;
  double near_share_ = 0, mean_slope_ = 0;  // tokens near the threshold an expert; all relative to the mean
  std::vector<double> slope_, near_load_, load_, now_;  // [N]
  std::vector<double> share_, lag_similarity_;          // x, ρ [N]
};

}  // namespace moectl::policies
