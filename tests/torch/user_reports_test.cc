// What users of other load balancers report, in the order of the project's list: one test each, so that none
// of it comes back here. The numbers in brackets are the issues of the projects named.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "moectl/config.h"
#include "moectl/torch/controller.h"
#include "moectl/torch/process_group.h"
#include "moectl/torch/router.h"

namespace moectl {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::torch::Tensor;

ControllerConfig sign_config(int experts, int top_k, bool centred = false, int layers = 1) {
  ControllerConfig config;
  config.model.layers = layers;
  config.model.experts = experts;
  config.model.top_k = top_k;
  config.expert_bias.policy = "sign_bias";
  config.expert_bias.options.set("step", 1e-3);
  config.expert_bias.options.set("zero_mean_move", centred);
  config.expert_bias.limits = {.min = -16, .max = 16, .rate = 0.01};
  return config;
}

/// Indices [T, 1] that give each expert its count.
Tensor indices_of(const std::vector<std::int64_t>& counts) {
  return ::torch::arange(static_cast<std::int64_t>(counts.size()))
      .repeat_interleave(::torch::tensor(counts, ::torch::kInt64))
      .unsqueeze(1);
}

std::vector<double> bias(const TorchController& controller, int layer = 0) {
  const auto values = controller.controller().bias(layer);
  return {values.begin(), values.end()};
}

TEST(UserReports, Item01_CountsThatBfloat16CannotTellApart) {  // Megatron 7081
  TorchController controller(sign_config(2, 1));
  ASSERT_EQ(::torch::tensor(40961.0).to(::torch::kBFloat16).item<float>(),
            ::torch::tensor(40959.0).to(::torch::kBFloat16).item<float>());
  controller.record(0, indices_of({40961, 40959}));
  controller.step();
  EXPECT_THAT(bias(controller), ElementsAre(-1e-3, 1e-3));
}

TEST(UserReports, Item02_BiasIsNeverStoredNarrowerThanFloat) {  // Megatron 1482, sglang 31213, Automodel 2553
  TorchController controller(sign_config(238, 1, true));
  for (int step = 0; step < 60; ++step) {
    ::torch::manual_seed(static_cast<std::uint64_t>(step));
    controller.record(0, ::torch::randint(0, 238, {4000, 1}, ::torch::kInt64));
    controller.step();
  }
  ASSERT_EQ(controller.bias(0).scalar_type(), ::torch::kFloat32);
  const std::vector<double> before = bias(controller);
  const std::size_t distinct = std::set<double>(before.begin(), before.end()).size();
  const Tensor narrow = controller.bias(0).to(::torch::kBFloat16).to(::torch::kFloat32);
  EXPECT_FALSE(narrow.equal(controller.bias(0))) << "these values would not survive";

  TorchController restored(sign_config(238, 1, true));
  restored.load(controller.save());
  const std::vector<double> after = bias(restored);
  EXPECT_EQ(after, before);
  EXPECT_EQ(std::set<double>(after.begin(), after.end()).size(), distinct);

  // A state that has been cast on its way is refused, not rounded.
  ::torch::serialize::OutputArchive out;
  const std::string state = controller.save();
  std::vector<std::uint8_t> bytes(state.begin(), state.end());
  out.write("moectl", ::torch::tensor(bytes, ::torch::kUInt8).to(::torch::kBFloat16));
  std::stringstream stream;
  out.save_to(stream);
  ::torch::serialize::InputArchive in;
  in.load_from(stream);
  EXPECT_THROW(restored.load(in), StateError);
  EXPECT_EQ(bias(restored), before);
}

TEST(UserReports, Item03_PaddingIsNotCounted) {  // Megatron 1984, torchtitan 4594
  TorchController controller(sign_config(2, 1));
  // All padding goes to expert 0; the real tokens prefer expert 1.
  controller.record(0, ::torch::tensor({0, 0, 0, 0, 1, 1, 0}).unsqueeze(1),
                    {.mask = ::torch::tensor({false, false, false, false, true, true, true})});
  controller.step();
  EXPECT_THAT(bias(controller), ElementsAre(1e-3, -1e-3));
}

TEST(UserReports, Item04_OneUpdateForManyMicroBatches) {  // torchtitan 1304
  TorchController accumulated(sign_config(4, 1)), whole(sign_config(4, 1));
  const Tensor all = indices_of({5, 1, 1, 1});
  for (std::int64_t i = 0; i < 8; ++i) accumulated.record(0, all.narrow(0, i, 1), {.micro_batch = i});
  whole.record(0, all);
  accumulated.step();
  whole.step();
  EXPECT_EQ(bias(accumulated), bias(whole));
  EXPECT_THAT(bias(whole), ElementsAre(-1e-3, 1e-3, 1e-3, 1e-3)) << "one step of 1e-3, not eight";
  EXPECT_EQ(accumulated.controller().save(), whole.controller().save());
}

TEST(UserReports, Item05_RecomputationCountsOnce) {  // torchtitan 1593
  TorchController controller(sign_config(4, 1));
  for (int pass = 0; pass < 2; ++pass) controller.record(0, indices_of({5, 1, 1, 1}), {.micro_batch = 3});
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 8);
}

