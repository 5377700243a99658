// Cases from loops that others wrote with LibTorch, by the ids of tests/field_cases.md.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <span>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "moectl/torch/controller.h"
#include "moectl/torch/router.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::torch::Tensor;

ControllerConfig sign_config() {
  ControllerConfig config;
  config.model.layers = 2;
  config.model.experts = 4;
  config.model.top_k = 1;
  config.expert_bias.policy = "sign_bias";
  return config;
}

// A router of somebody's own, with the bias as its buffer.
struct ForeignRouterImpl : ::torch::nn::Module {
  explicit ForeignRouterImpl(const Tensor& handed_out) {
    bias = register_buffer("e_score_correction_bias", handed_out);
    gate = register_parameter("gate", ::torch::zeros({4, 4}));
  }
  Tensor bias, gate;
};
TORCH_MODULE(ForeignRouter);

void unbalanced_step(TorchController& controller) {
  for (int layer = 0; layer < 2; ++layer) controller.record(layer, ::torch::zeros({8, 1}, ::torch::kLong));
  controller.step();
}

// The router's own buffer holds what the controller says is in force, and stays a float32 tensor.
void expect_in_force(const TorchController& controller, const ForeignRouter& router, int layer) {
  const Tensor buffer = router->named_buffers()["e_score_correction_bias"];
  ASSERT_EQ(buffer.scalar_type(), ::torch::kFloat);
  for (std::int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(buffer[i].item<float>(),
              static_cast<float>(controller.controller().bias(layer)[static_cast<std::size_t>(i)]))
        << "expert " << i;
  }
}

TEST(FieldCases, A2_ABufferThatTorchLoadReplacedIsTiedAgain) {
  TorchController controller(sign_config());
  ForeignRouter router(controller.bias(1));
  std::stringstream file;
  ::torch::save(router, file);
  unbalanced_step(controller);
  expect_in_force(controller, router, 1);
  ::torch::load(router, file);
  for (int step = 0; step < 3; ++step) unbalanced_step(controller);
  expect_in_force(controller, router, 1);
  EXPECT_LT(router->bias[0].item<float>(), 0) << "the overloaded expert is pushed away";
  EXPECT_EQ(controller.rewired(), 1);
}

TEST(FieldCases, A2_AModelInHalfPrecisionKeepsTheBiasInFloat) {
  TorchController controller(sign_config());
  ForeignRouter router(controller.bias(0));
  router->to(::torch::kBFloat16);
  ASSERT_EQ(router->gate.scalar_type(), ::torch::kBFloat16);
  ASSERT_EQ(router->bias.scalar_type(), ::torch::kBFloat16);
  for (int step = 0; step < 3; ++step) unbalanced_step(controller);
  expect_in_force(controller, router, 0);
  EXPECT_EQ(controller.rewired(), 1);
}

TEST(FieldCases, A2_TheScalarsAreWatchedToo) {
  TorchController controller(sign_config());
  Tensor weight = controller.aux_loss_weight(1), temperature = controller.temperature(0);
  weight.set_data(::torch::full({}, 0.5F));
  temperature.set_data(::torch::full({}, 3.0F));
  unbalanced_step(controller);
  EXPECT_EQ(weight.item<float>(), 0);
  EXPECT_EQ(temperature.item<float>(), 1);
  EXPECT_EQ(controller.rewired(), 2);
}

// What Module::to(kCUDA) would leave behind: a tensor whose memory lies on an accelerator. Nothing reads the memory here.
Tensor tensor_on_an_accelerator() {
  const c10::Device device(c10::kCUDA, 0);
  c10::Storage storage(c10::Storage::use_byte_size_t(), 16, c10::DataPtr(nullptr, device), nullptr, false);
  Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                           c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                                           c10::scalarTypeToTypeMeta(::torch::kFloat));
  tensor.unsafeGetTensorImpl()->set_sizes_contiguous({4});
  return tensor;
}

TEST(FieldCases, A2_ATensorOnAnotherDeviceIsRefusedWithTheRemedyAndNothingIsDecided) {
  TorchController controller(sign_config());
  ForeignRouter router(controller.bias(1));
  router->bias.set_data(tensor_on_an_accelerator());
  for (int layer = 0; layer < 2; ++layer) controller.record(layer, ::torch::zeros({8, 1}, ::torch::kLong));
  try {
    controller.step();
    FAIL() << "nothing was thrown";
  } catch (const std::invalid_argument& error) {
    EXPECT_THAT(error.what(), HasSubstr("layer 1: bias"));
    EXPECT_THAT(error.what(), HasSubstr("cuda:0"));
    EXPECT_THAT(error.what(), HasSubstr("TorchOptions::device"));
  }
  EXPECT_EQ(controller.controller().steps(), 0);
}

