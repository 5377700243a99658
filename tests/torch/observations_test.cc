// What is observed of single experts, from tensors: gradient norms and losses.
#include "moectl/torch/observations.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moectl/run_log.h"
#include "moectl/torch/router.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::torch::Tensor;

ControllerConfig config_of(bool collect) {
  ControllerConfig config;
  config.model.layers = 1;
  config.model.experts = 3;
  config.model.top_k = 2;
  config.model.domains = {"prose", "code"};
  config.collect.gradients = config.collect.losses = config.collect.domain_losses = collect;
  return config;
}

std::vector<double> numbers(const RoutingStats& stats, RoutingStats::Array which) {
  std::vector<double> out;
  for (const std::int64_t sum : stats.array(which)) out.push_back(from_fixed(sum));
  return out;
}

std::vector<std::int64_t> integers(const RoutingStats& stats, RoutingStats::Array which) {
  return {stats.array(which).begin(), stats.array(which).end()};
}

TEST(Observations, GradientNormsOfStackedParameters) {
  TorchController controller(config_of(true));
  const Tensor first = ::torch::zeros({3, 2}, ::torch::requires_grad());
  const Tensor second = ::torch::zeros({3, 1, 1}, ::torch::requires_grad());
  const Tensor unused = ::torch::zeros({3, 4}, ::torch::requires_grad());
  // Gradients (3, 0 | 4), (0, 0 | 0), (5, 12 | 0): norms 5, 0, 13.
  (first * ::torch::tensor({{3.0, 0.0}, {0.0, 0.0}, {5.0, 12.0}})).sum().backward();
  (second * ::torch::tensor({4.0, 0.0, 0.0}).view({3, 1, 1})).sum().backward();
  record_gradients(controller, 0, std::vector<Tensor>{first, second, unused});
  const RoutingStats& stats = *controller.step().layers[0].stats;
  EXPECT_THAT(numbers(stats, RoutingStats::kGradNormSum), ElementsAre(5, 0, 13));
  EXPECT_EQ(stats.scalar(RoutingStats::kGradRecords), 1);
}

TEST(Observations, GradientNormsOfExpertsThatAreModules) {
  TorchController controller(config_of(true));
  std::vector<std::vector<Tensor>> experts;
  for (int i = 0; i < 3; ++i) {
    ::torch::nn::Linear expert(2, 2);
    if (i != 1) ((expert->weight * 3).sum() + (expert->bias * 8).sum()).backward();
    experts.push_back(expert->parameters());
  }
  record_gradients(controller, 0, experts);
  // √(4·9 + 2·64) = √164; the second expert saw no token.
  const auto norms = numbers(*controller.step().layers[0].stats, RoutingStats::kGradNormSum);
  EXPECT_NEAR(norms[0], std::sqrt(164.0), 1e-6);
  EXPECT_EQ(norms[1], 0);
  EXPECT_EQ(norms[2], norms[0]);
}

TEST(Observations, LossesGoToTheExpertsAndTheDomainsOfTheirTokens) {
  TorchController controller(config_of(true));
  const Tensor indices = ::torch::tensor({{0, 1}, {1, 2}, {0, 2}, {0, 1}}, ::torch::kInt64);
  const Tensor losses = ::torch::tensor({1.0, 2.0, 4.0, 100.0}, ::torch::kFloat64);
  const RecordOptions options{.mask = ::torch::tensor({true, true, true, false}),
                              .domain_ids = ::torch::tensor({0, 1, 1, 0})};
  controller.record(0, indices, options);
  record_losses(controller, 0, indices, losses, options);
  const RoutingStats& stats = *controller.step().layers[0].stats;
  EXPECT_TRUE(stats.valid());
  EXPECT_THAT(numbers(stats, RoutingStats::kExpertLossSum), ElementsAre(5, 3, 6));
  EXPECT_THAT(integers(stats, RoutingStats::kExpertLossTokens), ElementsAre(2, 2, 2));
  EXPECT_THAT(numbers(stats, RoutingStats::kDomainLossSum), ElementsAre(1, 1, 0, 4, 2, 6));
  EXPECT_THAT(integers(stats, RoutingStats::kDomainLossTokens), ElementsAre(1, 1, 0, 1, 1, 2));
}

