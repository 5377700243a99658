// moectl biases FILE…: the selection biases that files hold, by layer; two of them compared.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/tool.h"
#include "import/biases.h"

namespace moectl::cli {
namespace {

struct Options {
  std::vector<std::string> files;
  std::string output, format;
  BiasSource source;
};

struct Spread {
  double mean = 0, deviation = 0, least = 0, most = 0;
};
Spread spread_of(const std::vector<double>& values) {
  Spread out;
  const auto n = static_cast<double>(values.size());
  for (const double x : values) out.mean += x / n;
  for (const double x : values) out.deviation += (x - out.mean) * (x - out.mean) / n;
  out.deviation = std::sqrt(out.deviation);
  out.least = *std::min_element(values.begin(), values.end());
  out.most = *std::max_element(values.begin(), values.end());
  return out;
}

/// How two layers' biases differ; what all experts have in common changes no choice and is left out.
struct Difference {
  double largest = 0, deviation = 0;
  std::optional<double> correlation;
};
Difference difference_of(const std::vector<double>& a, const std::vector<double>& b) {
  const Spread of_a = spread_of(a), of_b = spread_of(b);
  Difference out;
  double product = 0;
  const auto n = static_cast<double>(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double x = a[i] - of_a.mean, y = b[i] - of_b.mean;
    out.largest = std::max(out.largest, std::abs(y - x));
    out.deviation += (y - x) * (y - x) / n;
    product += x * y / n;
  }
  out.deviation = std::sqrt(out.deviation);
  if (of_a.deviation > 0 && of_b.deviation > 0) out.correlation = product / of_a.deviation / of_b.deviation;
  return out;
}

int biases(const Options& options) {
  keep_inputs("--output", options.output, options.files);
  std::vector<LayerBiases> all;
  for (const std::string& file : options.files) all.push_back(biases_in(file, options.source));
  const bool json = options.format == "json";
  if (!options.output.empty()) {
    LayerBiases joined;  // of files of different layers, as the shards of a checkpoint
    for (std::size_t f = 0; f < all.size(); ++f) {
      for (const auto& [layer, values] : all[f]) {
        if (!joined.emplace(layer, values).second) {
          throw InputError(options.files[f] + ": layer " + std::to_string(layer) +
                           ": also in a file before it");
        }
      }
    }
    std::ofstream out(options.output, std::ios::binary);
    out << biases_json(joined);
    if (!out.flush()) throw InputError(options.output + ": cannot be written");
    std::cout << "wrote the biases of " << joined.size() << " layers to " << said_path(options.output)
              << '\n';
    return 0;
  }
  if (all.size() > 2) throw InputError("FILE: two files are compared; more can be joined with -o");
  Table table(
      all.size() == 1
          ? std::vector<std::string>{"layer", "experts", "mean", "deviation", "min", "max"}
          : std::vector<std::string>{"layer", "experts", "largest difference", "deviation", "correlation"});
  auto rows = nlohmann::ordered_json::array();
  for (const auto& [layer, values] : all[0]) {
    const std::string experts = std::to_string(values.size());
    if (all.size() == 1) {
      const Spread s = spread_of(values);
      table.add(
          {std::to_string(layer), experts, brief(s.mean), brief(s.deviation), brief(s.least), brief(s.most)});
      rows.push_back({{"layer", layer},
                      {"experts", values.size()},
                      {"mean", s.mean},
                      {"deviation", s.deviation},
                      {"min", s.least},
                      {"max", s.most},
                      {"biases", values}});
      continue;
    }
    const auto other = all[1].find(layer);
    if (other == all[1].end() || other->second.size() != values.size()) {
      const std::string why = other == all[1].end() ? "not in " + options.files[1]
                                                    : std::to_string(other->second.size()) + " experts there";
      table.add({std::to_string(layer), experts, why, "-", "-"});
      rows.push_back({{"layer", layer}, {"experts", values.size()}, {"differs", why}});
      continue;
    }
    const Difference d = difference_of(values, other->second);
    table.add({std::to_string(layer), experts, brief(d.largest), brief(d.deviation), brief(d.correlation)});
    rows.push_back(
        {{"layer", layer},
         {"experts", values.size()},
         {"largest", d.largest},
         {"deviation", d.deviation},
         {"correlation", d.correlation ? nlohmann::json(*d.correlation) : nlohmann::json(nullptr)}});
  }
  if (json) {
    for (const auto& row : rows) std::cout << json_text(row) << '\n';
  } else {
    std::cout << table.text();
  }
  return 0;
}

}  // namespace

void add_biases(CLI::App& app, Tool& tool) {
  CLI::App* command =
      app.add_subcommand("biases", "Take the selection biases out of a file, or compare two files");
  command->footer(
      R"(FILE is a run log (what was in force at its end), a saved state (both with what to deploy:
--deployed), an .npy array [layers, experts], JSON lists, a safetensors checkpoint, or a file of
biases that -o wrote. Several files of different layers are joined by -o. A config takes the
result as its start: expert_bias: {policy: adaptive_bias, initial: biases.json}. In a comparison
what all experts of a layer have in common is left out, since it changes no choice.

Examples:
  moectl biases model-*.safetensors -o biases.json
  moectl biases model.safetensors --tensor 'model.layers.{}.mlp.gate.e_score_correction_bias'
  moectl biases run.jsonl controller.state)");
  auto options = std::make_shared<Options>();
  command->add_option("FILE", options->files, "Files that hold biases; two are compared")->required();
  command->add_option("-o,--output", options->output, "File of biases to write, for expert_bias.initial");
  command->add_option("--tensor", options->source.tensor,
                      "Name of a layer's tensor, {} for its number (safetensors)");
  command
      ->add_option("--first-layer", options->source.first_layer,
                   "Id of the first row of an array without names")
      ->check(whole_number(0, 1'000'000));
  command->add_flag("--deployed", options->source.deployed,
                    "Of a run log or a state: without feed-forward and probes, as for deployment");
  add_format(*command, options->format, {"table", "json"});
  command->callback([&tool, options] { tool.run = [options] { return biases(*options); }; });
}

}  // namespace moectl::cli
