// The path that accelerators take, run on CPU tensors: the same sums as reading the memory, and nothing in it
// that waits for the device.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <utility>
#include <vector>

#include "device/device.h"
#include "moectl/torch/controller.h"
#include "moectl/torch/process_group.h"
#include "torch/fake_streams.h"
#include "torch/operator_calls.h"

namespace moectl {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::torch::Tensor;

const TorchOptions kByOperators{.count_by_operators = true};

TEST(DevicePath, CountsTheSameBitsAsReadingTheMemory) {
  for (int seed = 0; seed < 300; ++seed) {
    TorchController host(device_config(0, true)), device(device_config(0, true), kByOperators);
    for (int part = 0; part < 3; ++part) {
      const Batch batch = batch_of(3 * seed + part);
      for (TorchController* it : {&host, &device}) it->record(0, batch.indices, batch.options);
    }
    ASSERT_EQ(flat(device.step().layers[0]), flat(host.step().layers[0])) << "seed " << seed;
    ASSERT_TRUE(host.report().layers[0].stats->valid());
    ASSERT_TRUE(device.bias(0).equal(host.bias(0)));
  }
}

TEST(DevicePath, CountsIndicesAndMasksOfAnyIntegerTypeAndScoresOfAnyFloatType) {
  const Batch batch = batch_of(1);
  const std::pair<::torch::ScalarType, ::torch::ScalarType> types[] = {{::torch::kFloat16, ::torch::kBool},
                                                                       {::torch::kBFloat16, ::torch::kInt16},
                                                                       {::torch::kFloat64, ::torch::kLong}};
  for (const auto& [type, mask_type] : types) {
    TorchController host(device_config(0, true)), device(device_config(0, true), kByOperators);
    RecordOptions options = batch.options;
    options.top_values = batch.options.top_values.to(type);
    options.probabilities = batch.options.probabilities.to(type);
    options.domain_ids = batch.options.domain_ids.to(::torch::kInt32);
    options.mask = ::torch::arange(batch.indices.numel() / kTopK).to(mask_type);
    for (TorchController* it : {&host, &device}) it->record(0, batch.indices.to(::torch::kInt16), options);
    EXPECT_EQ(flat(device.step().layers[0]), flat(host.step().layers[0]));
    EXPECT_TRUE(host.report().layers[0].stats->valid());
  }
}

TEST(DevicePath, MalformedRecordsAreCountedAndAddNothing) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<const char*, std::function<void(Batch&)>>> faults = {
      {"index too large", [](Batch& b) { b.indices.view({-1})[1] = kExperts; }},
      {"negative index", [](Batch& b) { b.indices.view({-1})[0] = -2; }},
      {"huge index", [](Batch& b) { b.indices.view({-1})[0] = std::int64_t{1} << 62; }},
      {"NaN gap", [&](Batch& b) { b.options.top_values.view({-1})[kTopK] = nan; }},
      {"negative gap", [](Batch& b) { b.options.top_values.view({-1})[kTopK] += 50; }},
      {"infinite gap", [&](Batch& b) { b.options.top_values.view({-1})[kTopK] = -inf; }},
      {"NaN score", [&](Batch& b) { b.options.biased_scores.view({-1})[0] = nan; }},
      {"infinite score", [&](Batch& b) { b.options.biased_scores.view({-1})[0] = inf; }},
      {"negative probability", [](Batch& b) { b.options.probabilities.view({-1})[0] = -0.25; }},
      {"NaN probability", [&](Batch& b) { b.options.probabilities.view({-1})[0] = nan; }},
      {"infinite probability", [&](Batch& b) { b.options.probabilities.view({-1})[0] = inf; }},
      {"no probability at all",
       [](Batch& b) {
         b.options.probabilities.view({-1, kExperts})[0].zero_();
       }},
      {"unknown domain", [](Batch& b) { b.options.domain_ids.view({-1})[0] = 3; }},
      {"negative domain", [](Batch& b) { b.options.domain_ids.view({-1})[0] = -1; }},
      {"negative drops", [](Batch& b) { b.options.dropped = ::torch::tensor(std::int64_t{-1}); }},
      {"decreasing sequences",
       [](Batch& b) {
         b.indices = b.indices.view({-1, kTopK});
         b.options.sequence_ids = ::torch::arange(b.indices.size(0), 0, -1);
       }},
  };
  for (const auto& [name, spoil] : faults) {
    Batch bad;
    for (int seed = 0;; ++seed) {  // one with more than one token and with everything given
      bad = batch_of(seed);
      const RecordOptions& o = bad.options;
      if (bad.indices.dim() == 3 && bad.indices.numel() > 2 * kTopK && !o.mask.defined() &&
          o.biased_scores.defined() && o.probabilities.defined() && o.domain_ids.defined() &&
          o.dropped.defined()) {
        break;
      }
    }
    bad.options.top_values = bad.options.top_values.clone();
    spoil(bad);
    TorchController host(device_config(0, true)), device(device_config(0, true), kByOperators);
    const Batch good = batch_of(5);
    for (TorchController* it : {&host, &device}) {
      it->record(0, good.indices, good.options);
      it->record(0, bad.indices, bad.options);
    }
    EXPECT_EQ(flat(device.step().layers[0]), flat(host.step().layers[0])) << name;
    EXPECT_EQ(device.report().layers[0].stats->invalid_records(), 1) << name;
    EXPECT_TRUE(device.report().layers[0].actuators[0].reasons.has(Reason::kInvalid)) << name;
  }
}

