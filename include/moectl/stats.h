// RoutingStats: the sums over tokens that describe the routing of one layer.
//
// The same `+` joins micro-batches, threads, ranks and steps, so gradient accumulation, data parallelism and windows
// need no code of their own. Counts are exact 64-bit integers. Every other sum is fixed point with a unit of 2^-24,
// held in an int64, so a sum has the same bits in any order of addition. All sums of one layer lie in one flat array of
// int64, which is the payload of a collective.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "moectl/margins.h"
#include "moectl/stats_shape.h"

namespace moectl {

/// Fixed-point sums: int64 in units of 2^-24 (about 6e-8), range about ±5.5e11.
inline constexpr double kFixedUnit = 1.0 / 16777216.0;

/// Rounds one term to the unit, ties to even. `value` must be finite and of magnitude at most `kFixedMax`.
std::int64_t to_fixed(double value);
constexpr double from_fixed(std::int64_t sum) {
  return static_cast<double>(sum) * kFixedUnit;
}
/// The largest magnitude a single term may have (2^24); larger or non-finite terms make their record invalid.
inline constexpr double kFixedMax = 16777216.0;
bool fits_fixed(double value);

/// One micro-batch of one layer's routing, as views of the caller's memory. Only `experts` is required.
struct RoutingBatch {
  /// [tokens × k], row by row: the experts chosen for each token, before any capacity limit; -1 = a slot that is not
  /// routed, so tokens may have different numbers k_t of experts. Behind the last routed slot lies the token's gap. A
  /// token without any counts as padding. Required.
  std::span<const std::int64_t> experts{};
  /// [tokens], non-zero = a real token, zero = padding that is not counted. Empty = all real.
  std::span<const std::uint8_t> mask{};
  /// Tokens per sequence when the tokens are [B, S] row by row; 0 = not known. Excludes `sequence_ids`.
  std::int64_t sequence_length = 0;
  /// [tokens], non-decreasing: the sequence of each token. Empty = not known. With StatsNeeds::split_sequences = n, in any
  /// order: ids in [0, n) name a sequence of the step, whose pieces join over records and ranks; a run of one negative id
  /// is a whole sequence.
  std::span<const std::int64_t> sequence_ids{};
  /// [tokens × (k+1)] the k+1 largest biased scores of each token, largest first; `experts` then lists the experts in
  /// the same order. Empty = no gap. Requires k < N.
  std::span<const float> top_values{};
  /// [tokens × N] the biased scores v that selection compared, -inf for experts excluded from the choice. Empty = no
  /// margins. Requires top_values.
  std::span<const float> biased_scores{};
  /// [tokens × N] router probabilities. Empty = none.
  std::span<const float> probabilities{};
  /// [tokens], in [0, domains): the domain of each token. Empty = none.
  std::span<const std::int64_t> domain_ids{};
  /// Assignments that the router dropped for lack of capacity; absent = the router does not report drops.
  std::optional<std::int64_t> dropped{};
  /// The router's losses on this micro-batch, before their weights: the balance loss N Σ f_i P_i and the z-loss
  /// mean (logsumexp z)². From 0 to kFixedMax; absent or anything else = not reported. Metrics report the mean over
  /// micro-batches.
  std::optional<double> balance_loss{}, z_loss{};
};

/// The losses of one micro-batch's tokens. Losses are known only after the forward pass, so they are recorded
/// separately from the routing: once per layer, in addition to its RoutingBatch, before the step.
///   controller.record_with(layer, [&](RoutingStats& stats) { stats.add_token_losses(losses); });
struct TokenLosses {
  /// [tokens × k], as in RoutingBatch: a token's loss goes to each of its experts.
  std::span<const std::int64_t> experts{};
  /// [tokens], of any sign, of magnitude at most kFixedMax.
  std::span<const float> losses{};
  /// [tokens], zero = a token without a loss. Empty = all have one.
  std::span<const std::uint8_t> mask{};
  /// [tokens], in [0, domains). Empty = not known: then nothing is added to the domains.
  std::span<const std::int64_t> domain_ids{};
};

/// What was wrong with the first bad record, in words: "experts[17] = 99: must be in [0, 64)".
struct Offence {
  std::array<char, 120> text{};
  std::size_t size = 0;

  bool empty() const { return size == 0; }
  std::string_view words() const { return {text.data(), size}; }
};

/// One layer's mergeable sums. Copying allocates; adding and clearing do not.
class RoutingStats {
 public:
  RoutingStats() = default;
  /// Throws std::invalid_argument unless 1 ≤ top_k ≤ experts and domains ≥ 0.
  explicit RoutingStats(const StatsShape& shape);

