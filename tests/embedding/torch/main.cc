// Routes one batch through a TopKRouter under control and checks that the biases moved and keep their mean.
#include <cmath>

#include "moectl/config.h"
#include "moectl/torch/controller.h"
#include "moectl/torch/router.h"

int main() {
  torch::manual_seed(1);
  moectl::TorchController controller(moectl::parse_config(R"(
version: 1
model: {layers: 1, experts: 4, top_k: 2, score_space: logit}
expert_bias: {policy: adaptive_bias}
)"));
  moectl::TopKRouter router(moectl::TopKRouterOptions(8, 4, 2));
  const auto routed = router->forward(torch::randn({2, 64, 8}), {.actuators = controller.actuators(0)});
  controller.record(0, routed.indices, routed.record_options());
  controller.step();
  const auto bias = controller.bias(0);
  const bool moved = bias.abs().max().item<float>() > 0;
  const bool centred = std::abs(bias.mean().item<float>()) < 1e-6F;
  return moved && centred ? 0 : 1;
}
