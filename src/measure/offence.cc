#include "measure/offence.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/format.h"
#include "measure/stats_checks.h"

namespace moectl {
namespace {

template <class... Values>
Offence written(const char* format, Values... values) {
  Offence offence;
  const int size = std::snprintf(offence.text.data(), offence.text.size(), format, values...);
  offence.size = std::min(static_cast<std::size_t>(std::max(size, 0)), offence.text.size() - 1);
  return offence;
}

Offence offence_of(std::string_view field, std::int64_t index, std::string_view value,
                   std::string_view constraint) {
  const auto size = [](std::string_view text) { return static_cast<int>(text.size()); };
  if (index < 0) {
    return written("%.*s = %.*s: %.*s", size(field), field.data(), size(value), value.data(),
                   size(constraint), constraint.data());
  }
  return written("%.*s[%lld] = %.*s: %.*s", size(field), field.data(), static_cast<long long>(index),
                 size(value), value.data(), size(constraint), constraint.data());
}

/// "must be in [0, N)".
class Below {
 public:
  explicit Below(int end) { size_ = std::snprintf(text_.data(), text_.size(), "must be in [0, %d)", end); }
  std::string_view words() const { return {text_.data(), static_cast<std::size_t>(size_)}; }

 private:
  std::array<char, 40> text_;
  int size_;
};

bool is_padding(std::span<const std::uint8_t> mask, std::size_t token) {
  return !mask.empty() && mask[token] == 0;
}

// Calls `look(token)` for each real token until it returns an offence.
template <class Look>
Offence over_tokens(std::size_t tokens, std::span<const std::uint8_t> mask, const Look& look) {
  for (std::size_t t = 0; t < tokens; ++t) {
    if (is_padding(mask, t)) continue;
    if (const Offence found = look(t); !found.empty()) return found;
  }
  return {};
}

// The first of `width` elements of token t that is not `good`.
template <class T, class Good>
Offence in_row(std::string_view field, std::span<const T> values, std::size_t t, std::size_t width,
               std::string_view constraint, const Good& good) {
  using Shown = std::conditional_t<std::is_integral_v<T>, std::int64_t, double>;
  for (std::size_t i = t * width; i < (t + 1) * width; ++i) {
    if (!good(values[i]))
      return offence_at(field, static_cast<std::int64_t>(i), static_cast<Shown>(values[i]), constraint);
  }
  return {};
}

// Of an expert, or -1 for a slot that is not routed.
auto expert_below(int end) {
  return [end](std::int64_t index) { return index >= -1 && index < end; };
}

auto below(int end) {
  return [end](std::int64_t index) { return index >= 0 && index < end; };
}

constexpr auto kScalarNames = std::to_array<const char*>({"tokens",
                                                          "choices_sq",
                                                          "invalid_records",
                                                          "gap_sum",
                                                          "gap_tokens",
                                                          "gap_width_sum",
                                                          "sequences",
                                                          "sequence_tokens",
                                                          "sequence_len_sq",
                                                          "beyond_split",
                                                          "prob_tokens",
                                                          "token_entropy_sum",
                                                          "dropped",
                                                          "drop_tokens",
                                                          "domain_tokens",
                                                          "grad_records",
                                                          "latency_records",
                                                          "balance_loss",
                                                          "balance_loss_records",
                                                          "z_loss",
                                                          "z_loss_records",
                                                          "router_similarity",
                                                          "router_similarity_records",
                                                          "router_condition",
                                                          "router_condition_records",
                                                          "expert_output_norm",
                                                          "expert_output_norm_records",
                                                          "gradient_ratio",
                                                          "gradient_ratio_records",
                                                          "margin_tokens",
                                                          "pair_tokens",
                                                          "required_records"});
static_assert(kScalarNames.size() == RoutingStats::kScalarCount);
constexpr auto kArrayNames = std::to_array<const char*>(
    {"counts", "gap_near", "sequence_sq", "sequence_cross", "split_counts", "prob_sum", "sqrt_prob_sum",
     "grad_norm", "latency", "loss_tokens", "margins", "pairs", "required_bins", "domain_counts",
     "domain_loss_tokens", "expert_loss", "domain_loss", "required_sum"});
static_assert(kArrayNames.size() == RoutingStats::kArrayCount);

constexpr std::int64_t kFar = std::int64_t{1} << 62;

// ---- Parts and wholes. ----

// A sum that is more than what it is part of.
struct Excess {
  const char* field = nullptr;  // none if null
  std::int64_t index = -1;
  const char* whole = "";
  std::int64_t most = 0;
};

std::int64_t product_or_most(std::int64_t a, std::int64_t b) {
  std::int64_t product = 0;
  return __builtin_mul_overflow(a, b, &product) ? std::numeric_limits<std::int64_t>::max() : product;
}

// Whether two counts a word, of fewer than 2^26 words, sum to more than `most`.
bool halves_exceed(std::span<const std::int64_t> words, std::int64_t most) {
  std::int64_t sum = 0;
  for (const std::int64_t word : words) sum += (word & 0xffffffff) + (word >> 32);
  return sum > most;
}

// The first expert whose `width` numbers of `array` sum to more than `most`; -1 if there is none.
template <class Exceeds>
std::int64_t first_above(std::span<const std::int64_t> array, std::size_t width, std::int64_t most,
                         const Exceeds& exceeds) {
  for (std::size_t from = 0; from < array.size(); from += width) {
    if (exceeds(array.subspan(from, width), most)) return static_cast<std::int64_t>(from / width);
  }
  return -1;
}

Excess first_excess(const RoutingStats& sums) {
  using S = RoutingStats;
  const std::int64_t tokens = sums.tokens(), k = sums.top_k(), assignments = sums.assignments();
  for (const S::Scalar part : {S::kGapTokens, S::kSequenceTokens, S::kBeyondSplit, S::kProbTokens,
                               S::kDropTokens, S::kDomainTokens, S::kMarginTokens, S::kPairTokens}) {
    if (sums.scalar(part) > tokens)
      return {kScalarNames[static_cast<std::size_t>(part)], -1, "tokens", tokens};
  }
  if (sums.choices_sq() > product_or_most(assignments, k))
    return {"choices_sq", -1, "the assignments * top_k", product_or_most(assignments, k)};
  if (sums.scalar(S::kDropped) > assignments) return {"dropped", -1, "the assignments", assignments};
  // A token's distribution has at most the entropy of N equal shares, and what rounding adds, in half precision 0.4 %.
  if (const std::int64_t of_tokens = sums.scalar(S::kProbTokens); of_tokens > 0) {
    const double largest = 1 + 1.01 * std::log(sums.experts()) * static_cast<double>(of_tokens);
    if (from_fixed(sums.scalar(S::kTokenEntropySum)) > largest)
      return {"token_entropy_sum", -1, "ln(experts) for each token", std::llrint(largest)};
  }
  const std::span<const std::int64_t> counts = sums.counts(), near = sums.array(S::kGapNear);
  std::int64_t signs = 0;  // of differences of numbers of at least 0
  for (std::size_t i = 0; i < near.size(); ++i) signs |= counts[i] - near[i];
  for (std::size_t i = 0; signs < 0 && i < near.size(); ++i) {
    if (near[i] > counts[i]) return {"gap_near", static_cast<std::int64_t>(i), "the count", counts[i]};
  }
  if (sum_exceeds(near, sums.scalar(S::kGapTokens)))
    return {"gap_near: the sum", -1, "gap_tokens", sums.scalar(S::kGapTokens)};
  const std::span<const std::int64_t> squares = sums.array(S::kSequenceSq),
                                      cross = sums.array(S::kSequenceCross);
  if (!squares.empty()) {
    // The lengths of sequences, in assignments, are the sums of what their experts got.
    const std::int64_t lengths = sums.scalar(S::kSequenceLenSq);
    if (sums.scalar(S::kSequences) > tokens) return {"sequences", -1, "tokens", tokens};
    if (sum_exceeds(cross, lengths)) return {"sequence_cross: the sum", -1, "sequence_len_sq", lengths};
    std::int64_t all = 0;
    for (const std::int64_t of_expert : cross) all += of_expert;
    if (all < lengths) return {"sequence_len_sq", -1, "the sum of sequence_cross", all};
    for (std::size_t i = 0; i < squares.size(); ++i) {
      if (squares[i] > cross[i])
        return {"sequence_sq", static_cast<std::int64_t>(i), "sequence_cross", cross[i]};
    }
  }
  const std::span<const std::int64_t> domains = sums.array(S::kDomainCounts);
  for (std::size_t i = 0; i < counts.size() && !domains.empty(); ++i) {
    std::int64_t left = counts[i];
    for (std::size_t at = i; at < domains.size() && left >= 0; at += counts.size()) left -= domains[at];
    if (left < 0)
      return {"domain_counts: the sum over domains", static_cast<std::int64_t>(i), "the count", counts[i]};
  }
  if (const auto i = first_above(sums.array(S::kMargins), kMarginBins, tokens, sum_exceeds); i >= 0)
    return {"margins: the sum", i, "tokens", tokens};
  const std::int64_t most_pairs = product_or_most(sums.scalar(S::kPairTokens), k * (k - 1) / 2);
  if (sum_exceeds(sums.array(S::kPairs), most_pairs))
    return {"pairs: the sum", -1, "pair_tokens * top_k (top_k - 1)/2", most_pairs};
  // Of more tokens the two counts of a word may run into each other, and nobody reads them.
  if (tokens > kMostRequiredTokens) return {};
  if (const auto i = first_above(sums.array(S::kRequiredBins), kRequiredWords, tokens, halves_exceed); i >= 0)
    return {"required_bins: the sum", i, "tokens", tokens};
  return {};
}

// A negative sum: one that was negative, or that wrapped around.
Offence negative(const char* field, std::int64_t index, std::int64_t value) {
  return value < -kFar ? overflow_of(field) : offence_at(field, index, value, "must be at least 0");
}

}  // namespace

Offence offence_at(std::string_view field, std::int64_t index, std::int64_t value,
                   std::string_view constraint) {
  return offence_of(field, index, Number(value).text(), constraint);
}

Offence offence_at(std::string_view field, std::int64_t index, double value, std::string_view constraint) {
  return offence_of(field, index, std::isnan(value) ? "nan" : Number(value, 6).text(),
                    constraint);  // not "-nan"
}

Offence overflow_of(std::string_view field) {
  return written("%.*s: the sum is beyond its range", static_cast<int>(field.size()), field.data());
}

CheckedCounts check_counts(const StatsShape& shape, std::span<const std::int64_t> counts, std::int64_t tokens,
                           std::optional<std::int64_t> choices_sq) {
  const std::int64_t k = shape.top_k;
  if (tokens < 0) return {offence_at("tokens", -1, tokens, "must be at least 0")};
  std::int64_t sum = 0, most = 0;
  bool above = false;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (counts[i] < 0)
      return {offence_at("counts", static_cast<std::int64_t>(i), counts[i], "must be at least 0")};
    above |= __builtin_add_overflow(sum, counts[i], &sum);
  }
  if (above) return {overflow_of("counts")};
  if (__builtin_mul_overflow(tokens, k, &most)) most = std::numeric_limits<std::int64_t>::max();
  if (sum > most) {
    return {written("counts: sum %lld: must be at most tokens * top_k (%lld)", static_cast<long long>(sum),
                    static_cast<long long>(most))};
  }
  if (tokens == 0) return {};
  // Of numbers from 0 to k with this sum, the squares sum to the least if they are even, and to the most if as many as
  // possible are k.
  const std::int64_t each = sum / tokens, rest = sum % tokens;
  std::int64_t least = 0, largest = 0;
  if (__builtin_mul_overflow(sum, k, &largest)) return {overflow_of("choices_sq")};
  least = each * sum + (each + 1) * rest;
  largest -= (sum % k) * (k - sum % k);
  if (!choices_sq) return {{}, least};
  if (*choices_sq >= least && *choices_sq <= largest) return {{}, *choices_sq};
  return {written(
      "choices_sq = %lld: must be from %lld to %lld, the sums of squares of %lld numbers up to %lld "
      "that sum to %lld",
      static_cast<long long>(*choices_sq), static_cast<long long>(least), static_cast<long long>(largest),
      static_cast<long long>(tokens), static_cast<long long>(k), static_cast<long long>(sum))};
}

