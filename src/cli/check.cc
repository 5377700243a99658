// moectl check CONFIG: validates a config, prints it with all defaults, and judges whether its targets can be reached.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <tuple>

#include "base/fields.h"
#include "cli/tool.h"
#include "config/config_explain.h"
#include "control/actuator_loop.h"
#include "control/guard.h"
#include "control/inputs.h"
#include "feasibility/actuators.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/feasibility.h"

namespace moectl::cli {
namespace {

struct Options {
  std::string config, format;
  bool explain = false, reference = false;
};

/// A set-point that cannot be reached drives the actuator until a limit stops it.
std::vector<Conflict> judge_targets(const ControllerConfig& config) {
  std::vector<Conflict> conflicts;
  const std::vector<Target> targets = targets_of(config);
  Bands all;
  LoadSpace space{
      .experts = config.model.experts, .top_k = config.model.top_k, .targets = config.model.targets};
  const auto keep = [&](std::vector<Conflict> found, const std::string& where) {
    for (Conflict& conflict : found) {
      conflict.message = where + conflict.message;
      const auto same = [&](const Conflict& known) { return known.metrics == conflict.metrics; };
      if (std::none_of(conflicts.begin(), conflicts.end(), same)) conflicts.push_back(std::move(conflict));
    }
  };
  for (const Target& target : targets) {
    const Bands band = {{target.metric, {target.value, target.value}}};
    const std::string where =
        std::string(name_of(target.actuator)) + ".options.target: " + exact(target.value) + ": ";
    const std::int64_t tokens = config.model.tokens_per_step * target.cadence;
    if (auto beyond = judge_bounds(target, {space.experts, space.top_k, tokens, space.targets})) {
      keep({*beyond}, where);
    }
    keep(judge({space.experts, space.top_k, tokens, space.targets}, band).conflicts, where);
    const auto known = [&](const Conflict& c) {
      return c.metrics == std::vector<std::string>{target.metric};
    };
    if (std::any_of(conflicts.begin(), conflicts.end(), known)) continue;
    all.insert(*band.begin());
    space.tokens = std::max(space.tokens, tokens);
  }
  keep(judge(space, all).conflicts, "targets: ");
  return conflicts;
}

/// What the policies of a config need from the router beyond counts.
struct NeededInputs {
  std::vector<std::string> required;  ///< Without these a policy is held.
  std::vector<std::string> used;      ///< These are used where they are recorded.
  bool bins = false;                  ///< Required biases in bins, which make up nearly all of the payload.
  double payload = 0;                 ///< Of one reduction over ranks, bytes.
};
NeededInputs inputs_of(const ControllerConfig& config, const PolicyRegistry& registry) {
  StatsNeeds required, all = config.collect;
  if (config.guard.enabled) all |= LayerGuard::needs();
  for (const Actuator actuator : kActuators) {
    const ActuatorLoop loop(actuator, config, registry, 0);
    required |= loop.required();
    all |= loop.needs();
  }
  NeededInputs inputs{input_names(required), {}, all.required_bins};
  all.domains = static_cast<int>(config.model.domains.size());
  all.split_sequences = config.model.split_sequences;
  all.sequences |= all.split_sequences > 0;
  const StatsShape shape{.experts = config.model.experts, .top_k = config.model.top_k, .needs = all};
  inputs.payload = static_cast<double>(shape.flat_size()) * sizeof(std::int64_t) * config.model.layers;
  for (std::string& name : input_names(all)) {
    if (std::find(inputs.required.begin(), inputs.required.end(), name) == inputs.required.end())
      inputs.used.push_back(std::move(name));
  }
  return inputs;
}

std::string text_of(const Conflict& conflict) {
  return conflict.suggestion.empty() ? conflict.message
                                     : conflict.message + "; nearest feasible: " + conflict.suggestion;
}

/// What the metric of a set-point can be.
struct TargetBounds {
  std::string where, actuator, metric;  ///< Where: empty, or a group and a step as messages begin with.
  int experts = 0, top_k = 0;
  Extent bounds;

  bool same_as(const TargetBounds& other) const {
    return std::tie(actuator, metric, experts, top_k, bounds.min, bounds.max) ==
           std::tie(other.actuator, other.metric, other.experts, other.top_k, other.bounds.min,
                    other.bounds.max);
  }
};

/// What is found of all groups of layers, over the timeline; each message once.
struct Judgement {
  std::vector<Conflict> conflicts;
  bool set_points = false;  ///< True if some actuator has one.
  std::vector<TargetBounds> targets;
  Feasibility bands;
  ActuatorJudgement actuators;
  NeededInputs inputs;

