// Nothing synchronises: PyTorch's own check, which turns each wait of an operator for the GPU into an error. Needs CUDA's
// headers.
#include <c10/cuda/CUDAFunctions.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include "device/device.h"

namespace moectl {
namespace {

class ErrorOnSync {
 public:
  ErrorOnSync() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_ERROR); }
  ~ErrorOnSync() { c10::cuda::warning_state().set_sync_debug_mode(c10::cuda::SyncDebugMode::L_DISABLED); }
};

TEST(OnCuda, TheCheckDetectsAWait) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU here";
  const ::torch::Tensor x = ::torch::ones({4}, ::torch::device(the_device()));
  const ErrorOnSync check;
  EXPECT_THROW((void)x.sum().item<float>(), c10::Error);
  EXPECT_THROW((void)x.nonzero(), c10::Error);
}

TEST(OnCuda, RecordAndStepWithLagSynchroniseNowhere) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU here";
  for (const bool probabilities : {false, true}) {
    TorchController controller(device_config(1, probabilities), on_device());
    std::vector<Batch> batches;
    for (int seed = 0; seed < 40; ++seed) batches.push_back(moved(batch_of(seed), the_device()));
    const ErrorOnSync check;
    for (const Batch& batch : batches) {
      controller.record(0, batch.indices, batch.options);
      controller.step({.loss = 1.0});
    }
  }
}

TEST(OnCuda, WithLag0OnlyTheStepWaits) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU here";
  TorchController controller(device_config(), on_device());
  const Batch batch = moved(batch_of(1), the_device());
  const ErrorOnSync check;
  for (int step = 0; step < 5; ++step) {
    controller.record(0, batch.indices, batch.options);
    controller.step();  // waits for an event, on which the host asks: no operator does
  }
}

}  // namespace
}  // namespace moectl
