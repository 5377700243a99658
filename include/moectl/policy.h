// Policy: what decides where one actuator of one layer should go; and the registry of all policies by name.
//
// A policy proposes, the safety limits decide, and the policy is told what became of its proposal. It sees no
// clock and no random numbers, so every rank decides the same bits, and a saved state continues exactly.
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

/// What the host said of the step, reduced over ranks: the same on every rank.
struct StepInfo {
  std::optional<double> loss{};           ///< Mean training loss of the step, nats a token.
  std::optional<double> gradient_norm{};  ///< Global gradient norm.
  bool skipped = false;                   ///< The optimizer skipped the step (overflow, NaN gradient).
  /// Tokens per domain of the next batch [domains]; empty = not known.
  std::span<const std::int64_t> next_mixture{};
};

/// All a policy may look at. Views are valid during the call only.
struct LayerView {
  std::int64_t step = 0;  ///< Control steps since the start of the run.
  int layer = 0;          ///< -1 for an actuator of `scope: model`.
  /// Sums over the steps since the last cadence point. For `scope: model`, the first layer's.
  const RoutingStats& stats;
  /// Metrics of those sums. For `scope: model`, the mean over layers of each metric.
  const Metrics& metrics;
  /// The largest over layers of each metric for `scope: model` (entropies, min_load: least); else `metrics`.
  const Metrics& worst;
  const LayerMonitor& monitor;      ///< For `scope: model`, the first layer's.
  std::span<const double> targets;  ///< Wanted share of the load of each expert, summing to 1. [N]
  const StepInfo& info;
};

/// Serves one actuator of one layer (or of the whole model). Only `propose` is required.
class Policy {
 public:
  virtual ~Policy() = default;
  /// Required. `value` holds what is in force and receives what is wanted: [N] for biases, [1] for scalars.
  /// Called at every cadence point with valid data, also while a hold is in force, so that the state stays
  /// warm.
  virtual void propose(const LayerView& layer, std::span<double> value) = 0;
  /// Optional: what became of the proposal; the place for anti-windup. Follows every `propose`.
  virtual void on_applied(std::span<const double> /*applied*/, const LimitReport& /*why*/) {}
  /// Optional: sums wanted beyond counts. Constant over the policy's life.
  virtual StatsNeeds needs() const { return {}; }
  /// Optional, required if the policy has memory: writes or reads everything that the next proposal depends on, in
  /// the same entries whatever it has seen, so that a state has one length.
  virtual void exchange(StateIo& /*io*/) {}
};

/// What a policy knows of the plant when it is made.
struct PolicyContext {
  Actuator actuator = Actuator::kExpertBias;
  int layer = 0;  ///< -1 for `scope: model`.
  int experts = 0;
  int top_k = 0;
  int domains = 0;  ///< Domains whose tokens are counted apart.
  int delay = 0;    ///< Steps between the routing and the decision that uses it, beyond the loop's own one.
  ScoreSpace score_space = ScoreSpace::kProbability;
  double initial = 0;        ///< The actuator's value at the start.
  double min = 0, max = 0;   ///< Its range.
  std::int64_t cadence = 1;  ///< Steps between decisions.
};

struct PolicyDescription {
  std::string name;
  std::string summary;              ///< One line.
  std::string details = {};         ///< Optional: what `moectl policies NAME` prints below the options.
  std::vector<Actuator> actuators;  ///< Which it can serve; at least one.
  std::vector<OptionSpec> options;
  std::function<std::unique_ptr<Policy>(const PolicyContext&, const PolicyOptions&)> make;
  /// Optional check across options; returns what is wrong, empty if nothing.
  std::function<std::string(const PolicyContext&, const PolicyOptions&)> check;
};

class PolicyRegistry {
 public:
  /// Throws std::invalid_argument if the name is empty or taken, `make` is missing, no actuator is named, or
  /// two options share a name.
  void add(PolicyDescription description);
  const PolicyDescription* find(std::string_view name) const;
  /// Sorted by name.
  std::vector<const PolicyDescription*> all() const;

  /// The policies that come with the library.
  static const PolicyRegistry& builtin();

 private:
  std::map<std::string, PolicyDescription, std::less<>> policies_;
};

/// Adds every policy that comes with the library: one line each, in policies/builtin.cc.
void register_builtin_policies(PolicyRegistry& registry);

}  // namespace moectl
