// The accelerator's path on a real GPU, with c10's device-generic interfaces alone. Where there is no GPU all of it runs on
// the CPU but for what a CPU cannot show: streams that run beside the host, pinned memory, memory that runs out.
#include "device/device.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "altered_state.h"
#include "autocast.h"
#include "moectl/torch/evaluation.h"
#include "moectl/torch/observations.h"
#include "moectl/torch/process_group.h"
#include "moectl/torch/router.h"
#include "torch/side_stream.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::torch::Tensor;

#define NEEDS_GPU(what) \
  if (!has_gpu()) GTEST_SKIP() << "no GPU here: a CPU has no " what

/// Behind all that the current stream was given so far.
class Point {
 public:
  Point() : event_(the_device().type()) {
    event_.record(c10::impl::VirtualGuardImpl(the_device().type()).getStream(the_device()));
  }
  bool passed() const { return event_.query(); }
  void wait() const {
    while (!passed()) {
    }
  }

 private:
  c10::Event event_;
};

/// Gives the current stream products for about half a second on the fastest card there is, more on others. Fewer than
/// the kernels that a stream takes before it makes the host wait.
void keep_busy() {
  static const Tensor a =
      ::torch::ones({8192, 8192}, ::torch::dtype(::torch::kBFloat16).device(the_device()));
  static Tensor b = ::torch::empty_like(a);
  for (int i = 0; i < 400; ++i) ::torch::mm_out(b, a, a);
}

TEST(OnDevice, SumsAreThoseOfTheHost) {
  // These alone come from the device's own roots, logarithms and sums of fractions: one unit a term.
  const RoutingStats layout(TorchController(device_config(0, true)).controller().shape(0));
  const std::int64_t* const first = layout.flat().data();
  std::vector<bool> rounded(layout.flat().size());
  rounded[RoutingStats::kTokenEntropySum] = true;
  for (const RoutingStats::Array which : {RoutingStats::kProbSum, RoutingStats::kSqrtProbSum}) {
    const auto array = layout.array(which);
    for (std::size_t i = 0; i < array.size(); ++i)
      rounded[static_cast<std::size_t>(array.data() - first) + i] = true;
  }
  int differ = 0;
  for (int seed = 0; seed < 300; ++seed) {
    TorchController host(device_config(0, true)), device(device_config(0, true), on_device());
    for (int part = 0; part < 3; ++part) {
      const Batch batch = hostile_batch_of(3 * seed + part), there = moved(batch, the_device());
      host.record(0, batch.indices, batch.options);
      device.record(0, there.indices, there.options);
    }
    const std::vector<std::int64_t> expected = flat(host.step().layers[0]),
                                    sums = flat(device.step().layers[0]);
    ASSERT_EQ(sums.size(), expected.size());
    for (std::size_t i = 0; i < sums.size(); ++i) {
      ASSERT_LE(std::abs(sums[i] - expected[i]), rounded[i] ? expected[RoutingStats::kProbTokens] : 0)
          << "seed " << seed << ", sum " << i;
      differ += sums[i] != expected[i];
    }
    ASSERT_TRUE(device.bias(0).cpu().equal(host.bias(0))) << "seed " << seed;
  }
  RecordProperty("sums_that_differ_by_rounding", differ);
  std::printf("  %d of %zu sums differ by rounding\n", differ, 300 * rounded.size());
}

TEST(OnDevice, AWholeRunWithSavingAndLoadingEndsInTheStateOfTheHost) {
  for (const int lag : {0, 1}) {
    const std::string host = state_after(40, lag, {}, -1);
    EXPECT_EQ(testing::first_difference(state_after(40, lag, on_device(), -1), host), "") << "lag " << lag;
    EXPECT_EQ(testing::first_difference(state_after(40, lag, on_device(), 17), host), "")
        << "lag " << lag << ", saved and loaded";
  }
}

