// The all-reduce over NCCL. Of one rank where there is one GPU: that shows the streams, the copies and the calls, not a sum
// over ranks. With several GPUs each rank is a thread with a GPU of its own. Needs the headers of CUDA and NCCL.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <vector>

#include "device/device.h"
#include "moectl/torch/process_group.h"

namespace moectl {
namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroupNCCL>;

Group nccl(const c10::intrusive_ptr<c10d::Store>& store, int rank, int ranks) {
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, ranks);
}

TEST(Nccl, AGroupOfOneChangesNoBit) {
  if (!has_gpu()) GTEST_SKIP() << "no GPU here";
  const Group group = nccl(c10::make_intrusive<c10d::HashStore>(), 0, 1);
  for (const int lag : {0, 1}) {
    for (const ReductionScope scope : {ReductionScope::kPartial, ReductionScope::kReplicated}) {
      const Reduction reduction = reduce_over(group, {.scope = scope, .device = the_device()});
      const std::string host = state_after(20, lag, {}, 7, [](std::span<std::int64_t>) {});
      EXPECT_TRUE(state_after(20, lag, on_device(), 7, reduction) == host) << "lag " << lag;
      // Counted on the host, summed on the device.
      EXPECT_TRUE(state_after(20, lag, {}, 7, reduction) == host) << "lag " << lag << ", from the host";
    }
  }
}

TEST(Nccl, RanksWithAGpuEachDecideTheSameBits) {
  const int ranks = std::min(4, static_cast<int>(::torch::cuda::device_count()));
  if (ranks < 2) GTEST_SKIP() << "needs two GPUs, there are " << ranks;
  constexpr int kSteps = 20;
  std::vector<Batch> stream;  // made once: the generator belongs to all threads
  for (int i = 0; i < kSteps * ranks; ++i) stream.push_back(batch_of(i));
  const auto run = [&](TorchController& controller, int from, int to, ::torch::Device where) {
    std::vector<float> biases;
    for (int step = 0; step < kSteps; ++step) {
      for (int part = from; part < to; ++part) {
        const Batch batch = moved(stream[static_cast<std::size_t>(step * ranks + part)], where);
        controller.record(1, batch.indices, batch.options);
      }
      controller.step();
      const ::torch::Tensor bias = controller.bias(1).cpu();
      biases.insert(biases.end(), bias.data_ptr<float>(), bias.data_ptr<float>() + kExperts);
    }
    return biases;
  };
  for (const int lag : {0, 1}) {
    TorchController alone(device_config(lag));
    const std::vector<float> expected = run(alone, 0, ranks, ::torch::kCPU);
    const auto store = c10::make_intrusive<c10d::HashStore>();
    std::vector<std::thread> threads;
    for (int rank = 0; rank < ranks; ++rank) {
      threads.emplace_back([&, rank] {
        const ::torch::Device where(::torch::kCUDA, static_cast<c10::DeviceIndex>(rank));
        TorchController controller(device_config(lag), {.device = where});
        controller.controller().set_reduction(reduce_over(nccl(store, rank, ranks), {.device = where}));
        EXPECT_TRUE(run(controller, rank, rank + 1, where) == expected) << "rank " << rank << ", lag " << lag;
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace
}  // namespace moectl
