#include "control/config_check.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>
#include <variant>

#include "base/foreign.h"
#include "base/input_limits.h"
#include "base/utf8.h"
#include "control/config_fields.h"
#include "control/config_groups.h"
#include "control/config_keys.h"

namespace moectl {
namespace {

/// Collects the first fault of a list of checks, so that each check is one line.
class Checks {
 public:
  template <class T>
  void require(bool good, const std::string& key, const T& value, const std::string& constraint) {
    if (!good) fail(key, shown(value), constraint);
  }
  void fail(const std::string& key, const std::string& value, const std::string& constraint) {
    if (!problem_) problem_ = ConfigProblem{key, value, constraint};
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

void check_placement(const ControllerConfig& config, Checks& checks) {
  const std::vector<int>& placement = config.metrics.placement;
  const int experts = config.model.experts;
  const auto devices = static_cast<std::int64_t>(placement.size());
  checks.require(devices == 0 || devices == experts, "metrics.placement", devices,
                 "must have one device for each of model.experts (" + shown(experts) + ")");
  for (std::size_t i = 0; i < placement.size(); ++i) {
    checks.require(placement[i] < experts, "metrics.placement[" + std::to_string(i) + "]", placement[i],
                   "must be from 0 to model.experts - 1 (" + shown(experts - 1) + ")");
  }
}

void check_measuring(const ControllerConfig& config, Checks& checks) {
  checks.add("health.", problem_in(config.monitor.health));
  checks.require(config.log.keep == 0 || config.log.rotate_mb > 0, "log.keep", config.log.keep,
                 "must be 0 without log.rotate_mb: only finished pieces are removed");
}

/// Metrics that nothing can act on: churn is known after the decision alone, percentiles only with metrics.details.
void check_usable(const std::string& metric, bool details, const std::string& key, Checks& checks) {
  checks.require(metric != "churn", key, metric,
                 "must be another metric: churn is known only after the step has decided");
  checks.require(
      details || !metric.starts_with("load_p"), key, metric,
      "must be another metric, or metrics.details must be true: percentiles are computed only then");
}

void check_watched(const HealthOptions& health, bool details, Checks& checks) {
  const auto bands = [&](const Bands& of, const std::string& key) {
    for (const auto& [metric, band] : of) check_usable(metric, details, key + '.' + metric, checks);
  };
  bands(health.bands, "health.bands");
  for (std::size_t p = 0; p < health.phases.size(); ++p)
    bands(health.phases[p].bands, "health.phases[" + std::to_string(p) + "].bands");
  for (std::size_t a = 0; a < health.alerts.size(); ++a)
    check_usable(health.alerts[a].metric, details, "health.alerts[" + std::to_string(a) + "].metric", checks);
}

void check_limits_of(Actuator which, const ActuatorConfig& actuator, int experts, const std::string& path,
                     Checks& checks) {
  const Limits& limits = actuator.limits;
  if (const auto wrong = problem_in(which, limits, actuator.initial))
    checks.add(path + (wrong->key == "initial" ? "." : ".limits."), wrong);
  // The two scalars move by ratios, which never leave zero. A fixed one does not move.
  if (is_multiplicative(which) && actuator.policy != "fixed") {
    checks.require(limits.min > 0, path + ".limits.min", limits.min,
                   "must be above 0 for a policy that moves " + std::string(name_of(which)) + " by ratios");
  }
  const Initial& initial = actuator.initial;
  if (limits.center) {
    checks.require(initial == 0, path + ".initial", initial.value,
                   "must be 0 with limits.center, which keeps the mean there");
  }
  if (which != Actuator::kExpertBias) {
    checks.require(initial.values.empty() && initial.file.empty(), path + ".initial", initial,
                   "must be a number");
    checks.require(!actuator.gain_schedule, path + ".gain_schedule", std::string("on"),
                   "is for expert_bias only");
    return;
  }
  if (!initial.values.empty()) {
    const auto size = static_cast<std::int64_t>(initial.values.size());
    checks.require(size == experts, path + ".initial", size,
                   "must have one value for each of the " + shown(experts) + " experts");
  }
  for (std::size_t i = 0; i < initial.values.size(); ++i) {
    const double x = initial.values[i];
    checks.require(x >= limits.min && x <= limits.max, path + ".initial[" + std::to_string(i) + ']', x,
                   "must be within limits.min and limits.max");
  }
  if (actuator.gain_schedule) {
    checks.require(actuator.gain_schedule->until >= actuator.gain_schedule->from,
                   path + ".gain_schedule.until", actuator.gain_schedule->until, "must be at least from");
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
  check_limits_of(which, actuator, model.experts, path, checks);
  const PolicyDescription& policy = *registry.find(actuator.policy);
  complete_options(policy, path + ".options", actuator.options, checks);
  if (checks.problem()) return;
  if (const auto metric = actuator.options.values().find("metric");
      metric != actuator.options.values().end()) {
    if (const auto* const name = std::get_if<std::string>(&metric->second)) {
      check_usable(*name, config.metrics.details, path + ".options.metric", checks);
      checks.require(*name != "pair_lift" || model.top_k > 1, path + ".options.metric", *name,
                     "must be another metric: at top_k 1 no token chooses two experts");
    }
  }
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
  if (policy.check) {
    const std::string fault = call_foreign(who, [&] { return policy.check(context, actuator.options); });
    if (!fault.empty()) return checks.fail(path + ".options", policy.name, fault);
  }
  const auto made = call_foreign(who, [&] { return policy.make(context, actuator.options); });
  const StatsNeeds needs = made ? made->needs() : StatsNeeds{};
  checks.require(!needs.required_bins || model.tokens_per_step <= kMostRequiredTokens,
                 "model.tokens_per_step", model.tokens_per_step,
                 "must be at most 536870912 with form: k3, whose counts are packed into 32 bits each");
  checks.require(!needs.required_local || LoadTargets(model.experts, model.targets).equal(), "model.targets",
                 std::string("unequal"),
                 "must be equal with form: local_mean, which gives every expert an equal share");
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

namespace {

constexpr int kMostLayerId = 1'000'000;

/// Writes out the ids of each group and what the model then consists of.
void complete_groups(ControllerConfig& config, Checks& checks) {
  std::set<int> ids;
  int next = 0;
  for (std::size_t g = 0; g < config.layers.size(); ++g) {
    LayerGroup& group = config.layers[g];
    const std::string path = "layers[" + std::to_string(g) + "].";
    if (group.ids.empty()) {
      checks.require(group.count >= 1, path + "count",
                     group.count < 0 ? std::string("missing") : shown(group.count),
                     "must be at least 1, or ids be given");
      const int first = group.first >= 0 ? group.first : next;
      checks.require(first <= kMostLayerId - std::max(group.count, 0), path + "first", first,
                     "must leave all ids up to " + shown(kMostLayerId));
      checks.require(group.count <= kMostLayers, path + "count", group.count,
                     "must be at most " + shown(kMostLayers));
      if (checks.problem()) return;
      for (int i = 0; i < group.count; ++i) group.ids.push_back(first + i);
    } else {
      checks.require(group.count < 0 && group.first < 0, path + (group.count < 0 ? "first" : "count"),
                     group.count < 0 ? group.first : group.count, "must not be given beside ids");
    }
    for (std::size_t i = 0; i < group.ids.size(); ++i) {
      const std::string key = path + "ids[" + std::to_string(i) + ']';
      checks.require(group.ids[i] >= 0 && group.ids[i] <= kMostLayerId, key, group.ids[i],
                     "must be 0 to " + shown(kMostLayerId));
      checks.require(ids.insert(group.ids[i]).second, key, group.ids[i],
                     "given twice: each layer is of one group");
    }
    if (checks.problem()) return;
    group.first = group.count = -1;
    next = group.ids.back() + 1;
    ModelConfig& model = config.model;
    checks.require(group.experts != -1 || model.experts > 0, path + "experts", std::string("missing"),
                   "required, here or in model");
    checks.require(group.top_k != -1 || model.top_k > 0, path + "top_k", std::string("missing"),
                   "required, here or in model");
    for (const Actuator which : kActuators) {
      const std::optional<ActuatorConfig>& own = section_of(group, which);
      checks.require(!own || own->scope == Scope::kLayer, path + std::string(name_of(which)) + ".scope",
                     std::string("model"),
                     "must be layer: an actuator of the whole model cannot be set in a group");
    }
  }
  if (config.layers.empty() || checks.problem()) return;
  const auto total = static_cast<int>(ids.size());
  checks.require(config.model.layers == 0 || config.model.layers == total, "model.layers",
                 config.model.layers,
                 "must be the " + shown(total) + " layers of all groups, or be left out");
  config.model.layers = total;
  const LayerGroup& first = config.layers.front();
  if (config.model.experts == 0) config.model.experts = first.experts;
  if (config.model.top_k == 0) config.model.top_k = first.top_k;
  // What no layer takes would be checked nowhere, and used where the whole model is judged.
  const auto taken_by_none = [&](auto LayerGroup::*own) {
    return std::ranges::none_of(
        config.layers, [&](const LayerGroup& group) { return group.experts == -1 && (group.*own).empty(); });
  };
  const std::string constraint = "must be left out: every group of layers has experts or a list of its own";
  const auto values = [](const auto& list) { return std::to_string(list.size()) + " values"; };
  checks.require(config.model.targets.empty() || !taken_by_none(&LayerGroup::targets), "model.targets",
                 values(config.model.targets), constraint);
  checks.require(config.metrics.placement.empty() || !taken_by_none(&LayerGroup::placement),
                 "metrics.placement", values(config.metrics.placement), constraint);
}

void check_timeline(const ControllerConfig& config, Checks& checks) {
  std::int64_t before = 0, named = 0;
  std::vector<int> ids = layer_ids(config);
  std::ranges::sort(ids);
  for (std::size_t e = 0; e < config.timeline.size(); ++e) {
    const TimelineEntry& entry = config.timeline[e];
    const std::string path = "timeline[" + std::to_string(e) + "].";
    checks.require(entry.from > before, path + "from", entry.from,
                   "must be above " + shown(before) + ": entries stand in the order of their steps");
    before = entry.from;
    const auto known = [&](const std::vector<int>& layers, const char* key) {
      for (std::size_t i = 0; i < layers.size(); ++i) {
        checks.require(std::ranges::binary_search(ids, layers[i]), path + key + '[' + std::to_string(i) + ']',
                       layers[i], "must be the id of a layer");
      }
    };
    known(entry.freeze, "freeze");
    known(entry.thaw, "thaw");
    // Each layer looks for itself in all of these lists.
    named += static_cast<std::int64_t>(entry.freeze.size() + entry.thaw.size());
    checks.require(named <= kMostLayers, path + "freeze", shown(named) + " ids up to here",
                   "freeze and thaw of all entries must name at most " + shown(kMostLayers));
    for (const Actuator which : kActuators) {
      const std::optional<ActuatorConfig>& own = section_of(entry, which);
      checks.require(!own || own->limits.cadence == config.actuator(which).limits.cadence,
                     path + std::string(name_of(which)) + ".limits.cadence", own ? own->limits.cadence : 0,
                     "must be that of the config's own section: windows of sums cannot change their length");
      checks.require(!own || own->scope == config.actuator(which).scope,
                     path + std::string(name_of(which)) + ".scope",
                     std::string(own ? name_of(own->scope) : ""), "must be that of the config's own section");
    }
  }
}

/// Checks what holds for one group from one step on. `own` is where a section of it was given: its options are completed
/// there, and messages begin with `path`.
void complete_sections(LayerSettings settings, SectionOverrides& own, const std::string& path,
                       const PolicyRegistry& registry, Checks& checks) {
  for (const Actuator which : kActuators) {
    std::optional<ActuatorConfig>& given = section_of(own, which);
    Checks here;
    if (given) settings.config.actuator(which) = *given;
    complete_actuator(which, settings.config, registry, here);
    checks.add(given ? path : "", here.problem());
    if (given) given = settings.config.actuator(which);
  }
}

/// What all layers together take, before memory is taken for them.
void check_size(const ControllerConfig& config, Checks& checks) {
  double layers = 0, cells = 0, numbers = 0;
  const auto metrics = static_cast<double>(metric_fields().size());
  const ModelConfig& model = config.model;
  const auto add = [&](double of_group, double experts) {
    layers += of_group;
    cells += of_group * experts;
    const double pairs = config.collect.pairs ? (experts - 1) / 2.0 : 0,
                 domains = static_cast<double>(model.domains.size());
    const double each = experts * (1 + 3 * domains + model.split_sequences + config.delay() + pairs);
    numbers += of_group * (each + metrics * config.monitor.trend_window);
  };
  // Without settings for each group: they would take memory before it is known how much.
  for (const LayerGroup& group : config.layers)
    add(static_cast<double>(group.ids.size()), group.experts != -1 ? group.experts : model.experts);
  if (config.layers.empty()) add(model.layers, model.experts);
  const std::string key = config.layers.empty() ? "model" : "layers";
  const auto groups = static_cast<std::int64_t>(std::max<std::size_t>(config.layers.size(), 1));
  const auto spans = static_cast<std::int64_t>(config.timeline.size()) + 1;
  checks.require(groups * spans <= kMostSettings, config.timeline.empty() ? key : "timeline",
                 shown(groups) + " groups of layers × " + shown(spans) + " spans of the timeline",
                 "must be at most " + shown(kMostSettings));
  checks.require(layers <= static_cast<double>(kMostLayers), key, shown(layers) + " layers",
                 "must be at most " + shown(kMostLayers));
  checks.require(cells <= static_cast<double>(kMostLayersTimesExperts), key,
                 shown(cells) + " layers × experts", "must be at most " + shown(kMostLayersTimesExperts));
  checks.require(numbers <= static_cast<double>(kMostNumbers), key,
                 shown(numbers) +
                     " numbers for layers × (experts × (domains, split_sequences, delay) and "
                     "metrics.trend_window)",
                 "must be at most " + shown(kMostNumbers));
}

}  // namespace

std::optional<ConfigProblem> complete(ControllerConfig& config, const PolicyRegistry& registry) {
  Checks checks;
  complete_groups(config, checks);
  if (checks.problem()) return checks.problem();
  if (auto problem = check_fields(config)) return problem;
  if (config.layers.empty()) {
    check_model(config.model, checks);
    check_placement(config, checks);
  }
  check_size(config, checks);
  if (checks.problem()) return checks.problem();
  check_measuring(config, checks);
  check_watched(config.monitor.health, config.metrics.details, checks);
  check_timeline(config, checks);
  // The config's own names say which domains there are.
  config.collect.domains = static_cast<int>(config.model.domains.size());
  for (const Actuator which : kActuators) complete_actuator(which, config, registry, checks);
  const ControllerConfig common = config_at(config, 0);
  for (std::size_t g = 0; g < config.layers.size() && !checks.problem(); ++g) {
    const LayerSettings settings = settings_of(common, config.layers[g]);
    const std::string path = "layers[" + std::to_string(g) + "].";
    Checks here;
    check_model(settings.config.model, here);
    check_placement(settings.config, here);
    if (here.problem()) {
      ConfigProblem problem = *here.problem();
      // Where the group says so itself, or all do.
      const LayerGroup& own = config.layers[g];
      const bool own_model = own.experts != -1 || own.top_k != -1 || !own.targets.empty();
      if (own_model && (problem.key == "model.top_k" || problem.key.starts_with("model.targets"))) {
        problem.key.replace(0, std::string_view("model.").size(), path);
      } else if (!own.placement.empty() && problem.key.starts_with("metrics.placement")) {
        problem.key.replace(0, std::string_view("metrics.").size(), path);
      }
      checks.add("", problem);
      break;
    }
    complete_sections(settings, config.layers[g], path, registry, checks);
  }
  for (std::size_t e = 0; e < config.timeline.size() && !checks.problem(); ++e) {
    const ControllerConfig then = config_at(config, config.timeline[e].from);
    const std::string path = "timeline[" + std::to_string(e) + "].";
    const auto complete_for = [&](LayerSettings settings) {
      complete_sections(std::move(settings), config.timeline[e], path, registry, checks);
    };
    // One group after another: those of all at once would be as many copies of what all share.
    for (std::size_t g = 0; g < config.layers.size() && !checks.problem(); ++g)
      complete_for(settings_of(then, config.layers[g]));
    if (config.layers.empty()) complete_for({layer_ids(config), then});
  }
  return checks.problem();
}

void validate(ControllerConfig& config) {
  validate(config, PolicyRegistry::builtin());
}

void validate(ControllerConfig& config, const PolicyRegistry& registry) {
  if (const auto problem = complete(config, registry)) throw ConfigError(text_of(problem));
}

}  // namespace moectl
