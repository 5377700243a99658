// Placement beside EPLB's rules (tests/placement/eplb_peer.h): balancedness on steps that the plan has not seen, and time.
//   placement_table [TRACE…] [--served RUN]… [--recorded]
// TRACE: a trace or run log. --served: the recorded choices of a run log as a dump of a server. --recorded: these alone, and no rows of the
// simulated router.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "dumps.h"
#include "import/import.h"
#include "moectl/placement.h"
#include "placement/eplb_peer.h"
#include "placement_rows.h"

namespace {

using moectl::Placement;
using moectl::PlacementOptions;

/// The layers of a trace, or of a simulated run, planned on the first half and judged on the second.
void compare(const std::string& name, const std::map<int, Rows>& layers, int devices, int slots, double& won,
             int& traces) {
  std::vector<double> linear, eplb, ours, gain;
  for (const auto& [layer, steps] : layers) {
    const std::size_t half = steps.size() / 2, n = steps[0].size();
    const PlacementOptions options{.devices = devices, .slots = slots};
    const Placement now = moectl::linear_placement(static_cast<int>(n), options);
    const Placement theirs{devices, moectl::peer::eplb(joined(steps, half, 1), slots, 1, 1, devices)};
    const Placement plan =
        moectl::plan_placement(moectl::forecast_loads(joined(steps, half, 32), static_cast<int>(n)), options,
                               samples_of(steps, half));
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

/// What `moectl import` makes of a dump.
std::map<int, Rows> imported(const dumps::Dump& dump, const std::string& folder) {
  const std::string trace = folder + "/trace.jsonl";
  moectl::ImportOptions options;
  options.top_k = dump.top_k;
  const moectl::ImportReport report = moectl::import_trace(dump.format, dump.files, trace, options);
  for (const std::string& note : report.notes)
    std::fprintf(stderr, "%s: %s\n", dump.name.c_str(), note.c_str());
  return read(trace);
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
  const std::string folder =
      std::filesystem::temp_directory_path() / ("placement_table-" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  constexpr std::int64_t kDumpSteps = 400;
  bool recorded = false;
  for (int i = 1; i < argc; ++i) {
    const std::string path = argv[i];
    if (path == "--recorded") {
      recorded = true;
    } else if (path == "--served" && i + 1 < argc) {
      const dumps::Dump dump = dumps::sglang_served(folder, argv[++i], kDumpSteps);
      all_shapes(dump.name, imported(dump, folder));
    } else {
      all_shapes(path.substr(path.find_last_of('/') + 1), read(path));
    }
  }
  if (!recorded) {
    for (const auto make : {dumps::sglang_counts, dumps::vllm_responses, dumps::megatron_traces}) {
      const dumps::Dump dump = make(folder, kDumpSteps);
      all_shapes(dump.name, imported(dump, folder));
    }
  }
  std::filesystem::remove_all(folder);
  for (const char* policy : {"fixed", "sign_bias", "adaptive_bias"}) {
    if (recorded) break;
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
