// What is added to RoutingStats beside the routing itself: values of a layer, norms, latencies, losses.
#include <algorithm>
#include <stdexcept>

#include "base/printable.h"
#include "measure/offence.h"
#include "measure/stats_checks.h"
#include "moectl/stats.h"

namespace moectl {

std::span<const RoutingStats::RecordedValue> RoutingStats::recorded_values() {
  static constexpr RecordedValue kValues[] = {
      {"balance_loss", kBalanceLossSum, kBalanceLossRecords},
      {"z_loss", kZLossSum, kZLossRecords},
      {"router_similarity", kRouterSimilaritySum, kRouterSimilarityRecords},
      {"router_condition", kRouterConditionSum, kRouterConditionRecords},
      {"expert_output_norm", kExpertOutputNormSum, kExpertOutputNormRecords},
      {"gradient_ratio", kGradientRatioSum, kGradientRatioRecords},
  };
  return kValues;
}

bool RoutingStats::add_value(std::string_view name, double value) {
  const auto values = recorded_values();
  const auto it = std::ranges::find(values, name, &RecordedValue::name);
  if (it == values.end()) {
    std::string names;
    for (const RecordedValue& known : values) (names += names.empty() ? "" : ", ") += known.name;
    throw std::invalid_argument("value: " + shown_briefly(name) + ": must be one of " + names);
  }
  if (!(value >= 0)) return false;
  std::fill(delta_.begin(), delta_.end(), 0);
  delta_[static_cast<std::size_t>(it->sum)] = to_fixed(std::min(value, kFixedMax));
  delta_[static_cast<std::size_t>(it->records)] = 1;
  return commit();
}

bool RoutingStats::add_observation(Array which, Scalar records, std::span<const double> values) {
  const char* const name = which == kGradNormSum ? "grad_norms" : "latencies";
  require_size(name, values.size(), static_cast<std::size_t>(experts()));
  if (array(which).empty()) return true;
  std::fill(delta_.begin(), delta_.end(), 0);
  const std::span<std::int64_t> to = delta(which);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (!(values[i] >= 0 && values[i] <= kFixedMax))
      return reject(offence_at(name, static_cast<std::int64_t>(i), values[i], "must be from 0 to 2^24"));
    to[i] = to_fixed(values[i]);
  }
  delta_[static_cast<std::size_t>(records)] = 1;
  return commit();
}

bool RoutingStats::add_grad_norms(std::span<const double> norms) {
  return add_observation(kGradNormSum, kGradRecords, norms);
}

bool RoutingStats::add_latencies(std::span<const double> seconds) {
  return add_observation(kLatencySum, kLatencyRecords, seconds);
}

bool RoutingStats::add_losses(Array sums, Array tokens, std::size_t at, std::span<const double> loss_sums,
                              std::span<const std::int64_t> covered) {
  require_size("loss_sums", loss_sums.size(), static_cast<std::size_t>(experts()));
  require_size("tokens", covered.size(), static_cast<std::size_t>(experts()));
  if (array(sums).empty()) return true;
  std::fill(delta_.begin(), delta_.end(), 0);
  const std::span<std::int64_t> to_sums = delta(sums).subspan(at), to_tokens = delta(tokens).subspan(at);
  for (std::size_t i = 0; i < loss_sums.size(); ++i) {
    const auto at_expert = static_cast<std::int64_t>(i);
    if (!fits_fixed(loss_sums[i]))
      return reject(
          offence_at("loss_sums", at_expert, loss_sums[i], "must be a number of magnitude at most 2^24"));
    if (covered[i] < 0) return reject(offence_at("tokens", at_expert, covered[i], "must be at least 0"));
    to_sums[i] = to_fixed(loss_sums[i]);
    to_tokens[i] = covered[i];
  }
  return commit();
}

bool RoutingStats::add_expert_losses(std::span<const double> loss_sums,
                                     std::span<const std::int64_t> tokens) {
  return add_losses(kExpertLossSum, kExpertLossTokens, 0, loss_sums, tokens);
}

bool RoutingStats::add_domain_losses(int domain, std::span<const double> loss_sums,
                                     std::span<const std::int64_t> tokens) {
  check_domain(shape_, domain);
  return add_losses(kDomainLossSum, kDomainLossTokens,
                    static_cast<std::size_t>(domain) * static_cast<std::size_t>(experts()), loss_sums,
                    tokens);
}

bool RoutingStats::add_token_losses(const TokenLosses& batch) {
  const std::size_t tokens = batch.losses.size(), k = static_cast<std::size_t>(top_k());
  require_size("experts", batch.experts.size(), tokens * k);
  if (!batch.mask.empty()) require_size("mask", batch.mask.size(), tokens);
  if (!batch.domain_ids.empty()) require_size("domain_ids", batch.domain_ids.size(), tokens);
  const auto n = static_cast<std::uint64_t>(experts());
  const bool by_domain = !batch.domain_ids.empty() && !array(kDomainLossSum).empty();
  if (!shape_.needs.losses && !by_domain) return true;
  std::fill(delta_.begin(), delta_.end(), 0);
  const std::span<std::int64_t> sums = delta(kExpertLossSum), covered = delta(kExpertLossTokens),
                                domain_sums = delta(kDomainLossSum),
                                domain_covered = delta(kDomainLossTokens);
  std::int64_t signs = 0;
  for (std::size_t t = 0; t < tokens; ++t) {
    if (!batch.mask.empty() && batch.mask[t] == 0) continue;
    const auto loss = static_cast<double>(batch.losses[t]);
    if (!fits_fixed(loss)) return reject(first_offence(shape_, batch));
    const std::int64_t term = to_fixed(loss), domain = by_domain ? batch.domain_ids[t] : 0;
    if (domain < 0 || (by_domain && domain >= shape_.needs.domains))
      return reject(first_offence(shape_, batch));
    for (std::size_t j = 0; j < k; ++j) {
      const auto expert = static_cast<std::uint64_t>(batch.experts[t * k + j]);
      if (batch.experts[t * k + j] == kNotRouted) continue;
      if (expert >= n) return reject(first_offence(shape_, batch));
      if (shape_.needs.losses) {
        sums[expert] = wrapping_add(sums[expert], term);
        signs |= beyond_half(sums[expert]);
        ++covered[expert];
      }
      if (by_domain) {
        const std::size_t at = static_cast<std::size_t>(domain) * n + expert;
        domain_sums[at] = wrapping_add(domain_sums[at], term);
        signs |= beyond_half(domain_sums[at]);
        ++domain_covered[at];
      }
    }
  }
  return commit(signs < 0 ? overflow_of("losses") : Offence{});
}

}  // namespace moectl
