// What real training does besides forward, backward and step: one test a feature, named after it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "moectl/torch/controller.h"
#include "moectl/torch/evaluation.h"
#include "moectl/torch/router.h"

namespace moectl {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::torch::Tensor;

ControllerConfig config_of(int experts, int top_k, int layers = 1,
                           const std::string& policy = "adaptive_bias") {
  ControllerConfig config;
  config.model.layers = layers;
  config.model.experts = experts;
  config.model.top_k = top_k;
  config.model.score_space = ScoreSpace::kLogit;
  config.expert_bias.policy = policy;
  config.expert_bias.limits = {.min = -16, .max = 16, .rate = 1, .center = true};
  return config;
}

std::vector<double> bias(const TorchController& controller, int layer = 0) {
  const auto values = controller.controller().bias(layer);
  return {values.begin(), values.end()};
}

std::vector<std::int64_t> counts(const StepReport& report, int layer = 0) {
  const auto counts = report.layers[static_cast<std::size_t>(layer)].stats->counts();
  return {counts.begin(), counts.end()};
}

/// Indices [T, 1] that give each expert its count.
Tensor indices_of(const std::vector<std::int64_t>& counts) {
  return ::torch::arange(static_cast<std::int64_t>(counts.size()))
      .repeat_interleave(::torch::tensor(counts, ::torch::kInt64))
      .unsqueeze(1);
}

/// Tokens that prefer the first experts of a router made for them.
Tensor skewed_tokens(std::int64_t batch, std::int64_t length, std::int64_t hidden) {
  return ::torch::randn({batch, length, hidden}) + ::torch::linspace(1, -1, hidden);
}

double max_vio(const StepReport& report, int layer = 0) {
  return *report.layers[static_cast<std::size_t>(layer)].metrics->max_vio;
}

TEST(TrainingFeatures, GradientAccumulation) {
  ::torch::manual_seed(1);
  TopKRouter router(TopKRouterOptions(8, 6, 2));
  TorchController whole(config_of(6, 2)), accumulated(config_of(6, 2));
  for (int step = 0; step < 10; ++step) {
    const Tensor logits = skewed_tokens(12, 5, 6);
    const RouterOutput all = router->route(logits, {.actuators = whole.actuators(0)});
    // A micro-batch has a balance loss of its own.
    const auto without_losses = [](RecordOptions options) {
      options.balance_loss = options.z_loss = Tensor();
      return options;
    };
    whole.record(0, all.indices, without_losses(all.record_options()));
    std::int64_t micro_batch = 0;
    for (const Tensor& part : logits.split_with_sizes({1, 4, 7})) {
      const RouterOutput routed = router->route(part, {.actuators = accumulated.actuators(0)});
      RecordOptions options = without_losses(routed.record_options());
      options.micro_batch = micro_batch++;
      accumulated.record(0, routed.indices, options);
    }
    whole.step({.loss = 1.0});
    accumulated.step({.loss = 1.0});
    ASSERT_EQ(bias(accumulated), bias(whole));
  }
  EXPECT_TRUE(accumulated.save() == whole.save()) << "one update a step, from the sums of all micro-batches";
}

/// Runs a block without keeping its activations and runs it again in the backward pass.
struct Recomputed : ::torch::autograd::Function<Recomputed> {
  using Block = std::function<Tensor(const Tensor&)>;
  static Tensor forward(::torch::autograd::AutogradContext* context, const Tensor& x, const Block* block) {
    context->save_for_backward({x});
    context->saved_data["block"] = reinterpret_cast<std::int64_t>(block);
    return (*block)(x);  // gradients are off in here
  }
  static ::torch::autograd::variable_list backward(::torch::autograd::AutogradContext* context,
                                                   const ::torch::autograd::variable_list& gradients) {
    const auto* block = reinterpret_cast<const Block*>(context->saved_data["block"].toInt());
    const Tensor x = context->get_saved_variables()[0].detach().set_requires_grad(true);
    const ::torch::AutoGradMode on(true);
    (*block)(x).backward(gradients[0]);
    return {x.grad(), Tensor()};
  }
};

TEST(TrainingFeatures, ActivationRecomputation) {
  ::torch::manual_seed(2);
  TopKRouter router(TopKRouterOptions(8, 6, 2));
  TorchController plain(config_of(6, 2)), recomputed(config_of(6, 2)), numbered(config_of(6, 2));
  const Tensor x = ::torch::randn({40, 8}, ::torch::requires_grad());
  int passes = 0;
  const auto block = [&](TorchController& controller, std::int64_t micro_batch) -> Recomputed::Block {
    return [&, micro_batch](const Tensor& input) {
      ++passes;
      const RouterOutput routed = router->forward(input);
      controller.record(0, routed.indices, {.micro_batch = micro_batch});
      return routed.gates.sum() + routed.probabilities.square().sum();
    };
  };
  block(plain, -1)(x).backward();
  const Recomputed::Block again = block(recomputed, -1);
  Recomputed::apply(x, &again).backward();
  EXPECT_EQ(passes, 3) << "the second block ran twice";
  EXPECT_EQ(counts(recomputed.step()), counts(plain.step()))
      << "counted once: the first pass has no gradients, the second has";

  // Where both passes have gradients, as with reentrant recomputation, the micro-batch's number tells.
  const Recomputed::Block twice = block(numbered, 7);
  twice(x).backward();
  twice(x).backward();
  EXPECT_EQ(counts(numbered.step()), counts(plain.report()));
}

TEST(TrainingFeatures, EvaluationPasses) {
  ::torch::manual_seed(3);
  TopKRouter router(TopKRouterOptions(8, 6, 2).jitter(0.3));
  TorchController undisturbed(config_of(6, 2)), evaluated(config_of(6, 2));
  EvaluationMeter meter(evaluated.controller());
  for (int step = 0; step < 5; ++step) {
    const Tensor tokens = skewed_tokens(4, 8, 8), held_out = skewed_tokens(4, 8, 8);
    for (TorchController* controller : {&undisturbed, &evaluated}) {
      router->train();
      ::torch::manual_seed(static_cast<std::uint64_t>(100 + step));  // the same jitter for both
      const RouterOutput routed = router->forward(tokens, {.actuators = controller->actuators(0)});
      controller->record(0, routed.indices, routed.record_options());
    }
    {  // between the forward pass and the step, so that it could leak into either
      const ::torch::NoGradGuard no_grad;
      router->eval();
      const RouterOutput routed = router->forward(held_out, {.actuators = evaluated.actuators(0)});
      evaluated.record(0, routed.indices, routed.record_options());
      meter.record(0, routed.indices, routed.record_options());
    }
    undisturbed.step();
    evaluated.step();
    ASSERT_EQ(bias(evaluated), bias(undisturbed));
  }
  EXPECT_TRUE(evaluated.save() == undisturbed.save());
  EXPECT_EQ(meter.report(5).layers[0].stats->tokens(), 5 * 4 * 8);
}

TEST(TrainingFeatures, PaddingMasks) {
  ::torch::manual_seed(4);
  TopKRouter router(TopKRouterOptions(8, 6, 2).capacity_factor(1.0));
  ControllerConfig config = config_of(6, 2);
  config.collect = {.gap = true, .sequences = true, .probabilities = true};
  TorchController packed(config), padded(config);
  for (int step = 0; step < 5; ++step) {
    const Tensor logits = skewed_tokens(3, 5, 6);
    const Tensor with_padding = ::torch::cat({logits, ::torch::zeros({3, 4, 6})}, 1);
    const Tensor mask = (::torch::arange(9) < 5).expand({3, 9}).contiguous();
    const RouterOutput a = router->route(logits, {.actuators = packed.actuators(0)});
    const RouterOutput b = router->route(with_padding, {.actuators = padded.actuators(0), .mask = mask});
    packed.record(0, a.indices, a.record_options());
    RecordOptions options = b.record_options();
    options.mask = mask;
    options.balance_loss = a.balance_loss, options.z_loss = a.z_loss;  // equal but for rounding
    padded.record(0, b.indices, options);
    EXPECT_TRUE(b.gates.narrow(1, 0, 5).allclose(a.gates)) << "padding takes no expert's place";
    EXPECT_TRUE(b.balance_loss.allclose(a.balance_loss));
    packed.step();
    padded.step();
    ASSERT_EQ(bias(padded), bias(packed));
  }
  EXPECT_TRUE(padded.save() == packed.save());
}

TEST(TrainingFeatures, MixedPrecisionWithSkippedSteps) {
  ::torch::manual_seed(5);
  TopKRouter router(TopKRouterOptions(8, 4, 2));
  TorchController controller(config_of(4, 2));
  double scale = 1e30;  // a loss scale that starts out far too large for half precision
  int skipped = 0, applied = 0;
  for (int step = 0; step < 60; ++step) {
    const Tensor tokens = skewed_tokens(4, 8, 8).to(::torch::kFloat16);
    const RouterOutput routed = router->forward(tokens, {.actuators = controller.actuators(0)});
    controller.record(0, routed.indices, routed.record_options());
    router->zero_grad();
    const Tensor loss = routed.gates.square().sum();
    (loss * scale).backward();
    const Tensor gradient = router->weight.grad().to(::torch::kFloat16);
    const bool overflow = !gradient.isfinite().all().item<bool>();
    const std::vector<double> before = bias(controller);
    const StepReport& report =
        controller.step({.loss = loss.item<double>(),
                         .gradient_norm = gradient.norm().item<double>(),  // infinite or NaN when skipped
                         .skipped = overflow});
    if (overflow) {
      ++skipped;
      scale /= 16;
      EXPECT_TRUE(report.layers[0].actuators[0].reasons.has(Reason::kSkippedStep));
      EXPECT_EQ(bias(controller), before) << "step " << step;
    } else {
      ++applied;
      EXPECT_FALSE(report.layers[0].actuators[0].reasons.has(Reason::kSkippedStep));
    }
  }
  EXPECT_GT(skipped, 10);
  EXPECT_GT(applied, 10);
  EXPECT_GT(controller.bias(0).abs().max().item<float>(), 0.05F) << "after the skipped steps it moves";
  EXPECT_TRUE(controller.bias(0).isfinite().all().item<bool>());
}

TEST(TrainingFeatures, FrozenAndFineTunedRouters) {
  // Pre-training leaves biases behind in both layers.
  TorchController pretrained(config_of(4, 1, 2, "sign_bias"));
  for (int step = 0; step < 20; ++step) {
    for (int layer = 0; layer < 2; ++layer) pretrained.record(layer, indices_of({10, 4, 3, 3}));
    pretrained.step();
  }
  // Fine-tuning takes them over, holds the first layer's router and trains the second's, on other data.
  TorchController tuned(config_of(4, 1, 2, "sign_bias"));
  tuned.load(pretrained.save());
  tuned.controller().freeze(0);
  const Tensor held = tuned.bias(0).clone();
  for (int step = 0; step < 30; ++step) {
    for (int layer = 0; layer < 2; ++layer) tuned.record(layer, indices_of({2, 2, 2, 14}));
    const StepReport& report = tuned.step();
    EXPECT_TRUE(report.layers[0].actuators[0].reasons.has(Reason::kFrozen));
    EXPECT_GT(max_vio(report, 0), 0) << "a frozen layer is still measured";
  }
  EXPECT_TRUE(tuned.bias(0).equal(held));
  EXPECT_EQ(bias(tuned, 0), bias(pretrained, 0)) << "to the bit";
  EXPECT_LT(bias(tuned, 1)[3], bias(pretrained, 1)[3] - 0.02);
  // Freezing is part of the state, so a resumed fine-tuning goes on freezing.
  TorchController resumed(config_of(4, 1, 2, "sign_bias"));
  resumed.load(tuned.save());
  resumed.record(0, indices_of({2, 2, 2, 14}));
  EXPECT_TRUE(resumed.step().layers[0].actuators[0].reasons.has(Reason::kFrozen));
  EXPECT_TRUE(resumed.bias(0).equal(held));
}

TEST(TrainingFeatures, LayersWithoutExperts) {
  // Blocks 0 and 3 of six have dense feed-forward layers; the controller knows the four others, by their own
  // numbers, and only averages over those.
  const std::vector<bool> has_experts = {false, true, true, false, true, true};
  ::torch::manual_seed(6);
  std::vector<TopKRouter> routers;
  ::torch::nn::Linear dense(8, 8);
  for (int i = 0; i < 4; ++i) routers.emplace_back(TopKRouterOptions(8, 4, 1));
  ControllerConfig config = config_of(4, 1, 4, "sign_bias");
  config.aux_loss_weight.policy = "pi";
  config.aux_loss_weight.scope = Scope::kModel;
  config.aux_loss_weight.initial = 0.01;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 0.1, .rate = 0.1};
  TorchController controller(config);
  for (int step = 0; step < 3; ++step) {
    Tensor x = skewed_tokens(2, 16, 8);
    int layer = 0;
    for (const bool moe : has_experts) {
      if (!moe) {
        x = dense(x);
        continue;
      }
      const RouterOutput routed =
          routers[static_cast<std::size_t>(layer)]->forward(x, {.actuators = controller.actuators(layer)});
      // The last layer gets no tokens at the second step, as when a block is dropped out.
      if (!(step == 1 && layer == 3)) controller.record(layer, routed.indices, routed.record_options());
      x = x + routed.gates.sum(-1, true);
      ++layer;
    }
    const StepReport& report = controller.step();
    ASSERT_EQ(report.layers.size(), 4U);
    for (std::size_t l = 0; l < 4; ++l) {
      const bool held = step == 1 && l == 3;
      EXPECT_EQ(report.layers[l].stats->tokens(), held ? 0 : 32);
      EXPECT_EQ(report.layers[l].actuators[0].reasons.has(Reason::kNoData), held);
    }
    EXPECT_EQ(controller.controller().aux_loss_weight(0), controller.controller().aux_loss_weight(3));
  }
  EXPECT_THROW(controller.record(4, indices_of({1, 1, 1, 1})), std::invalid_argument);
}

