// TorchController: what it counts, when it counts, what it reads without copying, and where its tensors live.
#include "moectl/torch/controller.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>
#include <vector>

#include "moectl/torch/evaluation.h"
#include "torch/operator_calls.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::torch::Tensor;

ControllerConfig small_config(int layers = 1, int experts = 4, int top_k = 2) {
  ControllerConfig config;
  config.model.layers = layers;
  config.model.experts = experts;
  config.model.top_k = top_k;
  return config;
}

ControllerConfig sign_config(double rate = 0.01) {
  ControllerConfig config = small_config();
  config.expert_bias.policy = "sign_bias";
  config.expert_bias.limits.rate = rate;
  return config;
}

std::vector<std::int64_t> counts(const LayerReport& layer) {
  const auto counts = layer.stats->counts();
  return {counts.begin(), counts.end()};
}

Tensor indices(std::vector<std::int64_t> values) {
  return ::torch::tensor(values).view({-1, 2});
}

TEST(TorchController, CountsWhatTheRouterChose) {
  TorchController controller(small_config(2));
  controller.record(0, indices({0, 1, 0, 2, 3, 0}));
  controller.record(0, indices({1, 2}));
  controller.record(1, indices({2, 3}));
  const StepReport& report = controller.step();
  EXPECT_THAT(counts(report.layers[0]), ElementsAre(3, 2, 2, 1));
  EXPECT_EQ(report.layers[0].stats->tokens(), 4);
  EXPECT_THAT(counts(report.layers[1]), ElementsAre(0, 0, 1, 1));
  EXPECT_DOUBLE_EQ(*report.layers[0].metrics->max_vio, 0.5);
}

TEST(TorchController, AStepStartsFromZero) {
  TorchController controller(small_config());
  controller.record(0, indices({0, 1}));
  controller.step();
  EXPECT_THAT(counts(controller.step().layers[0]), ElementsAre(0, 0, 0, 0));
}

TEST(TorchController, DoesNotRecordUnderNoGradOrGuard) {
  TorchController controller(small_config());
  {
    const ::torch::NoGradGuard no_grad;
    EXPECT_FALSE(TorchController::recording());
    controller.record(0, indices({0, 1}));
  }
  {
    const RecordingGuard guard;
    {
      const RecordingGuard inner;
      EXPECT_FALSE(TorchController::recording());
    }
    EXPECT_FALSE(TorchController::recording());
    controller.record(0, indices({0, 1}));
  }
  EXPECT_TRUE(TorchController::recording());
  controller.record(0, indices({2, 3}));
  EXPECT_THAT(counts(controller.step().layers[0]), ElementsAre(0, 0, 1, 1));
}

TEST(TorchController, DoesNotCountPadding) {
  TorchController controller(small_config());
  const Tensor chosen = indices({0, 1, 2, 3, 0, 1, 2, 3}).view({2, 2, 2});
  controller.record(0, chosen, {.mask = ::torch::tensor({true, false, true, true}).view({2, 2})});
  EXPECT_THAT(counts(controller.step().layers[0]), ElementsAre(2, 2, 1, 1));
  // Any integer type of mask means the same: not zero is real.
  controller.record(0, chosen, {.mask = ::torch::tensor({256, 0, 1, 1}, ::torch::kInt64)});
  EXPECT_THAT(counts(controller.step().layers[0]), ElementsAre(2, 2, 1, 1));
}

TEST(TorchController, RecomputationDoesNotCountTwice) {
  TorchController controller(small_config());
  for (int pass = 0; pass < 2; ++pass) {
    controller.record(0, indices({0, 1}), {.micro_batch = 0});
    controller.record(0, indices({2, 3}), {.micro_batch = 1});
  }
  EXPECT_THAT(counts(controller.step().layers[0]), ElementsAre(1, 1, 1, 1));
  controller.record(0, indices({0, 1}), {.micro_batch = 0});
  EXPECT_THAT(counts(controller.step().layers[0]), ElementsAre(1, 1, 0, 0));
}

TEST(TorchController, OffRecordsNothing) {
  ControllerConfig config = small_config();
  config.mode = Mode::kOff;
  TorchController controller(config);
  controller.record(0, indices({0, 1}));
  EXPECT_TRUE(controller.step().layers.empty());
  EXPECT_EQ(controller.bias(0).abs().sum().item<float>(), 0);
}

