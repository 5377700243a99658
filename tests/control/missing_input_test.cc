// A4: an input that a policy requires and the router does not record is a reason, and after some steps a notice.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "moectl/controller.h"
#include "test_sums.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;

constexpr std::int64_t kChosen[] = {0, 0, 0, 1, 0, 2};
constexpr float kTop[] = {.9F, .5F, .8F, .3F, .9F, .1F, .6F, .4F, .7F, .2F, .5F, .4F};
constexpr float kScores[] = {.9F, .5F, .1F, .0F, .8F, .1F, .3F, .0F, .9F, .1F, .0F, .1F,
                             .4F, .6F, .0F, .1F, .7F, .2F, .0F, .1F, .3F, .4F, .5F, .0F};

ControllerConfig config_with(Actuator actuator, const std::string& policy) {
  ControllerConfig config;
  config.model = {.layers = 2, .experts = 4, .top_k = 1};
  config.actuator(actuator).policy = policy;
  config.safety.responsiveness = false;  // these loads answer nothing
  return config;
}

ControllerConfig gap_config() {
  ControllerConfig config = config_with(Actuator::kExpertBias, "adaptive_bias");
  config.expert_bias.options.set("form", std::string("gap"));
  return config;
}

// By value: GCC 14 takes what is returned for a part of the batch.
const StepReport& step(Controller& controller, RoutingBatch batch) {
  for (int layer = 0; layer < 2; ++layer) controller.record(layer, batch);
  return controller.step();
}

LimitReport reasons(const StepReport& report, Actuator actuator) {
  return report.layers[0].actuators[static_cast<std::size_t>(actuator)].reasons;
}

// Held from the first step, and after `dwell` steps one notice a layer that names the field.
void expect_held_for(const ControllerConfig& config, Actuator actuator, const RoutingBatch& without,
                     const std::string& field) {
  Controller controller(config);
  std::vector<std::string> notices;
  for (int i = 0; i < 3 * config.monitor.health.dwell; ++i) {
    const StepReport& report = step(controller, without);
    EXPECT_TRUE(reasons(report, actuator).has(Reason::kMissingInput)) << "step " << i;
    EXPECT_TRUE(reasons(report, actuator).held());
    for (const Notice& notice : report.notices) {
      if (notice.kind != NoticeKind::kMissingInput) continue;
      EXPECT_EQ(notice.step, config.monitor.health.dwell - 1);
      notices.emplace_back(notice.text);
    }
  }
  ASSERT_EQ(notices.size(), 2U);
  EXPECT_THAT(notices[0], HasSubstr(std::string(name_of(actuator)) + ": policy " +
                                    config.actuator(actuator).policy + " needs " + field));
}

TEST(FieldCases, A4_AnEntropyTemperatureWithoutProbabilitiesSaysSo) {
  expect_held_for(config_with(Actuator::kRouterTemperature, "entropy_temperature"),
                  Actuator::kRouterTemperature, {.experts = kChosen}, "probabilities");
}

TEST(FieldCases, A4_AGapFormWithoutTopValuesSaysSo) {
  expect_held_for(gap_config(), Actuator::kExpertBias, {.experts = kChosen}, "top_values");
}

TEST(FieldCases, A4_AQuantileBiasWithoutScoresSaysSo) {
  expect_held_for(config_with(Actuator::kExpertBias, "quantile_bias"), Actuator::kExpertBias,
                  {.experts = kChosen, .top_values = kTop}, "biased_scores");
}

TEST(FieldCases, A4_ASetPointOnAMetricOfProbabilitiesSaysSo) {
  ControllerConfig config = config_with(Actuator::kRouterTemperature, "pi");
  config.router_temperature.options.set("metric", std::string("token_entropy"));
  expect_held_for(config, Actuator::kRouterTemperature, {.experts = kChosen}, "probabilities");
}

