// What the tables of placement share: the rows of traces, how their means are judged, and what planners are told.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"

using Rows = std::vector<std::vector<double>>;  // by step, [N]

/// The mean of a series and its standard error, from 10 blocks.
struct Mean {
  double value = 0, error = 0;
};
inline Mean mean_of(const std::vector<double>& series) {
  const std::size_t blocks = std::min<std::size_t>(10, series.size());
  Mean mean;
  std::vector<double> of_block(blocks, 0.0);
  for (std::size_t b = 0; b < blocks; ++b) {
    const std::size_t from = b * series.size() / blocks, to = (b + 1) * series.size() / blocks;
    for (std::size_t i = from; i < to; ++i) of_block[b] += series[i] / static_cast<double>(to - from);
    mean.value += of_block[b] / static_cast<double>(blocks);
  }
  for (const double b : of_block) mean.error += (b - mean.value) * (b - mean.value);
  const auto n = static_cast<double>(blocks);
  mean.error = n > 1 ? std::sqrt(mean.error / (n - 1) / n) : 0;
  return mean;
}

/// The first `to` steps, added up to `most` rows or fewer [rows × N].
inline std::vector<double> joined(const Rows& steps, std::size_t to, std::size_t most) {
  const std::size_t n = steps[0].size(), rows = std::min(most, to);
  std::vector<double> sums(rows * n, 0.0);
  for (std::size_t s = 0; s < to; ++s) {
    for (std::size_t i = 0; i < n; ++i) sums[s * rows / to * n + i] += steps[s][i];
  }
  return sums;
}

/// Shares of at most 128 single steps, spread over the first `to` [rows × N].
inline std::vector<double> samples_of(const Rows& steps, std::size_t to) {
  std::vector<double> samples;
  const std::size_t rows = std::min<std::size_t>(128, to);
  for (std::size_t r = 0; r < rows; ++r) {
    const auto& step = steps[r * to / rows];
    double sum = 0;
    for (const double load : step) sum += load;
    for (const double load : step) samples.push_back(sum > 0 ? load / sum : 0);
  }
  return samples;
}

inline std::map<int, Rows> read(const std::string& path) {
  moectl::LogReader log(path, moectl::FaultPolicy::kRepair);
  std::map<int, Rows> layers;
  while (const auto record = log.next()) {
    if (record->layer < 0 || record->tag != "train" || record->stats.assignments() == 0) continue;
    const auto counts = record->stats.counts();
    layers[record->layer].emplace_back(counts.begin(), counts.end());
  }
  return layers;
}

inline std::map<int, Rows> simulated(const std::string& policy, int experts, int top_k, std::int64_t tokens,
                                     moectl::Scenario scenario, int steps, std::uint64_t seed) {
  moectl::ControllerConfig config = moectl::parse_config(
      "version: 1\nmodel: {layers: 2, experts: " + std::to_string(experts) +
      ", top_k: " + std::to_string(top_k) + "}\n" + "expert_bias: {policy: " + policy + "}\n");
  moectl::SimulationOptions plant = moectl::simulation_options(config);
  plant.tokens = tokens;
  plant.seed = seed;
  plant.scenario = scenario;
  plant.event_step = steps / 4;
  moectl::Controller controller(config);
  std::map<int, Rows> layers;
  moectl::simulate(controller, plant, steps, [&](const moectl::StepReport& report) {
    for (const auto& layer : report.layers) {
      const auto counts = layer.stats->counts();
      layers[layer.layer].emplace_back(counts.begin(), counts.end());
    }
  });
  return layers;
}
