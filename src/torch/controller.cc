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
    return (needs.gap && top_values) || (needs.biased_scores() && biased_scores) ||
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
  // Plain tensors even when the host builds its model in inference mode: their versions must count (see publish).
  const c10::InferenceMode normal(false);
  const ::torch::NoGradGuard no_grad;
  std::int64_t experts = 0;
  bool on_host = false;
  for (const int layer : controller_.layers()) {
    begins_.push_back(experts);
    experts += controller_.shape(layer).experts;
    const StatsNeeds& needs = controller_.shape(layer).needs;
    on_host |= needs.required_bins || needs.required_local;
  }
  begins_.push_back(experts);
  values_ = ::torch::zeros({experts + 2 * static_cast<std::int64_t>(controller_.layers().size())},
                           ::torch::dtype(::torch::kFloat).device(options_.device));
  for (std::size_t at = 0; at < controller_.layers().size(); ++at) actuators_.push_back(views(at));
  outbox_ = std::make_shared<Outbox>(values_);
  // Required biases are counted on the host alone.
  const bool on_device = !options_.device.is_cpu() || options_.count_by_operators;
  if (on_device && !on_host) {
    sums_ = std::make_shared<DeviceSums>(controller_, options_.device);
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
    controller_.record(layer, HostBatch(controller_.shape(layer), indices, options).batch(),
                       options.micro_batch);
    check_choices(layer, indices, options);
    return;
  }
  check_record(controller_.shape(layer), indices, options);
  const std::size_t at = place_of(layer);
  controller_.record_with(
      layer, [&](RoutingStats& sums) { sums_->add(at, indices, options, sums.gap_width()); },
      options.micro_batch);
}

void TorchController::record_counts(int layer, const ::torch::Tensor& counts,
                                    std::optional<std::int64_t> tokens, std::int64_t micro_batch) {
  if (!recording() || controller_.config().mode == Mode::kOff) return;
  const StatsShape& shape = controller_.shape(layer);
  const ::torch::Tensor whole = whole_counts(counts, shape.experts);
  const std::span<const std::int64_t> values{whole.data_ptr<std::int64_t>(),
                                             static_cast<std::size_t>(shape.experts)};
  const std::int64_t sum = std::accumulate(values.begin(), values.end(), std::int64_t{0});
  controller_.record_with(
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
  const StatsShape& shape = controller_.shape(layer);
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

std::size_t TorchController::place_of(int layer) const {
  const std::vector<int>& ids = controller_.layers();
  const auto at = static_cast<std::size_t>(std::find(ids.begin(), ids.end(), layer) - ids.begin());
  if (at == ids.size()) controller_.shape(layer);  // throws
  return at;
}

const RouterActuators& TorchController::actuators(int layer) const {
  return actuators_[place_of(layer)];
}

RouterActuators TorchController::views(std::size_t at) const {
  const std::int64_t temperature = begins_.back() + static_cast<std::int64_t>(at);
  return {values_.narrow(0, begins_[at], begins_[at + 1] - begins_[at]), values_.select(0, temperature),
          values_.select(0, temperature + static_cast<std::int64_t>(controller_.layers().size()))};
}

// torch::load and Module::to replace the storage of a registered buffer in place, in the tensor that was handed out: the
// router would read the old values for ever. What was handed out is our own tensor, so the change can be seen here.
bool TorchController::is_home(const ::torch::Tensor& tensor, std::int64_t offset, std::int64_t size) const {
  return tensor.is_alias_of(values_) && tensor.storage_offset() == offset && tensor.numel() == size &&
         tensor.scalar_type() == ::torch::kFloat;
}

void TorchController::check_wiring(bool loading) {
  const auto layers = static_cast<std::int64_t>(actuators_.size());
  for (std::size_t at = 0; at < actuators_.size(); ++at) {
    const RouterActuators& handed_out = actuators_[at];
    const std::int64_t temperature = begins_.back() + static_cast<std::int64_t>(at),
                       weight = temperature + layers;
    if (!is_home(handed_out.bias, begins_[at], begins_[at + 1] - begins_[at]))
      rewire(at, "bias", &RouterActuators::bias, loading);
    if (!is_home(handed_out.temperature, temperature, 1))
      rewire(at, "temperature", &RouterActuators::temperature, loading);
    if (!is_home(handed_out.aux_loss_weight, weight, 1))
      rewire(at, "aux_loss_weight", &RouterActuators::aux_loss_weight, loading);
  }
}

void TorchController::rewire(std::size_t at, const char* name, ::torch::Tensor RouterActuators::*which,
                             bool loading) {
  const c10::InferenceMode normal(false);
  const ::torch::NoGradGuard no_grad;
  const int layer = controller_.layers()[at];
  ::torch::Tensor& tensor = actuators_[at].*which;
  const ::torch::Tensor home = views(at).*which;
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
  controller_.say(NoticeKind::kWiring, layer, what.str());
}

void TorchController::publish() {
  const bool in_place = options_.device.is_cpu() && !outbox_->side.asynchronous();
  if (!in_place) outbox_->sent.wait();
  float* value = (in_place ? values_ : outbox_->floats).data_ptr<float>();
  for (const int layer : controller_.layers()) {
    for (const double bias : controller_.bias(layer)) *value++ = static_cast<float>(bias);
  }
  for (const int layer : controller_.layers()) *value++ = static_cast<float>(controller_.temperature(layer));
  for (const int layer : controller_.layers()) {
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
  load(state, Keep::everything);
}

std::vector<KeptPart> TorchController::load(std::string_view state, Keep keep) {
  check_wiring(/*loading=*/true);
  std::vector<KeptPart> parts = controller_.load(state, keep);
  if (sums_) sums_->clear();
  publish();
  return parts;
}

std::string TorchController::save_layer(int layer) {
  if (sums_) sums_->drain(controller_);
  return controller_.save_layer(layer);
}

std::vector<KeptPart> TorchController::load_layer(int layer, std::string_view state, Keep keep) {
  if (sums_) sums_->drain(controller_);
  check_wiring(/*loading=*/true);
  std::vector<KeptPart> parts = controller_.load_layer(layer, state, keep);
  publish();
  return parts;
}

void TorchController::adopt(int layer, const ::torch::Tensor& biases) {
  const ::torch::Tensor values = biases.detach().to(::torch::kCPU, ::torch::kDouble).reshape(-1).contiguous();
  controller_.adopt(layer, {values.data_ptr<double>(), static_cast<std::size_t>(values.numel())});
  publish();
}

std::vector<KeptPart> TorchController::load(::torch::serialize::InputArchive& archive, const std::string& key,
                                            Keep keep) {
  ::torch::Tensor bytes;
  if (!archive.try_read(key, bytes)) throw StateError("archive: no entry '" + key + "'");
  if (bytes.scalar_type() != ::torch::kUInt8)
    throw StateError("archive: entry '" + key + "' does not hold bytes");
  bytes = bytes.to(::torch::kCPU).contiguous();
  return load({static_cast<const char*>(bytes.data_ptr()), static_cast<std::size_t>(bytes.numel())}, keep);
}

}  // namespace moectl
