// Metrics from the inputs beyond counts: probabilities, domains, gradients, losses, latencies.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/fast_log.h"
#include "measure/percentiles.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

constexpr double kNothing = 1e-12;   // below it, B or W is rounding
constexpr double kSaturated = 1e12;  // JSON has no infinity
constexpr double kAbsent = std::numeric_limits<double>::quiet_NaN();

double variance_of(std::span<const double> values) {
  const auto n = static_cast<double>(values.size());
  Double8 sum = splat(0), squares = splat(0);
  for_each_eight(values.size(), [&](std::size_t i, auto at) { sum += at.get(&values[i]); });
  const double mean = sum_of(sum) / n;
  for_each_eight(values.size(), [&](std::size_t i, auto at) {
    const Double8 off = at.keep(at.get(&values[i]) - mean);
    squares += off * off;
  });
  return sum_of(squares) / n;
}

bool means(const RoutingStats& stats, RoutingStats::Array sums, RoutingStats::Scalar records,
           std::span<double> out) {
  const std::span<const std::int64_t> values = stats.array(sums);
  const std::int64_t count = stats.scalar(records);
  if (values.empty() || count <= 0) return false;
  const double share = kFixedUnit / static_cast<double>(count);
  for_each_eight(out.size(), [&](std::size_t i, auto at) { at.put(&out[i], at.get(&values[i]) * share); });
  return true;
}

bool loads(const RoutingStats& stats, std::span<double> out) {
  const auto sum = static_cast<double>(stats.assignments());
  if (!(sum > 0)) return false;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<double>(stats.counts()[i]) / sum;
  return true;
}

bool grad_norms(const RoutingStats& stats, std::span<double> out) {
  return means(stats, RoutingStats::kGradNormSum, RoutingStats::kGradRecords, out);
}

bool latencies(const RoutingStats& stats, std::span<double> out) {
  return means(stats, RoutingStats::kLatencySum, RoutingStats::kLatencyRecords, out);
}

bool mean_losses(std::span<const std::int64_t> sums, std::span<const std::int64_t> tokens,
                 std::span<double> out) {
  std::int64_t any = 0;
  for (const std::int64_t count : tokens) any |= count;
  for_each_eight(sums.size(), [&](std::size_t i, auto at) {
    const Double8 count = at.get(&tokens[i]);
    at.put(&out[i], select(count, at.get(&sums[i]) * kFixedUnit / count, splat(kAbsent)));
  });
  return any != 0;
}

bool expert_losses(const RoutingStats& stats, std::span<double> out) {
  return mean_losses(stats.array(RoutingStats::kExpertLossSum), stats.array(RoutingStats::kExpertLossTokens),
                     out);
}

bool importances(const RoutingStats& stats, std::span<double> out) {
  if (!stats.has_probabilities()) return false;
  const auto sums = stats.array(RoutingStats::kProbSum);
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = from_fixed(sums[i]) / static_cast<double>(stats.tokens());
  return true;
}

bool load_slopes(const RoutingStats& stats, std::span<double> out) {
  return stats.load_slope(out);
}

constexpr ExpertField kExpertFields[] = {
    {"load", "", "c / S", loads},
    {"load_slope", "1/score", "relative load gained per unit of bias, from small gaps", load_slopes},
    {"importance", "", "mean_t p_ti", importances},
    {"grad_norm", "", "mean of the gradient norms recorded", grad_norms},
    {"expert_loss", "nats", "mean loss of the expert's tokens", expert_losses},
    {"latency", "s", "mean of the latencies recorded", latencies},
};

bool domain_shares(const RoutingStats& stats, int domain, std::span<double> out) {
  const std::span<const std::int64_t> counts = stats.domain_counts(domain);
  const auto sum = static_cast<double>(stats.assignments());
  if (!stats.has_domains() || !(sum > 0)) return false;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<double>(counts[i]) / sum;
  return true;
}

bool domain_losses(const RoutingStats& stats, int domain, std::span<double> out) {
  if (domain < 0 || domain >= stats.shape().needs.domains || !stats.shape().needs.domain_losses) return false;
  const std::size_t n = out.size(), at = static_cast<std::size_t>(domain) * n;
  return mean_losses(stats.array(RoutingStats::kDomainLossSum).subspan(at, n),
                     stats.array(RoutingStats::kDomainLossTokens).subspan(at, n), out);
}

constexpr DomainField kDomainFields[] = {
    {"domain_share", "", "c_di / S", domain_shares},
    {"domain_loss", "nats", "mean loss of the domain's tokens at the expert", domain_losses},
};

