#include "measure/saved_sums.h"

#include <cmath>
#include <utility>
#include <vector>

namespace moectl {

void save_sums(StateWriter& out, std::string_view name, const RoutingStats& stats) {
  out.put(name, stats.flat());
  if (!stats.shape().needs.margin_rows) return;
  const std::vector<double> rows(stats.margin_rows().begin(), stats.margin_rows().end());
  out.put("margin_row_values", static_cast<std::int64_t>(rows.size()));
  out.put("margin_rows", rows);
}

void load_sums(StateReader& in, std::string_view name, RoutingStats& stats) {
  in.get(name, stats.flat());
  if (!stats.shape().needs.margin_rows) return;
  const std::int64_t size = in.get_int("margin_row_values");
  // A record adds exactly tokens × experts margins.
  if (size != stats.scalar(RoutingStats::kMarginTokens) * stats.experts()) {
    throw StateError("margin_row_values: " + std::to_string(size) + ": must be experts times tokens");
  }
  std::vector<double> rows(static_cast<std::size_t>(size));
  in.get("margin_rows", rows);
  for (const double value : rows) {
    if (std::isnan(value)) throw StateError("margin_rows: a saved value is not a number");
  }
  stats.set_margin_rows(std::vector<float>(rows.begin(), rows.end()));
}

}  // namespace moectl
