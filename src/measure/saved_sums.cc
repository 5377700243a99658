#include "measure/saved_sums.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace moectl {

void exchange_sums(StateIo& io, std::string_view name, RoutingStats& stats) {
  const StatsShape& shape = stats.shape();
  std::string own =
      "experts " + std::to_string(shape.experts) + ", top_k " + std::to_string(shape.top_k) + ", sums";
  const StatsNeeds& n = shape.needs;
  for (const bool needed : {n.gap, n.sequences, n.probabilities, n.gradients, n.losses, n.domain_losses,
                            n.latencies, n.margins, n.margin_rows}) {
    own.append(needed ? " 1" : " 0");
  }
  own += ", domains " + std::to_string(n.domains) + ", split_sequences " + std::to_string(n.split_sequences);
  std::string saved = own;
  io.text("shape", saved);
  io.check(saved == own, "shape", "be \"" + own + "\", not \"" + saved + '"');
  // Any integer: sums that cannot be used hold a step, wherever they come from.
  io.values(name, stats.flat(), StateIo::kAnyInteger);
  if (!stats.shape().needs.margin_rows) return;
  std::vector<double> rows(stats.margin_rows().begin(), stats.margin_rows().end());
  io.list("margin_rows", rows, StateIo::kAnyNumber);
  if (!io.reads()) return;
  // What a record adds: tokens times experts, and nothing else.
  const auto experts = static_cast<std::size_t>(stats.experts());
  io.check(rows.size() % experts == 0 &&
               static_cast<std::int64_t>(rows.size() / experts) == stats.scalar(RoutingStats::kMarginTokens),
           "margin_rows", "have as many values as experts times tokens");
  io.check(std::none_of(rows.begin(), rows.end(), [](double x) { return std::isnan(x); }), "margin_rows",
           "hold numbers");
  stats.set_margin_rows(std::vector<float>(rows.begin(), rows.end()));
}

}  // namespace moectl
