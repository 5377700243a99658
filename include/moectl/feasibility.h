// Feasibility: which bands can be met together, and which lie below the noise floor of the batch.
//
// All load metrics are functions of one vector, the loads p of N experts with 0 ≤ p ≤ 1/k and Σ p = 1. So a band on one
// metric forces bands on the others. Bands are judged here, before a controller tries to meet them. Every metric
// belongs to one of five axes: coefficient of variation, largest load, Gini, idle experts, distance from uniform. For
// each pair of axes, the largest and the smallest value of one at a given value of the other are known, and both grow
// with that value. So the ends of two bands decide exactly whether the pair can be met.
//
// With unequal targets, load_cv, max_to_mean, max_vio and dead_experts are relative to the targets (metrics.h). Each of
// them is then judged alone, by its range and its floor. Bands on the other metrics must not ask for more evenness than
// a load has that meets its targets.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "moectl/bands.h"

namespace moectl {

/// The space of possible loads.
struct LoadSpace {
  int experts = 0;                    ///< N ≥ 1.
  int top_k = 0;                      ///< 1 ≤ k ≤ N.
  std::int64_t tokens = 0;            ///< Tokens of one step over all ranks; 0 = not known (no noise floor).
  std::span<const double> targets{};  ///< Wanted share of the load of each expert [N]; empty = equal.
};

/// Smallest and largest value.
struct Extent {
  double min = 0;
  double max = 0;
};

// The range of one metric at a given value of another. Values that N and k do not allow are clipped to the allowed
// range.
Extent entropy_at_cv(const LoadSpace& space, double load_cv);  ///< nats
Extent max_load_at_cv(const LoadSpace& space, double load_cv);
Extent gini_at_cv(const LoadSpace& space, double load_cv);
int max_idle_at_cv(const LoadSpace& space, double load_cv);  ///< ⌊N c² / (1 + c²)⌋
Extent entropy_at_max_load(const LoadSpace& space, double max_load);
Extent gini_at_max_load(const LoadSpace& space, double max_load);
Extent entropy_at_gini(const LoadSpace& space, double gini);

/// Bands that cannot hold together, or a band that cannot hold at all.
struct Conflict {
  std::vector<std::string> metrics;  ///< One metric, a pair, or a set that is infeasible only together.
  std::string message;  ///< "load_cv ≤ 0.6 forces entropy_normalized ≥ 0.8919 at N = 16, k = 2; …"
  /// The nearest feasible band, "entropy_normalized: [0.8919, 0.9581]"; may be empty.
  std::string suggestion;
};

/// The result for a set of bands.
struct Feasibility {
  std::vector<Conflict> conflicts;
  /// True if three or more axes have bands and no conflict was found. Single bands, pairs, and pairs under a band on
  /// the largest load are decided; the whole set is not.
  bool undecided_together = false;
  /// Metrics with bands that do not depend on the loads alone, and so were not judged.
  std::vector<std::string> not_judged;
  /// Metrics relative to unequal targets that were not compared with the other bands.
  std::vector<std::string> judged_alone;
  bool feasible() const { return conflicts.empty(); }
};

/// Throws std::invalid_argument for a space or targets out of range, an unknown metric, or a band with low > high
/// or NaN.
Feasibility judge(const LoadSpace& space, const Bands& bands);

struct ControllerConfig;

/// Judges the bands of a config's health section, phase by phase, together with the set-points of its policies that
/// decide at every step. Messages begin with the place, "health.phases[1] (mid): ".
Feasibility judge_bands(const ControllerConfig& config);

}  // namespace moectl
