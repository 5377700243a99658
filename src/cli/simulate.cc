// moectl simulate CONFIG…: closes the loop on the simulated router, one run a config on the same tokens.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "cli/simulate_fit.h"
#include "cli/simulate_variants.h"
#include "cli/tool.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/figures.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"
#include "simulation/fit.h"
#include "simulation/simulation_options.h"

namespace moectl::cli {
namespace {

struct Options {
  std::vector<std::string> configs, sets;
  std::string like;
  std::string scenario = "steady", gate = "sigmoid", format, output;
  std::optional<std::string> collapse, score_space;
  std::int64_t steps = 600;
  // Instead of the config's.
  std::optional<int> layers, experts, top_k;
  std::optional<std::int64_t> tokens, event;
  std::optional<int> sunk_experts, delay;
  SimulationOptions plant;  // all other options
};

constexpr int kDelay = 4;  // of scenario delay, where the config declares none

const std::vector<std::string> kColumns = {"settle",        "max_vio",     "max_vio_over_floor",
                                           "cv_over_floor", "excess_area", "end_over_floor",
                                           "dead_experts",  "drop_rate",   "limit_hits"};

ControllerConfig config_of(const Options& options, const Variant& variant, const PolicyRegistry& registry) {
  ControllerConfig config = load_variant(variant, registry);
  ModelConfig& model = config.model;
  const auto only_once = [&](const char* option, const char* key, bool given) {
    for (const auto& [set, value] : variant.changes) {
      if (given && set == key)
        throw InputError("--set: " + set + ": " + option + " (or --like) already sets it, for all runs");
    }
  };
  only_once("--layers", "model.layers", options.layers.has_value());
  only_once("--experts", "model.experts", options.experts.has_value());
  only_once("--top-k", "model.top_k", options.top_k.has_value());
  only_once("--tokens", "model.tokens_per_step", options.tokens.has_value());
  only_once("--score-space", "model.score_space", options.score_space.has_value());
  if (options.layers) model.layers = *options.layers;
  if (options.experts) model.experts = *options.experts;
  if (options.top_k) model.top_k = *options.top_k;
  if (options.tokens) model.tokens_per_step = *options.tokens;
  if (options.score_space) {
    model.score_space = *options.score_space == "logit" ? ScoreSpace::kLogit : ScoreSpace::kProbability;
  }
  // Correlated tokens are to be measured against their own floor.
  if (options.plant.sequence_length > 0) config.collect.sequences = true;
  return config;
}

// The step at which the simulated router changes, if it does.
std::optional<std::int64_t> event_of(const SimulationOptions& plant) {
  const bool from_the_start =
      plant.scenario == Scenario::kSteady || plant.scenario == Scenario::kDelay ||
      (plant.scenario == Scenario::kCollapse && plant.collapse == CollapseKind::kColdStart);
  return from_the_start ? std::nullopt : std::optional(plant.event_step);
}

void check_plant(const Options& options, const SimulationOptions& plant) {
  const auto refuse = [](const std::string& option, std::int64_t value, const std::string& constraint) {
    throw InputError(option + ": " + std::to_string(value) + ": " + constraint);
  };
  if (const auto fault = simulated::find_fault(plant)) {
    std::string option = "--" + fault->option;
    std::replace(option.begin(), option.end(), '_', '-');
    if (fault->option == "domains") option = "model.domains";
    if (fault->option == "top_k" && !options.top_k) option = "model.top_k";
    throw InputError(option + ": " + fault->value + ": " + fault->constraint);
  }
  if (plant.top_k == plant.experts) {
    refuse("--top-k", plant.top_k, "must be below --experts: with k = N every token goes to every expert");
  }
  const std::string steps = " --steps (" + std::to_string(options.steps) + ")";
  if (const auto event = event_of(plant); event && *event >= options.steps) {
    refuse("--event", *event, "must be below" + steps);
  }
  if (plant.delay >= options.steps) {
    refuse("--delay", plant.delay, "must be below" + steps + ", else no statistics arrive");
  }
}

SimulationOptions plant_of(const Options& options, const ControllerConfig& config) {
  SimulationOptions plant = simulation_options(config, options.plant);
  plant.gate = *gate_of(options.gate);
  plant.scenario = *scenario_of(options.scenario);
  if (options.collapse) {
    if (plant.scenario != Scenario::kCollapse) {
      throw InputError("--collapse: " + *options.collapse + ": needs --scenario collapse");
    }
    plant.collapse = *collapse_of(*options.collapse);
  }
  if (options.sunk_experts) {
    if (plant.scenario != Scenario::kDead) {
      throw InputError("--sunk-experts: " + std::to_string(*options.sunk_experts) +
                       ": needs --scenario dead");
    }
    plant.sunk_experts = *options.sunk_experts;
  }
  plant.event_step = options.event.value_or(options.steps / 2);
  if (options.event && (plant.scenario == Scenario::kSteady || plant.scenario == Scenario::kDelay)) {
    throw InputError("--event: " + std::to_string(*options.event) + ": this scenario has no event");
  }
  if (options.delay) {
    plant.delay = *options.delay;
  } else if (plant.scenario == Scenario::kDelay && plant.delay == 0) {
    plant.delay = kDelay;
  }
  check_plant(options, plant);
  return plant;
}

// With several runs each has a log of its own: RUN with the names of config and changes put before its extension.
std::string output_of(const Options& options, const Variant& variant, bool several) {
  if (options.output.empty() || options.output == "-" || !several) return options.output;
  const std::filesystem::path run(options.output);
  std::filesystem::path stem = run.stem(), extension = run.extension();
  if (extension == ".gz") {
    extension = stem.extension().string() + ".gz";
    stem = stem.stem();
  }
  std::string name = stem.string();
  if (options.configs.size() > 1) name += '-' + std::filesystem::path(variant.config).stem().string();
  for (const auto& [key, value] : variant.changes) name += '-' + key + '=' + value;
  std::replace(name.begin(), name.end(), '/', '_');
  name += extension.string();
  return (run.parent_path() / name).string();
}

/// A bar on standard error, where that is a terminal: how many steps of all runs are done, and how many runs.
class Progress {
 public:
  Progress(std::size_t runs, std::int64_t steps_of_run)
      : on_(runs > 1 && isatty(STDERR_FILENO) == 1),
        runs_(static_cast<std::int64_t>(runs)),
        steps_(runs_ * steps_of_run) {}
  void step() {
    if (on_) show(++steps_done_);
  }
  void run() {
    if (on_) ++runs_done_;
  }
  void end() {
    if (!on_) return;
    draw(steps_done_);
    std::fputs("\n", stderr);
  }

