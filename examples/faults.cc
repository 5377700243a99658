#include "faults.h"

#include <cmath>
#include <stdexcept>

namespace {

// What the router reads gets an offset in one direction, along which an expert's scores can then be moved for every token.
constexpr double kOffset = 3;

void poison(moectl::TorchController& controller, int layer) {
  const auto experts = static_cast<std::size_t>(controller.controller().shape(layer).experts);
  const auto chosen = static_cast<std::size_t>(controller.controller().shape(layer).top_k);
  const double share = static_cast<double>(chosen) / static_cast<double>(experts);
  std::vector<double> bias(experts, -share);
  for (std::size_t i = 0; i < chosen; ++i) bias[i] = 1 - share;
  controller.adopt(layer, torch::tensor(bias, torch::kFloat64));
}

}  // namespace

void break_routers(MoeLm& model, const std::vector<moectl::TorchController*>& controllers,
                   std::string_view fault) {
  const torch::NoGradGuard no_grad;
  if (fault == "biases") {
    for (std::size_t layer = 0; layer < controllers.size(); ++layer) {
      if (controllers[layer] != nullptr) poison(*controllers[layer], static_cast<int>(layer));
    }
    return;
  }
  for (const auto& [norm, moe] : model->moes()) {
    torch::Tensor weight = moe->router()->weight;
    const std::int64_t experts = weight.size(0), width = weight.size(1);
    if (fault == "flat") {
      weight.zero_();
      continue;
    }
    const torch::Tensor direction =
        torch::full({width}, 1 / std::sqrt(static_cast<double>(width)), weight.options());
    norm->bias.add_(direction, kOffset);
    if (fault == "favourite") {
      weight[0].add_(direction, kOffset);
    } else if (fault == "sunk-third") {
      weight.narrow(0, 0, experts / 3).sub_(direction, kOffset);
    } else {
      throw std::invalid_argument("no fault '" + std::string(fault) + "'");
    }
  }
}

void scale_routers(MoeLm& model, double factor) {
  const torch::NoGradGuard no_grad;
  for (const auto& [norm, moe] : model->moes()) moe->router()->weight.mul_(factor);
}
