#include "moectl/stats.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

#include "base/fast_log.h"
#include "measure/offence.h"
#include "measure/stats_checks.h"

namespace moectl {
namespace {

// Rounds to the nearest integer, ties to even, for |x| < 2^51, in the default rounding mode.
std::int64_t round_to_even(double x) {
  constexpr double kMagic = 6755399441055744.0;  // 1.5 · 2^52
  return static_cast<std::int64_t>((x + kMagic) - kMagic);
}

std::size_t array_length(const StatsShape& shape, RoutingStats::Array which) {
  const auto experts = static_cast<std::size_t>(shape.experts);
  switch (which) {
    case RoutingStats::kCounts:
      return experts;
    case RoutingStats::kGapNear:
      return shape.needs.gap ? experts : 0;
    case RoutingStats::kSequenceSq:
    case RoutingStats::kSequenceCross:
      return shape.needs.sequences ? experts : 0;
    case RoutingStats::kSplitCounts:
      return shape.needs.sequences ? static_cast<std::size_t>(shape.needs.split_sequences) * experts : 0;
    case RoutingStats::kProbSum:
    case RoutingStats::kSqrtProbSum:
      return shape.needs.probabilities ? experts : 0;
    case RoutingStats::kGradNormSum:
      return shape.needs.gradients ? experts : 0;
    case RoutingStats::kLatencySum:
      return shape.needs.latencies ? experts : 0;
    case RoutingStats::kExpertLossSum:
    case RoutingStats::kExpertLossTokens:
      return shape.needs.losses ? experts : 0;
    case RoutingStats::kMargins:
      return shape.needs.margins ? experts * kMarginBins : 0;
    case RoutingStats::kPairs:
      return shape.needs.pairs ? experts * (experts - 1) / 2 : 0;
    case RoutingStats::kRequiredBins:
      return shape.needs.required_bins ? experts * kRequiredWords : 0;
    case RoutingStats::kRequiredSum:
      return shape.needs.required_local ? experts : 0;
    case RoutingStats::kDomainCounts:
      return static_cast<std::size_t>(shape.needs.domains) * experts;
    case RoutingStats::kDomainLossSum:
    case RoutingStats::kDomainLossTokens:
      return shape.needs.domain_losses ? static_cast<std::size_t>(shape.needs.domains) * experts : 0;
    case RoutingStats::kArrayCount:
      break;
  }
  return 0;
}

std::size_t array_offset(const StatsShape& shape, RoutingStats::Array which) {
  std::size_t offset = RoutingStats::kScalarCount;
  for (int a = 0; a < which; ++a) {
    offset += array_length(shape, static_cast<RoutingStats::Array>(a));
  }
  return offset;
}

// Interleaved histograms: neighbouring indices go to different ones, so that an increment need not wait for the one
// before it to leave the store buffer. More than that gain nothing, and a few large ones must still fit into the
// first-level cache.
constexpr std::size_t kLanes = 4;
constexpr std::size_t kMaxLaneSize = 1024;

constexpr std::int64_t kWholeSequence = -1;  // an id

std::size_t lane_size(int experts) {
  return std::bit_ceil(static_cast<std::size_t>(experts));
}

}  // namespace

std::int64_t to_fixed(double value) {
  return round_to_even(value * 16777216.0);
}

bool fits_fixed(double value) {
  return value >= -kFixedMax && value <= kFixedMax;
}

StatsNeeds& StatsNeeds::operator|=(const StatsNeeds& other) {
  gap |= other.gap;
  sequences |= other.sequences;
  probabilities |= other.probabilities;
  gradients |= other.gradients;
  losses |= other.losses;
  domain_losses |= other.domain_losses;
  latencies |= other.latencies;
  margins |= other.margins;
  pairs |= other.pairs;
  required_bins |= other.required_bins;
  required_local |= other.required_local;
  domains = std::max(domains, other.domains);
  split_sequences = std::max(split_sequences, other.split_sequences);
  return *this;
}

std::size_t StatsShape::flat_size() const {
  return array_offset(*this, RoutingStats::kArrayCount);
}

RoutingStats::RoutingStats(const StatsShape& shape) : shape_(shape) {
  if (shape.experts < 1) {
    throw std::invalid_argument("experts: " + std::to_string(shape.experts) + ": must be at least 1");
  }
  if (shape.top_k < 1 || shape.top_k > shape.experts) {
    throw std::invalid_argument("top_k: " + std::to_string(shape.top_k) + ": must be 1 to experts (" +
                                std::to_string(shape.experts) + ")");
  }
  if (shape.needs.domains < 0) {
    throw std::invalid_argument("domains: " + std::to_string(shape.needs.domains) + ": must not be negative");
  }
  if (shape.needs.split_sequences < 0) {
    throw std::invalid_argument("split_sequences: " + std::to_string(shape.needs.split_sequences) +
                                ": must not be negative");
  }
  sums_.assign(shape.flat_size(), 0);
  delta_.assign(shape.flat_size(), 0);
  const std::size_t lane = lane_size(shape.experts);
  histogram_.assign(lane <= kMaxLaneSize ? lane * kLanes : lane, 0);
  if (shape.needs.pairs) chosen_.reserve(static_cast<std::size_t>(shape.top_k));
  if (shape.needs.probabilities) row_.assign(static_cast<std::size_t>(shape.experts), 0.0);
  if (shape.needs.required_bins || shape.needs.required_local)
    routed_under_.assign(static_cast<std::size_t>(shape.experts), 0.0);
}

std::span<const std::int64_t> RoutingStats::array(Array which) const {
  if (sums_.empty()) return {};
  return std::span(sums_).subspan(array_offset(shape_, which), array_length(shape_, which));
}

std::span<std::int64_t> RoutingStats::mutable_array(Array which) {
  if (sums_.empty()) return {};
  return std::span(sums_).subspan(array_offset(shape_, which), array_length(shape_, which));
}

std::span<std::int64_t> RoutingStats::delta(Array which) {
  return std::span(delta_).subspan(array_offset(shape_, which), array_length(shape_, which));
}

std::int64_t RoutingStats::assignments() const {
  std::int64_t sum = 0;
  for (const std::int64_t count : counts()) sum = wrapping_add(sum, count);
  return sum;
}

bool RoutingStats::valid() const {
  if (sums_.empty()) return true;
  const std::size_t unsigned_sums = array_offset(shape_, kFirstSigned);
  std::int64_t signs = 0;
  for (std::size_t i = 0; i < unsigned_sums; ++i) signs |= sums_[i];
  for (std::size_t i = unsigned_sums; i < sums_.size(); ++i) {
    signs |= beyond_half(sums_[i]);
  }
  if (signs < 0 || invalid_records() != 0) return false;
  // A token chooses at most k experts.
  std::int64_t most = 0;
  if (__builtin_mul_overflow(tokens(), std::int64_t{top_k()}, &most))
    most = std::numeric_limits<std::int64_t>::max();
  return !sum_exceeds(counts(), most) && fit_together(*this);
}

RoutingStats& RoutingStats::operator+=(const RoutingStats& other) {
  if (!(shape_ == other.shape_)) {
    throw std::invalid_argument("stats: shapes differ: " + std::to_string(other.experts()) +
                                " experts, top_k " + std::to_string(other.top_k()) + ", " +
                                std::to_string(other.sums_.size()) + " sums: must be " +
                                std::to_string(experts()) + ", " + std::to_string(top_k()) + ", " +
                                std::to_string(sums_.size()) + ", of the same needs");
  }
  if (offence_.empty()) offence_ = other.offence_;
  const bool apart =
      shape_.needs.required_bins && !(required_range_ == other.required_range_) && other.tokens() != 0;
  // Further additions could bring a sum back into its range: what was noticed must stay so.
  if (!add_sums(other.sums_)) reject(first_offence(*this));
  if (apart) drop_required();
  return *this;
}

// Returns whether every sum is still in its range. Sums of either sign end at ±2^62, before they wrap around.
bool RoutingStats::add_sums(std::span<const std::int64_t> terms) {
  const std::size_t unsigned_sums = array_offset(shape_, kFirstSigned);
  std::int64_t signs = 0;
  for (std::size_t i = 0; i < unsigned_sums; ++i) {
    sums_[i] = wrapping_add(sums_[i], terms[i]);
    signs |= sums_[i];
  }
  for (std::size_t i = unsigned_sums; i < sums_.size(); ++i) {
    sums_[i] = wrapping_add(sums_[i], terms[i]);
    signs |= beyond_half(sums_[i]);
  }
  return signs >= 0;
}

bool RoutingStats::reject(const Offence& offence) {
  if (offence_.empty()) offence_ = offence;
  sums_[kInvalidRecords] = wrapping_add(sums_[kInvalidRecords], 1);
  return false;
}

void RoutingStats::clear() {
  std::fill(sums_.begin(), sums_.end(), 0);
  offence_ = {};
}

// ---- Adding a record: first into delta_, and into the sums only if the whole record is valid. ----

bool RoutingStats::add(const RoutingBatch& batch) {
  check_sizes(batch);
  if (batch.experts.empty()) return true;
  std::fill(delta_.begin(), delta_.end(), 0);
  empty_slots_ = false;
  const bool good = gather_counts(batch) && gather_domains(batch) && gather_gap(batch) &&
                    gather_margins(batch) && gather_probabilities(batch) && gather_dropped(batch);
  gather_router_losses(batch);
  if (!good) {
    const Offence offence = first_offence(shape_, batch);
    return reject(offence.empty() ? overflow_of("gap_sum") : offence);
  }
  gather_pairs(batch);
  gather_required(batch);
  return commit();
}

// Adds delta_, or nothing but an invalid record.
bool RoutingStats::commit(const Offence& offence) {
  if (!offence.empty()) return reject(offence);
  if (add_sums(delta_)) return true;
  const Offence overflow = first_offence(*this);
  for (std::size_t i = 0; i < sums_.size(); ++i) {
    sums_[i] = static_cast<std::int64_t>(static_cast<std::uint64_t>(sums_[i]) -
                                         static_cast<std::uint64_t>(delta_[i]));
  }
  return reject(overflow);
}

void RoutingStats::check_sizes(const RoutingBatch& batch) const {
  if (sums_.empty()) throw std::invalid_argument("stats: default-constructed: must have a shape");
  const auto k = static_cast<std::size_t>(top_k());
  if (batch.experts.size() % k != 0) {
    throw std::invalid_argument("experts: " + std::to_string(batch.experts.size()) +
                                " elements: must be a multiple of top_k (" + std::to_string(k) + ")");
  }
  const std::size_t tokens = batch.experts.size() / k;
  if (!batch.mask.empty()) require_size("mask", batch.mask.size(), tokens);
  if (!batch.sequence_ids.empty()) require_size("sequence_ids", batch.sequence_ids.size(), tokens);
  if (!batch.domain_ids.empty()) require_size("domain_ids", batch.domain_ids.size(), tokens);
  if (!batch.top_values.empty()) {
    if (top_k() == experts()) throw std::invalid_argument("top_values: given: top_k must be below experts");
    require_size("top_values", batch.top_values.size(), tokens * (k + 1));
  }
  if (!batch.biased_scores.empty()) {
    if (batch.top_values.empty()) {
      throw std::invalid_argument("biased_scores: given without top_values: the threshold is among those");
    }
    require_size("biased_scores", batch.biased_scores.size(), tokens * static_cast<std::size_t>(experts()));
  }
  if (!batch.probabilities.empty()) {
    require_size("probabilities", batch.probabilities.size(), tokens * static_cast<std::size_t>(experts()));
  }
  if (batch.sequence_length < 0) {
    throw std::invalid_argument("sequence_length: " + std::to_string(batch.sequence_length) +
                                ": must not be negative");
  }
  if (batch.sequence_length > 0) {
    if (!batch.sequence_ids.empty())
      throw std::invalid_argument("sequence_length: given with sequence_ids: must be 0");
    if (tokens % static_cast<std::size_t>(batch.sequence_length) != 0) {
      throw std::invalid_argument("sequence_length: " + std::to_string(batch.sequence_length) +
                                  ": must divide " + std::to_string(tokens) + " tokens");
    }
  }
}

// Counts indices into histogram_ (all zero before), whose lanes are `lane` apart. Out-of-range indices are
// folded into range, so that nothing is written elsewhere, and noticed by `seen` or in the bins between N and
// the power of two.
template <std::size_t lanes>
bool RoutingStats::count(std::span<const std::int64_t> indices) {
  const std::size_t lane = lane_size(experts());
  const std::uint64_t fold = lane - 1;
  std::int64_t* __restrict h = histogram_.data();
  std::uint64_t seen = 0;
  std::size_t i = 0;
  if constexpr (lanes == kLanes) {
    for (; i + kLanes <= indices.size(); i += kLanes) {
      const auto a = static_cast<std::uint64_t>(indices[i]), b = static_cast<std::uint64_t>(indices[i + 1]);
      const auto c = static_cast<std::uint64_t>(indices[i + 2]),
                 d = static_cast<std::uint64_t>(indices[i + 3]);
      seen |= (a | b) | (c | d);
      ++h[a & fold];
      ++h[lane + (b & fold)];
      ++h[2 * lane + (c & fold)];
      ++h[3 * lane + (d & fold)];
    }
  }
  for (; i < indices.size(); ++i) {
    const auto index = static_cast<std::uint64_t>(indices[i]);
    seen |= index;
    ++h[index & fold];
  }
  if constexpr (lanes == kLanes) {
    for (std::size_t j = 0; j < lane; ++j) {
      h[j] += (h[lane + j] + h[2 * lane + j]) + h[3 * lane + j];
    }
    std::fill_n(h + lane, 3 * lane, 0);
  }
  std::int64_t beyond = 0;
  for (auto j = static_cast<std::size_t>(experts()); j < lane; ++j) beyond |= h[j];
  return (seen & ~fold) == 0 && beyond == 0;
}

bool RoutingStats::count_tokens(const RoutingBatch& batch, std::size_t from, std::size_t to, Choices& out) {
  const auto k = static_cast<std::size_t>(top_k());
  std::int64_t tokens = 0;
  bool good = true;
  if (batch.mask.empty()) {
    tokens = static_cast<std::int64_t>(to - from);
    const auto indices = batch.experts.subspan(from * k, (to - from) * k);
    // Summing the lanes costs some four steps an expert.
    const std::size_t lane = lane_size(experts());
    good = lane <= kMaxLaneSize && indices.size() >= 8 * lane ? count<kLanes>(indices) : count<1>(indices);
  }
  for (std::size_t t = batch.mask.empty() ? to : from; t < to;) {  // runs of real tokens
    while (t < to && batch.mask[t] == 0) ++t;
    const std::size_t begin = t;
    while (t < to && batch.mask[t] != 0) ++t;
    good &= count<1>(batch.experts.subspan(begin * k, (t - begin) * k));
    tokens += static_cast<std::int64_t>(t - begin);
  }
  if (!good) return count_slots(batch, from, to, out);
  out = {tokens, tokens * top_k(), tokens * top_k() * top_k()};
  return true;
}

// The same, more slowly, where some index is no expert: slots that are not routed, or bad data.
bool RoutingStats::count_slots(const RoutingBatch& batch, std::size_t from, std::size_t to, Choices& out) {
  const auto k = static_cast<std::size_t>(top_k());
  std::fill(histogram_.begin(), histogram_.end(), 0);
  for (std::size_t t = from; t < to; ++t) {
    if (!batch.mask.empty() && batch.mask[t] == 0) continue;
    std::int64_t chosen = 0;
    for (const std::int64_t expert : batch.experts.subspan(t * k, k)) {
      if (expert == kNotRouted) continue;
      if (expert < 0 || expert >= experts()) return false;
      ++histogram_[static_cast<std::size_t>(expert)];
      ++chosen;
    }
    out.tokens += chosen > 0 ? 1 : 0;
    out.assignments += chosen;
    out.squares += chosen * chosen;
  }
  empty_slots_ = true;
  return true;
}

// One behind the last routed slot of a token; 0 = padding.
std::size_t RoutingStats::last_slot(const RoutingBatch& batch, std::size_t token) const {
  if (!batch.mask.empty() && batch.mask[token] == 0) return 0;
  auto slot = static_cast<std::size_t>(top_k());
  if (!empty_slots_) return slot;
  const auto chosen = batch.experts.subspan(token * slot, slot);
  while (slot > 0 && chosen[slot - 1] == kNotRouted) --slot;
  return slot;
}

bool RoutingStats::gather_counts(const RoutingBatch& batch) {
  const auto n = static_cast<std::size_t>(experts());
  const std::size_t tokens = batch.experts.size() / static_cast<std::size_t>(top_k());
  const std::span<const std::int64_t> ids =
      shape_.needs.sequences ? batch.sequence_ids : std::span<const std::int64_t>();
  const std::int64_t length = shape_.needs.sequences ? batch.sequence_length : 0;
  const std::int64_t split = ids.empty() ? 0 : shape_.needs.split_sequences;
  const std::span<std::int64_t> counts = delta(kCounts), pieces = delta(kSplitCounts);
  bool good = true;
  for (std::size_t from = 0, to = 0; from < tokens; from = to) {
    to = tokens;
    if (length > 0) {
      to = from + static_cast<std::size_t>(length);
    } else if (!ids.empty()) {
      to = from + 1;
      while (to < tokens && ids[to] == ids[from]) ++to;
      good &= split > 0 || to == tokens || ids[to] > ids[from];
    }
    Choices chosen;
    good &= count_tokens(batch, from, to, chosen);
    delta_[kTokens] += chosen.tokens;
    delta_[kChoicesSq] += chosen.squares;
    const std::int64_t id = split > 0 ? ids[from] : kWholeSequence;
    const auto histogram = std::span<const std::int64_t>(histogram_).first(n);
    if ((length > 0 || !ids.empty()) && chosen.tokens > 0) {
      delta_[id < split ? kSequenceTokens : kBeyondSplit] += chosen.tokens;
      if (id < 0) add_sequence(histogram, chosen.assignments, delta_);
      for (std::size_t i = 0; id >= 0 && id < split && i < n; ++i)
        pieces[static_cast<std::size_t>(id) * n + i] += histogram[i];
    }
    for (std::size_t i = 0; i < n; ++i) counts[i] += histogram[i];
    std::fill_n(histogram_.begin(), lane_size(experts()), 0);
  }
  return good;
}

void RoutingStats::add_sequence(std::span<const std::int64_t> histogram, std::int64_t length,
                                std::span<std::int64_t> sums) {
  const std::span<std::int64_t> squares = sums.subspan(array_offset(shape_, kSequenceSq), histogram.size()),
                                cross = sums.subspan(array_offset(shape_, kSequenceCross), histogram.size());
  sums[kSequences] += 1;
  sums[kSequenceLenSq] = wrapping_add(sums[kSequenceLenSq], wrapping_product(length, length));
  for (std::size_t i = 0; i < histogram.size(); ++i) {
    const std::int64_t c = histogram[i];
    squares[i] = wrapping_add(squares[i], wrapping_product(c, c));
    cross[i] = wrapping_add(cross[i], wrapping_product(length, c));
  }
}

void RoutingStats::join_sequences() {
  const std::span<std::int64_t> pieces = mutable_array(kSplitCounts);
  const auto n = static_cast<std::size_t>(experts());
  for (std::size_t at = 0; at < pieces.size(); at += n) {
    const std::span<const std::int64_t> joined = pieces.subspan(at, n);
    std::int64_t length = 0;
    for (const std::int64_t c : joined) length = wrapping_add(length, c);
    if (length != 0) add_sequence(joined, length, sums_);
  }
  std::fill(pieces.begin(), pieces.end(), 0);
}

bool RoutingStats::gather_domains(const RoutingBatch& batch) {
  if (shape_.needs.domains == 0 || batch.domain_ids.empty()) return true;
  const auto n = static_cast<std::size_t>(experts()), k = static_cast<std::size_t>(top_k());
  const std::span<std::int64_t> counts = delta(kDomainCounts);
  for (std::size_t t = 0; t < batch.domain_ids.size(); ++t) {
    const std::size_t slots = last_slot(batch, t);
    if (slots == 0) continue;
    const std::int64_t domain = batch.domain_ids[t];
    if (domain < 0 || domain >= shape_.needs.domains) return false;
    std::int64_t* of_domain = counts.data() + static_cast<std::size_t>(domain) * n;
    for (std::size_t j = 0; j < slots; ++j) {
      const std::int64_t expert = batch.experts[t * k + j];
      if (expert != kNotRouted) ++of_domain[expert];
    }
  }
  delta_[kDomainTokens] = delta_[kTokens];
  return true;
}

bool RoutingStats::gather_gap(const RoutingBatch& batch) {
  if (!shape_.needs.gap || batch.top_values.empty()) return true;
  const auto k = static_cast<std::size_t>(top_k());
  const std::size_t tokens = batch.top_values.size() / (k + 1);
  const std::span<std::int64_t> near = delta(kGapNear);
  const double width = gap_width();
  std::int64_t sum = 0, signs = 0;
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::size_t slots = last_slot(batch, t);
    if (slots == 0) continue;
    const double gap = static_cast<double>(batch.top_values[t * (k + 1) + slots - 1]) -
                       static_cast<double>(batch.top_values[t * (k + 1) + slots]);
    if (!(gap >= 0 && gap <= kFixedMax)) return false;
    sum = wrapping_add(sum, to_fixed(gap));
    signs |= sum;
    near[static_cast<std::size_t>(batch.experts[t * k + slots - 1])] += gap < width ? 1 : 0;
  }
  delta_[kGapSum] = sum;
  delta_[kGapTokens] = delta_[kTokens];
  delta_[kGapWidthSum] = wrapping_product(delta_[kTokens], gap_width_);
  return (signs | delta_[kGapWidthSum]) >= 0;
}

