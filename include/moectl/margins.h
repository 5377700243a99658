// Margins: how far each expert stands from being selected, token by token, as counts that add.
//
// The margin of token t for expert i is d_ti = θ_t - v_ti: the selection threshold θ_t = (v_k + v_{k+1})/2 of
// the token less the expert's biased score. Experts with a negative margin are selected, so c_i tokens lie
// below zero; raising the bias of i by x moves the threshold of counting from 0 to x. The x at which the
// wanted number of tokens lies below it is what the bias should move by.
//
// Counts in bins add over micro-batches, ranks and steps where margins themselves would not. Bins are
// relative to the bias in force and their width grows with the distance from zero (two to an octave), so that
// one layout serves probabilities and logits of any scale, and is finest where a balanced layer's answer
// lies. The sign of a margin is exact: bins never straddle zero. (Kimi K3 and Megatron bin α - s uniformly
// over a range of scores that must be known.)
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace moectl {

/// Bins of one expert's margins. Those from kMarginBins/2 on hold d ≥ 0, by rising size; those below hold d <
/// 0, mirrored.
inline constexpr std::size_t kMarginBins = 128;

/// The bin of a margin; ±infinity and all sizes from 3072 on share the outermost bins. `margin` must not be
/// NaN.
std::size_t margin_bin(float margin);

/// The smaller of a bin's edges in magnitude, ≥ 0: 0, then 1.5·2^-20, 2^-19, 1.5·2^-19, … 3072. `distance`
/// counts bins from zero outwards, in [0, kMarginBins/2]; the last is the far edge of the outermost, 4096.
double margin_edge(std::size_t distance);

/// The move x of a bias, nearest to zero, at which `wanted` of the counted tokens have a margin below it,
/// were the thresholds to stay: linear within a bin, never beyond ±4096. 0 if as many as wanted are below
/// zero now.
double margin_quantile(std::span<const std::int64_t, kMarginBins> bins, double wanted);

}  // namespace moectl
