#include "config/config_check.h"
#include "base/format.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace moectl {
namespace {

using Problem = std::optional<ConfigProblem>;

std::string shown_value(const OptionValue& value) {
  struct Show {
    std::string operator()(bool v) const { return v ? "true" : "false"; }
    std::string operator()(std::int64_t v) const { return std::to_string(v); }
    std::string operator()(double v) const { return shown(v); }
    std::string operator()(const std::string& v) const { return v; }
  };
  return std::visit(Show{}, value);
}

/// Collects the first fault of a list of checks, so that each check is one line.
class Checks {
 public:
  template <typename T>
  void require(bool good, std::string key, T value, std::string constraint) {
    if (good || problem_) return;
    std::string text;
    if constexpr (std::is_same_v<T, double>) {
      text = shown(value);
    } else {
      text = std::to_string(value);
    }
    problem_ = ConfigProblem{std::move(key), std::move(text), std::move(constraint)};
  }
  void at_least(std::int64_t least, std::string key, std::int64_t value) {
    require(value >= least, std::move(key), value, "must be at least " + std::to_string(least));
  }
  void fail(std::string key, std::string value, std::string constraint) {
    if (!problem_) problem_ = ConfigProblem{std::move(key), std::move(value), std::move(constraint)};
  }
  Problem problem() const { return problem_; }

