// Feasibility: which targets can hold together, and which lie under the noise floor of the batch.
//
// All load metrics are functions of one vector, the loads p of N experts with 0 ≤ p ≤ 1/k and Σ p = 1, so
// that a band on one forces bands on the others. Bands are judged here before a controller chases them. Every
// metric falls on one of five axes (coefficient of variation, largest load, Gini, idle experts, distance from
// uniform); for each pair of axes the largest and the smallest value of one at a given value of the other are
// known and grow with it, so that a pair of bands is decided exactly by looking at their ends.
//
// With unequal targets load_cv, max_to_mean, max_vio and dead_experts are relative to them (metrics.h) and lie on axes of
// their own: they are judged alone, by what they can be and by their floor. Bands on the loads themselves must not ask for
// more evenness than a load on its targets has.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "moectl/bands.h"

namespace moectl {

/// What the loads are made of.
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

// What can be at a given value of another metric. Values outside what N and k allow are clipped to it.
Extent entropy_at_cv(const LoadSpace& space, double load_cv);  ///< nats
Extent max_load_at_cv(const LoadSpace& space, double load_cv);
Extent gini_at_cv(const LoadSpace& space, double load_cv);
int max_idle_at_cv(const LoadSpace& space, double load_cv);  ///< ⌊N c² / (1 + c²)⌋
Extent entropy_at_max_load(const LoadSpace& space, double max_load);
Extent gini_at_max_load(const LoadSpace& space, double max_load);
Extent entropy_at_gini(const LoadSpace& space, double gini);

/// Bands that cannot hold together, or a band that cannot hold at all.
struct Conflict {
  std::vector<std::string> metrics;  ///< One, two, or all of those that are infeasible only together.
  std::string message;  ///< "load_cv ≤ 0.6 forces entropy_normalized ≥ 0.8919 at N = 16, k = 2; …"
  std::string
      suggestion;  ///< The nearest feasible band, "entropy_normalized: [0.8919, 0.9581]"; may be empty.
};

/// What was found of a set of bands.
struct Feasibility {
  std::vector<Conflict> conflicts;
  /// Three or more axes have bands and no conflict was found: single bands, pairs, and pairs under a band on the
  /// largest load are decided, the whole is not.
  bool undecided_together = false;
  /// Metrics of bands that are no function of the loads, and so were not judged.
  std::vector<std::string> not_judged;
  /// Metrics relative to unequal targets, where others have bands as well: not compared with those.
  std::vector<std::string> judged_alone;
  bool feasible() const { return conflicts.empty(); }
};

/// Throws std::invalid_argument for a space or targets out of range, an unknown metric, or a band with low > high
/// or NaN.
Feasibility judge(const LoadSpace& space, const Bands& bands);

struct ControllerConfig;

/// The bands of a config's health section, phase by phase, each together with the set-points that its
/// policies decide on at every step. Messages begin with the place, "health.phases[1] (mid): ".
Feasibility judge_bands(const ControllerConfig& config);

}  // namespace moectl
