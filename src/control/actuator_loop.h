// ActuatorLoop: one actuator of one layer (or of the whole model): its policy, its limits, and the value in force.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "control/choice_check.h"
#include "control/notices.h"
#include "control/response_check.h"
#include "control/safety.h"
#include "control/scalar_response.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/metrics.h"
#include "moectl/policy.h"
#include "moectl/stats.h"

namespace moectl {

struct ResponseWords;

class ActuatorLoop {
 public:
  /// `layer` is -1 for `scope: model`. Throws std::invalid_argument if the policy is not registered.
  ActuatorLoop(Actuator actuator, const ControllerConfig& config, const PolicyRegistry& registry, int layer);

  /// Windows for the sums between decisions, one for each controlled layer; empty if the cadence is 1.
  void make_windows(std::span<const StatsShape> shapes);

  /// Whether step `step` ends a cadence.
  bool due(std::int64_t step) const { return (step + 1) % cadence_ == 0; }
  bool has_windows() const { return !windows_.empty(); }
  RoutingStats& window(std::size_t i) { return windows_[i]; }
  Metrics& window_metrics(std::size_t i) { return window_metrics_[i]; }

  /// Puts values in force that come from elsewhere, within the limits. Policy and limits start anew from them.
  void adopt(std::span<const double> values, const ControllerConfig& config, const PolicyRegistry& registry);

  /// Starts a step in which the policy has not been asked yet.
  void begin() { asked_ = failed_ = guard_took_over_ = false; }
  /// Asks the policy for a proposal, starting from the value in force without the probe. A policy that throws is held.
  void propose(const LayerView& view, Notices& notices);
  /// Room for what a guard wants instead of the proposal; take_over() makes it so, if a decision is due.
  std::span<double> guarded() { return guarded_; }
  void take_over() { guard_took_over_ = asked_ || failed_; }

  // What these values should move is checked to answer them: the load the biases, the token entropy a temperature. A check
  // that gets no answer holds the values. It starts anew with the values in force.
  bool checks_load() const { return load_check_.has_value(); }
  bool checks_entropy() const { return entropy_check_.has_value(); }
  void start_checks(const ControllerConfig& config);
  /// Every step. `applies`: whether what is decided comes into force. `seen`: by all ranks, of whether the router uses these
  /// biases. `told`: this rank has named the fault that it saw.
  void watch_load(bool applies, WiringSeen seen, bool told, const RoutingStats& stats, const Metrics& metrics,
                  std::int64_t step, Notices& notices);
  /// What of that to tell the other ranks.
  WiringSeen news(WiringSeen seen) const { return wiring_.news(seen, load_check_ && load_check_->asks()); }
  /// Before limit(): what the decision of this step saw. Absent: nothing is known of this step.
  struct EntropySeen {
    double entropy, largest;  // nats; the mean over layers, and of ln N
  };
  void watch_entropy(bool applies, const std::optional<EntropySeen>& seen, std::int64_t step,
                     Notices& notices);
  /// The part of the values in force that is a test move of a check, and none of the policy's: [N], or empty.
  std::span<const double> probe() const;
  Responsiveness load_response() const { return load_check_->report(); }
  void exchange_load_check(StateIo& io);

  /// Applies the proposal within the limits, tells the policy, and starts a new window if the old one was used or
  /// cannot be. In mode shadow nothing is applied.
  void limit(LimitContext context, Notices& notices);
  /// Holds, whatever was proposed: ranks differ.
  void hold_ranks();
  /// Whether the policy threw in the last decision.
  bool failed() const { return failed_ || owed_; }
  /// Keeps the value in force as the newest of those that undo() can go back to.
  void remember();
  /// Back to the value that was in force `decisions` calls of remember() ago, 1 or 2. What a rank made of a probe of the biases
  /// is not what the others made of it.
  void undo(std::size_t decisions);

  bool taken_over() const { return guard_took_over_; }

  /// Of the policy, and of the check of its moves.
  StatsNeeds needs() const;
  StatsNeeds required() const { return policy_->required(); }
  std::span<const double> applied() const { return applied_; }
  /// Of the last step.
  const LimitReport& reasons() const { return reasons_; }
  ActuatorReport report();
  /// Writes the value in force without the probe and what serves the next batch alone, within the limits. Returns whether
  /// it is another one.
  bool deployment(std::span<double> out) const;
  /// After adopt(): the memory of a policy of the same name, from its saved state, as far as it fits. Returns what is
  /// wrong, and is then to adopt the values once more.
  std::string keep_memory(const StateIo& in, const ControllerConfig& config);

  void exchange(StateIo& io);

 private:
  void exchange_windows(StateIo& io);
  void exchange_failure(StateIo& io);
  void exchange_entropy_check(StateIo& io);
  void say_response(const ResponseWords& words, const Responsiveness& now, std::int64_t step,
                    Notices& notices);
  void say_invalid(const LimitContext& context, Notices& notices);
  void fail(std::int64_t step, std::string_view message, Notices& notices);

  Actuator actuator_;
  int layer_;
  std::string name_;  // of the policy
  std::unique_ptr<Policy> policy_;
  SafetyLimiter limiter_;
  SafetyOptions safety_;
  std::optional<GainSchedule> gain_schedule_;
  std::int64_t cadence_;
  bool shadow_;
  std::vector<double> applied_, proposed_, guarded_;
  std::vector<double> base_;            // applied_ without a probe
  std::vector<double> shadow_applied_;  // mode shadow: what would be applied
  std::vector<double> deployed_;
  Limits limits_;
  std::optional<ResponseCheck> load_check_;
  WiringMemory wiring_;
  bool response_told_ = false;  // that the load does not answer
  std::optional<ScalarResponse> entropy_check_;
  bool entropy_checked_ = false;  // in this step
  double entropy_offset_ = 0;
  LimitReport reasons_;
  std::array<std::vector<double>, 2> before_;
  bool asked_ = false;
  bool failed_ = false;
  bool failing_ = false;  // it threw when it was called last: said once
  bool owed_ = false;     // it threw when it was told what is applied: the next decision is held
  bool guard_took_over_ = false;
  std::vector<RoutingStats> windows_;
  std::vector<Metrics> window_metrics_;
};

}  // namespace moectl
