#include <cmath>
#include <stdexcept>
#include <string>

#include "moectl/simulation.h"
#include "simulation_options.h"

namespace moectl {
namespace {

template <typename T>
void require(bool good, const char* name, T value, const char* constraint) {
  if (good) return;
  throw std::invalid_argument(std::string("SimulationOptions: ") + name + " = " + std::to_string(value) +
                              ": " + constraint);
}

}  // namespace

void simulated::check(const SimulationOptions& o) {
  require(o.layers >= 1, "layers", o.layers, "must be at least 1");
  require(o.experts >= 1 && o.experts <= 65535, "experts", o.experts, "must be in [1, 65535]");
  require(o.top_k >= 1 && o.top_k <= o.experts, "top_k", o.top_k, "must be in [1, experts]");
  require(o.tokens >= 1, "tokens", o.tokens, "must be at least 1");
  require(o.sequence_length >= 0, "sequence_length", o.sequence_length, "must not be negative");
  require(o.sequence_length == 0 || o.tokens % o.sequence_length == 0, "sequence_length", o.sequence_length,
          "must divide tokens");
  require(o.event_step >= 0, "event_step", o.event_step, "must not be negative");
  require(o.delay >= 0, "delay", o.delay, "must not be negative");
  require(o.scenario != Scenario::kDelay || o.delay >= 1, "delay", o.delay,
          "must be at least 1 in scenario delay");
  require(o.scenario != Scenario::kDead || (o.sunk_experts >= 1 && o.sunk_experts < o.experts),
          "sunk_experts", o.sunk_experts, "must be in [1, experts) in scenario dead");
  require(o.domains >= 1, "domains", o.domains, "must be at least 1");
  require(o.scenario != Scenario::kShift || o.domains >= 2, "domains", o.domains,
          "must be at least 2 in scenario shift");
  require(o.clusters >= o.domains && o.clusters <= 65535, "clusters", o.clusters,
          "must be in [domains, 65535]");
  const auto at_least_0 = [](double value, const char* name) {
    require(std::isfinite(value) && value >= 0, name, value, "must be finite and not negative");
  };
  at_least_0(o.mixture_spread, "mixture_spread");
  at_least_0(o.cluster_spread, "cluster_spread");
  at_least_0(o.token_spread, "token_spread");
  at_least_0(o.preference, "preference");
  at_least_0(o.jitter, "jitter");
  at_least_0(o.capacity_factor, "capacity_factor");
  at_least_0(o.forming, "forming");
  at_least_0(o.task_pull, "task_pull");
  at_least_0(o.rich, "rich");
  at_least_0(o.aux_pull, "aux_pull");
  require(o.domain_share >= 0 && o.domain_share <= 1, "domain_share", o.domain_share, "must be in [0, 1]");
  require(o.coherence >= 0 && o.coherence <= 1, "coherence", o.coherence, "must be in [0, 1]");
  require(o.affinity_walk >= 0 && o.affinity_walk < 0.02, "affinity_walk", o.affinity_walk,
          "must be in [0, 0.02)");
  require(std::isfinite(o.score_scale) && o.score_scale > 0, "score_scale", o.score_scale,
          "must be finite and positive");
}

std::string_view name_of(SimulatedGate gate) {
  return gate == SimulatedGate::kSoftmax ? "softmax" : "sigmoid";
}
std::string_view name_of(Scenario scenario) {
  switch (scenario) {
    case Scenario::kSteady:
      return "steady";
    case Scenario::kShift:
      return "shift";
    case Scenario::kCollapse:
      return "collapse";
    case Scenario::kDead:
      return "dead";
    case Scenario::kDrift:
      return "drift";
    case Scenario::kDelay:
      return "delay";
    case Scenario::kNoise:
      return "noise";
  }
  return "";
}
std::string_view name_of(CollapseKind kind) {
  switch (kind) {
    case CollapseKind::kRunaway:
      return "runaway";
    case CollapseKind::kColdStart:
      return "cold_start";
    case CollapseKind::kDeadThird:
      return "dead_third";
    case CollapseKind::kPoisonedBias:
      return "poisoned_bias";
  }
  return "";
}
std::optional<SimulatedGate> gate_of(std::string_view name) {
  for (SimulatedGate gate : {SimulatedGate::kSoftmax, SimulatedGate::kSigmoid}) {
    if (name == name_of(gate)) return gate;
  }
  return std::nullopt;
}
std::optional<Scenario> scenario_of(std::string_view name) {
  for (Scenario s : {Scenario::kSteady, Scenario::kShift, Scenario::kCollapse, Scenario::kDead,
                     Scenario::kDrift, Scenario::kDelay, Scenario::kNoise}) {
    if (name == name_of(s)) return s;
  }
  return std::nullopt;
}

}  // namespace moectl