// Resuming: the checkpoint of the model first, then the controller's state. The next forward pass reads the buffer.
TEST(FieldCases, A2_LoadingTheStateTiesTheBufferBeforeTheNextStep) {
  TorchController controller(sign_config());
  ForeignRouter router(controller.bias(1));
  std::stringstream file;
  ::torch::save(router, file);
  unbalanced_step(controller);
  const std::string state = controller.save();
  ::torch::load(router, file);
  controller.load(state);
  expect_in_force(controller, router, 1);
  EXPECT_LT(router->bias[0].item<float>(), 0);
}

TEST(FieldCases, A2_AHealthyLoopIsNeverTiedAgain) {
  TorchController controller(sign_config());
  ForeignRouter router(controller.bias(0));
  router->to(::torch::kCPU);
  router->eval();
  router->train();
  for (int step = 0; step < 20; ++step) unbalanced_step(controller);
  EXPECT_EQ(controller.rewired(), 0);
}

std::vector<Notice> wiring_notices(const StepReport& report) {
  std::vector<Notice> found;
  for (const Notice& notice : report.notices) {
    if (notice.kind == NoticeKind::kWiring) found.push_back(notice);
  }
  return found;
}

TEST(FieldCases, A2_ATensorThatWasTiedAgainIsANotice) {
  TorchController controller(sign_config());
  ForeignRouter router(controller.bias(1));
  router->to(::torch::kBFloat16);
  unbalanced_step(controller);
  const std::vector<Notice> found = wiring_notices(controller.report());
  ASSERT_EQ(found.size(), 1U);
  EXPECT_EQ(found[0].layer, 1);
  EXPECT_THAT(std::string(found[0].text),
              HasSubstr("layer 1: bias: the tensor that the controller handed out"));
}

TEST(FieldCases, A2_TheModelsCheckpointBeforeTheControllersIsNoNotice) {
  TorchController controller(sign_config());
  ForeignRouter router(controller.bias(1));
  std::stringstream file;
  ::torch::save(router, file);
  const std::string state = controller.save();
  ::torch::load(router, file);
  controller.load(state);
  unbalanced_step(controller);
  EXPECT_TRUE(wiring_notices(controller.report()).empty());
}

// ---- A router that does not choose by its bias ----

TEST(FieldCases, A1_ARouterWithAnotherLayersBiasIsNamed) {
  ::torch::manual_seed(1);
  ControllerConfig config = sign_config();
  config.model.experts = 16;  // enough that two layers' biases differ
  config.expert_bias.options.set("step", 0.01);
  for (const bool crossed : {false, true}) {
    TorchController controller(config);
    std::vector<TopKRouter> routers;
    for (int layer = 0; layer < 2; ++layer)
      routers.emplace_back(TopKRouterOptions(8, 16, 1).score_space(ScoreSpace::kProbability));
    std::string said;
    for (int step = 0; step < 12; ++step) {
      const Tensor x = ::torch::randn({2, 64, 8}) + 0.3;
      for (int layer = 0; layer < 2; ++layer) {
        const RouterOutput routed = routers[static_cast<std::size_t>(layer)]->forward(
            x, {.actuators = controller.actuators(crossed ? 1 - layer : layer)});
        controller.record(layer, routed.indices, routed.record_options());
      }
      for (const Notice& notice : wiring_notices(controller.step())) said += std::string(notice.text) + '\n';
    }
    if (crossed) {
      EXPECT_THAT(said, HasSubstr("the router adds the bias of layer 1: give it the bias of its own layer"));
    } else {
      EXPECT_EQ(said, "");
    }
  }
}

// ---- Missing inputs ----

ControllerConfig gap_config() {
  ControllerConfig config = sign_config();
  config.expert_bias.policy = "adaptive_bias";
  config.expert_bias.options.set("form", std::string("gap"));
  return config;
}

// By value: newer compilers take what is returned for a part of the tensor.
const StepReport& step_with(TorchController& controller, Tensor top_values) {
  for (int layer = 0; layer < 2; ++layer)
    controller.record(layer, ::torch::zeros({8, 1}, ::torch::kLong), {.top_values = top_values});
  return controller.step();
}