  const StatsShape& shape() const { return shape_; }
  int experts() const { return shape_.experts; }
  int top_k() const { return shape_.top_k; }

  /// Adds a micro-batch. Malformed *data* (an index outside [0, N), NaN scores, a decreasing sequence id) adds nothing
  /// but one to `invalid_records` and returns false, as does a record that would take a sum out of its range; offence()
  /// then says why. Sizes that do not fit together throw std::invalid_argument. What throws has added nothing.
  bool add(const RoutingBatch& batch);
  /// Adds counts already summed elsewhere. `choices_sq` = Σ_t k_t²; absent: k for each token where the counts sum to
  /// tokens · k, else as even as tokens and counts allow. Negative values, a sum of counts above tokens · k, or a Σ_t k_t²
  /// that no tokens with this sum have, make the record invalid, as above.
  bool add_counts(std::span<const std::int64_t> counts, std::int64_t tokens,
                  std::optional<std::int64_t> choices_sq = std::nullopt);
  /// Forms the sums by sequence of the sequences that came in pieces, and forgets the pieces: at the end of a step, when
  /// all pieces have been added. Nothing without StatsNeeds::split_sequences.
  void join_sequences();
  /// Adds another layer-step's sums. A sum that leaves its range counts as an invalid record. Throws
  /// std::invalid_argument if the shapes differ.
  RoutingStats& operator+=(const RoutingStats& other);
  /// Back to zero tokens.
  void clear();

  /// c_i, assignments to each expert before capacity. [N]
  std::span<const std::int64_t> counts() const { return array(kCounts); }
  /// S = Σ c_i.
  std::int64_t assignments() const;
  std::int64_t tokens() const { return scalar(kTokens); }
  /// Σ_t k_t², k_t the experts that token t chose; 0 where it is not known.
  std::int64_t choices_sq() const { return scalar(kChoicesSq); }
  /// S/T, the mean number of experts of a token; top_k() where no slot is empty.
  double mean_choices() const;
  std::int64_t invalid_records() const { return scalar(kInvalidRecords); }
  /// Of the first invalid record since clear(); empty if this object saw none. Not part of the payload.
  const Offence& offence() const { return offence_; }
  /// False if a record was invalid, a sum is negative or more than its whole (corrupted input, an overflow, drops that were
  /// counted twice), or a sum of losses, which may have any sign, is beyond ±2^62.
  bool valid() const;

  // A value is absent unless every counted token contributed to it: partial sums are never returned.
  std::optional<double> mean_gap() const;  ///< mean_t (v_k - v_{k+1}).
  /// The slope at the threshold: the relative load c_i/c̄ (c̄ the mean load) that each expert gains per unit of its bias
  /// [N]. Returns false, and writes nothing, if no gap is near or known.
  bool load_slope(std::span<double> out) const;
  std::optional<double> dropped() const;  ///< Dropped assignments.
  /// Means over the micro-batches that reported them.
  std::optional<double> balance_loss() const { return mean_of(kBalanceLossSum, kBalanceLossRecords); }
  std::optional<double> z_loss() const { return mean_of(kZLossSum, kZLossRecords); }
  bool has_sequences() const;  ///< At least one sequence, and every token belongs to one.
  /// Tokens whose sequence id is beyond split_sequences: has_sequences() is then false.
  std::int64_t tokens_beyond_split() const { return scalar(kBeyondSplit); }
  bool has_probabilities() const;
  bool has_domains() const;
  bool has_margins() const;
  bool has_pairs() const;
  bool has_required_bins() const;  ///< And no more than kMostRequiredTokens tokens.
  bool has_required_local() const;
  std::span<const std::int64_t, kMarginBins> margins(int expert) const;  ///< Counts by margin_bin().
  /// Tokens that chose both experts, in either order; throws std::invalid_argument if they are one expert.
  std::int64_t tokens_of_both(int expert, int other) const {
    return array(kPairs)[pair_index(expert, other)];
  }
  /// Where that count lies in the array kPairs: the pairs (0, 1), (0, 2), …, (1, 2), ….
  std::size_t pair_index(int expert, int other) const;
  /// Counts by required_bin(), two a word: bin 2j in the low 32 bits of word j, bin 2j + 1 above them.
  std::span<const std::int64_t, kRequiredWords> required_bins(int expert) const;
  /// Where their bins lie.
  const RequiredRange& required_range() const { return required_range_; }
  /// Mean over the micro-batches (calls of add) of the bias that the expert required in each: of r_ti = v_{k+1} - s_ti over
  /// the tokens the one above the ⌊S/N⌋ smallest, S the micro-batch's assignments; the bias in force where that is no
  /// number up to kFixedMax. Only with has_required_local().
  double required_local(int expert) const;
  /// The biases [N] that the tokens recorded from now on are routed under; at first zeros. Required biases are counted from
  /// them. The controller sets them, the same on every rank. Neither added nor cleared; sums of required bins join only
  /// those of the same range, else they count as not given.
  void set_routed_under(std::span<const double> biases);
  /// Forgets the required biases recorded so far: their tokens count as given without scores.
  void drop_required();
  /// Gaps below this width, in score units, count as near in add(); 0 (the default) = none. Rounded to kFixedUnit. The
  /// controller sets it from the last step's sums, the same on every rank. Neither added nor cleared.
  void set_gap_width(double width);
  double gap_width() const { return from_fixed(gap_width_); }
  /// The width for the next records: a fifth of the gaps counted here would be near. Absent without gaps.
  std::optional<double> next_gap_width() const;
  std::int64_t domain_tokens(int domain) const;  ///< Tokens of the domain (its assignments over the mean k).
  std::span<const std::int64_t> domain_counts(int domain) const;  ///< [N]

