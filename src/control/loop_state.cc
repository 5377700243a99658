// Saving and loading a running loop, and the part of the config that a saved state belongs to.
#include <array>
#include <cmath>
#include <cstdio>
#include <string>
#include <variant>

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
  line(out, key, std::string_view(value ? "true" : "false"));  // a char* would convert to bool
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
      // The next step sends this rank's sums again and throws then.
    }
  }
  StateWriter out;
  save_to(out);
  return out.finish();
}

std::unique_ptr<Controller::Loop> Controller::Loop::loaded(std::string_view state) const {
  StateReader in(state);
  auto fresh = std::make_unique<Loop>(config_, registry_);
  fresh->load_from(in);
  in.finish();
  fresh->reduction_ = reduction_;
  fresh->exchange_ = exchange_;
  fresh->ranks_checked_ = ranks_checked_;
  fresh->log_ = log_;
  return fresh;
}

void Controller::Loop::save_to(StateWriter& out) const {
  out.put("config", description_);
  out.put("steps", steps_);
  for (const auto& layer : layers_) {
    out.put("frozen", std::int64_t{layer->frozen ? 1 : 0});
    save_sums(out, "recorded", layer->intake);
    out.put("micro_batch_count", static_cast<std::int64_t>(layer->seen.size()));
    out.put("micro_batches", layer->seen);
    layer->monitor->save(out);
    if (layer->guard) layer->guard->save(out);
    for (const auto& loop : layer->loops) {
      if (loop) loop->save(out);
    }
  }
  for (const auto& loop : model_loops_) {
    if (loop) loop->save(out);
  }
  if (config_.guard.enabled) out.put("before_guards", before_guards_);
  if (!pending_) return;
  pending_->save(out);
  out.put("landed", std::int64_t{arrived_ ? 1 : 0});
  if (arrived_) out.put("sums", payload_.all());
}

void Controller::Loop::load_from(StateReader& in) {
  const std::string saved = in.get_text("config");
  if (saved != description_) throw StateError(first_difference(saved, description_));
  steps_ = in.get_int("steps");
  for (const auto& layer : layers_) {
    layer->frozen = in.get_int("frozen") != 0;
    load_sums(in, "recorded", layer->intake);
    const std::int64_t micro_batches = in.get_int("micro_batch_count");
    if (micro_batches < 0 || micro_batches > kMaxMicroBatches) {
      throw StateError("micro_batch_count: " + std::to_string(micro_batches) + ": must be in [0, " +
                       std::to_string(kMaxMicroBatches) + "]");
    }
    layer->seen.resize(static_cast<std::size_t>(micro_batches));
    in.get("micro_batches", layer->seen);
    layer->monitor->load(in);
    if (layer->guard) layer->guard->load(in);
    for (auto& loop : layer->loops) {
      if (loop) loop->load(in);
    }
  }
  for (auto& loop : model_loops_) {
    if (loop) loop->load(in);
  }
  if (config_.guard.enabled) {
    in.get("before_guards", before_guards_);
    for (const double value : before_guards_) {
      if (!std::isfinite(value)) throw StateError("before_guards: a saved value is not finite");
    }
  }
  if (!pending_) return;
  pending_->load(in);
  arrived_ = in.get_int("landed") != 0;
  if (arrived_) in.get("sums", payload_.all());
}

}  // namespace moectl
