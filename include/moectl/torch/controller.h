// TorchController: a Controller that is fed with tensors and read through tensors.
//
//   moectl::TorchController controller(moectl::load_config("adaptive_bias.yaml"));
//   ...forward:   auto routed = router->forward(hidden, {.actuators = controller.actuators(layer)});
//                 controller.record(layer, routed.indices, {.top_values = routed.top_values});
//   ...optimizer: controller.step({.loss = loss.item<double>()});
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/controller.h"

namespace moectl {

/// What one layer's router reads. The tensors of a TorchController stay at one address for its whole life and
/// are updated in place by `step` and `load`; an undefined tensor stands for the neutral value. A module may register
/// them as its own buffers: if `torch::load` or `Module::to(dtype)` gives such a buffer other storage, the next `step`
/// ties the buffer to the controller again.
struct RouterActuators {
  ::torch::Tensor bias{};             ///< Added to the scores for selection only. float32 [N].
  ::torch::Tensor temperature{};      ///< float32, 0-dim, > 0.
  ::torch::Tensor aux_loss_weight{};  ///< float32, 0-dim, ≥ 0.
};

/// Optional inputs of one record, beside the indices. T = tokens; [T] may also have the shape [B, S]. Undefined = not
/// given. Contiguous CPU tensors of the type named are read in place; others are converted first.
struct RecordOptions {
  ::torch::Tensor top_values{};     ///< [T, k+1] the k+1 largest biased scores, largest first. float32.
  ::torch::Tensor probabilities{};  ///< [T, N] router probabilities. float32.
  /// [T, N] all biased scores, -inf for experts excluded from the choice. Requires top_values. float32.
  ::torch::Tensor biased_scores{};
  /// [T, N] the same scores before the bias was added. With them, a few tokens of each record on the CPU tell whether
  /// the router adds the bias of its layer (Controller::check_choices). Not summed. float32.
  ::torch::Tensor scores{};
  /// [T], or [B, S] as the indices: non-zero = a real token, 0 = padding. bool or an integer type; an additive float
  /// mask (0 / -inf) means the opposite and is refused.
  ::torch::Tensor mask{};
  /// [T], of packed tokens: non-decreasing within the record. Not needed for indices [B, S, k] whose rows are whole
  /// sequences. With `model.split_sequences`, ids that join pieces over records and ranks (RoutingBatch). int64.
  ::torch::Tensor sequence_ids{};
  ::torch::Tensor domain_ids{};  ///< [T] in [0, domains). int64.
  ::torch::Tensor dropped{};     ///< 0-dim: assignments dropped for lack of capacity. int64.
  /// 0-dim, finite: the router's losses before their weights, as RouterOutput has them.
  ::torch::Tensor balance_loss{}, z_loss{};
  /// ≥ 0: a second record of (layer, micro-batch) before the next step is ignored. Needed under activation checkpointing
  /// that is not reentrant, whose repeated forward pass counts twice without it.
  std::int64_t micro_batch = -1;
};

struct TorchOptions {
  /// The device of the routers. The actuators' tensors are allocated there, and tensors recorded there are counted
  /// there, without waiting for the device. CPU tensors are read in place. Tensors of any other device are copied to
  /// the host first, which waits.
  ::torch::Device device = ::torch::kCPU;
  /// Counts by tensor operations even on the CPU, as on an accelerator: the same results, but many times slower. For
  /// tests that compare the two ways.
  bool count_by_operators = false;
};

class DeviceSums;

/// Turns recording off on this thread during its lifetime, as no-grad does: for passes that must not move the
/// controller.
class RecordingGuard {
 public:
  RecordingGuard();
  ~RecordingGuard();
  RecordingGuard(const RecordingGuard&) = delete;
  RecordingGuard& operator=(const RecordingGuard&) = delete;
  /// Whether a guard is alive on this thread.
  static bool active();
};

class TorchController {
 public:
  /// Validates the config; throws ConfigError.
  explicit TorchController(ControllerConfig config, const TorchOptions& options = {},
                           const PolicyRegistry& registry = PolicyRegistry::builtin());

