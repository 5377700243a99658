#include "moectl/torch/controller.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <span>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "control/inputs.h"
#include "torch/device_sums.h"
#include "torch/host_batch.h"
#include "torch/side_stream.h"

namespace moectl {
namespace {

thread_local int recording_guards = 0;

}  // namespace

RecordingGuard::RecordingGuard() {
  ++recording_guards;
}
RecordingGuard::~RecordingGuard() {
  --recording_guards;
}
bool RecordingGuard::active() {
  return recording_guards > 0;
}

/// Inputs that some call of record came without, on this rank.
struct TorchController::NotGiven {
  std::atomic<bool> top_values{false}, biased_scores{false}, probabilities{false}, domain_ids{false};

  void note(const RecordOptions& options) {
    const auto set = [](std::atomic<bool>& flag, const ::torch::Tensor& tensor) {
      if (!tensor.defined()) flag.store(true, std::memory_order_relaxed);
    };
    set(top_values, options.top_values);
    set(biased_scores, options.biased_scores);
    set(probabilities, options.probabilities);
    set(domain_ids, options.domain_ids);
  }
  bool any_of(const StatsNeeds& needs) const {
    return (needs.gap && top_values) || ((needs.margins || needs.margin_rows) && biased_scores) ||
           (needs.probabilities && probabilities) || (needs.domains > 0 && domain_ids);
  }
};

struct TorchController::Outbox {
  explicit Outbox(const ::torch::Tensor& values)
      : floats(host_buffer(values.numel(), ::torch::kFloat, values.device())),
        side(values.device()),
        sent(values.device()) {}

