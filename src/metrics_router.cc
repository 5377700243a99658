// Metrics from what a router gives beyond counts: probabilities, domains, gradients, losses, latencies.
#include <algorithm>
#include <cmath>
#include <limits>

#include "fast_log.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

constexpr double kNothing = 1e-12;   // below it, B or W is rounding
constexpr double kSaturated = 1e12;  // JSON has no infinity
constexpr double kAbsent = std::numeric_limits<double>::quiet_NaN();

double mean_of(std::span<const double> values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

double variance_of(std::span<const double> values) {
  const double mean = mean_of(values);
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return sum / static_cast<double>(values.size());
}

// Between order statistics, linearly: the median of two is their mean.
double percentile(std::span<const double> sorted, double share) {
  const double at = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const double part = at - static_cast<double>(below);
  return part > 0 ? sorted[below] + part * (sorted[below + 1] - sorted[below]) : sorted[below];
}

bool means(const RoutingStats& stats, RoutingStats::Array sums, RoutingStats::Scalar records,
           std::span<double> out) {
  const std::span<const std::int64_t> values = stats.array(sums);
  const std::int64_t count = stats.scalar(records);
  if (values.empty() || count <= 0) return false;
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = from_fixed(values[i]) / static_cast<double>(count);
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

bool expert_losses(const RoutingStats& stats, std::span<double> out) {
  const auto sums = stats.array(RoutingStats::kExpertLossSum),
             tokens = stats.array(RoutingStats::kExpertLossTokens);
  bool any = false;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    out[i] = tokens[i] > 0 ? from_fixed(sums[i]) / static_cast<double>(tokens[i]) : kAbsent;
    any |= tokens[i] > 0;
  }
  return any;
}

bool importances(const RoutingStats& stats, std::span<double> out) {
  if (!stats.has_probabilities()) return false;
  const auto sums = stats.array(RoutingStats::kProbSum);
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = from_fixed(sums[i]) / static_cast<double>(stats.tokens());
  return true;
}

constexpr ExpertField kExpertFields[] = {
    {"load", "", "c / S", loads},
    {"importance", "", "mean_t p_ti", importances},
    {"grad_norm", "", "mean of the gradient norms recorded", grad_norms},
    {"expert_loss", "nats", "mean loss of the expert's tokens", expert_losses},
    {"latency", "s", "mean of the latencies recorded", latencies},
};

// Σ_d w_d KL(p_d || p) = Σ_di c_di / S · ln(c_di S / (S_d c_i)), and H(w) beside it.
void measure_domains(const RoutingStats& stats, Metrics& out) {
  const std::span<const std::int64_t> counts = stats.counts();
  const auto total = static_cast<double>(stats.assignments());
  double information = 0, mixture_entropy = 0;
  for (int d = 0; d < stats.shape().needs.domains; ++d) {
    const std::span<const std::int64_t> of_domain = stats.domain_counts(d);
    std::int64_t sum = 0;
    for (const std::int64_t count : of_domain) sum += count;
    if (sum <= 0) continue;
    const double share = static_cast<double>(sum) / total;
    mixture_entropy -= share * std::log(share);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      if (of_domain[i] <= 0 || counts[i] <= 0) continue;
      const double joint = static_cast<double>(of_domain[i]) / total;
      const double expected = share * static_cast<double>(counts[i]) / total;
      information += joint * fast_log(splat(joint / expected))[0];
    }
  }
  out.domain_information = std::max(0.0, information);
  // One domain alone tells nothing of exclusivity.
  if (mixture_entropy > kNothing)
    out.domain_exclusivity = std::clamp(information / mixture_entropy, 0.0, 1.0);
}

}  // namespace

std::span<const ExpertField> expert_fields() {
  return kExpertFields;
}

Displacement displacement(std::span<const double> mean, std::span<const double> mean_root) {
  const double root_uniform = std::sqrt(1 / static_cast<double>(mean.size()));
  Displacement d;
  double overlap = 0;
  for (std::size_t i = 0; i < mean.size(); ++i) {
    const double root = std::sqrt(mean[i]);
    d.bias += (root - root_uniform) * (root - root_uniform) / 2;  // no cancellation near uniform
    overlap += mean_root[i] * root;
  }
  d.within = 1 - overlap;
  return d;
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
  double total = 0;
  for (const std::int64_t sum : sums) total += from_fixed(sum);
  if (!(total > 0)) return;
  double entropy = 0;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    mean_[i] = from_fixed(sums[i]) / total;  // rows sum to 1 but for the rounding of their terms
    mean_root_[i] = from_fixed(roots[i]) / tokens;
    if (mean_[i] > 0) entropy -= mean_[i] * std::log(mean_[i]);
  }
  out.router_entropy = std::max(0.0, entropy);
  out.token_entropy = from_fixed(stats.scalar(RoutingStats::kTokenEntropySum)) / tokens;
  out.expert_token_information = std::max(0.0, *out.router_entropy - *out.token_entropy);
  out.importance_cv = std::sqrt(variance_of(mean_)) * static_cast<double>(mean_.size());
  const Displacement d = displacement(mean_, mean_root_);
  out.router_fsi = fisher_distance(d);
  out.router_fhs = fisher_ratio(d, shape_.experts);
}

void Measurer::measure_experts(const RoutingStats& stats, Metrics& out) {
  if (stats.has_domains()) measure_domains(stats, out);
  if (shape_.needs.gradients && grad_norms(stats, mean_)) out.grad_norm_variance = variance_of(mean_);
  if (shape_.needs.latencies && latencies(stats, mean_)) {
    std::sort(mean_.begin(), mean_.end());
    out.latency_p50 = percentile(mean_, 0.5);
    out.latency_p95 = percentile(mean_, 0.95);
    out.latency_p99 = percentile(mean_, 0.99);
  }
}

}  // namespace moectl
