// EvaluationMeter: measures balance in a pass that must not move the controller, such as validation.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/stats.h"
#include "moectl/torch/controller.h"

namespace moectl {

/// Sums a whole pass, layer by layer, whether or not gradients are on, and decides nothing. MaxVio of the
/// sums is the MaxVio_global of 2408.15664. Not thread-safe.
class EvaluationMeter {
 public:
  /// Collects what `controller` collects.
  explicit EvaluationMeter(const Controller& controller);

  /// As TorchController::record, but always. Pieces of a sequence (`model.split_sequences`) join within a record.
  void record(int layer, const ::torch::Tensor& indices, const RecordOptions& options = {});
  /// Joins the passes of all ranks, each of which recorded other tokens: afterwards every rank holds the sums of all. Once
  /// before report(), on every rank: a second time would add up the sums. All ranks have the same config. `sum`: as for
  /// Controller::set_reduction, such as reduce_over(group). Throws ReductionError; the sums are then those of this rank.
  void sum_over_ranks(const Reduction& sum);
  /// Measures all records since the last clear(). Valid until the next record or clear; RunLogWriter writes it under a
  /// tag.
  const StepReport& report(std::int64_t step, const StepInfo& info = {});
  void clear();

 private:
  std::vector<RoutingStats> stats_;
  std::vector<Metrics> metrics_;
  std::vector<LayerReport> layers_;
  std::vector<int> ids_;
  std::vector<std::size_t> group_of_;  // of each layer
  std::vector<LoadTargets> targets_;   // of each group
  std::vector<Measurer> measurers_;
  StepReport report_;
};

}  // namespace moectl