// It also rejects NaN for the required biases, so it runs for either.
bool RoutingStats::gather_margins(const RoutingBatch& batch) {
  const StatsNeeds& needs = shape_.needs;
  if (!needs.biased_scores() || batch.biased_scores.empty()) return true;
  const auto n = static_cast<std::size_t>(experts()), k = static_cast<std::size_t>(top_k());
  std::int64_t* const bins = delta(kMargins).data();
  const std::size_t tokens = batch.biased_scores.size() / n;
  constexpr double kMost = std::numeric_limits<float>::max();
  for (std::size_t t = 0; t < tokens; ++t) {
    const std::size_t slots = last_slot(batch, t);
    if (slots == 0) continue;
    const float* const top = batch.top_values.data() + t * (k + 1) + slots - 1;
    const double threshold = 0.5 * (static_cast<double>(top[0]) + static_cast<double>(top[1]));
    if (!(std::abs(threshold) <= kMost)) return false;
    const float* const row = batch.biased_scores.data() + t * n;
    for (std::size_t i = 0; i < n; ++i) {
      const auto score = static_cast<double>(row[i]);
      if (!(score <= kMost)) return false;
      if (needs.margins) ++bins[i * kMarginBins + margin_bin(static_cast<float>(threshold - score))];
    }
  }
  delta_[kMarginTokens] = delta_[kTokens];
  return true;
}