/// A router of fixed weights under control until its load settles; the mean MaxVio of the last steps.
double balanced_by(TorchController& controller, TopKRouter& router, const RouterInputs& more = {},
                   int steps = 300) {
  double last = 0;
  for (int step = 0; step < steps; ++step) {
    ::torch::manual_seed(static_cast<std::uint64_t>(step));
    RouterInputs inputs = more;
    inputs.actuators = controller.actuators(0);
    const RouterOutput routed = router->forward(skewed_tokens(8, 64, 16), inputs);
    controller.record(0, routed.indices, routed.record_options());
    const StepReport& report = controller.step();
    if (step >= steps - 20) last += max_vio(report) / 20;
  }
  return last;
}

TEST(TrainingFeatures, ExpertGroupsAndGroupLimitedRouting) {
  ::torch::manual_seed(7);
  TopKRouter router(TopKRouterOptions(16, 12, 2).groups(4).groups_kept(2));
  TorchController fixed(config_of(12, 2, 1, "fixed")), controller(config_of(12, 2));
  const double before = balanced_by(fixed, router, {}, 40);
  const double after = balanced_by(controller, router);
  EXPECT_GT(before, 0.8) << "there is something to balance";
  EXPECT_LT(after, 0.35) << "biases balance all experts through the choice of groups";
  // Every choice of a token lies within two groups, whatever the biases have become.
  const RouterOutput routed =
      router->forward(skewed_tokens(8, 64, 16), {.actuators = controller.actuators(0)});
  const Tensor group = routed.indices.div(3, "floor");
  EXPECT_TRUE(routed.top_values.isfinite().all().item<bool>()) << "the gap is that to a permitted runner-up";
  for (const Tensor& of_token : group.view({-1, 2}).unbind()) {
    EXPECT_LE(std::get<0>(at::_unique(of_token)).numel(), 2);
  }
}