TEST(TorchController, TakesTheGapTheSequencesTheDomainsAndTheDrops) {
  ControllerConfig config = small_config();
  config.collect = {.gap = true, .sequences = true, .probabilities = true, .domains = 2};
  config.model.domains = {"prose", "code"};
  TorchController controller(config);
  const Tensor chosen = indices({0, 1, 0, 1, 2, 3, 2, 3}).view({2, 2, 2});
  controller.record(
      0, chosen,
      {.top_values =
           ::torch::tensor({3.0, 2.0, 1.5, 3.0, 2.0, 1.0, 3.0, 2.0, 1.0, 3.0, 2.0, 2.0}).view({4, 3}),
       .probabilities = ::torch::full({4, 4}, 0.25),
       .domain_ids = ::torch::tensor({0, 0, 1, 1}),
       .dropped = ::torch::tensor(3),
       .balance_loss = ::torch::tensor(1.25),
       .z_loss = ::torch::tensor(9.5)});
  const RoutingStats& stats = *controller.step().layers[0].stats;
  EXPECT_DOUBLE_EQ(*stats.mean_gap(), (0.5 + 1 + 1 + 0) / 4);
  EXPECT_EQ(stats.scalar(RoutingStats::kSequences), 2);
  EXPECT_THAT(stats.array(RoutingStats::kSequenceSq), ElementsAre(4, 4, 4, 4));
  EXPECT_THAT(stats.domain_counts(1), ElementsAre(0, 0, 2, 2));
  EXPECT_EQ(stats.dropped(), 3.0);
  EXPECT_EQ(stats.balance_loss(), 1.25);
  EXPECT_EQ(stats.z_loss(), 9.5);
  EXPECT_TRUE(stats.has_probabilities());
}

TEST(TorchController, SequencesByIdEqualSequencesByShape) {
  ControllerConfig config = small_config();
  config.collect.sequences = true;
  TorchController by_shape(config), by_id(config);
  const Tensor chosen = ::torch::randint(0, 4, {3, 5, 2}, ::torch::kInt64);
  by_shape.record(0, chosen);
  by_id.record(0, chosen.view({15, 2}), {.sequence_ids = ::torch::arange(3).repeat_interleave(5)});
  const auto a = by_shape.step().layers[0].stats->flat(), b = by_id.step().layers[0].stats->flat();
  EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end()));
}

TEST(TorchController, ReadsContiguousCpuTensorsInPlace) {
  ControllerConfig config = small_config();
  config.collect = {.gap = true, .sequences = true, .probabilities = true};
  TorchController controller(config);
  const Tensor chosen = indices({0, 1, 2, 3}).view({1, 2, 2});
  const RecordOptions options{
      .top_values = ::torch::tensor({3.0F, 2.0F, 1.0F, 3.0F, 2.0F, 1.0F}).view({1, 2, 3}),
      .probabilities = ::torch::full({1, 2, 4}, 0.25F),
      .mask = ::torch::tensor({true, true})};
  const OperatorCalls calls;
  controller.record(0, chosen, options);
  EXPECT_THAT(calls.names(), ElementsAre())
      << "no operator may run: nothing is converted, copied or allocated";
}

TEST(TorchController, ConvertsWhatLiesOtherwise) {
  ControllerConfig config = small_config();
  config.collect.gap = true;
  TorchController in_place(config), converted(config);
  const Tensor chosen = ::torch::randint(0, 4, {6, 2}, ::torch::kInt64);
  const Tensor values = ::torch::tensor({3.0F, 2.0F, 1.0F}).expand({6, 3});
  in_place.record(0, chosen, {.top_values = values.contiguous()});
  converted.record(0, chosen.to(::torch::kInt32).t().contiguous().t(),
                   {.top_values = values.to(::torch::kFloat64)});
  const auto a = in_place.step().layers[0].stats->flat(), b = converted.step().layers[0].stats->flat();
  EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end()));
}

TEST(TorchController, IgnoresInputsThatAreNotCollected) {
  TorchController controller(small_config());
  const Tensor chosen = indices({0, 1}).view({1, 1, 2});
  const RecordOptions options{.probabilities = ::torch::full({1, 4}, 0.25, ::torch::kFloat64)};
  const OperatorCalls calls;
  controller.record(0, chosen, options);
  EXPECT_THAT(calls.names(), ElementsAre()) << "probabilities are not collected, so they are not converted";
}

TEST(TorchController, TensorsStayAtOneAddress) {
  TorchController controller(sign_config());
  const void* bias = controller.bias(0).data_ptr();
  const void* weight = controller.aux_loss_weight(0).data_ptr();
  const void* temperature = controller.temperature(0).data_ptr();
  const Tensor held = controller.bias(0);
  EXPECT_EQ(held.scalar_type(), ::torch::kFloat32);
  EXPECT_THAT(held.sizes(), ElementsAre(4));
  EXPECT_EQ(controller.aux_loss_weight(0).dim(), 0);
  EXPECT_EQ(controller.temperature(0).item<float>(), 1.0F);

  const std::string start = controller.save();
  controller.record(0, indices({0, 1, 0, 1}));
  controller.step();
  EXPECT_EQ(controller.bias(0).data_ptr(), bias);
  EXPECT_EQ(controller.aux_loss_weight(0).data_ptr(), weight);
  EXPECT_EQ(controller.temperature(0).data_ptr(), temperature);
  // Overloaded experts go down, starved ones up, and a reference taken before sees it.
  EXPECT_LT(held[0].item<float>(), 0);
  EXPECT_GT(held[2].item<float>(), 0);
  controller.load(start);
  EXPECT_EQ(controller.bias(0).data_ptr(), bias);
  EXPECT_EQ(held.abs().sum().item<float>(), 0);
}