bool RoutingStats::gather_probabilities(const RoutingBatch& batch) {
  if (!shape_.needs.probabilities || batch.probabilities.empty()) return true;
  const auto n = static_cast<std::size_t>(experts());
  const std::size_t tokens = batch.probabilities.size() / n;
  const std::span<std::int64_t> sums = delta(kProbSum), roots = delta(kSqrtProbSum);
  for (std::size_t t = 0; t < tokens; ++t) {
    if (last_slot(batch, t) == 0) continue;
    const float* in = batch.probabilities.data() + t * n;
    double total = 0;
    bool good = true;
    for (std::size_t i = 0; i < n; ++i) {
      row_[i] = static_cast<double>(in[i]);
      good &= row_[i] >= 0;
      total += row_[i];
    }
    if (!good || !(total > 0) || total > std::numeric_limits<double>::max()) return false;
    for (std::size_t i = 0; i < n; ++i) row_[i] /= total;
    for (std::size_t i = 0; i < n; ++i) sums[i] += to_fixed(row_[i]);
    for (std::size_t i = 0; i < n; ++i) roots[i] += to_fixed(std::sqrt(row_[i]));
    Double8 entropy = splat(0);
    for_each_eight(n, [&](std::size_t i, auto at) {
      const Double8 p = at.get(&row_[i]);
      entropy -= p * fast_log(larger(splat(1e-300), p));
    });
    delta_[kTokenEntropySum] += to_fixed(std::max(0.0, sum_of(entropy)));
  }
  delta_[kProbTokens] = delta_[kTokens];
  return true;
}

