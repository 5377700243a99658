// TopKRouter: a Mixture-of-Experts router for control. Its selection bias changes the chosen experts and never a gate
// weight. It reports everything that a controller can use. Its losses and their gradients are finite everywhere.
//
// Temperature and bias. In logit space, experts are selected on z + b: the temperature moves gate
// weights, probabilities and the gradient of the balance loss, never the selection. In probability space they
// are selected on s(z/T) + b, so the two are coupled: a higher T flattens s, and the same bias has more effect.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "moectl/torch/controller.h"
#include "moectl/types.h"

namespace moectl {

enum class Gate {
  kSoftmax,       ///< s = softmax(z/T) over all experts.
  kSigmoid,       ///< s = σ(z/T), each expert by itself.
  kSqrtSoftplus,  ///< s = √softplus(z/T), each expert by itself.
};

/// Which assignments are dropped when an expert is over capacity.
enum class DropBy {
  kScore,     ///< The ones with the smallest gate weights.
  kPosition,  ///< The latest tokens.
};

struct TopKRouterOptions {
  TopKRouterOptions(std::int64_t hidden, std::int64_t experts, std::int64_t top_k)
      : hidden_(hidden), experts_(experts), top_k_(top_k) {}
  TORCH_ARG(std::int64_t, hidden);   ///< Width of a token's vector, ≥ 1.
  TORCH_ARG(std::int64_t, experts);  ///< N ≥ 1.
  TORCH_ARG(std::int64_t, top_k);    ///< 1 ≤ k ≤ N.
  TORCH_ARG(Gate, gate) = Gate::kSigmoid;
  /// Where the bias is added for selection: as model.score_space says.
  TORCH_ARG(ScoreSpace, score_space) = ScoreSpace::kProbability;
  TORCH_ARG(bool, normalize) = true;    ///< Gate weights of a token sum to `scale`. Meaningless for k = 1.
  TORCH_ARG(double, scale) = 1.0;       ///< Factor on the gate weights, > 0.
  TORCH_ARG(std::int64_t, groups) = 1;  ///< Number of equal groups of neighbouring experts; divides N.
  /// Number of groups that a token may choose from: those with the largest sums of their two largest scores.
  TORCH_ARG(std::int64_t, groups_kept) = 1;
  /// Largest number of assignments of an expert, relative to the mean load; > 0. Absent = dropless.
  TORCH_ARG(std::optional<double>, capacity_factor) = std::nullopt;
  TORCH_ARG(DropBy, drop_by) = DropBy::kScore;
  TORCH_ARG(double, jitter) = 0.0;  ///< In training, inputs are scaled by uniform [1 - j, 1 + j]; in [0, 1).
  /// Weight of the sequence-wise balance loss, ≥ 0 (DeepSeek-V3: 1e-4).
  /// Needs sequences: in training, tokens [T] without sequence ids are an std::invalid_argument.
  TORCH_ARG(double, sequence_loss_weight) = 0.0;
  TORCH_ARG(double, z_loss_weight) = 0.0;  ///< Of the z-loss, ≥ 0 (ST-MoE: 1e-3).
};

/// Turns the counts of a micro-batch, int64 [N], into those of what the balance loss is to be even over, int64 or floating
/// [N]. Called once in each forward pass, before the losses are formed; what it returns carries no gradient.
using CountsOverBatch = std::function<::torch::Tensor(const ::torch::Tensor& counts)>;

struct RouterInputs {
  RouterActuators actuators{};  ///< Undefined tensors are neutral.
  /// Bool, the shape of the tokens: false = padding, which no loss or capacity counts.
  ::torch::Tensor mask{};
  /// The sequence of each token, of the shape of the tokens or [T], of an integer type: neighbours with equal ids are one
  /// sequence. For packed tokens [T]; undefined = each row of [B, S] is a sequence.
  ::torch::Tensor sequence_ids{};
  /// For a balance loss over more than this micro-batch, as BatchCounts::of; empty = over this micro-batch.
  CountsOverBatch counts_over_batch{};
};

/// Leading dimensions [...] are those of the tokens given: [T] or [B, S].
struct RouterOutput {
  ::torch::Tensor indices;     ///< int64 [..., k], by falling biased score, before any capacity limit.
  ::torch::Tensor gates;       ///< [..., k], zero where dropped. Differentiable.
  ::torch::Tensor top_values;  ///< float32 [..., k+1], the biased scores of the choices and of the runner-up,
                               ///< detached; undefined if a token has no further expert to choose.
  /// float32 [..., N], all biased scores that selection compared, -inf in groups that lost, detached;
  /// undefined where top_values is.
  ::torch::Tensor biased_scores;
  ::torch::Tensor scores;  ///< float32 [..., N], the same before the bias was added; undefined likewise.
  ::torch::Tensor probabilities;  ///< [..., N], normalised to sum 1 for every gate. Differentiable.
  ::torch::Tensor logits;         ///< z [..., N]. Differentiable.
  ::torch::Tensor kept;           ///< bool [..., k], false = dropped; undefined if dropless.
  ::torch::Tensor dropped;  ///< int64, 0-dim: dropped assignments of real tokens; undefined if dropless.
  /// weight · balance + sequence_loss_weight · sequence + z_loss_weight · z. 0-dim.
  ::torch::Tensor aux_loss;
  ::torch::Tensor balance_loss;  ///< N Σ f_i P_i, f share of assignments, P mean probability; 1 when uniform.
  /// The same for each sequence, averaged; undefined for tokens [T] without sequence ids.
  ::torch::Tensor sequence_loss;
  ::torch::Tensor z_loss;        ///< mean (logsumexp z)².
  ::torch::Tensor sequence_ids;  ///< Those of the inputs.

  /// The inputs of TorchController::record besides the indices.
  RecordOptions record_options() const {
    return {.top_values = top_values,
            .probabilities = probabilities,
            .biased_scores = biased_scores,
            .scores = scores,
            .sequence_ids = sequence_ids,
            .dropped = dropped,
            .balance_loss = balance_loss,
            .z_loss = z_loss};
  }
};

class TopKRouterImpl : public ::torch::nn::Cloneable<TopKRouterImpl> {
 public:
  /// Throws std::invalid_argument on options that break a constraint.
  explicit TopKRouterImpl(const TopKRouterOptions& options);
  void reset() override;
  void pretty_print(std::ostream& stream) const override;

  /// Routes tokens [..., hidden]. Logits are formed in float32 or wider whatever the input's type.
  RouterOutput forward(const ::torch::Tensor& tokens, const RouterInputs& inputs = {});
  /// Routes logits [..., N] formed elsewhere.
  RouterOutput route(const ::torch::Tensor& logits, const RouterInputs& inputs = {}) const;

  TopKRouterOptions options;
  ::torch::Tensor weight;  ///< [N, hidden]

 private:
  ::torch::Tensor log_scores(const ::torch::Tensor& logits, const ::torch::Tensor& temperature) const;
  ::torch::Tensor mask_groups(const ::torch::Tensor& selection) const;
  void select(const ::torch::Tensor& scores, const ::torch::Tensor& bias, RouterOutput& out) const;
  void add_losses(const RouterInputs& inputs, RouterOutput& out) const;
  ::torch::Tensor packed_sequence_loss(const ::torch::Tensor& ids, const ::torch::Tensor& mask,
                                       const RouterOutput& out) const;
  void drop(const ::torch::Tensor& mask, RouterOutput& out) const;
};
TORCH_MODULE(TopKRouter);

}  // namespace moectl