  /// Optional per-expert inputs: each call adds one observation for every expert (values [N], finite and ≥ 0). Metrics
  /// report the mean over observations. Bad values make the record invalid and return false. Inputs that are not among
  /// the needs are ignored.
  bool add_grad_norms(std::span<const double> norms);
  bool add_latencies(std::span<const double> seconds);
  /// Σ of the losses of each expert's tokens [N], and how many tokens each sum covers [N]. Losses may be
  /// negative (a density's log-likelihood, a contrastive objective), but not infinite.
  bool add_expert_losses(std::span<const double> loss_sums, std::span<const std::int64_t> tokens);
  /// The same for the experts of one domain. Throws std::invalid_argument for an unknown domain.
  bool add_domain_losses(int domain, std::span<const double> loss_sums, std::span<const std::int64_t> tokens);
  /// A value that the host computes itself, such as router_condition; each call adds one observation, and metrics report the
  /// mean over observations and ranks. `name` is one of recorded_values() (else std::invalid_argument). Above 2^24 counts as
  /// 2^24. A negative value or NaN is left out, and returns false. A policy told to may decide on it.
  bool add_value(std::string_view name, double value);

  /// Forms the losses per expert and per (domain, expert), as far as they are among the needs, from the losses of
  /// tokens. Sizes that do not fit together throw std::invalid_argument.
  bool add_token_losses(const TokenLosses& batch);

  /// The payload: every sum as int64. Adding two payloads elementwise adds the stats.
  std::span<std::int64_t> flat() { return sums_; }
  std::span<const std::int64_t> flat() const { return sums_; }

