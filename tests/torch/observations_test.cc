// What is observed of single experts, from tensors: gradient norms and losses.
#include "moectl/torch/observations.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <stdexcept>
#include <vector>

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
  }
  for (TorchController* it : {&off, &on}) {
    for (const std::int64_t sum : it->step().layers[0].stats->flat()) EXPECT_EQ(sum, 0);
  }
}

TEST(Observations, ShapesThatDoNotFitThrow) {
  TorchController controller(config_of(true));
  EXPECT_THROW(record_gradients(controller, 0, std::vector<Tensor>{::torch::ones({4, 2})}),
               std::invalid_argument);
  EXPECT_THROW(record_gradients(controller, 0, std::vector<std::vector<Tensor>>(2)), std::invalid_argument);
  const Tensor indices = ::torch::tensor({{0, 1}, {1, 2}}, ::torch::kInt64);
  EXPECT_THROW(record_losses(controller, 0, indices, ::torch::ones({3})), std::invalid_argument);
  EXPECT_THROW(record_losses(controller, 0, indices, Tensor()), std::invalid_argument);
}

}  // namespace
}  // namespace moectl
