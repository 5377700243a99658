#include "moe_model.h"

#include <chrono>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace {

using torch::Tensor;

/// rows[i] → rows[order[i] / copies]: every row `copies` times, sorted by expert. The backward pass of
/// index_select would scatter row by row; knowing the inverse permutation, it is a gather and a sum.
struct Dispatch : torch::autograd::Function<Dispatch> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& rows, const Tensor& order,
                        const Tensor& inverse, std::int64_t copies) {
    context->save_for_backward({inverse});
    context->saved_data["copies"] = copies;
    return rows.index_select(0, order.div(copies, "floor"));
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const Tensor inverse = context->get_saved_variables()[0];
    const std::int64_t copies = context->saved_data["copies"].toInt();
    const Tensor rows = gradients[0].index_select(0, inverse);
    return {rows.view({-1, copies, rows.size(1)}).sum(1), Tensor(), Tensor(), Tensor()};
  }
};

/// rows[i] → rows[inverse[i]]: back from the order of experts to the order of tokens.
struct Combine : torch::autograd::Function<Combine> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& rows, const Tensor& order,
                        const Tensor& inverse) {
    context->save_for_backward({order});
    return rows.index_select(0, inverse);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    return {gradients[0].index_select(0, context->get_saved_variables()[0]), Tensor(), Tensor()};
  }
};

/// Each run of rows times its own expert's matrix. Adds to `seconds`, unless it is empty, the time of each.
Tensor grouped_mm(const Tensor& rows, const std::vector<std::int64_t>& sizes, const Tensor& matrices,
                  std::vector<double>& seconds) {
  std::vector<Tensor> parts = rows.split_with_sizes(sizes);
  const std::vector<Tensor> weights = matrices.unbind();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const auto start = std::chrono::steady_clock::now();
    parts[i] = parts[i].mm(weights[i]);
    if (!seconds.empty())
      seconds[i] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return torch::cat(parts);
}

Tensor normal(std::vector<std::int64_t> shape, std::int64_t fan_in) {
  return torch::randn(shape) / std::sqrt(static_cast<double>(fan_in));
}

}  // namespace

MoeImpl::MoeImpl(const ModelOptions& options, const MoeShape& shape, int layer)
    : layer_(layer), experts_(shape.experts), top_k_(shape.top_k) {
  router_ =
      register_module("router", moectl::TopKRouter(moectl::TopKRouterOptions(options.width, experts_, top_k_)
                                                       .gate(options.gate)
                                                       .score_space(shape.score_space)));
  shared_in_ = register_module("shared_in", torch::nn::Linear(options.width, options.expert_hidden));
  shared_out_ = register_module("shared_out", torch::nn::Linear(options.expert_hidden, options.width));
  in_ = register_parameter("expert_in",
                           normal({experts_, options.width, options.expert_hidden}, options.width));
  out_ = register_parameter("out",
                            normal({experts_, options.expert_hidden, options.width}, options.expert_hidden));
}

Tensor MoeImpl::forward(const Tensor& x, Pass& pass) {
  moectl::TorchController& controller = *pass.controllers[static_cast<std::size_t>(layer_)];
  moectl::RouterActuators actuators = controller.actuators(layer_);
  if (pass.deployed) {
    const std::vector<double> bias = controller.controller().deployment_bias(layer_);
    actuators.bias = torch::tensor(bias).to(actuators.bias.options());
  }
  const moectl::RouterOutput routed = router_->forward(x, {.actuators = actuators});
  pass.aux_loss = pass.aux_loss.defined() ? pass.aux_loss + routed.aux_loss : routed.aux_loss;

  const auto start = std::chrono::steady_clock::now();
  moectl::RecordOptions details = routed.record_options();
  details.domain_ids = pass.domain_ids;
  if (pass.meter != nullptr) {
    pass.meter->record(layer_, routed.indices, details);
  } else {
    controller.record(layer_, routed.indices, details);
  }
  pass.control_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  const Tensor tokens = x.reshape({-1, x.size(-1)});
  const Tensor chosen = routed.indices.reshape(-1);
  const Tensor order = std::get<1>(chosen.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false));
  const Tensor inverse =
      torch::empty_like(order).scatter_(0, order, torch::arange(order.numel(), order.options()));
  const Tensor counts =
      chosen.bincount({}, experts_).cpu();  // waits for an accelerator: sizes are the host's business
  const std::vector<std::int64_t> sizes(counts.data_ptr<std::int64_t>(),
                                        counts.data_ptr<std::int64_t>() + experts_);

  std::vector<double> seconds(pass.time_experts ? sizes.size() : 0);
  const Tensor hidden =
      torch::gelu(grouped_mm(Dispatch::apply(tokens, order, inverse, top_k_), sizes, in_, seconds));
  const Tensor outputs = Combine::apply(grouped_mm(hidden, sizes, out_, seconds), order, inverse);
  pass.routed.push_back({layer_, routed.indices, std::move(seconds)});
  const Tensor gates = routed.gates.reshape({-1, 1, top_k_});
  const Tensor mixed = gates.bmm(outputs.view({-1, top_k_, x.size(-1)})).view_as(x);
  return mixed + shared_out_(torch::gelu(shared_in_(x)));
}