  /// The scalar sums, in the order of the flat array; the arrays follow.
  enum Scalar : int {
    kTokens,
    kChoicesSq,  ///< Σ_t k_t².
    kInvalidRecords,
    kGapSum,
    kGapTokens,
    kGapWidthSum,  ///< Σ_t of the width that counts as near, fixed point.
    kSequences,
    kSequenceTokens,
    kSequenceLenSq,
    kBeyondSplit,
    kProbTokens,
    kTokenEntropySum,
    kDropped,
    kDropTokens,
    kDomainTokens,
    kGradRecords,
    kLatencyRecords,
    kBalanceLossSum,  ///< Fixed point.
    kBalanceLossRecords,
    kZLossSum,  ///< Fixed point.
    kZLossRecords,
    kRouterSimilaritySum,  ///< Fixed point, as the next three sums.
    kRouterSimilarityRecords,
    kRouterConditionSum,
    kRouterConditionRecords,
    kExpertOutputNormSum,
    kExpertOutputNormRecords,
    kGradientRatioSum,
    kGradientRatioRecords,
    kMarginTokens,
    kPairTokens,
    kRequiredRecords,  ///< Micro-batches in kRequiredSum.
    kScalarCount
  };
  /// The arrays that follow the scalars; arrays that StatsNeeds does not ask for are empty.
  enum Array : int {
    kCounts,         ///< c_i. [N]
    kGapNear,        ///< Tokens whose k-th choice is i and whose gap is below the width. [N]
    kSequenceSq,     ///< Σ_j c_ji². [N]
    kSequenceCross,  ///< Σ_j n_j c_ji. [N]
    kSplitCounts,  ///< c_ji of the sequences that come in pieces, until they are joined. [split_sequences × N]
    kProbSum,      ///< Σ_t p_ti, fixed point. [N]
    kSqrtProbSum,       ///< Σ_t √p_ti, fixed point. [N]
    kGradNormSum,       ///< Fixed point. [N]
    kLatencySum,        ///< Seconds, fixed point. [N]
    kExpertLossTokens,  ///< [N]
    kMargins,           ///< [N × kMarginBins]
    kPairs,             ///< Tokens that chose both experts, by pair_index(). [N (N - 1)/2]
    kRequiredBins,      ///< Two counts a word. [N × kRequiredWords]
    kDomainCounts,      ///< [domains × N]
    kDomainLossTokens,  ///< [domains × N]
    // Sums of either sign come last.
    kExpertLossSum,  ///< Fixed point. [N]
    kDomainLossSum,  ///< Fixed point. [domains × N]
    kRequiredSum,    ///< Required biases by micro-batch, fixed point. [N]
    kArrayCount,
    kFirstSigned = kExpertLossSum
  };
  /// What the host may report as one number: its losses, and what it computes from its own tensors.
  struct RecordedValue {
    std::string_view name;  ///< Of the metric, and of the field in traces.
    Scalar sum, records;
  };
  static std::span<const RecordedValue> recorded_values();
  /// Mean over the observations of a fixed-point sum; absent without any.
  std::optional<double> mean_of(Scalar sum, Scalar records) const;
  std::int64_t scalar(Scalar which) const {
    return sums_.empty() ? 0 : sums_[static_cast<std::size_t>(which)];
  }
  std::span<const std::int64_t> array(Array which) const;
  /// For readers of recorded sums: direct access. The caller keeps the sums consistent.
  void set_scalar(Scalar which, std::int64_t value) { sums_[static_cast<std::size_t>(which)] = value; }
  std::span<std::int64_t> mutable_array(Array which);

 private:
  void check_sizes(const RoutingBatch& batch) const;
  /// What a run of tokens chose.
  struct Choices {
    std::int64_t tokens = 0, assignments = 0, squares = 0;
  };
  template <std::size_t lanes>
  bool count(std::span<const std::int64_t> indices);
  bool count_tokens(const RoutingBatch& batch, std::size_t from, std::size_t to, Choices& out);
  bool count_slots(const RoutingBatch& batch, std::size_t from, std::size_t to, Choices& out);
  void add_sequence(std::span<const std::int64_t> histogram, std::int64_t length,
                    std::span<std::int64_t> sums);
  std::size_t last_slot(const RoutingBatch& batch, std::size_t token) const;
  bool gather_counts(const RoutingBatch& batch);
  bool gather_domains(const RoutingBatch& batch);
  bool gather_gap(const RoutingBatch& batch);
  bool gather_margins(const RoutingBatch& batch);
  void gather_pairs(const RoutingBatch& batch);
  void gather_required(const RoutingBatch& batch);
  bool gather_probabilities(const RoutingBatch& batch);
  bool gather_dropped(const RoutingBatch& batch);
  void gather_router_losses(const RoutingBatch& batch);
  bool add_observation(Array which, Scalar records, std::span<const double> values);
  bool add_losses(Array sums, Array tokens, std::size_t at, std::span<const double> loss_sums,
                  std::span<const std::int64_t> covered);
  bool commit(const Offence& offence = {});
  bool add_sums(std::span<const std::int64_t> terms);
  bool reject(const Offence& offence);
  std::span<std::int64_t> delta(Array which);

  StatsShape shape_;
  std::int64_t gap_width_ = 0;  // fixed point
  bool empty_slots_ = false;    // in the record that is being added
  std::vector<std::int64_t> sums_;
  // Scratch, kept so that adding never allocates: one record's sums, one sequence's counts, one token's probabilities.
  std::vector<std::int64_t> delta_, histogram_;
  std::vector<double> row_;
  std::vector<std::int64_t> chosen_;  // one token's different experts, with pairs
  std::vector<double> routed_under_;  // [N] with required_bins or required_local
  RequiredRange required_range_;
  std::vector<double> column_;  // one expert's required biases [tokens]
  Offence offence_;
};

}  // namespace moectl
