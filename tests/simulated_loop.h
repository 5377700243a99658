// What tests of a closed loop share: configs that suit a simulated plant, and which laws there are.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "moectl/controller.h"
#include "moectl/policy.h"
#include "moectl/simulation.h"

namespace moectl {

/// One law of the biases on `plant`, its limits in the plant's unit of scores.
inline ControllerConfig config_for(const SimulationOptions& plant, const std::string& policy,
                                   const std::map<std::string, OptionValue>& options = {}) {
  ControllerConfig config;
  config.model.layers = plant.layers;
  config.model.experts = plant.experts;
  config.model.top_k = plant.top_k;
  config.model.tokens_per_step = plant.tokens;
  config.model.score_space = plant.score_space;
  config.model.delay = plant.delay;
  config.expert_bias.policy = policy;
  for (const auto& [name, value] : options) config.expert_bias.options.set(name, value);
  const double unit = plant.score_scale * (plant.score_space == ScoreSpace::kLogit ? 8 : 1);
  config.expert_bias.limits = {.min = -2 * unit, .max = 2 * unit, .rate = 0.1 * unit};
  return config;
}

/// The registered laws of the biases, all but `fixed`.
inline std::set<std::string> laws_of_the_biases() {
  std::set<std::string> names;
  for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
    const auto& served = policy->actuators;
    const bool moves = std::find(served.begin(), served.end(), Actuator::kExpertBias) != served.end();
    if (moves && policy->name != "fixed") names.insert(policy->name);
  }
  return names;
}

}  // namespace moectl