TEST(TrainingFeatures, SharedExperts) {
  // A shared expert sees every token, beside the routed ones: it is no expert of the controller's and moves
  // neither counts nor targets.
  ::torch::manual_seed(8);
  TopKRouter router(TopKRouterOptions(16, 6, 2));
  ::torch::nn::Linear shared(16, 16);
  std::vector<::torch::nn::Linear> experts;
  for (int i = 0; i < 6; ++i) experts.emplace_back(16, 16);
  TorchController controller(config_of(6, 2));
  for (int step = 0; step < 3; ++step) {
    const Tensor x = skewed_tokens(2, 16, 16);
    const RouterOutput routed = router->forward(x, {.actuators = controller.actuators(0)});
    Tensor y = shared(x);
    for (std::int64_t i = 0; i < 6; ++i) {
      const Tensor gate = (routed.gates * (routed.indices == i).to(::torch::kFloat)).sum(-1, true);
      y = y + gate * experts[static_cast<std::size_t>(i)](x);
    }
    controller.record(0, routed.indices, routed.record_options());
    const StepReport& report = controller.step();
    EXPECT_EQ(report.layers[0].stats->assignments(), 2 * 32)
        << "k assignments a token, the shared one not among them";
    EXPECT_EQ(report.layers[0].stats->counts().size(), 6U);
    EXPECT_TRUE(routed.gates.sum(-1).allclose(::torch::ones({2, 16})))
        << "gates share out the routed part alone";
  }
}

