#include "cli/simulate_fit.h"

#include <cstdint>
#include <iostream>
#include <optional>
#include <utility>

#include "cli/parts.h"
#include "cli/tool.h"
#include "moectl/run_log.h"

namespace moectl::cli {

TraceMoments moments_of(const std::string& path) {
  LogReader reader(path);
  // Early in training routers sharpen, and the end is not known: the sums begin anew at 1, 2, 4, 8, … steps, and the last but
  // one hold the later half of the steps or more.
  MomentSums sums, next;
  std::optional<std::int64_t> first;
  std::int64_t next_from = 0;
  WholeRecords records = whole_records(reader);
  while (const auto record = records.next()) {
    if (record->layer < 0 || record->tag != "train" || record->stats.assignments() == 0) continue;
    if (!first) {
      first = record->step;
      next_from = record->step + 1;
    }
    if (record->step - *first >= 2 * (next_from - *first)) {
      sums = std::exchange(next, {});
      next_from = record->step;
    }
    sums.add(record->layer, record->stats);
    if (record->step >= next_from) next.add(record->layer, record->stats);
  }
  say_faults(reader, path);
  return sums.moments();
}

void print_fit(const SimulationFit& fit, const std::string& path) {
  Table table({"moment", "trace", "simulated"});
  for (const auto& moment : fit.moments)
    table.add({moment.name, brief(moment.trace), brief(moment.simulated)});
  std::cerr
      << table.text() << "misfit " << brief(fit.misfit)
      << " (root mean square of the logarithms of simulated / trace; a step variance that chance explains is "
         "left out), later half of "
      << (path == "-" ? "standard input" : path) << '\n';
  for (const std::string& text : fit.untold) std::cerr << "not told by the trace: " << text << '\n';
  if (fit.coherence) {
    std::cerr << "coherence: " << brief(fit.coherence->first) << " to " << brief(fit.coherence->second)
              << " (95 %)\n";
  }
  std::cerr << "clusters: " << fit.clusters_from << " to " << fit.clusters_to
            << " fit alike; loads tell little of them\n";
}

}  // namespace moectl::cli
