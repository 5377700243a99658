// ResponseCheck: finds out whether a layer's load answers its biases, and holds them if not.
//
// The idea. If the bias of an expert rises by Δb, its relative load should rise by σ·Δb, σ the slope at the threshold.
// So every move is a prediction. Three ways to compare it with what follows, from the cheapest to the surest:
//
//   moves     z = σ·(last move, less its average); the change of the load is regressed on the change of σ·b with z as
//             instrument. What made the policy move at a step cannot have caused the noise of the steps after it, and
//             a steady drift of the router, which the policy follows, is taken out with the average.
//   travel    the load should have changed along the way that the biases went since they last were answered. If what is
//             missing exceeds three standard deviations, the layer is not balanced, and the moves do not show an answer,
//             the check asks:
//   probe     a small known pattern is added to the biases, half of the experts up, half down, with the signs
//             + + - + - - - + over eight decisions, and serves as the instrument. A line is taken out of what is seen,
//             so neither noise nor a steady drift correlates with the pattern, and the regression on it is sure. The
//             signs hardly correlate with themselves some steps later, so an answer that is late is told from a wrong
//             sign. The size is chosen so that eight decisions give the gain a standard error of 0.08: 1.1 floors at 16
//             experts, .3 at 256.
//
// If moves say that the load goes the other way, the biases go back to where they were when the load last answered, and the
// probe is made there. If a probe does not tell, it is made again while the policy waits, whose moves may have covered it. If
// it gets no answer, the biases go back to where the load last answered, and are held there. The probe is repeated from
// time to time. At the first answer the policy goes on. An answer that comes up to four steps later than the declared
// delay is one too, and is reported as late.
//
// A check costs several passes over the experts, and a balanced layer has nothing to answer. So the check of a balanced
// layer rests, and wakes for some steps in a hundred, or when the layer is no longer balanced. After each answer it pauses
// for eight steps.
//
// Without a measured slope (counts only) a low one is assumed: 1 a unit of probability, because scores within [0, 1]
// cannot lie farther apart; 0.1 a logit. A healthy layer shows a multiple of it, so the gain then says no more than
// the sign. The probe starts small, at most as large as the last answer says that it must be.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moectl/config.h"
#include "moectl/limits.h"
#include "moectl/load_targets.h"
#include "moectl/responsiveness.h"
#include "moectl/state.h"
#include "moectl/stats.h"

namespace moectl {

/// The check of one layer. Does not allocate after construction.
class ResponseCheck {
 public:
  /// `in_force`: the biases that the loop begins with. [N]
  ResponseCheck(const ControllerConfig& config, int layer, std::span<const double> in_force);

  /// One step. `stats`: its sums, valid, with assignments; null if there are none. `load_cv`: their CV. `floor_cv`: the CV
  /// that sampling alone explains. `in_force`: the biases in force now. [N]
  void observe(const RoutingStats* stats, double load_cv, double floor_cv, std::span<const double> in_force);
  /// Forgets what it knows, because the biases moved for another reason (the guard, a rollback, a frozen layer).
  void restart();
  /// Holds the biases where the load last answered, or where they began, until a probe has an answer: the router surely
  /// uses others.
  void hold();
  /// Ends that.
  void release();
  /// The biases in force hold no probe any more.
  void leave_probe();

  /// Whether the biases are held, whatever the policy proposes.
  bool holds() const { return held_; }
  /// The part of the biases in force that is a probe. [N], or empty without one.
  std::span<const double> offset() const {
    return sign_ != 0 ? std::span<const double>(offset_) : std::span<const double>();
  }
  /// Whether adjust() changes the proposal.
  bool adjusts() const { return held_ || probes(); }
  /// Turns the policy's proposal, which is without a probe, into what is wanted: held, or with the next part of a probe.
  void adjust(std::span<double> wanted, LimitReport& why) const;
  /// Told what the limits, or the guard, made of that.
  void on_applied(const LimitReport& why);

  Responsiveness report() const;
  /// How far a bias may be from the mean: sixteen times the distance over which, at the measured slope, an expert's load
  /// goes from nothing to all tokens, because scores may lie in lumps; in probabilities at most 1. Absent if no slope is
  /// known.
  std::optional<double> reach() const;

  void exchange(StateIo& io);