TEST(OnDevice, AStateMovesBetweenHostAndDevice) {
  TorchController host(device_config()), device(device_config(), on_device());
  const auto step = [](TorchController& controller, int seed, ::torch::Device where) {
    const Batch batch = moved(batch_of(seed), where);
    controller.record(1, batch.indices, batch.options);
    controller.step();
  };
  for (int seed = 0; seed < 5; ++seed) step(host, seed, ::torch::kCPU);
  device.load(host.save());
  EXPECT_TRUE(device.bias(1).cpu().equal(host.bias(1)));
  for (int seed = 5; seed < 9; ++seed) {
    step(host, seed, ::torch::kCPU);
    step(device, seed, the_device());
  }
  EXPECT_EQ(testing::first_difference(device.save(), host.save()), "");
}

TEST(OnDevice, ARouterRoutesAndIsRecordedUnderAutocastAsWithoutIt) {
  ::torch::manual_seed(3);
  TopKRouter router(TopKRouterOptions(16, kExperts, kTopK).z_loss_weight(1e-3));
  router->to(the_device());
  const Tensor tokens = ::torch::randn({3, 8, 16}).to(the_device()).requires_grad_();
  TorchController device(device_config(), on_device()), host(device_config());
  const RouterOutput expected = router->forward(tokens, {.actuators = device.actuators(0)});
  RouterOutput routed;
  {
    const Autocast half(the_device().type());
    EXPECT_EQ(tokens.matmul(router->weight.t()).scalar_type(), ::torch::kBFloat16) << "autocast is on";
    routed = router->forward(tokens, {.actuators = device.actuators(0)});
    device.record(0, routed.indices, routed.record_options());
  }
  EXPECT_EQ(routed.logits.scalar_type(), ::torch::kFloat32);
  EXPECT_TRUE(routed.logits.equal(expected.logits)) << "autocast rounded the logits";
  EXPECT_TRUE(routed.indices.equal(expected.indices));
  (routed.aux_loss + routed.gates.square().sum()).backward();
  EXPECT_TRUE(tokens.grad().isfinite().all().item<bool>());
  EXPECT_EQ(routed.indices.device().type(), the_device().type());
  const Batch here = moved({expected.indices, expected.record_options()}, ::torch::kCPU);
  host.record(0, here.indices, here.options);
  EXPECT_EQ(flat(device.step().layers[0]), flat(host.step().layers[0]));
  EXPECT_TRUE(device.report().layers[0].stats->valid());
}

TEST(OnDevice, ObservationsAndAnEvaluationAreThoseOfTheHost) {
  ControllerConfig config = device_config();
  config.collect.gradients = config.collect.losses = true;
  TorchController host(config), device(config, on_device());
  Batch batch = batch_of(4);
  const Tensor losses = ::torch::rand({batch.indices.numel() / kTopK});
  const Tensor weights = ::torch::randn({kExperts, 4, 5});
  std::vector<std::vector<std::int64_t>> sums, evaluated;
  for (TorchController* it : {&host, &device}) {
    const ::torch::Device where = it == &host ? ::torch::Device(::torch::kCPU) : the_device();
    const Batch there = moved(batch, where);
    it->record(0, there.indices, there.options);
    Tensor parameter = weights.to(where).clone().requires_grad_();
    parameter.mutable_grad() = ::torch::ones_like(parameter) * 2;  // exact norms
    record_gradients(*it, 0, std::vector<Tensor>{parameter});
    record_losses(*it, 0, there.indices, losses.to(where));
    EvaluationMeter meter(it->controller());
    meter.record(0, there.indices, there.options);
    evaluated.push_back(flat(meter.report(0).layers[0]));
    sums.push_back(flat(it->step().layers[0]));
  }
  EXPECT_EQ(sums[1], sums[0]);
  EXPECT_EQ(evaluated[1], evaluated[0]);
}

// ---- What only a GPU shows. ----

TEST(OnDevice, CopiesHavePinnedMemory) {
  NEEDS_GPU("pinned memory");
  EXPECT_TRUE(host_buffer(1000, ::torch::kLong, the_device()).is_pinned());
  EXPECT_TRUE(SideStream(the_device()).asynchronous());
}