 private:
  void show(std::int64_t done) {
    // Once a hundredth.
    if (done * 100 / steps_ != (done - 1) * 100 / steps_) draw(done);
  }
  void draw(std::int64_t done) {
    constexpr std::int64_t kWidth = 40;
    const std::lock_guard lock(mutex_);
    // Threads that were overtaken must not turn it back.
    drawn_ = std::max(drawn_, done);
    const auto filled = static_cast<std::size_t>(drawn_ * kWidth / steps_);
    const std::string text = "\r[" + std::string(filled, '#') + std::string(kWidth - filled, ' ') + "] " +
                             std::to_string(drawn_ * 100 / steps_) + " %, " + std::to_string(runs_done_) +
                             " of " + std::to_string(runs_) + " runs";
    // Not by std::cerr: there a carriage return is text of others, and made visible.
    std::fputs(text.c_str(), stderr);
    std::fflush(stderr);
  }
  bool on_;
  std::int64_t runs_, steps_, drawn_ = 0;
  std::atomic<std::int64_t> steps_done_ = 0, runs_done_ = 0;
  std::mutex mutex_;
};

Figures simulate_one(const Options& options, const Variant& variant, const std::string& run,
                     const PolicyRegistry& registry, Progress& progress) {
  const ControllerConfig config = config_of(options, variant, registry);
  const SimulationOptions plant = plant_of(options, config);
  Controller controller(config, registry);
  const std::optional<std::int64_t> event = event_of(plant);
  std::optional<RunLogWriter> writer;
  if (!run.empty()) {
    keep_inputs("--output", run, files_of(config));
    writer.emplace(run, controller.config(), false, event);
    if (!writer->ok()) throw InputError("output: " + run + ": cannot be written");
    controller.set_log([&](const StepReport& report) { writer->write(report); });
  }
  std::vector<StepFigures> steps;
  simulate(controller, plant, options.steps, [&](const StepReport& report) {
    steps.push_back(figures_of(report));
    progress.step();
  });
  if (writer) {
    writer->flush();
    if (!writer->ok()) throw InputError("output: " + run + ": cannot be written");
  }
  return compute_figures(steps, event);
}

std::optional<double> value_of(const Figures& figures, const std::string& column) {
  for (const auto& [name, value] : fields_of(figures)) {
    if (name == column) return value;
  }
  return std::nullopt;
}

/// All runs, on all processors; each depends on its own options alone. With a terminal on standard error, says how far.
std::vector<Figures> simulate_variants(const Options& options, const std::vector<Variant>& variants,
                                       const std::vector<std::string>& outputs,
                                       const PolicyRegistry& registry) {
  std::vector<Figures> figures(variants.size());
  std::vector<std::exception_ptr> errors(variants.size());
  std::atomic<std::size_t> next = 0;
  Progress progress(variants.size(), options.steps);
  const auto work = [&] {
    for (std::size_t i = next++; i < variants.size(); i = next++) {
      try {
        figures[i] = simulate_one(options, variants[i], outputs[i], registry, progress);
      } catch (...) {
        errors[i] = std::current_exception();
        next = variants.size();
      }
      progress.run();
    }
  };
  std::vector<std::thread> threads;
  const std::size_t most =
      std::min<std::size_t>(variants.size(), std::max(1U, std::thread::hardware_concurrency()));
  for (std::size_t t = 1; t < most; ++t) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
  progress.end();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
  return figures;
}

/// The simulated router of the options, fitted to the trace of --like; options that were given replace what was fitted.
Options like_trace(Options options, const std::set<std::string>& given, const PolicyRegistry& registry) {
  const TraceMoments trace = moments_of(options.like);
  if (trace.layers == 0)
    throw InputError("--like: " + options.like + ": no record tagged 'train' has tokens and counts");
  // Scores are those of the first config: gaps are in their units.
  const Variant lead{options.configs[0], {}};
  SimulationOptions start = options.plant;
  start.gate = *gate_of(options.gate);
  const ControllerConfig config = config_of(options, lead, registry);
  start.score_space = config.model.score_space;
  if (!config.model.domains.empty()) start.domains = static_cast<int>(config.model.domains.size());
  const SimulationFit fit = fit_simulation(trace, start);
  print_fit(fit, options.like);

  std::string command;
  const auto take = [&](const char* option, auto& to, const auto& value) {
    if (given.count(option)) return;
    to = value;
    command += std::string(" ") + option + ' ';
    if constexpr (std::is_floating_point_v<std::decay_t<decltype(value)>>) {
      command += brief(value);
    } else {
      command += std::to_string(value);
    }
  };
  const auto three = [](double value) { return rounded_to(value, 3); };
  take("--clusters", options.plant.clusters, fit.options.clusters);
  take("--token-spread", options.plant.token_spread, three(fit.options.token_spread));
  take("--coherence", options.plant.coherence, three(fit.options.coherence));
  take("--preference", options.plant.preference, three(fit.options.preference));
  take("--mixture-spread", options.plant.mixture_spread, three(fit.options.mixture_spread));
  take("--sequence-length", options.plant.sequence_length, fit.options.sequence_length);
  const auto take_model = [&](const char* option, auto& to, const auto& value) {
    if (!to) take(option, to.emplace(), value);
  };
  take_model("--layers", options.layers, trace.layers);
  take_model("--experts", options.experts, trace.experts);
  take_model("--top-k", options.top_k, trace.top_k);
  if (!options.tokens) {
    const std::int64_t unit = std::max<std::int64_t>(1, options.plant.sequence_length);
    take("--tokens", options.tokens.emplace(), std::max<std::int64_t>(1, trace.tokens / unit) * unit);
  }
  for (const char* option :
       {"--clusters", "--token-spread", "--coherence", "--preference", "--mixture-spread"}) {
    if (given.count(option) != 0)
      std::cerr << option << " was given and replaces what was fitted: the misfit is that of the fit\n";
  }
  std::cerr << "as if given:" << command << '\n';
  return options;
}

int simulate_all(const Options& options, const PolicyRegistry& registry) {
  const std::vector<Variant> variants = variants_of(options.configs, options.sets);
  if (options.output == "-" && variants.size() > 1) {
    throw InputError("output: -: standard output can hold one run; name a file for several configs");
  }
  std::vector<std::string> outputs;
  for (const Variant& variant : variants) {
    outputs.push_back(output_of(options, variant, variants.size() > 1));
    if (!outputs.back().empty() && std::count(outputs.begin(), outputs.end(), outputs.back()) > 1) {
      throw InputError("output: " + outputs.back() + ": two configs of the same name would both write it");
    }
  }
  std::vector<std::string> inputs = options.configs;
  if (!options.like.empty()) inputs.push_back(options.like);
  for (const std::string& output : outputs) keep_inputs("--output", output, inputs);
  say_if_held();
  const std::vector<Figures> figures = simulate_variants(options, variants, outputs, registry);
  if (options.output == "-") return 0;  // the run log went there
  if (options.format == "json") {
    auto all = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < figures.size(); ++i) {
      nlohmann::ordered_json row = {{"config", variants[i].config}};
      if (!variants[i].changes.empty())
        row["set"] =
            std::map<std::string, std::string>(variants[i].changes.begin(), variants[i].changes.end());
      for (const std::string& column : kColumns) {
        const std::optional<double> value = value_of(figures[i], column);
        if (!value) {
          row[column] = nullptr;
        } else if (column == "settle" || column == "limit_hits") {
          row[column] = static_cast<std::int64_t>(*value);
        } else {
          row[column] = *value;
        }
      }
      row["floor"] = figures[i].floor == FloorKind::kNone ? nlohmann::ordered_json(nullptr)
                                                          : nlohmann::ordered_json(name_of(figures[i].floor));
      all.push_back(std::move(row));
    }
    std::cout << json_text(all, 2) << '\n';
    return 0;
  }
  const bool drops =
      std::any_of(figures.begin(), figures.end(), [](const Figures& f) { return f.drop_rate.has_value(); });
  std::vector<std::string> columns;
  std::copy_if(kColumns.begin(), kColumns.end(), std::back_inserter(columns),
               [&](const std::string& column) { return drops || column != "drop_rate"; });
  std::vector<std::string> header = {"config"};
  for (const auto& [key, value] : variants[0].changes) header.push_back(key);
  header.insert(header.end(), columns.begin(), columns.end());
  header.emplace_back("floor");
  Table table(header);
  for (std::size_t i = 0; i < figures.size(); ++i) {
    std::vector<std::string> row = {variants[i].config};
    for (const auto& [key, value] : variants[i].changes) row.push_back(value);
    for (const std::string& column : columns) {
      const std::optional<double> value = value_of(figures[i], column);
      // Without measurements, settling is unknown.
      row.push_back(column == "settle" && !value && figures[i].max_vio ? "never" : brief(value));
    }
    row.emplace_back(figures[i].floor == FloorKind::kNone ? "-" : name_of(figures[i].floor));
    table.add(std::move(row));
  }
  std::cout << table.text();
  return 0;
}

}  // namespace