// In the order in which RoutingStats::add checks.
Offence first_offence(const StatsShape& shape, const RoutingBatch& batch) {
  const StatsNeeds& needs = shape.needs;
  const auto n = static_cast<std::size_t>(shape.experts), k = static_cast<std::size_t>(shape.top_k);
  const std::size_t tokens = batch.experts.size() / k;
  const Below experts(shape.experts), domains(needs.domains);
  const auto look = [&](const auto& each) { return over_tokens(tokens, batch.mask, each); };
  constexpr double kMost = std::numeric_limits<float>::max();

  Offence found = look([&](std::size_t t) {
    return in_row("experts", batch.experts, t, k, experts.words(), expert_below(shape.experts));
  });
  if (!found.empty()) return found;
  if (needs.sequences) {
    for (std::size_t t = 1; t < batch.sequence_ids.size(); ++t) {
      if (batch.sequence_ids[t] < batch.sequence_ids[t - 1])
        return offence_at("sequence_ids", static_cast<std::int64_t>(t), batch.sequence_ids[t],
                          "must not be below the id before it");
    }
  }
  if (needs.domains > 0 && !batch.domain_ids.empty()) {
    found = look([&](std::size_t t) {
      return in_row("domain_ids", batch.domain_ids, t, 1, domains.words(), below(needs.domains));
    });
    if (!found.empty()) return found;
  }
  const std::span<const float> top = batch.top_values;
  if (needs.gap && !top.empty()) {
    found = look([&](std::size_t t) -> Offence {
      const std::size_t last = t * (k + 1) + k;
      const double gap = static_cast<double>(top[last - 1]) - static_cast<double>(top[last]);
      if (gap >= 0 && gap <= kFixedMax) return {};
      const std::size_t at = std::isfinite(top[last - 1]) ? last : last - 1;
      return offence_at("top_values", static_cast<std::int64_t>(at), static_cast<double>(top[at]),
                        "must be finite, largest first, at most 2^24 apart");
    });
    if (!found.empty()) return found;
  }
  if (needs.biased_scores() && !batch.biased_scores.empty()) {
    found = look([&](std::size_t t) -> Offence {
      const std::size_t last = t * (k + 1) + k;
      for (const std::size_t at : {last - 1, last}) {
        if (!std::isfinite(top[at]))
          return offence_at("top_values", static_cast<std::int64_t>(at), static_cast<double>(top[at]),
                            "must be finite");
      }
      return in_row("biased_scores", batch.biased_scores, t, n, "must be a number below infinity",
                    [](float score) { return static_cast<double>(score) <= kMost; });
    });
    if (!found.empty()) return found;
  }
  if (needs.probabilities && !batch.probabilities.empty()) {
    found = look([&](std::size_t t) -> Offence {
      const auto bad = in_row("probabilities", batch.probabilities, t, n, "must be finite and at least 0",
                              [](float p) { return p >= 0 && static_cast<double>(p) <= kMost; });
      if (!bad.empty()) return bad;
      const auto row = batch.probabilities.subspan(t * n, n);
      if (std::any_of(row.begin(), row.end(), [](float p) { return p > 0; })) return {};
      return offence_at("probabilities", static_cast<std::int64_t>(t * n), 0.0,
                        "one of the token's must be above 0");
    });
    if (!found.empty()) return found;
  }
  if (batch.dropped && *batch.dropped < 0)
    return offence_at("dropped", -1, *batch.dropped, "must be at least 0");
  return {};
}

