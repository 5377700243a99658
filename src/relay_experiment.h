// RelayExperiment: finds the gains of a proportional-integral law by making its loop swing a little, on
// purpose.
//
//   waiting ── the error is small or has turned ──▶ relay ── enough cycles ──▶ done, with gains
//      └──────────────────────── too long ────────────┴──────────────────────▶ done, without
//
// All in the logarithm u of the actuator, with the error e relative to the target (positive: more is wanted).
// The law goes on with the gains it has, which need only bring the error to zero in the end; a relay on top
// of it,
//
//   u = u_law ± h,    up from when e > ε, down from when e < -ε,
//
// makes the loop settle into a cycle whose period P is the one at which actuator and plant together lag by
// half a turn (Åström & Hägglund, Automatica 20, 1984; with the relay beside a running law, Schei, Automatica
// 28, 1992). From what was in force and what was seen over whole cycles, |U| and |E| at that period (first
// Fourier coefficients, so that neither the law's part nor a rate limit spoils them):
//
//   K_u = |U|/|E|,   kp = K_u/3.2,   ki = kp/P
//
// kp is that of Tyreus & Luyben (Ind. Eng. Chem. Res. 31, 1992) for plants that lag more than they delay.
// Their integral time is 2.2 ultimate periods; one period of this cycle is as long, since the hysteresis
// about doubles it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "moectl/state.h"

namespace moectl::policies {

struct PiGains {
  double kp = 0, ki = 0;
};

class RelayExperiment {
 public:
  /// Errors within ±`hysteresis` do not turn the relay.
  explicit RelayExperiment(double hysteresis);

  bool done() const { return phase_ == Phase::kDone; }
  /// Absent until done, and if the experiment gave up.
  std::optional<PiGains> gains() const;
  /// Takes in the error that goes with u = `in_force`; returns what to add to the law's u now: 0 or ±h.
  double next(double error, double in_force);

  void save(StateWriter& out) const;
  void load(StateReader& in);

 private:
  enum class Phase : std::int64_t { kWaiting, kRelay, kDone };
  double relay(double error, double in_force);
  void evaluate();

  double hysteresis_;
  Phase phase_ = Phase::kWaiting;
  std::int64_t decisions_ = 0;  // in this phase
  double direction_ = 0;        // of the first error; of the relay, +1 or -1
  std::int64_t turns_ = 0;      // of the relay, upwards
  std::int64_t first_ = 0;      // sample of the turn upwards from which cycles count
  std::vector<double> u_, e_;   // samples of the relay phase
  double kp_ = 0, ki_ = 0;
};

}  // namespace moectl::policies
