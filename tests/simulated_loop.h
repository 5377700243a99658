// What tests and experiment tables (bench/) of a closed loop share: configs that suit a simulated plant, and which
// policies there are.
#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "moectl/controller.h"
#include "moectl/policy.h"
#include "moectl/simulation.h"
#include "simulation/simulation_options.h"

namespace moectl {

/// One bias policy on `plant`, its delay declared. Range and rate are in units of the plant's scores, ×8 for logits.
inline ControllerConfig config_for(const SimulationOptions& plant, const std::string& policy,
                                   const std::map<std::string, OptionValue>& options = {}, double range = 2,
                                   double rate = 0.1) {
  ControllerConfig config;
  config.model = simulated::model_of(plant);
  config.expert_bias.policy = policy;
  for (const auto& [name, value] : options) config.expert_bias.options.set(name, value);
  const double unit = plant.score_scale * (plant.score_space == ScoreSpace::kLogit ? 8 : 1);
  Limits& limits = config.expert_bias.limits;
  limits.min = -range * unit;
  limits.max = range * unit;
  limits.rate = rate * unit;
  return config;
}

/// The registered bias policies, all but `fixed`.
inline std::set<std::string> bias_policies() {
  std::set<std::string> names;
  for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
    const auto& served = policy->actuators;
    const bool moves = std::find(served.begin(), served.end(), Actuator::kExpertBias) != served.end();
    if (moves && policy->name != "fixed") names.insert(policy->name);
  }
  return names;
}

}  // namespace moectl
