#include "moectl/state.h"

#include <array>
#include <cmath>
#include <optional>

#include "altered_state.h"
#include "fuzz/choices.h"
#include "fuzz/memory_file.h"
#include "moectl/controller.h"

namespace moectl::fuzz {
namespace {

ControllerConfig config_of(std::size_t which) {
  static const std::array<const char*, 6> kConfigs = {
      "expert_bias: {policy: adaptive_bias}\n",
      "lag: 1\nexpert_bias: {policy: adaptive_bias, limits: {cadence: 2}}\n"
      "aux_loss_weight: {policy: pi, scope: model, initial: 0.01, options: {metric: load_cv, target: 0.3}}\n"
      "guard: {enabled: true}\nsafety: {rollback: {}, oscillation: {}}\n"
      "health: {bands: {load_cv: [0, 0.5]}, alerts: [{metric: max_vio, above: 0.2}]}\n",
      "expert_bias: {policy: quantile_bias}\nrouter_temperature: {policy: entropy_temperature}\n",
      "expert_bias: {policy: tanh_momentum_bias}\naux_loss_weight: {policy: rules, initial: 0.01}\n"
      "guard: {enabled: true}\n",
      "expert_bias: {policy: adaptive_bias, options: {feedforward: tags, rescue: true}}\n"
      "collect: {gradients: true, losses: true, latencies: true, probabilities: true}\n",
      "expert_bias: {policy: quantile_bias, options: {form: k3, gain: 1}}\naux_loss_weight: {policy: "
      "multiplicative, "
      "initial: 0.01, options: {metric: load_cv, target: 0.3}}\n"};
  const std::string domains = which == 4 ? ", domains: [a, b]" : "";
  return parse_config("version: 1\nmodel: {layers: 2, experts: 4, top_k: 2" + domains +
                      "}\nmetrics: {trend_window: 6}\n" + kConfigs[which]);
}

void record(Controller& controller, std::uint64_t seed) {
  const StatsNeeds& needs = controller.shape(0).needs;
  std::vector<std::int64_t> experts, domains;
  std::vector<float> top, scores;
  for (std::uint64_t t = 0; t < 16; ++t) {
    const std::uint64_t first = (seed * 7 + t * t) % 4;
    for (std::uint64_t j = 0; j < 2; ++j) experts.push_back(static_cast<std::int64_t>((first + j) % 4));
    top.insert(top.end(), {0.5F, 0.4F, 0.3F - 0.01F * static_cast<float>(t)});
    for (std::uint64_t i = 0; i < 4; ++i)
      scores.push_back(0.1F + 0.05F * static_cast<float>((seed + t + i) % 5));
    domains.push_back(static_cast<std::int64_t>(t % 2));
  }
  RoutingBatch batch{.experts = experts, .sequence_length = 8, .top_values = top};
  if (needs.biased_scores()) batch.biased_scores = scores;
  if (needs.probabilities) batch.probabilities = scores;
  if (needs.domains > 0) batch.domain_ids = domains;
  for (const int layer : controller.layers()) controller.record(layer, batch);
}

void require_sane(const Controller& controller) {
  const auto inside = [](double value, const Limits& limits) {
    return value >= limits.min && value <= limits.max;
  };
  const ControllerConfig& config = controller.config();
  for (const int layer : controller.layers()) {
    for (const double bias : controller.bias(layer))
      require(inside(bias, config.expert_bias.limits), "biases are within their limits");
    require(inside(controller.aux_loss_weight(layer), config.aux_loss_weight.limits),
            "the weight is within its limits");
    require(inside(controller.temperature(layer), config.router_temperature.limits),
            "the temperature is within its limits");
  }
}

}  // namespace

void state(Bytes bytes) {
  Choices choices(bytes);
  const std::size_t which = choices.below(6);
  static std::array<std::optional<ControllerConfig>, 6> configs;
  static std::array<std::string, 6> states;
  if (!configs[which]) {
    configs[which] = config_of(which);
    Controller controller(*configs[which]);
    for (std::uint64_t step = 0; step < 12; ++step) {
      record(controller, step);
      controller.step({.loss = 2.5});
    }
    record(controller, 99);
    states[which] = controller.save();
  }
  std::string altered = states[which];
  const bool raw = choices.below(4) == 3;
  if (raw) {
    altered = moectl::testing::with_state_header(text_of(choices.rest()));
  } else {
    const auto entries = moectl::testing::state_entries(altered);
    while (!choices.done()) {
      const auto& entry = entries[(choices.byte() * std::size_t{256} + choices.byte()) % entries.size()];
      if (entry.type == 't' || entry.type == 's' || entry.count == 0) {
        choices.byte();
        continue;
      }
      const std::size_t element = choices.byte() % entry.count;
      altered = entry.type == 'd' ? moectl::testing::with_number(altered, entry, element, choices.number())
                                  : moectl::testing::with_number(altered, entry, element, choices.integer());
    }
  }
  Controller controller(*configs[which]);
  for (const Keep keep : {Keep::everything, Keep::what_fits}) {
    const std::string before = controller.save();
    try {
      controller.load(altered, keep);
    } catch (const StateError& error) {
      require_message(error);
      require(controller.save() == before, "a state that is refused changes nothing");
      continue;
    }
    require(keep == Keep::what_fits || controller.save().size() == states[which].size() || raw,
            "a state has one length");
    // Values in force may stand outside the limits only until the first decision.
    for (std::uint64_t step = 0; step < 4; ++step) {
      record(controller, step);
      controller.step({.loss = 2.0 + 0.1 * static_cast<double>(step)});
      for (const int layer : controller.layers()) {
        for (const double bias : controller.bias(layer)) require(std::isfinite(bias), "biases are finite");
        require(std::isfinite(controller.aux_loss_weight(layer)), "the weight is finite");
        require(std::isfinite(controller.temperature(layer)), "the temperature is finite");
      }
    }
    if (keep == Keep::what_fits) require_sane(controller);
    const std::string after = controller.save();
    try {
      controller.load(after);
    } catch (const StateError& error) {
      throw Finding(std::string("a controller loads what it saved: ") + error.what());
    }
    require(controller.save() == after, "a state loads as itself");
  }
}

}  // namespace moectl::fuzz