TEST(TrainingFeatures, ExpertToDevicePlacement) {
  // Experts 0 and 1 live on device 0, 2 and 3 on device 1: balance of the experts within a device does not
  // hide that one device waits for the other.
  ControllerConfig config = config_of(4, 1, 1, "sign_bias");
  config.metrics.placement = {0, 0, 1, 1};
  TorchController controller(config);
  controller.record(0, indices_of({6, 6, 2, 2}));
  const StepReport& report = controller.step();
  EXPECT_DOUBLE_EQ(*report.layers[0].metrics->straggler_slowdown, 12.0 / 8);
  controller.record(0, indices_of({8, 0, 0, 8}));
  EXPECT_DOUBLE_EQ(*controller.step().layers[0].metrics->straggler_slowdown, 1.0);
  EXPECT_DOUBLE_EQ(*controller.report().layers[0].metrics->max_vio, 1.0) << "the experts' own imbalance";
}

TEST(TrainingFeatures, ChangingBatchSize) {
  // The last batch of an epoch, or a growing batch size: the same shares move the biases alike, and the noise
  // that a small batch shows is not taken for imbalance.
  TorchController small(config_of(4, 1, 1, "sign_bias")), large(config_of(4, 1, 1, "sign_bias")),
      mixed(config_of(4, 1, 1, "sign_bias"));
  for (int step = 0; step < 10; ++step) {
    small.record(0, indices_of({4, 2, 1, 1}));
    large.record(0, indices_of({4000, 2000, 1000, 1000}));
    mixed.record(0, step % 2 == 0 ? indices_of({4, 2, 1, 1}) : indices_of({4000, 2000, 1000, 1000}));
    for (TorchController* it : {&small, &large, &mixed}) it->step();
  }
  EXPECT_EQ(bias(small), bias(large));
  EXPECT_EQ(bias(mixed), bias(large));
  EXPECT_GT(*small.report().layers[0].metrics->noise_floor_max_vio,
            20 * *large.report().layers[0].metrics->noise_floor_max_vio);

  // adaptive_bias settles all the same when every batch has another size.
  ::torch::manual_seed(9);
  TopKRouter router(TopKRouterOptions(16, 8, 2));
  TorchController controller(config_of(8, 2));
  double excess = 0;
  for (int step = 0; step < 300; ++step) {
    ::torch::manual_seed(static_cast<std::uint64_t>(step));
    const std::int64_t sequences = 1 + step * 7 % 16;
    const RouterOutput routed =
        router->forward(skewed_tokens(sequences, 64, 16), {.actuators = controller.actuators(0)});
    controller.record(0, routed.indices, routed.record_options());
    const Metrics& metrics = *controller.step().layers[0].metrics;
    if (step >= 260) excess += *metrics.max_vio / *metrics.noise_floor_max_vio / 40;
  }
  EXPECT_LT(excess, 1.8) << "times the noise floor of each batch's own size";
}

