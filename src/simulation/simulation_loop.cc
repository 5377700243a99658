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
  const ModelConfig& model = controller.config().model;
  if (model.layers != options.layers || model.experts != options.experts || model.top_k != options.top_k) {
    throw std::invalid_argument("simulate: the plant has other layers, experts or top_k than the controller");
  }
  const bool with_domains = !model.domains.empty();
  if (with_domains && static_cast<int>(model.domains.size()) != options.domains) {
    throw std::invalid_argument("simulate: domains = " + std::to_string(options.domains) +
                                ": the controller counts " + std::to_string(model.domains.size()));
  }
  SimulationOptions plant = options;
  plant.probabilities = plant.probabilities || controller.shape().needs.probabilities;
  plant.biased_scores =
      plant.biased_scores || controller.shape().needs.margins || controller.shape().needs.margin_rows;
  std::vector<SimulatedRouter> routers;
  routers.reserve(static_cast<std::size_t>(plant.layers));
  for (int layer = 0; layer < plant.layers; ++layer) routers.emplace_back(plant, layer);
  // Late stats wait here, one queue a layer.
  std::vector<std::deque<RoutingStats>> waiting(routers.size());

  for (std::int64_t step = 0; step < steps; ++step) {
    for (int layer = 0; layer < plant.layers; ++layer) {
      SimulatedRouter& router = routers[static_cast<std::size_t>(layer)];
      const RoutingBatch batch = router.route(controller.bias(layer), controller.aux_loss_weight(layer),
                                              controller.temperature(layer));
      if (plant.delay == 0) {
        controller.record(layer, batch);
        continue;
      }
      std::deque<RoutingStats>& queue = waiting[static_cast<std::size_t>(layer)];
      queue.emplace_back(controller.shape()).add(batch);
      if (queue.size() > static_cast<std::size_t>(plant.delay)) {
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