void add_simulate(CLI::App& app, Tool& tool) {
  CLI::App* command =
      app.add_subcommand("simulate", "Close the loop on a simulated router and print figures");
  command->footer(
      "The simulated router is described in moectl/simulation.h. Scenarios act from --event on:\n"
      "  steady    nothing happens\n"
      "  shift     the last domain, absent before, becomes half of the data\n"
      "  collapse  by --collapse: runaway, the favoured learn ever faster; dead_third, a third of the\n"
      "            experts sinks and stays behind; poisoned_bias, the router's biases are off by a fixed\n"
      "            vector; cold_start, one expert is far ahead from the first step on\n"
      "  dead      experts sink far below the others\n"
      "  drift     the router keeps moving\n"
      "  noise     a mixture spread of 1 and a jitter of 0.5, or more if so given\n"
      "  delay     statistics are late from the first step on: by model.delay, else by 4 steps that the\n"
      "            config does not know of\n"
      "Configs run on the same tokens. Domains are those of model.domains, or four. Limits of biases are in\n"
      "units of the scores: rescale them with --score-space and --score-scale.\n"
      "\n"
      "Figures are those of 'moectl compare --help'. The steady window ends at the event and the excess "
      "area\n"
      "starts there: it is the way to where the run ends, and end_over_floor says where that is. drop_rate\n"
      "stands there if --capacity-factor is given.\n"
      "\n"
      "Examples:\n"
      "  moectl simulate policies/adaptive_bias.yaml policies/sign_bias.yaml --scenario shift\n"
      "  moectl simulate policies/adaptive_bias.yaml --experts 64 --top-k 6 --tokens 4096 -o run.jsonl\n"
      "  moectl simulate policies/pi.yaml --scenario collapse --collapse cold_start --gate softmax\n"
      "  moectl simulate policies/sign_bias.yaml --set expert_bias.options.step=1e-4,1e-3,1e-2 --scenario "
      "shift\n"
      "  moectl simulate policies/sign_bias.yaml policies/adaptive_bias.yaml --like run.jsonl\n"
      "  moectl simulate policies/adaptive_bias.yaml --clusters 12 --token-spread 0.02 --capacity-factor "
      "1.25");
  auto options = std::make_shared<Options>();
  SimulationOptions& plant = options->plant;
  constexpr int kMostInt = std::numeric_limits<int>::max();
  const CLI::Validator positive = whole_number(1), from_zero = whole_number(0),
                       positive_int = whole_number(1, kMostInt);
  command->add_option("CONFIG", options->configs, "YAML configs")->required();

  const auto add = [&](const char* group, const char* name, auto& value, const char* text,
                       const CLI::Validator& check) {
    CLI::Option* option = command->add_option(name, value, text)->check(check)->group(group);
    if constexpr (!requires { value.has_value(); }) option->capture_default_str();
  };
  const CLI::Validator positive_number = cli::positive_number(), from_zero_number = number_from_zero();

  const char* const run = "Run";
  add(run, "--steps", options->steps, "Control steps", positive_int);
  add(run, "--seed", plant.seed, "Random seed of the simulated router and its tokens", from_zero);
  command
      ->add_option("-o,--output", options->output,
                   "Run log to write; with several configs, one a config: RUN-NAME")
      ->group(run);
  add_format(*command, options->format, {"table", "json"})->group(run);
  command
      ->add_option("--set", options->sets,
                   "KEY=VALUE of the config instead of what stands in it, or KEY=A,B,C for a run with each; "
                   "several make a grid")
      ->type_name("KEY=VALUES")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->group(run);
  command
      ->add_option(
          "--like", options->like,
          "Fit the simulated router to this trace, by the method of moments, and say how well it fits; "
          "options that are given replace what was fitted. --gate and the config's score space must be those "
          "of the trace")
      ->type_name("TRACE")
      ->group(run);

  const char* const scenario = "Scenario";
  add(scenario, "--scenario", options->scenario, "See below",
      CLI::IsMember({"steady", "shift", "collapse", "dead", "drift", "delay", "noise"}));
  add(scenario, "--event", options->event, "Step of the event; default: half of the steps", from_zero);
  add(scenario, "--collapse", options->collapse, "Kind of collapse; default: runaway",
      CLI::IsMember({"runaway", "cold_start", "dead_third", "poisoned_bias"}));
  add(scenario, "--sunk-experts", options->sunk_experts, "Experts that sink in scenario dead; default: 1",
      positive_int);
  add(scenario, "--delay", options->delay, "Steps by which statistics are late, declared or not",
      whole_number(0, kMostInt));

  const char* const model = "Model, instead of the config's";
  add(model, "--layers", options->layers, "Instead of model.layers", positive_int);
  add(model, "--experts", options->experts, "Instead of model.experts", positive_int);
  add(model, "--top-k", options->top_k, "Instead of model.top_k", positive_int);
  add(model, "--tokens", options->tokens, "Tokens a step, instead of model.tokens_per_step", positive);
  add(model, "--score-space", options->score_space, "Instead of model.score_space",
      CLI::IsMember({"probability", "logit"}));

  const char* const router = "Router";
  add(router, "--gate", options->gate, "The router's gate", CLI::IsMember({"sigmoid", "softmax"}));
  add(router, "--capacity-factor", plant.capacity_factor,
      "Largest load of an expert, in mean loads; the rest is dropped; 0 = dropless", from_zero_number);
  add(router, "--jitter", plant.jitter,
      "Noise on the logits of each token, logits; the temperature multiplies it", from_zero_number);
  add(router, "--score-scale", plant.score_scale, "Factor on the scores that biases add to", positive_number);

  const char* const tokens = "Tokens";
  add(tokens, "--sequence-length", plant.sequence_length,
      "Tokens of one sequence are alike; 0 = independent tokens", from_zero);
  add(tokens, "--mixture-spread", plant.mixture_spread,
      "Spread of the domain mixtures drawn at each step, in log weights; 0 = always the same",
      from_zero_number);
  add(tokens, "--clusters", plant.clusters, "Clusters that tokens come from; few clusters make routing lumpy",
      positive_int);
  add(tokens, "--token-spread", plant.token_spread, "Spread of the tokens in a cluster, logits",
      from_zero_number);
  add(tokens, "--coherence", plant.coherence,
      "Share of a sequence's tokens that come from three clusters of its own", number_between(0, 1));
  add(tokens, "--preference", plant.preference, "Spread of what the router prefers, logits",
      from_zero_number);
  command->callback([&tool, options, command] {
    std::set<std::string> given;
    for (const CLI::Option* option : command->get_options()) {
      if (option->count() > 0) given.insert(option->get_name());
    }
    tool.run = [&tool, options, given] {
      return simulate_all(options->like.empty() ? *options : like_trace(*options, given, tool.registry),
                          tool.registry);
    };
  });
}

}  // namespace moectl::cli
