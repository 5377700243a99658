#include "moectl/torch/process_group.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "torch/group_reduction.h"
#include "torch/side_stream.h"

namespace moectl {

/// The memory of one collective. One that timed out may still write to it, so it is neither the payload nor
/// used again unless the collective succeeded.
struct GroupReduction::Buffers {
  Buffers(std::int64_t size, c10::Device device)
      : host(host_buffer(size, at::kLong, device)), side(device), landed(device) {
    // Memory of the side stream: that of the model's stream may still be in use by work that was freed but not done.
    side.run([&] { sums = device.is_cpu() ? host : at::empty({size}, at::dtype(at::kLong).device(device)); });
  }

  at::Tensor host, sums;  // one tensor on the CPU
  SideStream side;
  Mark landed;
};

struct GroupReduction::Shared {
  StartAllReduce start;
  int ranks;
  ReductionOptions options;
  std::shared_ptr<Buffers> spare;
};

namespace {

/// R equal payloads add up to R times each one's own, which is then the total.
void require_replicated(std::span<const std::int64_t> own, const std::int64_t* total, int ranks) {
  for (std::size_t i = 0; i < own.size(); ++i) {
    if (total[i] != own[i] * ranks) {
      throw ReductionError("the scope is replicated, but the ranks recorded different sums");
    }
  }
}

}  // namespace

GroupReduction::GroupReduction(StartAllReduce start, int ranks, const ReductionOptions& options)
    : shared_(std::make_shared<Shared>(Shared{std::move(start), ranks, options, nullptr})) {}

c10::Device GroupReduction::device() const {
  return shared_->options.device;
}

Reduction::Wait GroupReduction::operator()(std::span<std::int64_t> payload) const {
  return start(payload, {});
}

Reduction::Wait GroupReduction::start(std::span<std::int64_t> payload,
                                      const std::function<void(at::Tensor&)>& fill) const {
  const auto size = static_cast<std::int64_t>(payload.size());
  std::shared_ptr<Buffers> buffers = std::move(shared_->spare);
  if (!buffers || buffers->host.numel() != size) buffers = std::make_shared<Buffers>(size, device());

  c10::intrusive_ptr<c10d::Work> work;
  buffers->side.run([&] {
    const at::NoGradGuard no_grad;
    if (fill) {
      fill(buffers->sums);
    } else {
      std::copy(payload.begin(), payload.end(), buffers->host.data_ptr<std::int64_t>());
      if (!buffers->sums.is_same(buffers->host)) {
        buffers->sums.copy_(buffers->host, /*non_blocking=*/buffers->side.asynchronous());
      }
    }
    std::vector<at::Tensor> tensors{buffers->sums};
    c10d::AllreduceOptions how;
    how.timeout = shared_->options.timeout;
    work = shared_->start(tensors, how);
  });

  return [shared = shared_, buffers = std::move(buffers), work = std::move(work), payload]() mutable {
    const std::chrono::milliseconds timeout = shared->options.timeout;
    buffers->side.run([&] {
      const at::NoGradGuard no_grad;
      // Gloo throws what went wrong; other backends say it by the result. Where sums are summed on an
      // accelerator, it is the side stream that waits, and the host for the mark behind it.
      if (!work->wait(timeout)) throw ReductionError("the all-reduce failed or timed out");
      if (!buffers->sums.is_same(buffers->host)) {
        buffers->host.copy_(buffers->sums, /*non_blocking=*/buffers->side.asynchronous());
        buffers->landed.set();
      }
    });
    buffers->landed.wait(timeout);
    const std::int64_t* total = buffers->host.data_ptr<std::int64_t>();
    if (shared->options.scope == ReductionScope::kReplicated) {
      require_replicated(payload, total, shared->ranks);
    } else {
      std::copy_n(total, payload.size(), payload.begin());
    }
    shared->spare = std::move(buffers);
  };
}

Reduction reduce_with(StartAllReduce start, int ranks, const ReductionOptions& options) {
  return GroupReduction(std::move(start), ranks, options);
}

}  // namespace moectl