std::string step_error(TorchController& controller, const Tensor& top_values) {
  try {
    step_with(controller, top_values);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

Tensor some_top_values() {
  return ::torch::tensor({0.9F, 0.4F}).expand({8, 2}).contiguous();
}

TEST(FieldCases, A4_ARequiredTensorThatWasNeverGivenIsAnErrorAtTheFirstStep) {
  for (const bool by_operators : {false, true}) {
    TorchController controller(gap_config(), {.count_by_operators = by_operators});
    for (int again = 0; again < 2; ++again)
      EXPECT_EQ(
          step_error(controller, {}),
          "layer 0: expert_bias: policy adaptive_bias needs top_values: not given to record() on this rank. "
          "RecordOptions has a field for each");
    EXPECT_EQ(controller.controller().bias(0)[0], 0);
    EXPECT_EQ(step_error(controller, some_top_values()), "nothing was thrown");
    EXPECT_LT(controller.controller().bias(0)[0], 0);
  }
}

TEST(FieldCases, A4_ATensorThatStaysAwayLaterIsAReason) {
  TorchController controller(gap_config());
  step_with(controller, some_top_values());
  const StepReport report = step_with(controller, {});
  EXPECT_TRUE(report.layers[1].actuators[0].reasons.has(Reason::kMissingInput));
}

// Two ranks in two threads: a sum that waits for both.
class TwoRanks {
 public:
  void sum(std::span<std::int64_t> payload) {
    std::unique_lock lock(mutex_);
    const int round = round_;
    if (sums_.size() < payload.size()) sums_.resize(payload.size());
    for (std::size_t i = 0; i < payload.size(); ++i) sums_[i] += payload[i];
    if (++arrived_ == 2) {
      total_ = std::exchange(sums_, {});
      arrived_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
    std::copy_n(total_.begin(), payload.size(), payload.begin());
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  int arrived_ = 0, round_ = 0;
  std::vector<std::int64_t> sums_, total_;
};

TEST(FieldCases, A4_TheErrorComesOnEveryRankAndNamesTheOne) {
  TwoRanks ranks;
  std::string errors[2];
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      TorchController controller(gap_config());
      controller.controller().set_reduction([&](std::span<std::int64_t> payload) { ranks.sum(payload); });
      errors[rank] = step_error(controller, rank == 0 ? some_top_values() : Tensor());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(errors[0], HasSubstr("needs top_values: given on this rank, not on another one"));
  EXPECT_THAT(errors[1], HasSubstr("needs top_values: not given to record() on this rank"));
}

// ---- Masks ----

template <class Call>
std::string message_of(Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(FieldCases, A6_AFloatMaskIsRefused) {
  TorchController controller(sign_config());
  const Tensor indices = ::torch::zeros({2, 3, 1}, ::torch::kLong);
  EXPECT_THAT(message_of([&] {
                controller.record(0, indices, {.mask = ::torch::zeros({2, 3})});
              }),
              HasSubstr("mask: Float [2, 3]"));
  TopKRouter router(TopKRouterOptions(8, 4, 1));
  EXPECT_THAT(message_of([&] {
                router->forward(::torch::randn({2, 3, 8}), {.mask = ::torch::zeros({2, 3})});
              }),
              HasSubstr("mask: must be bool"));
}

TEST(FieldCases, A6_ATransposedMaskIsRefused) {
  TorchController controller(sign_config());
  const Tensor indices = ::torch::zeros({2, 3, 1}, ::torch::kLong);
  const Tensor transposed = ::torch::ones({3, 2}, ::torch::kBool);
  EXPECT_THAT(message_of([&] { controller.record(0, indices, {.mask = transposed}); }),
              HasSubstr("mask: Bool [3, 2]"));
  EXPECT_THAT(message_of([&] {
                controller.record(0, indices, {.sequence_ids = ::torch::zeros({3, 2}, ::torch::kLong)});
              }),
              HasSubstr("sequence_ids"));
  TopKRouter router(TopKRouterOptions(8, 4, 1));
  EXPECT_THAT(message_of([&] {
                router->forward(::torch::randn({2, 3, 8}), {.mask = transposed});
              }),
              HasSubstr("mask: must have the shape"));
}

TEST(FieldCases, A6_BoolAndIntegerMasksOfTheExactShapeCountAlike) {
  const Tensor indices = ::torch::zeros({2, 3, 1}, ::torch::kLong);
  const Tensor real = ::torch::tensor({1, 1, 0, 1, 0, 0}, ::torch::kLong);
  for (const auto type : {::torch::kBool, ::torch::kUInt8, ::torch::kInt, ::torch::kLong}) {
    for (const bool flat : {false, true}) {
      TorchController controller(sign_config());
      controller.record(0, indices, {.mask = (flat ? real : real.view({2, 3})).to(type)});
      EXPECT_EQ(controller.step().layers[0].stats->tokens(), 3) << type;
    }
  }
}

}  // namespace
}  // namespace moectl
