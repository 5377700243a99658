// What of a running loop is saved, and what of the config a saved state belongs to.
#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "control/loop.h"
#include "measure/saved_sums.h"

namespace moectl {
namespace {

void line(std::string& out, std::string_view key, std::string_view value) {
  out.append(key).append(": ").append(value).append("\n");
}

void line(std::string& out, std::string_view key, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%.17g", value);
  line(out, key, std::string_view(text.data()));
}

void line(std::string& out, std::string_view key, std::int64_t value) {
  line(out, key, std::to_string(value));
}
void line(std::string& out, std::string_view key, int value) {
  line(out, key, std::to_string(value));
}
void line(std::string& out, std::string_view key, bool value) {
  line(out, key, std::string_view(value ? "true" : "false"));  // char* would be a bool again
}
void line(std::string& out, std::string_view key, const std::string& value) {
  line(out, key, std::string_view(value));
}

void describe_limits(std::string& out, const std::string& where, const ActuatorConfig& actuator) {
  const Limits& limits = actuator.limits;
  line(out, where + ".initial", actuator.initial);
  line(out, where + ".limits.min", limits.min);
  line(out, where + ".limits.max", limits.max);
  line(out, where + ".limits.rate", limits.rate);
  line(out, where + ".limits.center", limits.center);
  line(out, where + ".limits.deadband", limits.deadband);
  line(out, where + ".limits.warmup", limits.warmup);
  line(out, where + ".limits.cooldown", limits.cooldown);
}

void describe_guard(std::string& out, const GuardOptions& guard) {
  if (!guard.enabled) return;
  line(out, "guard.fhs", guard.fhs);
  line(out, "guard.entropy_fall", guard.entropy_fall);
  line(out, "guard.dead_share", guard.dead_share);
  line(out, "guard.max_token_share", guard.max_token_share);
  line(out, "guard.lost_after", guard.lost_after);
  line(out, "guard.warmup", guard.warmup);
  line(out, "guard.confirm", guard.confirm);
  line(out, "guard.aux_factor", guard.aux_factor);
  line(out, "guard.temperature_factor", guard.temperature_factor);
  line(out, "guard.bias_step", guard.bias_step);
  line(out, "guard.recovered_max_vio", guard.recovered_max_vio);
  line(out, "guard.dwell", guard.dwell);
  line(out, "guard.patience", guard.patience);
  line(out, "guard.cooldown", guard.cooldown);
}

void describe_supervision(std::string& out, const SafetyOptions& safety) {
  line(out, "safety.fallback_after", safety.fallback_after);
  if (safety.rollback) {
    line(out, "safety.rollback.loss_jump", safety.rollback->loss_jump);
    line(out, "safety.rollback.drop_jump", safety.rollback->drop_jump);
    line(out, "safety.rollback.within", safety.rollback->within);
    line(out, "safety.rollback.cooldown", safety.rollback->cooldown);
  }
  if (safety.oscillation) {
    line(out, "safety.oscillation.threshold", safety.oscillation->threshold);
    line(out, "safety.oscillation.min_gain", safety.oscillation->min_gain);
  }
}

// Reads: config differs: saved with "model.experts: 16", this run has "model.experts: 8"".
std::string first_difference(std::string_view saved, std::string_view own) {
  while (!saved.empty() || !own.empty()) {
    const std::string_view a = saved.substr(0, saved.find('\n'));
    const std::string_view b = own.substr(0, own.find('\n'));
    if (a != b) {
      return "config differs: saved with \"" + std::string(a) + "\", this run has \"" + std::string(b) + "\"";
    }
    saved.remove_prefix(std::min(saved.size(), a.size() + 1));
    own.remove_prefix(std::min(own.size(), b.size() + 1));
  }
  return "config differs";
}

// The ids of micro-batches, -1 in rooms that are free. Hosts say how many there are, the config does not: up to kRoom
// the state has one length, and beyond it grows by as much.
void exchange_ids(StateIo& io, std::vector<std::int64_t>& ids) {
  constexpr std::size_t kRoom = 64;
  std::vector<std::int64_t> rooms = ids;
  rooms.resize(std::max<std::size_t>(1, (ids.size() + kRoom - 1) / kRoom) * kRoom, -1);
  io.list("micro_batches", rooms, {-1, StateIo::kAnyInteger.most});
  if (!io.reads()) return;
  rooms.erase(std::remove(rooms.begin(), rooms.end(), -1), rooms.end());
  ids = std::move(rooms);
}

}  // namespace

std::string describe_for_state(const ControllerConfig& config, const StatsShape& shape) {
  std::string out;
  const ModelConfig& model = config.model;
  line(out, "model.layers", model.layers);
  line(out, "model.experts", model.experts);
  line(out, "model.top_k", model.top_k);
  line(out, "model.score_space", name_of(model.score_space));
  line(out, "model.delay", model.delay);
  line(out, "lag", config.lag);
  for (const std::string& domain : model.domains) line(out, "model.domains", domain);
  for (const double target : model.targets) line(out, "model.targets", target);
  line(out, "metrics.ema", config.monitor.ema);
  line(out, "metrics.dead_fraction", config.monitor.dead_fraction);
  line(out, "metrics.dead_after", config.monitor.dead_after);
  line(out, "guard.enabled", config.guard.enabled);
  line(out, "metrics.trend_window", config.monitor.trend_window);
  line(out, "metrics.trends", config.monitor.trends);
  const HealthOptions& health = config.monitor.health;
  line(out, "health.dwell", health.dwell);
  line(out, "health.weak_specialization", health.weak_specialization);
  for (const AlertRule& rule : health.alerts) line(out, "health.alerts", rule.metric);
  for (const auto& [metric, band] : health.bands) line(out, "health.bands", metric);
  for (const Phase& phase : health.phases) {
    line(out, "health.phases.until", phase.until);
    for (const auto& [metric, band] : phase.bands) line(out, "health.phases.bands", metric);
  }
  line(out, "collected sums of a layer", static_cast<std::int64_t>(shape.flat_size()));
  for (const Actuator which : kActuators) {
    const ActuatorConfig& actuator = config.actuator(which);
    const std::string where(name_of(which));
    line(out, where + ".policy", actuator.policy);
    line(out, where + ".scope", name_of(actuator.scope));
    line(out, where + ".limits.cadence", actuator.limits.cadence);
    for (const auto& option : actuator.options.values()) {
      const std::string key = where + ".options." + option.first;
      std::visit([&](const auto& v) { line(out, key, v); }, option.second);
    }
  }
  return out;
}

std::string describe_for_ranks(const ControllerConfig& config, const StatsShape& shape) {
  std::string out = describe_for_state(config, shape);
  line(out, "mode", name_of(config.mode));
  for (const Actuator which : kActuators) {
    describe_limits(out, std::string(name_of(which)), config.actuator(which));
  }
  describe_supervision(out, config.safety);
  describe_guard(out, config.guard);
  return out;
}

std::string Controller::Loop::save() {
  if (pending_ && pending_->in_flight()) {
    try {
      pending_->finish(reduction_, payload_);
      arrived_ = true;
    } catch (const ReductionError&) {
      // The next step says so, when it sends this rank's share again.
    }
  }
  StateIo out;
  exchange(out);
  return out.bytes();
}

std::unique_ptr<Controller::Loop> Controller::Loop::loaded(std::string_view state) const {
  StateIo in(state);
  auto fresh = std::make_unique<Loop>(config_, registry_);
  fresh->exchange(in);
  in.finish();
  fresh->reduction_ = reduction_;
  fresh->exchange_ = exchange_;
  fresh->ranks_checked_ = ranks_checked_;
  fresh->log_ = log_;
  return fresh;
}

void Controller::Loop::exchange(StateIo& io) {
  std::string saved = description_;
  io.text("config", saved);
  if (saved != description_) throw StateError(first_difference(saved, description_));
  io.value("steps", steps_);
  for (const auto& layer : layers_) {
    io.value("frozen", layer->frozen);
    exchange_sums(io, "recorded", layer->intake);
    exchange_ids(io, layer->seen);
    layer->monitor->exchange(io);
    if (layer->guard) layer->guard->exchange(io);
    for (auto& loop : layer->loops) {
      if (loop) loop->exchange(io);
    }
  }
  for (auto& loop : model_loops_) {
    if (loop) loop->exchange(io);
  }
  if (config_.guard.enabled) io.values("before_guards", before_guards_);
  if (!pending_) return;
  pending_->exchange(io);
  io.value("arrived", arrived_);
  payload_.exchange(io, "sums", arrived_);
}

}  // namespace moectl
