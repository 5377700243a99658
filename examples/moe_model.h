// A byte-level transformer whose feed-forward blocks are mixtures of experts, small enough for two CPU cores.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "moectl/torch/controller.h"
#include "moectl/torch/evaluation.h"
#include "moectl/torch/router.h"

/// The experts of a block; without any it is dense.
struct MoeShape {
  std::int64_t experts = 0, top_k = 0;
  moectl::ScoreSpace score_space = moectl::ScoreSpace::kProbability;
};

struct ModelOptions {
  std::vector<MoeShape> blocks;
  std::int64_t width = 96, heads = 4, expert_hidden = 96, context = 128;  // the shared expert is as wide
  moectl::Gate gate = moectl::Gate::kSigmoid;
};

/// What a layer of experts did in a pass.
struct Routed {
  int layer;
  torch::Tensor indices;          // [B, S, k]
  std::vector<double> latencies;  // seconds in each expert; empty if they were not timed
};

/// What a forward pass meets besides the text.
struct Pass {
  /// Of each block: read by its router, and told what it did while training.
  std::vector<moectl::TorchController*> controllers{};
  moectl::EvaluationMeter* meter = nullptr;  // told instead of the controller, if given
  bool deployed = false;                     // with the biases to deploy instead of those in force
  torch::Tensor domain_ids{};                // [B, S]
  torch::Tensor aux_loss{};                  // out: summed over layers
  double control_seconds = 0;                // out: spent in recording
  bool time_experts = false;                 // fills their latencies
  std::vector<Routed> routed{};              // out
};

/// k of N expert MLPs per token beside one shared by all.
class MoeImpl : public torch::nn::Module {
 public:
  MoeImpl(const ModelOptions& options, const MoeShape& shape, int layer);
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);  // [B, S, width] → the same
  std::vector<torch::Tensor> expert_parameters() const { return {in_, out_}; }
  const moectl::TopKRouter& router() const { return router_; }

 private:
  int layer_;
  std::int64_t experts_, top_k_;
  moectl::TopKRouter router_{nullptr};
  torch::nn::Linear shared_in_{nullptr}, shared_out_{nullptr};
  torch::Tensor in_, out_;  // [N, width, hidden], [N, hidden, width]
};
TORCH_MODULE(Moe);

class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(const ModelOptions& options, int layer);
  torch::Tensor forward(const torch::Tensor& x, Pass& pass);
  const Moe& moe() const { return moe_; }  // empty in a dense block
  const torch::nn::LayerNorm& moe_norm() const { return moe_norm_; }

 private:
  torch::Tensor attend(const torch::Tensor& x);
  torch::Tensor feed_forward(const torch::Tensor& x, Pass& pass);
  std::int64_t heads_;
  torch::nn::LayerNorm attention_norm_{nullptr}, moe_norm_{nullptr};
  torch::nn::Linear qkv_{nullptr}, merge_{nullptr};
  Moe moe_{nullptr};
  torch::nn::Linear dense_in_{nullptr}, dense_out_{nullptr};
  torch::Tensor future_;  // [S, S] -inf above the diagonal
};
TORCH_MODULE(Block);

class MoeLmImpl : public torch::nn::Module {
 public:
  explicit MoeLmImpl(const ModelOptions& options);
  /// Logits of the next byte [B, S, 256] for bytes [B, S].
  torch::Tensor forward(const torch::Tensor& bytes, Pass& pass);
  /// Each with the norm before it.
  std::vector<std::pair<torch::nn::LayerNorm, Moe>> moes() const;
  /// Those that have a slice for each expert, by layer.
  std::map<int, std::vector<torch::Tensor>> expert_parameters() const;

 private:
  torch::nn::Embedding bytes_{nullptr}, places_{nullptr};
  torch::nn::ModuleList blocks_;
  torch::nn::LayerNorm norm_{nullptr};
  torch::nn::Linear head_{nullptr};
};
TORCH_MODULE(MoeLm);
