#include "torch/host_batch.h"

#include <sstream>
#include <stdexcept>
#include <string>

namespace moectl {
namespace {

std::string describe(const ::torch::Tensor& tensor) {
  std::ostringstream out;
  out << tensor.scalar_type() << ' ' << tensor.sizes();
  return out.str();
}

void require(bool holds, const char* name, const ::torch::Tensor& tensor, const char* constraint) {
  if (!holds) throw std::invalid_argument(std::string(name) + ": " + describe(tensor) + ": " + constraint);
}

bool is_integer(const ::torch::Tensor& tensor) {
  return at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false);
}

// One element a token: [T], or the shape of the indices without k. A transposed [S, B] has as many elements, and another
// meaning.
bool has_tokens_shape(const ::torch::Tensor& tensor, const ::torch::Tensor& indices) {
  const std::int64_t tokens = indices.numel() / indices.size(-1);
  if (tensor.numel() != tokens) return false;
  return tensor.dim() == 1 || indices.dim() == 2 || tensor.sizes() == indices.sizes().slice(0, 2);
}

}  // namespace

const void* HostBatch::host(const ::torch::Tensor& tensor, ::torch::ScalarType type) {
  if (tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous()) return tensor.data_ptr();
  held_[held_count_] = tensor.detach().to(::torch::kCPU, type).contiguous();
  return held_[held_count_++].data_ptr();
}

void check_record(const StatsShape& shape, const ::torch::Tensor& indices, const RecordOptions& options) {
  require(indices.defined() && (indices.dim() == 2 || indices.dim() == 3) && indices.size(-1) == shape.top_k,
          "indices", indices, "must be [B, S, k] or [T, k] with the k of the config");
  require(is_integer(indices), "indices", indices, "must be of an integer type");
  const std::int64_t tokens = indices.numel() / shape.top_k;
  if (const auto& mask = options.mask; mask.defined()) {
    require(at::isIntegralType(mask.scalar_type(), /*includeBool=*/true), "mask", mask,
            "must be bool or of an integer type, non-zero = a real token (an additive float mask means the "
            "opposite)");
    require(has_tokens_shape(mask, indices), "mask", mask,
            "must have the shape of the indices without k, or [T]");
  }
  if (const auto& ids = options.sequence_ids; ids.defined())
    require(has_tokens_shape(ids, indices) && is_integer(ids), "sequence_ids", ids,
            "must hold integers, in the shape of the indices without k, or [T]");
  if (const auto& values = options.top_values; values.defined())
    require(values.numel() == tokens * (shape.top_k + 1), "top_values", values, "must be [T, k+1]");
  if (const auto& values = options.biased_scores; values.defined()) {
    require(values.numel() == tokens * shape.experts, "biased_scores", values, "must be [T, N]");
    require(options.top_values.defined(), "biased_scores", values, "must come with top_values");
  }
  if (const auto& values = options.scores; values.defined())
    require(values.numel() == tokens * shape.experts, "scores", values, "must be [T, N]");
  if (const auto& values = options.probabilities; values.defined())
    require(values.numel() == tokens * shape.experts, "probabilities", values, "must be [T, N]");
  if (const auto& ids = options.domain_ids; ids.defined())
    require(has_tokens_shape(ids, indices) && is_integer(ids), "domain_ids", ids,
            "must hold integers, in the shape of the indices without k, or [T]");
  if (const auto& dropped = options.dropped; dropped.defined())
    require(dropped.numel() == 1 && is_integer(dropped), "dropped", dropped, "must be one integer");
  if (const auto& loss = options.balance_loss; loss.defined())
    require(loss.numel() == 1, "balance_loss", loss, "must be one number");
  if (const auto& loss = options.z_loss; loss.defined())
    require(loss.numel() == 1, "z_loss", loss, "must be one number");
}

::torch::Tensor whole_counts(const ::torch::Tensor& counts, int experts) {
  const ::torch::NoGradGuard no_grad;
  require(counts.defined() && counts.dim() == 1 && counts.numel() == experts, "counts", counts,
          "must be [N], with the N of the config");
  const auto type = counts.scalar_type();
  require(type != ::torch::kHalf && type != ::torch::kBFloat16, "counts", counts,
          "half precision rounds counts (40840 becomes 40960 in bfloat16): count in int64 or float32");
  require(is_integer(counts) || type == ::torch::kFloat || type == ::torch::kDouble, "counts", counts,
          "must be of an integer type, float32 or float64");
  const ::torch::Tensor here = counts.detach().to(::torch::kCPU);
  if (!is_integer(counts)) {
    const ::torch::Tensor wide = here.to(::torch::kDouble);
    require(wide.eq(wide.floor()).all().item<bool>(), "counts", counts, "must hold whole numbers");
    constexpr double kFloat32 = 16777216, kFloat64 = 9007199254740992;
    const bool narrow = type == ::torch::kFloat;
    require(wide.abs().lt(narrow ? kFloat32 : kFloat64).all().item<bool>(), "counts", counts,
            narrow ? "float32 does not hold every count from 2^24 on, and adding 1 to it changes nothing: "
                     "count in int64"
                   : "must be below 2^53");
  }
  return here.to(::torch::kLong).contiguous();
}

HostBatch::HostBatch(const StatsShape& shape, const ::torch::Tensor& indices, const RecordOptions& options) {
  check_record(shape, indices, options);
  const auto count = static_cast<std::size_t>(indices.numel() / shape.top_k);
  const auto integers = [&](const ::torch::Tensor& tensor) {
    return static_cast<const std::int64_t*>(host(tensor, ::torch::kInt64));
  };
  const auto floats = [&](const ::torch::Tensor& tensor) {
    return static_cast<const float*>(host(tensor, ::torch::kFloat32));
  };

  batch_.experts = {integers(indices), count * static_cast<std::size_t>(shape.top_k)};
  if (const auto& mask = options.mask; mask.defined()) {
    const bool bytes = mask.scalar_type() == ::torch::kUInt8;
    batch_.mask = {static_cast<const std::uint8_t*>(host(mask, bytes ? ::torch::kUInt8 : ::torch::kBool)),
                   count};
  }
  if (const auto& ids = options.sequence_ids; ids.defined()) {
    if (shape.needs.sequences) batch_.sequence_ids = {integers(ids), count};
  } else if (indices.dim() == 3 && shape.needs.sequences) {
    batch_.sequence_length = indices.size(1);
  }
  const bool margins = shape.needs.biased_scores();
  if (const auto& values = options.top_values; values.defined() && (shape.needs.gap || margins)) {
    batch_.top_values = {floats(values), count * static_cast<std::size_t>(shape.top_k + 1)};
  }
  if (const auto& values = options.biased_scores; values.defined() && margins) {
    batch_.biased_scores = {floats(values), count * static_cast<std::size_t>(shape.experts)};
  }
  if (const auto& values = options.probabilities; values.defined() && shape.needs.probabilities) {
    batch_.probabilities = {floats(values), count * static_cast<std::size_t>(shape.experts)};
  }
  if (const auto& ids = options.domain_ids; ids.defined() && shape.needs.domains > 0) {
    batch_.domain_ids = {integers(ids), count};
  }
  if (const auto& dropped = options.dropped; dropped.defined()) batch_.dropped = *integers(dropped);
  if (const auto& loss = options.balance_loss; loss.defined()) batch_.balance_loss = loss.item<double>();
  if (const auto& loss = options.z_loss; loss.defined()) batch_.z_loss = loss.item<double>();
}

}  // namespace moectl
