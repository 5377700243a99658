#include "log/reshape.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "moectl/run_log.h"

namespace moectl {

RoutingStats reshaped(const RoutingStats& stats, const std::vector<std::string>& domains,
                      const StatsNeeds& needs, const std::vector<std::string>& wanted_domains) {
  using S = RoutingStats;
  RoutingStats out({.experts = stats.experts(), .top_k = stats.top_k(), .needs = needs});
  const auto copy_scalars = [&](std::initializer_list<S::Scalar> scalars) {
    for (const S::Scalar which : scalars) out.set_scalar(which, stats.scalar(which));
  };
  const auto copy_arrays = [&](std::initializer_list<S::Array> arrays) {
    for (const S::Array which : arrays)
      std::ranges::copy(stats.array(which), out.mutable_array(which).begin());
  };
  const StatsNeeds& has = stats.shape().needs;
  copy_scalars({S::kTokens, S::kChoicesSq, S::kInvalidRecords, S::kDropped, S::kDropTokens});
  for (const auto& [name, sum, records] : S::recorded_values()) copy_scalars({sum, records});
  copy_arrays({S::kCounts});
  if (needs.gap && has.gap) {
    copy_scalars({S::kGapSum, S::kGapTokens, S::kGapWidthSum});
    copy_arrays({S::kGapNear});
  }
  if (needs.sequences && has.sequences) {
    copy_scalars({S::kSequences, S::kSequenceTokens, S::kSequenceLenSq});
    copy_arrays({S::kSequenceSq, S::kSequenceCross});
  }
  if (needs.probabilities && has.probabilities) {
    copy_scalars({S::kProbTokens, S::kTokenEntropySum});
    copy_arrays({S::kProbSum, S::kSqrtProbSum});
  }
  if (needs.gradients && has.gradients) {
    copy_scalars({S::kGradRecords});
    copy_arrays({S::kGradNormSum});
  }
  if (needs.latencies && has.latencies) {
    copy_scalars({S::kLatencyRecords});
    copy_arrays({S::kLatencySum});
  }
  if (needs.margins && has.margins) {
    copy_scalars({S::kMarginTokens});
    copy_arrays({S::kMargins});
  }
  if (needs.pairs && has.pairs) {
    copy_scalars({S::kPairTokens});
    copy_arrays({S::kPairs});
  }
  if (needs.losses && has.losses) copy_arrays({S::kExpertLossSum, S::kExpertLossTokens});
  const bool domain_losses = needs.domain_losses && has.domain_losses;
  std::int64_t tokens = 0;
  std::map<std::string_view, int> places;
  for (std::size_t d = 0; d < domains.size() && needs.domains > 0; ++d) {
    places.try_emplace(domains[d], static_cast<int>(d));
  }
  for (std::size_t d = 0; d < wanted_domains.size() && needs.domains > 0; ++d) {
    const auto it = places.find(wanted_domains[d]);
    if (it == places.end()) continue;
    const int from = it->second;
    const auto to = out.mutable_array(S::kDomainCounts).subspan(d * stats.counts().size());
    std::ranges::copy(stats.domain_counts(from), to.begin());
    tokens += stats.domain_tokens(from);
    for (const S::Array which : {S::kDomainLossSum, S::kDomainLossTokens}) {
      if (!domain_losses) break;
      const auto n = stats.counts().size();
      std::ranges::copy(stats.array(which).subspan(static_cast<std::size_t>(from) * n, n),
                        out.mutable_array(which).subspan(d * n).begin());
    }
  }
  // All tokens, or a number that differs from them: what is partial is absent.
  if (!wanted_domains.empty() && needs.domains > 0) {
    const std::set<std::string_view> wanted(wanted_domains.begin(), wanted_domains.end());
    const bool all =
        std::ranges::all_of(domains, [&](const std::string& name) { return wanted.contains(name); });
    out.set_scalar(S::kDomainTokens, all ? stats.scalar(S::kDomainTokens) : std::min(tokens, stats.tokens()));
  }
  return out;
}

void add_pairs(std::optional<RoutingStats>& sum, const RoutingStats& more) {
  if (!more.has_pairs()) return;
  RoutingStats pairs = reshaped(more, {}, {.pairs = true}, {});
  if (sum && sum->shape() == pairs.shape()) {
    *sum += pairs;
  } else {
    sum = std::move(pairs);
  }
}

void add_recorded(RoutingStats& sum, std::vector<std::string>& domains, const RoutingStats& more,
                  const std::vector<std::string>& more_domains) {
  const StatsNeeds &a = sum.shape().needs, &b = more.shape().needs;
  StatsNeeds needs = a;
  needs |= b;
  needs.gap = a.gap && b.gap;
  needs.sequences = a.sequences && b.sequences;
  needs.probabilities = a.probabilities && b.probabilities;
  needs.margins = a.margins && b.margins;
  needs.pairs = a.pairs && b.pairs;
  std::vector<std::string> all;
  if (a.domains > 0 && b.domains > 0) {
    std::set_union(domains.begin(), domains.end(), more_domains.begin(), more_domains.end(),
                   std::back_inserter(all));
  }
  needs.domains = static_cast<int>(all.size());
  sum = reshaped(sum, domains, needs, all);
  sum += reshaped(more, more_domains, needs, all);
  domains = std::move(all);
}

void require_range(const RoutingStats& sum, int layer, const std::string& added) {
  if (sum.valid()) return;
  throw LogError("layer " + std::to_string(layer) + ": " + added + ": their sums must be at most 2^63 - 1");
}

}  // namespace moectl
