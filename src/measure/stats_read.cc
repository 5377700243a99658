// What the sums of RoutingStats say.
#include <algorithm>
#include <cmath>

#include "measure/stats_checks.h"
#include "moectl/stats.h"

namespace moectl {
namespace {

// The share of the gaps that count as near: many enough to count, near enough to tell the density at zero.
constexpr double kNearShare = 0.2, kNearPrior = 64;

}  // namespace

std::optional<double> RoutingStats::mean_of(Scalar sum, Scalar records) const {
  if (scalar(records) <= 0) return std::nullopt;
  return from_fixed(scalar(sum)) / static_cast<double>(scalar(records));
}

double RoutingStats::mean_choices() const {
  const std::int64_t k = top_k();
  if (tokens() <= 0 || choices_sq() == wrapping_product(tokens(), k * k)) return static_cast<double>(k);
  return std::min(static_cast<double>(k), static_cast<double>(assignments()) / static_cast<double>(tokens()));
}

std::optional<double> RoutingStats::mean_gap() const {
  if (tokens() <= 0 || scalar(kGapTokens) != tokens()) return std::nullopt;
  return from_fixed(scalar(kGapSum)) / static_cast<double>(tokens());
}

void RoutingStats::set_gap_width(double width) {
  gap_width_ = fits_fixed(width) ? std::max<std::int64_t>(to_fixed(width), 0) : 0;
}

std::optional<double> RoutingStats::next_gap_width() const {
  const std::optional<double> gap = mean_gap();
  if (!gap) return std::nullopt;
  // Exponential gaps again: the share F lies below -ln(1-F) mean gaps.
  const double wanted = -std::log1p(-kNearShare);
  if (scalar(kGapWidthSum) <= 0) return wanted * *gap;
  std::int64_t total = 0;
  for (const std::int64_t n : array(kGapNear)) total = wrapping_add(total, n);
  // A few tokens say little, so they are counted together with some at the wanted share.
  const double seen = static_cast<double>(tokens());
  const double share = (static_cast<double>(total) + kNearShare * kNearPrior) / (seen + kNearPrior);
  if (!(share > 0)) return std::nullopt;
  const double ratio = share < 1 ? wanted / -std::log1p(-share) : 0.5;
  return std::clamp(ratio, 0.5, 2.0) * from_fixed(scalar(kGapWidthSum)) / seen;
}

// The gap of a token is how far its k-th choice may fall before it is lost. So the tokens whose k-th choice is i and
// whose gap is below a small width h, divided by h, tell how many of them a unit of bias moves. Within h the density
// falls off: where gaps are exponential, as near any threshold, h counts the share F of them and the density at zero is
// -ln(1-F)/F times the mean density up to h. A mean gap would be the simpler statistic, but far gaps rule it.
bool RoutingStats::load_slope(std::span<double> out) const {
  const std::int64_t tokens_seen = tokens();
  if (tokens_seen <= 0 || scalar(kGapTokens) != tokens_seen || scalar(kGapWidthSum) <= 0) return false;
  const std::span<const std::int64_t> near = array(kGapNear);
  std::int64_t total = 0;
  for (const std::int64_t n : near) total = wrapping_add(total, n);
  if (total <= 0 || total >= tokens_seen) return false;
  const double share = static_cast<double>(total) / static_cast<double>(tokens_seen);
  const double at_zero = -std::log1p(-share) / share;
  const double scale = at_zero * experts() / (mean_choices() * from_fixed(scalar(kGapWidthSum)));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = scale * static_cast<double>(near[i]);
  return true;
}

std::optional<double> RoutingStats::dropped() const {
  if (tokens() <= 0 || scalar(kDropTokens) != tokens()) return std::nullopt;
  return static_cast<double>(scalar(kDropped));
}

bool RoutingStats::has_sequences() const {
  return shape_.needs.sequences && scalar(kSequences) > 0 && scalar(kSequenceTokens) == tokens();
}

bool RoutingStats::has_probabilities() const {
  return shape_.needs.probabilities && tokens() > 0 && scalar(kProbTokens) == tokens();
}

bool RoutingStats::has_domains() const {
  return shape_.needs.domains > 0 && tokens() > 0 && scalar(kDomainTokens) == tokens();
}

bool RoutingStats::has_margins() const {
  return shape_.needs.margins && tokens() > 0 && scalar(kMarginTokens) == tokens();
}

std::span<const std::int64_t, kMarginBins> RoutingStats::margins(int expert) const {
  check_expert(expert, experts(), shape_.needs.margins, "margins");
  return array(kMargins).subspan(static_cast<std::size_t>(expert) * kMarginBins).first<kMarginBins>();
}

std::span<const std::int64_t> RoutingStats::domain_counts(int domain) const {
  check_domain(shape_, domain);
  const auto n = static_cast<std::size_t>(experts());
  return array(kDomainCounts).subspan(static_cast<std::size_t>(domain) * n, n);
}

std::int64_t RoutingStats::domain_tokens(int domain) const {
  std::int64_t sum = 0;
  for (const std::int64_t count : domain_counts(domain)) sum = wrapping_add(sum, count);
  if (choices_sq() == wrapping_product(tokens(), std::int64_t{top_k()} * top_k())) return sum / top_k();
  return std::llrint(static_cast<double>(sum) / mean_choices());
}

}  // namespace moectl
