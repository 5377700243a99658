// Records one uneven step and checks that the starved expert's bias rose.
#include <cstdint>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"

int main() {
  moectl::Controller controller(moectl::parse_config(R"(
version: 1
model: {layers: 1, experts: 2, top_k: 1}
expert_bias: {policy: sign_bias, options: {step: 0.01}, limits: {rate: 0.01}}
)"));
  const std::vector<std::int64_t> experts = {0, 0, 0, 1};
  controller.record(0, {.experts = experts});
  controller.step();
  return controller.bias(0)[1] > 0 && controller.bias(0)[0] < 0 ? 0 : 1;
}
