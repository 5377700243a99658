// Metrics that sort, computed where they are asked for: percentiles of the load, and the churn of the next biases.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>

#include "measure/percentiles.h"
#include "moectl/metrics.h"

namespace moectl {

void Measurer::measure_details(std::span<const std::int64_t> counts, std::int64_t sum, Metrics& out) {
  std::size_t wanted = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (!targets_.is_wanted(i)) continue;
    mean_[wanted++] = targets_.relative(i, static_cast<double>(counts[i]), static_cast<double>(sum));
  }
  Percentiles of_experts(std::span<double>(mean_.data(), wanted));
  out.load_p5 = of_experts.next(0.05);
  out.load_p25 = of_experts.next(0.25);
  out.load_p50 = of_experts.next(0.5);
  out.load_p75 = of_experts.next(0.75);
  out.load_p95 = of_experts.next(0.95);
}

// A token changes its top-k if an unchosen expert overtakes a chosen one. While moves are small it is the first unchosen one
// j that overtakes the last chosen one i, where change_j - change_i exceeds their gap. The near gaps say how often i is last
// chosen (q_i), and how dense gaps are at zero (λ). With the two experts independent but different, a token is overtaken
// R = λ Σ_{i≠j} q_i q_j (change_j - change_i)⁺ / (1 - Σ q²) times; with larger moves by others as well, about as often for
// each of them. So the share that changes is that of a Poisson number above 0.
std::optional<double> estimate_churn(const RoutingStats& stats, std::span<const double> change,
                                     std::vector<std::pair<double, double>>& scratch) {
  const auto n = static_cast<std::size_t>(stats.experts());
  if (change.size() != n) {
    throw std::invalid_argument("change: " + std::to_string(change.size()) +
                                " values: must be one for each of " + std::to_string(n) + " experts");
  }
  const auto tokens = static_cast<double>(stats.tokens());
  if (stats.tokens() <= 0 || stats.scalar(RoutingStats::kGapTokens) != stats.tokens()) return std::nullopt;
  const double width = from_fixed(stats.scalar(RoutingStats::kGapWidthSum)) / tokens;
  const std::span<const std::int64_t> near = stats.array(RoutingStats::kGapNear);
  double total = 0;
  for (const std::int64_t c : near) total += static_cast<double>(c);
  if (!(width > 0 && total > 0 && total < tokens)) return std::nullopt;
  const double density = -std::log1p(-total / tokens) / width;
  scratch.resize(n);
  double same = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double q = static_cast<double>(near[i]) / total;
    if (!std::isfinite(change[i])) return std::nullopt;
    same += q * q;
    scratch[i] = {change[i], q};
  }
  if (!(1 - same > 1e-12)) return std::nullopt;  // one expert alone: nobody to change with is known
  std::sort(scratch.begin(), scratch.end());
  // In ascending order of the changes, each expert has those before it to overtake.
  double overtaken = 0, passed = 0, passed_moves = 0;
  for (const auto& [move, q] : scratch) {
    overtaken += q * std::max(0.0, move * passed - passed_moves);
    passed += q;
    passed_moves += q * move;
  }
  return -std::expm1(-density * overtaken / (1 - same));
}

}  // namespace moectl
