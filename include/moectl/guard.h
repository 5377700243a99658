// Guard: supervisor of a layer's three actuators against collapse.
//
//             a trigger                  balanced for `dwell` steps               all steps back have stood
//   watching ───────────▶ intervening ────────────────────────────▶ handing back ───────────────────────▶ watching
//      ▲                       │ no help in `patience` steps    time is up ▲ │ balance lost                   │
//      │                       ▼                                           │ ▼                                │ lost
//      └───── cooldown ◀── rolling back ◀─────────────────────────────── holding ◀───────────────────────────┘ soon
//                  all as before                no help either        at the last step that held
//
// Steps back: the scalars, a rung at a time, then the biases. Each hold lasts twice as long as the one before, so where
// the law cannot keep the balance the guard ends up keeping it, with trials to let go ever further apart.
// It is no policy, because it acts on all three actuators at once: it stands between the proposals and the
// safety limits, overrides the first (reason `guard`) and never the second.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace moectl {

struct GuardOptions {
  bool enabled = false;
  // Triggers. Each must hold for `confirm` steps in a row.
  bool fhs = true;  ///< fhs_alarm: FHS above 1 and clear of the noise.
  /// Of entropy_normalized, below its slow average (or what it is on target, if that is less), (0, 1].
  double entropy_fall = 0.15;
  double dead_share = 0.25;  ///< Of the experts that are to get something, those that are dead, (0, 1].
  /// Of tokens that choose one and the same expert, (0, 1]. With a target t above an even share s of the tokens it is
  /// raised by (1 - this) (t - s)/(1 - s), so that it stays as far along between the target and all tokens.
  double max_token_share = 0.8;
  /// Steps over which a layer that was balanced, but for one expert at most, has one at more than `recovered_max_vio`
  /// above its share, and rising: what a law too slow for it looks like long before anything else shows. ≥ 1
  std::int64_t lost_after = 100;
  std::int64_t warmup =
      50;  ///< Steps at the start without a trigger: a young router is uneven by nature. ≥ 0
  std::int64_t confirm = 5;  ///< ≥ 1
  // Intervention. After a relapse the biases are tried first, and the scalars follow while that is not enough.
  double aux_factor = 10;           ///< The aux weight is raised by up to this factor, ≥ 1.
  double temperature_factor = 1.5;  ///< The temperature likewise, ≥ 1.
  /// First move of a bias for a relative error of 1, in score gaps, ≥ 0. Each expert's grows by a fifth while
  /// its error keeps its sign and halves when it turns.
  double bias_step = 1;
  // Watched recovery.
  /// Balanced: MaxVio is no more than this, > 0, or than twice what chance alone is expected to show on as many
  /// tokens (the sampling floor, else the noise floor), if that is more. For 4 × `patience` steps after handing back a
  /// smoothed MaxVio above it is a relapse, which is a trigger by itself.
  double recovered_max_vio = 1;
  std::int64_t dwell = 30;  ///< Steps of balance before handing back, and for each step of it, ≥ 1.
  /// Steps without recovery after which the intervention is rolled back, ≥ 1. The guard holds on for twice as many
  /// the first time that balance is lost on its way back or soon after, for twice that the next time, and so on.
  std::int64_t patience = 300;
  std::int64_t cooldown = 100;  ///< Steps after a rollback before the next intervention, ≥ 0.
};
/// What is wrong with the options, as "key: value: constraint"; empty if nothing.
std::string check_guard(const GuardOptions& options);

/// Handing back: scalars on their way back, biases still the guard's. Holding: the same, where balance last stood.
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
/// Why the guard is in its state, and which numbers decided so.
enum class GuardCause : std::uint8_t {
  kNone,       ///< Watching, nothing decided: the numbers are those of a trigger that stands, if any.
  kTriggered,  ///< The trigger was confirmed: its number and its threshold.
  kBalanced,  ///< MaxVio (smoothed, while handing back) has been at most what counts as balanced for long enough.
  kHelped,  ///< Time is up, yet smoothed MaxVio is no more than 0.7 × what it was at the start: kept.
  kLost,  ///< Handing back, smoothed MaxVio rose above what counts as balanced (or helped): the step is undone.
  kNoHelp,  ///< Time is up and smoothed MaxVio is more than that: rolled back.
  kUndone,  ///< Biases and scalars are as before: the largest distance left, of biases, and its bound.
  kTimeUp,  ///< Steps spent in the state before, and how many it may last.
  kRested,  ///< The same, for the cooldown and for a hold.
};
std::string_view name_of(GuardState state);
std::string_view name_of(GuardTrigger trigger);
std::string_view name_of(GuardCause cause);

/// What the guard of one layer saw and does, for the log. A decision's numbers stand while its state lasts;
/// those of a decision to watch stand for one step.
struct GuardReport {
  GuardState state = GuardState::kWatching;
  GuardTrigger trigger = GuardTrigger::kNone;  ///< What set off the intervention under way, or stands now.
  double value = 0;                            ///< The number that decided …
  double threshold = 0;                        ///< … and what it is held against.
  GuardCause cause = GuardCause::kNone;
};

}  // namespace moectl
