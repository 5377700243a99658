// moectl simulate CONFIG…: closes the loop on the simulated router, one run a config on the same tokens.
#include <filesystem>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "cli/tool.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/figures.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"

namespace moectl::cli {
namespace {

struct Options {
  std::vector<std::string> configs;
  std::string scenario = "steady", gate = "sigmoid", format, output;
  std::int64_t steps = 600;
  std::optional<int> layers, experts, top_k;
  std::optional<std::int64_t> tokens, event, delay;
  std::int64_t sequence_length = 0;
  std::uint64_t seed = 1;
};

constexpr int kDelay = 4;  // of scenario delay, where the config declares none

const std::vector<std::string> kColumns = {"settle",        "max_vio",     "max_vio_over_floor",
                                           "cv_over_floor", "excess_area", "end_over_floor",
                                           "dead_experts",  "limit_hits"};

ControllerConfig config_of(const Options& options, const std::string& path, const PolicyRegistry& registry) {
  ControllerConfig config = load_config(path, registry);
  if (options.layers) config.model.layers = *options.layers;
  if (options.experts) config.model.experts = *options.experts;
  if (options.top_k) config.model.top_k = *options.top_k;
  if (options.tokens) config.model.tokens_per_step = *options.tokens;
  // Correlated tokens are to be measured against their own floor.
  if (options.sequence_length > 0) config.collect.sequences = true;
  return config;
}

SimulationOptions plant_of(const Options& options, const ControllerConfig& config) {
  SimulationOptions plant = simulation_options(config);
  plant.gate = *gate_of(options.gate);
  plant.scenario = *scenario_of(options.scenario);
  plant.event_step = options.event.value_or(options.steps / 2);
  plant.seed = options.seed;
  plant.sequence_length = options.sequence_length;
  if (options.delay) plant.delay = static_cast<int>(*options.delay);
  if (plant.scenario == Scenario::kDelay && plant.delay == 0) plant.delay = kDelay;
  return plant;
}

// With several configs each has a run log of its own: RUN with the config's name put before its extension.
std::string output_of(const Options& options, const std::string& config) {
  if (options.output.empty() || options.output == "-" || options.configs.size() == 1) return options.output;
  const std::filesystem::path run(options.output);
  std::filesystem::path stem = run.stem(), extension = run.extension();
  if (extension == ".gz") {
    extension = stem.extension().string() + ".gz";
    stem = stem.stem();
  }
  const std::string name =
      stem.string() + '-' + std::filesystem::path(config).stem().string() + extension.string();
  return (run.parent_path() / name).string();
}

Figures simulate_one(const Options& options, const std::string& path, const PolicyRegistry& registry) {
  const ControllerConfig config = config_of(options, path, registry);
  Controller controller(config, registry);
  const SimulationOptions plant = plant_of(options, controller.config());
  const bool struck = plant.scenario != Scenario::kSteady && plant.scenario != Scenario::kDelay;
  const std::optional<std::int64_t> event = struck ? std::optional(plant.event_step) : std::nullopt;
  std::optional<RunLogWriter> writer;
  if (const std::string run = output_of(options, path); !run.empty()) {
    writer.emplace(run, controller.config(), false, event);
    controller.set_log([&](const StepReport& report) { writer->write(report); });
  }
  std::vector<StepFigures> steps;
  simulate(controller, plant, options.steps,
           [&](const StepReport& report) { steps.push_back(figures_of(report)); });
  if (writer) {
    writer->flush();
    if (!writer->ok()) throw InputError("output: " + output_of(options, path) + ": cannot be written");
  }
  return compute_figures(steps, event);
}

std::optional<double> value_of(const Figures& figures, const std::string& column) {
  for (const auto& [name, value] : fields_of(figures)) {
    if (name == column) return value;
  }
  return std::nullopt;
}

int simulate_all(const Options& options, const PolicyRegistry& registry) {
  if (options.output == "-" && options.configs.size() > 1) {
    throw InputError("output: -: standard output can hold one run; name a file for several configs");
  }
  std::vector<Figures> figures;
  for (const std::string& config : options.configs) {
    figures.push_back(simulate_one(options, config, registry));
  }
  if (options.output == "-") return 0;  // the run log stands there
  if (options.format == "json") {
    auto all = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < figures.size(); ++i) {
      nlohmann::ordered_json row = {{"config", options.configs[i]}};
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
      all.push_back(std::move(row));
    }
    std::cout << all.dump(2) << '\n';
    return 0;
  }
  std::vector<std::string> header = {"config"};
  header.insert(header.end(), kColumns.begin(), kColumns.end());
  Table table(header);
  for (std::size_t i = 0; i < figures.size(); ++i) {
    std::vector<std::string> row = {options.configs[i]};
    for (const std::string& column : kColumns) {
      const std::optional<double> value = value_of(figures[i], column);
      row.push_back(column == "settle" && !value ? "never" : brief(value));
    }
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
      "The plant is described in moectl/simulation.h. Scenarios act from the event on (half of the steps):\n"
      "  steady    nothing happens              shift  a domain switches on\n"
      "  collapse  rich get richer, runaway     dead   an expert sinks\n"
      "  drift     the router keeps moving      noise  bursty mixtures, jitter\n"
      "  delay     statistics are late from the first step on: by model.delay, else by 4 steps that the\n"
      "            config does not know of\n"
      "Figures are those of 'moectl compare --help'; the steady window ends at the event, the excess area\n"
      "starts there, and end_over_floor says what became of it. Configs run on the same tokens.\n\n"
      "Examples:\n"
      "  moectl simulate policies/adaptive_bias.yaml policies/sign_bias.yaml --scenario shift\n"
      "  moectl simulate policies/adaptive_bias.yaml --experts 64 --top-k 6 --tokens 8192 -o run.jsonl");
  auto options = std::make_shared<Options>();
  command->add_option("CONFIG", options->configs, "YAML configs")->required();
  command->add_option("--scenario", options->scenario, "What happens to the router")
      ->check(CLI::IsMember({"steady", "shift", "collapse", "dead", "drift", "delay", "noise"}))
      ->capture_default_str();
  command->add_option("--gate", options->gate, "The router's gate")
      ->check(CLI::IsMember({"sigmoid", "softmax"}))
      ->capture_default_str();
  command->add_option("--steps", options->steps, "Control steps")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--layers", options->layers, "Instead of model.layers")->check(CLI::PositiveNumber);
  command->add_option("--experts", options->experts, "Instead of model.experts")->check(CLI::PositiveNumber);
  command->add_option("--top-k", options->top_k, "Instead of model.top_k")->check(CLI::PositiveNumber);
  command->add_option("--tokens", options->tokens, "Tokens a step, instead of model.tokens_per_step")
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--sequence-length", options->sequence_length,
                   "Tokens of one sequence are alike; 0 = independent tokens")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--event", options->event, "Step of the event, instead of half of the steps")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--delay", options->delay, "Steps by which statistics are late, declared or not")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--seed", options->seed, "Of the plant")->capture_default_str();
  command->add_option("-o,--output", options->output,
                      "Run log to write; with several configs, one a config: RUN-NAME");
  add_format(*command, options->format, {"table", "json"});
  command->callback(
      [&tool, options] { tool.run = [&tool, options] { return simulate_all(*options, tool.registry); }; });
}

}  // namespace moectl::cli
