// LayerGuard: the guard of one layer (moectl/guard.h says what a guard does).
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

  void exchange(StateIo& io);

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
