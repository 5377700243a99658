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
//   probe     a small known pattern is added to the biases over eight decisions, and serves as the instrument
//             (response_probe.h).
//
// If moves say that the load goes the other way, the biases go back to where they were when the load last answered, and the
// probe is made there. If a probe does not tell, it is made again while the policy waits, whose moves may have covered it, and
// larger if its error was too large; each block counts by its precision. If it gets no answer, the biases go back to where
// the load last answered, and are held there. The probe is repeated from time to time. At the first answer the policy goes
// on. An answer that comes up to four steps later than the declared delay is one too, and is reported as late.
//
// A check costs several passes over the experts, and a balanced layer has nothing to answer. So the check of a balanced
// layer rests, and wakes for some steps in five hundred, or when the layer is no longer balanced, or when its loads are the
// same step after step. After each answer it pauses for twelve steps.
//
// Without a measured slope (counts only) a low one is assumed: 1 a unit of probability, because scores within [0, 1]
// cannot lie farther apart; 0.1 a logit. A healthy layer shows a multiple of it, so the gain then says no more than
// the sign. The probe starts small, at most as large as the last answer says that it must be.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "control/response_probe.h"
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

  /// The sums that it uses where they are recorded: the slope.
  static StatsNeeds needs() { return {.gap = true}; }

  /// One step. `stats`: its sums, valid, with assignments; null if there are none. `load_cv`: their CV. `floor_cv`: the CV
  /// that sampling alone explains. `in_force`: the biases in force now. [N] `trusted`: the router was seen to choose by
  /// them, so they are not held whatever the load does.
  void observe(const RoutingStats* stats, double load_cv, double floor_cv, std::span<const double> in_force,
               bool trusted);
  /// Forgets what it knows, because the biases moved for another reason (the guard, a rollback).
  void restart();
  /// Holds the biases where the load last answered, or where they began, until release(): the router was seen to use
  /// others. What ends it is the sight of its own. So the test moves are small ones, which are looked for in the router's
  /// scores, without a pause; no answer of the load is. A router that uses them in another layer, or turned round, is
  /// disturbed little.
  void hold_for_wiring();
  bool held_for_wiring() const { return for_wiring_; }
  void release();
  /// The biases in force hold no probe any more.
  void leave_probe() { probe_.leave(); }

  /// Whether it is not known whether the load answers, and test moves ask, or did.
  bool asks() const { return held_ || state_ == Response::kProbing; }
  /// Whether the biases are held, whatever the policy proposes.
  bool holds() const { return held_; }
  /// The part of the biases in force that is a probe. [N], or empty without one.
  std::span<const double> offset() const { return probe_.offset(); }
  /// Whether adjust() changes the proposal.
  bool adjusts() const { return held_ || probes(); }
  /// Turns the policy's proposal, which is without a probe, into what is wanted: held, or with the next part of a probe.
  void adjust(std::span<double> wanted, LimitReport& why) const;
  /// Told what the limits, or the guard, made of that.
  void on_applied(const LimitReport& why);

  Responsiveness report() const { return responsiveness(state_, found_, late_, scaled_); }
  /// How far a bias may be from the mean: sixteen times the distance over which, at the measured slope, an expert's load
  /// goes from nothing to all tokens, because scores may lie in lumps. In probabilities 1, once that distance was below 1:
  /// until then they may be in another unit, and later, in a collapsed layer, hardly a token lies near a threshold. Absent
  /// if no slope is known.
  std::optional<double> reach() const;
  /// Biases that the load last answered to or was balanced with, however far they are; empty if there are none.
  std::span<const double> known_good() const {
    return based_ ? std::span<const double>(base_) : std::span<const double>();
  }

  void exchange(StateIo& io);

 private:
  // Σ over experts of target share times slope, alone and times the biases: what a mean over experts needs.
  struct Weighted {
    double all = 0, now = 0, last = 0, before = 0, reference = 0;
  };
  enum class Waits { kNo, kWhereItIs, kAtBase };
  // Where history_ holds the biases of so many steps ago.
  std::size_t place(std::size_t ago) const { return (newest_ + delay_ + 3 - ago) % (delay_ + 3); }
  std::span<const double> bias(std::size_t ago) const;
  void remember(std::span<const double> in_force);
  bool rests(double load_cv, std::span<const double> in_force);
  void follow(const RoutingStats& stats);
  void compare();
  void judge(bool trusted);
  void set_reference(bool answered);
  void keep_base(std::span<const double> biases);
  double first_size() const;
  void start_probe();
  void start_block();
  void start_marks();
  void forget_steps();
  void skip();
  static bool sharp(const GainEstimate& found);
  bool finds_answer(std::size_t lags);
  void finish_block(bool trusted);
  void give_up();
  bool full() const { return filled_ >= static_cast<std::int64_t>(delay_) + 3; }
  std::size_t back() const { return delay_ == 0 ? 2 : 1; }
  double noise() const { return floor_sq_ > noise_sq_ ? floor_sq_ : noise_sq_; }
  bool probes() const { return state_ == Response::kProbing || (held_ && !probe_.paused()); }

  // What a resting check reads lies together, since a step finds little of it in the caches.
  Response state_ = Response::kUnknown;
  std::int64_t late_ = 0;
  bool held_ = false;         // the last probe had no answer, or
  bool for_wiring_ = false;   // the router was seen to use other biases
  Waits waits_ = Waits::kNo;  // the policy, during this probe
  bool based_ = true;         // base_ is known
  bool scaled_ = false;       // slope_ was measured
  bool within_one_ = false;   // a slope once said that scores lie within 1 of each other
  bool resting_ = false, referenced_ = false;
  bool in_probabilities_;
  bool unbalanced_ = false;  // at this step, and for some time
  std::size_t experts_, delay_;
  double token_range_;  // N/k: the relative load of an expert that gets every token
  double slope_sum_ = 0;
  double floor_sq_ = 0;
  double error_over_floor_ = 0;  // of their squares, smoothed
  double last_cv_ = 0;
  std::int64_t same_loads_ = 0;        // steps in a row with the same loads
  std::int64_t clock_;                 // wakes a resting check; other layers at other steps
  std::int64_t filled_ = 0;            // steps in a row that were seen
  std::int64_t skipped_ = 0;           // steps in a row that were not
  std::int64_t compared_ = 0;          // steps since it woke
  std::int64_t nap_ = 0;               // steps until the next comparison, after an answer
  std::int64_t quiet_ = 0;             // steps until the next probe may start
  std::optional<GainEstimate> found_;  // by the last probe, or the last answer

  double assumed_slope_;
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
  GainSums moves_, travel_;
  std::int64_t backoff_;      // steps without a probe after the next one
  std::vector<double> base_;  // the biases when the load last answered, or was balanced
  BiasProbe probe_;
};

}  // namespace moectl
