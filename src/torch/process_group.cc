#include "moectl/torch/process_group.h"

#include <algorithm>
#include <utility>

namespace moectl {
namespace {

/// Runs the collectives of one controller, in a tensor of its own: a collective that timed out may still be
/// writing to it, so it must be neither the payload nor used again.
class GroupReduction {
 public:
  GroupReduction(StartAllReduce start, int ranks, const ReductionOptions& options)
      : start_(std::move(start)), ranks_(ranks), options_(options) {}

  void operator()(std::span<std::int64_t> payload) {
    at::Tensor sums = std::exchange(sums_, {});
    const auto size = static_cast<std::int64_t>(payload.size());
    if (!sums.defined() || sums.numel() != size) sums = at::empty({size}, at::dtype(at::kLong));
    std::copy(payload.begin(), payload.end(), sums.data_ptr<std::int64_t>());

    std::vector<at::Tensor> tensors{options_.device.is_cpu() ? sums : sums.to(options_.device)};
    c10d::AllreduceOptions how;
    how.timeout = options_.timeout;
    // Gloo throws what went wrong; other backends say it by the result.
    if (!start_(tensors, how)->wait(options_.timeout))
      throw ReductionError("the all-reduce failed or timed out");
    if (!options_.device.is_cpu()) sums.copy_(tensors[0]);

    const std::int64_t* total = sums.data_ptr<std::int64_t>();
    if (options_.scope == ReductionScope::kReplicated) {
      require_replicated(payload, total);
    } else {
      std::copy_n(total, payload.size(), payload.begin());
    }
    sums_ = std::move(sums);
  }

 private:
  /// R equal payloads add up to R times each one's own, which is then the total.
  void require_replicated(std::span<const std::int64_t> own, const std::int64_t* total) const {
    for (std::size_t i = 0; i < own.size(); ++i) {
      if (total[i] != own[i] * ranks_) {
        throw ReductionError("the scope is replicated, but the ranks recorded different sums");
      }
    }
  }

  StartAllReduce start_;
  int ranks_;
  ReductionOptions options_;
  at::Tensor sums_;
};

}  // namespace

Reduction reduce_with(StartAllReduce start, int ranks, const ReductionOptions& options) {
  return GroupReduction(std::move(start), ranks, options);
}

}  // namespace moectl