TEST(DevicePath, PaddingValuesAreNeverRead) {
  Batch batch = batch_of(2);
  batch.indices = batch.indices.view({-1, kTopK}).clone();
  batch.options = RecordOptions{.top_values = ::torch::randn({batch.indices.size(0), kTopK + 1}),
                                .probabilities = ::torch::rand({batch.indices.size(0), kExperts})};
  batch.options.top_values = std::get<0>(batch.options.top_values.sort(1, /*descending=*/true)).contiguous();
  batch.options.mask = ::torch::ones({batch.indices.size(0)}, ::torch::kBool);
  batch.options.mask[0] = false;
  batch.indices[0].fill_(-7);
  batch.options.top_values[0].fill_(std::numeric_limits<float>::quiet_NaN());
  batch.options.probabilities[0].fill_(-1);
  TorchController host(device_config(0, true)), device(device_config(0, true), kByOperators);
  for (TorchController* it : {&host, &device}) it->record(0, batch.indices, batch.options);
  EXPECT_EQ(flat(device.step().layers[0]), flat(host.step().layers[0]));
  EXPECT_TRUE(device.report().layers[0].stats->valid());
  EXPECT_EQ(device.report().layers[0].stats->tokens(), batch.indices.size(0) - 1);
}

TEST(DevicePath, MisuseThrowsAsOnTheHost) {
  TorchController device(device_config(0, true), kByOperators);
  EXPECT_THROW(device.record(0, ::torch::zeros({5, 3}, ::torch::kLong)), std::invalid_argument);
  EXPECT_THROW(device.record(0, ::torch::zeros({5, kTopK})), std::invalid_argument);
  EXPECT_THROW(device.record(0, Tensor()), std::invalid_argument);
  EXPECT_THROW(device.record(kLayers, ::torch::zeros({5, kTopK}, ::torch::kLong)), std::invalid_argument);
  device.record(0, ::torch::zeros({0, kTopK}, ::torch::kLong));
  EXPECT_EQ(device.step().layers[0].stats->tokens(), 0);
}

TEST(DevicePath, AWholeRunEndsInTheSameState) {
  for (const int lag : {0, 1}) {
    const std::string host = state_after(40, lag, {}, -1, {}, true);
    EXPECT_TRUE(state_after(40, lag, kByOperators, -1, {}, true) == host) << "lag " << lag;
    EXPECT_TRUE(state_after(40, lag, {}, 17, {}, true) == host) << "lag " << lag;
    EXPECT_TRUE(state_after(40, lag, kByOperators, 17, {}, true) == host) << "lag " << lag;
    const FakeStreams streams;
    EXPECT_TRUE(state_after(40, lag, kByOperators, 17, {}, true) == host)
        << "lag " << lag << ", with streams";
  }
}

