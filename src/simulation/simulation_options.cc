#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "base/fields.h"
#include "base/names.h"
#include "moectl/load_targets.h"
#include "moectl/simulation.h"
#include "simulation/simulation_options.h"

namespace moectl {
namespace {

constexpr int kMostLayers = 4096;
constexpr int kMostOfAKind = 65535;                          // experts, clusters, steps of delay
constexpr std::int64_t kMostAtOnce = std::int64_t{1} << 27;  // what fills memory: choices, affinities
// Far beyond any router, and so that nothing overflows in single precision.
constexpr double kMostSpread = 1e3, kMostScale = 1e6;

// Keeps the first fault.
class Checks {
 public:
  template <typename T>
  void require(bool good, const char* option, T value, const std::string& constraint) {
    if (good || fault) return;
    if constexpr (std::is_integral_v<T>) {
      fault = {option, shown(static_cast<std::int64_t>(value)), constraint};
    } else {
      fault = {option, shown(value), constraint};
    }
  }
  template <typename T>
  void within(T least, T most, const char* option, T value) {
    require(value >= least && value <= most, option, value,
            "must be from " + shown(least) + " to " + shown(most));
  }
  void not_negative(const char* option, double value) {
    require(std::isfinite(value) && value >= 0, option, value, "must be finite and not negative");
  }
  std::optional<simulated::Fault> fault;
};

void check_sizes(const SimulationOptions& o, Checks& checks) {
  checks.within<std::int64_t>(1, kMostLayers, "layers", o.layers);
  checks.within<std::int64_t>(1, kMostOfAKind, "experts", o.experts);
  checks.within<std::int64_t>(1, o.experts, "top_k", o.top_k);
  checks.require(o.tokens >= 1, "tokens", o.tokens, "must be at least 1");
  const std::int64_t choices = std::int64_t{1} * std::max(o.layers, 1) * std::max(o.top_k, 1);
  checks.require(o.tokens <= kMostAtOnce / choices, "tokens", o.tokens,
                 "layers · tokens · top_k must be at most " + shown(kMostAtOnce));
  checks.require(o.sequence_length >= 0, "sequence_length", o.sequence_length, "must not be negative");
  checks.require(o.sequence_length <= 0 || o.tokens % o.sequence_length == 0, "sequence_length",
                 o.sequence_length, "must divide the tokens of a step (" + shown(o.tokens) + ")");
  checks.require(o.domains >= 1, "domains", o.domains, "must be at least 1");
  checks.within<std::int64_t>(std::max(o.domains, 1), kMostOfAKind, "clusters", o.clusters);
  checks.require(std::int64_t{1} * o.layers * o.experts <= kMostAtOnce / std::max(o.clusters, 1), "clusters",
                 o.clusters, "layers · experts · clusters must be at most " + shown(kMostAtOnce));
}

void check_scenario(const SimulationOptions& o, Checks& checks) {
  checks.require(o.event_step >= 0, "event_step", o.event_step, "must not be negative");
  checks.within<std::int64_t>(0, kMostOfAKind, "delay", o.delay);
  checks.require(o.scenario != Scenario::kDelay || o.delay >= 1, "delay", o.delay,
                 "must be at least 1 in scenario delay");
  checks.require(o.scenario != Scenario::kDead || (o.sunk_experts >= 1 && o.sunk_experts < o.experts),
                 "sunk_experts", o.sunk_experts,
                 "must be at least 1 and below the number of experts (" + shown(std::int64_t{o.experts}) +
                     ") in scenario dead");
  checks.require(
      o.scenario != Scenario::kCollapse || o.collapse != CollapseKind::kDeadThird || o.experts >= 3,
      "experts", o.experts, "must be at least 3 for a third of them to die");
  checks.require(o.scenario != Scenario::kShift || o.domains >= 2, "domains", o.domains,
                 "must be at least 2 in scenario shift");
}

void check_router(const SimulationOptions& o, Checks& checks) {
  checks.within(0.0, kMostSpread, "mixture_spread", o.mixture_spread);
  checks.within(0.0, kMostSpread, "cluster_spread", o.cluster_spread);
  checks.within(0.0, kMostSpread, "token_spread", o.token_spread);
  checks.within(0.0, kMostSpread, "preference", o.preference);
  checks.within(0.0, kMostSpread, "jitter", o.jitter);
  checks.within(1 / kMostScale, kMostScale, "score_scale", o.score_scale);
  checks.within(0.0, 1.0, "domain_share", o.domain_share);
  checks.within(0.0, 1.0, "coherence", o.coherence);
  checks.not_negative("capacity_factor", o.capacity_factor);
  checks.not_negative("forming", o.forming);
  checks.not_negative("task_pull", o.task_pull);
  checks.not_negative("rich", o.rich);
  checks.not_negative("aux_pull", o.aux_pull);
  checks.require(o.affinity_walk >= 0 && o.affinity_walk < 0.02, "affinity_walk", o.affinity_walk,
                 "must be from 0 to below 0.02");
}

constexpr Names<SimulatedGate, 2> kGates{{"softmax", "sigmoid"}};
constexpr Names<Scenario, 7> kScenarios{{"steady", "shift", "collapse", "dead", "drift", "delay", "noise"}};
constexpr Names<CollapseKind, 4> kCollapses{{"runaway", "cold_start", "dead_third", "poisoned_bias"}};

}  // namespace

std::optional<simulated::Fault> simulated::find_fault(const SimulationOptions& options) {
  Checks checks;
  check_sizes(options, checks);
  check_scenario(options, checks);
  check_router(options, checks);
  return checks.fault;
}

void simulated::check(const SimulationOptions& options) {
  if (const auto fault = find_fault(options)) {
    throw std::invalid_argument("SimulationOptions: " + fault->option + " = " + fault->value + ": " +
                                fault->constraint);
  }
  [[maybe_unused]] const LoadTargets checks_the_targets(options.experts, options.targets);
}

ModelConfig simulated::model_of(const SimulationOptions& options) {
  return {.layers = options.layers,
          .experts = options.experts,
          .top_k = options.top_k,
          .tokens_per_step = options.tokens,
          .score_space = options.score_space,
          .delay = options.delay};
}

std::string_view name_of(SimulatedGate gate) {
  return kGates[gate];
}
std::string_view name_of(Scenario scenario) {
  return kScenarios[scenario];
}
std::string_view name_of(CollapseKind kind) {
  return kCollapses[kind];
}
std::optional<SimulatedGate> gate_of(std::string_view name) {
  return kGates.find(name);
}
std::optional<Scenario> scenario_of(std::string_view name) {
  return kScenarios.find(name);
}
std::optional<CollapseKind> collapse_of(std::string_view name) {
  return kCollapses.find(name);
}

}  // namespace moectl