TEST(FieldCases, A4_ASetPointOnPairsNeedsTheExpertsOfEachToken) {
  ControllerConfig config = config_with(Actuator::kAuxLossWeight, "pi");
  config.model.top_k = 2;
  config.aux_loss_weight.options.set("metric", std::string("pair_lift"));
  config.aux_loss_weight.options.set("target", 1.2);
  config.aux_loss_weight.initial = 0.01;
  config.aux_loss_weight.limits.min = 1e-4;
  Controller controller(config);
  record_counts(controller, 0, {20, 20, 20, 20});
  const StepReport& report = controller.step();
  EXPECT_TRUE(reasons(report, Actuator::kAuxLossWeight).has(Reason::kMissingInput));
  EXPECT_TRUE(report.layers[0].actuators[1].missing.pairs);
  config.model.top_k = 1;
  EXPECT_THROW(Controller{config}, ConfigError);  // there it would never be known
  // Which experts a token chose is in every batch.
  EXPECT_FALSE(
      reasons(step(controller, {.experts = kChosen}), Actuator::kAuxLossWeight).has(Reason::kMissingInput));
}

TEST(FieldCases, A4_AnInputThatAPolicyOnlyUsesIsNoFault) {
  Controller controller(config_with(Actuator::kExpertBias, "adaptive_bias"));  // form: auto
  for (int i = 0; i < 50; ++i) {
    const StepReport& report = step(controller, {.experts = kChosen});
    EXPECT_FALSE(reasons(report, Actuator::kExpertBias).has(Reason::kMissingInput));
    for (const Notice& notice : report.notices) EXPECT_NE(notice.kind, NoticeKind::kMissingInput);
  }
  EXPECT_LT(controller.bias(0)[0], 0);
}

// Layer 0 has a temperature of its own, the model has one for the rest: each lacks the probabilities for `dwell` steps.
TEST(FieldCases, A4_TheModelsActuatorAndALayersOwnCountApart) {
  ControllerConfig config = config_with(Actuator::kRouterTemperature, "entropy_temperature");
  config.router_temperature.scope = Scope::kModel;
  config.layers.resize(2);
  for (LayerGroup& group : config.layers) group.count = 1;
  config.layers[0].router_temperature = config.router_temperature;
  config.layers[0].router_temperature->scope = Scope::kLayer;
  Controller controller(config);
  std::vector<std::pair<int, std::int64_t>> notices;
  for (int i = 0; i < 2 * config.monitor.health.dwell; ++i) {
    for (const Notice& notice : step(controller, {.experts = kChosen}).notices) {
      if (notice.kind == NoticeKind::kMissingInput) notices.emplace_back(notice.layer, notice.step);
    }
  }
  const std::int64_t last = config.monitor.health.dwell - 1;
  EXPECT_THAT(notices, ::testing::UnorderedElementsAre(std::pair(0, last), std::pair(-1, last)));
}

TEST(FieldCases, A4_ADecisionMovesAgainAsSoonAsTheInputComes) {
  Controller controller(gap_config());
  for (int i = 0; i < 5; ++i) step(controller, {.experts = kChosen});
  EXPECT_EQ(controller.bias(0)[0], 0);
  const StepReport& report = step(controller, {.experts = kChosen, .top_values = kTop});
  EXPECT_FALSE(reasons(report, Actuator::kExpertBias).has(Reason::kMissingInput));
  EXPECT_LT(controller.bias(0)[0], 0);
}

// One micro-batch without the input holds the decision on its window; the next window begins anew.
TEST(FieldCases, A4_AWindowWithoutTheInputIsNotCarriedOn) {
  ControllerConfig config = gap_config();
  config.expert_bias.limits.cadence = 4;
  Controller controller(config);
  for (int i = 0; i < 8; ++i) {
    const RoutingBatch with{.experts = kChosen, .top_values = kTop}, without{.experts = kChosen};
    const StepReport& report = step(controller, i == 1 ? without : with);
    EXPECT_EQ(reasons(report, Actuator::kExpertBias).has(Reason::kMissingInput), i == 3) << "step " << i;
  }
  EXPECT_LT(controller.bias(0)[0], 0);
}

TEST(FieldCases, A4_TheReportNamesWhatIsMissing) {
  ControllerConfig config = config_with(Actuator::kExpertBias, "quantile_bias");
  Controller controller(config);
  EXPECT_TRUE(step(controller, {.experts = kChosen}).layers[1].actuators[0].missing.margins);
  const StepReport& report =
      step(controller, {.experts = kChosen, .top_values = kTop, .biased_scores = kScores});
  EXPECT_EQ(report.layers[1].actuators[0].missing, StatsNeeds{});
}

}  // namespace
}  // namespace moectl
