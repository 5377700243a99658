// The basic types that every part of the library shares.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

namespace moectl {

/// Where a selection bias is added: to the gate's probabilities (softmax or sigmoid outputs) or to its logits.
enum class ScoreSpace { kProbability, kLogit };

/// The values that a controller can move. Scalars are vectors of length 1, so one interface serves all three.
enum class Actuator { kExpertBias, kAuxLossWeight, kRouterTemperature };

inline constexpr Actuator kActuators[] = {Actuator::kExpertBias, Actuator::kAuxLossWeight,
                                          Actuator::kRouterTemperature};
inline constexpr int kActuatorCount = 3;

/// The actuator's key in configs and run logs.
constexpr std::string_view name_of(Actuator actuator) {
  switch (actuator) {
    case Actuator::kExpertBias:
      return "expert_bias";
    case Actuator::kAuxLossWeight:
      return "aux_loss_weight";
    case Actuator::kRouterTemperature:
      return "router_temperature";
  }
  return "";
}

constexpr std::string_view name_of(ScoreSpace space) {
  return space == ScoreSpace::kLogit ? "logit" : "probability";
}

/// Biases add (their unit is a score); the two scalars multiply (their rate is a log ratio).
constexpr bool is_multiplicative(Actuator actuator) {
  return actuator != Actuator::kExpertBias;
}

/// The value at which the actuator does nothing: no bias, no auxiliary loss, an untouched softmax.
constexpr double neutral_value(Actuator actuator) {
  return actuator == Actuator::kRouterTemperature ? 1.0 : 0.0;
}

}  // namespace moectl
