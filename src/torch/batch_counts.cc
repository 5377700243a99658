#include "moectl/torch/batch_counts.h"

namespace moectl {

CountsOverBatch BatchCounts::of(int layer, std::int64_t micro_batch) {
  return
      [this, layer, micro_batch](const ::torch::Tensor& counts) { return add(layer, micro_batch, counts); };
}

::torch::Tensor BatchCounts::add(int layer, std::int64_t micro_batch, const ::torch::Tensor& counts) {
  // A pass without gradients, as of an evaluation, has no loss to be even over, and must not be taken for one that has.
  if (!::torch::GradMode::is_enabled()) return counts;
  const ::torch::NoGradGuard no_grad;
  {
    const std::lock_guard lock(mutex_);
    if (const auto known = answers_.find({layer, micro_batch}); known != answers_.end()) return known->second;
  }
  ::torch::Tensor sum = counts.detach().to(::torch::kLong).clone();
  if (sum_) sum_(sum);
  const std::lock_guard lock(mutex_);
  ::torch::Tensor& so_far = so_far_[layer];
  so_far = so_far.defined() ? so_far + sum : sum;
  return answers_[{layer, micro_batch}] = so_far;
}

void BatchCounts::next_step() {
  const std::lock_guard lock(mutex_);
  so_far_.clear();
  answers_.clear();
}

}  // namespace moectl