TEST(DevicePath, OverRanksWithLagTheSumsAreTheSame) {
  constexpr int kSteps = 20, kRanks = 2;
  std::vector<Batch> stream;  // made once: the generator belongs to all threads
  for (int i = 0; i < kSteps * kRanks; ++i) stream.push_back(batch_of(i));
  // The sums that each step decides on, and the bias it leaves in force.
  const auto run = [&](TorchController& controller, int from, int to) {
    std::vector<std::int64_t> sums;
    std::vector<float> biases;
    for (int step = 0; step < kSteps; ++step) {
      for (int part = from; part < to; ++part) {
        const Batch& batch = stream[static_cast<std::size_t>(step * kRanks + part)];
        controller.record(1, batch.indices, batch.options);
      }
      const std::vector<std::int64_t> own = flat(controller.step({.loss = 1.0}).layers[1]);
      sums.insert(sums.end(), own.begin(), own.end());
      const float* const bias = controller.bias(1).data_ptr<float>();
      biases.insert(biases.end(), bias, bias + kExperts);
    }
    return std::make_pair(sums, biases);
  };
  TorchController alone(device_config(1, true));
  const auto expected = run(alone, 0, kRanks);
  EXPECT_GT(*std::max_element(expected.second.begin(), expected.second.end()), 0.0F);
  for (const bool replicated : {false, true}) {
    const auto store = c10::make_intrusive<c10d::HashStore>();
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < kRanks; ++rank) {
      ranks.emplace_back([&, rank] {
        auto gloo = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
        gloo->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface("lo"));
        gloo->threads = 1;
        TorchController controller(device_config(1, true), kByOperators);
        controller.controller().set_reduction(
            reduce_over(c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, kRanks, gloo),
                        {.scope = replicated ? ReductionScope::kReplicated : ReductionScope::kPartial}));
        EXPECT_TRUE((replicated ? run(controller, 0, kRanks) : run(controller, rank, rank + 1)) == expected)
            << "rank " << rank << (replicated ? " replicated" : "");
      });
    }
    for (std::thread& rank : ranks) rank.join();
  }
}

TEST(DevicePath, SumsOfAFailedReductionAreSentAgainInFull) {
  TorchController controller(device_config(1, true), kByOperators), undisturbed(device_config(1, true));
  bool lose = false;
  controller.controller().set_reduction([&](std::span<std::int64_t>) {
    if (lose) throw std::runtime_error("link down");
  });
  for (int step = 0; step < 8; ++step) {
    const Batch batch = batch_of(step);
    for (TorchController* it : {&controller, &undisturbed}) it->record(0, batch.indices, batch.options);
    lose = step % 3 == 2;
    if (lose) {
      const Tensor before = controller.bias(0).clone();
      EXPECT_THROW(controller.step(), ReductionError);
      EXPECT_THROW(controller.step(), ReductionError);
      EXPECT_TRUE(controller.bias(0).equal(before));
      lose = false;
    }
    controller.step();
    undisturbed.step();
    EXPECT_EQ(flat(controller.report().layers[0]), flat(undisturbed.report().layers[0])) << step;
  }
  EXPECT_TRUE(controller.bias(0).equal(undisturbed.bias(0)));
}

// ---- Nothing waits. ----

/// Operators that bring a value or a size that depends on values to the host, and so wait for the device.
const std::set<std::string>& synchronising() {
  static const std::set<std::string> names = {"aten::item",
                                              "aten::_local_scalar_dense",
                                              "aten::is_nonzero",
                                              "aten::nonzero",
                                              "aten::nonzero_numpy",
                                              "aten::masked_select",
                                              "aten::unique",
                                              "aten::_unique",
                                              "aten::_unique2",
                                              "aten::unique_consecutive",
                                              "aten::unique_dim",
                                              "aten::bincount",
                                              "aten::equal",
                                              "aten::allclose",
                                              "aten::repeat_interleave",
                                              "aten::cpu",
                                              "aten::histc",
                                              "aten::index"};
  return names;
}

std::vector<std::string> calls_that_wait(const OperatorCalls& calls) {
  std::vector<std::string> found;
  for (const OperatorCall& call : calls.all()) {
    if (synchronising().count(call.name) != 0) found.push_back(call.name);
    // What our own code copies moves between host and device; clones and conversions stay where they are.
    if (call.depth == 0 && call.blocking_move) found.push_back("blocking copy");
  }
  return found;
}

TEST(DevicePath, TheProofDetectsAWait) {
  const Tensor x = ::torch::arange(4), y = ::torch::zeros({4}, ::torch::kLong);
  const auto found = [&](auto body) {
    const OperatorCalls calls;
    body();
    return calls_that_wait(calls);
  };
  EXPECT_THAT(found([&] { (void)x.sum().item<std::int64_t>(); }), ::testing::Contains("aten::item"));
  EXPECT_THAT(found([&] { (void)x.nonzero(); }), ::testing::Contains("aten::nonzero"));
  EXPECT_THAT(found([&] { y.copy_(x); }), ElementsAre("blocking copy"));
  EXPECT_THAT(found([&] { y.copy_(x, /*non_blocking=*/true); }), ElementsAre());
  EXPECT_THAT(found([&] { (void)x.view({2, 2}).t().contiguous(); }), ElementsAre());
}

