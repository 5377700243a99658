// Margins: how far each expert is from being selected by each token, as histograms that add.
//
// The margin of token t for expert i is d_ti = θ_t - v_ti: the token's selection threshold θ_t = (v_k + v_{k+1})/2
// minus the expert's biased score. Experts with a negative margin are selected, so c_i tokens have a margin below 0. If
// the bias of expert i rises by x, the tokens with a margin below x select it. So the bias should move by the x below
// which the wanted number of margins lies.
//
// Bin counts add over micro-batches, ranks and steps; margins themselves do not. Bins are relative to the bias in
// force, and their width grows with the distance from zero (two bins per octave). So one layout serves probabilities
// and logits of any scale, and is finest near zero, where the answer of a balanced layer lies. No bin straddles zero,
// so the sign of a margin is exact.
//
// Required biases are the other form, that of Kimi K3: r_ti = α_t - s_ti is the bias with which expert i would tie with
// α_t = v_{k+1}, the first score that was not selected; s is the score without its bias. They are counted in equal bins.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace moectl {

/// Number of bins of one expert's margins. Bins from kMarginBins/2 on hold d ≥ 0 in rising order; the bins below them
/// hold d < 0, mirrored.
inline constexpr std::size_t kMarginBins = 128;

/// The bin of a margin; ±infinity and all magnitudes from 3072 on share the outermost bins. `margin` must not be NaN.
std::size_t margin_bin(float margin);

/// The magnitude of a bin's inner edge, ≥ 0: 0, then 1.5·2^-20, 2^-19, 1.5·2^-19, … 3072. `distance` counts bins from
/// zero outwards, in [0, kMarginBins/2]; the last value is the outer edge of the outermost bin, 4096.
double margin_edge(std::size_t distance);

/// The move x of a bias, nearest to zero, at which `wanted` of the counted tokens have a margin below x, if the tokens'
/// thresholds do not change. Linear within a bin, never beyond ±4096; 0 if the wanted number is below zero now.
double margin_quantile(std::span<const std::int64_t, kMarginBins> bins, double wanted);

/// Number of equal bins of one expert's required biases, and of the int64 words that hold them, two counts a word.
inline constexpr std::size_t kRequiredBins = 1000, kRequiredWords = kRequiredBins / 2;

/// The largest number of tokens of a step, over all ranks, up to which the packed counts are exact: each stays in its 32
/// bits, and the sum over ranks of no word can wrap around, nor be thought to (the magnitudes beside the payload end at
/// 2^62).
inline constexpr std::int64_t kMostRequiredTokens = std::int64_t{1} << 29;

/// Where the bins of required biases lie: [min b - 1, max b + 1], b the biases that the tokens were routed under.
struct RequiredRange {
  double low = -1, width = 2;

  friend bool operator==(const RequiredRange&, const RequiredRange&) = default;
};

/// `biases` must be finite, and at least one.
RequiredRange required_range(std::span<const double> biases);

/// The bin of a required bias, ⌊1000 (r - low)/width⌋; beyond the range the outermost one. `required` must not be NaN.
std::size_t required_bin(const RequiredRange& range, double required);

/// The bias that `wanted` of the counted tokens require at most: within the first bin up to which there are so many,
/// linear. `words` as RoutingStats::required_bins gives them.
double required_bias(const RequiredRange& range, std::span<const std::int64_t, kRequiredWords> words,
                     double wanted);

}  // namespace moectl