TEST(UserReports, Item06_EvaluationDoesNotLeakIntoTheNextUpdate) {  // torchtitan 4148
  TorchController controller(sign_config(2, 1));
  {
    const ::torch::NoGradGuard no_grad;
    controller.record(0, indices_of({100, 0}));
  }
  {
    const RecordingGuard guard;  // an evaluation that needs gradients
    controller.record(0, indices_of({100, 0}));
  }
  {
    const c10::InferenceMode inference;
    controller.record(0, indices_of({100, 0}));
  }
  controller.record(0, indices_of({1, 2}));
  controller.step();
  EXPECT_THAT(bias(controller), ElementsAre(1e-3, -1e-3));
}

TEST(UserReports, Item07_TheCheckpointHoldsTheBiasThatIsInForce) {  // torchtitan 1222
  TorchController controller(sign_config(2, 1));
  const Tensor held = controller.bias(0);
  controller.record(0, indices_of({3, 1}));
  controller.step();
  TorchController restored(sign_config(2, 1));
  const Tensor restored_held = restored.bias(0);
  restored.load(controller.save());
  EXPECT_THAT(bias(restored), ElementsAre(-1e-3, 1e-3));
  EXPECT_TRUE(restored_held.equal(held)) << "and in the very tensor that the router holds";
  EXPECT_NE(held.abs().sum().item<float>(), 0);
}

TEST(UserReports, Item08_EveryRankSendsTheSamePayload) {  // Megatron 1444, 3401
  std::vector<std::size_t> with_tokens, without_tokens;
  const auto sizes_into = [](std::vector<std::size_t>& sizes) {
    return [&sizes](std::span<std::int64_t> payload) { sizes.push_back(payload.size()); };
  };
  TorchController busy(sign_config(4, 1, false, 3)), idle(sign_config(4, 1, false, 3));
  busy.controller().set_reduction(sizes_into(with_tokens));
  idle.controller().set_reduction(sizes_into(without_tokens));
  for (int step = 0; step < 3; ++step) {
    busy.record(step % 3, indices_of({1, 2, 3, 4}));  // not every layer sees tokens every step
    busy.step({.loss = 1.0});
    idle.step();
  }
  EXPECT_EQ(with_tokens, without_tokens);

  // A rank with another number of layers finds out in the first small collective, before the sizes differ.
  TorchController other(sign_config(4, 1, false, 2));
  std::vector<std::int64_t> first;
  busy.controller().set_reduction(
      [&](std::span<std::int64_t> payload) { first.assign(payload.begin(), payload.end()); });
  busy.step();
  other.controller().set_reduction([&](std::span<std::int64_t> payload) {
    std::vector<std::int64_t> theirs;
    TorchController peer(sign_config(4, 1, false, 3));
    peer.controller().set_reduction([&](std::span<std::int64_t> sent) {
      if (theirs.empty()) theirs.assign(sent.begin(), sent.end());
    });
    peer.step();
    ASSERT_EQ(theirs.size(), payload.size());
    for (std::size_t i = 0; i < payload.size(); ++i) payload[i] += theirs[i];
  });
  EXPECT_THROW(other.step(), ReductionError);
}

