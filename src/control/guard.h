// LayerGuard: the guard of one layer (moectl/guard.h explains guards).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moectl/guard.h"
#include "moectl/limits.h"
#include "moectl/metrics.h"
#include "moectl/state.h"
#include "moectl/stats.h"
#include "moectl/types.h"

namespace moectl {

/// One layer's guard. Does not allocate after construction.
class LayerGuard {
 public:
  LayerGuard(const GuardOptions& options, const StatsShape& shape, const LoadTargets& targets);

  /// The sums that it needs in addition to counts: the gap is its unit for biases.
  static StatsNeeds needs() { return {.gap = true}; }

  /// Processes one step with valid data and updates the state. `in_force`: the actuators' values, in the order of
  /// kActuators.
  void observe(std::int64_t step, const RoutingStats& stats, const Metrics& metrics,
               const std::span<const double> (&in_force)[kActuatorCount]);

  /// True if the guard controls this actuator now; then `wanted` receives its proposal, computed from `in_force`.
  bool overrides(Actuator actuator, const Limits& limits, std::span<const double> in_force,
                 std::span<double> wanted) const;
  const GuardReport& report() const { return report_; }

  void exchange(StateIo& io);

 private:
  void follow_loads(std::int64_t step, const RoutingStats& stats, const Metrics& metrics);
  void watch_max_load(const RoutingStats& stats, const Metrics& metrics);
  GuardReport strongest_trigger(std::int64_t step, const RoutingStats& stats, const Metrics& metrics);
  void take_over(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]);
  void hand_back(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]);
  void lower_scalar_exponent();
  void adapt_bias_steps();
  void enter(GuardState state, std::int64_t step, GuardCause cause, double value, double threshold);
  double relapse_threshold() const;  // bound of smoothed MaxVio while handing back, and after
  bool recently_handed_back(std::int64_t step) const;
  bool scalars_are_back(const std::span<const double> (&in_force)[kActuatorCount]) const;

  GuardOptions options_;
  int top_k_;
  std::vector<double> targets_;       // w
  std::vector<double> token_shares_;  // with unequal targets, max_token_share of each expert
  double even_target_, wanted_;       // 1/M and M, the number of experts with a target above 0
  double entropy_on_target_ = 1;      // normalized
  GuardReport report_;
  std::int64_t since_ = 0;      // step at which the state was entered
  std::int64_t confirmed_ = 0;  // consecutive steps with a trigger, or without balance
  std::int64_t balanced_ = 0;   // consecutive steps without one, or at one step of handing back
  std::int64_t relapses_ = 0;   // times that balance was lost since the intervention
  std::int64_t handed_back_;    // step of the last return to watching
  double entropy_average_ = 0;
  bool entropy_known_ = false;
  bool observed_ = false;  // whether a step has been seen
  double gap_ = 0;
  double max_load_ = 0, token_share_limit_ = 0;  // of the expert that is farthest above its max_token_share
  double balanced_max_vio_ = 0;                  // MaxVio that counts as balanced
  double vio_ = 0, vio_average_ = 0;             // MaxVio of this step, and smoothed
  double start_vio_ = 0;                         // MaxVio when the intervention began
  // kPartialSuccess · start_vio_ if the intervention helped without restoring balance, else 0.
  double partial_success_bound_ = 0;
  // The larger of MaxVio of the smoothed loads (what remains once chance has averaged out) and half of vio_average_.
  double excess_ = 0;
  bool was_balanced_ = false;
  double lost_sum_ = 0;  // of excess_ over the lost_steps_ for which balance has been lost
  std::int64_t lost_steps_ = 0;
  double scalar_exponent_ = 0;     // exponent of the scalars' factors, [0, 1]
  double last_good_exponent_ = 0;  // the last one at which the layer stayed balanced
  std::vector<double> errors_;     // relative, of this step
  std::vector<double> smoothed_;   // the same, smoothed
  std::vector<double> steps_;  // step of each bias, in units of bias_step, with the sign of its last error
  std::vector<double> bias_before_;
  double aux_before_ = 0, temperature_before_ = 1;
};

}  // namespace moectl
