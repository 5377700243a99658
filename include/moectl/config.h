// ControllerConfig: all settings of a controller; and the strict YAML reader that makes one.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
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
  kShadow,  ///< Decide and log as if applied; what is in force stays.
  kOff,     ///< Record nothing, decide nothing.
};
std::string_view name_of(Mode mode);

enum class Scope {
  kLayer,  ///< One value for each layer.
  kModel,  ///< One value for all layers (scalars only).
};
std::string_view name_of(Scope scope);

struct ModelConfig {
  int layers = 0;   ///< MoE layers, ≥ 1. With layer groups: of all groups.
  int experts = 0;  ///< N ≥ 1 in each. With layer groups: of those that do not say; 0 = none.
  int top_k = 0;    ///< 1 ≤ k ≤ N. Likewise.
  /// Tokens of one step over all ranks; 0 = not known. Sets the noise floor.
  std::int64_t tokens_per_step = 0;
  ScoreSpace score_space = ScoreSpace::kProbability;
  int delay = 0;  ///< Steps by which records arrive late, for a reason outside the controller; ≥ 0.
  std::vector<std::string> domains{};  ///< Names of the domains whose tokens are counted separately.
  /// Sequences of a step, by ids from 0 on, whose pieces join over records and ranks; 0 = ids hold within a record.
  int split_sequences = 0;
  /// Wanted share of the load of each expert [N], 0 to 1/k, summing to 1; empty = equal.
  std::vector<double> targets{};
};

/// How the part of each proposed move that is made changes over the steps: all of it before `from`, `last` from `until` on.
struct GainSchedule {
  enum class Shape { kLinear, kCosine, kStep };
  Shape shape = Shape::kCosine;
  std::int64_t from = 0, until = 0;
  double last = 0;  ///< 0 to 1.
};
std::string_view name_of(GainSchedule::Shape shape);
/// The part of a move that is made at a step; 1 without a schedule.
double gain_at(const std::optional<GainSchedule>& schedule, std::int64_t step);

/// Where an actuator starts: a number; for biases also a list of one value an expert, which every layer takes, or a file
/// of biases by layer.
struct Initial {
  Initial(double number = 0) : value(number) {}
  Initial(std::vector<double> list) : values(std::move(list)) {}
  operator double() const { return value; }

  double value = 0;
  std::vector<double> values{};
  std::string file{};
};

struct ActuatorConfig {
  std::string policy = "fixed";
  PolicyOptions options;
  Initial initial;
  Scope scope = Scope::kLayer;
  Limits limits;
  std::optional<GainSchedule> gain_schedule{};
};

/// Sections that take the place of the config's own, each all of it.
struct SectionOverrides {
  std::optional<ActuatorConfig> expert_bias{}, aux_loss_weight{}, router_temperature{};
  std::optional<GuardOptions> guard{};
  std::optional<SafetyOptions> safety{};
};

/// Layers that differ from others: in their experts, or in how they are controlled.
struct LayerGroup : SectionOverrides {
  std::vector<int> ids{};  ///< The model's own ids of the layers; instead: `count` ids from `first` on.
  int first = -1;          ///< -1 = after the last id of the group before.
  int count = -1;
  int experts = -1, top_k = -1;  ///< -1 = those of `model`.
  std::vector<double> targets{};
  std::vector<int> placement{};
  bool frozen = false;  ///< The layers' actuators are held from the start.
};

/// What changes from a step on. The sections of layer groups stay.
struct TimelineEntry : SectionOverrides {
  std::int64_t from = 0;              ///< The first step that it holds for, ≥ 1.
  std::vector<int> freeze{}, thaw{};  ///< Layer ids.
};

struct LogConfig {
  std::int64_t every = 1;  ///< Steps between records, ≥ 1.
  bool per_expert = true;  ///< Arrays over experts in each record.
  /// Number of most loaded experts, of least loaded ones and of pairs in each record; 0 = none.
  int extremes = 0;
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
  StatsNeeds collect;                     ///< Collected whether or not a policy asks for it.
  std::vector<LayerGroup> layers{};       ///< Empty = model.layers equal layers with ids from 0 on.
  std::vector<TimelineEntry> timeline{};  ///< By rising `from`.

  /// All actuators fixed at their neutral values, for the given model.
  ControllerConfig();
  ActuatorConfig& actuator(Actuator which);
  const ActuatorConfig& actuator(Actuator which) const;
  /// Steps from the routing to the decision that uses it.
  int delay() const { return model.delay + lag; }
};

/// Equal layers of a config: their ids, and the config that holds for them, without groups.
struct LayerSettings {
  std::vector<int> ids;
  ControllerConfig config;
};
/// The groups of a valid config, one if it has no groups. Of step `step` of its timeline.
std::vector<LayerSettings> layer_settings(const ControllerConfig& config, std::int64_t step = 0);
/// The config from a step on, in which the entries of the timeline up to then have become its own sections.
ControllerConfig config_from(const ControllerConfig& config, std::int64_t step);
/// Whether a valid config holds a layer's actuators at a step: by its group, and by the entries up to then.
bool frozen_at(const ControllerConfig& config, int layer, std::int64_t step);
/// The ids of all layers of a valid config, in its order.
std::vector<int> layer_ids(const ControllerConfig& config);

/// A config that cannot be used. `what()` reads "file:line:column: key: value: constraint".
class ConfigError : public std::invalid_argument {
 public:
  /// what() is one line that a terminal can show, whatever the config holds.
  explicit ConfigError(const std::string& what);
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