TEST(UserReports, Item09_ReplicatedScoresAreNotSummedAgain) {  // torchtitan 4412
  constexpr int kRanks = 4;
  const StartAllReduce all_ranks_alike = [](std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions&) {
    tensors[0].mul_(kRanks);
    struct Done : c10d::Work {
      Done() { finish(); }
    };
    return c10::intrusive_ptr<c10d::Work>(c10::make_intrusive<Done>());
  };
  const auto tokens = [&](ReductionScope scope) {
    TorchController controller(sign_config(4, 1));
    controller.controller().set_reduction(reduce_with(all_ranks_alike, kRanks, {.scope = scope}));
    controller.record(0, indices_of({5, 1, 1, 1}));
    return controller.step().layers[0].stats->tokens();
  };
  EXPECT_EQ(tokens(ReductionScope::kReplicated), 8);
  EXPECT_EQ(tokens(ReductionScope::kPartial), 8 * kRanks);
}

TEST(UserReports, Item10_FrozenLayersDoNotDrift) {  // Megatron 4785
  TorchController controller(sign_config(2, 1, false, 2));
  controller.controller().freeze(0);
  for (int step = 0; step < 50; ++step) {
    for (int layer = 0; layer < 2; ++layer) controller.record(layer, indices_of({3, 1}));
    EXPECT_TRUE(controller.step().layers[0].actuators[0].reasons.has(Reason::kFrozen));
  }
  EXPECT_THAT(bias(controller, 0), Each(0.0));
  EXPECT_LT(bias(controller, 1)[0], -0.04);
  controller.controller().freeze(0, false);
  controller.record(0, indices_of({3, 1}));
  controller.step();
  EXPECT_THAT(bias(controller, 0), ElementsAre(-1e-3, 1e-3));
}

TEST(UserReports, Item11_ACollapsedLayerIsNotHiddenByTheOthers) {  // Megatron 6748, transformers 28255
  TorchController controller(sign_config(4, 1, false, 3));
  controller.record(0, indices_of({8, 8, 8, 8}));
  controller.record(1, indices_of({32, 0, 0, 0}));
  controller.record(2, indices_of({8, 8, 8, 8}));
  const StepReport& report = controller.step();
  ASSERT_EQ(report.layers.size(), 3U);
  EXPECT_DOUBLE_EQ(*report.layers[0].metrics->max_vio, 0);
  EXPECT_DOUBLE_EQ(*report.layers[1].metrics->max_vio, 3);
  EXPECT_DOUBLE_EQ(*report.layers[1].metrics->inactive_experts, 3);
  EXPECT_DOUBLE_EQ(*report.layers[2].metrics->max_vio, 0);
  EXPECT_THAT(bias(controller, 0), Each(0.0));
}

TEST(UserReports, Item12_TheMeanBiasDoesNotDriftUnlessAskedTo) {  // torchtitan 1506, transformers 45441
  TorchController centred(sign_config(4, 1, true)), published(sign_config(4, 1, false));
  for (int step = 0; step < 400; ++step) {
    for (TorchController* controller : {&centred, &published}) {
      controller->record(0, indices_of({7, 1, 1, 1}));
      controller->step();
    }
  }
  const auto mean = [](const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  };
  EXPECT_NEAR(mean(bias(centred)), 0, 1e-12);
  EXPECT_NEAR(mean(bias(published)), 400 * 1e-3 * (3 - 1) / 4, 1e-9) << "exactly Megatron's method";
}

TEST(UserReports, Item13_NoBiasLetsAMaskedGroupWin) {  // DeepSeek-V3 741
  TopKRouter router(TopKRouterOptions(3, 8, 2).groups(4).groups_kept(1).score_space(ScoreSpace::kLogit));
  const Tensor logits = ::torch::tensor({{0.1, 0.2, 9.0, 9.1, 0.3, 0.4, 0.5, 0.6}});
  for (const double sink : {-1.0, -100.0, -1e8}) {
    const Tensor bias = ::torch::full({8}, sink);
    const RouterOutput out = router->route(logits, {.actuators = {.bias = bias}});
    EXPECT_THAT(std::vector<std::int64_t>(
                    {out.indices[0][0].item<std::int64_t>(), out.indices[0][1].item<std::int64_t>()}),
                ::testing::UnorderedElementsAre(2, 3))
        << sink;
  }
  // And the bias itself is bounded.
  ControllerConfig config = sign_config(2, 1);
  config.expert_bias.limits.min = -0.005;
  config.expert_bias.limits.max = 0.005;
  TorchController controller(config);
  for (int step = 0; step < 100; ++step) {
    controller.record(0, indices_of({3, 1}));
    controller.step();
  }
  EXPECT_THAT(bias(controller), ElementsAre(-0.005, 0.005));
}

