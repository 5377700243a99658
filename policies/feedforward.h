// Feed-forward of adaptive_bias (`feedforward: tags`).
//
// The idea. The data loader knows the domain mixture w of the next batch. From counts tagged by domain, the policy
// learns the effect ε_d of each domain on the loads. So it can cancel the effect of the next mixture before it happens.
//
//   ê_i = clip(Σ_d (w_d - w̄_d) ε_di, -1, 1)      w̄ running mean mixture
//   b_applied,i = b_i + f ê_i / s_i, less the mean of f ê / s       s_i the measured slope of expert i
//   after the step, for each domain with n_d tokens:
//   ε_d += 0.1 · min(1, n_d/512) · (e_d + f ê - ε_d)
//   w̄ += 0.02 (w - w̄)
//
// f is the part of the plan that the limits let be made in time (below). e_d was measured with the feed-forward in force.
// So what it cancelled is added back: the rest is the effect of the domain alone. The policy keeps its own bias b
// separate: b is the applied bias minus the feed-forward, so the feed-forward is never integrated.
//
// Limits. If a limit cuts the applied bias, the cut is taken from the feed-forward first, so b is unchanged by it. A part
// that arrives a step late cancels the wrong mixture. So f, the share of the plan that is asked for, falls until the limits
// let it be made in time: f *= (1 + made/asked)/2 after a cut (at least 0.01), f *= 1.05 without one (at most 1). If a
// decision is held, the last feed-forward stays in force. With a mixture that changes at every step, MaxVio over the noise
// floor in the run of AdaptiveBias.FeedforwardUnderATightRateDoesNoHarm: without feed-forward 5.3; with it 2.7 where the
// rate is 1, 3.3 where it is 0.1, 4.8 where it is 0.01.
//
// Causality. The router learns which domains a batch holds, and nothing about a single token, so the model stays
// causal.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/lanes.h"
#include "moectl/state.h"
#include "moectl/stats.h"
#include "policies/load_error.h"

namespace moectl::policies {

/// The effect of each domain on the loads, learnt from tagged counts, and the expected effect of the next mixture.
class Feedforward {
 public:
  Feedforward(int domains, std::size_t experts)
      : domains_(static_cast<std::size_t>(domains)),
        experts_(experts),
        effect_(domains_ * experts, 0.0),
        mean_mixture_(domains_, 0.0),
        expected_(experts, 0.0),
        in_force_(experts, 0.0),
        planned_(experts, 0.0),
        next_(experts, 0.0),
        own_(experts, 0.0),
        missing_(experts, 0.0),
        unit_(experts, 0.0) {}

  std::span<const double> in_force() const { return in_force_; }
  /// The error that the mixture of the last plan causes and that the feed-forward in force leaves: 0 unless a hold or a
  /// limit came between.
  double left_over(std::size_t expert) const { return planned_[expert] - expected_[expert]; }

  /// Learns from a window that was routed under the feed-forward in force.
  void learn(const RoutingStats& stats, std::span<const double> targets) {
    if (!stats.has_domains()) return;
    for (std::size_t d = 0; d < domains_; ++d) {
      const auto tokens = static_cast<double>(stats.domain_tokens(static_cast<int>(d)));
      if (!(tokens > 0)) continue;
      const std::span<const std::int64_t> counts = stats.domain_counts(static_cast<int>(d));
      const double total = tokens * stats.mean_choices();
      const double weight = kLearning * std::min(1.0, tokens / kFullWeightTokens);
      for (std::size_t i = 0; i < experts_; ++i) {
        const double target = targets[i] * total;
        const double error = relative_error(target, target - static_cast<double>(counts[i]));
        double& effect = effect_[d * experts_ + i];
        effect += weight * (error + expected_[i] - effect);
      }
    }
  }

