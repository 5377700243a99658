#include "cli/metrics_loads.h"

#include <algorithm>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>

#include "cli/parts.h"
#include "import/steps.h"
#include "log/reshape.h"
#include "measure/percentiles.h"
#include "moectl/load_targets.h"

namespace moectl::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::pair<const char*, double> kShares[] = {
    {"p5", 0.05}, {"p25", 0.25}, {"p50", 0.5}, {"p75", 0.75}, {"p95", 0.95}};

struct Layer {
  std::vector<std::int64_t> counts;
  std::vector<double> targets;
  std::optional<RoutingStats> pairs;
};

/// Relative load and number of an expert.
using Loads = std::vector<std::pair<double, std::size_t>>;

/// Of the experts with a target above 0, from the least to the most loaded; of equals the lower number first.
Loads loads_of(const Layer& layer) {
  const LoadTargets targets(static_cast<int>(layer.counts.size()), layer.targets);
  double sum = 0;
  for (const std::int64_t count : layer.counts) sum += static_cast<double>(count);
  Loads loads;
  for (std::size_t i = 0; i < layer.counts.size() && sum > 0; ++i) {
    if (targets.is_wanted(i))
      loads.emplace_back(targets.relative(i, static_cast<double>(layer.counts[i]), sum), i);
  }
  std::ranges::sort(loads);
  return loads;
}

}  // namespace

int print_loads(LogReader& reader, Counted& counted,
                const std::function<MetricsOptions(const LogRecord&)>& options_of, std::size_t extremes,
                const std::string& format) {
  std::map<int, Layer> layers;
  WholeRecords records = whole_records(reader);
  while (const auto record = records.next()) {
    if (!counted.has_counts(*record) || record->tag != "train") continue;
    Layer& layer = layers[record->layer];
    const auto counts = record->stats.counts();
    if (layer.counts.empty()) layer.counts.resize(counts.size());
    layer.targets = options_of(*record).targets;
    if (layer.counts.size() != counts.size())
      throw InputError("layer " + std::to_string(record->layer) + ": experts must not change within a trace");
    for (std::size_t i = 0; i < counts.size(); ++i) layer.counts[i] = added(layer.counts[i], counts[i]);
    add_pairs(layer.pairs, record->stats);
  }
  if (layers.empty()) counted.fail("no record of a layer tagged 'train' has counts");

  std::vector<std::string> header = {"layer"};
  for (const auto& [name, share] : kShares) header.emplace_back(name);
  header.emplace_back("least");
  header.emplace_back("most");
  const bool paired =
      std::ranges::any_of(layers, [](const auto& entry) { return entry.second.pairs.has_value(); });
  if (paired) header.emplace_back("together");
  Table table(header);
  if (format == "csv") std::cout << "layer,p5,p25,p50,p75,p95,least,most" << (paired ? ",together\n" : "\n");
  const auto print = [&](const Json& layer, std::vector<double> values, const Json& least, const Json& most,
                         const std::vector<ExpertPair>& pairs) {
    if (values.empty()) return;
    Json line = {{"layer", layer}};
    std::vector<std::string> row = {layer.is_string() ? layer.get<std::string>() : layer.dump()};
    Percentiles percentiles(values);
    for (const auto& [name, share] : kShares) {
      const double value = percentiles.next(share);
      line[name] = value;
      row.push_back(format == "csv" ? exact(value) : brief(value));
    }
    line["least"] = least;
    line["most"] = most;
    std::string together;
    for (const ExpertPair& pair : pairs) {
      line["together"].push_back({pair.first, pair.second, pair.tokens, pair.lift});
      together += (together.empty() ? "e" : " e") + std::to_string(pair.first) + "+e" +
                  std::to_string(pair.second) + " x" + moectl::brief(pair.lift, 3);
    }
    if (format == "json") {
      std::cout << json_text(line) << '\n';
      return;
    }
    for (const Json& list : {least, most}) {
      std::string names;
      for (const Json& entry : list) {
        names += (names.empty() ? "" : " ") + ("e" + entry[0].dump()) + " x" +
                 moectl::brief(entry[1].get<double>(), 3);
      }
      row.push_back(names.empty() ? "-" : names);
    }
    if (paired) row.push_back(together.empty() ? "-" : together);
    if (format == "table") {
      table.add(std::move(row));
      return;
    }
    for (std::size_t i = 0; i < row.size(); ++i) std::cout << (i ? "," : "") << row[i];
    std::cout << '\n';
  };
  std::vector<double> all, max_vios;
  for (const auto& [number, layer] : layers) {
    const Loads loads = loads_of(layer);
    std::vector<double> values;
    for (const auto& [load, expert] : loads) values.push_back(load);
    all.insert(all.end(), values.begin(), values.end());
    if (!loads.empty()) max_vios.push_back(loads.back().first - 1);
    Loads falling = loads;  // of equals the lower number first here too
    std::ranges::sort(falling, [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    Json least = Json::array(), most = Json::array();
    for (std::size_t r = 0; r < std::min(extremes, loads.size()); ++r) {
      least.push_back({loads[r].second, loads[r].first});
      most.push_back({falling[r].second, falling[r].first});
    }
    std::vector<ExpertPair> pairs;
    if (layer.pairs) paired_experts(*layer.pairs, extremes, pairs);
    print(number, std::move(values), least, most, pairs);
  }
  print("all", std::move(all), Json::array(), Json::array(), {});
  print("max_vio", std::move(max_vios), Json::array(), Json::array(), {});
  if (format == "table") {
    std::cout
        << table.text()
        << "\nLoads over the mean (or over the target) of the counts summed over all training records; "
           "percentiles over experts. max_vio: percentiles over layers of the largest load - 1.\n"
        << (paired ? "together: tokens that chose both experts, over what independent choices would give.\n"
                   : "");
  }
  return 0;
}

}  // namespace moectl::cli
