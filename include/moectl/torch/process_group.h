// The controller's all-reduce over any c10d process group: Gloo, NCCL, MPI or a custom one.
//
//   controller.controller().set_reduction(moectl::reduce_over(group));
//
// The group must hold exactly the ranks whose counts belong together. With `lag: 1`, every step starts one all-reduce
// and the next step uses its sums. c10d requires the same order of collectives on all ranks of a group, so all ranks
// must call `step` at the same point of the loop.
//
// An MPI user without c10d needs only a lambda (examples/mpi_loop.cc runs both that follow):
//   set_reduction([&](std::span<std::int64_t> sums) {
//     MPI_Allreduce(MPI_IN_PLACE, sums.data(), int(sums.size()), MPI_INT64_T, MPI_SUM, communicator); });
// and, for a reduction that overlaps with the model's computation (`lag: 1`), one that returns a wait:
//   set_reduction([&](std::span<std::int64_t> sums) {
//     auto request = std::make_shared<MPI_Request>();
//     MPI_Iallreduce(MPI_IN_PLACE, sums.data(), int(sums.size()), MPI_INT64_T, MPI_SUM, communicator,
//                    request.get());
//     return [request] { MPI_Wait(request.get(), MPI_STATUS_IGNORE); }; });
#pragma once

#include <torch/torch.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>
#include <vector>

#include "moectl/controller.h"
#include "moectl/torch/batch_counts.h"

namespace moectl {

/// How the ranks' records relate to each other. It cannot be seen in the counts, so the caller must say it.
enum class ReductionScope {
  kPartial,     ///< Each rank recorded different tokens (data parallelism): the sums add.
  kReplicated,  ///< Every rank recorded the same tokens (tensor parallelism): the sums must agree, and count
                ///< once.
};

struct ReductionOptions {
  ReductionScope scope = ReductionScope::kPartial;
  /// A collective that takes longer throws ReductionError; the last applied values stay in force.
  std::chrono::milliseconds timeout = std::chrono::minutes(5);
  /// The device on which the group's backend wants its tensors (NCCL: the rank's GPU). The collective and its copies
  /// then run on a separate stream.
  ::torch::Device device = ::torch::kCPU;
};

/// Starts one all-reduce (SUM) of int64 tensors.
using StartAllReduce = std::function<c10::intrusive_ptr<c10d::Work>(std::vector<at::Tensor>& tensors,
                                                                    const c10d::AllreduceOptions& options)>;
Reduction reduce_with(StartAllReduce start, int ranks, const ReductionOptions& options = {});

/// `Group` is c10d::ProcessGroup, c10d::Backend (LibTorch 2) or a class derived from either. Keeps a
/// reference to the group.
template <typename Group>
Reduction reduce_over(c10::intrusive_ptr<Group> group, const ReductionOptions& options = {}) {
  const int ranks = group->getSize();
  return reduce_with(
      [group = std::move(group)](std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& how) {
        return group->allreduce(tensors, how);
      },
      ranks, options);
}

/// The sum over the ranks of a group, for BatchCounts: of tensors on the device of the router, which the group's backend
/// must be able to add. Waits as long as the group does, and throws what it throws.
template <typename Group>
SumOverRanks sum_over(c10::intrusive_ptr<Group> group) {
  return [group = std::move(group)](::torch::Tensor& sums) {
    std::vector<at::Tensor> all{sums};
    group->allreduce(all)->wait();
  };
}

}  // namespace moectl
