// Failure modes on the simulated router. The scenarios are the simulator's own, with its defaults, fixed
// before any threshold of health was; each must be recognised, and none may be reported of a healthy run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
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

// A router that reads the domain and little else: nothing tells the clusters of a domain apart, and what they
// share is four times as wide as what tells their tokens apart (.9 times in the healthy plant). Its load is
// balanced, but only while the mixture stays.
void brittle(SimulationOptions& options) {
  options.domain_share = 1;
  options.cluster_spread = 4;
}

// That it is brittle, by what becomes of it and not by any threshold: when a domain switches on, the balanced
// load of such a router breaks much further than that of a healthy one on the same data.
TEST(FailureModes, ABrittleLoadBreaksWithTheMixture) {
  const auto largest_after = [](std::uint64_t seed, bool is_brittle) {
    Controller controller(parse_config(std::string(kModel) + kControlled));
    SimulationOptions options = simulation_options(controller.config());
    options.seed = seed;
    options.sequence_length = 128;
    options.scenario = Scenario::kShift;
    if (is_brittle) brittle(options);
    double before = 0, after = 0;
    simulate(controller, options, 310, [&](const StepReport& report) {
      const double max_vio = *report.layers[0].metrics->max_vio;
      if (report.step >= 250 && report.step < 300) before += max_vio / 50;
      if (report.step >= 300) after = std::max(after, max_vio);
    });
    EXPECT_LT(before, 0.6) << seed << ": balanced";
    return after;
  };
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    EXPECT_GT(largest_after(seed, true), 1.5 * largest_after(seed, false)) << seed;
  }
}

TEST(FailureModes, BrittleSpecialization) {
  const Seen seen = run(kControlled, brittle, 300);
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
