// Failure modes on the simulated router. The scenarios are the simulator's own, with its defaults, fixed
// before any threshold of health was; each must be recognised, and none may be reported of a healthy run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/simulation.h"

namespace moectl {
namespace {

using ::testing::Contains;
using ::testing::IsEmpty;

const char* const kModel =
    "version: 1\n"
    "model: {layers: 1, experts: 16, top_k: 2, tokens_per_step: 2048, domains: [a, b, c, d]}\n"
    "health: {}\n"
    "collect: {sequences: true}\n";
const char* const kControlled = "expert_bias: {policy: adaptive_bias}\n";

struct Seen {
  std::set<std::string> alerts;
  std::set<Health> states;  // after the first 100 steps
};

Seen run(const std::string& control, const std::function<void(SimulationOptions&)>& set, std::int64_t steps,
         std::uint64_t seed = 1) {
  Controller controller(parse_config(kModel + control));
  SimulationOptions options = simulation_options(controller.config());
  options.seed = seed;
  options.sequence_length = 128;
  set(options);
  Seen seen;
  simulate(controller, options, steps, [&](const StepReport& report) {
    const LayerMonitor& monitor = *report.layers[0].monitor;
    seen.alerts.insert(monitor.alerts().begin(), monitor.alerts().end());
    if (report.step >= 100) seen.states.insert(monitor.health());
  });
  return seen;
}

TEST(FailureModes, NoneOnTwentyHealthySeeds) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const Seen seen = run(
        kControlled, [](SimulationOptions&) {}, 300, seed);
    EXPECT_THAT(seen.alerts, IsEmpty()) << seed;
    EXPECT_EQ(seen.states, std::set<Health>{Health::kHealthy}) << seed;
  }
}

TEST(FailureModes, ExpertCollapse) {
  for (const CollapseKind kind : {CollapseKind::kRunaway, CollapseKind::kDeadThird}) {
    const Seen seen = run(
        "",
        [&](SimulationOptions& options) {
          options.scenario = Scenario::kCollapse;
          options.collapse = kind;
        },
        700);
    EXPECT_THAT(seen.alerts, Contains("expert_collapse")) << name_of(kind);
  }
}

TEST(FailureModes, SilentCapacityLoss) {
  const Seen seen = run(
      "", [](SimulationOptions& options) { options.scenario = Scenario::kDead; }, 450);
  EXPECT_THAT(seen.alerts, Contains("silent_capacity_loss"));
}

// The published sign law, two hundred times too fast: every step overshoots.
TEST(FailureModes, RoutingOscillation) {
  const Seen seen = run(
      "expert_bias: {policy: sign_bias, options: {step: 0.2}, limits: {rate: 0.2}}\n",
      [](SimulationOptions&) {}, 300);
  EXPECT_THAT(seen.alerts, Contains("routing_oscillation"));
  EXPECT_THAT(seen.states, Contains(Health::kOscillating));
}

// Clusters of a domain are all alike and far from those of others: balanced, but only while the mixture
// stays.
TEST(FailureModes, BrittleSpecialization) {
  const Seen seen = run(
      kControlled,
      [](SimulationOptions& options) {
        options.domain_share = 1;
        options.cluster_spread = 4;
      },
      300);
  EXPECT_THAT(seen.alerts, ::testing::ElementsAre("brittle_specialization"));
  EXPECT_EQ(seen.states, std::set<Health>{Health::kHealthy});  // by its averages
}

// Nobody balances: one expert holds up the rest.
TEST(FailureModes, InferenceBottleneck) {
  const Seen seen = run(
      "", [](SimulationOptions& options) { options.preference = 2; }, 300);
  EXPECT_THAT(seen.alerts, Contains("inference_bottleneck"));
}

}  // namespace
}  // namespace moectl
