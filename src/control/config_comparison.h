// ConfigComparison: what the config states of equal layers, compared with the first steps that have data.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "control/notices.h"
#include "moectl/config.h"
#include "moectl/stats.h"

namespace moectl {

class ConfigComparison {
 public:
  explicit ConfigComparison(std::size_t layers) : tokens_(layers) { layers_.reserve(layers); }

  struct Layer {
    int id;
    const RoutingStats* stats;  // null = none that can be used
  };
  /// Looks at one step of the layers. Says once what the config and the data contradict. A step can be an odd one, so
  /// all but the number of tokens is judged after several.
  template <class LayerAt>
  void observe(const ModelConfig& model, std::span<const double> targets, std::size_t layers,
               LayerAt&& layer_at, std::int64_t step, Notices& notices) {
    if (done()) return;
    layers_.clear();
    for (std::size_t i = 0; i < layers; ++i) layers_.push_back(layer_at(i));
    look(model, targets, step, notices);
  }

 private:
  static constexpr std::int64_t kSteps = 10;
  bool done() const { return steps_ >= kSteps; }
  void look(const ModelConfig& model, std::span<const double> targets, std::int64_t step, Notices& notices);
  void say_missing_layer(const ModelConfig& model, std::int64_t step, Notices& notices) const;
  void say_unused_experts(const ModelConfig& model, std::span<const double> targets, std::int64_t step,
                          Notices& notices) const;

  std::vector<Layer> layers_;
  std::vector<std::int64_t> tokens_;  // of each layer, in all steps that were looked at
  std::int64_t steps_ = 0;
  bool same_experts_ = true, tokens_compared_ = false;
  int last_used_expert_ = -1;
  std::int64_t fewest_tokens_ = 0;
};

}  // namespace moectl
