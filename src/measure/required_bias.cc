// Required biases in RoutingStats: the bias with which an expert would have been a token's last choice.
#include <algorithm>
#include <cmath>

#include "measure/stats_checks.h"
#include "moectl/stats.h"

namespace moectl {

// After gather_margins, which has found the scores good.
void RoutingStats::gather_required(const RoutingBatch& batch) {
  if (routed_under_.empty() || batch.biased_scores.empty() || delta_[kTokens] == 0) return;
  const auto n = static_cast<std::size_t>(experts()), k = static_cast<std::size_t>(top_k());
  const std::size_t tokens = batch.biased_scores.size() / n;
  const auto required = [&](std::size_t t, std::size_t slots, std::size_t i) {
    const auto cutoff = static_cast<double>(batch.top_values[t * (k + 1) + slots]);
    return cutoff - (static_cast<double>(batch.biased_scores[t * n + i]) - routed_under_[i]);
  };
  if (shape_.needs.required_bins) {
    const std::span<std::int64_t> words = delta(kRequiredBins);
    for (std::size_t t = 0; t < tokens; ++t) {
      const std::size_t slots = last_slot(batch, t);
      if (slots == 0) continue;
      for (std::size_t i = 0; i < n; ++i) {
        const std::size_t bin = required_bin(required_range_, required(t, slots, i));
        words[i * kRequiredWords + bin / 2] += bin % 2 == 0 ? 1 : std::int64_t{1} << 32;
      }
    }
  }
  if (!shape_.needs.required_local) return;
  std::int64_t assignments = 0;
  for (const std::int64_t count : delta(kCounts)) assignments += count;
  const std::span<std::int64_t> sums = delta(kRequiredSum);
  for (std::size_t i = 0; i < n; ++i) {
    column_.clear();
    for (std::size_t t = 0; t < tokens; ++t) {
      if (const std::size_t slots = last_slot(batch, t); slots > 0) column_.push_back(required(t, slots, i));
    }
    const std::size_t rank = std::min(static_cast<std::size_t>(assignments) / n, column_.size() - 1);
    const auto at = column_.begin() + static_cast<std::ptrdiff_t>(rank);
    std::nth_element(column_.begin(), at, column_.end());
    sums[i] = to_fixed(fits_fixed(*at) ? *at : routed_under_[i]);
  }
  delta_[kRequiredRecords] = 1;
}

bool RoutingStats::has_required_bins() const {
  return shape_.needs.required_bins && tokens() > 0 && tokens() <= kMostRequiredTokens &&
         scalar(kMarginTokens) == tokens();
}

bool RoutingStats::has_required_local() const {
  return shape_.needs.required_local && tokens() > 0 && scalar(kMarginTokens) == tokens() &&
         scalar(kRequiredRecords) > 0;
}

std::span<const std::int64_t, kRequiredWords> RoutingStats::required_bins(int expert) const {
  check_expert(expert, experts(), shape_.needs.required_bins, "required_bins");
  return array(kRequiredBins)
      .subspan(static_cast<std::size_t>(expert) * kRequiredWords)
      .first<kRequiredWords>();
}

double RoutingStats::required_local(int expert) const {
  check_expert(expert, experts(), shape_.needs.required_local, "required_local");
  return from_fixed(array(kRequiredSum)[static_cast<std::size_t>(expert)]) /
         static_cast<double>(scalar(kRequiredRecords));
}

void RoutingStats::set_routed_under(std::span<const double> biases) {
  require_size("biases", biases.size(), static_cast<std::size_t>(experts()));
  if (routed_under_.empty()) return;
  std::copy(biases.begin(), biases.end(), routed_under_.begin());
  required_range_ = moectl::required_range(biases);
}

void RoutingStats::drop_required() {
  if (routed_under_.empty()) return;
  for (const Array which : {kRequiredBins, kRequiredSum}) std::ranges::fill(mutable_array(which), 0);
  set_scalar(kMarginTokens, 0);
  set_scalar(kRequiredRecords, 0);
}

}  // namespace moectl