  /// Adds the feed-forward for the next batch to `bias`, which holds b. `slope`: by which share the load of each expert
  /// rises per unit of its bias [N], above 0. The mean of the feed-forward is zero.
  void plan(std::span<const std::int64_t> mixture, std::span<const double> slope, std::span<double> bias) {
    std::fill(planned_.begin(), planned_.end(), 0.0);
    double total = 0;
    for (const std::int64_t tokens : mixture) total += static_cast<double>(tokens);
    if (mixture.size() == domains_ && total > 0) {
      for (std::size_t d = 0; d < domains_; ++d) {
        const double share = static_cast<double>(mixture[d]) / total;
        if (!mixture_known_) mean_mixture_[d] = share;
        const double change = share - mean_mixture_[d];
        for (std::size_t i = 0; i < experts_; ++i) planned_[i] += change * effect_[d * experts_ + i];
        mean_mixture_[d] += kMixtureEma * change;
      }
      mixture_known_ = true;
    }
    for (std::size_t i = 0; i < experts_; ++i) {
      unit_[i] = 1 / slope[i];
      planned_[i] = std::min(std::max(planned_[i], -1.0), 1.0);
      next_[i] = share_ * unit_[i] * planned_[i];
    }
    const double mean = sum_of(next_) / static_cast<double>(experts_);
    for (std::size_t i = 0; i < experts_; ++i) {
      next_[i] -= mean;
      own_[i] = bias[i];
      bias[i] += next_[i];
    }
  }

  /// What came of the plan: it is in force in full, or a limit `cut` the bias to `applied`. Then b is served first, and
  /// the feed-forward takes the rest. Centring shifts all experts equally and moves no token, so the shift that most
  /// experts share (the median) counts for neither.
  void commit(std::span<const double> applied, bool cut) {
    if (!cut) {
      in_force_ = next_;
      for (std::size_t i = 0; i < experts_; ++i) expected_[i] = share_ * planned_[i];
      share_ = std::min(1.0, share_ * kShareGrowth);
      return;
    }
    double wanted = 0, made = 0;
    for (std::size_t i = 0; i < experts_; ++i) missing_[i] = applied[i] - own_[i] - next_[i];
    const auto upper = missing_.begin() + static_cast<std::ptrdiff_t>(experts_ / 2);
    std::nth_element(missing_.begin(), upper, missing_.end());
    const double lower = experts_ % 2 == 0 ? *std::max_element(missing_.begin(), upper) : *upper;
    const double shift = (lower + *upper) / 2;  // their median
    for (std::size_t i = 0; i < experts_; ++i) {
      const auto [low, high] = std::minmax(in_force_[i], next_[i]);
      const double left = std::min(std::max(applied[i] - shift - own_[i], low), high);
      wanted += std::abs(next_[i] - in_force_[i]);
      made += std::abs(left - in_force_[i]);
      expected_[i] = share_ * planned_[i] - (next_[i] - left) / unit_[i];
      in_force_[i] = left;
    }
    if (wanted > 0) share_ = std::max(kLeastShare, share_ * (0.5 + made / wanted / 2));
  }

  void exchange(StateIo& io) {
    constexpr NumberRange effect{-1e50, 1e50}, bias{-1e100, 1e100};
    io.values("feedforward.effect", effect_, effect);
    io.values("feedforward.mean_mixture", mean_mixture_, {0, 1});
    io.values("feedforward.planned", planned_, {-1, 1});
    io.values("feedforward.expected", expected_, effect);
    io.values("feedforward.in_force", in_force_, bias);
    io.value("feedforward.mixture_known", mixture_known_);
    io.value("feedforward.share", share_, {kLeastShare, 1});
  }

 private:
  static constexpr double kLearning = 0.1;
  static constexpr double kShareGrowth = 1.05, kLeastShare = 0.01;
  static constexpr double kFullWeightTokens = 512;
  static constexpr double kMixtureEma = 0.02;

  std::size_t domains_, experts_;
  std::vector<double> effect_;        // ε [domains × N]
  std::vector<double> mean_mixture_;  // w̄ [domains]
  std::vector<double> expected_;      // ê that in_force_ was meant to cancel [N]
  std::vector<double> in_force_;      // the feed-forward's part of the applied bias, score units [N]
  std::vector<double> planned_;       // ê of the last plan [N]
  bool mixture_known_ = false;
  double share_ = 1;  // f
  // From plan to commit: ê in score units, b, and the unit.
  std::vector<double> next_, own_;
  std::vector<double> missing_;  // part of each bias that limits and centring removed [N]
  std::vector<double> unit_;     // score units for an error of 1 [N]
};

}  // namespace moectl::policies