  void add(const ControllerConfig& config, const std::string& where, const PolicyRegistry& registry) {
    const auto join = [](auto& all, const auto& more) {
      for (const auto& one : more) {
        if (std::find(all.begin(), all.end(), one) == all.end()) all.push_back(one);
      }
    };
    const auto conflict = [&](Conflict found) {
      const auto same = [&](const Conflict& known) { return known.message.ends_with(found.message); };
      if (std::any_of(conflicts.begin(), conflicts.end(), same)) return;
      found.message = where + found.message;
      conflicts.push_back(std::move(found));
    };
    for (Conflict& found : judge_targets(config)) conflict(std::move(found));
    const ModelConfig& model = config.model;
    for (const Target& target : targets_of(config)) {
      set_points = true;
      const auto bounds = bounds_of(target.metric, {model.experts, model.top_k, 0, model.targets});
      if (!bounds) continue;
      TargetBounds found{
          where, std::string(name_of(target.actuator)), target.metric, model.experts, model.top_k, *bounds};
      const auto same = [&](const TargetBounds& known) { return known.same_as(found); };
      if (std::none_of(targets.begin(), targets.end(), same)) targets.push_back(std::move(found));
    }
    const Feasibility of_bands = judge_bands(config);
    for (const Conflict& found : of_bands.conflicts) conflict(found);
    bands.undecided_together |= of_bands.undecided_together;
    join(bands.judged_alone, of_bands.judged_alone);
    join(bands.not_judged, of_bands.not_judged);
    const ActuatorJudgement of_actuators = judge_actuators(config);
    for (const Conflict& found : of_actuators.conflicts) conflict(found);
    actuators.conflicts.insert(actuators.conflicts.end(), of_actuators.conflicts.begin(),
                               of_actuators.conflicts.end());
    join(actuators.notes, of_actuators.notes);
    const NeededInputs needed = inputs_of(config, registry);
    join(inputs.required, needed.required);
    join(inputs.used, needed.used);
    inputs.bins |= needed.bins;
    inputs.payload += needed.payload;
  }
};

int check(const Options& options, const PolicyRegistry& registry) {
  ControllerConfig config;
  const bool json = options.format == "json";
  try {
    config = load_config(options.config, registry);
    // What a file of biases holds shows in a controller alone: it reads the file, and may refuse it.
    const std::vector<LayerSettings> groups = layer_settings(config, 0);
    if (std::any_of(groups.begin(), groups.end(),
                    [](const LayerSettings& of) { return !of.config.expert_bias.initial.file.empty(); })) {
      const Controller controller(config, registry);
    }
  } catch (const ConfigError& e) {
    if (json) {
      const nlohmann::ordered_json verdict = {
          {"valid", false}, {"feasible", false}, {"conflicts", nlohmann::json::array()}, {"error", e.what()}};
      std::cout << json_text(verdict) << '\n';
    }
    throw;
  }
  Judgement judgement;
  std::vector<std::int64_t> steps = {0};
  for (const TimelineEntry& entry : config.timeline) steps.push_back(entry.from);
  for (const std::int64_t step : steps) {
    const std::vector<LayerSettings> groups = layer_settings(config, step);
    const double before = std::exchange(judgement.inputs.payload, 0);
    for (std::size_t g = 0; g < groups.size(); ++g) {
      std::string where = step == 0 ? "" : "from step " + std::to_string(step) + ": ";
      if (!config.layers.empty()) where += "layers[" + std::to_string(g) + "]: ";
      judgement.add(groups[g].config, where, registry);
    }
    judgement.inputs.payload = std::max(judgement.inputs.payload, before);
  }
  const std::vector<Conflict>& conflicts = judgement.conflicts;
  const Feasibility& bands = judgement.bands;
  const ActuatorJudgement& actuators = judgement.actuators;
  const NeededInputs& inputs = judgement.inputs;
  const bool feasible = conflicts.empty();
  if (json) {
    auto list = nlohmann::ordered_json::array();
    for (const Conflict& conflict : conflicts) {
      list.push_back({{"metrics", conflict.metrics}, {"message", text_of(conflict)}});
    }
    nlohmann::ordered_json verdict = {{"valid", true},
                                      {"feasible", feasible},
                                      {"conflicts", list},
                                      {"inputs", {{"required", inputs.required}, {"used", inputs.used}}}};
    for (const TargetBounds& target : judgement.targets) {
      nlohmann::ordered_json& row = verdict["targets"].emplace_back();
      row = {{"actuator", target.actuator}, {"metric", target.metric},  {"experts", target.experts},
             {"top_k", target.top_k},       {"min", target.bounds.min}, {"max", target.bounds.max}};
      if (std::isinf(target.bounds.max)) row.erase("max");
      if (!target.where.empty()) row["where"] = target.where.substr(0, target.where.size() - 2);
    }
    if (!actuators.notes.empty()) verdict["notes"] = actuators.notes;
    std::cout << json_text(verdict) << '\n';
    return feasible ? 0 : 1;
  }
  if (options.explain) {
    std::cout << explain(config, registry);
    return 0;
  }
  std::cout << to_yaml(config);
  // As comments, so that the output is a valid config.
  std::vector<std::string> recorded = inputs.required;
  recorded.insert(recorded.begin(), "the chosen experts");
  std::cout << "# the router must record: " << listed(recorded) << '\n';
  if (!inputs.used.empty()) std::cout << "# used where it is recorded: " << listed(inputs.used) << '\n';
  if (inputs.bins) {
    std::cout << "# form: k3: over ranks, each step sums up " << brief(inputs.payload / 1e6)
              << " MB (two counts of a bin in 8 bytes; exact up to " << kMostRequiredTokens
              << " tokens a step)\n";
  }
  if (config.model.tokens_per_step == 0 && judgement.set_points) {
    std::cout << "# model.tokens_per_step is not given: no target was compared with a noise floor\n";
  }
  if (bands.undecided_together) {
    std::cout << "# bands: each alone and all pairs are feasible; whether all hold together is not decided\n";
  }
  for (const std::string& metric : bands.judged_alone) {
    std::cout << "# bands: " << metric << " is relative to model.targets: judged alone\n";
  }
  for (const std::string& metric : bands.not_judged) {
    std::cout << "# bands: " << metric << " does not depend on the loads alone: not judged\n";
  }
  const double choices = static_cast<double>(config.model.tokens_per_step) * config.model.top_k;
  for (std::size_t i = 0; i < config.model.targets.size(); ++i) {
    const double few = config.model.targets[i] * choices;
    if (few > 0 && few < 1) {
      std::cout << "# model.targets[" << i << "]: " << brief(few)
                << " tokens a step: too few to tell a relative load from chance; with 0 the expert should "
                   "receive no tokens\n";
    }
  }
  const ActuatorConfig& aux = config.aux_loss_weight;
  if (!LoadTargets(config.model.experts, config.model.targets).equal() &&
      (aux.policy != "fixed" || aux.initial > 0)) {
    std::cout
        << "# aux_loss_weight: the auxiliary loss pulls towards equal loads, not towards model.targets\n";
  }
  for (const TargetBounds& target : judgement.targets) {
    std::cout << "# " << target.where << target.actuator << ".options.target: at N = " << target.experts
              << ", k = " << target.top_k << ' ' << target.metric << " is " << text_of(target.bounds) << '\n';
  }
  for (const std::string& note : actuators.notes) std::cout << "# " << note << '\n';
  if (!actuators.conflicts.empty() || judgement.set_points) {
    std::cout << "# which policy may hold which variable:\n";
    for (const std::string& line : actuator_recipe()) std::cout << "#   " << line << '\n';
  }
  std::cout << (feasible ? "# valid and feasible\n" : "# valid, but infeasible\n");
  std::cout.flush();
  for (const Conflict& conflict : conflicts) std::cerr << "infeasible: " << text_of(conflict) << '\n';
  return feasible ? 0 : 1;
}

std::string recipe() {
  std::string text;
  for (const std::string& line : actuator_recipe()) text += "  " + line + '\n';
  return text;
}

}  // namespace

void add_check(CLI::App& app, Tool& tool) {
  CLI::App* command =
      app.add_subcommand("check", "Validate a config, print it resolved, judge its feasibility");
  command->footer(
      "Standard output is the whole config with every default filled in, ready to use, with the verdict\n"
      "as a comment at its end. The reasons why a config is infeasible go to standard error. With\n"
      "--format json, standard output is the verdict alone.\n\n"
      "Judged: bands and set-points against each other, the noise floor and what a metric can be at N\n"
      "and k; and actuators against each other, since two that steer one variable work against each\n"
      "other. Which policy may hold which variable:\n" +
      recipe() +
      "\n"
      "Examples:\n"
      "  moectl check policies/pi.yaml\n"
      "  moectl check - --format json < config.yaml");
  auto options = std::make_shared<Options>();
  CLI::Option* config = command->add_option("CONFIG", options->config, "YAML config");
  CLI::Option* format = add_format(*command, options->format, {"text", "json"});
  command
      ->add_flag(
          "--explain", options->explain,
          "Every key instead, with its value, default, range, unit and meaning; without CONFIG, the defaults")
      ->excludes(format);
  CLI::Option* reference =
      command->add_flag("--reference", options->reference, "Every key there is, as Markdown; without CONFIG")
          ->excludes(config);
  command->callback([&tool, options, config, reference] {
    if (config->empty() && reference->empty() && !options->explain) throw CLI::RequiredError("CONFIG");
    tool.run = [&tool, options, given = !config->empty()] {
      if (given) return check(*options, tool.registry);
      std::cout << (options->reference ? config_reference(tool.registry) : explain({}, tool.registry));
      return 0;
    };
  });
}

}  // namespace moectl::cli