 private:
  struct Estimate {
    double gain = 0, error = 0;
  };
  // Σ over experts of target share times slope, alone and times the biases: what a mean over experts needs.
  struct Weighted {
    double all = 0, now = 0, last = 0, before = 0, reference = 0;
  };
  struct Line {
    double mean = 0, slope = 0;
  };
  enum class Waits { kNo, kWhereItIs, kAtBase };
  struct Sums {  // of a regression through an instrument
    double zy = 0, zx = 0;
    double zz = 0;  // Σ z² times the relative load: counts scatter in proportion to what is counted
    void add(const Sums& more, double keep);
    std::optional<Estimate> estimate(double noise_sq) const;
  };

  std::span<const double> bias(std::size_t ago) const;
  void remember(std::span<const double> in_force);
  bool rests(double load_cv);
  void follow(const RoutingStats& stats);
  void compare();
  void judge();
  void set_reference(bool answered);
  double first_size() const;
  void start_probe();
  void start_block();
  Sums answer(std::size_t late) const;
  static bool sharp(const Estimate& found);
  bool finds_answer(std::size_t lags);
  void finish_block();
  void give_up();
  void pause();
  void follow_probe();
  bool full() const { return filled_ >= static_cast<std::int64_t>(delay_) + 3; }
  std::size_t back() const { return delay_ == 0 ? 2 : 1; }
  double noise() const { return floor_sq_ > noise_sq_ ? floor_sq_ : noise_sq_; }
  bool probes() const { return state_ == Response::kProbing || (held_ && decision_ >= 0); }
  double next_sign() const;
  static constexpr std::size_t kLags = 5;

  // What a resting check reads lies together, since a step finds little of it in the caches.
  Response state_ = Response::kUnknown;
  int late_ = 0;
  bool held_ = false;         // the last probe had no answer
  Waits waits_ = Waits::kNo;  // the policy, during this probe
  bool based_ = true;         // base_ is known
  bool scaled_ = false;       // slope_ was measured
  bool resting_ = false, referenced_ = false;
  bool in_probabilities_;
  bool unbalanced_ = false;  // at this step, and for some time
  std::size_t experts_, delay_;
  double token_range_;  // N/k: the relative load of an expert that gets every token
  double slope_sum_ = 0;
  double floor_sq_ = 0;
  double error_over_floor_ = 0;  // of their squares, smoothed
  std::int64_t clock_;           // wakes a resting check; other layers at other steps
  std::int64_t filled_ = 0;      // steps in a row that were seen
  std::int64_t compared_ = 0;    // steps since it woke
  std::int64_t nap_ = 0;         // steps until the next comparison, after an answer
  std::int64_t quiet_ = 0;       // steps until the next probe may start
  std::int64_t decision_ = 0;    // of the block of a probe; negative: before it
  double sign_ = 0;
  std::optional<Estimate> found_;  // by the last probe, or the last answer

  double rate_, assumed_slope_;
  std::vector<double> weight_;      // target share times N; 1 if equal
  std::vector<double> per_weight_;  // its inverse; 0 for experts that should get no tokens
  std::vector<double> slope_, slope_now_;
  std::vector<double> history_;  // [delay + 3, N] biases, a ring
  std::size_t newest_ = 0;
  std::vector<double> load_[3];  // relative load, newest first
  Weighted weighted_;
  std::vector<double> move_mean_;
  std::vector<double> reference_load_, reference_bias_;
  double noise_sq_ = 0;
  Sums moves_, travel_;
  std::int64_t backoff_;  // steps without a probe after the next one
  // Of a probe.
  std::vector<double> base_;  // the biases when the load last answered, or was balanced
  std::vector<double> pattern_;
  std::int64_t waited_ = 0, blocks_ = 0;
  double size_ = 0;                     // 1/64 to 1
  std::size_t code_;                    // of the pattern
  std::vector<double> offset_, signs_;  // in force; the sign in force at each place of history_
  // Each step of the block: the sign in force, the biases and the load along the pattern. Then the regressions on them,
  // one for each lateness, over the blocks of the probe.
  std::vector<double> sign_seen_, bias_along_, load_along_;
  std::size_t seen_ = 0;
  double pattern_sq_ = 0, pattern_noise_ = 0;  // Σ q², and Σ q² times the relative load
  std::array<Sums, kLags> probe_{};
};

}  // namespace moectl
