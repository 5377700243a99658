// StepExperiment: finds the gains of a proportional-integral law by moving its actuator up and back once.
//
//   waiting ── near and still ──▶ step ── half of the time: back ──▶ done, with gains
//      ▲ └────── too long ──────────┼───────────────────────────────▶ done, without
//      └────── no answer seen ──────┘
//
// All in the logarithm u of the actuator, with the error e relative to the target (positive: more is wanted).
// The law brings the error near zero with the gains it has. There it stands still, while the actuator goes to
// u + 1 (u - 1 for e < 0: the way that lessens the error) and then, for as long, back to u. The first half lasts
// until the error has answered by several times its noise, or twenty decisions. To the errors of single
// windows is fitted
//
//   e_t = c0 + c1 t - K x_t,   x_t = x_{t-1} + (1 - exp(-1/τ)) (u_{t-d} - x_{t-1})
//
// by least squares, for the τ and d of a grid that fit best; c1 is whatever drift the router was in. Of τ and the
// lag of the law's own averaging, (1 - ema)/ema, the larger is the lag T; half of the smaller goes to T and half
// to the delay θ, with d and the decision's own 1. The gains are those of Skogestad's rules (J. Process Control
// 13, 2003) for such a lag, with the closed loop slower than the delay by two:
//
//   kp = T/(3 K θ),   ki = kp/min(T, 4θ)
//
// (4θ where his rules have 12θ, because pi stops integrating while the error goes by itself), and kp is small
// enough for the noise of the averaged error to move u by a tenth only. An answer that does not stand four
// standard errors above zero (the weight may still be where it has no effect) is none: the experiment is made
// again, longer, when the law has gone on a little.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "moectl/state.h"

namespace moectl::policies {

struct PiGains {
  double kp = 0, ki = 0;
};

/// What one decision sees, errors relative to the target and turned so that positive asks for more.
struct ErrorSeen {
  double averaged = 0;
  double slow = 0;    ///< Averaged over some four times as long.
  double single = 0;  ///< Of this window alone.
  double noise = 0;   ///< Standard deviation of `single` around its mean.
};

class StepExperiment {
 public:
  /// The averaged error is the mean of single ones with the newest at weight `ema`.
  explicit StepExperiment(double ema) : ema_(ema) {}

  bool done() const { return phase_ == Phase::kDone; }
  /// Absent until done, and if no experiment succeeded.
  std::optional<PiGains> gains() const;
  /// Takes in what was seen under u = `in_force`; returns the u that is wanted next, nothing while the law is
  /// to decide.
  std::optional<double> next(const ErrorSeen& seen, double in_force);

  void exchange(StateIo& io);

 private:
  enum class Phase : std::int64_t { kWaiting, kStep, kDone };
  static constexpr std::size_t kLongestHalf = 20;  // decisions

  bool begins(const ErrorSeen& seen);
  void evaluate(double noise);

  double ema_;
  Phase phase_ = Phase::kWaiting;
  std::int64_t decisions_ = 0;  // in this phase
  std::int64_t half_ = 0;       // decisions of the first half of the step; 0 = it lasts
  std::int64_t tries_ = 0;
  double centre_ = 0, direction_ = 0, from_ = 0;  // of the step: u, way, averaged error at its start
  std::array<double, 2 * kLongestHalf> u_{}, e_{};
  double kp_ = 0, ki_ = 0;
};

}  // namespace moectl::policies