  /// Adds one micro-batch's routing. On an accelerator this enqueues operations on the current stream and does not
  /// wait. `indices` are [B, S, k], where each row of S tokens is a sequence, or [T, k]: the experts chosen for each
  /// token, before any capacity limit, int64; -1 = a slot that is not routed. Thread-safe as Controller::record. Does nothing unless `recording()`.
  /// Throws std::invalid_argument on an unknown layer or shapes that do not fit together.
  void record(int layer, const ::torch::Tensor& indices, const RecordOptions& options = {});
  /// Adds counts [N] that were summed elsewhere, by `tokens` tokens (absent: their sum over k). Of an integer type or
  /// float64; float32 below 2^24, where it still holds every whole number. Half precision rounds counts (bfloat16 above
  /// 256, float16 above 2048) and is an std::invalid_argument, as is a number that is not whole. Waits for an accelerator.
  void record_counts(int layer, const ::torch::Tensor& counts,
                     std::optional<std::int64_t> tokens = std::nullopt, std::int64_t micro_batch = -1);
  /// Whether `record` counts on this thread: gradients are on and no RecordingGuard is alive.
  static bool recording();

  /// Once an optimizer step; see Controller::step. The tensors then hold what is in force: on an accelerator,
  /// for all that its current stream is given from then on. With `lag: 1` no sum of this step is waited for.
  /// Handed-out tensors that no longer share the controller's memory are tied to it again, with a warning that names
  /// the layer and a notice. A tensor that was moved to another device cannot be: std::invalid_argument, before anything
  /// is decided. An input that a policy requires and that was not recorded at the first decision is an
  /// std::invalid_argument, too, on every rank, after the step; a later one is a reason and a notice.
  const StepReport& step(const StepInfo& info = {});
  const StepReport& report() const { return controller_.report(); }

  /// float32 [N]. Its address never changes.
  const ::torch::Tensor& bias(int layer) const { return actuators(layer).bias; }
  /// float32, 0-dim. Its address never changes.
  const ::torch::Tensor& aux_loss_weight(int layer) const { return actuators(layer).aux_loss_weight; }
  /// float32, 0-dim. Its address never changes.
  const ::torch::Tensor& temperature(int layer) const { return actuators(layer).temperature; }
  /// The three of one layer. Throws std::invalid_argument on an unknown layer.
  const RouterActuators& actuators(int layer) const;

  /// Everything the next step depends on, as bytes or as one entry of an archive.
  std::string save();
  void save(::torch::serialize::OutputArchive& archive, const std::string& key = "moectl");
  /// Throws StateError, or std::invalid_argument as `step` does; the running state and the tensors are then untouched.
  void load(std::string_view state);
  /// As those of Controller.
  std::vector<KeptPart> load(std::string_view state, Keep keep);
  std::string save_layer(int layer);
  std::vector<KeptPart> load_layer(int layer, std::string_view state, Keep keep = Keep::everything);
  /// Controller::adopt from a tensor [N] of any floating type and device.
  void adopt(int layer, const ::torch::Tensor& biases);
  std::vector<KeptPart> load(::torch::serialize::InputArchive& archive, const std::string& key = "moectl",
                             Keep keep = Keep::everything);

  /// How often a handed-out tensor had lost the controller's memory and was tied to it again, since the start.
  std::int64_t rewired() const { return rewired_; }

  /// The controller underneath, for all that needs no tensors: set_log, set_reduction, freeze, config.
  Controller& controller() { return controller_; }
  const Controller& controller() const { return controller_; }

 private:
  std::size_t place_of(int layer) const;
  RouterActuators views(std::size_t at) const;
  bool is_home(const ::torch::Tensor& tensor, std::int64_t offset, std::int64_t size) const;
  void check_choices(int layer, const ::torch::Tensor& indices, const RecordOptions& options);
  void check_inputs(const StepReport& report);
  void check_wiring(bool loading);
  void rewire(std::size_t at, const char* name, ::torch::Tensor RouterActuators::*which, bool loading);
  void publish();

  TorchOptions options_;
  Controller controller_;
  std::shared_ptr<DeviceSums> sums_;  // of what is counted by operators, or null
  // All layers' biases, temperatures [L] and weights [L] in one tensor. What is handed out are views.
  ::torch::Tensor values_;
  std::vector<std::int64_t> begins_;  // of each layer's biases; then the end of the last one's
  std::vector<RouterActuators> actuators_;
  std::int64_t rewired_ = 0;
  bool inputs_came_ = false;  // to the first decision of every policy
  struct NotGiven;
  std::shared_ptr<NotGiven> not_given_;  // to record on this rank
  // Values on their way to the device, whose memory must not be written before they have left.
  struct Outbox;
  std::shared_ptr<Outbox> outbox_;
};

}  // namespace moectl