TEST(UserReports, Item14_NoNaNGradientAtPerfectBalance) {  // vmoe 218
  for (const Gate gate : {Gate::kSoftmax, Gate::kSigmoid, Gate::kSqrtSoftplus}) {
    TopKRouter router(TopKRouterOptions(3, 4, 2).gate(gate).sequence_loss_weight(1).z_loss_weight(1));
    const Tensor logits = ::torch::zeros({2, 6, 4}, ::torch::requires_grad());
    router->route(logits, {.actuators = {.aux_loss_weight = ::torch::tensor(1.0F)}}).aux_loss.backward();
    EXPECT_TRUE(logits.grad().isfinite().all().item<bool>());
  }
}

TEST(UserReports, Item15_TheAuxLossReachesTheRouterOnceAndInFull) {  // Automodel 3359, 1408; Megatron 3672
  ::torch::manual_seed(1);
  TopKRouter router(TopKRouterOptions(8, 4, 2).gate(Gate::kSoftmax));
  const Tensor batches[] = {::torch::randn({16, 8}), ::torch::randn({16, 8})};
  const auto gradient = [&](double weight, int micro_batches) {
    router->zero_grad();
    for (int i = 0; i < micro_batches; ++i) {
      router->forward(batches[i], {.actuators = {.aux_loss_weight = ::torch::tensor(weight)}})
          .aux_loss.backward();
    }
    return router->weight.grad().clone();
  };
  const Tensor once = gradient(0.01, 1);
  EXPECT_GT(once.abs().max().item<double>(), 1e-6) << "the gradient flows";
  EXPECT_TRUE(gradient(0.03, 1).allclose(once * 3, 1e-4, 1e-8)) << "and is in proportion to the weight";
  router->zero_grad();
  router->forward(batches[1], {.actuators = {.aux_loss_weight = ::torch::tensor(0.01)}}).aux_loss.backward();
  const Tensor second = router->weight.grad().clone();
  EXPECT_TRUE(gradient(0.01, 2).allclose(once + second, 1e-4, 1e-8)) << "micro-batches add, unscaled";
}

TEST(UserReports, Item16_AFreshControllerHasCountedNothing) {  // prime-rl 2953
  for (int i = 0; i < 20; ++i) {
    TorchController controller(sign_config(64, 2, false, 4));
    for (const LayerReport& layer : controller.step().layers) {
      EXPECT_EQ(layer.stats->tokens(), 0);
      EXPECT_THAT(layer.stats->counts(), Each(0));
      EXPECT_FALSE(layer.metrics->max_vio.has_value()) << "no data is neither 0 nor NaN";
      EXPECT_TRUE(layer.actuators[0].reasons.has(Reason::kNoData));
    }
    for (int layer = 0; layer < 4; ++layer) EXPECT_THAT(bias(controller, layer), Each(0.0));
  }
}

TEST(UserReports, Item17_EveryExpertOfEveryLayerIsThereToBeCounted) {  // Megatron 2398, trl 4611
  TorchController controller(sign_config(4, 1, false, 2));
  controller.record(0, indices_of({4, 3, 2, 1}));
  controller.record(1, indices_of({10, 0, 0, 0}));
  std::vector<std::int64_t> pooled;
  for (const LayerReport& layer : controller.step().layers) {
    const auto counts = layer.stats->counts();
    pooled.insert(pooled.end(), counts.begin(), counts.end());
  }
  EXPECT_THAT(pooled, ElementsAre(4, 3, 2, 1, 10, 0, 0, 0));
}