TEST(OnDevice, RecordAndStepWithLagReturnWhileTheDeviceIsBusy) {
  NEEDS_GPU("work that goes on beside the host");
  TorchController device(device_config(1), on_device()), host(device_config(1));
  std::vector<Batch> batches;
  for (int i = 0; i < 6; ++i) batches.push_back(batch_of(40 + i));
  // Once before: a kernel's first use loads it, and fresh memory is asked for, both of which may wait.
  keep_busy();
  TorchController warm(device_config(1), on_device());
  for (const Batch& batch : batches) {
    const Batch there = moved(batch, the_device());
    warm.record(0, there.indices, there.options);
    warm.step();
  }
  for (int i = 0; i < 6; ++i) {
    const Batch there = moved(batches[static_cast<std::size_t>(i)], the_device());
    Point().wait();  // the step before has passed, with its sums
    keep_busy();
    const Point busy;
    device.record(0, there.indices, there.options);
    EXPECT_FALSE(busy.passed()) << "record waited, or the work was too short to tell";
    device.step();
    EXPECT_FALSE(busy.passed()) << "step " << i << " waited";
    host.record(0, batches[static_cast<std::size_t>(i)].indices,
                batches[static_cast<std::size_t>(i)].options);
    host.step();
    EXPECT_EQ(flat(device.report().layers[0]), flat(host.report().layers[0])) << i;
  }
  EXPECT_TRUE(device.bias(0).cpu().equal(host.bias(0)));
}

TEST(OnDevice, TheBusyDeviceWouldShowAWait) {
  NEEDS_GPU("work that goes on beside the host");
  keep_busy();
  const Point busy;
  (void)::torch::ones({1}, ::torch::device(the_device())).item<float>();
  EXPECT_TRUE(busy.passed());
}

TEST(OnDevice, ValuesInForceReachTheRouterInOrder) {
  TorchController device(device_config(1), on_device()), host(device_config(1));
  for (int step = 0; step < 6; ++step) {
    const Batch batch = batch_of(60 + step), there = moved(batch, the_device());
    const Tensor before = host.bias(0).clone();
    if (has_gpu()) keep_busy();
    // What the stream was given before the step reads the old values, although it runs after the step has returned.
    const Tensor read_before = device.bias(0) + 0;
    device.record(0, there.indices, there.options);
    device.step();
    const Tensor read_after = device.bias(0) + 0;
    host.record(0, batch.indices, batch.options);
    host.step();
    EXPECT_TRUE(read_before.cpu().equal(before)) << step;
    EXPECT_TRUE(read_after.cpu().equal(host.bias(0))) << step;
  }
  EXPECT_GT(host.bias(0).abs().max().item<float>(), 0);
}

TEST(OnDevice, ADeviceWithoutMemoryIsAClearErrorAndLeavesTheHostWhole) {
  NEEDS_GPU("memory of its own that runs out");
  TorchController device(device_config(), on_device()), undisturbed(device_config(), on_device());
  const std::int64_t tokens = 1 << 20;
  ::torch::manual_seed(9);
  const Tensor large = ::torch::randint(0, kExperts, {tokens, kTopK}, ::torch::kLong).to(the_device());
  const Batch small = moved(batch_of(70), the_device());
  for (TorchController* it : {&device, &undisturbed}) it->record(0, small.indices, small.options);
  {
    std::vector<Tensor> hoard;
    for (std::int64_t bytes = std::int64_t{1} << 32; bytes >= 1 << 20; bytes /= 4) {
      try {
        for (;;)
          hoard.push_back(::torch::empty({bytes}, ::torch::dtype(::torch::kByte).device(the_device())));
      } catch (const c10::Error&) {
        // no more blocks of this size
      }
    }
    try {
      RecordOptions options;
      options.micro_batch = 3;
      device.record(0, large, options);
      FAIL() << "there was memory left";
    } catch (const c10::Error& error) {
      EXPECT_THAT(error.what(), HasSubstr("out of memory"));
    }
  }
  // With memory again, the same micro-batch counts, and once.
  for (TorchController* it : {&device, &undisturbed}) {
    RecordOptions options;
    options.micro_batch = 3;
    it->record(0, large, options);
    it->step();
  }
  EXPECT_EQ(flat(device.report().layers[0]), flat(undisturbed.report().layers[0]));
  EXPECT_TRUE(device.save() == undisturbed.save());
}

}  // namespace
}  // namespace moectl