  ::torch::Tensor floats;
  SideStream side;
  Mark sent;
};

TorchController::TorchController(ControllerConfig config, const TorchOptions& options,
                                 const PolicyRegistry& registry)
    : options_(options), controller_(std::move(config), registry), not_given_(std::make_shared<NotGiven>()) {
  const ModelConfig& model = controller_.config().model;
  // Plain tensors even when the host builds its model in inference mode: their versions must count (see publish).
  const c10::InferenceMode normal(false);
  const ::torch::NoGradGuard no_grad;
  const std::int64_t layers = model.layers, experts = model.experts;
  values_ = ::torch::zeros({layers * (experts + 2)}, ::torch::dtype(::torch::kFloat).device(options_.device));
  for (std::int64_t layer = 0; layer < layers; ++layer) actuators_.push_back(views(layer));
  outbox_ = std::make_shared<Outbox>(values_);
  // Rows of margins are no sums: they are gathered on the host alone.
  const bool on_device = !options_.device.is_cpu() || options_.count_by_operators;
  if (on_device && !controller_.shape().needs.margin_rows) {
    sums_ = std::make_shared<DeviceSums>(model.layers, controller_.shape(), options_.device);
    controller_.set_exchange(
        [sums = sums_](std::span<std::int64_t> payload, std::span<std::int64_t> own,
                       const Reduction& reduction) { return sums->exchange(payload, own, reduction); });
  }
  publish();
}

bool TorchController::recording() {
  return at::GradMode::is_enabled() && !RecordingGuard::active();
}

void TorchController::record(int layer, const ::torch::Tensor& indices, const RecordOptions& options) {
  if (!recording() || controller_.config().mode == Mode::kOff) return;
  if (!inputs_came_) not_given_->note(options);
  if (!sums_ || !indices.defined() || indices.device().type() != sums_->device().type()) {
    controller_.record(layer, HostBatch(controller_.shape(), indices, options).batch(), options.micro_batch);
    check_choices(layer, indices, options);
    return;
  }
  check_record(controller_.shape(), indices, options);
  controller_.record(
      layer, [&](RoutingStats& sums) { sums_->add(layer, indices, options, sums.gap_width()); },
      options.micro_batch);
}

void TorchController::record_counts(int layer, const ::torch::Tensor& counts,
                                    std::optional<std::int64_t> tokens, std::int64_t micro_batch) {
  if (!recording() || controller_.config().mode == Mode::kOff) return;
  const StatsShape& shape = controller_.shape();
  const ::torch::Tensor whole = whole_counts(counts, shape.experts);
  const std::span<const std::int64_t> values{whole.data_ptr<std::int64_t>(),
                                             static_cast<std::size_t>(shape.experts)};
  const std::int64_t sum = std::accumulate(values.begin(), values.end(), std::int64_t{0});
  controller_.record(
      layer,
      [&](RoutingStats& sums) {
        sums.add_counts(values, tokens.value_or((sum + shape.top_k - 1) / shape.top_k));
      },
      micro_batch);
}

const StepReport& TorchController::step(const StepInfo& info) {
  check_wiring(/*loading=*/false);
  if (sums_ && controller_.config().lag == 0) sums_->drain(controller_);
  const StepReport& report = controller_.step(info);
  publish();
  if (!inputs_came_) check_inputs(report);
  return report;
}

// A few tokens in a row, each time others. Nothing of an accelerator is read: that would wait for it.
void TorchController::check_choices(int layer, const ::torch::Tensor& indices, const RecordOptions& options) {
  constexpr std::int64_t kTokens = 4;
  const ::torch::Tensor &biased = options.biased_scores, &scores = options.scores;
  if (!biased.defined() || !biased.is_cpu() || indices.numel() == 0) return;
  const ::torch::NoGradGuard no_grad;
  const StatsShape& shape = controller_.shape();
  const std::int64_t tokens = indices.numel() / shape.top_k, count = std::min(kTokens, tokens);
  const std::int64_t from = 7 * controller_.steps() % (tokens - count + 1);
  if (options.mask.defined() && !options.mask.reshape(-1).narrow(0, from, count).ne(0).all().item<bool>())
    return;
  const auto rows = [&](const ::torch::Tensor& tensor, ::torch::ScalarType type) {
    return tensor.detach().reshape({tokens, -1}).narrow(0, from, count).to(::torch::kCPU, type).contiguous();
  };
  const auto floats = [](const ::torch::Tensor& tensor) {
    return std::span<const float>(tensor.data_ptr<float>(), static_cast<std::size_t>(tensor.numel()));
  };
  const ::torch::Tensor chosen = rows(indices, ::torch::kLong), v = rows(biased, ::torch::kFloat);
  ChoiceSample sample{.experts = {chosen.data_ptr<std::int64_t>(), static_cast<std::size_t>(chosen.numel())},
                      .biased_scores = floats(v)};
  ::torch::Tensor s;
  if (scores.defined() && scores.is_cpu()) {
    s = rows(scores, ::torch::kFloat);
    sample.scores = floats(s);
  }
  controller_.check_choices(layer, sample);
}

void TorchController::check_inputs(const StepReport& report) {
  bool all_asked = true;
  const auto check = [&](const std::string& where, const ActuatorReport& actuator, Actuator which) {
    if (actuator.applied.empty()) return;
    all_asked &= !actuator.proposed.empty();
    if (!actuator.reasons.has(Reason::kMissingInput)) return;
    std::string names;
    for (const std::string& name : input_names(actuator.missing)) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument(where + std::string(name_of(which)) + ": policy " +
                                controller_.config().actuator(which).policy + " needs " + names +
                                (not_given_->any_of(actuator.missing)
                                     ? ": not given to record() on this rank"
                                     : ": given on this rank, not on another one") +
                                ". RecordOptions has a field for each");
  };
  for (const LayerReport& layer : report.layers) {
    for (std::size_t a = 0; a < kActuatorCount; ++a)
      check("layer " + std::to_string(layer.layer) + ": ", layer.actuators[a], kActuators[a]);
  }
  for (std::size_t a = 0; a < kActuatorCount; ++a) check("", report.model[a], kActuators[a]);
  inputs_came_ = all_asked;
}

const RouterActuators& TorchController::actuators(int layer) const {
  if (layer < 0 || static_cast<std::size_t>(layer) >= actuators_.size()) {
    throw std::invalid_argument("layer: " + std::to_string(layer) + ": must be in [0, " +
                                std::to_string(actuators_.size()) + ")");
  }
  return actuators_[static_cast<std::size_t>(layer)];
}

RouterActuators TorchController::views(std::int64_t layer) const {
  const ModelConfig& model = controller_.config().model;
  const std::int64_t layers = model.layers, experts = model.experts;
  return {values_.narrow(0, layer * experts, experts), values_.select(0, layers * experts + layer),
          values_.select(0, layers * (experts + 1) + layer)};
}

// torch::load and Module::to replace the storage of a registered buffer in place, in the tensor that was handed out: the
// router would read the old values for ever. What was handed out is our own tensor, so the change can be seen here.
bool TorchController::is_home(const ::torch::Tensor& tensor, std::int64_t offset, std::int64_t size) const {
  return tensor.is_alias_of(values_) && tensor.storage_offset() == offset && tensor.numel() == size &&
         tensor.scalar_type() == ::torch::kFloat;
}

void TorchController::check_wiring(bool loading) {
  const std::int64_t layers = controller_.config().model.layers, experts = controller_.config().model.experts;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    const RouterActuators& handed_out = actuators_[static_cast<std::size_t>(layer)];
    const std::int64_t temperature = layers * experts + layer, weight = temperature + layers;
    if (!is_home(handed_out.bias, layer * experts, experts))
      rewire(layer, "bias", &RouterActuators::bias, loading);
    if (!is_home(handed_out.temperature, temperature, 1))
      rewire(layer, "temperature", &RouterActuators::temperature, loading);
    if (!is_home(handed_out.aux_loss_weight, weight, 1))
      rewire(layer, "aux_loss_weight", &RouterActuators::aux_loss_weight, loading);
  }
}

