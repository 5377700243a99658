// StatsNeeds: which sums of a layer's routing are collected. StatsShape: the size of the array that holds them.
#pragma once

#include <cstddef>

namespace moectl {

/// The sums that are collected in addition to counts. The payload holds the union of the needs of the policies, the
/// metrics and the log.
struct StatsNeeds {
  bool gap = false;  ///< Of the sorted, biased scores v: Σ_t (v_k - v_{k+1}), and each expert's small ones.
  bool sequences = false;       ///< Per-sequence squares, for the sampling floor.
  bool probabilities = false;   ///< Σ_t p_ti, Σ_t √p_ti, Σ_t H(p_t).
  bool gradients = false;       ///< Gradient norm per expert.
  bool losses = false;          ///< Loss per expert (sum over its tokens).
  bool domain_losses = false;   ///< Loss per (domain, expert); nothing without domains.
  bool latencies = false;       ///< Host-timed latency per expert, seconds.
  bool margins = false;         ///< Histogram of each expert's margins over tokens (margins.h).
  bool pairs = false;           ///< Tokens that chose both, for every two experts: N (N - 1)/2 sums.
  bool required_bins = false;   ///< Histogram of each expert's required biases (margins.h).
  bool required_local = false;  ///< Required bias of each expert, by micro-batch.
  int domains = 0;              ///< Number of domains whose tokens are counted separately.
  /// With `sequences`: how many sequences of a step may come in pieces, over records or ranks, to be joined by their ids.
  int split_sequences = 0;

  /// Whether RoutingBatch::biased_scores serves one of them.
  bool biased_scores() const { return margins || required_bins || required_local; }
  StatsNeeds& operator|=(const StatsNeeds& other);
  friend bool operator==(const StatsNeeds&, const StatsNeeds&) = default;
};

/// Size and meaning of a layer's flat array. Two RoutingStats add only if their shapes are equal.
struct StatsShape {
  int experts = 0;  ///< N ≥ 1.
  int top_k = 0;    ///< k, 1 ≤ k ≤ N.
  StatsNeeds needs;

  std::size_t flat_size() const;
  friend bool operator==(const StatsShape&, const StatsShape&) = default;
};

}  // namespace moectl
