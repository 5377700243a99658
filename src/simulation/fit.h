// The simulated router fitted to a trace, by the method of moments: options are moved until the simulated router shows the
// same moments as the trace.
//   token_spread, coherence  ← gap, the mean of v_k - v_{k+1}; the density of gaps near 0; the entropy of the router's
//                              probabilities; the design effect, which is the square of sampling over noise floor and says
//                              how much alike the tokens of a sequence are. As far as the trace has them
//   preference               ← CV of the counts summed over the steps, less its floor; of a trace that is not balanced
//   mixture_spread           ← variance of the loads between steps over that of the floor: 1 where the data stay what they are
//   clusters                 ← what is left of the misfit. Loads tell little of them: a range that fits is given
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/simulation.h"

namespace moectl {

/// What a trace shows: means over its layers. `near`: density of gaps at 0 times the mean gap; 1 if they are exponential.
struct TraceMoments {
  int layers = 0, experts = 0, top_k = 0;
  std::int64_t steps = 0, tokens = 0;  ///< Mean tokens of a step.
  std::int64_t sequence_length = 0;    ///< Mean tokens of a sequence; 0 = no sequences.
  std::optional<double> static_cv{}, design_effect{}, step_variance{}, gap{}, near{}, token_entropy{};
  double design_effect_error = 0;    ///< Standard error between layers.
  std::optional<double> floor_cv{};  ///< The floor in force.
};

/// Takes in records of layers of one shape, in the order of their steps.
class MomentSums {
 public:
  /// Throws std::invalid_argument if experts or top_k change.
  void add(int layer, const RoutingStats& stats);
  TraceMoments moments() const;

 private:
  struct Layer {
    std::vector<double> counts;
    double assignments = 0, steps = 0, cv_sq = 0, floor_sq = 0, ratio = 0, ratios = 0;
    double gap = 0, gaps = 0, near = 0, nears = 0, entropy = 0, entropies = 0, tokens = 0, sequences = 0;
  };
  int experts_ = 0, top_k_ = 0;
  std::map<int, Layer> layers_;
};

struct SimulationFit {
  SimulationOptions options;
  /// Moment, of the trace, of the simulated router.
  struct Moment {
    std::string name;
    double trace = 0, simulated = 0;
  };
  std::vector<Moment> moments;
  /// Root mean square of ln(simulated / trace) over the moments, but for a step variance of about 1.
  double misfit = 0;
  /// The 95 % interval of the coherence, from that of the design effect; absent without sums by sequence.
  std::optional<std::pair<double, double>> coherence{};
  /// Cluster counts whose misfit is at most 0.05 larger than the best.
  int clusters_from = 0, clusters_to = 0;
  bool balanced = false;            ///< The trace is: the router was fitted under control.
  std::vector<std::string> untold;  ///< Options that the trace says nothing of, and why.
};

/// Moves token_spread, coherence, preference, mixture_spread and clusters of `start`; its gate, score space and scale must be
/// those of the trace. Layers, experts, top_k, tokens and sequence_length are taken from the trace.
SimulationFit fit_simulation(const TraceMoments& trace, const SimulationOptions& start);

}  // namespace moectl
