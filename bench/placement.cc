// Placement beside EPLB's rules (tests/placement/eplb_peer.h): balancedness on steps that the plan has not seen, and time.
//   placement_table [TRACE…]: without traces, the simulated router alone.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/placement.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"
#include "placement/eplb_peer.h"

namespace {

using moectl::Placement;
using moectl::PlacementOptions;
using Rows = std::vector<std::vector<double>>;  // by step, [N]

/// The mean of a series and its standard error, from 10 blocks.
struct Mean {
  double value = 0, error = 0;
};
Mean mean_of(const std::vector<double>& series) {
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

std::vector<double> rows32(const Rows& steps, std::size_t to) {
  const std::size_t n = steps[0].size(), rows = std::min<std::size_t>(32, to);
  std::vector<double> sums(rows * n, 0.0);
  for (std::size_t s = 0; s < to; ++s) {
    for (std::size_t i = 0; i < n; ++i) sums[s * rows / to * n + i] += steps[s][i];
  }
  return sums;
}

/// The layers of a trace, or of a simulated run, planned on the first half and judged on the second.
void compare(const std::string& name, const std::map<int, Rows>& layers, int devices, int slots, double& won,
             int& traces) {
  std::vector<double> linear, eplb, ours, gain;
  for (const auto& [layer, steps] : layers) {
    const std::size_t half = steps.size() / 2, n = steps[0].size();
    const PlacementOptions options{.devices = devices, .slots = slots};
    std::vector<double> mean(n, 0.0);
    for (std::size_t s = 0; s < half; ++s) {
      for (std::size_t i = 0; i < n; ++i) mean[i] += steps[s][i];
    }
    const Placement now = moectl::linear_placement(static_cast<int>(n), options);
    const Placement theirs{devices, moectl::peer::eplb(mean, slots, 1, 1, devices)};
    std::vector<double> samples;
    const std::size_t rows = std::min<std::size_t>(128, half);
    for (std::size_t r = 0; r < rows; ++r) {
      const auto& step = steps[r * half / rows];
      double sum = 0;
      for (const double load : step) sum += load;
      for (const double load : step) samples.push_back(sum > 0 ? load / sum : 0);
    }
    const Placement plan = moectl::plan_placement(
        moectl::forecast_loads(rows32(steps, half), static_cast<int>(n)), options, samples);
    for (std::size_t s = half; s < steps.size(); ++s) {
      const std::size_t at = s - half;
      for (auto* series : {&linear, &eplb, &ours, &gain})
        series->resize(std::max(series->size(), at + 1), 0.0);
      const double weight = 1.0 / static_cast<double>(layers.size());
      const double e = balancedness(theirs, steps[s]), o = balancedness(plan, steps[s]);
      linear[at] += weight * balancedness(now, steps[s]);
      eplb[at] += weight * e;
      ours[at] += weight * o;
      gain[at] += weight * (o - e);
    }
  }
  const Mean difference = mean_of(gain);
  std::printf("| %s | %d, %d | %.3f | %.3f ± %.3f | %.3f | %+.4f ± %.4f |\n", name.c_str(), devices, slots,
              mean_of(linear).value, mean_of(eplb).value, mean_of(eplb).error, mean_of(ours).value,
              difference.value, difference.error);
  won += difference.value;
  ++traces;
}

std::map<int, Rows> read(const std::string& path) {
  moectl::LogReader log(path, moectl::FaultPolicy::kRepair);
  std::map<int, Rows> layers;
  while (const auto record = log.next()) {
    if (record->layer < 0 || record->tag != "train" || record->stats.assignments() == 0) continue;
    const auto counts = record->stats.counts();
    layers[record->layer].emplace_back(counts.begin(), counts.end());
  }
  return layers;
}

std::map<int, Rows> simulated(const std::string& policy, int experts, int top_k, std::int64_t tokens,
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

/// Processor time for 58 layers: a busy machine makes it no longer.
template <typename Plan>
double milliseconds(const Plan& plan) {
  double least = 1e9;
  for (int trial = 0; trial < 60; ++trial) {
    const std::clock_t start = std::clock();
    for (int layer = 0; layer < 58; ++layer) plan(layer);
    least = std::min(least, 1e3 * static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
  }
  return least;
}

}  // namespace

int main(int argc, char** argv) {
  double won = 0;
  int traces = 0;
  std::printf(
      "| trace | devices, slots | linear | EPLB | moectl | moectl - EPLB |\n|---|---|---|---|---|---|\n");
  const auto all_shapes = [&](const std::string& name, const std::map<int, Rows>& layers) {
    const auto n = static_cast<int>(layers.begin()->second[0].size());
    compare(name, layers, 4, n, won, traces);
    compare(name, layers, 4, n + n / 4, won, traces);
    compare(name, layers, 8, n + n / 2, won, traces);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string path = argv[i];
    if (path == "--recorded") continue;
    all_shapes(path.substr(path.find_last_of('/') + 1), read(path));
  }
  for (const char* policy : {"fixed", "sign_bias", "adaptive_bias"}) {
    if (argc > 1 && std::string(argv[argc - 1]) == "--recorded") break;
    for (const auto scenario :
         {moectl::Scenario::kSteady, moectl::Scenario::kShift, moectl::Scenario::kDrift}) {
      const std::string name =
          std::string("simulated 64, top-6, ") + policy + ", " + std::string(name_of(scenario));
      all_shapes(name, simulated(policy, 64, 6, 4096, scenario, 400, 1));
    }
  }
  std::printf("\nmean over %d rows: %+.4f\n", traces, won / traces);
  // Time: 58 layers x 256 experts, 288 slots on 32 devices.
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (const double spread : {0.1, 0.5, 1.0}) {
    std::vector<std::vector<double>> loads(58, std::vector<double>(256));
    for (auto& layer : loads) {
      for (double& load : layer) load = 1000 * std::exp(spread * normal(random));
    }
    std::size_t sum = 0;
    double theirs_even = 0, ours_even = 0;
    const double theirs = milliseconds(
        [&](int l) { sum += moectl::peer::eplb(loads[static_cast<std::size_t>(l)], 288, 1, 1, 32).size(); });
    const double ours = milliseconds([&](int l) {
      sum += moectl::plan_placement(loads[static_cast<std::size_t>(l)], {.devices = 32, .slots = 288})
                 .experts.size();
    });
    for (const auto& layer : loads) {
      theirs_even += balancedness(Placement{32, moectl::peer::eplb(layer, 288, 1, 1, 32)}, layer) / 58;
      ours_even += balancedness(moectl::plan_placement(layer, {.devices = 32, .slots = 288}), layer) / 58;
    }
    std::printf("58 x 256 -> 288 slots, spread %.1f: EPLB's rules %.2f ms (%.4f), moectl %.2f ms (%.4f)%s\n",
                spread, theirs, theirs_even, ours, ours_even, sum > 0 ? "" : "!");
  }
  return 0;
}