// Σ_d w_d KL(p_d || p) = H(p) - Σ_d w_d H(p_d), where w_d H(p_d) = (S_d ln S_d - Σ_i c_di ln c_di) / S; and
// H(w) beside it.
void measure_domains(const RoutingStats& stats, Metrics& out) {
  const std::size_t n = stats.counts().size();
  const auto total = static_cast<double>(stats.assignments());
  double information = *out.entropy * total, mixture_entropy = 0;
  for (int d = 0; d < stats.shape().needs.domains; ++d) {
    const std::span<const std::int64_t> of_domain = stats.domain_counts(d);
    std::int64_t sum = 0;
    for (const std::int64_t count : of_domain) sum += count;
    if (sum <= 0) continue;
    const auto s = static_cast<double>(sum);
    mixture_entropy -= s / total * std::log(s / total);
    Double8 c_ln_c = splat(0);
    for_each_eight(n, [&](std::size_t i, auto at) {
      const Double8 c = at.get(&of_domain[i]);
      c_ln_c += c * fast_log(larger(splat(1), c));
    });
    information += sum_of(c_ln_c) - s * std::log(s);
  }
  information /= total;
  // When the entropies cancel, only rounding is left. A single domain carries no information.
  const bool tells = information > kNothing && mixture_entropy > 0;
  out.domain_information = tells ? information : 0;
  if (mixture_entropy > kNothing)
    out.domain_exclusivity = tells ? std::min(information / mixture_entropy, 1.0) : 0;
}

}  // namespace

std::span<const ExpertField> expert_fields() {
  return kExpertFields;
}

std::span<const DomainField> domain_fields() {
  return kDomainFields;
}

Displacement displacement(std::span<const double> mean, std::span<const double> mean_root) {
  const double root_uniform = std::sqrt(1 / static_cast<double>(mean.size()));
  Double8 apart_sq = splat(0), overlap = splat(0);
  for_each_eight(mean.size(), [&](std::size_t i, auto at) {
    const Double8 root = at.get(&mean[i]).sqrt(), apart = at.keep(root - root_uniform);
    apart_sq += apart * apart;  // no cancellation near uniform
    overlap += at.get(&mean_root[i]) * root;
  });
  return {sum_of(apart_sq) / 2, 1 - sum_of(overlap)};
}

double fisher_distance(const Displacement& d) {
  return 4 * std::asin(std::sqrt(std::clamp(d.bias / 2, 0.0, 1.0)));
}

std::optional<double> fisher_ratio(const Displacement& d, int experts) {
  if (experts < 2) return std::nullopt;
  if (d.within >= kNothing) return std::min(d.bias / d.within, kSaturated);
  if (d.bias >= kNothing) return kSaturated;
  return std::nullopt;
}

double fisher_distance(std::span<const double> p, std::span<const double> q) {
  double sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double apart = std::sqrt(p[i]) - std::sqrt(q[i]);
    sum += apart * apart;
  }
  return 4 * std::asin(std::min(1.0, std::sqrt(sum) / 2));
}

void Measurer::measure_router(const RoutingStats& stats, Metrics& out) {
  if (!stats.has_probabilities()) return;
  const auto sums = stats.array(RoutingStats::kProbSum), roots = stats.array(RoutingStats::kSqrtProbSum);
  const auto tokens = static_cast<double>(stats.tokens());
  std::int64_t sum = 0;
  for (const std::int64_t of_expert : sums) sum += of_expert;
  if (sum <= 0) return;
  const auto total = static_cast<double>(sum);
  const double uniform = 1 / static_cast<double>(sums.size());
  Double8 entropy = splat(0), off_sq = splat(0);
  for_each_eight(sums.size(), [&](std::size_t i, auto at) {
    const Double8 p = at.get(&sums[i]) / total;  // rows sum to 1 but for the rounding of their terms
    entropy -= p * fast_log(select(p, p, splat(1)));
    const Double8 off = at.keep(p - uniform);
    off_sq += off * off;
    at.put(&mean_[i], p);
    at.put(&mean_root_[i], at.get(&roots[i]) * (kFixedUnit / tokens));
  });
  out.router_entropy = std::max(0.0, sum_of(entropy));
  out.token_entropy = from_fixed(stats.scalar(RoutingStats::kTokenEntropySum)) / tokens;
  out.expert_token_information = std::max(0.0, *out.router_entropy - *out.token_entropy);
  out.importance_cv = std::sqrt(sum_of(off_sq) / uniform);
  const Displacement d = displacement(mean_, mean_root_);
  out.router_fsi = fisher_distance(d);
  out.router_fhs = fisher_ratio(d, shape_.experts);
}

void Measurer::measure_experts(const RoutingStats& stats, Metrics& out) {
  if (stats.has_domains()) measure_domains(stats, out);
  out.pair_lift = largest_pair_lift(stats);
  if (shape_.needs.gradients && grad_norms(stats, mean_)) out.grad_norm_variance = variance_of(mean_);
  if (shape_.needs.latencies && latencies(stats, mean_)) {
    Percentiles of_experts(mean_);
    out.latency_p50 = of_experts.next(0.5);
    out.latency_p95 = of_experts.next(0.95);
    out.latency_p99 = of_experts.next(0.99);
  }
}

}  // namespace moectl