bool RoutingStats::gather_dropped(const RoutingBatch& batch) {
  if (!batch.dropped) return true;
  if (*batch.dropped < 0) return false;
  delta_[kDropped] = *batch.dropped;
  delta_[kDropTokens] = delta_[kTokens];
  return true;
}

void RoutingStats::gather_router_losses(const RoutingBatch& batch) {
  // No policy needs them, so a loss that is not a number does not make a record invalid.
  const auto gather = [&](const std::optional<double>& loss, Scalar sum, Scalar records) {
    if (!loss || !(*loss >= 0) || !fits_fixed(*loss)) return;
    delta_[static_cast<std::size_t>(sum)] = to_fixed(*loss);
    delta_[static_cast<std::size_t>(records)] = 1;
  };
  gather(batch.balance_loss, kBalanceLossSum, kBalanceLossRecords);
  gather(batch.z_loss, kZLossSum, kZLossRecords);
}

bool RoutingStats::add_counts(std::span<const std::int64_t> counts, std::int64_t tokens,
                              std::optional<std::int64_t> choices_sq) {
  require_size("counts", counts.size(), static_cast<std::size_t>(experts()));
  std::fill(delta_.begin(), delta_.end(), 0);
  const CheckedCounts checked = check_counts(shape_, counts, tokens, choices_sq);
  if (!checked.offence.empty()) return reject(checked.offence);
  std::ranges::copy(counts, delta(kCounts).begin());
  delta_[kTokens] = tokens;
  delta_[kChoicesSq] = checked.choices_sq;
  return commit();
}

}  // namespace moectl
