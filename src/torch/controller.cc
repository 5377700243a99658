#include "moectl/torch/controller.h"

#include <cstring>
#include <stdexcept>

#include "host_batch.h"

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

TorchController::TorchController(ControllerConfig config, const PolicyRegistry& registry)
    : controller_(std::move(config), registry) {
  const ModelConfig& model = controller_.config().model;
  // Plain tensors even when the host builds its model in inference mode: their versions must count (see
  // publish).
  const c10::InferenceMode normal(false);
  const ::torch::NoGradGuard no_grad;
  biases_ = ::torch::zeros({model.layers, model.experts});
  temperatures_ = ::torch::ones({model.layers});
  aux_loss_weights_ = ::torch::zeros({model.layers});
  for (int layer = 0; layer < model.layers; ++layer) {
    actuators_.push_back(
        {biases_.select(0, layer), temperatures_.select(0, layer), aux_loss_weights_.select(0, layer)});
  }
  publish();
}

bool TorchController::recording() {
  return at::GradMode::is_enabled() && !RecordingGuard::active();
}

void TorchController::record(int layer, const ::torch::Tensor& indices, const RecordOptions& options) {
  if (!recording() || controller_.config().mode == Mode::kOff) return;
  controller_.record(layer, HostBatch(controller_.shape(), indices, options).batch(), options.micro_batch);
}

const StepReport& TorchController::step(const StepInfo& info) {
  const StepReport& report = controller_.step(info);
  publish();
  return report;
}

const RouterActuators& TorchController::actuators(int layer) const {
  if (layer < 0 || static_cast<std::size_t>(layer) >= actuators_.size()) {
    throw std::invalid_argument("layer: " + std::to_string(layer) + ": must be in [0, " +
                                std::to_string(actuators_.size()) + ")");
  }
  return actuators_[static_cast<std::size_t>(layer)];
}

void TorchController::publish() {
  auto* bias = biases_.data_ptr<float>();
  auto* temperature = temperatures_.data_ptr<float>();
  auto* weight = aux_loss_weights_.data_ptr<float>();
  for (int layer = 0; layer < static_cast<int>(actuators_.size()); ++layer) {
    for (const double value : controller_.bias(layer)) *bias++ = static_cast<float>(value);
    *temperature++ = static_cast<float>(controller_.temperature(layer));
    *weight++ = static_cast<float>(controller_.aux_loss_weight(layer));
  }
  // Written behind autograd's back: say so, or a graph kept over the step would silently use the new values.
  biases_.unsafeGetTensorImpl()->bump_version();
  temperatures_.unsafeGetTensorImpl()->bump_version();
  aux_loss_weights_.unsafeGetTensorImpl()->bump_version();
}

void TorchController::save(::torch::serialize::OutputArchive& archive, const std::string& key) const {
  const std::string state = controller_.save();
  ::torch::Tensor bytes = ::torch::empty({static_cast<std::int64_t>(state.size())}, ::torch::kUInt8);
  std::memcpy(bytes.data_ptr(), state.data(), state.size());
  archive.write(key, bytes);
}

void TorchController::load(std::string_view state) {
  controller_.load(state);
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
