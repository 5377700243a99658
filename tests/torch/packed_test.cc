// Packed and split sequences, slots that are not routed, counts that come as a tensor, and activation checkpointing.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <string>
#include <vector>

#include "moectl/torch/controller.h"
#include "moectl/torch/evaluation.h"
#include "moectl/torch/router.h"
#include "torch/routing_sums.h"

namespace moectl {
namespace {

using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::torch::Tensor;

ControllerConfig config_of(int experts, int top_k) {
  ControllerConfig config;
  config.model.layers = 1;
  config.model.experts = experts;
  config.model.top_k = top_k;
  config.expert_bias.policy = "sign_bias";
  return config;
}

Tensor longs(const std::vector<std::int64_t>& values) {
  return ::torch::tensor(values, ::torch::kLong);
}

template <class Body>
std::string message_of(Body&& body) {
  try {
    body();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

// ---- C3: the sequence-wise loss of packed tokens. ----

TEST(FieldCases, C3_ThePackedBatchHasTheLossAndGradientOfTheUnpackedOne) {
  for (const Gate gate : {Gate::kSoftmax, Gate::kSigmoid}) {
    ::torch::manual_seed(3);
    constexpr std::int64_t kBatch = 5, kLength = 12, kHidden = 8, kExperts = 6;
    TopKRouter router(TopKRouterOptions(kHidden, kExperts, 2).gate(gate).sequence_loss_weight(0.5));
    router->to(::torch::kDouble);
    const Tensor unpacked = ::torch::randn({kBatch, kLength, kHidden}, ::torch::kDouble);
    // Lengths 12, 1, 7, 0 and 5: padding is at the end of each row.
    const std::vector<std::int64_t> lengths = {12, 1, 7, 0, 5};
    Tensor mask = ::torch::zeros({kBatch, kLength}, ::torch::kBool);
    std::vector<Tensor> rows;
    std::vector<std::int64_t> ids;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      const auto row = static_cast<std::int64_t>(s);
      mask[row].narrow(0, 0, lengths[s]).fill_(true);
      rows.push_back(unpacked[row].narrow(0, 0, lengths[s]));
      ids.resize(ids.size() + static_cast<std::size_t>(lengths[s]), 100 - row);
    }
    const Tensor packed = ::torch::cat(rows);
    const auto loss_and_gradient = [&](const Tensor& tokens, const RouterInputs& inputs) {
      router->zero_grad();
      const Tensor loss = router->forward(tokens, inputs).sequence_loss;
      loss.backward();
      return std::pair(loss.item<double>(), router->weight.grad().clone());
    };
    const auto [loss, gradient] = loss_and_gradient(unpacked, {.mask = mask});
    const auto [packed_loss, packed_gradient] = loss_and_gradient(packed, {.sequence_ids = longs(ids)});
    EXPECT_NEAR(packed_loss, loss, 1e-6);
    EXPECT_LT((packed_gradient - gradient).abs().max().item<double>(), 1e-6);
    EXPECT_GT(gradient.abs().max().item<double>(), 1e-4);
    // Padding within a packed batch, and ids in the shape of a batch.
    const Tensor some = ::torch::cat({packed, packed.narrow(0, 0, 3)}),
                 real = ::torch::ones({28}, ::torch::kBool);
    real.narrow(0, 25, 3).fill_(false);
    ids.resize(28, 7);
    const auto [masked_loss, masked_gradient] =
        loss_and_gradient(some, {.mask = real, .sequence_ids = longs(ids)});
    EXPECT_NEAR(masked_loss, loss, 1e-6);
    EXPECT_LT((masked_gradient - gradient).abs().max().item<double>(), 1e-6);
    const Tensor of_rows = ::torch::arange(kBatch).unsqueeze(1).expand({kBatch, kLength});
    EXPECT_NEAR(loss_and_gradient(unpacked, {.mask = mask, .sequence_ids = of_rows}).first, loss, 1e-6);
  }
}

TEST(FieldCases, C3_ASequenceLossWithoutSequencesIsAnErrorInTraining) {
  TopKRouter router(TopKRouterOptions(4, 3, 1).sequence_loss_weight(1e-4));
  const Tensor tokens = ::torch::randn({6, 4});
  EXPECT_THAT(message_of([&] { router->forward(tokens); }),
              HasSubstr("sequence_ids: missing: tokens [T, H]"));
  EXPECT_THAT(message_of([&] {
                router->forward(tokens, {.sequence_ids = longs({0, 0, 1})});
              }),
              HasSubstr("sequence_ids: must be"));
  {
    const ::torch::NoGradGuard no_grad;
    EXPECT_FALSE(router->forward(tokens).sequence_loss.defined());
  }
  router->eval();
  EXPECT_FALSE(router->forward(tokens).sequence_loss.defined());
}

TEST(FieldCases, C3_ThePackedBatchHasTheFloorOfTheUnpackedOne) {
  ControllerConfig config = config_of(6, 2);
  config.collect.sequences = true;
  TorchController packed(config), unpacked(config);
  TopKRouter router(TopKRouterOptions(8, 6, 2));
  const Tensor tokens = ::torch::randn({4, 16, 8});
  const auto rows = router->forward(tokens);
  unpacked.record(0, rows.indices, rows.record_options());
  const auto flat =
      router->forward(tokens.reshape({64, 8}), {.sequence_ids = ::torch::arange(4).repeat_interleave(16)});
  packed.record(0, flat.indices, flat.record_options());
  const auto expected = unpacked.step().layers[0].metrics->sampling_floor_cv;
  ASSERT_TRUE(expected);
  EXPECT_EQ(packed.step().layers[0].metrics->sampling_floor_cv, expected);
}

TEST(FieldCases, C4_TheMeterJoinsPiecesWithinABatch) {
  ControllerConfig config = config_of(6, 2);
  config.model.split_sequences = 2;
  const Controller controller(config);
  EvaluationMeter meter(controller), whole(controller);
  for (int batch = 0; batch < 3; ++batch) {
    const Tensor halves = std::get<1>(::torch::rand({2, 2, 8, 6}).topk(2, 3));  // [half, sequence, ...]
    meter.record(0, halves.reshape({32, 2}),
                 {.sequence_ids = ::torch::arange(2).repeat_interleave(8).repeat({2})});
    whole.record(0, halves.transpose(0, 1).reshape({2, 16, 2}).contiguous());
  }
  const auto expected = whole.report(0).layers[0].metrics->sampling_floor_cv;
  ASSERT_TRUE(expected);
  EXPECT_EQ(meter.report(0).layers[0].metrics->sampling_floor_cv, expected);
  EXPECT_EQ(meter.report(0).layers[0].stats->scalar(RoutingStats::kSequences), 6);
}

// ---- C2 and C4: counted by operators as on the host. ----

TEST(FieldCases, C2_OperatorsCountEmptySlotsAndPiecesAsTheHostDoes) {
  ::torch::manual_seed(5);
  for (const int split : {0, 3}) {
    const StatsShape shape{.experts = 5,
                           .top_k = 3,
                           .needs = {.gap = true,
                                     .sequences = true,
                                     .margins = true,
                                     .pairs = true,
                                     .domains = 2,
                                     .split_sequences = split}};
    for (int run = 0; run < 20; ++run) {
      const std::int64_t tokens = 40;
      Tensor indices = std::get<1>(::torch::rand({tokens, 5}).topk(3, 1));
      indices.masked_fill_(::torch::rand({tokens, 3}).lt(0.4), -1);
      Tensor ids = ::torch::randint(split > 0 ? -2 : 0, 5, {tokens}, ::torch::kLong);
      if (split == 0) ids = std::get<0>(ids.sort());
      RecordOptions options{
          .top_values = std::get<0>(::torch::randn({tokens, 4}).sort(1, /*descending=*/true)),
          .biased_scores = ::torch::randn({tokens, 5}),
          .mask = ::torch::rand({tokens}).gt(0.1),
          .sequence_ids = ids,
          .domain_ids = ::torch::randint(0, 2, {tokens}, ::torch::kLong)};
      if (run == 0) indices.fill_(-1);
      if (run % 4 == 3) indices = ::torch::randint(0, 5, {tokens, 3}, ::torch::kLong);  // an expert twice
      const Tensor mask = options.mask.to(::torch::kUInt8), top = options.top_values.contiguous();
      const auto span_of = [](const Tensor& tensor, auto type) {
        using T = decltype(type);
        return std::span<const T>(tensor.data_ptr<T>(), static_cast<std::size_t>(tensor.numel()));
      };
      RoutingStats host(shape);
      host.set_gap_width(0.5);
      ASSERT_TRUE(host.add({.experts = span_of(indices, std::int64_t{}),
                            .mask = span_of(mask, std::uint8_t{}),
                            .sequence_ids = span_of(ids, std::int64_t{}),
                            .top_values = span_of(top, 0.0F),
                            .biased_scores = span_of(options.biased_scores, 0.0F),
                            .domain_ids = span_of(options.domain_ids, std::int64_t{})}));
      const Tensor sums = routing_sums(shape, indices, options, 0.5, ::torch::kCPU);
      EXPECT_THAT(host.flat(), ElementsAreArray(span_of(sums, std::int64_t{}))) << split << ", run " << run;
    }
  }
}

// ---- C5: activation checkpointing without reentrance runs the forward pass twice with gradients. ----

TEST(FieldCases, C5_NonReentrantCheckpointingCountsOnceByMicroBatchOrIsSaid) {
  for (const bool numbered : {true, false}) {
    TorchController controller(config_of(8, 2));
    TopKRouter router(TopKRouterOptions(8, 8, 2));
    std::vector<std::string> notices;
    for (int step = 0; step < 5; ++step) {
      const Tensor tokens = ::torch::randn({64, 8});
      for (int pass = 0; pass < 2;
           ++pass) {  // the forward pass, and the repeated one within the backward pass
        const auto out = router->forward(tokens);
        RecordOptions options = out.record_options();
        if (numbered) options.micro_batch = 0;
        controller.record(0, out.indices, options);
      }
      const StepReport& report = controller.step();
      EXPECT_EQ(report.layers[0].stats->tokens(), numbered ? 64 : 128);
      for (const Notice& notice : report.notices) notices.emplace_back(notice.text);
    }
    if (numbered) {
      EXPECT_THAT(notices, ::testing::IsEmpty());
    } else {
      EXPECT_THAT(notices, ::testing::ElementsAre(HasSubstr("is given the micro_batch")));
    }
  }
}

// ---- C7: counts as a tensor. ----

TEST(FieldCases, C7_CountsInHalfPrecisionAreRefusedWithTheReason) {
  TorchController controller(config_of(2, 2));
  const Tensor counts = ::torch::tensor({40840.0, 25000.0});
  for (const auto type : {::torch::kBFloat16, ::torch::kHalf}) {
    EXPECT_THAT(message_of([&] { controller.record_counts(0, counts.to(type)); }),
                HasSubstr("half precision rounds counts (40840 becomes 40960 in bfloat16)"));
  }
  EXPECT_THAT(message_of([&] {
                controller.record_counts(0, ::torch::tensor({16777216.0, 3.0}, ::torch::kFloat));
              }),
              HasSubstr("float32 does not hold every count from 2^24 on"));
  EXPECT_THAT(message_of([&] {
                controller.record_counts(0, ::torch::tensor({0.5, 0.5}));
              }),
              HasSubstr("must hold whole numbers"));
  EXPECT_THAT(message_of([&] { controller.record_counts(0, longs({1, 2, 3})); }), HasSubstr("must be [N]"));
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 0);

  controller.record_counts(0, counts);
  controller.record_counts(0, longs({16777217, 16777217}));
  controller.record_counts(0, ::torch::tensor({16777217.0, 1.0}, ::torch::kDouble), 16777217);
  controller.record_counts(0, ::torch::tensor({5, 5}, ::torch::kInt), 5, 3);
  controller.record_counts(0, ::torch::tensor({5, 5}, ::torch::kInt), 5, 3);  // the same micro-batch
  const RoutingStats& stats = *controller.step().layers[0].stats;
  EXPECT_THAT(stats.counts(), ::testing::ElementsAre(40840 + 2 * 16777217 + 5, 25000 + 16777217 + 1 + 5));
  EXPECT_EQ(stats.tokens(), 32920 + 16777217 * 2 + 5);
}

}  // namespace
}  // namespace moectl
