#include "torch/routing_sums.h"

#include <array>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "moectl/margins.h"

namespace moectl {
namespace {

using ::torch::Tensor;

/// One micro-batch being summed: scalars and arrays as RoutingStats names them, and whether it is well formed.
class Summing {
 public:
  Summing(const StatsShape& shape, const Tensor& indices, const RecordOptions& options,
          std::int64_t gap_width, ::torch::Device device)
      : shape_(shape),
        options_(options),
        gap_width_(gap_width),
        device_(device),
        tokens_(indices.numel() / shape.top_k),
        sequence_length_(indices.dim() == 3 ? indices.size(1) : 0),
        chosen_(whole(indices).reshape({tokens_, shape.top_k})) {
    const Tensor routed = chosen_.ne(-1);
    real_ = routed.any(1);
    if (options.mask.defined()) real_ = real_.logical_and(here(options.mask).reshape(-1).ne(0));
    weight_ = real_.to(::torch::kLong);
    each_ = routed.to(::torch::kLong) * weight_.unsqueeze(1);
    if ((shape.needs.gap || shape.needs.margins) && options.top_values.defined()) {
      const Tensor number = ::torch::arange(shape.top_k, chosen_.options());
      last_ = (number * each_).amax(1, /*keepdim=*/true);
    }
    const Tensor inside = chosen_.clamp(-1, shape.experts - 1);
    good_ = inside.ne(chosen_).logical_and(real_.unsqueeze(1)).any().logical_not();
    chosen_ = inside.clamp_min(0);
  }

  Tensor sums() {
    counts();
    domains();
    gap();
    margins();
    pairs();
    probabilities();
    dropped();
    router_loss(options_.balance_loss, RoutingStats::kBalanceLossSum, RoutingStats::kBalanceLossRecords);
    router_loss(options_.z_loss, RoutingStats::kZLossSum, RoutingStats::kZLossRecords);

    const RoutingStats layout(shape_);
    // All zeros are one tensor: each operator is a kernel to start.
    const Tensor zeros = filled(0, static_cast<std::int64_t>(shape_.flat_size()));
    std::vector<Tensor> parts;
    std::int64_t missing = 0;
    const auto add = [&](const Tensor& part, std::int64_t size) {
      if (!part.defined()) {
        missing += size;
        return;
      }
      if (missing > 0) parts.push_back(zeros.narrow(0, 0, std::exchange(missing, 0)));
      parts.push_back(part.reshape(-1));
    };
    for (const Tensor& scalar : scalars_) add(scalar, 1);
    for (int a = 0; a < RoutingStats::kArrayCount; ++a) {
      const std::span<const std::int64_t> array = layout.array(static_cast<RoutingStats::Array>(a));
      add(arrays_[static_cast<std::size_t>(a)], static_cast<std::int64_t>(array.size()));
    }
    if (missing > 0) parts.push_back(zeros.narrow(0, 0, missing));
    const Tensor sums = ::torch::cat(parts);
    zeros.narrow(0, RoutingStats::kInvalidRecords, 1).fill_(1);  // now the sums of an invalid record
    return ::torch::where(good_, sums, zeros);
  }

 private:
  Tensor here(const Tensor& tensor) const {
    return tensor.detach().to(device_, tensor.scalar_type(), /*non_blocking=*/true);
  }
  Tensor whole(const Tensor& tensor) const { return here(tensor).to(::torch::kLong); }
  Tensor filled(std::int64_t value, std::int64_t size) const {
    return ::torch::full({size}, value, ::torch::dtype(::torch::kLong).device(device_));
  }
  /// `values` [T, ...], zero (or false) for padding.
  Tensor of_real(const Tensor& values) const {
    const Tensor padding = real_.logical_not();
    return values.masked_fill(values.dim() > 1 ? padding.unsqueeze(1) : padding, 0);
  }
  /// Σ_t of the terms [T, ...] in units of 2^-24; only those of good real tokens can be rounded at all.
  Tensor fixed_sum(const Tensor& terms, const Tensor& good) const {
    const Tensor bad = real_.logical_and(good).logical_not();
    const Tensor safe = terms.masked_fill(terms.dim() > 1 ? bad.unsqueeze(1) : bad, 0);
    return safe.mul(16777216.0).round().to(::torch::kLong).sum(0);
  }
  void require(const Tensor& good) {
    good_ = good_.logical_and(of_real(good.logical_not()).any().logical_not());
  }
  Tensor& scalar(RoutingStats::Scalar which) { return scalars_[which]; }
  Tensor& array(RoutingStats::Array which) { return arrays_[which]; }

