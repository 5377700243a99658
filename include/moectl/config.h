// ControllerConfig: all settings of a controller; and the strict YAML reader that makes one.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/guard.h"
#include "moectl/limits.h"
#include "moectl/metrics.h"
#include "moectl/monitor.h"
#include "moectl/policy_options.h"
#include "moectl/stats_shape.h"
#include "moectl/types.h"

namespace moectl {

class PolicyRegistry;  // policy.h

enum class Mode {
  kActive,  ///< Decide and apply.
  kShadow,  ///< Decide and log as if applied, but the training loop reads the initial values.
  kOff,     ///< Record nothing, decide nothing.
};
std::string_view name_of(Mode mode);

enum class Scope {
  kLayer,  ///< One value for each layer.
  kModel,  ///< One value for all layers (scalars only).
};
std::string_view name_of(Scope scope);

struct ModelConfig {
  int layers = 0;   ///< MoE layers, ≥ 1.
  int experts = 0;  ///< N ≥ 1 in each.
  int top_k = 0;    ///< 1 ≤ k ≤ N.
  /// Tokens of one step over all ranks; 0 = not known. Sets the noise floor.
  std::int64_t tokens_per_step = 0;
  ScoreSpace score_space = ScoreSpace::kProbability;
  int delay = 0;  ///< Steps by which records arrive late, beyond the loop's own step; ≥ 0.
  std::vector<std::string> domains{};  ///< Names of the domains whose tokens are counted separately.
  /// Sequences of a step, by ids from 0 on, whose pieces join over records and ranks; 0 = ids hold within a record.
  int split_sequences = 0;
  /// Wanted share of the load of each expert [N], 0 to 1/k, summing to 1; empty = equal.
  std::vector<double> targets{};
};

struct ActuatorConfig {
  std::string policy = "fixed";
  PolicyOptions options;
  double initial = 0;
  Scope scope = Scope::kLayer;
  Limits limits;
};

struct LogConfig {
  std::int64_t every = 1;  ///< Steps between records, ≥ 1.
  bool per_expert = true;  ///< Arrays over experts in each record.
  /// Largest size of a piece of the log, MB (10^6 bytes); 0 = one piece without limit.
  double rotate_mb = 0;
  std::int64_t keep = 0;  ///< Finished pieces to keep; older ones are removed. 0 = keep all. Needs rotate_mb.
};

struct ControllerConfig {
  Mode mode = Mode::kActive;
  /// 0: a step decides on its own sums and waits for the other ranks. 1: a step decides on the sums of the step before,
  /// which are reduced while the model computes; policies are told of this delay.
  int lag = 0;
  ModelConfig model;
  MetricsOptions metrics;
  MonitorOptions monitor;
  ActuatorConfig expert_bias;
  ActuatorConfig aux_loss_weight;
  ActuatorConfig router_temperature;
  SafetyOptions safety;
  GuardOptions guard;
  LogConfig log;
  StatsNeeds collect;  ///< Collected whether or not a policy asks for it.

  /// All actuators fixed at their neutral values, for the given model.
  ControllerConfig();
  ActuatorConfig& actuator(Actuator which);
  const ActuatorConfig& actuator(Actuator which) const;
  /// Steps from the routing to the decision that uses it, beyond the loop's own step.
  int delay() const { return model.delay + lag; }
};

/// A config that cannot be used. `what()` reads "file:line:column: key: value: constraint".
class ConfigError : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// Strict: an unknown key, a wrong type or a value outside its constraint is a ConfigError that names the place, the
/// value, the constraint and the nearest valid key. Options that are not given take the policy's defaults.
ControllerConfig load_config(const std::string& path);
ControllerConfig load_config(const std::string& path, const PolicyRegistry& registry);
/// The same from text; `name` stands for the file in messages.
ControllerConfig parse_config(std::string_view text, const std::string& name = "config");
ControllerConfig parse_config(std::string_view text, const std::string& name, const PolicyRegistry& registry);
/// Checks a config made in code and fills in the options not given. Throws ConfigError ("key: value: constraint").
void validate(ControllerConfig& config);
void validate(ControllerConfig& config, const PolicyRegistry& registry);
/// Metric options including the model's targets: the options for a Measurer.
MetricsOptions metrics_options(const ControllerConfig& config);
/// The whole config, every default filled in, as YAML that parses back to the same config.
std::string to_yaml(const ControllerConfig& config);
/// The whole config as one JSON object, as in the first line of a run log.
std::string to_json(const ControllerConfig& config);

/// The key nearest to `key` in edit distance, or empty if none is near.
std::string nearest_key(std::string_view key, const std::vector<std::string>& known);

}  // namespace moectl
