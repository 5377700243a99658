#include "moectl/controller.h"

#include <stdexcept>
#include <string>
#include <utility>

#include "base/names.h"
#include "control/loop.h"

namespace moectl {

Controller::Controller(ControllerConfig config, const PolicyRegistry& registry)
    : loop_(std::make_unique<Loop>(std::move(config), registry)) {}
Controller::~Controller() = default;
Controller::Controller(Controller&&) noexcept = default;
Controller& Controller::operator=(Controller&&) noexcept = default;

const ControllerConfig& Controller::config() const {
  return loop_->config();
}
const std::vector<int>& Controller::layers() const {
  return loop_->ids();
}
const StatsShape& Controller::shape(int layer) const {
  return loop_->shape(layer);
}

void Controller::record(int layer, const RoutingBatch& batch, std::int64_t micro_batch) {
  loop_->record(layer, micro_batch, batch);
}

void Controller::record(int layer, const RoutingStats& stats) {
  loop_->record(layer, -1, 0, [&stats](RoutingStats& sums) { sums += stats; });
}

void Controller::record_with(int layer, const std::function<void(RoutingStats&)>& add,
                             std::int64_t micro_batch) {
  loop_->record_foreign(layer, micro_batch, add);
}

void Controller::check_choices(int layer, const ChoiceSample& sample) {
  loop_->check_choices(layer, sample);
}
void Controller::say(NoticeKind kind, int layer, std::string_view text) {
  loop_->say(kind, layer, text);
}

const StepReport& Controller::step(const StepInfo& info) {
  if (loop_->timeline_due()) loop_ = loop_->at_next_entry();
  return loop_->step(info);
}
const StepReport& Controller::report() const {
  return loop_->report();
}
std::int64_t Controller::steps() const {
  return loop_->steps();
}

void Controller::begin_at(std::int64_t step) {
  if (step < 0 || step > StateIo::kMostCount)
    throw std::invalid_argument("step: " + std::to_string(step) + ": must be in [0, 2^60]");
  if (!loop_->report().layers.empty() || loop_->steps() != 0) {
    throw std::invalid_argument(
        "begin_at: this controller has stepped, or goes on from a state: must come before its first step, "
        "once");
  }
  loop_->begin_at(step);
}

void Controller::set_reduction(Reduction reduction) {
  loop_->set_reduction(std::move(reduction));
}
void Controller::set_exchange(Exchange exchange) {
  loop_->set_exchange(std::move(exchange));
}
void Controller::set_log(std::function<void(const StepReport&)> log) {
  loop_->set_log(std::move(log));
}
void Controller::hold(bool held) {
  loop_->hold(held);
}
void Controller::freeze(int layer, bool frozen) {
  loop_->freeze(layer, frozen);
}
LayerPlan Controller::plan(int layer) const {
  return loop_->plan(layer);
}

std::span<const double> Controller::bias(int layer) const {
  return loop_->in_force(Actuator::kExpertBias, layer);
}
std::vector<double> Controller::deployment_bias(int layer) const {
  return loop_->deployment_bias(layer);
}
double Controller::aux_loss_weight(int layer) const {
  return loop_->in_force(Actuator::kAuxLossWeight, layer)[0];
}
double Controller::temperature(int layer) const {
  return loop_->in_force(Actuator::kRouterTemperature, layer)[0];
}

void Controller::adopt(int layer, std::span<const double> biases) {
  loop_->adopt(Actuator::kExpertBias, layer, biases);
}
void Controller::adopt_aux_loss_weight(int layer, double weight) {
  loop_->adopt(Actuator::kAuxLossWeight, layer, {&weight, 1});
}
void Controller::adopt_temperature(int layer, double temperature) {
  loop_->adopt(Actuator::kRouterTemperature, layer, {&temperature, 1});
}

std::string Controller::save() const {
  return loop_->save();
}
void Controller::load(std::string_view state) {
  load(state, Keep::everything);
}
std::vector<KeptPart> Controller::load(std::string_view state, Keep keep) {
  std::vector<KeptPart> parts;
  loop_ = loop_->loaded(state, keep, parts);
  return parts;
}
std::string Controller::save_layer(int layer) const {
  return loop_->save_layer(layer);
}
std::vector<KeptPart> Controller::load_layer(int layer, std::string_view state, Keep keep) {
  std::vector<KeptPart> parts;
  loop_ = loop_->layer_loaded(layer, state, keep, parts);
  return parts;
}

std::string_view name_of(KeptPart::Fate fate) {
  return Names<KeptPart::Fate, 3>{{"kept", "adapted", "dropped"}}[fate];
}

}  // namespace moectl