  void counts() {
    scalar(RoutingStats::kTokens) = weight_.sum();
    scalar(RoutingStats::kChoicesSq) = each_.sum(1).square().sum();
    if (shape_.needs.sequences && options_.sequence_ids.defined()) {
      const Tensor ids = whole(options_.sequence_ids).reshape(-1);
      if (shape_.needs.split_sequences > 0) {
        pieces(ids);
      } else {
        good_ = good_.logical_and(ids.diff().ge(0).all());
        sequences_by_id(ids, each_, weight_);
      }
    } else if (shape_.needs.sequences && sequence_length_ > 0) {
      sequences_by_shape();
    }
    if (!array(RoutingStats::kCounts).defined()) {
      array(RoutingStats::kCounts) =
          filled(0, shape_.experts).scatter_add_(0, chosen_.reshape(-1), each_.reshape(-1));
    }
  }

  void sequences_by_shape() {
    const std::int64_t sequences = tokens_ / sequence_length_;
    const Tensor histograms =
        filled(0, sequences * shape_.experts)
            .view({sequences, shape_.experts})
            .scatter_add_(1, chosen_.reshape({sequences, -1}), each_.reshape({sequences, -1}));
    const Tensor real = weight_.view({sequences, -1}).sum(1);
    const Tensor length = each_.view({sequences, -1}).sum(1);
    array(RoutingStats::kCounts) = histograms.sum(0);
    array(RoutingStats::kSequenceSq) = histograms.square().sum(0);
    array(RoutingStats::kSequenceCross) = (histograms * length.unsqueeze(1)).sum(0);
    scalar(RoutingStats::kSequences) = real.gt(0).sum();
    scalar(RoutingStats::kSequenceTokens) = scalar(RoutingStats::kTokens);
    scalar(RoutingStats::kSequenceLenSq) = length.square().sum();
  }

  /// Sequences whose pieces are joined later, by their ids; runs of negative ids are whole ones.
  void pieces(const Tensor& ids) {
    const std::int64_t n = shape_.needs.split_sequences;
    const Tensor of_piece = ids.ge(0).logical_and(ids.lt(n)).to(::torch::kLong),
                 whole_one = ids.lt(0).to(::torch::kLong);
    sequences_by_id(ids, each_ * whole_one.unsqueeze(1), weight_ * whole_one);
    const Tensor cell = ids.clamp(0, n - 1).unsqueeze(1) * shape_.experts + chosen_;
    array(RoutingStats::kSplitCounts) =
        filled(0, n * shape_.experts)
            .scatter_add_(0, cell.reshape(-1), (each_ * of_piece.unsqueeze(1)).reshape(-1));
    scalar(RoutingStats::kBeyondSplit) = (weight_ * ids.ge(n).to(::torch::kLong)).sum();
    scalar(RoutingStats::kSequenceTokens) =
        scalar(RoutingStats::kTokens) - scalar(RoutingStats::kBeyondSplit);
  }

  /// Runs of equal ids. How many sequences there are is known to the device alone, so no histogram of each can be made.
  /// Instead the assignments are sorted by (sequence, expert): c² is the sum of the c first odd numbers. `each` [T, k] and
  /// `weight` [T]: 0 for what is not counted.
  void sequences_by_id(const Tensor& ids, const Tensor& each, const Tensor& weight) {
    const Tensor sequence = ::torch::cat({filled(0, 1), ids.diff().ne(0).to(::torch::kLong)}).cumsum(0);
    const Tensor real = filled(0, tokens_).scatter_add_(0, sequence, weight);
    const Tensor length = filled(0, tokens_).scatter_add_(0, sequence, each.sum(1));

    // What is not counted is given a sequence of its own behind all others, where it disturbs no run.
    const std::int64_t experts = shape_.experts;
    const Tensor key = (sequence.unsqueeze(1) * experts + chosen_).masked_fill(each.eq(0), tokens_ * experts);
    const Tensor sorted = std::get<0>(key.reshape(-1).sort());
    const Tensor place = ::torch::arange(sorted.numel(), sorted.options());
    const Tensor starts = ::torch::cat({filled(1, 1), sorted.diff().ne(0).to(::torch::kLong)});
    const Tensor in_run = place - std::get<0>((place * starts).cummax(0));
    const Tensor counted = sorted.lt(tokens_ * experts).to(::torch::kLong);
    const Tensor expert = sorted.remainder(experts);
    array(RoutingStats::kSequenceSq) = filled(0, experts).scatter_add_(0, expert, (in_run * 2 + 1) * counted);
    array(RoutingStats::kSequenceCross) =
        filled(0, experts)
            .scatter_add_(0, chosen_.reshape(-1),
                          (length.gather(0, sequence).unsqueeze(1) * each).reshape(-1));
    scalar(RoutingStats::kSequences) = real.gt(0).sum();
    scalar(RoutingStats::kSequenceTokens) = scalar(RoutingStats::kTokens);
    scalar(RoutingStats::kSequenceLenSq) = length.square().sum();
  }