void TorchController::rewire(std::int64_t layer, const char* name, ::torch::Tensor RouterActuators::*which,
                             bool loading) {
  const c10::InferenceMode normal(false);
  const ::torch::NoGradGuard no_grad;
  ::torch::Tensor& tensor = actuators_[static_cast<std::size_t>(layer)].*which;
  const ::torch::Tensor home = views(layer).*which;
  std::ostringstream what;
  what << "layer " << layer << ": " << name
       << ": the tensor that the controller handed out now lies elsewhere (" << tensor.scalar_type() << " on "
       << tensor.device() << ")";
  if (tensor.device() != home.device()) {
    what << ": the controller writes on " << home.device()
         << ". Make the TorchController with TorchOptions::device set to the device of the model, before the "
            "model "
            "registers the tensor as a buffer";
    throw std::invalid_argument(what.str());
  }
  tensor.set_data(home);
  ++rewired_;
  if (loading) return;  // the usual way: the model's checkpoint first, then the controller's state
  what << ", as after torch::load or Module::to(dtype). It was tied to the controller again and holds the "
          "values in "
          "force (float32). Values that came with a checkpoint are not taken over.";
  TORCH_WARN(what.str());
  controller_.say(NoticeKind::kWiring, static_cast<int>(layer), what.str());
}

void TorchController::publish() {
  const bool in_place = options_.device.is_cpu() && !outbox_->side.asynchronous();
  if (!in_place) outbox_->sent.wait();
  float* value = (in_place ? values_ : outbox_->floats).data_ptr<float>();
  const int layers = static_cast<int>(actuators_.size());
  for (int layer = 0; layer < layers; ++layer) {
    for (const double bias : controller_.bias(layer)) *value++ = static_cast<float>(bias);
  }
  for (int layer = 0; layer < layers; ++layer) *value++ = static_cast<float>(controller_.temperature(layer));
  for (int layer = 0; layer < layers; ++layer) {
    *value++ = static_cast<float>(controller_.aux_loss_weight(layer));
  }
  if (in_place) {
    // Written without autograd: bump the version, or a graph kept over the step would silently use the new values.
    values_.unsafeGetTensorImpl()->bump_version();
    return;
  }
  const ::torch::NoGradGuard no_grad;
  values_.copy_(outbox_->floats, /*non_blocking=*/outbox_->side.asynchronous());
  outbox_->sent.set();
}

std::string TorchController::save() {
  if (sums_) sums_->drain(controller_);
  return controller_.save();
}

void TorchController::save(::torch::serialize::OutputArchive& archive, const std::string& key) {
  const std::string state = save();
  ::torch::Tensor bytes = ::torch::empty({static_cast<std::int64_t>(state.size())}, ::torch::kUInt8);
  std::memcpy(bytes.data_ptr(), state.data(), state.size());
  archive.write(key, bytes);
}

void TorchController::load(std::string_view state) {
  check_wiring(/*loading=*/true);
  controller_.load(state);
  if (sums_) sums_->clear();
  publish();
}

void TorchController::load(::torch::serialize::InputArchive& archive, const std::string& key) {
  ::torch::Tensor bytes;
  if (!archive.try_read(key, bytes)) throw StateError("archive: no entry '" + key + "'");
  if (bytes.scalar_type() != ::torch::kUInt8)
    throw StateError("archive: entry '" + key + "' does not hold bytes");
  bytes = bytes.to(::torch::kCPU).contiguous();
  load(std::string_view(static_cast<const char*>(bytes.data_ptr()), static_cast<std::size_t>(bytes.numel())));
}

}  // namespace moectl
