// Limits: what bounds an actuator, and why an applied value is not the proposed one.
//
// The invariant, for every input whatsoever: what is applied is finite, inside [min, max], and within `rate`
// of the last applied value (a rollback or a fallback excepted). Bad data never moves an actuator: it holds,
// counts and logs. Where the last applied value itself lies outside [min, max], which only a state loaded
// under a narrower range can bring about, range goes before rate: the value is brought inside at the first
// decision.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "moectl/types.h"

namespace moectl {

/// Why an applied value is not the proposed one. The order is the order of the report.
enum class Reason : std::uint8_t {
  kInvalid,      ///< The data or the proposal held NaN, Inf or a negative count: held.
  kNoData,       ///< No token was recorded since the last decision: held.
  kSkippedStep,  ///< The optimizer skipped the step: held.
  kFrozen,       ///< The host froze the layer or the actuator: held.
  kWarmup,       ///< Before `warmup` steps: held.
  kCadence,      ///< Between cadence points: held, sums add up.
  kCooldown,     ///< Too soon after the last move or rollback: held.
  kDeadband,     ///< The wanted move is too small to make: held.
  kRate,         ///< The move was shortened to `rate`.
  kRange,        ///< The value was clipped to [min, max].
  kGuard,        ///< The supervisor overrode the proposal.
  kOscillation,  ///< The move was shortened because moves keep reversing.
  kRollback,     ///< Loss or drop rate jumped after a move: back to the last good value.
  kFallback,     ///< Too much bad data: the configured safe value, until data are good again.
};
inline constexpr int kReasonCount = 14;
std::string_view name_of(Reason reason);
/// Nothing for an unknown name.
std::optional<Reason> reason_of(std::string_view name);

/// The set of reasons that acted on one actuator in one step.
class LimitReport {
 public:
  void add(Reason reason) { bits_ |= bit(reason); }
  bool has(Reason reason) const { return (bits_ & bit(reason)) != 0; }
  bool empty() const { return bits_ == 0; }
  /// True if the last applied value stayed in force whatever was proposed.
  bool held() const;
  std::uint32_t bits() const { return bits_; }
  friend bool operator==(const LimitReport&, const LimitReport&) = default;

 private:
  static std::uint32_t bit(Reason reason) { return 1U << static_cast<unsigned>(reason); }
  std::uint32_t bits_ = 0;
};

/// The limits of one actuator. Rates: score units a step for biases, |ln(new/old)| a step for the two
/// scalars.
struct Limits {
  double min = 0;
  double max = 0;
  double rate = 0;            ///< > 0. The largest move of one decision.
  bool center = false;        ///< Biases only: keep the mean of the applied biases at zero.
  double deadband = 0;        ///< ≥ 0, same unit as rate: moves no larger than this are not made.
  std::int64_t warmup = 0;    ///< Steps at the start in which nothing moves.
  std::int64_t cadence = 1;   ///< ≥ 1. Decide every so many steps, on the sums of all of them.
  std::int64_t cooldown = 0;  ///< Steps without a move after each move.
};
/// The defaults of the actuator: biases ±16 at 0.01 a step, centred; aux weight 1e-4…0.1 and temperature
/// 0.1…10, both at 0.1 a step. An aux weight that starts at 0 (off) has its range widened down to 0: since
/// its moves are ratios, it then stays there.
Limits default_limits(Actuator actuator, std::optional<double> initial = {});
/// What is wrong with the limits and the initial value, as "key: constraint"; empty if nothing.
std::string check_limits(Actuator actuator, const Limits& limits, double initial);

/// Supervision that works on every actuator alike. Absent = off.
struct RollbackOptions {
  double loss_jump = 0.5;      ///< Nats above the loss's moving average; > 0.
  double drop_jump = 0.1;      ///< Of the drop rate, above its moving average; > 0.
  std::int64_t within = 5;     ///< Steps after a move during which a jump is laid to it; ≥ 1.
  std::int64_t cooldown = 50;  ///< Steps held after a rollback; ≥ 0.
};
struct OscillationOptions {
  double threshold = 0.5;  ///< Back off when the moving average of move reversal exceeds it; (0, 1).
  double min_gain = 0.05;  ///< The smallest factor put on a move; (0, 1].
};
struct SafetyOptions {
  std::optional<RollbackOptions> rollback;
  std::optional<OscillationOptions> oscillation;
  std::int64_t fallback_after =
      50;  ///< Invalid steps in a row after which the safe value is applied; 0 = never.
};

}  // namespace moectl