Offence first_offence(const StatsShape& shape, const TokenLosses& batch) {
  const auto k = static_cast<std::size_t>(shape.top_k);
  const Below experts(shape.experts), domains(shape.needs.domains);
  return over_tokens(batch.losses.size(), batch.mask, [&](std::size_t t) {
    Offence found = in_row("losses", batch.losses, t, 1, "must be a number of magnitude at most 2^24",
                           [](float loss) { return fits_fixed(static_cast<double>(loss)); });
    if (found.empty() && shape.needs.domain_losses && !batch.domain_ids.empty())
      found = in_row("domain_ids", batch.domain_ids, t, 1, domains.words(), below(shape.needs.domains));
    if (!found.empty()) return found;
    return in_row("experts", batch.experts, t, k, experts.words(), expert_below(shape.experts));
  });
}

bool fit_together(const RoutingStats& sums) {
  return first_excess(sums).field == nullptr;
}

Offence first_offence(const RoutingStats& sums) {
  if (sums.valid()) return {};
  for (int s = 0; s < RoutingStats::kScalarCount; ++s) {
    const std::int64_t value = sums.scalar(static_cast<RoutingStats::Scalar>(s));
    if (value < 0) return negative(kScalarNames[static_cast<std::size_t>(s)], -1, value);
  }
  for (int a = 0; a < RoutingStats::kArrayCount; ++a) {
    const auto values = sums.array(static_cast<RoutingStats::Array>(a));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const char* const name = kArrayNames[static_cast<std::size_t>(a)];
      if (a >= RoutingStats::kFirstSigned) {
        if (values[i] < -kFar || values[i] >= kFar) return overflow_of(name);
      } else if (values[i] < 0) {
        return negative(name, static_cast<std::int64_t>(i), values[i]);
      }
    }
  }
  if (sums.invalid_records() != 0) return {};
  const Offence counts = check_counts(sums.shape(), sums.counts(), sums.tokens(), std::nullopt).offence;
  if (!counts.empty()) return counts;
  const Excess excess = first_excess(sums);
  if (excess.field == nullptr) return {};
  if (excess.index < 0)
    return written("%s: must be at most %s (%lld)", excess.field, excess.whole,
                   static_cast<long long>(excess.most));
  return written("%s of expert %lld: must be at most %s (%lld)", excess.field,
                 static_cast<long long>(excess.index), excess.whole, static_cast<long long>(excess.most));
}

}  // namespace moectl