TEST(DevicePath, RecordAndStepCallNothingThatSynchronises) {
  FakeStreams streams;
  std::vector<Batch> batches;
  for (int seed = 0; seed < 40; ++seed) batches.push_back(batch_of(seed));
  TorchController controller(device_config(1, true), kByOperators);
  for (std::size_t i = 0; i < batches.size(); ++i) {
    const OperatorCalls calls;
    controller.record(0, batches[i].indices, batches[i].options);
    controller.step({.loss = 1.0});
    EXPECT_THAT(calls_that_wait(calls), ElementsAre()) << "batch " << i;
    EXPECT_GT(calls.all().size(), 10U) << "something did run";
  }
}

TEST(DevicePath, AStepDoesNotWaitForItsOwnReduction) {
  FakeStreams streams;
  streams.set_delay(3);
  TorchController controller(device_config(1, true), kByOperators);
  for (int step = 0; step < 6; ++step) {
    const Batch batch = batch_of(step);
    streams.take();
    controller.record(0, batch.indices, batch.options);
    EXPECT_TRUE(streams.take().empty()) << "recording touches no event";
    controller.step();
    std::set<int> recorded;
    int queries = 0;
    for (const FakeStreams::Entry& entry : streams.take()) {
      if (entry.what == FakeStreams::Entry::kRecord) recorded.insert(entry.event);
      if (entry.what != FakeStreams::Entry::kQuery) continue;
      ++queries;
      EXPECT_EQ(recorded.count(entry.event), 0U) << "step " << step << " waits for what it has just sent";
    }
    EXPECT_EQ(recorded.size(), 3U) << "what was recorded, the sums that leave, and the actuators";
    // The sums and the actuators of the step before, each asked until it has passed.
    EXPECT_EQ(queries, step == 0 ? 4 : 8);
  }
}

TEST(DevicePath, SumsLeaveOnASideStreamBehindAllThatWasRecorded) {
  FakeStreams streams;
  TorchController controller(device_config(1, true), kByOperators);
  controller.record(0, batch_of(0).indices);
  streams.take();
  controller.step();
  std::vector<FakeStreams::Entry> log;
  for (const FakeStreams::Entry& entry : streams.take()) {
    if (entry.what != FakeStreams::Entry::kQuery) log.push_back(entry);
  }
  ASSERT_EQ(log.size(), 4U);
  EXPECT_EQ(log[0].what, FakeStreams::Entry::kRecord);
  EXPECT_EQ(log[0].stream, 0) << "behind the model's own work";
  EXPECT_EQ(log[1].what, FakeStreams::Entry::kBlock);
  EXPECT_EQ(log[1].event, log[0].event);
  EXPECT_NE(log[1].stream, 0) << "the side stream waits, not the host and not the model";
  EXPECT_EQ(log[2].what, FakeStreams::Entry::kRecord);
  EXPECT_EQ(log[2].stream, log[1].stream) << "behind the copies";
  EXPECT_EQ(log[3].what, FakeStreams::Entry::kRecord);
  EXPECT_EQ(log[3].stream, 0) << "the actuators come in order with the model's work";
}

TEST(DevicePath, BiasesComeBackInPlaceInFullPrecision) {
  FakeStreams streams;
  TorchController device(device_config(1, true), kByOperators), host(device_config(1, true));
  const Tensor held = device.bias(0);
  const void* address = held.data_ptr();
  for (int step = 0; step < 10; ++step) {
    const Batch batch = batch_of(step);
    for (TorchController* it : {&device, &host}) {
      it->record(0, batch.indices, batch.options);
      it->step();
    }
    EXPECT_TRUE(held.equal(host.bias(0)));
  }
  EXPECT_EQ(device.bias(0).data_ptr(), address);
  EXPECT_EQ(held.scalar_type(), ::torch::kFloat32);
  EXPECT_GT(held.abs().max().item<float>(), 0);
  // And autograd knows that they changed.
  const Tensor x = ::torch::ones({kExperts}, ::torch::requires_grad());
  const Tensor y = (x * held).sum();
  device.step();
  EXPECT_THROW(y.backward(), c10::Error);
}

}  // namespace
}  // namespace moectl
