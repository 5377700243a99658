#include "control/actuator_loop.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "measure/saved_sums.h"

namespace moectl {
namespace {

std::unique_ptr<Policy> make_policy(Actuator actuator, const ControllerConfig& config,
                                    const PolicyRegistry& registry, int layer) {
  const ActuatorConfig& own = config.actuator(actuator);
  const PolicyDescription* description = registry.find(own.policy);
  if (description == nullptr) {
    throw std::invalid_argument(std::string(name_of(actuator)) + ".policy: " + own.policy +
                                ": not registered");
  }
  const PolicyContext context{.actuator = actuator,
                              .layer = layer,
                              .experts = config.model.experts,
                              .top_k = config.model.top_k,
                              .domains = static_cast<int>(config.model.domains.size()),
                              .delay = config.delay(),
                              .score_space = config.model.score_space,
                              .initial = own.initial,
                              .min = own.limits.min,
                              .max = own.limits.max,
                              .cadence = own.limits.cadence};
  return description->make(context, own.options);
}

int size_of(Actuator actuator, const ControllerConfig& config) {
  return actuator == Actuator::kExpertBias ? config.model.experts : 1;
}

}  // namespace

ActuatorLoop::ActuatorLoop(Actuator actuator, const ControllerConfig& config, const PolicyRegistry& registry,
                           int layer)
    : policy_(make_policy(actuator, config, registry, layer)),
      limiter_(actuator, config.actuator(actuator).limits, config.safety, size_of(actuator, config),
               config.actuator(actuator).initial),
      cadence_(config.actuator(actuator).limits.cadence),
      shadow_(config.mode == Mode::kShadow) {
  applied_.assign(static_cast<std::size_t>(size_of(actuator, config)), config.actuator(actuator).initial);
  proposed_ = guarded_ = base_ = shadow_applied_ = applied_;
}

void ActuatorLoop::make_windows(const StatsShape& shape, std::size_t layers) {
  if (cadence_ == 1) return;
  windows_.assign(layers, RoutingStats(shape));
  window_metrics_.resize(layers);
}

void ActuatorLoop::propose(const LayerView& view, std::span<const double> probe) {
  std::copy(applied_.begin(), applied_.end(), proposed_.begin());
  for (std::size_t i = 0; i < probe.size(); ++i) proposed_[i] -= probe[i];
  asked_ = true;
  policy_->propose(view, proposed_);
}

void ActuatorLoop::limit(LimitContext context, ResponseCheck* check) {
  std::span<const double> wanted;
  if (asked_) wanted = guard_took_over_ ? guarded_ : proposed_;
  LimitReport held;
  if (check != nullptr) {
    if (!check->holds()) context.reach = check->reach();
    if (asked_ && !guard_took_over_) {
      std::copy(proposed_.begin(), proposed_.end(), guarded_.begin());
      check->adjust(guarded_, held);
      wanted = guarded_;
    }
  }
  if (shadow_) {
    // What was not applied must not be built upon: each step starts from what is in force.
    std::copy(applied_.begin(), applied_.end(), shadow_applied_.begin());
    reasons_ = limiter_.apply(context, wanted, shadow_applied_);
    if (asked_) held.add(Reason::kShadow);
  } else {
    reasons_ = limiter_.apply(context, wanted, applied_);
  }
  if (guard_took_over_) reasons_.add(Reason::kGuard);
  if (check != nullptr) check->on_applied(reasons_);
  reasons_.add(held);
  if (!asked_) return;
  std::copy(applied_.begin(), applied_.end(), base_.begin());
  if (check != nullptr) {
    for (std::size_t i = 0; i < base_.size(); ++i) base_[i] -= check->offset()[i];
  }
  policy_->on_applied(base_, reasons_);
  for (RoutingStats& window : windows_) window.clear();
}

ActuatorReport ActuatorLoop::report() const {
  return {.proposed = asked_ ? std::span<const double>(proposed_) : std::span<const double>(),
          .applied = shadow_ ? shadow_applied_ : applied_,
          .reasons = reasons_};
}

void ActuatorLoop::exchange(StateIo& io) {
  io.values("applied", applied_);
  limiter_.exchange(io);
  policy_->exchange(io);
  for (RoutingStats& window : windows_) exchange_sums(io, "window", window);
}

}  // namespace moectl