TEST(UserReports, Item18_ASkippedStepHolds) {
  TorchController controller(sign_config(2, 1));
  controller.record(0, indices_of({3, 1}));
  const StepReport& report = controller.step({.loss = NAN, .gradient_norm = INFINITY, .skipped = true});
  EXPECT_TRUE(report.layers[0].actuators[0].reasons.has(Reason::kSkippedStep));
  EXPECT_THAT(bias(controller), Each(0.0));
  controller.record(0, indices_of({3, 1}));
  controller.step({.loss = 1.0});
  EXPECT_THAT(bias(controller), ElementsAre(-1e-3, 1e-3));
}

std::vector<std::string> notices_of(const StepReport& report) {
  std::vector<std::string> out;
  for (const Notice& notice : report.notices) {
    out.push_back(std::string(name_of(notice.kind)) + ", layer " + std::to_string(notice.layer) + ": " +
                  std::string(notice.text));
  }
  return out;
}

/// The numbers of the k largest of each row.
Tensor largest(const Tensor& rows, std::int64_t k) {
  return std::get<1>(rows.topk(k));
}

/// Scores [T, N] of tokens that prefer experts of low number, the same for each number of the step.
Tensor scores_of(int step, std::int64_t tokens, std::int64_t experts) {
  ::torch::Generator random = at::detail::createCPUGenerator(static_cast<std::uint64_t>(step));
  return ::torch::rand({tokens, experts}, random) - ::torch::linspace(0, 0.5, experts);
}

TEST(UserReports, Item19_ReplayedRoutesDoNotRunAway) {  // prime-rl 2953
  ControllerConfig config = sign_config(8, 2);
  config.expert_bias.policy = "adaptive_bias";
  config.expert_bias.options = {};
  config.expert_bias.limits = {.min = -1000, .max = 1000, .rate = 100, .center = true};
  config.model.score_space = ScoreSpace::kLogit;
  TorchController controller(config);
  bool held = false, said = false;
  double furthest = 0;
  for (int step = 0; step < 400; ++step) {
    // The routes come from another engine, whatever the biases are here.
    const auto [values, indices] = scores_of(step, 512, 8).topk(3, -1);
    controller.record(0, indices.narrow(-1, 0, 2).contiguous(), {.top_values = values});
    const StepReport& report = controller.step();
    held = report.layers[0].actuators[0].reasons.has(Reason::kUnresponsive);
    for (const std::string& notice : notices_of(report)) said |= notice.find("unresponsive") == 0;
    for (const double b : bias(controller)) furthest = std::max(furthest, std::abs(b));
  }
  EXPECT_TRUE(held && said);
  // Back to where they began, but for probes.
  for (const double b : bias(controller)) EXPECT_LT(std::abs(b), 0.1);
  EXPECT_LT(furthest, 5) << "before it was noticed; the scores lie within 1.5 of each other";
}

TEST(UserReports, Item20_TrainingGoesOnFromAPretrainedBias) {  // Pai-Megatron-Patch 467, Megatron-Bridge 4199
  // One published model's biases have a mean near 34.5: it changes no choice.
  const std::vector<double> pretrained = {34.1, 34.3, 34.4, 34.5, 34.5, 34.6, 34.7, 34.9};
  ControllerConfig config = sign_config(8, 2, true);
  config.expert_bias.limits = {.min = -100, .max = 100, .rate = 100, .center = true};
  TorchController controller(config);
  controller.adopt(0, ::torch::tensor(pretrained, ::torch::kDouble));
  const Tensor scores = scores_of(1, 512, 8);
  const Tensor before = largest(scores + ::torch::tensor(pretrained), 2);
  EXPECT_TRUE(largest(scores + controller.bias(0), 2).equal(before)) << "in force at once";
  controller.record(0, before);
  controller.step();
  const std::vector<double> now = bias(controller);
  for (std::size_t i = 1; i < 8; ++i) {
    const double moved = (now[i] - now[0]) - (pretrained[i] - pretrained[0]);
    EXPECT_LE(std::abs(moved), 2.1e-3) << i << ": two steps of the law and no jump";
  }
}

