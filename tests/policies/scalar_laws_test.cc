// The scalar policies with the loop closed on the simulated router, behind the limits of their ready configs:
// each does there what its essay says.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/simulation.h"
#include "test_paths.h"

namespace moectl {
namespace {

ControllerConfig ready(const std::string& policy) {
  ControllerConfig config = load_config(std::string(MOECTL_SOURCE_DIR) + "/policies/" + policy + ".yaml");
  config.model.layers = 2;
  config.model.tokens_per_step = 512;
  return config;
}

void run(Controller& controller, std::int64_t steps, const std::function<void(const StepReport&)>& observe,
         CollapseKind kind = CollapseKind::kRunaway, bool collapse = false) {
  SimulationOptions plant = simulation_options(controller.config());
  plant.event_step = 100;
  if (collapse) {
    plant.scenario = Scenario::kCollapse;
    plant.collapse = kind;
  }
  simulate(controller, plant, steps, observe);
}

double mean_cv(const StepReport& report) {
  double sum = 0;
  for (const LayerReport& layer : report.layers) sum += *layer.metrics->load_cv;
  return sum / static_cast<double>(report.layers.size());
}

// ReMoE's factor at a cadence of ten: the CV comes to its target from weights that are wrong by far on both sides, and
// the weight goes on hunting there, as the essay says.
TEST(ScalarPolicies, MultiplicativeOscillatesAroundItsTarget) {
  for (const double first : {1e-4, 0.1}) {
    ControllerConfig config = ready("multiplicative");
    config.aux_loss_weight.initial = first;
    Controller controller(config);
    const double target = config.aux_loss_weight.options.number("target");
    double cv = 0;
    int turns = 0;
    double weight = first, last_move = 0;
    run(controller, 1500, [&](const StepReport& report) {
      if (report.step >= 1000) cv += mean_cv(report) / 500;
      const double now = controller.aux_loss_weight(0), move = now - weight;
      if (report.step >= 1000 && move * last_move < 0) ++turns;
      if (move != 0) last_move = move;
      weight = now;
      ASSERT_EQ(controller.aux_loss_weight(1), now);
    });
    EXPECT_NEAR(cv, target, 0.25 * target) << first;
    EXPECT_GT(turns, 3) << first;
  }
}

// From the very first batch on: what batch t is routed with is the path at t.
TEST(ScalarPolicies, ScheduleIsFollowedThroughTheLimits) {
  ControllerConfig config = ready("schedule");
  config.aux_loss_weight.options.set("decay_start", std::int64_t{200});
  config.aux_loss_weight.options.set("decay_steps", std::int64_t{100});
  Controller controller(config);
  std::vector<double> in_force = {controller.aux_loss_weight(1)};
  run(controller, 310, [&](const StepReport& report) {
    in_force.push_back(controller.aux_loss_weight(1));
    EXPECT_TRUE(report.model[1].reasons.empty()) << report.step;
  });
  EXPECT_DOUBLE_EQ(in_force[0], 1e-3);
  EXPECT_DOUBLE_EQ(in_force[1], 1e-3 + 9e-5);
  EXPECT_DOUBLE_EQ(in_force[50], 0.0055);
  EXPECT_DOUBLE_EQ(in_force[100], 0.01);
  EXPECT_DOUBLE_EQ(in_force[200], 0.01);
  EXPECT_NEAR(in_force[250], 0.0055, 1e-12);
  EXPECT_DOUBLE_EQ(in_force[300], 1e-3);
  EXPECT_DOUBLE_EQ(in_force[310], 1e-3);
}

// The temperature moves the entropy of a token's distribution directly, so it gets to the set-point and rests.
TEST(ScalarPolicies, EntropyTemperatureHoldsItsSetPoint) {
  for (const double target : {0.55, 0.8}) {
    ControllerConfig config = ready("entropy_temperature");
    config.router_temperature.options.set("target", target);
    Controller controller(config);
    SimulationOptions plant = simulation_options(config);
    plant.gate = SimulatedGate::kSoftmax;
    double entropy = 0, load = 0;
    simulate(controller, plant, 600, [&](const StepReport& report) {
      if (report.step < 500) return;
      entropy += *report.layers[0].metrics->token_entropy / std::log(16.0) / 100;
      load += *report.layers[0].metrics->load_cv / 100;
    });
    EXPECT_NEAR(entropy, target, 0.015);
    EXPECT_GT(load, 1) << "and the load is left as it is";
  }
}

// An alarm, confirmed, raises the weight; the router has time to answer before the next; a healthy one is left alone.
TEST(ScalarPolicies, RulesRaiseTheWeightOfACollapseInSteps) {
  ControllerConfig config = ready("rules");
  config.aux_loss_weight.initial = 1e-3;
  Controller controller(config);
  int raised = 0;
  std::int64_t last = -1;
  double weight = 1e-3, cv = 0;
  run(
      controller, 700,
      [&](const StepReport& report) {
        const double now = controller.aux_loss_weight(0);
        if (now != weight) {
          EXPECT_GT(now, weight);
          EXPECT_LE(now, 5 * weight * (1 + 1e-12));
          if (last >= 0) {
            EXPECT_GE(report.step - last, 50);
          }
          last = report.step;
          ++raised;
        }
        weight = now;
        if (report.step >= 600) cv += mean_cv(report) / 100;
      },
      CollapseKind::kRunaway, true);
  EXPECT_GE(raised, 3);
  EXPECT_LT(cv, 1);
}

}  // namespace
}  // namespace moectl
