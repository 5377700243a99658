#include "control/config_check.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/foreign.h"
#include "base/utf8.h"
#include "control/config_fields.h"
#include "control/config_keys.h"

namespace moectl {
namespace {

/// Collects the first fault of a list of checks, so that each check is one line.
class Checks {
 public:
  template <class T>
  void require(bool good, std::string key, T value, std::string constraint) {
    if (!good) fail(std::move(key), shown(value), std::move(constraint));
  }
  void fail(std::string key, std::string value, std::string constraint) {
    if (!problem_) problem_ = ConfigProblem{std::move(key), std::move(value), std::move(constraint)};
  }
  void add(const std::string& path, const std::optional<ConfigProblem>& problem) {
    if (problem) fail(path + problem->key, problem->value, problem->constraint);
  }
  const std::optional<ConfigProblem>& problem() const { return problem_; }

 private:
  std::optional<ConfigProblem> problem_;
};

// A run log holds the config's words, and a reader refuses what is not UTF-8.
void check_text(const std::string& key, const std::string& text, Checks& checks) {
  const std::size_t bad = find_not_utf8(text);
  if (bad == std::string::npos) return;
  checks.fail(key, text.substr(0, bad) + "?",
              "must be UTF-8: byte " + shown(static_cast<std::int64_t>(bad)) + " is not");
}

// What the fields of a section must be together; each alone is checked by its own range.

void check_model(const ModelConfig& model, Checks& checks) {
  const std::string experts = "model.experts (" + shown(model.experts) + ")";
  checks.require(model.top_k <= model.experts, "model.top_k", model.top_k, "must be at most " + experts);
  std::set<std::string> names;
  for (std::size_t i = 0; i < model.domains.size(); ++i) {
    const std::string key = "model.domains[" + std::to_string(i) + "]";
    checks.require(!model.domains[i].empty(), key, std::string("\"\""), "must not be empty");
    check_text(key, model.domains[i], checks);
    checks.require(names.insert(model.domains[i]).second, key, model.domains[i], "given twice");
  }
  if (model.targets.empty()) return;
  const auto shares = static_cast<std::int64_t>(model.targets.size());
  checks.require(shares == model.experts, "model.targets", shares,
                 "must have one share for each of " + experts);
  double sum = 0;
  const double most = 1.0 / model.top_k;
  for (std::size_t i = 0; i < model.targets.size(); ++i) {
    // A token chooses an expert at most once, so no expert can get more than every token.
    checks.require(model.targets[i] <= most, "model.targets[" + std::to_string(i) + "]", model.targets[i],
                   "must be at most 1/top_k (" + shown(most) + "): a token chooses an expert once");
    sum += model.targets[i];
  }
  checks.require(std::abs(sum - 1) <= 1e-6, "model.targets", "sum " + shown(sum),
                 "must sum to 1 within 1e-6");
}

void check_measuring(const ControllerConfig& config, Checks& checks) {
  const std::vector<int>& placement = config.metrics.placement;
  const int experts = config.model.experts;
  const auto devices = static_cast<std::int64_t>(placement.size());
  checks.require(devices == 0 || devices == experts, "metrics.placement", devices,
                 "must have one device for each of model.experts (" + shown(experts) + ")");
  for (std::size_t i = 0; i < placement.size(); ++i) {
    checks.require(placement[i] < experts, "metrics.placement[" + std::to_string(i) + "]", placement[i],
                   "must be from 0 to model.experts - 1 (" + shown(experts - 1) + ")");
  }
  checks.add("health.", problem_in(config.monitor.health));
  checks.require(config.log.keep == 0 || config.log.rotate_mb > 0, "log.keep", config.log.keep,
                 "must be 0 without log.rotate_mb: only finished pieces are removed");
}

void check_limits_of(Actuator which, const ActuatorConfig& actuator, const std::string& path,
                     Checks& checks) {
  const Limits& limits = actuator.limits;
  if (const auto wrong = problem_in(which, limits, actuator.initial))
    checks.add(path + (wrong->key == "initial" ? "." : ".limits."), wrong);
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
    checks.fail(path + '.' + name, shown(value),
                "not an option of " + policy.name + did_you_mean(name, known));
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
      checks.fail(key, shown(value), std::string("must be ") + type_name(spec.default_value));
    } else if (const auto number = as_number(value)) {
      const std::string wrong = violated(Range{.low = spec.min, .high = spec.max}, *number);
      if (!wrong.empty()) checks.fail(key, shown(value), wrong);
    } else if (const auto* text = std::get_if<std::string>(&value); text) {
      check_text(key, *text, checks);
      if (!spec.choices.empty() &&
          std::find(spec.choices.begin(), spec.choices.end(), *text) == spec.choices.end()) {
        checks.fail(key, *text, "must be one of " + listed(spec.choices) + did_you_mean(*text, spec.choices));
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
  if (checks.problem()) return;
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
  const std::string who = path + ".policy: " + policy.name;
  if (config.lag == 1) {
    const auto made = call_foreign(who, [&] { return policy.make(context, actuator.options); });
    checks.require(!made || !made->needs().margin_rows, "lag", config.lag,
                   "must be 0 with " + policy.name +
                       ", which wants every token's margins (quantile_bias: form: "
                       "exact): those are not sums and do not travel; use its histogram form");
  }
  if (!policy.check) return;
  const std::string fault = call_foreign(who, [&] { return policy.check(context, actuator.options); });
  if (!fault.empty()) {
    checks.fail(path + ".options", policy.name, fault);
  }
}

/// The names of the policies that can serve the actuator.
std::vector<std::string> policies_for(Actuator actuator, const PolicyRegistry& registry) {
  std::vector<std::string> names;
  for (const PolicyDescription* policy : registry.all()) {
    if (std::find(policy->actuators.begin(), policy->actuators.end(), actuator) != policy->actuators.end()) {
      names.push_back(policy->name);
    }
  }
  return names;
}

}  // namespace

std::string did_you_mean(std::string_view word, const std::vector<std::string>& known) {
  const std::string near = nearest_key(word, known);
  return near.empty() ? near : "; did you mean '" + near + "'?";
}

std::string policy_fault(const std::string& name, Actuator actuator, const PolicyRegistry& registry) {
  const std::vector<std::string> fitting = policies_for(actuator, registry);
  if (std::find(fitting.begin(), fitting.end(), name) != fitting.end()) return "";
  std::string fault =
      registry.find(name) ? "cannot serve " + std::string(name_of(actuator)) : std::string("unknown policy");
  const std::string near = did_you_mean(name, fitting);
  return fault + (near.empty() ? "; those that can are " + listed(fitting) : near);
}

std::optional<ConfigProblem> complete(ControllerConfig& config, const PolicyRegistry& registry) {
  if (auto problem = check_fields(config)) return problem;
  Checks checks;
  check_model(config.model, checks);
  if (checks.problem()) return checks.problem();
  check_measuring(config, checks);
  for (const Actuator which : kActuators) complete_actuator(which, config, registry, checks);
  // The config's own names say which domains there are.
  config.collect.domains = static_cast<int>(config.model.domains.size());
  return checks.problem();
}

void validate(ControllerConfig& config) {
  validate(config, PolicyRegistry::builtin());
}

void validate(ControllerConfig& config, const PolicyRegistry& registry) {
  if (const auto problem = complete(config, registry)) throw ConfigError(text_of(problem));
}

}  // namespace moectl
