// Safety: what becomes of a proposal, and why.
//
// The invariant, for every input whatsoever: what is applied is finite, inside [min, max], and within `rate`
// of the last applied value (a rollback or a fallback excepted). Bad data never moves an actuator: it holds,
// counts and logs. Where the last applied value itself lies outside [min, max], which only a state loaded
// under a narrower range can bring about, range goes before rate: the value is brought inside at the first
// decision.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/state.h"
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

/// What the limiter has to know of a step.
struct LimitContext {
  std::int64_t step = 0;
  bool valid = true;     ///< The window's data can be used.
  bool has_data = true;  ///< The window holds at least one token.
  bool skipped = false;
  bool frozen = false;
  bool at_cadence = true;
  std::optional<double> loss = {};
  std::optional<double> drop_rate = {};
};

/// The limits of one actuator of one layer, and the memory they need. Does not allocate after construction.
class SafetyLimiter {
 public:
  /// `size` = N for biases, 1 for scalars. `safe_value` is what a fallback applies.
  SafetyLimiter(Actuator actuator, const Limits& limits, const SafetyOptions& options, int size,
                double safe_value);

  /// Turns `wanted` into `applied`, which holds the last applied value on entry. `wanted` is ignored when the
  /// context says hold. Both [size].
  LimitReport apply(const LimitContext& context, std::span<const double> wanted, std::span<double> applied);

  void save(StateWriter& out) const;
  void load(StateReader& in);

 private:
  std::optional<Reason> hold_reason(const LimitContext& context) const;
  bool must_roll_back(const LimitContext& context);
  void remember_good(std::int64_t step, std::span<const double> applied);
  double largest_move(std::span<const double> applied) const;
  double back_off(std::span<const double> applied);
  void clip_biases(std::span<const double> applied, LimitReport& report);
  void clip_scalar(double applied, LimitReport& report);

  Actuator actuator_;
  Limits limits_;
  SafetyOptions options_;
  double safe_value_;
  // Two snapshots: the older was in force at least `rollback.within` steps ago, before any move that a jump
  // of the loss can be laid to.
  std::vector<double> last_good_, candidate_;
  std::int64_t candidate_step_ = kNever;
  std::vector<double> last_move_;       // for reversal
  std::vector<double> next_, lo_, hi_;  // scratch
  std::int64_t invalid_in_row_ = 0;
  std::int64_t last_move_step_ = kNever;
  std::int64_t hold_until_ = kNever;  // after a rollback
  double loss_ema_ = 0, drop_ema_ = 0;
  bool loss_seen_ = false, drop_seen_ = false;
  double reversal_ema_ = 0;
  double gain_ = 1;
  static constexpr std::int64_t kNever = -(std::int64_t{1} << 62);
};

}  // namespace moectl
