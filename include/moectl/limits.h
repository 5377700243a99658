// Limits: what bounds an actuator, and why an applied value is not the proposed one.
//
// The invariant, for every input: the applied value is finite, inside [min, max], and within `rate` of the last applied
// value (except for a rollback or a fallback to the initial value). Bad data never moves an actuator: the actuator holds
// its value, and the event is counted and logged. The last applied value can lie outside [min, max] only after a state was loaded under a
// narrower range. Then range goes before rate: the first decision brings the value inside.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "moectl/types.h"

namespace moectl {

/// Why an applied value differs from the proposed one. Reports list reasons in this order.
enum class Reason : std::uint8_t {
  kInvalid,       ///< The data or the proposal held NaN, Inf or a negative count: held.
  kMissingInput,  ///< The policy needs an input that the router did not record: held.
  kNoData,        ///< No token was recorded since the last decision: held.
  kPolicyFailed,  ///< The policy threw an exception: held.
  kSkippedStep,   ///< The optimizer skipped the step: held.
  kFrozen,        ///< The host froze the layer or the actuator: held.
  kHostHold,      ///< The host holds the whole controller: held.
  kShadow,        ///< Mode shadow: nothing is applied.
  kWarmup,        ///< Before `warmup` steps: held.
  kCadence,       ///< Between two decisions of the cadence: held, while the sums add up.
  kCooldown,      ///< Too soon after the last move or rollback: held.
  kUnresponsive,  ///< The load does not answer the actuator: held until it answers.
  kProbe,         ///< A small test move asks whether the load answers.
  kDeadband,      ///< The wanted move is too small to make: held.
  kRate,          ///< The move was shortened to `rate`.
  kRange,         ///< The value was clipped to [min, max].
  kReach,         ///< The bias is as far from the mean as the scores can justify.
  kGuard,         ///< The guard overrode the proposal.
  kOscillation,   ///< The move was shortened because moves keep reversing.
  kRollback,      ///< Loss or drop rate jumped after a move: back to the last good value.
  kFallback,      ///< Too many invalid steps: the initial value, until data are valid again.
};
inline constexpr int kReasonCount = 21;
std::string_view name_of(Reason reason);
/// Nothing for an unknown name.
std::optional<Reason> reason_of(std::string_view name);

/// The set of reasons that acted on one actuator in one step.
class LimitReport {
 public:
  void add(Reason reason) { bits_ |= bit(reason); }
  void add(const LimitReport& more) { bits_ |= more.bits_; }
  bool has(Reason reason) const { return (bits_ & bit(reason)) != 0; }
  bool empty() const { return bits_ == 0; }
  /// True if the policy's proposal had no part in the applied value.
  bool held() const;
  std::uint32_t bits() const { return bits_; }
  friend bool operator==(const LimitReport&, const LimitReport&) = default;

 private:
  static std::uint32_t bit(Reason reason) { return 1U << static_cast<unsigned>(reason); }
  std::uint32_t bits_ = 0;
};

/// The limits of one actuator. Units of `rate`: scores per decision for biases, |ln(new/old)| per decision for the two
/// scalars.
struct Limits {
  double min = 0;
  double max = 0;
  double rate = 0;            ///< > 0. The largest move of one decision.
  bool center = false;        ///< Biases only: the mean of the applied biases is kept at zero.
  double deadband = 0;        ///< ≥ 0, unit of `rate`: a wanted move of at most this size is not made.
  std::int64_t warmup = 0;    ///< Steps at the start in which nothing moves.
  std::int64_t cadence = 1;   ///< ≥ 1. Decide every so many steps, on the sums of all of them.
  std::int64_t cooldown = 0;  ///< Steps without a move after each move.
};
/// The defaults of an actuator. Biases: ±16, rate 1, centred: an outer fence, since the reach of the scores lies within
/// it. Auxiliary-loss weight: 1e-4 to 0.1, rate 0.1. Router temperature: 0.1 to 10, rate 0.1. An auxiliary-loss weight with the initial value 0 (off) has the range 0 to 0.1,
/// and stays at 0 because its moves are ratios.
Limits default_limits(Actuator actuator, std::optional<double> initial = {});

/// What too many invalid steps in a row lead to, besides a notice.
enum class Fallback {
  kHold,     ///< Nothing more: the last value stays in force.
  kInitial,  ///< The initial value is applied until data are valid again.
};
std::string_view name_of(Fallback fallback);

/// Supervision that acts on every actuator in the same way. Absent = off.
struct RollbackOptions {
  double loss_jump = 0.5;      ///< Rise of the loss above its moving average that undoes a move, nats; > 0.
  double drop_jump = 0.1;      ///< Likewise of the drop rate; > 0.
  std::int64_t within = 5;     ///< Steps after a move in which a jump is blamed on the move; ≥ 1.
  std::int64_t cooldown = 50;  ///< Steps held after a rollback; ≥ 0.
};
struct OscillationOptions {
  double threshold = 0.5;  ///< Shorten moves when the moving average of their reversals exceeds this; (0, 1).
  double min_gain = 0.05;  ///< The smallest factor by which moves are shortened; (0, 1].
};
struct SafetyOptions {
  std::optional<RollbackOptions> rollback;
  std::optional<OscillationOptions> oscillation;
  /// Invalid decisions in a row after which a notice is raised and `fallback` acts; 0 = never.
  std::int64_t fallback_after = 50;
  Fallback fallback = Fallback::kHold;
  /// Whether the controller checks that the load answers its biases, holds them if not, and keeps them within what the
  /// scores can justify. Off to reproduce a published law.
  bool responsiveness = true;
};

}  // namespace moectl
