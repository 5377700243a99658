// Co-selection: which experts the same tokens choose.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "measure/stats_checks.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

/// Tokens that independent choices must let expect of a pair before its lift is told: of ten, one standard
/// deviation is a third of them.
constexpr double kLeastExpected = 10;

/// Visits every pair that is expected often enough: its experts, its tokens and its lift.
template <typename Visit>
void for_each_pair(const RoutingStats& stats, Visit visit) {
  if (!stats.has_pairs() || stats.top_k() < 2) return;
  const std::span<const std::int64_t> counts = stats.counts(), both = stats.array(RoutingStats::kPairs);
  const auto tokens = static_cast<double>(stats.tokens());
  std::size_t at = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const auto of_first = static_cast<double>(counts[i]);
    for (std::size_t j = i + 1; j < counts.size(); ++j, ++at) {
      const double expected = of_first * static_cast<double>(counts[j]) / tokens;
      if (expected >= kLeastExpected) visit(i, j, both[at], static_cast<double>(both[at]) / expected);
    }
  }
}

/// Of the pairs (0, 1), (0, 2), ..., (1, 2), ... of n experts.
std::size_t index_of(std::size_t a, std::size_t b, std::size_t n) {
  const auto [low, high] = std::minmax(a, b);
  return low * (2 * n - low - 1) / 2 + (high - low - 1);
}

}  // namespace

std::size_t RoutingStats::pair_index(int expert, int other) const {
  check_expert(expert, experts(), shape_.needs.pairs, "pairs");
  check_expert(other, experts(), shape_.needs.pairs, "pairs");
  if (expert == other)
    throw std::invalid_argument("pair: expert " + std::to_string(expert) + " twice: must be two experts");
  return index_of(static_cast<std::size_t>(expert), static_cast<std::size_t>(other),
                  static_cast<std::size_t>(experts()));
}

bool RoutingStats::has_pairs() const {
  return shape_.needs.pairs && tokens() > 0 && scalar(kPairTokens) == tokens();
}

// Its experts are known to be in range. One that a token chose twice counts once: then no pair has more tokens than either
// of its experts.
void RoutingStats::gather_pairs(const RoutingBatch& batch) {
  if (!shape_.needs.pairs) return;
  const auto n = static_cast<std::size_t>(experts()), k = static_cast<std::size_t>(top_k());
  const std::span<std::int64_t> both = delta(kPairs);
  for (std::size_t t = 0; t < batch.experts.size() / k; ++t) {
    chosen_.clear();
    for (const std::int64_t expert : batch.experts.subspan(t * k, last_slot(batch, t))) {
      if (expert == kNotRouted || std::ranges::count(chosen_, expert) > 0) continue;
      for (const std::int64_t before : chosen_)
        ++both[index_of(static_cast<std::size_t>(before), static_cast<std::size_t>(expert), n)];
      chosen_.push_back(expert);
    }
  }
  delta_[kPairTokens] = delta_[kTokens];
}

void paired_experts(const RoutingStats& stats, std::size_t most, std::vector<ExpertPair>& out) {
  const auto before = [](const ExpertPair& a, const ExpertPair& b) {
    return std::tuple(-a.lift, -a.tokens, a.first, a.second) <
           std::tuple(-b.lift, -b.tokens, b.first, b.second);
  };
  out.clear();
  // A heap with the last one in front.
  for_each_pair(stats, [&](std::size_t i, std::size_t j, std::int64_t tokens, double lift) {
    const ExpertPair pair{static_cast<int>(i), static_cast<int>(j), tokens, lift};
    if (out.size() < most) {
      out.push_back(pair);
    } else if (most > 0 && before(pair, out.front())) {
      std::pop_heap(out.begin(), out.end(), before);
      out.back() = pair;
    } else {
      return;
    }
    std::push_heap(out.begin(), out.end(), before);
  });
  std::sort_heap(out.begin(), out.end(), before);
}

std::optional<double> largest_pair_lift(const RoutingStats& stats) {
  std::optional<double> largest;
  for_each_pair(stats, [&](std::size_t, std::size_t, std::int64_t, double lift) {
    largest = std::max(largest.value_or(0), lift);
  });
  return largest;
}

}  // namespace moectl
