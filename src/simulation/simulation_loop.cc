#include <cstddef>
#include <deque>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/simulation.h"

namespace moectl {

SimulationOptions simulation_options(const ControllerConfig& config, const SimulationOptions& otherwise) {
  SimulationOptions options = otherwise;
  options.layers = config.model.layers;
  options.experts = config.model.experts;
  options.top_k = config.model.top_k;
  if (config.model.tokens_per_step > 0) options.tokens = config.model.tokens_per_step;
  options.score_space = config.model.score_space;
  options.delay = config.model.delay;
  options.targets = config.model.targets;
  if (!config.model.domains.empty()) options.domains = static_cast<int>(config.model.domains.size());
  return options;
}

void simulate(Controller& controller, const SimulationOptions& options, std::int64_t steps,
              const std::function<void(const StepReport&)>& observe) {
  const ControllerConfig& config = controller.config();
  const ModelConfig& model = config.model;
  if (config.layers.empty() &&
      (model.layers != options.layers || model.experts != options.experts || model.top_k != options.top_k)) {
    throw std::invalid_argument(
        "simulate: the options have other layers, experts or top_k than the controller");
  }
  const bool with_domains = !model.domains.empty();
  if (with_domains && static_cast<int>(model.domains.size()) != options.domains) {
    throw std::invalid_argument("simulate: domains = " + std::to_string(options.domains) +
                                ": the controller counts " + std::to_string(model.domains.size()));
  }
  std::vector<SimulatedRouter> routers;
  for (const LayerSettings& group : layer_settings(config)) {
    SimulationOptions plant = options;
    if (!config.layers.empty()) {
      plant.experts = group.config.model.experts;
      plant.top_k = group.config.model.top_k;
      plant.targets = group.config.model.targets;
    }
    const StatsNeeds& needs = controller.shape(group.ids.front()).needs;
    plant.probabilities = plant.probabilities || needs.probabilities;
    plant.biased_scores = plant.biased_scores || needs.biased_scores();
    for (std::size_t i = 0; i < group.ids.size(); ++i)
      routers.emplace_back(plant, static_cast<int>(routers.size()));
  }
  // Late stats wait here, one queue a layer.
  std::vector<std::deque<RoutingStats>> waiting(routers.size());

  for (std::int64_t step = 0; step < steps; ++step) {
    for (std::size_t l = 0; l < routers.size(); ++l) {
      const int layer = controller.layers()[l];
      const RoutingBatch batch = routers[l].route(controller.bias(layer), controller.aux_loss_weight(layer),
                                                  controller.temperature(layer));
      if (options.delay == 0) {
        controller.record(layer, batch);
        continue;
      }
      std::deque<RoutingStats>& queue = waiting[l];
      RoutingStats& late = queue.emplace_back(controller.shape(layer));
      // The width below which a gap is near, as for what is recorded in time.
      controller.record_with(layer, [&late](RoutingStats& sums) { late.set_gap_width(sums.gap_width()); });
      late.add(batch);
      if (queue.size() > static_cast<std::size_t>(options.delay)) {
        controller.record(layer, queue.front());
        queue.pop_front();
      }
    }
    StepInfo info;
    if (with_domains) info.next_mixture = routers.front().next_mixture();
    const StepReport& report = controller.step(info);
    if (observe) observe(report);
  }
}

}  // namespace moectl