TEST(UserReports, Item21_TheLawChangesMidRun) {  // KempnerForge 9, torchtitan 4394
  const ControllerConfig config = parse_config(R"(version: 1
model: {layers: 1, experts: 4, top_k: 1}
expert_bias: {policy: sign_bias, options: {step: 0.01}, limits: {min: -16, max: 16, rate: 1}}
timeline:
  - {from: 5, expert_bias: {policy: sign_bias, options: {step: 0.001}, limits: {min: -16, max: 16, rate: 1}}}
  - {from: 10, freeze: [0]}
)");
  TorchController controller(config);
  std::vector<double> course;
  for (int step = 0; step < 15; ++step) {
    controller.record(0, indices_of({8, 4, 2, 2}));
    controller.step();
    course.push_back(bias(controller)[0]);
  }
  EXPECT_NEAR(course[4], -5 * 0.0125, 1e-9);  // sign(e) = -1, 0, 1, 1, less its mean
  EXPECT_NEAR(course[9], -5 * 0.0125 - 5 * 0.00125, 1e-9);
  EXPECT_EQ(course[14], course[9]) << "the bias is owned and not updated";
}

TEST(UserReports, Item22_ASlotOfMinusOneIsNotRouted) {  // vLLM 47785
  TorchController controller(sign_config(4, 2));
  controller.record(0, ::torch::tensor({0, 1, 0, -1, -1, -1, 2, 3}, ::torch::kLong).view({4, 2}));
  const StepReport& report = controller.step();
  EXPECT_THAT(report.layers[0].stats->counts(), ElementsAre(2, 1, 1, 1));
  EXPECT_EQ(report.layers[0].stats->tokens(), 3) << "the third token was routed nowhere";
  EXPECT_EQ(report.layers[0].stats->invalid_records(), 0);
}

TEST(UserReports, Item23_PackedSequencesHaveTheirOwnSequenceLoss) {  // Megatron 6108, 5996
  ::torch::manual_seed(2);
  TopKRouter router(TopKRouterOptions(8, 4, 2).sequence_loss_weight(1));
  const Tensor a = ::torch::randn({5, 8}) + 1, b = ::torch::randn({9, 8}) - 1;
  const auto loss = [&](const Tensor& tokens, const std::vector<std::int64_t>& ids) {
    return router->forward(tokens, {.sequence_ids = ::torch::tensor(ids, ::torch::kLong)})
        .sequence_loss.item<double>();
  };
  const std::vector<std::int64_t> five(5, 0), nine(9, 1);
  std::vector<std::int64_t> both = five;
  both.insert(both.end(), nine.begin(), nine.end());
  const double packed = loss(::torch::cat({a, b}), both);
  EXPECT_NEAR(packed, (loss(a, five) + loss(b, nine)) / 2, 1e-6);
  EXPECT_GT(std::abs(packed - loss(::torch::cat({a, b}), std::vector<std::int64_t>(14, 0))), 0.05);
}

TEST(UserReports, Item24_ASequenceThatRanksShareIsOneSequence) {  // torchtitan 3000, MaxText 4931
  const auto floor_with = [](std::int64_t pieces, bool named) {
    ControllerConfig config = sign_config(8, 2);
    config.collect.sequences = true;
    if (named) config.model.split_sequences = 4;
    TorchController controller(config);
    for (std::int64_t s = 0; s < 4; ++s) {
      const Tensor chosen =
          largest(scores_of(static_cast<int>(s), 64, 8) + scores_of(50 + static_cast<int>(s), 1, 8) * 2, 2);
      for (const Tensor& piece : chosen.chunk(pieces)) {
        controller.record(0, piece,
                          {.sequence_ids = ::torch::full({piece.size(0)}, named ? s : 0, ::torch::kLong)});
      }
    }
    return *controller.step().layers[0].metrics->sampling_floor_cv;
  };
  EXPECT_EQ(floor_with(1, true), floor_with(8, true));
  EXPECT_EQ(floor_with(1, true), floor_with(1, false));
  EXPECT_LT(floor_with(8, false), 0.7 * floor_with(8, true)) << "rows without ids count as whole sequences";
}

