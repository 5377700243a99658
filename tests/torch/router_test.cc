// TopKRouter: every output against its formula, every gradient against finite differences.
#include "moectl/torch/router.h"
#include "moectl/torch/batch_counts.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::torch::Tensor;

constexpr auto kDouble = ::torch::kFloat64;

TopKRouterOptions options(std::int64_t experts = 4, std::int64_t top_k = 2) {
  return {3, experts, top_k};
}

Tensor logits(std::vector<double> values, std::int64_t experts = 4) {
  return ::torch::tensor(values, kDouble).view({-1, experts});
}

Tensor integers(std::vector<std::int64_t> values) {
  return ::torch::tensor(values, ::torch::kInt64);
}

::testing::AssertionResult close(const Tensor& a, const Tensor& b, double tolerance = 1e-12) {
  if (a.sizes() != b.sizes()) return ::testing::AssertionFailure() << a.sizes() << " against " << b.sizes();
  if (a.to(kDouble).allclose(b.to(kDouble), tolerance, tolerance)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << a << "\nagainst\n" << b;
}

/// Largest difference between the gradient of `loss` at `x` and central differences.
double gradient_error(const std::function<Tensor(const Tensor&)>& loss, const Tensor& at) {
  const Tensor x = at.detach().clone().set_requires_grad(true);
  loss(x).backward();
  constexpr double kStep = 1e-6;
  const Tensor point = at.detach().clone();
  const ::torch::NoGradGuard no_grad;
  double worst = 0;
  double* value = point.data_ptr<double>();
  const double* gradient = x.grad().data_ptr<double>();
  for (std::int64_t i = 0; i < point.numel(); ++i) {
    const double middle = value[i];
    value[i] = middle + kStep;
    const double above = loss(point).item<double>();
    value[i] = middle - kStep;
    const double below = loss(point).item<double>();
    value[i] = middle;
    worst = std::max(worst, std::abs((above - below) / (2 * kStep) - gradient[i]));
  }
  return worst;
}

std::string gate_name(const ::testing::TestParamInfo<Gate>& info) {
  return info.param == Gate::kSoftmax ? "Softmax" : info.param == Gate::kSigmoid ? "Sigmoid" : "SqrtSoftplus";
}

class EveryGate : public ::testing::TestWithParam<Gate> {};
INSTANTIATE_TEST_SUITE_P(TopKRouter, EveryGate,
                         ::testing::Values(Gate::kSoftmax, Gate::kSigmoid, Gate::kSqrtSoftplus), gate_name);

/// The gate's scores, written down again without any care for the extremes.
Tensor plain_scores(Gate gate, const Tensor& z) {
  switch (gate) {
    case Gate::kSoftmax:
      return z.softmax(-1);
    case Gate::kSigmoid:
      return z.sigmoid();
    case Gate::kSqrtSoftplus:
      return (z.exp() + 1).log().sqrt();
  }
  return {};
}

TEST_P(EveryGate, ChoosesScoresAndWeighsAsItsFormulaSays) {
  ::torch::manual_seed(1);
  const Tensor z = ::torch::randn({6, 4}, kDouble), bias = ::torch::tensor({0.2, -0.1, 0.0, 0.3});
  const Tensor temperature = ::torch::tensor(1.7);
  TopKRouter router(options().gate(GetParam()).score_space(ScoreSpace::kProbability).scale(2.5));
  const RouterOutput out = router->route(z, {.actuators = {.bias = bias, .temperature = temperature}});

  const Tensor s = plain_scores(GetParam(), z / temperature);
  const auto [values, indices] = (s + bias).topk(3, -1);
  EXPECT_TRUE(out.indices.equal(indices.narrow(-1, 0, 2)));
  EXPECT_TRUE(close(out.top_values, values, 1e-6));
  EXPECT_EQ(out.top_values.scalar_type(), ::torch::kFloat32);
  EXPECT_TRUE(close(out.biased_scores, s + bias, 1e-6));
  EXPECT_EQ(out.biased_scores.scalar_type(), ::torch::kFloat32);
  EXPECT_FALSE(out.biased_scores.requires_grad());
  EXPECT_TRUE(close(out.probabilities, s / s.sum(-1, true)));
  const Tensor chosen = s.gather(-1, out.indices);
  EXPECT_TRUE(close(out.gates, chosen / chosen.sum(-1, true) * 2.5));

  TopKRouter raw(options().gate(GetParam()).score_space(ScoreSpace::kProbability).normalize(false));
  const RouterOutput unnormalised = raw->route(z, {.actuators = {.bias = bias, .temperature = temperature}});
  EXPECT_TRUE(close(unnormalised.gates, chosen));
}

TEST_P(EveryGate, GradientsMatchFiniteDifferences) {
  ::torch::manual_seed(2);
  const Tensor z = ::torch::randn({2, 5, 6}, kDouble);
  const Tensor mix = ::torch::randn({2, 5, 2}, kDouble);
  const RouterInputs inputs{.actuators = {.bias = ::torch::randn({6}, kDouble) * 0.1,
                                          .temperature = ::torch::tensor(0.8, kDouble),
                                          .aux_loss_weight = ::torch::tensor(0.3, kDouble)},
                            .mask = integers({1, 1, 1, 0, 1, 1, 1, 1, 1, 0}).view({2, 5}).to(::torch::kBool)};
  for (const ScoreSpace space : {ScoreSpace::kLogit, ScoreSpace::kProbability}) {
    for (const bool normalize : {true, false}) {
      TopKRouter router(TopKRouterOptions(3, 6, 2)
                            .gate(GetParam())
                            .score_space(space)
                            .normalize(normalize)
                            .sequence_loss_weight(0.2)
                            .z_loss_weight(0.1));
      const auto check = [&](auto pick, const char* what) {
        EXPECT_LT(gradient_error([&](const Tensor& x) { return pick(router->route(x, inputs)); }, z), 1e-7)
            << what;
      };
      check([](const RouterOutput& out) { return out.balance_loss; }, "balance");
      check([](const RouterOutput& out) { return out.sequence_loss; }, "sequence");
      check([](const RouterOutput& out) { return out.z_loss; }, "z");
      check([](const RouterOutput& out) { return out.aux_loss; }, "aux");
      check([&](const RouterOutput& out) { return (out.gates * mix).sum(); }, "gates");
      check([&](const RouterOutput& out) { return (out.probabilities.square()).sum(); }, "probabilities");
    }
  }
}

TEST_P(EveryGate, StaysFiniteAtPerfectBalanceAndAtTheExtremes) {
  for (const double size : {0.0, 1.0, 90.0, 200.0, 1e4, 1e30}) {
    for (const double sign : {1.0, -1.0}) {
      TopKRouter router(options().gate(GetParam()).sequence_loss_weight(1).z_loss_weight(1e-30));
      // Rows of ±size, and one row of zeros: at size 0 everything is in perfect balance.
      Tensor z = ::torch::stack({::torch::full({4}, sign * size),
                                 ::torch::tensor({1.0, -1.0, 1.0, -1.0}) * size * sign, ::torch::zeros({4})})
                     .view({1, 3, 4})
                     .to(::torch::kFloat32);
      z.set_requires_grad(true);
      const RouterOutput out = router->route(z, {.actuators = {.aux_loss_weight = ::torch::tensor(1.0F)}});
      (out.aux_loss + out.gates.sum() + out.probabilities.square().sum()).backward();
      EXPECT_TRUE(out.gates.isfinite().all().item<bool>()) << size * sign;
      EXPECT_TRUE(out.probabilities.isfinite().all().item<bool>()) << size * sign;
      EXPECT_TRUE(z.grad().isfinite().all().item<bool>()) << size * sign << "\n" << z.grad();
    }
  }
}

TEST(TopKRouter, BiasMovesTheChoiceAndNeverTheGates) {
  const Tensor z = logits({3, 2, 1, 0});
  TopKRouter router(options().score_space(ScoreSpace::kLogit));
  const RouterOutput plain = router->route(z);
  const RouterOutput biased =
      router->route(z, {.actuators = {.bias = ::torch::tensor({0.0, 0.0, 2.5, 0.0})}});
  EXPECT_TRUE(plain.indices.equal(integers({0, 1}).view({1, 2})));
  EXPECT_TRUE(biased.indices.equal(integers({2, 0}).view({1, 2})));
  EXPECT_TRUE(close(biased.top_values, ::torch::tensor({{3.5, 3.0, 2.0}})));
  const Tensor s = z.sigmoid()[0];
  const double sum = (s[2] + s[0]).item<double>();
  EXPECT_NEAR(biased.gates[0][0].item<double>(), s[2].item<double>() / sum, 1e-12);
  EXPECT_TRUE(close(biased.probabilities, plain.probabilities));

  // A bias that changes no choice changes nothing at all.
  const RouterOutput same = router->route(z, {.actuators = {.bias = ::torch::tensor({0.1, 0.1, 0.1, 0.1})}});
  EXPECT_TRUE(same.gates.equal(plain.gates));
}

TEST(TopKRouter, InLogitSpaceTemperatureNeverMovesTheChoice) {
  ::torch::manual_seed(3);
  const Tensor z = ::torch::randn({200, 4}, kDouble), bias = ::torch::randn({4}, kDouble);
  TopKRouter router(options().gate(Gate::kSoftmax).score_space(ScoreSpace::kLogit));
  const RouterOutput cold =
      router->route(z, {.actuators = {.bias = bias, .temperature = ::torch::tensor(0.2)}});
  const RouterOutput hot =
      router->route(z, {.actuators = {.bias = bias, .temperature = ::torch::tensor(5.0)}});
  EXPECT_TRUE(cold.indices.equal(hot.indices));
  EXPECT_TRUE(cold.top_values.equal(hot.top_values));
  EXPECT_GT(cold.gates.std().item<double>(), hot.gates.std().item<double>());
}

TEST(TopKRouter, InProbabilitySpaceAHigherTemperatureMakesTheBiasWeighMore) {
  const Tensor z = logits({3, 2, 1, 0}), bias = ::torch::tensor({0.0, 0.0, 0.0, 0.4});
  TopKRouter router(options().gate(Gate::kSoftmax).score_space(ScoreSpace::kProbability));
  const auto choice = [&](double temperature) {
    return router->route(z, {.actuators = {.bias = bias, .temperature = ::torch::tensor(temperature)}})
        .indices;
  };
  EXPECT_TRUE(choice(0.3).equal(integers({0, 3}).view({1, 2})));
  EXPECT_TRUE(choice(5.0).equal(integers({3, 0}).view({1, 2})));
}

TEST(TopKRouter, BalanceLossIsOneWhenUniformAndFollowsTheCounts) {
  // Two tokens choose {0, 1} and {0, 2}: f = (1/2, 1/4, 1/4, 0).
  const Tensor z = logits({3, 2, 1, 0, 3, 1, 2, 0});
  TopKRouter router(options().gate(Gate::kSoftmax));
  const RouterOutput out = router->route(z, {.actuators = {.aux_loss_weight = ::torch::tensor(0.5)}});
  const Tensor p = z.softmax(-1).mean(0);
  const double loss = 4 * (0.5 * p[0] + 0.25 * p[1] + 0.25 * p[2]).item<double>();
  EXPECT_NEAR(out.balance_loss.item<double>(), loss, 1e-12);
  EXPECT_NEAR(out.aux_loss.item<double>(), 0.5 * loss, 1e-12);
  const Tensor even = logits({1, 1, 0, 0, 0, 0, 1, 1});
  EXPECT_NEAR(router->route(even).balance_loss.item<double>(), 1.0, 1e-12);
  EXPECT_EQ(router->route(even).aux_loss.item<double>(), 0.0) << "no weight, no loss";
}

TEST(TopKRouter, SequenceLossSeesWhatTheBatchHides) {
  // Each sequence sends everything to one pair of experts; together they are in balance.
  const Tensor z = logits({9, 9, 0, 0, 9, 9, 0, 0, 0, 0, 9, 9, 0, 0, 9, 9}).view({2, 2, 4});
  TopKRouter router(options().gate(Gate::kSoftmax).sequence_loss_weight(1e-4));
  const RouterOutput out = router->route(z);
  EXPECT_NEAR(out.balance_loss.item<double>(), 1.0, 1e-12);
  const double p = std::exp(9.0) / (2 * std::exp(9.0) + 2);  // of each expert chosen
  EXPECT_NEAR(out.sequence_loss.item<double>(), 4 * (0.5 * p + 0.5 * p), 1e-12);
  EXPECT_NEAR(out.aux_loss.item<double>(), 1e-4 * out.sequence_loss.item<double>(), 1e-15);
  const ::torch::NoGradGuard no_grad;
  EXPECT_FALSE(router->route(z.view({4, 4})).sequence_loss.defined());
}

CountsOverBatch always(const Tensor& load) {
  return [load](const Tensor&) { return load; };
}

TEST(TopKRouter, TheLoadOfTheBatchTakesThePlaceOfTheMicroBatchsOwn) {
  ::torch::manual_seed(4);
  const Tensor z = ::torch::randn({8, 4}, kDouble), load = ::torch::tensor({0.7, 0.1, 0.1, 0.1}, kDouble);
  TopKRouter router(options().gate(Gate::kSoftmax));
  const RouterOutput out = router->route(z, {.counts_over_batch = always(load)});
  EXPECT_NEAR(out.balance_loss.item<double>(), 4 * (load * z.softmax(-1).mean(0)).sum().item<double>(),
              1e-12);
}

TEST(TopKRouter, CountsOfAnotherSizeAreRefused) {
  TopKRouter router(options());
  const auto wrong = always(::torch::ones({3}));
  EXPECT_THROW(router->route(::torch::randn({8, 4}), {.counts_over_batch = wrong}), std::invalid_argument);
}

TEST(BatchCounts, MicroBatchesOfAStepAddUpAndARecomputedOneAddsNothing) {
  int collectives = 0;
  BatchCounts counts([&](Tensor& sums) { ++collectives, sums.mul_(2); });  // two ranks alike
  const Tensor one = ::torch::tensor({3, 1, 0, 0}, ::torch::kLong),
               other = ::torch::tensor({0, 0, 1, 3}, ::torch::kLong);
  EXPECT_TRUE(counts.of(0, 0)(one).equal(::torch::tensor({6, 2, 0, 0}, ::torch::kLong)));
  EXPECT_TRUE(counts.of(0, 1)(other).equal(::torch::tensor({6, 2, 2, 6}, ::torch::kLong)));
  EXPECT_TRUE(counts.of(0, 0)(one).equal(::torch::tensor({6, 2, 0, 0}, ::torch::kLong)))
      << "as in the first pass";
  EXPECT_TRUE(counts.of(1, 0)(other).equal(::torch::tensor({0, 0, 2, 6}, ::torch::kLong))) << "another layer";
  {
    const ::torch::NoGradGuard evaluation;
    EXPECT_TRUE(counts.of(0, 7)(one).equal(one));
  }
  EXPECT_EQ(collectives, 3);
  counts.next_step();
  EXPECT_TRUE(counts.of(0, 0)(other).equal(::torch::tensor({0, 0, 2, 6}, ::torch::kLong)));
}

TEST(TopKRouter, ZLossIsTheMeanSquaredLogSumExp) {
  ::torch::manual_seed(5);
  const Tensor z = ::torch::randn({8, 4}, kDouble);
  TopKRouter router(options().z_loss_weight(0.25));
  const RouterOutput out = router->route(z);
  const double expected = z.exp().sum(-1).log().square().mean().item<double>();
  EXPECT_NEAR(out.z_loss.item<double>(), expected, 1e-12);
  EXPECT_NEAR(out.aux_loss.item<double>(), 0.25 * expected, 1e-12);
}

TEST(TopKRouter, LossGradientsFollowTheirFormulas) {
  ::torch::manual_seed(11);
  const std::int64_t batch = 3, length = 5, n = 4, tokens = batch * length;
  const Tensor z = ::torch::randn({batch, length, n}, kDouble).set_requires_grad(true);
  const Tensor load = ::torch::tensor({0.4, 0.3, 0.2, 0.1}, kDouble);
  TopKRouter router(options().gate(Gate::kSoftmax));
  const auto gradient = [&](const Tensor& loss) {
    z.mutable_grad() = Tensor();
    loss.backward();
    return z.grad().clone();
  };
  const RouterOutput out = router->route(z), global = router->route(z, {.counts_over_batch = always(load)});
  const Tensor p = z.detach().softmax(-1);
  // ∂/∂z_tj of N Σ_i f_i P_i: (N/T) p_tj (f_j - Σ_i f_i p_ti), f a constant.
  const auto balance = [&](const Tensor& f) {
    return p * (f - (p * f).sum(-1, true)) * (static_cast<double>(n) / static_cast<double>(tokens));
  };
  const Tensor counts = out.indices.reshape(-1).bincount({}, n).to(kDouble);
  EXPECT_TRUE(close(gradient(out.balance_loss), balance(counts / counts.sum())));
  EXPECT_TRUE(close(gradient(global.balance_loss), balance(load)));
  // Each sequence by itself, averaged.
  std::vector<Tensor> loads;
  for (const Tensor& row : out.indices.unbind()) loads.push_back(row.reshape(-1).bincount({}, n).to(kDouble));
  const Tensor each = ::torch::stack(loads).unsqueeze(1) / static_cast<double>(2 * length);
  EXPECT_TRUE(close(gradient(router->route(z).sequence_loss), balance(each)));
  // ∂/∂z_tj of mean lse²: (2/T) lse_t p_tj.
  const Tensor lse = z.detach().logsumexp(-1, true);
  EXPECT_TRUE(close(gradient(router->route(z).z_loss), p * lse * (2.0 / static_cast<double>(tokens))));
}

TEST(TopKRouter, TheGradientUnderTheLoadOfTheBatchMatchesFiniteDifferences) {
  ::torch::manual_seed(12);
  const Tensor z = ::torch::randn({6, 4}, kDouble), load = ::torch::tensor({0.7, 0.1, 0.1, 0.1}, kDouble);
  for (const Gate gate : {Gate::kSoftmax, Gate::kSigmoid, Gate::kSqrtSoftplus}) {
    TopKRouter router(options().gate(gate));
    EXPECT_LT(gradient_error(
                  [&](const Tensor& x) {
                    return router->route(x, {.counts_over_batch = always(load)}).balance_loss;
                  },
                  z),
              1e-7);
  }
}

TEST(TopKRouter, ScaleMultipliesTheGatesAlsoWithoutNormalising) {
  ::torch::manual_seed(13);
  const Tensor z = ::torch::randn({6, 4}, kDouble);
  const RouterOutput plain = TopKRouter(options().normalize(false))->route(z);
  const RouterOutput scaled = TopKRouter(options().normalize(false).scale(2.5))->route(z);
  EXPECT_TRUE(close(scaled.gates, plain.gates * 2.5));
  EXPECT_TRUE(scaled.indices.equal(plain.indices));
  EXPECT_TRUE(close(plain.gates, z.sigmoid().gather(-1, plain.indices)));
}

TEST(TopKRouter, DropsAreMeasuredByTheController) {
  ::torch::manual_seed(14);
  ControllerConfig config;
  config.model.layers = 1;
  config.model.experts = 4;
  config.model.top_k = 2;
  for (const DropBy drop_by : {DropBy::kScore, DropBy::kPosition}) {
    TorchController controller(config);
    TopKRouter router(options().capacity_factor(1.0).drop_by(drop_by));
    std::int64_t dropped = 0, assignments = 0;
    for (int micro_batch = 0; micro_batch < 3; ++micro_batch) {
      const Tensor z = ::torch::randn({40, 4}, kDouble) + ::torch::tensor({2.0, 1.0, 0.0, -1.0});
      const RouterOutput out = router->route(z);
      controller.record(0, out.indices, out.record_options());
      dropped += out.kept.logical_not().sum().item<std::int64_t>();
      assignments += out.kept.numel();
      EXPECT_EQ(out.gates.eq(0).sum().item<std::int64_t>(), out.dropped.item<std::int64_t>());
    }
    EXPECT_GT(dropped, 10);
    const StepReport& report = controller.step();
    EXPECT_EQ(report.layers[0].stats->dropped(), static_cast<double>(dropped));
    EXPECT_DOUBLE_EQ(*report.layers[0].metrics->drop_rate,
                     static_cast<double>(dropped) / static_cast<double>(assignments));
  }
}

TEST(TopKRouter, PaddingChangesNoLoss) {
  ::torch::manual_seed(6);
  const Tensor z = ::torch::randn({2, 4, 4}, kDouble);
  const Tensor padded = ::torch::cat({z, ::torch::full({2, 3, 4}, 50.0, kDouble)}, 1);
  const Tensor mask = ::torch::cat({::torch::ones({2, 4}), ::torch::zeros({2, 3})}, 1).to(::torch::kBool);
  TopKRouter router(options().gate(Gate::kSoftmax));
  const RouterOutput plain = router->route(z), masked = router->route(padded, {.mask = mask});
  EXPECT_TRUE(close(masked.balance_loss, plain.balance_loss));
  EXPECT_TRUE(close(masked.sequence_loss, plain.sequence_loss));
  EXPECT_TRUE(close(masked.z_loss, plain.z_loss));
  const RouterOutput nothing = router->route(z, {.mask = ::torch::zeros({2, 4}, ::torch::kBool)});
  EXPECT_EQ(nothing.balance_loss.item<double>(), 0.0);
  EXPECT_EQ(nothing.sequence_loss.item<double>(), 0.0);
}

TEST(TopKRouter, DropsTheLowestScoresOverCapacity) {
  // Four tokens all choose experts 0 and 1; capacity ⌈0.5 · 8/4⌉ = 1 each: one assignment of each is kept.
  const Tensor z = logits({5, 4, 0, 0, 9, 2, 0, 0, 5, 4.5, 0, 0, 7, 6.9, 0, 0});
  TopKRouter router(options().gate(Gate::kSoftmax).capacity_factor(0.5));
  const RouterOutput out = router->route(z);
  EXPECT_EQ(out.dropped.item<std::int64_t>(), 6);
  // Expert 0's largest gate is token 1's (9 against 2); expert 1's is token 3's (6.9 against 7).
  EXPECT_TRUE(out.kept.equal(integers({0, 0, 1, 0, 0, 0, 0, 1}).view({4, 2}).to(::torch::kBool)));
  const RouterOutput all = TopKRouter(options().gate(Gate::kSoftmax))->route(z);
  EXPECT_TRUE(close(out.gates, all.gates * out.kept.to(kDouble)));
  EXPECT_FALSE(all.kept.defined());
  EXPECT_FALSE(all.dropped.defined());
  EXPECT_EQ(out.record_options().dropped.item<std::int64_t>(), 6);
}

TEST(TopKRouter, DropsTheLatestTokensByPosition) {
  const Tensor z = logits({5, 4, 0, 0, 9, 2, 0, 0, 5, 4.5, 0, 0, 0, 0, 8, 9});
  // ⌈1.0 · 8/4⌉ = 2 each: the third token of experts 0 and 1 is over.
  TopKRouter router(options().capacity_factor(1.0).drop_by(DropBy::kPosition));
  const RouterOutput out = router->route(z);
  EXPECT_EQ(out.dropped.item<std::int64_t>(), 2);
  EXPECT_TRUE(out.kept.equal(integers({1, 1, 1, 1, 0, 0, 1, 1}).view({4, 2}).to(::torch::kBool)));
  // Padding takes no place: without the first token the third fits, ⌈1.0 · 6/4⌉ = 2.
  const RouterOutput masked = router->route(z, {.mask = integers({0, 1, 1, 1}).to(::torch::kBool)});
  EXPECT_EQ(masked.dropped.item<std::int64_t>(), 0);
}

TEST(TopKRouter, DropsMatchTheCountsForAnyRouting) {
  for (int seed = 0; seed < 50; ++seed) {
    ::torch::manual_seed(static_cast<std::uint64_t>(seed));
    const Tensor z = ::torch::randn({64, 8}, kDouble) + ::torch::randn({8}, kDouble) * 2;
    const double factor = 0.25 + 0.05 * seed;
    const auto capacity = static_cast<std::int64_t>(std::ceil(128 * (factor / 8)));
    for (const DropBy drop_by : {DropBy::kScore, DropBy::kPosition}) {
      TopKRouter router(TopKRouterOptions(3, 8, 2).capacity_factor(factor).drop_by(drop_by));
      const RouterOutput out = router->route(z);
      const Tensor asked = out.indices.reshape(-1).bincount({}, 8);
      const Tensor served = out.indices.reshape(-1).masked_select(out.kept.reshape(-1)).bincount({}, 8);
      EXPECT_TRUE(served.equal(asked.clamp_max(capacity)));
      EXPECT_EQ(out.dropped.item<std::int64_t>(), (asked - served).sum().item<std::int64_t>());
    }
  }
}

TEST(TopKRouter, LosingGroupsNeverWinHoweverNegativeTheBias) {
  // Groups {0, 1} and {2, 3}; the first group wins on scores, and a bias sinks all experts far below zero.
  TopKRouter router(options().groups(2).groups_kept(1));
  const Tensor z = logits({3, 2, 1, 0, 0, 1, 2, 3});
  const Tensor bias = ::torch::full({4}, -1e6);
  const RouterOutput out = router->route(z, {.actuators = {.bias = bias}});
  EXPECT_TRUE(out.indices.equal(integers({0, 1, 3, 2}).view({2, 2})));
  EXPECT_FALSE(out.top_values.defined()) << "two experts a group, two chosen: there is no runner-up";

  ::torch::manual_seed(7);
  TopKRouter wide(TopKRouterOptions(3, 12, 2).groups(4).groups_kept(2));
  const Tensor many = ::torch::randn({500, 12}, kDouble) - 100;
  const RouterOutput routed = wide->route(many, {.actuators = {.bias = ::torch::randn({12}, kDouble)}});
  EXPECT_TRUE(routed.top_values.isfinite().all().item<bool>())
      << "the runner-up comes from a winning group too";
  // Two groups of three are free to choose from, and nothing in the others can be won.
  EXPECT_EQ(routed.biased_scores.isfinite().sum().item<std::int64_t>(), 500 * 6);
  EXPECT_TRUE((routed.biased_scores.isfinite() | (routed.biased_scores < 0)).all().item<bool>());
}

TEST(TopKRouter, GroupsAreRankedByTheirTwoLargestScores) {
  // Group {0, 1, 2} has the single best expert, group {3, 4, 5} the better pair.
  TopKRouter router(TopKRouterOptions(3, 6, 2).groups(2).groups_kept(1));
  const RouterOutput out = router->route(logits({5, 0, 0, 3, 3.5, 0}, 6));
  EXPECT_TRUE(out.indices.equal(integers({4, 3}).view({1, 2})));
}

TEST(TopKRouter, ForwardMakesLogitsInFullPrecisionFromHalfInputs) {
  ::torch::manual_seed(8);
  TopKRouter router(options());
  const Tensor x = ::torch::randn({5, 3});
  EXPECT_TRUE(close(router->forward(x).logits, x.mm(router->weight.t()), 1e-6));
  const RouterOutput half = router->forward(x.to(::torch::kBFloat16));
  EXPECT_EQ(half.logits.scalar_type(), ::torch::kFloat32);
  EXPECT_TRUE(
      close(half.logits, x.to(::torch::kBFloat16).to(::torch::kFloat32).mm(router->weight.t()), 1e-6));
  router->to(::torch::kBFloat16);
  EXPECT_EQ(router->forward(x).gates.scalar_type(), ::torch::kFloat32);
}

TEST(TopKRouter, JittersOnlyWhileTraining) {
  ::torch::manual_seed(9);
  TopKRouter router(options().jitter(0.1));
  const Tensor x = ::torch::ones({50, 3});
  router->eval();
  const Tensor still = router->forward(x).logits;
  EXPECT_TRUE(still.equal(router->forward(x).logits));
  router->train();
  const Tensor shaken = router->forward(x).logits;
  EXPECT_FALSE(shaken.equal(still));
  // Each input moves by at most 10 %, so a logit by at most 10 % of Σ |w|.
  EXPECT_LE((shaken - still).abs().max().item<double>(),
            0.1 * router->weight.abs().sum(1).max().item<double>() + 1e-6);
}

TEST(TopKRouter, LearnsThroughTheAuxLossAlone) {
  ::torch::manual_seed(10);
  TopKRouter router(TopKRouterOptions(8, 4, 1).gate(Gate::kSoftmax));
  const Tensor x = ::torch::randn({256, 8}) + 1;
  ::torch::optim::SGD optimizer(router->parameters(), 0.1);
  const RouterInputs inputs{.actuators = {.aux_loss_weight = ::torch::tensor(1.0F)}};
  const double before = router->forward(x, inputs).balance_loss.item<double>();
  for (int i = 0; i < 300; ++i) {
    optimizer.zero_grad();
    router->forward(x, inputs).aux_loss.backward();
    optimizer.step();
  }
  EXPECT_LT(router->forward(x, inputs).balance_loss.item<double>(), before);
  EXPECT_LT(router->forward(x, inputs).balance_loss.item<double>(), 1.1);
}

TEST(TopKRouter, ClonesAndSerializes) {
  TopKRouter router(options());
  const auto copy = std::dynamic_pointer_cast<TopKRouterImpl>(router->clone());
  EXPECT_TRUE(copy->weight.equal(router->weight));
  EXPECT_NE(copy->weight.data_ptr(), router->weight.data_ptr());
  EXPECT_EQ(router->named_parameters().keys(), std::vector<std::string>{"weight"});
}

TEST(TopKRouter, OptionsThatBreakAConstraintSaySo) {
  const auto message = [](const TopKRouterOptions& wrong) -> std::string {
    try {
      TopKRouter router(wrong);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message(options(4, 5)), HasSubstr("top_k: 5: must be in [1, experts]"));
  EXPECT_THAT(message(options(4, 0)), HasSubstr("top_k"));
  EXPECT_THAT(message(options(0, 1)), HasSubstr("experts"));
  EXPECT_THAT(message(options().groups(3)), HasSubstr("groups: 3"));
  EXPECT_THAT(message(options().groups(2).groups_kept(3)), HasSubstr("groups_kept: 3"));
  EXPECT_THAT(message(options().groups(4).groups_kept(1)), HasSubstr("top_k experts"));
  EXPECT_THAT(message(options().capacity_factor(0.0)), HasSubstr("capacity_factor"));
  EXPECT_THAT(message(options().jitter(1.0)), HasSubstr("jitter"));
  EXPECT_THAT(message(options().scale(NAN)), HasSubstr("scale"));
  EXPECT_THAT(message(options().z_loss_weight(-1)), HasSubstr("z_loss_weight"));
  EXPECT_THAT(message(options().sequence_loss_weight(-1)), HasSubstr("sequence_loss_weight"));
  EXPECT_EQ(message(options()), "");
}

}  // namespace
}  // namespace moectl
