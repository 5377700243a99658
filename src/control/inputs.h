// Inputs: what a policy needs from the router beyond counts, under the names by which it is recorded.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/stats.h"

namespace moectl {

/// Those of `required` that the sums of some tokens do not have.
StatsNeeds missing_in(const RoutingStats& stats, const StatsNeeds& required);

/// Whether records without a micro-batch repeat one another within a step, as recomputation makes them do. Counting is
/// not changed: two micro-batches may be alike.
class RepeatWatch {
 public:
  void observe(const RoutingBatch& batch, int top_k);
  void end_step();
  /// True once: after several steps in a row with a repeat.
  bool is_news();

 private:
  std::vector<std::uint64_t> prints_;  // of this step's records
  bool repeated_ = false;
  bool said_ = false;
  int steps_ = 0;
};

/// Whether the values by which experts were chosen, less the biases that they should hold, are probabilities: in [0, 1]. Of the
/// first tokens of a batch with top_values. [N]
bool leaves_probabilities(const RoutingBatch& batch, int top_k, std::span<const double> bias);

/// One of the inputs of `needs`, at least one of which is set, by the name of its field.
std::string_view input_name(const StatsNeeds& needs);
/// All of them.
std::vector<std::string> input_names(const StatsNeeds& needs);

/// How long the required inputs of one actuator have been missing.
class InputWatch {
 public:
  /// At each decision with data; `steps`: between two of them. Returns whether inputs have now been missing for `dwell`
  /// steps.
  bool observe(const StatsNeeds& missing, std::int64_t steps, std::int64_t dwell);

 private:
  std::int64_t missing_for_ = 0;  // steps in a row
};

}  // namespace moectl
