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
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/safety.h"
#include "moectl/state.h"
#include "moectl/stats.h"
#include "moectl/types.h"

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

/// One layer's guard. Does not allocate after construction.
class LayerGuard {
 public:
  LayerGuard(const GuardOptions& options, const StatsShape& shape, const LoadTargets& targets);

  /// Sums it wants beyond counts: the gap is its unit for biases.
  static StatsNeeds needs() { return {.gap = true}; }

  /// Takes in one step with valid data and moves on in its states. `in_force` are the actuators' values, in
  /// the order of kActuators.
  void observe(std::int64_t step, const RoutingStats& stats, const Metrics& metrics,
               const std::span<const double> (&in_force)[kActuatorCount]);

  /// True if the guard decides over this actuator now; then `wanted` receives what it wants, from what is in
  /// force.
  bool overrides(Actuator actuator, const Limits& limits, std::span<const double> in_force,
                 std::span<double> wanted) const;
  const GuardReport& report() const { return report_; }

  void save(StateWriter& out) const;
  void load(StateReader& in);

 private:
  void follow_loads(std::int64_t step, const RoutingStats& stats, const Metrics& metrics);
  void watch_max_load(const RoutingStats& stats, const Metrics& metrics);
  GuardReport strongest_trigger(std::int64_t step, const RoutingStats& stats, const Metrics& metrics);
  void take_over(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]);
  void hand_back(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]);
  void take_back_a_rung();
  void size_steps();
  void enter(GuardState state, std::int64_t step, GuardCause cause, double value, double threshold);
  double bar() const;  // what smoothed MaxVio must stay under while the guard takes itself back, and after
  bool let_go_lately(std::int64_t step) const;
  bool scalars_are_back(const std::span<const double> (&in_force)[kActuatorCount]) const;

  GuardOptions options_;
  int top_k_;
  std::vector<double> targets_;       // w
  std::vector<double> token_shares_;  // with unequal targets, max_token_share of each expert
  double even_target_, wanted_;       // 1/M and M, of the experts that are to get something
  double entropy_on_target_ = 1;      // normalized
  GuardReport report_;
  std::int64_t since_ = 0;      // step at which the state was entered
  std::int64_t confirmed_ = 0;  // steps in a row with a trigger, or with balance lost
  std::int64_t balanced_ = 0;   // steps in a row without one, or on one rung of handing back
  std::int64_t relapses_ = 0;   // times that balance was lost since the intervention
  std::int64_t handed_back_;    // step at which the guard last let go
  double entropy_average_ = 0;
  bool entropy_known_ = false;
  bool begun_ = false;  // whether a step has been seen
  double gap_ = 0;
  double max_load_ = 0, most_tokens_ = 0;  // of the expert that is farthest above its max_token_share
  double level_ = 0;                       // MaxVio that counts as balanced
  double vio_ = 0, vio_average_ = 0;       // MaxVio of this step, and smoothed
  double start_vio_ = 0;                   // MaxVio when the intervention began
  double helped_ = 0;                      // if it helped but did not balance: the MaxVio that says so
  // The larger of MaxVio of the smoothed loads (what remains once chance has averaged out) and half of vio_average_.
  double excess_ = 0;
  bool was_balanced_ = false;
  double lost_sum_ = 0;  // of excess_ over the lost_steps_ for which balance has been lost
  std::int64_t lost_steps_ = 0;
  double raised_ = 0;             // how far the scalars are raised, as the exponent of their factors, [0, 1]
  double held_ = 0;               // the same, of the last step back that held
  std::vector<double> errors_;    // relative, of this step
  std::vector<double> smoothed_;  // the same, smoothed
  std::vector<double> steps_;     // of each bias, in units of bias_step; negative if its last error was
  std::vector<double> bias_before_;
  double aux_before_ = 0, temperature_before_ = 1;
};

}  // namespace moectl