TEST(Observations, RecordsOnlyCollectedInputs) {
  TorchController off(config_of(false)), on(config_of(true));
  const Tensor parameter = ::torch::ones({3, 2}, ::torch::requires_grad());
  parameter.sum().backward();
  const Tensor indices = ::torch::tensor({{0, 1}}, ::torch::kInt64), losses = ::torch::ones({1});
  record_gradients(off, 0, std::vector<Tensor>{parameter});
  record_losses(off, 0, indices, losses);
  {
    const RecordingGuard guard;
    record_gradients(on, 0, std::vector<Tensor>{parameter});
    record_losses(on, 0, indices, losses);
    record_router(on, 0, ::torch::ones({3, 2}));
    record_expert_outputs(on, 0, ::torch::ones({3, 2}));
    record_gradient_ratios(on, {parameter}, parameter.sum(), parameter.sum());
  }
  for (TorchController* it : {&off, &on}) {
    for (const std::int64_t sum : it->step().layers[0].stats->flat()) EXPECT_EQ(sum, 0);
  }
}

/// A step in which every layer routes a token: without one, no metric is known.
std::vector<Metrics> step(TorchController& controller) {
  for (const int layer : controller.controller().layers())
    controller.record(layer, ::torch::tensor({{0, 1}}, ::torch::kInt64));
  std::vector<Metrics> metrics;
  for (const LayerReport& layer : controller.step().layers) metrics.push_back(*layer.metrics);
  return metrics;
}

// By hand: rows (1, 0), (0, 2), (1, 0) have cosines 0, 1, 0 (a third) and singular values 2 and √2.
TEST(Observations, HowWellARouterTellsExpertsApart) {
  TorchController controller(config_of(false));
  const Tensor weight = ::torch::tensor({{1.0, 0.0}, {0.0, 2.0}, {1.0, 0.0}});
  record_router(controller, 0, weight.to(::torch::kBFloat16).set_requires_grad(true));
  const Metrics metrics = step(controller)[0];
  EXPECT_NEAR(metrics.router_similarity.value_or(-1), 1.0 / 3, 1e-6);
  EXPECT_NEAR(metrics.router_condition.value_or(-1), std::sqrt(2.0), 1e-6);
  EXPECT_FALSE(step(controller)[0].router_condition) << "absent until recorded anew";
  // Rows that differ in length and sign alone: no expert can be told from another.
  record_router(controller, 0, ::torch::tensor({{1.0, 1.0}, {-2.0, -2.0}, {0.5, 0.5}}));
  const Metrics alike = step(controller)[0];
  EXPECT_NEAR(alike.router_similarity.value_or(-1), 1, 1e-6);
  EXPECT_EQ(alike.router_condition, kFixedMax);
  record_router(controller, 0, weight / 0);
  EXPECT_FALSE(step(controller)[0].router_similarity);
}

TEST(Observations, NormOfWhatExpertsPutOut) {
  TorchController controller(config_of(false));
  record_expert_outputs(controller, 0, ::torch::tensor({{3.0, 4.0}, {0.0, 1.0}}, ::torch::requires_grad()));
  record_expert_outputs(controller, 0, ::torch::zeros({2, 2, 5}));
  record_expert_outputs(controller, 0, ::torch::zeros({0, 5}));
  record_expert_outputs(controller, 0, ::torch::full({1, 2}, INFINITY));
  EXPECT_NEAR(step(controller)[0].expert_output_norm.value_or(-1), 1.5, 1e-6) << "(3 + 0) / 2";
  EXPECT_FALSE(step(controller)[0].expert_output_norm);
}