  void domains() {
    if (shape_.needs.domains == 0 || !options_.domain_ids.defined()) return;
    const Tensor ids = whole(options_.domain_ids).reshape(-1);
    require(ids.ge(0).logical_and(ids.lt(shape_.needs.domains)));
    const Tensor domain = ids.clamp(0, shape_.needs.domains - 1);
    const Tensor cell = domain.unsqueeze(1) * shape_.experts + chosen_;
    array(RoutingStats::kDomainCounts) =
        filled(0, static_cast<std::int64_t>(shape_.needs.domains) * shape_.experts)
            .scatter_add_(0, cell.reshape(-1), each_.reshape(-1));
    scalar(RoutingStats::kDomainTokens) = scalar(RoutingStats::kTokens);
  }

  void gap() {
    if (!shape_.needs.gap || !options_.top_values.defined()) return;
    const Tensor values = here(options_.top_values)
                              .to(::torch::kFloat)
                              .to(::torch::kDouble)
                              .reshape({tokens_, shape_.top_k + 1});
    const Tensor gap = (values.gather(1, last_) - values.gather(1, last_ + 1)).squeeze(1);
    const Tensor good = gap.ge(0).logical_and(gap.le(kFixedMax));
    require(good);
    scalar(RoutingStats::kGapSum) = fixed_sum(gap, good);
    scalar(RoutingStats::kGapTokens) = scalar(RoutingStats::kTokens);
    scalar(RoutingStats::kGapWidthSum) = scalar(RoutingStats::kTokens) * gap_width_;
    array(RoutingStats::kGapNear) =
        filled(0, shape_.experts)
            .scatter_add_(0, chosen_.gather(1, last_).squeeze(1),
                          weight_ * gap.lt(from_fixed(gap_width_)).to(::torch::kLong));
  }

  void margins() {
    if (!shape_.needs.margins || !options_.biased_scores.defined()) return;
    const auto doubles = [&](const Tensor& tensor, std::int64_t width) {
      return here(tensor).to(::torch::kFloat).to(::torch::kDouble).reshape({tokens_, width});
    };
    const Tensor top =
        doubles(options_.top_values, shape_.top_k + 1).gather(1, ::torch::cat({last_, last_ + 1}, 1));
    const Tensor threshold = top.sum(1) * 0.5;
    const Tensor scores = doubles(options_.biased_scores, shape_.experts);
    constexpr double kMost = std::numeric_limits<float>::max();
    const Tensor good = threshold.abs().le(kMost).logical_and(scores.le(kMost).all(1));
    require(good);
    // margin_bin: the exponent and first mantissa bit of a float number its half octaves.
    constexpr std::int64_t kHalf = kMarginBins / 2, kSmallest = (127 - 20) << 1;
    const Tensor margin =
        (threshold.unsqueeze(1) - scores).masked_fill(good.logical_not().unsqueeze(1), 0).to(::torch::kFloat);
    const Tensor half_octave = margin.abs().view(::torch::kInt32).to(::torch::kLong).div(1 << 22, "floor");
    const Tensor distance = (half_octave - kSmallest).clamp(0, kHalf - 1);
    const Tensor bin = ::torch::where(margin.lt(0), kHalf - 1 - distance, distance + kHalf);
    const Tensor row =
        ::torch::arange(shape_.experts, bin.options()) * static_cast<std::int64_t>(kMarginBins);
    array(RoutingStats::kMargins) =
        filled(0, shape_.experts * static_cast<std::int64_t>(kMarginBins))
            .scatter_add_(0, (bin + row).reshape(-1),
                          weight_.unsqueeze(1).expand({-1, shape_.experts}).reshape(-1));
    scalar(RoutingStats::kMarginTokens) = scalar(RoutingStats::kTokens);
  }