 private:
  Problem problem_;
};

bool is_positive(double x) {
  return std::isfinite(x) && x > 0;
}

void check_model(const ModelConfig& model, Checks& checks) {
  checks.at_least(1, "model.layers", model.layers);
  checks.at_least(1, "model.experts", model.experts);
  checks.at_least(1, "model.top_k", model.top_k);
  checks.require(model.top_k <= model.experts, "model.top_k", model.top_k,
                 "must be at most model.experts (" + std::to_string(model.experts) + ")");
  checks.at_least(0, "model.tokens_per_step", model.tokens_per_step);
  checks.at_least(0, "model.delay", model.delay);
  std::set<std::string> names;
  for (std::size_t i = 0; i < model.domains.size(); ++i) {
    const std::string key = "model.domains[" + std::to_string(i) + "]";
    if (model.domains[i].empty()) checks.fail(key, "\"\"", "must not be empty");
    if (!names.insert(model.domains[i]).second) checks.fail(key, model.domains[i], "given twice");
  }
  if (model.targets.empty()) return;
  checks.require(model.targets.size() == static_cast<std::size_t>(model.experts), "model.targets",
                 model.targets.size(),
                 "must have one share for each of model.experts (" + std::to_string(model.experts) + ")");
  double sum = 0;
  const double most = 1.0 / model.top_k;
  for (std::size_t i = 0; i < model.targets.size(); ++i) {
    const std::string key = "model.targets[" + std::to_string(i) + "]";
    checks.require(model.targets[i] >= 0, key, model.targets[i], "must be at least 0");
    // A token chooses an expert at most once, so no expert can get more than every token.
    checks.require(model.targets[i] <= most, key, model.targets[i],
                   "must be at most 1/top_k (" + shown(most) + "): a token chooses an expert once");
    sum += model.targets[i];
  }
  if (!(std::abs(sum - 1) <= 1e-6))
    checks.fail("model.targets", "sum " + shown(sum), "must sum to 1 within 1e-6");
}

void check_measuring(const ControllerConfig& config, Checks& checks) {
  const MetricsOptions& metrics = config.metrics;
  checks.require(is_positive(metrics.capacity_factor), "metrics.capacity_factor", metrics.capacity_factor,
                 "must be above 0");
  checks.require(metrics.cold_fraction >= 0 && metrics.cold_fraction <= 1, "metrics.cold_fraction",
                 metrics.cold_fraction, "must be from 0 to 1");
  if (!metrics.placement.empty()) {
    checks.require(
        metrics.placement.size() == static_cast<std::size_t>(config.model.experts), "metrics.placement",
        metrics.placement.size(),
        "must have one device for each of model.experts (" + std::to_string(config.model.experts) + ")");
    for (std::size_t i = 0; i < metrics.placement.size(); ++i) {
      checks.require(
          metrics.placement[i] >= 0 && metrics.placement[i] < config.model.experts,
          "metrics.placement[" + std::to_string(i) + "]", metrics.placement[i],
          "must be from 0 to model.experts - 1 (" + std::to_string(config.model.experts - 1) + ")");
    }
  }
  const MonitorOptions& monitor = config.monitor;
  checks.require(monitor.dead_fraction >= 0 && monitor.dead_fraction < 1, "metrics.dead_fraction",
                 monitor.dead_fraction, "must be from 0 to below 1");
  checks.at_least(1, "metrics.dead_after", monitor.dead_after);
  checks.require(monitor.ema > 0 && monitor.ema <= 1, "metrics.ema", monitor.ema,
                 "must be above 0 and at most 1");
  checks.at_least(4, "metrics.trend_window", monitor.trend_window);
  if (const std::string fault = check_health(monitor.health); !fault.empty()) {
    const std::size_t first = fault.find(": "), second = fault.find(": ", first + 2);
    checks.fail("health." + fault.substr(0, first), fault.substr(first + 2, second - first - 2),
                fault.substr(second + 2));
  }
  checks.at_least(1, "log.every", config.log.every);
  checks.require(config.log.rotate_mb >= 0 && config.log.rotate_mb <= 1e6, "log.rotate_mb",
                 config.log.rotate_mb, "must be from 0 (never) to 1e6");
  checks.at_least(0, "log.keep", config.log.keep);
  checks.require(config.log.keep == 0 || config.log.rotate_mb > 0, "log.keep", config.log.keep,
                 "must be 0 without log.rotate_mb: only finished pieces are removed");
}

void check_limits_of(Actuator which, const ActuatorConfig& actuator, const std::string& path,
                     Checks& checks) {
  const Limits& limits = actuator.limits;
  // "key: value: constraint", of a limit or of the initial value.
  if (const std::string wrong = check_limits(which, limits, actuator.initial); !wrong.empty()) {
    const std::size_t first = wrong.find(": "), second = wrong.find(": ", first + 2);
    const std::string key = wrong.substr(0, first);
    checks.fail(path + (key == "initial" ? "." : ".limits.") + key,
                wrong.substr(first + 2, second - first - 2), wrong.substr(second + 2));
  }
  // The two scalars move by ratios, which never leave zero. A fixed one does not move.
  if (is_multiplicative(which) && actuator.policy != "fixed") {
    checks.require(limits.min > 0, path + ".limits.min", limits.min,
                   "must be above 0 for a policy that moves " + std::string(name_of(which)) + " by ratios");
  }
  if (limits.center) {
    checks.require(actuator.initial == 0, path + ".initial", actuator.initial,
                   "must be 0 with limits.center, which keeps the mean there");
  }
}

/// The value of a number option, whichever of the two types it was given in.
std::optional<double> as_number(const OptionValue& value) {
  if (const auto* d = std::get_if<double>(&value)) return *d;
  if (const auto* i = std::get_if<std::int64_t>(&value)) return static_cast<double>(*i);
  return std::nullopt;
}

const char* type_name(const OptionValue& value) {
  constexpr const char* kNames[] = {"true or false", "a whole number", "a number", "a word"};
  return kNames[value.index()];
}

void complete_options(const PolicyDescription& policy, const std::string& path, PolicyOptions& options,
                      Checks& checks) {
  std::vector<std::string> known;
  for (const OptionSpec& spec : policy.options) known.push_back(spec.name);
  for (const auto& [name, value] : options.values()) {
    if (std::find(known.begin(), known.end(), name) != known.end()) continue;
    const std::string near = nearest_key(name, known);
    checks.fail(path + '.' + name, shown_value(value),
                "not an option of " + policy.name + (near.empty() ? "" : "; did you mean '" + near + "'?"));
  }
  for (const OptionSpec& spec : policy.options) {
    const std::string key = path + '.' + spec.name;
    const auto it = options.values().find(spec.name);
    if (it == options.values().end()) {
      const auto* text = std::get_if<std::string>(&spec.default_value);
      if (text && text->empty()) {
        checks.fail(key, "missing", "required by " + policy.name);
        continue;
      }
      options.set(spec.name, spec.default_value);
      continue;
    }
    OptionValue value = it->second;
    if (std::holds_alternative<double>(spec.default_value) && std::holds_alternative<std::int64_t>(value)) {
      value = static_cast<double>(std::get<std::int64_t>(value));
      options.set(spec.name, value);
    }
    if (value.index() != spec.default_value.index()) {
      checks.fail(key, shown_value(value), std::string("must be ") + type_name(spec.default_value));
    } else if (const auto number = as_number(value)) {
      const bool above = *number >= spec.min, below = *number <= spec.max;
      const bool no_min = spec.min <= -1e308, no_max = spec.max >= 1e308;
      if (!std::isfinite(*number)) {
        checks.fail(key, shown_value(value), "must be finite");
      } else if (!above || !below) {
        checks.fail(key, shown_value(value),
                    no_max   ? "must be at least " + shown(spec.min)
                    : no_min ? "must be at most " + shown(spec.max)
                             : "must be from " + shown(spec.min) + " to " + shown(spec.max));
      }
    } else if (const auto* text = std::get_if<std::string>(&value); text && !spec.choices.empty()) {
      if (std::find(spec.choices.begin(), spec.choices.end(), *text) == spec.choices.end()) {
        std::string constraint = "must be one of ";
        for (std::size_t i = 0; i < spec.choices.size(); ++i) constraint += (i ? ", " : "") + spec.choices[i];
        const std::string near = nearest_key(*text, spec.choices);
        checks.fail(key, *text, constraint + (near.empty() ? "" : "; did you mean '" + near + "'?"));
      }
    }
  }
}

void complete_actuator(Actuator which, ControllerConfig& config, const PolicyRegistry& registry,
                       Checks& checks) {
  const ModelConfig& model = config.model;
  ActuatorConfig& actuator = config.actuator(which);
  const std::string path(name_of(which));
  if (const std::string fault = policy_fault(actuator.policy, which, registry); !fault.empty()) {
    checks.fail(path + ".policy", actuator.policy, fault);
    return;
  }
  if (actuator.scope == Scope::kModel && which == Actuator::kExpertBias) {
    checks.fail(path + ".scope", "model", "must be layer: biases belong to the experts of one layer");
  }
  check_limits_of(which, actuator, path, checks);
  const PolicyDescription& policy = *registry.find(actuator.policy);
  complete_options(policy, path + ".options", actuator.options, checks);
  if (checks.problem() || !policy.check) return;
  const PolicyContext context{.actuator = which,
                              .layer = actuator.scope == Scope::kModel ? -1 : 0,
                              .experts = model.experts,
                              .top_k = model.top_k,
                              .domains = static_cast<int>(model.domains.size()),
                              .delay = config.delay(),
                              .score_space = model.score_space,
                              .initial = actuator.initial,
                              .min = actuator.limits.min,
                              .max = actuator.limits.max,
                              .cadence = actuator.limits.cadence};
  if (const std::string fault = policy.check(context, actuator.options); !fault.empty()) {
    checks.fail(path + ".options", policy.name, fault);
  }
}

void check_guard_options(const GuardOptions& guard, Checks& checks) {
  // "key: value: constraint", as the guard itself puts it.
  const std::string fault = check_guard(guard);
  if (fault.empty()) return;
  const std::size_t key = fault.find(": "), value = fault.find(": ", key + 2);
  checks.fail("guard." + fault.substr(0, key), fault.substr(key + 2, value - key - 2),
              fault.substr(value + 2));
}

void check_safety(const SafetyOptions& safety, Checks& checks) {
  if (safety.rollback) {
    checks.require(is_positive(safety.rollback->loss_jump), "safety.rollback.loss_jump",
                   safety.rollback->loss_jump, "must be above 0");
    checks.require(is_positive(safety.rollback->drop_jump), "safety.rollback.drop_jump",
                   safety.rollback->drop_jump, "must be above 0");
    checks.at_least(1, "safety.rollback.within", safety.rollback->within);
    checks.at_least(0, "safety.rollback.cooldown", safety.rollback->cooldown);
  }
  if (safety.oscillation) {
    const OscillationOptions& o = *safety.oscillation;
    checks.require(o.threshold > 0 && o.threshold < 1, "safety.oscillation.threshold", o.threshold,
                   "must be between 0 and 1");
    checks.require(o.min_gain > 0 && o.min_gain <= 1, "safety.oscillation.min_gain", o.min_gain,
                   "must be above 0 and at most 1");
  }
  checks.at_least(0, "safety.fallback_after", safety.fallback_after);
}

}  // namespace

