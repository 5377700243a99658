// Guard: watches a layer for collapse, and then takes over its three actuators until the layer is balanced again.
//
//             a trigger                  balanced for `dwell` steps               all steps back have stood
//   watching ───────────▶ intervening ────────────────────────────▶ handing back ───────────────────────▶ watching
//      ▲                       │ no help in `patience` steps    time is up ▲ │ balance lost                   │
//      │                       ▼                                           │ ▼                                │ lost
//      └───── cooldown ◀── rolling back ◀─────────────────────────────── holding ◀───────────────────────────┘ soon
//                  all as before                no help either        at the last step that held
//
// Handing back goes in steps: first the scalars, one step at a time, then the biases. Each hold lasts twice as long as
// the one before. So if the policy cannot keep the balance, the guard keeps it, and tries ever more rarely to hand
// back. The guard is not a policy, because it acts on all three actuators at once. It stands between the policies and
// the safety limits: it overrides proposals (reason `guard`) and never the limits.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace moectl {

struct GuardOptions {
  bool enabled = false;
  // Triggers. Each must hold for `confirm` steps in a row.
  bool fhs = true;  ///< Triggers on fhs_alarm: FHS above 1, and more than noise explains.
  /// Triggers when entropy_normalized is this far below its slow average (or below its value on target, if that is
  /// less), (0, 1].
  double entropy_fall = 0.15;
  /// Triggers when this share of the experts with a target above 0 is dead, (0, 1].
  double max_dead_share = 0.25;
  /// Triggers when this share of the tokens chooses the same expert, (0, 1]. For an expert whose target share of the
  /// tokens t = k w is above the even share s = k/N, the threshold is max_token_share + (1 - max_token_share) (t -
  /// s)/(1 - s).
  double max_token_share = 0.8;
  /// Steps for which an expert may stay overloaded (more than `recovered_max_vio` above its share) and rising in a
  /// layer that was balanced before, except for one expert at most; ≥ 1. The earliest sign of a policy that is too
  /// slow.
  std::int64_t lost_after = 100;
  /// Steps at the start without a trigger, because a new router is uneven; ≥ 0.
  std::int64_t warmup = 50;
  std::int64_t confirm = 5;  ///< ≥ 1
  // Intervention. After a relapse the biases are tried first; the scalars follow if the biases are not enough.
  double aux_factor = 10;           ///< The aux weight is raised by up to this factor, ≥ 1.
  double temperature_factor = 1.5;  ///< The temperature likewise, ≥ 1.
  /// First move of a bias for a relative error of 1, in score gaps, ≥ 0. The step of each expert grows by a fifth while
  /// its error keeps its sign, and halves when the sign changes.
  double bias_step = 1;
  // Watched recovery.
  /// A layer is balanced while MaxVio is at most this (> 0), or at most twice its floor (the sampling floor, else the
  /// noise floor) if that is more. For 4 × `patience` steps after handing back, a smoothed MaxVio above this bound is a
  /// relapse, which is a trigger by itself.
  double recovered_max_vio = 1;
  std::int64_t dwell = 30;  ///< Balanced steps before handing back begins, and for each step of it, ≥ 1.
  /// Steps without recovery after which the intervention is rolled back, ≥ 1. When balance is lost during handing back
  /// or soon after, the guard holds for twice as many steps, the next time for four times as many, and so on.
  std::int64_t patience = 300;
  std::int64_t cooldown = 100;  ///< Steps after a rollback before the next intervention, ≥ 0.
};

/// kHandingBack: the scalars return while the guard still sets the biases. kHolding: likewise, but the scalars stay at
/// the last step at which the layer was balanced.
enum class GuardState : std::uint8_t {
  kWatching,
  kIntervening,
  kHandingBack,
  kHolding,
  kRollingBack,
  kCooldown
};
enum class GuardTrigger : std::uint8_t {
  kNone,
  kFhs,
  kEntropyFall,
  kDeadExperts,
  kMaxLoad,
  kLostBalance,
  kRelapse
};
/// Why the guard is in its state, and the meaning of `value` and `threshold` in GuardReport.
enum class GuardCause : std::uint8_t {
  kNone,       ///< Watching without a decision: the numbers of the trigger that holds now, if any.
  kTriggered,  ///< A trigger was confirmed: its value and its threshold.
  kBalanced,   ///< MaxVio (smoothed while handing back) has been within the balanced bound for `dwell` steps.
  kHelped,  ///< `patience` is over, but smoothed MaxVio fell to 0.7 × its value at the start: the intervention stays.
  kLost,  ///< While handing back, smoothed MaxVio rose above the balanced (or helped) bound: the step is undone.
  kNoHelp,  ///< `patience` is over and smoothed MaxVio is above the bound of kHelped: rolled back.
  kUndone,  ///< Biases and scalars are back: the largest remaining distance of a bias, and its bound.
  kTimeUp,  ///< The state before reached its time limit: its steps, and the limit.
  kRested,  ///< A cooldown or a hold is over: its steps, and its length.
};
std::string_view name_of(GuardState state);
std::string_view name_of(GuardTrigger trigger);
std::string_view name_of(GuardCause cause);

/// State of the guard of one layer, for the log. The numbers of a decision stay while its state lasts; those of a
/// decision to watch stay for one step.
struct GuardReport {
  GuardState state = GuardState::kWatching;
  GuardTrigger trigger =
      GuardTrigger::kNone;  ///< The trigger of the present intervention, or the one that holds now.
  double value = 0;         ///< The value that decided; see GuardCause.
  double threshold = 0;     ///< The threshold of `value`.
  GuardCause cause = GuardCause::kNone;
};

}  // namespace moectl