TEST(Observations, WhatTheBalanceLossWeighsBesideTheTask) {
  ControllerConfig config = config_of(false);
  config.model.layers = 4;
  TorchController controller(config);
  std::vector<Tensor> weights;
  for (int layer = 0; layer < 4; ++layer)
    weights.push_back(::torch::ones({3, 2}, ::torch::TensorOptions().requires_grad(layer != 3)));
  // Gradients of layer 0: 0.1 against 0.5 in each of six; of layer 1 none of the balance loss; layer 2 of that alone;
  // layer 3 is frozen.
  const Tensor balance = 0.1 * weights[0].sum() + weights[2].sum();
  const Tensor task = 0.5 * weights[0].sum() + 2 * weights[1].sum() + weights[3].sum();
  record_gradient_ratios(controller, weights, balance, task);
  for (const Tensor& weight : weights) EXPECT_FALSE(weight.grad().defined()) << "none is accumulated";
  (balance + task).backward();  // the graph is still there
  EXPECT_NEAR(weights[0].grad()[0][0].item<double>(), 0.6, 1e-6);
  const std::vector<Metrics> layers = step(controller);
  EXPECT_NEAR(layers[0].gradient_ratio.value_or(-1), 0.2, 1e-6);
  EXPECT_EQ(layers[1].gradient_ratio, 0);
  EXPECT_EQ(layers[2].gradient_ratio, kFixedMax);
  EXPECT_FALSE(layers[3].gradient_ratio);
  // A balance loss that is a plain number moves nothing; where neither does, there is no ratio.
  record_gradient_ratios(controller, weights, ::torch::tensor(1.0), weights[0].sum());
  const std::vector<Metrics> none = step(controller);
  EXPECT_EQ(none[0].gradient_ratio, 0);
  EXPECT_FALSE(none[1].gradient_ratio);
}

// The losses of moectl's own router, its weight and the ratio, in a pass as a trainer makes it, reach the log.
TEST(Observations, TheRoutersOwnNumbersStandInTheLog) {
  ControllerConfig config = config_of(false);
  TorchController controller(config);
  std::string log;
  RunLogWriter writer([&](std::string_view text) { log += text; }, config);
  controller.controller().set_log([&](const StepReport& report) { writer.write(report); });
  TopKRouter router(TopKRouterOptions(4, 3, 2));
  const auto pass = [&](bool observe) {
    const RouterOutput routed = router->forward(::torch::rand({16, 4}));
    controller.record(0, routed.indices, observe ? routed.record_options() : RecordOptions{});
    if (observe) {
      record_router(controller, 0, router->weight);
      record_expert_outputs(controller, 0, ::torch::ones({32, 4}));
      record_gradient_ratios(controller, {router->weight}, routed.balance_loss * 1e-2,
                             routed.gates.square().sum());
    }
    controller.step();
  };
  pass(true);
  const std::string first = std::exchange(log, {});
  pass(false);
  for (const char* name : {"balance_loss", "z_loss", "router_similarity", "router_condition",
                           "expert_output_norm", "gradient_ratio"}) {
    const std::string key = std::string("\"") + name + "\":";
    EXPECT_THAT(first, ::testing::HasSubstr(key));
    EXPECT_THAT(first, ::testing::Not(::testing::HasSubstr(key + "null")));
    EXPECT_THAT(log, ::testing::Not(::testing::ContainsRegex(key + "[0-9]")));
  }
}

Tensor losses_of(std::int64_t numbers) {
  return ::torch::ones({numbers});
}

TEST(Observations, ShapesThatDoNotFitThrow) {
  TorchController controller(config_of(true));
  EXPECT_THROW(record_gradients(controller, 0, std::vector<Tensor>{::torch::ones({4, 2})}),
               std::invalid_argument);
  EXPECT_THROW(record_gradients(controller, 0, std::vector<std::vector<Tensor>>(2)), std::invalid_argument);
  const Tensor indices = ::torch::tensor({{0, 1}, {1, 2}}, ::torch::kInt64);
  EXPECT_THROW(record_losses(controller, 0, indices, ::torch::ones({3})), std::invalid_argument);
  EXPECT_THROW(record_losses(controller, 0, indices, Tensor()), std::invalid_argument);
  EXPECT_THROW(record_router(controller, 0, ::torch::ones({4, 2})), std::invalid_argument);
  EXPECT_THROW(record_router(controller, 7, ::torch::ones({3, 2})), std::invalid_argument);
  EXPECT_THROW(record_expert_outputs(controller, 0, Tensor()), std::invalid_argument);
  EXPECT_THROW(record_gradient_ratios(controller, {}, losses_of(1), losses_of(1)), std::invalid_argument);
  EXPECT_THROW(record_gradient_ratios(controller, {::torch::ones({3, 2})}, losses_of(2), losses_of(1)),
               std::invalid_argument);
}

}  // namespace
}  // namespace moectl