TEST(UserReports, Item25_LayersOfDifferentExpertCounts) {  // Megatron 5573, NeMo-RL 3523
  TorchController controller(parse_config(R"(version: 1
model: {layers: 2, experts: 4, top_k: 1}
expert_bias: {policy: sign_bias, options: {step: 0.001}}
layers:
  - {ids: [1]}
  - {ids: [3], experts: 8, top_k: 2}
)"));
  EXPECT_EQ(controller.bias(1).numel(), 4);
  EXPECT_EQ(controller.bias(3).numel(), 8);
  controller.record(1, indices_of({4, 3, 2, 1}));
  controller.record(3, largest(scores_of(0, 64, 8), 2));
  const StepReport& report = controller.step();
  EXPECT_EQ(report.layers[1].layer, 3);
  EXPECT_EQ(report.layers[1].stats->counts().size(), 8U);
  EXPECT_THROW(controller.record(2, indices_of({1})), std::invalid_argument) << "a dense layer between them";
}

TEST(UserReports, Item26_ALayerThatRecordsUnderAnothersIdIsNoticed) {  // NeMo-RL 3903
  ControllerConfig config = sign_config(4, 1, false, 3);
  TorchController controller(config);
  std::vector<std::string> all;
  for (int step = 0; step < 40; ++step) {
    for (const int layer : {0, 1, 1})
      controller.record(layer, indices_of({4, 3, 2, 1}));  // the last is the MTP layer
    for (const std::string& notice : notices_of(controller.step())) all.push_back(notice);
  }
  EXPECT_THAT(all, ::testing::Contains(
                       ::testing::AllOf(::testing::HasSubstr("config"), ::testing::HasSubstr("layer 2"))));
  EXPECT_THAT(all, ::testing::Contains(::testing::HasSubstr(
                       "layer 2 has recorded no token so far, and layer 1 twice as many as layer 0: does it "
                       "record under the id of layer 1?")));
}

TEST(UserReports, Item27_TokensMayHaveDifferentNumbersOfExperts) {  // Megatron 6208
  TorchController controller(sign_config(4, 3));
  controller.record(0, ::torch::tensor({0, -1, -1, 1, 2, 3}, ::torch::kLong).view({2, 3}));
  const StepReport& report = controller.step();
  EXPECT_EQ(report.layers[0].stats->mean_choices(), 2);
  // N/S - Σ k_t²/S² with N = 4, S = 4, Σ k_t² = 10.
  EXPECT_NEAR(*report.layers[0].metrics->noise_floor_cv, std::sqrt(4.0 / 4 - 10.0 / 16), 1e-12);
}

TEST(UserReports, Item28_TheCoefficientOfHuggingFaceCountsKTimes) {  // transformers 43688
  ::torch::manual_seed(1);
  const std::int64_t n = 8, k = 3;
  const Tensor logits =
      ::torch::randn({64, n}, ::torch::kDouble) + ::torch::linspace(0, 1, n, ::torch::kDouble);
  TopKRouter router(TopKRouterOptions(4, n, k).gate(Gate::kSoftmax));
  // Its loss in our words: N Σ_j Σ_i f_ij P_i, where f_ij is the share of tokens whose j-th choice is expert i.
  const Tensor p = logits.softmax(-1);
  const Tensor chosen = ::torch::one_hot(largest(p, k), n).to(::torch::kDouble);  // [T, k, N]
  const double theirs = (chosen.mean(0) * p.mean(0)).sum().item<double>() * static_cast<double>(n);
  EXPECT_NEAR(theirs, static_cast<double>(k) * router->route(logits).balance_loss.item<double>(), 1e-12);
}

TEST(TorchController, ALayerWithFixedRoutesIsWatchedAndNotControlled) {
  TorchController controller(parse_config(R"(version: 1
model: {layers: 2, experts: 4, top_k: 1}
expert_bias: {policy: sign_bias, options: {step: 0.001}}
layers:
  - {ids: [0], expert_bias: {policy: fixed}}
  - {ids: [1]}
)"));
  for (int step = 0; step < 60; ++step) {
    for (const int layer : {0, 1}) controller.record(layer, indices_of({40, 30, 20, 10}));
    const StepReport& report = controller.step();
    EXPECT_EQ(report.layers[0].responsiveness.state, Response::kUnknown)
        << "nothing moves, so nothing is asked";
    EXPECT_NEAR(*report.layers[0].metrics->max_vio, 0.6, 1e-12);
  }
  EXPECT_THAT(bias(controller, 0), Each(0.0));
  EXPECT_LT(bias(controller, 1)[0], 0);
}

}  // namespace
}  // namespace moectl
