#include "moectl/torch/evaluation.h"

#include <stdexcept>
#include <string>

#include "torch/host_batch.h"

namespace moectl {

EvaluationMeter::EvaluationMeter(const Controller& controller)
    : stats_(static_cast<std::size_t>(controller.config().model.layers), RoutingStats(controller.shape())),
      metrics_(stats_.size()),
      layers_(stats_.size()),
      targets_(controller.config().model.experts, controller.config().model.targets),
      measurer_(controller.shape(), metrics_options(controller.config())) {}

void EvaluationMeter::record(int layer, const ::torch::Tensor& indices, const RecordOptions& options) {
  if (layer < 0 || static_cast<std::size_t>(layer) >= stats_.size()) {
    throw std::invalid_argument("layer: " + std::to_string(layer) + ": must be in [0, " +
                                std::to_string(stats_.size()) + ")");
  }
  RoutingStats& stats = stats_[static_cast<std::size_t>(layer)];
  stats.add(HostBatch(stats.shape(), indices, options).batch());
  stats.join_sequences();  // the next batch has other sequences under the same ids
}

const StepReport& EvaluationMeter::report(std::int64_t step, const StepInfo& info) {
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    measurer_.measure(stats_[i], metrics_[i]);
    layers_[i].layer = static_cast<int>(i);
    layers_[i].stats = &stats_[i];
    layers_[i].metrics = &metrics_[i];
  }
  report_.step = step;
  report_.info = info;
  report_.layers = layers_;
  report_.targets = &targets_;
  return report_;
}

void EvaluationMeter::clear() {
  for (RoutingStats& stats : stats_) stats.clear();
}

}  // namespace moectl
