#include "measure/saved_sums.h"

#include <string>

namespace moectl {

void exchange_sums(StateIo& io, std::string_view name, RoutingStats& stats) {
  const StatsShape& shape = stats.shape();
  std::string own =
      "experts " + std::to_string(shape.experts) + ", top_k " + std::to_string(shape.top_k) + ", sums";
  const StatsNeeds& n = shape.needs;
  for (const bool needed : {n.gap, n.sequences, n.probabilities, n.gradients, n.losses, n.domain_losses,
                            n.latencies, n.margins, n.pairs, n.required_bins, n.required_local}) {
    own.append(needed ? " 1" : " 0");
  }
  own += ", domains " + std::to_string(n.domains) + ", split_sequences " + std::to_string(n.split_sequences);
  std::string saved = own;
  io.text("shape", saved);
  io.check(saved == own, "shape", "be \"" + own + "\", not \"" + saved + '"');
  // Any integer: sums that cannot be used hold a step, wherever they come from.
  io.values(name, stats.flat(), StateIo::kAnyInteger);
}

}  // namespace moectl