  /// Slots that are not counted, and an expert that a token chose before, make no pair.
  void pairs() {
    if (!shape_.needs.pairs) return;
    const std::int64_t n = shape_.experts, k = shape_.top_k;
    const Tensor counted = each_.ne(0);
    const Tensor same = chosen_.unsqueeze(2).eq(chosen_.unsqueeze(1));  // [T, k, k]
    const Tensor before = ::torch::ones({k, k}, counted.options()).tril(-1);
    const Tensor is_new =
        counted.logical_and(same.logical_and(counted.unsqueeze(1)).logical_and(before).any(2).logical_not());
    const Tensor slots = ::torch::triu_indices(k, k, 1, chosen_.options());  // [2, k (k - 1)/2]
    const auto of_slots = [&](const Tensor& values, std::int64_t which) {
      return values.index_select(1, slots.select(0, which));
    };
    const Tensor first = of_slots(chosen_, 0), second = of_slots(chosen_, 1);
    const Tensor low = ::torch::minimum(first, second), high = ::torch::maximum(first, second);
    const Tensor pair = (low * (2 * n - low - 1)).div(2, "floor") + high - low - 1;
    const Tensor weight = of_slots(is_new, 0).logical_and(of_slots(is_new, 1)).to(::torch::kLong);
    const std::int64_t pairs = n * (n - 1) / 2;
    array(RoutingStats::kPairs) = filled(0, pairs).scatter_add_(
        0, pair.clamp(0, std::max<std::int64_t>(pairs - 1, 0)).reshape(-1), weight.reshape(-1));
    scalar(RoutingStats::kPairTokens) = scalar(RoutingStats::kTokens);
  }

  void probabilities() {
    if (!shape_.needs.probabilities || !options_.probabilities.defined()) return;
    const Tensor raw = here(options_.probabilities)
                           .to(::torch::kFloat)
                           .to(::torch::kDouble)
                           .reshape({tokens_, shape_.experts});
    const Tensor total = raw.sum(1, /*keepdim=*/true);
    const Tensor good = raw.ge(0)
                            .all(1)
                            .logical_and(total.squeeze(1).gt(0))
                            .logical_and(total.squeeze(1).le(std::numeric_limits<double>::max()));
    require(good);
    const Tensor p = raw / total;
    const Tensor entropy = (p * p.clamp_min(1e-300).log()).sum(1).neg().clamp_min(0);
    array(RoutingStats::kProbSum) = fixed_sum(p, good);
    array(RoutingStats::kSqrtProbSum) = fixed_sum(p.sqrt(), good);
    scalar(RoutingStats::kTokenEntropySum) = fixed_sum(entropy, good);
    scalar(RoutingStats::kProbTokens) = scalar(RoutingStats::kTokens);
  }

  void dropped() {
    if (!options_.dropped.defined()) return;
    const Tensor dropped = whole(options_.dropped).reshape({});
    good_ = good_.logical_and(dropped.ge(0));
    scalar(RoutingStats::kDropped) = dropped;
    scalar(RoutingStats::kDropTokens) = scalar(RoutingStats::kTokens);
  }

  void router_loss(const Tensor& given, RoutingStats::Scalar sum, RoutingStats::Scalar records) {
    if (!given.defined()) return;
    const Tensor loss = here(given).to(::torch::kDouble).reshape({});
    const Tensor good = loss.ge(0).logical_and(loss.le(kFixedMax));
    scalar(sum) = loss.masked_fill(good.logical_not(), 0).mul(16777216.0).round().to(::torch::kLong);
    scalar(records) = good.to(::torch::kLong);
  }

  const StatsShape& shape_;
  const RecordOptions& options_;
  std::int64_t gap_width_;  // fixed point
  ::torch::Device device_;
  std::int64_t tokens_, sequence_length_;  // 0 = not known by shape
  Tensor chosen_;                          // [T, k], clamped into range
  Tensor real_;                            // [T] bool: not padding, and some slot is routed
  Tensor weight_;                          // [T] 1 = real, 0 = not
  Tensor each_;                            // [T, k] 1 = a slot that counts
  Tensor last_;                            // [T, 1] the last of them, if top_values need it
  Tensor good_;                            // 0-dim bool
  std::array<Tensor, RoutingStats::kScalarCount> scalars_;
  std::array<Tensor, RoutingStats::kArrayCount> arrays_;
};

}  // namespace

Tensor routing_sums(const StatsShape& shape, const Tensor& indices, const RecordOptions& options,
                    double gap_width, ::torch::Device device) {
  return Summing(shape, indices, options, to_fixed(gap_width), device).sums();
}

}  // namespace moectl