TEST(TorchController, AGraphKeptOverAStepCannotUseTheNewValuesUnnoticed) {
  TorchController controller(sign_config());
  const Tensor x = ::torch::ones({4}, ::torch::requires_grad());
  const Tensor y = (x * controller.bias(0)).sum();
  controller.record(0, indices({0, 1}));
  controller.step();
  EXPECT_THROW(y.backward(), c10::Error);
}

TEST(TorchController, SavesIntoAnArchiveAndComesBackExactly) {
  TorchController controller(sign_config());
  const auto advance = [](TorchController& it, int seed) {
    ::torch::manual_seed(static_cast<std::uint64_t>(seed));
    it.record(0, ::torch::randint(0, 4, {64, 2}, ::torch::kInt64));
    it.step({.loss = 1.0});
  };
  for (int i = 0; i < 7; ++i) advance(controller, i);

  ::torch::serialize::OutputArchive out;
  controller.save(out);
  std::stringstream bytes;
  out.save_to(bytes);
  TorchController other(sign_config());
  ::torch::serialize::InputArchive in;
  in.load_from(bytes);
  other.load(in);
  EXPECT_TRUE(other.bias(0).equal(controller.bias(0)));
  for (int i = 7; i < 12; ++i) {
    advance(controller, i);
    advance(other, i);
  }
  EXPECT_TRUE(other.bias(0).equal(controller.bias(0)));
  EXPECT_EQ(other.save(), controller.save());
}

TEST(TorchController, RefusesAnArchiveWithoutItsState) {
  TorchController controller(sign_config());
  controller.record(0, indices({0, 1}));
  controller.step();
  const std::string before = controller.save();
  ::torch::serialize::OutputArchive out;
  out.write("model", ::torch::zeros({3}));
  out.write("moectl", ::torch::zeros({3}));
  std::stringstream bytes;
  out.save_to(bytes);
  ::torch::serialize::InputArchive in;
  in.load_from(bytes);
  EXPECT_THROW(controller.load(in, "control"), StateError);
  EXPECT_THROW(controller.load(in), StateError) << "floats are not a state";
  EXPECT_EQ(controller.save(), before);
}

TEST(TorchController, MisuseSaysWhatIsWrong) {
  TorchController controller(small_config());
  const auto message = [&](auto call) -> std::string {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message([&] {
                controller.record(0, ::torch::zeros({5, 3}, ::torch::kInt64));
              }),
              HasSubstr("indices"));
  EXPECT_THAT(message([&] { controller.record(0, ::torch::zeros({5, 2})); }), HasSubstr("integer"));
  EXPECT_THAT(message([&] { controller.record(0, Tensor()); }), HasSubstr("indices"));
  EXPECT_THAT(message([&] { controller.record(1, indices({0, 1})); }), HasSubstr("layer"));
  EXPECT_THAT(message([&] {
                controller.record(0, indices({0, 1}), {.mask = ::torch::ones({2})});
              }),
              HasSubstr("mask"));
  EXPECT_THAT(message([&] {
                controller.record(0, indices({0, 1}), {.top_values = ::torch::ones({1, 2})});
              }),
              HasSubstr("top_values"));
  EXPECT_THAT(message([&] { controller.bias(1); }), HasSubstr("layer"));
  EXPECT_THAT(message([&] { controller.bias(-1); }), HasSubstr("-1"));
  // None of it counted.
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 0);
}

TEST(EvaluationMeter, CountsAPassThatTheControllerMustNotSee) {
  TorchController controller(small_config(2));
  EvaluationMeter meter(controller.controller());
  {
    const ::torch::NoGradGuard no_grad;
    meter.record(0, indices({0, 1, 0, 2}));
    meter.record(1, indices({3, 2}));
    meter.record(0, indices({0, 3}));
  }
  const StepReport& report = meter.report(7, {.loss = 2.5});
  EXPECT_EQ(report.step, 7);
  EXPECT_EQ(report.info.loss, 2.5);
  EXPECT_THAT(counts(report.layers[0]), ElementsAre(3, 1, 1, 1));
  EXPECT_DOUBLE_EQ(*report.layers[0].metrics->max_vio, 1.0);
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 0);
  meter.clear();
  EXPECT_EQ(meter.report(8).layers[0].stats->tokens(), 0);
  EXPECT_THROW(meter.record(2, indices({0, 1})), std::invalid_argument);
}

}  // namespace
}  // namespace moectl
