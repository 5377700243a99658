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
// so the sign of a margin is exact. (Kimi K3 and Megatron bin α - s uniformly over a range of scores that must be known
// in advance.)
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

}  // namespace moectl
