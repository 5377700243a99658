// Failure modes on the simulated router. The scenarios are the simulator's own, with its defaults, fixed
// before any threshold of health was; each must be recognised, and none may be reported of a healthy run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <tuple>
#include <vector>

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

// The published sign_bias method, two hundred times too fast: every step overshoots.
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

// On seeds that the threshold has not seen, and on routers around the scenario that it has not seen either.
TEST(FailureModes, BrittleSpecialization) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    const Seen seen = run(kControlled, brittle, 300, seed);
    EXPECT_THAT(seen.alerts, Contains("brittle_specialization")) << seed;
    EXPECT_EQ(seen.alerts.size(), 1U) << seed;
    EXPECT_EQ(seen.states, std::set<Health>{Health::kHealthy}) << seed;  // by its averages
  }
  for (const auto& [spread, share] : {std::pair{3.0, 1.0}, {6.0, 1.0}, {4.0, 0.95}}) {
    const Seen seen = run(
        kControlled,
        [&, s = spread, d = share](SimulationOptions& options) {
          options.cluster_spread = s;
          options.domain_share = d;
        },
        300, 7);
    EXPECT_THAT(seen.alerts, Contains("brittle_specialization")) << spread << " " << share;
  }
}

// Where the threshold comes from: runs of healthy plants of three kinds, none of them looked at elsewhere.
TEST(FailureModes, TheBrittleThresholdIsFiveDeviationsAboveHealthyRuns) {
  std::vector<double> largest;
  for (const auto& [experts, top_k, gate] : {std::tuple{16, 2, SimulatedGate::kSigmoid},
                                             {16, 2, SimulatedGate::kSoftmax},
                                             {64, 6, SimulatedGate::kSigmoid}}) {
    for (std::uint64_t seed = 101; seed <= 120; ++seed) {
      ControllerConfig config = parse_config(std::string(kModel) + kControlled);
      config.model.experts = experts;
      config.model.top_k = top_k;
      Controller controller(config);
      SimulationOptions options = simulation_options(config);
      options.seed = seed;
      options.sequence_length = 128;
      options.gate = gate;
      double most = 0;
      simulate(controller, options, experts == 64 ? 150 : 300, [&](const StepReport& report) {
        most = std::max(most, report.layers[0].monitor->smoothed().domain_exclusivity.value_or(0));
      });
      largest.push_back(most);
    }
  }
  const auto n = static_cast<double>(largest.size());
  double mean = 0, squares = 0;
  for (const double x : largest) mean += x / n;
  for (const double x : largest) squares += (x - mean) * (x - mean);
  const double deviation = std::sqrt(squares / (n - 1));
  EXPECT_NEAR(mean, 0.227, 0.001);
  EXPECT_NEAR(mean + 5 * deviation, 0.38, 0.005);  // enter
  EXPECT_NEAR(mean + 3 * deviation, 0.32, 0.005);  // leave
}

// Nobody balances: one expert holds up the rest.
TEST(FailureModes, InferenceBottleneck) {
  const Seen seen = run(
      "", [](SimulationOptions& options) { options.preference = 2; }, 300);
  EXPECT_THAT(seen.alerts, Contains("inference_bottleneck"));
}

}  // namespace
}  // namespace moectl
