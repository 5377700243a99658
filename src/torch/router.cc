#include "moectl/torch/router.h"

#include <cmath>
#include <limits>
#include <ostream>
#include <stdexcept>
#include <string>

namespace moectl {
namespace {

using ::torch::Tensor;

template <typename T>
void require(bool holds, const char* name, T value, const char* constraint) {
  if (!holds) throw std::invalid_argument(c10::str(name, ": ", value, ": ", constraint));
}

/// ln softplus(x). Softplus underflows below about -100, where it equals exp(x): both branches stay finite,
/// so that the one not taken sends no NaN into the gradient.
Tensor log_softplus(const Tensor& x) {
  const Tensor low = x < -20;
  const Tensor safe = ::torch::where(low, ::torch::zeros_like(x), x);
  return ::torch::where(low, x, ::torch::log(::torch::softplus(safe)));
}

/// Σ over tokens [T, ...] of the real ones. `mask` is [T] in the values' type, or undefined.
Tensor masked_mean(const Tensor& values, const Tensor& mask) {
  if (!mask.defined()) return values.mean(0);
  const Tensor weight = values.dim() > 1 ? mask.unsqueeze(1) : mask;
  return (values * weight).sum(0) / mask.sum().clamp_min(1);
}

/// Assignments to each expert per row of `indices` [R, A] → [R, N], in the type of `like`. `mask` [R, A] or undefined.
Tensor count(const Tensor& indices, const Tensor& mask, std::int64_t experts, const Tensor& like) {
  const Tensor ones = mask.defined() ? mask : ::torch::ones(indices.sizes(), like.options());
  return ::torch::zeros({indices.size(0), experts}, like.options()).scatter_add_(1, indices, ones);
}

}  // namespace

TopKRouterImpl::TopKRouterImpl(const TopKRouterOptions& options_in) : options(options_in) {
  require(options.hidden() >= 1, "hidden", options.hidden(), "must be at least 1");
  require(options.experts() >= 1, "experts", options.experts(), "must be at least 1");
  require(options.top_k() >= 1 && options.top_k() <= options.experts(), "top_k", options.top_k(),
          "must be in [1, experts]");
  require(options.scale() > 0 && std::isfinite(options.scale()), "scale", options.scale(), "must be above 0");
  require(options.groups() >= 1 && options.experts() % options.groups() == 0, "groups", options.groups(),
          "must divide experts");
  require(options.groups_kept() >= 1 && options.groups_kept() <= options.groups(), "groups_kept",
          options.groups_kept(), "must be in [1, groups]");
  require(options.groups_kept() * (options.experts() / options.groups()) >= options.top_k(), "groups_kept",
          options.groups_kept(), "must leave at least top_k experts to choose from");
  if (options.capacity_factor()) {
    require(*options.capacity_factor() > 0, "capacity_factor", *options.capacity_factor(), "must be above 0");
  }
  require(options.jitter() >= 0 && options.jitter() < 1, "jitter", options.jitter(), "must be in [0, 1)");
  require(options.sequence_loss_weight() >= 0, "sequence_loss_weight", options.sequence_loss_weight(),
          "must be at least 0");
  require(options.z_loss_weight() >= 0, "z_loss_weight", options.z_loss_weight(), "must be at least 0");
  reset();
}

void TopKRouterImpl::reset() {
  weight = register_parameter("weight", ::torch::empty({options.experts(), options.hidden()}));
  const double bound = 1 / std::sqrt(static_cast<double>(options.hidden()));
  ::torch::nn::init::uniform_(weight, -bound, bound);
}

void TopKRouterImpl::pretty_print(std::ostream& stream) const {
  stream << "moectl::TopKRouter(hidden=" << options.hidden() << ", experts=" << options.experts()
         << ", top_k=" << options.top_k() << ")";
}

RouterOutput TopKRouterImpl::forward(const Tensor& tokens, const RouterInputs& inputs) {
  // A half-precision product of 16 bits' worth of logits would round scores that differ by less than the bias's step.
  // Autocast would round them whatever their type is.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto type = ::torch::promote_types(weight.scalar_type(), ::torch::kFloat32);
  Tensor x = tokens.to(type);
  if (options.jitter() > 0 && is_training()) {
    x = x * ::torch::empty_like(x).uniform_(1 - options.jitter(), 1 + options.jitter());
  }
  return route(::torch::linear(x, weight.to(type)), inputs);
}

RouterOutput TopKRouterImpl::route(const Tensor& logits, const RouterInputs& inputs) const {
  if (logits.dim() < 2 || logits.dim() > 3 || logits.size(-1) != options.experts()) {
    throw std::invalid_argument("logits: must be [T, N] or [B, S, N]");
  }
  const RouterActuators& actuators = inputs.actuators;
  const Tensor mask = inputs.mask.defined() ? inputs.mask.reshape(-1) : Tensor();
  if (mask.defined()) {
    // An additive float mask (0 / -inf) means the opposite, and a transposed one has as many elements.
    if (!at::isIntegralType(inputs.mask.scalar_type(), /*includeBool=*/true)) {
      throw std::invalid_argument("mask: must be bool or of an integer type, non-zero = a real token");
    }
    const auto tokens = logits.sizes().slice(0, static_cast<std::size_t>(logits.dim() - 1));
    if (mask.numel() * options.experts() != logits.numel() ||
        (inputs.mask.dim() != 1 && inputs.mask.sizes() != tokens)) {
      throw std::invalid_argument("mask: must have the shape of the logits without N, or [T]");
    }
  }
  if (const Tensor& ids = inputs.sequence_ids; ids.defined()) {
    const auto tokens = logits.sizes().slice(0, static_cast<std::size_t>(logits.dim() - 1));
    if (!at::isIntegralType(ids.scalar_type(), /*includeBool=*/false) ||
        ids.numel() * options.experts() != logits.numel() || (ids.dim() != 1 && ids.sizes() != tokens)) {
      throw std::invalid_argument(
          "sequence_ids: must be of an integer type, in the shape of the logits without N, or [T]");
    }
  } else if (options.sequence_loss_weight() > 0 && logits.dim() == 2 && is_training() &&
             at::GradMode::is_enabled()) {
    throw std::invalid_argument(
        "sequence_ids: missing: tokens [T, H] do not tell their sequences, which sequence_loss_weight needs");
  }
  RouterOutput out;
  out.sequence_ids = inputs.sequence_ids;
  out.logits = logits.to(::torch::promote_types(logits.scalar_type(), ::torch::kFloat32));
  const Tensor log_score = log_scores(out.logits, actuators.temperature);
  const bool softmax = options.gate() == Gate::kSoftmax;
  // s / Σ s without its division: exact where every sigmoid underflows.
  out.probabilities = softmax ? log_score.exp() : log_score.softmax(-1);

  select(options.score_space() == ScoreSpace::kLogit ? out.logits.detach() : log_score.detach().exp(),
         actuators.bias, out);
  const Tensor chosen = log_score.gather(-1, out.indices);
  out.gates = options.normalize() ? chosen.softmax(-1) : chosen.exp();
  if (options.scale() != 1) out.gates = out.gates * options.scale();

  add_losses(inputs, out);
  if (options.capacity_factor()) drop(mask, out);
  return out;
}

Tensor TopKRouterImpl::log_scores(const Tensor& logits, const Tensor& temperature) const {
  const Tensor z = temperature.defined() ? logits / temperature : logits;
  switch (options.gate()) {
    case Gate::kSoftmax:
      return z.log_softmax(-1);
    case Gate::kSigmoid:
      return ::torch::log_sigmoid(z);
    case Gate::kSqrtSoftplus:
      return log_softplus(z) * 0.5;
  }
  return z;
}

/// Group-limited routing (DeepSeek-V3, 2412.19437 §2.1.2): a group's score is the sum of its two largest; all
/// experts of the losing groups become -inf, which no bias however negative can lose against.
Tensor TopKRouterImpl::mask_groups(const Tensor& selection) const {
  const std::int64_t size = options.experts() / options.groups();
  const Tensor grouped = selection.unflatten(-1, {options.groups(), size});
  const Tensor best = std::get<0>(grouped.topk(std::min<std::int64_t>(2, size), -1)).sum(-1);
  const Tensor kept = std::get<1>(best.topk(options.groups_kept(), -1));
  const Tensor lost = ::torch::ones_like(best, ::torch::kBool).scatter_(-1, kept, false);
  return grouped.masked_fill(lost.unsqueeze(-1), -std::numeric_limits<double>::infinity()).flatten(-2);
}

void TopKRouterImpl::select(const Tensor& scores, const Tensor& bias, RouterOutput& out) const {
  const ::torch::NoGradGuard no_grad;
  Tensor selection = bias.defined() ? scores + bias : scores;
  const bool grouped = options.groups_kept() < options.groups();
  if (grouped) selection = mask_groups(selection);
  const std::int64_t k = options.top_k();
  const std::int64_t choices = options.groups_kept() * (options.experts() / options.groups());
  const auto [values, indices] = selection.topk(std::min(k + 1, choices), -1);
  out.indices = indices.narrow(-1, 0, k).contiguous();
  if (choices > k) {
    out.top_values = values.to(::torch::kFloat32).contiguous();
    out.biased_scores = selection.to(::torch::kFloat32);
    out.scores = scores.to(::torch::kFloat32);
  }
}

/// Switch (2101.03961 eq. 4) with f over all k choices: N Σ f_i P_i. The counts carry no gradient; P does.
void TopKRouterImpl::add_losses(const RouterInputs& inputs, RouterOutput& out) const {
  const std::int64_t n = options.experts(), k = options.top_k();
  const Tensor p = out.probabilities.reshape({-1, n});
  const Tensor flat = out.indices.reshape({-1, k});
  const Tensor mask = inputs.mask.defined() ? inputs.mask.reshape(-1).to(p.scalar_type()) : Tensor();
  const Tensor real = mask.defined() ? mask.unsqueeze(1).expand({-1, k}).reshape({1, -1}) : Tensor();
  Tensor counts = count(flat.reshape({1, -1}), real, n, p).squeeze(0);
  if (inputs.counts_over_batch) {
    const Tensor more = inputs.counts_over_batch(counts.to(::torch::kLong));
    if (!more.defined() || more.numel() != n) {
      throw std::invalid_argument("counts_over_batch: must return [N], one for each of the " +
                                  std::to_string(n) + " experts");
    }
    counts = more.detach().reshape({n}).to(p.options());
  }
  const Tensor load = counts / counts.sum().clamp_min(1);
  const auto scale = static_cast<double>(n);
  out.balance_loss = (load * masked_mean(p, mask)).sum() * scale;
  out.z_loss = masked_mean(out.logits.reshape({-1, n}).logsumexp(-1).square(), mask);

  if (inputs.sequence_ids.defined()) {
    const Tensor ids = inputs.sequence_ids.reshape(-1).to(::torch::kLong);
    out.sequence_loss = packed_sequence_loss(ids.to(flat.device()), mask, out);
  } else if (out.indices.dim() == 3) {
    const std::int64_t batch = out.indices.size(0), length = out.indices.size(1);
    Tensor mean_p, counts;
    if (mask.defined()) {
      const Tensor rows = mask.reshape({batch, length});
      const Tensor real = rows.unsqueeze(2).expand({-1, -1, k}).reshape({batch, -1});
      counts = count(out.indices.reshape({batch, -1}), real, n, p);
      mean_p = (out.probabilities * rows.unsqueeze(2)).sum(1) / rows.sum(1, /*keepdim=*/true).clamp_min(1);
    } else {
      counts = count(out.indices.reshape({batch, -1}), Tensor(), n, p);
      mean_p = out.probabilities.mean(1);
    }
    const Tensor assigned = counts.sum(1, /*keepdim=*/true);
    const Tensor by_sequence = (counts / assigned.clamp_min(1) * mean_p).sum(1) * scale;
    // A sequence of nothing but padding has no balance to speak of.
    const Tensor real = (assigned.squeeze(1) > 0).to(p.scalar_type());
    out.sequence_loss = (by_sequence * real).sum() / real.sum().clamp_min(1);
  }

  out.aux_loss = ::torch::zeros({}, p.options());
  if (const Tensor& aux_weight = inputs.actuators.aux_loss_weight; aux_weight.defined()) {
    out.aux_loss = out.balance_loss * aux_weight;
  }
  if (options.sequence_loss_weight() > 0 && out.sequence_loss.defined()) {
    out.aux_loss = out.aux_loss + out.sequence_loss * options.sequence_loss_weight();
  }
  if (options.z_loss_weight() > 0) out.aux_loss = out.aux_loss + out.z_loss * options.z_loss_weight();
}

/// N Σ f_i P_i of each run of equal ids [T], averaged over those that have a token. `mask` [T] or undefined.
Tensor TopKRouterImpl::packed_sequence_loss(const Tensor& ids, const Tensor& mask,
                                            const RouterOutput& out) const {
  const std::int64_t n = options.experts(), k = options.top_k();
  const Tensor p = out.probabilities.reshape({-1, n});
  const Tensor weight = mask.defined() ? mask : ::torch::ones({p.size(0)}, p.options());
  const Tensor begins =
      ::torch::cat({::torch::zeros_like(ids.slice(0, 0, 1)), ids.diff().ne(0).to(::torch::kLong)});
  const Tensor sequence = begins.cumsum(0);
  // An accelerator need not be asked how many sequences there are: no more than tokens.
  const std::int64_t most =
      ids.is_cpu() && ids.numel() > 0 ? sequence[-1].item<std::int64_t>() + 1 : ids.numel();
  const Tensor tokens = ::torch::zeros({most}, p.options()).index_add(0, sequence, weight);
  const Tensor cell = sequence.unsqueeze(1) * n + out.indices.reshape({-1, k});
  const Tensor counts = ::torch::zeros({most * n}, p.options())
                            .index_add(0, cell.reshape(-1), weight.unsqueeze(1).expand({-1, k}).reshape(-1))
                            .view({most, n});
  const Tensor sums = ::torch::zeros({most, n}, p.options()).index_add(0, sequence, p * weight.unsqueeze(1));
  const Tensor real = tokens.clamp_min(1).unsqueeze(1);
  const Tensor by_sequence = (counts / (real * static_cast<double>(k)) * (sums / real)).sum(1);
  // A sequence of nothing but padding has no balance to speak of.
  return by_sequence.sum() * static_cast<double>(n) / tokens.gt(0).sum().clamp_min(1);
}

/// Each expert takes ⌈capacity_factor · S/N⌉ assignments, in the order of `drop_by`; the others' gate weights become 0.
void TopKRouterImpl::drop(const Tensor& mask, RouterOutput& out) const {
  const std::int64_t n = options.experts(), k = options.top_k();
  const Tensor flat = out.indices.reshape(-1);
  const std::int64_t assignments = flat.numel();
  Tensor real = ::torch::ones_like(flat, ::torch::kBool);
  if (mask.defined()) real = mask.to(::torch::kBool).unsqueeze(1).expand({-1, k}).reshape(-1);
  // Padding goes to an extra expert behind the others, where it takes no capacity.
  const Tensor expert = ::torch::where(real, flat, ::torch::full_like(flat, n));
  // Sorted by expert and, within one, by precedence: two stable sorts, the less significant key first.
  Tensor order;
  if (options.drop_by() == DropBy::kScore) {
    const Tensor gates = out.gates.detach().reshape(-1);
    order = std::get<1>(::torch::sort(gates, /*stable=*/true, /*dim=*/0, /*descending=*/true));
    order = order.gather(0, std::get<1>(::torch::sort(expert.gather(0, order), true, 0, false)));
  } else {
    order = std::get<1>(::torch::sort(expert, true, 0, false));
  }
  const Tensor counts =
      ::torch::zeros({n + 1}, flat.options()).scatter_add_(0, expert, ::torch::ones_like(expert));
  const Tensor start = counts.cumsum(0) - counts;
  const Tensor place =
      ::torch::arange(assignments, flat.options()) - start.gather(0, expert.gather(0, order));
  const Tensor capacity =
      (real.sum().to(::torch::kFloat64) * (*options.capacity_factor() / static_cast<double>(n))).ceil();
  const Tensor kept = ::torch::empty_like(real).scatter_(0, order, place < capacity).logical_and(real);
  out.dropped = (real.sum() - kept.sum()).detach();
  out.kept = kept.reshape(out.indices.sizes());
  out.gates = out.gates * out.kept.to(out.gates.scalar_type());
}

}  // namespace moectl