BlockImpl::BlockImpl(const ModelOptions& options, int layer) : heads_(options.heads) {
  attention_norm_ =
      register_module("attention_norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({options.width})));
  moe_norm_ = register_module("moe_norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({options.width})));
  qkv_ = register_module("qkv", torch::nn::Linear(options.width, 3 * options.width));
  merge_ = register_module("merge", torch::nn::Linear(options.width, options.width));
  if (const MoeShape& shape = options.blocks[static_cast<std::size_t>(layer)]; shape.experts > 0) {
    moe_ = register_module("moe", Moe(options, shape, layer));
  } else {
    dense_in_ = register_module("dense_in", torch::nn::Linear(options.width, 4 * options.width));
    dense_out_ = register_module("dense_out", torch::nn::Linear(4 * options.width, options.width));
  }
  future_ = torch::full({options.context, options.context}, -std::numeric_limits<float>::infinity()).triu(1);
}

Tensor BlockImpl::attend(const Tensor& x) {
  const std::int64_t batch = x.size(0), length = x.size(1), width = x.size(2), head = width / heads_;
  const std::vector<Tensor> parts = qkv_(x)
                                        .view({batch, length, 3, heads_, head})
                                        .permute({2, 0, 3, 1, 4})
                                        .reshape({3, -1, length, head})
                                        .unbind();
  if (future_.device() != x.device())
    future_ = future_.to(x.device());  // no buffer: the same in every checkpoint
  const Tensor scores = torch::baddbmm(future_.narrow(0, 0, length).narrow(1, 0, length), parts[0],
                                       parts[1].transpose(1, 2), 1, 1 / std::sqrt(static_cast<double>(head)));
  const Tensor mixed = scores.softmax(-1).bmm(parts[2]);
  return merge_(mixed.view({batch, heads_, length, head}).transpose(1, 2).reshape({batch, length, width}));
}

Tensor BlockImpl::forward(const Tensor& x, Pass& pass) {
  const Tensor attended = x + attend(attention_norm_(x));
  return attended + feed_forward(moe_norm_(attended), pass);
}

Tensor BlockImpl::feed_forward(const Tensor& x, Pass& pass) {
  return moe_.is_empty() ? dense_out_(torch::gelu(dense_in_(x))) : moe_->forward(x, pass);
}

MoeLmImpl::MoeLmImpl(const ModelOptions& options) {
  bytes_ = register_module("bytes", torch::nn::Embedding(256, options.width));
  places_ = register_module("places", torch::nn::Embedding(options.context, options.width));
  blocks_ = register_module("blocks", torch::nn::ModuleList());
  const int blocks = static_cast<int>(options.blocks.size());
  for (int layer = 0; layer < blocks; ++layer) blocks_->push_back(Block(options, layer));
  norm_ = register_module("norm", torch::nn::LayerNorm(torch::nn::LayerNormOptions({options.width})));
  head_ = register_module("head", torch::nn::Linear(options.width, 256));
  const torch::NoGradGuard no_grad;
  bytes_->weight.mul_(0.3);
  places_->weight.mul_(0.1);
}

std::map<int, std::vector<Tensor>> MoeLmImpl::expert_parameters() const {
  std::map<int, std::vector<Tensor>> layers;
  int layer = 0;
  for (const auto& block : *blocks_) {
    if (const Moe& moe = block->as<BlockImpl>()->moe(); !moe.is_empty())
      layers[layer] = moe->expert_parameters();
    ++layer;
  }
  return layers;
}

std::vector<std::pair<torch::nn::LayerNorm, Moe>> MoeLmImpl::moes() const {
  std::vector<std::pair<torch::nn::LayerNorm, Moe>> all;
  for (const auto& block : *blocks_) {
    const auto* const own = block->as<BlockImpl>();
    if (!own->moe().is_empty()) all.emplace_back(own->moe_norm(), own->moe());
  }
  return all;
}

Tensor MoeLmImpl::forward(const Tensor& bytes, Pass& pass) {
  Tensor x = bytes_(bytes) + places_->weight.narrow(0, 0, bytes.size(1));
  for (const auto& block : *blocks_) x = block->as<BlockImpl>()->forward(x, pass);
  return head_(norm_(x));
}
