// SafetyLimiter: turns a proposal into an applied value, with the reasons (moectl/limits.h has the invariant).
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moectl/limits.h"
#include "moectl/state.h"
#include "moectl/types.h"

namespace moectl {

/// The inputs of the limiter for one step.
struct LimitContext {
  std::int64_t step = 0;
  bool valid = true;     ///< The window's data can be used.
  bool has_data = true;  ///< The window holds at least one token.
  bool skipped = false;
  bool frozen = false;
  bool host_hold = false;
  bool at_cadence = true;
  bool missing_input = false;  ///< The sums lack what the policy requires.
  bool policy_failed = false;  ///< The policy threw an exception.
  std::optional<double> loss = {};
  std::optional<double> drop_rate = {};
  std::optional<double> reach = {};  ///< Biases: the farthest from their mean that the scores justify.
  /// Biases that are justified by what the load did, however far they are; or empty.
  std::span<const double> known_good = {};
};

/// The limits of one actuator of one layer, and the memory they need. Does not allocate after construction.
class SafetyLimiter {
 public:
  /// `size` = N for biases, 1 for scalars. `safe_value`: the value that a fallback applies.
  SafetyLimiter(Actuator actuator, const Limits& limits, const SafetyOptions& options, int size,
                double safe_value);

  /// Turns `wanted` into `applied`, which holds the last applied value on entry. `wanted` is ignored when the
  /// context says hold. Both [size].
  LimitReport apply(const LimitContext& context, std::span<const double> wanted, std::span<double> applied);

  /// Forgets what came before: `applied` is in force, and good.
  void start_from(std::span<const double> applied);

  /// `applied` is in force again, and good: decisions after it were taken back. Does not allocate.
  void go_back_to(std::span<const double> applied);

  /// Whether the values that a rollback would go back to lie within the limits.
  bool fits() const;

  /// Invalid decisions since the last valid one.
  std::int64_t invalid_in_row() const { return invalid_in_row_; }

  void exchange(StateIo& io);

 private:
  std::optional<Reason> hold_reason(const LimitContext& context) const;
  bool must_roll_back(const LimitContext& context);
  void remember_good(std::int64_t step, std::span<const double> applied);
  double largest_move(std::span<const double> applied) const;
  void stay_within_reach(const LimitContext& context, std::span<const double> applied, LimitReport& report);
  double back_off(std::span<const double> applied);
  void take_common_out();
  void clip_biases(std::span<const double> applied, LimitReport& report);
  void clip_scalar(double applied, LimitReport& report);

  Actuator actuator_;
  Limits limits_;
  SafetyOptions options_;
  double safe_value_;
  // Two snapshots. The older one was in force at least `rollback.within` steps ago, before any move that a jump of the
  // loss can be blamed on.
  std::vector<double> last_good_, candidate_;
  std::int64_t candidate_step_ = kNever;
  std::vector<double> last_move_;               // for reversal
  std::vector<double> next_, lo_, hi_, reach_;  // scratch
  std::int64_t invalid_in_row_ = 0;
  std::int64_t last_move_step_ = kNever;
  std::int64_t hold_until_ = kNever;  // after a rollback
  double loss_ema_ = 0, drop_ema_ = 0;
  bool loss_seen_ = false, drop_seen_ = false;
  double reversal_ema_ = 0;
  double gain_ = 1;
  double common_ = 0;  // the mean of values that came from elsewhere, until a decision takes it out
  static constexpr std::int64_t kNever = -(std::int64_t{1} << 62);
};

}  // namespace moectl