std::string shown(double value) {
  return exact(value);
}

std::vector<std::string> policies_for(Actuator actuator, const PolicyRegistry& registry) {
  std::vector<std::string> names;
  for (const PolicyDescription* policy : registry.all()) {
    if (std::find(policy->actuators.begin(), policy->actuators.end(), actuator) != policy->actuators.end()) {
      names.push_back(policy->name);
    }
  }
  return names;
}

std::string policy_fault(const std::string& name, Actuator actuator, const PolicyRegistry& registry) {
  const std::vector<std::string> fitting = policies_for(actuator, registry);
  if (std::find(fitting.begin(), fitting.end(), name) != fitting.end()) return "";
  std::string fault =
      registry.find(name) ? "cannot serve " + std::string(name_of(actuator)) : std::string("unknown policy");
  if (const std::string near = nearest_key(name, fitting); !near.empty())
    return fault + "; did you mean '" + near + "'?";
  fault += "; those that can are ";
  for (std::size_t i = 0; i < fitting.size(); ++i) fault += (i ? ", " : "") + fitting[i];
  return fault;
}

std::optional<ConfigProblem> complete(ControllerConfig& config, const PolicyRegistry& registry) {
  Checks checks;
  check_model(config.model, checks);
  checks.require(config.lag == 0 || config.lag == 1, "lag", config.lag, "must be 0 or 1");
  if (checks.problem()) return checks.problem();
  check_measuring(config, checks);
  for (const Actuator which : kActuators) complete_actuator(which, config, registry, checks);
  check_safety(config.safety, checks);
  check_guard_options(config.guard, checks);
  // The config's own names say which domains there are.
  config.collect.domains = static_cast<int>(config.model.domains.size());
  return checks.problem();
}

void validate(ControllerConfig& config) {
  validate(config, PolicyRegistry::builtin());
}

void validate(ControllerConfig& config, const PolicyRegistry& registry) {
  if (const auto problem = complete(config, registry)) {
    throw ConfigError(problem->key + ": " + problem->value + ": " + problem->constraint);
  }
}

}  // namespace moectl
