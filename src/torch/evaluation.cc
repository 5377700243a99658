#include "moectl/torch/evaluation.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "control/payload.h"
#include "torch/host_batch.h"

namespace moectl {

EvaluationMeter::EvaluationMeter(const Controller& controller) : ids_(controller.layers()) {
  for (const LayerSettings& group : layer_settings(controller.config())) {
    targets_.emplace_back(group.config.model.experts, group.config.model.targets);
    measurers_.emplace_back(controller.shape(group.ids.front()), metrics_options(group.config));
    for (const int id : group.ids) {
      stats_.emplace_back(controller.shape(id));
      group_of_.push_back(targets_.size() - 1);
    }
  }
  metrics_.resize(stats_.size());
  layers_.resize(stats_.size());
}

void EvaluationMeter::record(int layer, const ::torch::Tensor& indices, const RecordOptions& options) {
  const auto at = static_cast<std::size_t>(std::find(ids_.begin(), ids_.end(), layer) - ids_.begin());
  if (at == ids_.size()) {
    throw std::invalid_argument("layer: " + std::to_string(layer) + ": must be a layer of the controller, " +
                                std::to_string(ids_.front()) + " to " + std::to_string(ids_.back()));
  }
  stats_[at].add(HostBatch(stats_[at].shape(), indices, options).batch());
  stats_[at].join_sequences();  // the next batch has other sequences under the same ids
}

void EvaluationMeter::sum_over_ranks(const Reduction& sum) {
  std::vector<std::size_t> sizes;
  for (const RoutingStats& stats : stats_) sizes.push_back(stats.flat().size());
  Payload payload(sizes, 0);
  for (std::size_t i = 0; i < stats_.size(); ++i) payload.put(i, stats_[i].flat());
  payload.put(StepInfo{}, 0, false, false);
  payload.reduce(sum);
  for (std::size_t i = 0; i < stats_.size(); ++i) {
    std::ranges::copy(payload.layer(i), stats_[i].flat().begin());
    if (!payload.in_range(i)) {
      stats_[i].set_scalar(RoutingStats::kInvalidRecords,
                           std::max<std::int64_t>(1, stats_[i].invalid_records()));
    }
  }
}

const StepReport& EvaluationMeter::report(std::int64_t step, const StepInfo& info) {
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    measurers_[group_of_[i]].measure(stats_[i], metrics_[i]);
    layers_[i].layer = ids_[i];
    layers_[i].stats = &stats_[i];
    layers_[i].metrics = &metrics_[i];
    layers_[i].targets = &targets_[group_of_[i]];
  }
  report_.step = step;
  report_.info = info;
  report_.layers = layers_;
  return report_;
}

void EvaluationMeter::clear() {
  for (RoutingStats& stats : stats_) stats.clear();
}

}  // namespace moectl
