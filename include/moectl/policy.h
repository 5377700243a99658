// Policy: proposes the next value of one actuator of one layer. PolicyRegistry: all policies by name.
//
// A policy proposes a value, the safety limits decide which value is applied, and the policy is told the outcome. It
// uses no clock and no random numbers, so every rank decides the same bits, and a saved state continues exactly.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/policy_options.h"
#include "moectl/stats_shape.h"
#include "moectl/types.h"

namespace moectl {

class LayerMonitor;  // monitor.h
class LimitReport;   // limits.h
struct Metrics;      // metrics.h
class RoutingStats;  // stats.h
class StateIo;       // state.h

/// What the training loop reports about a step, reduced over ranks: the same on every rank.
struct StepInfo {
  std::optional<double> loss{};           ///< Mean training loss of the step, nats a token.
  std::optional<double> gradient_norm{};  ///< Global gradient norm.
  bool skipped = false;                   ///< The optimizer skipped the step (overflow, NaN gradient).
  /// Tokens per domain of the next batch [domains]; empty = not known.
  std::span<const std::int64_t> next_mixture{};
};

/// The inputs of a policy. The views are valid only during the call.
struct LayerView {
  std::int64_t step = 0;  ///< Control steps since the start of the run.
  int layer = 0;          ///< -1 for an actuator of `scope: model`.
  /// Sums over the steps since the last cadence point. For `scope: model`, the first layer's.
  const RoutingStats& stats;
  /// Metrics of `stats`. For `scope: model`, the mean over layers of each metric.
  const Metrics& metrics;
  /// For `scope: model`, the worst layer's value of each metric: the largest, for entropies and min_load the smallest.
  /// For `scope: layer`, the same as `metrics`.
  const Metrics& worst;
  const LayerMonitor& monitor;      ///< For `scope: model`, the first layer's.
  std::span<const double> targets;  ///< Wanted share of the load of each expert, summing to 1. [N]
  const StepInfo& info;
  /// The part of the value in force that is a test move of `safety.responsiveness`: the value that `propose` starts from
  /// is without it, but the router uses both. Empty = none. [N] for biases, [1] for a temperature.
  std::span<const double> probe{};
};

/// Controls one actuator of one layer (or of the whole model). Only `propose` is required. A policy that throws holds its
/// actuator: for this decision if `propose` throws, for the next one if `on_applied` does.
class Policy {
 public:
  virtual ~Policy() = default;
  /// Required. `value` holds the applied value and receives the proposed one: [N] for biases, [1] for scalars. Called
  /// at every decision with valid data, also while the actuator is held, so that the policy's averages stay current.
  virtual void propose(const LayerView& layer, std::span<double> value) = 0;
  /// Optional: the applied value, and why it differs from the proposal. Follows every `propose`. The place for
  /// anti-windup.
  virtual void on_applied(std::span<const double> /*applied*/, const LimitReport& /*why*/) {}
  /// Optional: the sums that the policy needs beyond counts. Must not change during the policy's life.
  virtual StatsNeeds needs() const { return {}; }
  /// Optional: those of needs() without which the policy cannot decide; by default all. A decision on tokens that came
  /// without one of them is held (`missing_input`). Must not change during the policy's life.
  virtual StatsNeeds required() const { return needs(); }
  /// Optional: takes out of the biases in force what serves the next batch alone, as feed-forward does. What is left is
  /// what a model is deployed with.
  virtual void leave_for_deployment(std::span<double> /*biases*/) const {}
  /// Optional, required if the policy has memory: writes or reads everything that the next proposal depends on, in
  /// the same entries whatever it has seen, so that a state has one length.
  virtual void exchange(StateIo& /*io*/) {}
};

/// What a policy knows when it is made: the model and its actuator.
struct PolicyContext {
  Actuator actuator = Actuator::kExpertBias;
  int layer = 0;  ///< -1 for `scope: model`.
  int experts = 0;
  int top_k = 0;
  int domains = 0;  ///< Domains whose tokens are counted separately.
  int delay = 0;    ///< Steps from the routing to the decision that uses it: model.delay + lag.
  ScoreSpace score_space = ScoreSpace::kProbability;
  double initial = 0;        ///< The actuator's value at the start.
  double min = 0, max = 0;   ///< Its range.
  std::int64_t cadence = 1;  ///< Steps between decisions.
};

struct PolicyDescription {
  std::string name;
  std::string summary;              ///< One line.
  std::string details = {};         ///< Optional: what `moectl policies NAME` prints below the options.
  std::vector<Actuator> actuators;  ///< The actuators that the policy can control; at least one.
  std::vector<OptionSpec> options;
  std::function<std::unique_ptr<Policy>(const PolicyContext&, const PolicyOptions&)> make;
  /// Optional: checks options against each other. Returns what is wrong; empty if nothing.
  std::function<std::string(const PolicyContext&, const PolicyOptions&)> check;
};

class PolicyRegistry {
 public:
  /// Throws std::invalid_argument if the name is empty or taken, `make` is missing, no actuator is named, or two
  /// options have the same name.
  void add(PolicyDescription description);
  const PolicyDescription* find(std::string_view name) const;
  /// Sorted by name.
  std::vector<const PolicyDescription*> all() const;

  /// The policies that come with the library.
  static const PolicyRegistry& builtin();

 private:
  std::map<std::string, PolicyDescription, std::less<>> policies_;
};

/// Adds every policy that comes with the library. The list is in policies/builtin.cc.
void register_builtin_policies(PolicyRegistry& registry);

}  // namespace moectl
