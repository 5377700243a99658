// Cases from loops that others wrote, by their numbers in the project's list. A2: a handed-out tensor that a module has as
// its own buffer loses its storage. A6: masks that mean something else.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <sstream>
#include <string>

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
