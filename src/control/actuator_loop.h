// ActuatorLoop: one actuator of one layer (or of the whole model): its policy, its limits, and the value in force.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "control/safety.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/metrics.h"
#include "moectl/policy.h"
#include "moectl/stats.h"

namespace moectl {

class ActuatorLoop {
 public:
  /// `layer` is -1 for `scope: model`. Throws std::invalid_argument if the policy is not registered.
  ActuatorLoop(Actuator actuator, const ControllerConfig& config, const PolicyRegistry& registry, int layer);

  /// Windows for the sums between decisions, one for each controlled layer; empty if the cadence is 1.
  void make_windows(const StatsShape& shape, std::size_t layers);

  /// Whether step `step` ends a cadence.
  bool due(std::int64_t step) const { return (step + 1) % cadence_ == 0; }
  bool has_windows() const { return !windows_.empty(); }
  RoutingStats& window(std::size_t i) { return windows_[i]; }
  Metrics& window_metrics(std::size_t i) { return window_metrics_[i]; }

  /// Starts a step in which the policy has not been asked yet.
  void begin() { asked_ = guard_took_over_ = false; }
  /// Asks the policy for a proposal, starting from the value in force.
  void propose(const LayerView& view);
  /// Room for what a guard wants instead of the proposal; take_over() makes it so, if a decision is due.
  std::span<double> guarded() { return guarded_; }
  void take_over() { guard_took_over_ = asked_; }
  /// Applies the proposal within the limits, tells the policy, and starts a new window if the policy was asked.
  void limit(const LimitContext& context);

  bool taken_over() const { return guard_took_over_; }

  StatsNeeds needs() const { return policy_->needs(); }
  StatsNeeds required() const { return policy_->required(); }
  std::span<const double> applied() const { return applied_; }
  ActuatorReport report() const;

  void exchange(StateIo& io);

 private:
  std::unique_ptr<Policy> policy_;
  SafetyLimiter limiter_;
  std::int64_t cadence_;
  std::vector<double> applied_, proposed_, guarded_;
  LimitReport reasons_;
  bool asked_ = false;
  bool guard_took_over_ = false;
  std::vector<RoutingStats> windows_;
  std::vector<Metrics> window_metrics_;
};

}  // namespace moectl
