// ControllerConfig → YAML and JSON: one tree for both, since JSON's values are YAML's.
#include <nlohmann/json.hpp>

#include "config/config_check.h"
#include "moectl/config.h"

namespace moectl {
namespace {

using Json = nlohmann::ordered_json;

Json tree(const ActuatorConfig& actuator) {
  Json options = Json::object();
  for (const auto& [name, value] : actuator.options.values()) {
    std::visit([&, &key = name](const auto& typed) { options[key] = typed; }, value);
  }
  const Limits& limits = actuator.limits;
  return {{"policy", actuator.policy},
          {"options", options},
          {"initial", actuator.initial},
          {"scope", name_of(actuator.scope)},
          {"limits",
           {{"min", limits.min},
            {"max", limits.max},
            {"rate", limits.rate},
            {"center", limits.center},
            {"deadband", limits.deadband},
            {"warmup", limits.warmup},
            {"cadence", limits.cadence},
            {"cooldown", limits.cooldown}}}};
}

Json tree(const GuardOptions& guard) {
  return {{"enabled", guard.enabled},
          {"fhs", guard.fhs},
          {"entropy_fall", guard.entropy_fall},
          {"dead_share", guard.dead_share},
          {"max_token_share", guard.max_token_share},
          {"lost_after", guard.lost_after},
          {"warmup", guard.warmup},
          {"confirm", guard.confirm},
          {"aux_factor", guard.aux_factor},
          {"temperature_factor", guard.temperature_factor},
          {"bias_step", guard.bias_step},
          {"recovered_max_vio", guard.recovered_max_vio},
          {"dwell", guard.dwell},
          {"patience", guard.patience},
          {"cooldown", guard.cooldown}};
}

Json tree(const SafetyOptions& safety) {
  Json rollback = false, oscillation = false;
  if (const auto& r = safety.rollback) {
    rollback = {{"loss_jump", r->loss_jump},
                {"drop_jump", r->drop_jump},
                {"within", r->within},
                {"cooldown", r->cooldown}};
  }
  if (const auto& o = safety.oscillation)
    oscillation = {{"threshold", o->threshold}, {"min_gain", o->min_gain}};
  return {{"rollback", rollback}, {"oscillation", oscillation}, {"fallback_after", safety.fallback_after}};
}

Json tree(const Bands& bands) {
  Json all = Json::object();
  for (const auto& [metric, band] : bands) all[metric] = {band.low, band.high};
  return all;
}

Json tree(const HealthOptions& health) {
  Json all = {{"dwell", health.dwell}, {"weak_specialization", health.weak_specialization}};
  if (!health.bands.empty()) all["bands"] = tree(health.bands);
  for (const Phase& phase : health.phases) {
    Json one = Json::object();
    if (!phase.name.empty()) one["name"] = phase.name;
    if (phase.until >= 0) one["until"] = phase.until;
    one["bands"] = tree(phase.bands);
    all["phases"].push_back(one);
  }
  for (const AlertRule& rule : health.alerts) {
    Json one = {{"metric", rule.metric}};
    if (!rule.name.empty()) one["name"] = rule.name;
    if (rule.above) one["above"] = *rule.above;
    if (rule.below) one["below"] = *rule.below;
    one["for"] = rule.for_steps;
    one["after"] = rule.after;
    all["alerts"].push_back(one);
  }
  return all;
}

Json tree(const ControllerConfig& config) {
  const ModelConfig& m = config.model;
  Json model = {{"layers", m.layers},
                {"experts", m.experts},
                {"top_k", m.top_k},
                {"tokens_per_step", m.tokens_per_step},
                {"score_space", name_of(m.score_space)},
                {"delay", m.delay}};
  if (!m.domains.empty()) model["domains"] = m.domains;
  if (!m.targets.empty()) model["targets"] = m.targets;
  Json metrics = {{"capacity_factor", config.metrics.capacity_factor},
                  {"cold_fraction", config.metrics.cold_fraction},
                  {"dead_fraction", config.monitor.dead_fraction},
                  {"dead_after", config.monitor.dead_after},
                  {"ema", config.monitor.ema},
                  {"trend_window", config.monitor.trend_window},
                  {"trends", config.monitor.trends}};
  if (!config.metrics.placement.empty()) metrics["placement"] = config.metrics.placement;
  Json all = {{"version", 1},
              {"mode", name_of(config.mode)},
              {"lag", config.lag},
              {"model", model},
              {"metrics", metrics}};
  for (const Actuator which : kActuators) all[std::string(name_of(which))] = tree(config.actuator(which));
  all["safety"] = tree(config.safety);
  all["guard"] = tree(config.guard);
  all["health"] = tree(config.monitor.health);
  all["log"] = {{"every", config.log.every},
                {"per_expert", config.log.per_expert},
                {"rotate_mb", config.log.rotate_mb},
                {"keep", config.log.keep}};
  const StatsNeeds& c = config.collect;
  all["collect"] = {{"gap", c.gap},
                    {"sequences", c.sequences},
                    {"probabilities", c.probabilities},
                    {"gradients", c.gradients},
                    {"losses", c.losses},
                    {"domain_losses", c.domain_losses},
                    {"latencies", c.latencies},
                    {"margins", c.margins}};
  return all;
}

// What is not UTF-8 cannot be written as JSON; a name made in code may hold anything.
std::string dumped(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

/// A value in YAML's flow style. Words that YAML would read as something else are quoted.
std::string flow(const Json& value) {
  std::string text;
  if (value.is_object() || value.is_array()) {
    for (const auto& [key, item] : value.items()) {
      text += (text.empty() ? "" : ", ") + (value.is_object() ? key + ": " : "") + flow(item);
    }
    return value.is_object() ? '{' + text + '}' : '[' + text + ']';
  }
  if (value.is_boolean()) return value.get<bool>() ? "true" : "false";
  if (value.is_number_float()) return shown(value.get<double>());
  if (!value.is_string()) return dumped(value);
  text = value.get<std::string>();
  for (const char c : text) {
    if (!(c == '_' || (c >= 'a' && c <= 'z'))) return dumped(value);
  }
  for (const char* word : {"", "true", "false", "on", "yes", "no", "y", "n", "null"}) {
    if (text == word) return dumped(value);
  }
  return text;
}

}  // namespace

std::string to_json(const ControllerConfig& config) {
  return dumped(tree(config));
}

std::string to_yaml(const ControllerConfig& config) {
  std::string text;
  const auto is_actuator = [](const std::string& key) {
    for (const Actuator which : kActuators) {
      if (key == name_of(which)) return true;
    }
    return false;
  };
  const Json all = tree(config);
  for (const auto& [key, value] : all.items()) {
    text += key + ':';
    if (is_actuator(key)) {
      text += '\n';
      for (const auto& [inner, item] : value.items()) text += "  " + inner + ": " + flow(item) + '\n';
    } else {
      text += ' ' + flow(value) + '\n';
    }
  }
  return text;
}

}  // namespace moectl