TEST(TrainingFeatures, HalfPrecisionScoresOnInputAndTheBiasNeverNarrower) {
  for (const auto type : {::torch::kFloat16, ::torch::kBFloat16}) {
    ::torch::manual_seed(10);
    TopKRouter router(TopKRouterOptions(8, 6, 2));
    TorchController controller(config_of(6, 2));
    const Tensor held = controller.bias(0);
    const void* const address = held.data_ptr();
    router->to(type);  // as a whole model is converted
    for (int step = 0; step < 20; ++step) {
      const RouterOutput routed =
          router->forward(skewed_tokens(4, 16, 8).to(type), {.actuators = controller.actuators(0)});
      RecordOptions options = routed.record_options();
      options.top_values = options.top_values.to(type);  // a router of one's own may have no more
      controller.record(0, routed.indices, options);
      EXPECT_FALSE(controller.step().layers[0].actuators[0].reasons.has(Reason::kInvalid));
    }
    EXPECT_EQ(controller.bias(0).scalar_type(), ::torch::kFloat32);
    EXPECT_EQ(controller.bias(0).data_ptr(), address);
    EXPECT_EQ(held.data_ptr(), address);
    for (std::int64_t i = 0; i < 6; ++i) {
      EXPECT_EQ(held[i].item<float>(),
                static_cast<float>(controller.controller().bias(0)[static_cast<std::size_t>(i)]));
    }

    // A bias too small to show beside the logit in their own precision still decides between equal logits.
    ASSERT_EQ((::torch::tensor(8.0).to(type) + ::torch::tensor(1e-3).to(type)).item<float>(), 8.0F);
    const Tensor logits = ::torch::full({1, 6}, 8.0).to(type);
    const Tensor nudge = ::torch::tensor({0.0, 0.0, 0.0, 1e-3, 2e-3, 0.0}, ::torch::kFloat);
    const RouterOutput decided = router->route(logits, {.actuators = {.bias = nudge}});
    EXPECT_TRUE(decided.indices.equal(::torch::tensor({{4, 3}}, ::torch::kInt64)));
    EXPECT_NEAR((decided.top_values[0][0] - decided.top_values[0][1]).item<double>(), 1e-3, 1e-5);
  }
}

}  // namespace
}  // namespace moectl
