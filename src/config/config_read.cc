// YAML → ControllerConfig: which keys there are, and where their values go.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

#include "config/config_check.h"
#include "config/config_yaml.h"
#include "moectl/config.h"
#include "moectl/policy.h"

namespace moectl {
namespace {

/// Reads a word that must be one of a few.
template <typename T>
void read_choice(YamlMap& map, std::string_view key, std::initializer_list<T> choices, T& out) {
  std::string word;
  if (!map.read(key, word)) return;
  std::vector<std::string> names;
  for (const T choice : choices) {
    names.emplace_back(name_of(choice));
    if (word == names.back()) {
      out = choice;
      return;
    }
  }
  std::string constraint = "must be ";
  for (std::size_t i = 0; i < names.size(); ++i) {
    constraint += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
  }
  if (const std::string near = nearest_key(word, names); !near.empty())
    constraint += "; did you mean '" + near + "'?";
  throw map.error(key, word, constraint);
}

void read_model(YamlMap map, ModelConfig& model) {
  map.read("layers", model.layers);
  map.read("experts", model.experts);
  map.read("top_k", model.top_k);
  map.read("tokens_per_step", model.tokens_per_step);
  read_choice(map, "score_space", {ScoreSpace::kProbability, ScoreSpace::kLogit}, model.score_space);
  map.read("delay", model.delay);
  map.read("domains", model.domains);
  map.read("targets", model.targets);
  map.finish();
  for (const char* key : {"layers", "experts", "top_k"}) map.require(key);
}

void read_metrics(YamlMap map, MetricsOptions& metrics, MonitorOptions& monitor) {
  map.read("capacity_factor", metrics.capacity_factor);
  map.read("cold_fraction", metrics.cold_fraction);
  map.read("placement", metrics.placement);
  map.read("dead_fraction", monitor.dead_fraction);
  map.read("dead_after", monitor.dead_after);
  map.read("ema", monitor.ema);
  map.read("trend_window", monitor.trend_window);
  map.read("trends", monitor.trends);
  map.finish();
}

void read_bands(YamlMap map, Bands& bands) {
  for (const MetricField& field : metric_fields()) {
    std::vector<double> ends;
    if (!map.read(field.name, ends)) continue;
    if (ends.size() != 2) {
      throw map.error(field.name, std::to_string(ends.size()) + " numbers", "must be [lowest, highest]");
    }
    bands[std::string(field.name)] = {ends[0], ends[1]};
  }
  map.finish();
}

void read_phase(YamlMap map, Phase& phase) {
  map.read("name", phase.name);
  if (map.read("until", phase.until) && phase.until < 1) {
    throw map.error("until", std::to_string(phase.until), "must be at least 1");
  }
  if (auto bands = map.map("bands")) read_bands(*bands, phase.bands);
  map.finish();
}

void read_alert(YamlMap map, AlertRule& rule) {
  map.read("name", rule.name);
  if (map.read("metric", rule.metric) && find_metric(rule.metric) == nullptr) {
    std::vector<std::string> names;
    for (const MetricField& field : metric_fields()) names.emplace_back(field.name);
    const std::string near = nearest_key(rule.metric, names);
    throw map.error("metric", rule.metric,
                    "must be a metric" + (near.empty() ? "" : "; did you mean '" + near + "'?"));
  }
  double limit = 0;
  if (map.read("above", limit)) rule.above = limit;
  if (map.read("below", limit)) rule.below = limit;
  map.read("for", rule.for_steps);
  map.read("after", rule.after);
  map.finish();
  map.require("metric");
}

void read_health(YamlMap map, HealthOptions& health) {
  map.read("dwell", health.dwell);
  map.read("weak_specialization", health.weak_specialization);
  if (auto bands = map.map("bands")) read_bands(*bands, health.bands);
  for (YamlMap& phase : map.maps("phases")) read_phase(phase, health.phases.emplace_back());
  for (YamlMap& alert : map.maps("alerts")) read_alert(alert, health.alerts.emplace_back());
  map.finish();
}

void read_limits(YamlMap map, Limits& limits) {
  map.read("min", limits.min);
  map.read("max", limits.max);
  map.read("rate", limits.rate);
  map.read("center", limits.center);
  map.read("deadband", limits.deadband);
  map.read("warmup", limits.warmup);
  map.read("cadence", limits.cadence);
  map.read("cooldown", limits.cooldown);
  map.finish();
}

void read_options(YamlMap map, const PolicyDescription& policy, PolicyOptions& options) {
  for (const OptionSpec& spec : policy.options) {
    OptionValue value = spec.default_value;
    if (std::visit([&](auto& typed) { return map.read(spec.name, typed); }, value))
      options.set(spec.name, value);
  }
  map.finish();
}

void read_actuator(YamlMap map, Actuator which, const PolicyRegistry& registry, ActuatorConfig& actuator) {
  map.read("policy", actuator.policy);
  map.read("initial", actuator.initial);
  read_choice(map, "scope", {Scope::kLayer, Scope::kModel}, actuator.scope);
  // A policy that moves gets the range that suits one; a fixed value needs no more than to lie in its own.
  actuator.limits = default_limits(which, actuator.initial);
  if (actuator.policy == "fixed" && (!is_multiplicative(which) || actuator.initial > 0)) {
    actuator.limits.min = std::min(actuator.limits.min, actuator.initial);
    actuator.limits.max = std::max(actuator.limits.max, actuator.initial);
  }
  if (auto limits = map.map("limits")) read_limits(*limits, actuator.limits);
  if (const std::string fault = policy_fault(actuator.policy, which, registry); !fault.empty()) {
    throw map.error("policy", actuator.policy, fault);
  }
  if (auto options = map.map("options"))
    read_options(*options, *registry.find(actuator.policy), actuator.options);
  map.finish();
}

void read_safety(YamlMap map, SafetyOptions& safety) {
  bool on = false;
  if (auto rollback = map.map_or_switch("rollback", on)) {
    RollbackOptions& options = safety.rollback.emplace();
    rollback->read("loss_jump", options.loss_jump);
    rollback->read("drop_jump", options.drop_jump);
    rollback->read("within", options.within);
    rollback->read("cooldown", options.cooldown);
    rollback->finish();
  } else if (on) {
    safety.rollback.emplace();
  }
  on = false;
  if (auto oscillation = map.map_or_switch("oscillation", on)) {
    OscillationOptions& options = safety.oscillation.emplace();
    oscillation->read("threshold", options.threshold);
    oscillation->read("min_gain", options.min_gain);
    oscillation->finish();
  } else if (on) {
    safety.oscillation.emplace();
  }
  map.read("fallback_after", safety.fallback_after);
  map.finish();
}

void read_guard(YamlMap map, GuardOptions& guard) {
  map.read("enabled", guard.enabled);
  map.read("fhs", guard.fhs);
  map.read("entropy_fall", guard.entropy_fall);
  map.read("dead_share", guard.dead_share);
  map.read("max_token_share", guard.max_token_share);
  map.read("lost_after", guard.lost_after);
  map.read("warmup", guard.warmup);
  map.read("confirm", guard.confirm);
  map.read("aux_factor", guard.aux_factor);
  map.read("temperature_factor", guard.temperature_factor);
  map.read("bias_step", guard.bias_step);
  map.read("recovered_max_vio", guard.recovered_max_vio);
  map.read("dwell", guard.dwell);
  map.read("patience", guard.patience);
  map.read("cooldown", guard.cooldown);
  map.finish();
}

void read_log(YamlMap map, LogConfig& log) {
  map.read("every", log.every);
  map.read("per_expert", log.per_expert);
  map.read("rotate_mb", log.rotate_mb);
  map.read("keep", log.keep);
  map.finish();
}

void read_collect(YamlMap map, StatsNeeds& collect) {
  map.read("gap", collect.gap);
  map.read("sequences", collect.sequences);
  map.read("probabilities", collect.probabilities);
  map.read("gradients", collect.gradients);
  map.read("losses", collect.losses);
  map.read("domain_losses", collect.domain_losses);
  map.read("latencies", collect.latencies);
  map.read("margins", collect.margins);
  map.finish();
}

}  // namespace

ControllerConfig parse_config(std::string_view text, const std::string& name) {
  return parse_config(text, name, PolicyRegistry::builtin());
}

ControllerConfig parse_config(std::string_view text, const std::string& name,
                              const PolicyRegistry& registry) {
  YamlFile file(text, name);
  YamlMap root = file.root();
  ControllerConfig config;
  std::int64_t version = 0;
  if (root.read("version", version) && version != 1) {
    throw root.error("version", std::to_string(version), "must be 1, the only version there is");
  }
  read_choice(root, "mode", {Mode::kActive, Mode::kShadow, Mode::kOff}, config.mode);
  root.read("lag", config.lag);
  if (auto map = root.map("model")) read_model(*map, config.model);
  // A health section turns all of it on, oscillation included, unless the config says otherwise.
  config.monitor.trends = root.has("health");
  if (auto map = root.map("metrics")) read_metrics(*map, config.metrics, config.monitor);
  if (auto map = root.map("health")) read_health(*map, config.monitor.health);
  for (const Actuator which : kActuators) {
    if (auto map = root.map(name_of(which))) read_actuator(*map, which, registry, config.actuator(which));
  }
  if (auto map = root.map("safety")) read_safety(*map, config.safety);
  if (auto map = root.map("guard")) read_guard(*map, config.guard);
  if (auto map = root.map("log")) read_log(*map, config.log);
  if (auto map = root.map("collect")) read_collect(*map, config.collect);
  root.finish();
  root.require("version");
  root.require("model");
  if (const auto problem = complete(config, registry)) throw file.error(*problem);
  return config;
}

ControllerConfig load_config(const std::string& path) {
  return load_config(path, PolicyRegistry::builtin());
}

ControllerConfig load_config(const std::string& path, const PolicyRegistry& registry) {
  if (path == "-") {
    return parse_config(std::string(std::istreambuf_iterator<char>(std::cin), {}), "<stdin>", registry);
  }
  std::ifstream file(path, std::ios::binary);
  if (!file.is_open()) throw ConfigError(path + ": cannot be opened: " + std::strerror(errno));
  std::ostringstream text;
  // Writing nothing to `text` marks it as failed, so an empty file is told from an unreadable one by `file`
  // alone; a directory opens, but its first read is bad.
  if (file.peek() != std::ifstream::traits_type::eof()) text << file.rdbuf();
  if (file.bad()) throw ConfigError(path + ": cannot be read");
  return parse_config(text.str(), path, registry);
}

}  // namespace moectl
