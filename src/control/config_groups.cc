// What of a config holds for which layers, and from which step on.
#include "control/config_groups.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "base/names.h"

namespace moectl {
namespace {

void override(ControllerConfig& config, const SectionOverrides& own) {
  for (const Actuator which : kActuators) {
    if (const auto& section = section_of(own, which)) config.actuator(which) = *section;
  }
  if (own.guard) config.guard = *own.guard;
  if (own.safety) config.safety = *own.safety;
}

bool holds(const std::vector<int>& ids, int layer) {
  return std::find(ids.begin(), ids.end(), layer) != ids.end();
}

}  // namespace

ControllerConfig config_at(const ControllerConfig& config, std::int64_t step) {
  // A timeline may have thousands of entries: none is copied, and of each section only what holds in the end. All members
  // have a name here, so that a new one does not build until someone has come by.
  const auto& [mode, lag, model, metrics, monitor, expert_bias, aux_loss_weight, router_temperature, safety,
               guard, log, collect, layers, timeline] = config;
  const ActuatorConfig* actuators[kActuatorCount];
  for (std::size_t a = 0; a < kActuatorCount; ++a) actuators[a] = &config.actuator(kActuators[a]);
  const SafetyOptions* safety_now = &safety;
  const GuardOptions* guard_now = &guard;
  for (const TimelineEntry& entry : timeline) {
    if (entry.from > step) continue;
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      if (const auto& section = section_of(entry, kActuators[a])) actuators[a] = &*section;
    }
    if (entry.safety) safety_now = &*entry.safety;
    if (entry.guard) guard_now = &*entry.guard;
  }
  ControllerConfig now;
  now.mode = mode;
  now.lag = lag;
  now.model = model;
  now.metrics = metrics;
  now.monitor = monitor;
  for (std::size_t a = 0; a < kActuatorCount; ++a) now.actuator(kActuators[a]) = *actuators[a];
  now.safety = *safety_now;
  now.guard = *guard_now;
  now.log = log;
  now.collect = collect;
  return now;
}

ControllerConfig config_from(const ControllerConfig& config, std::int64_t step) {
  ControllerConfig now = config_at(config, step);
  now.layers = config.layers;
  for (const TimelineEntry& entry : config.timeline) {
    if (entry.from > step) now.timeline.push_back(entry);
  }
  return now;
}

LayerSettings settings_of(const ControllerConfig& common, const LayerGroup& group) {
  LayerSettings settings{group.ids, common};
  ModelConfig& model = settings.config.model;
  model.layers = static_cast<int>(group.ids.size());
  if (group.experts != -1) model.experts = group.experts;
  if (group.top_k != -1) model.top_k = group.top_k;
  if (group.experts != -1 || !group.targets.empty()) model.targets = group.targets;
  if (group.experts != -1 || !group.placement.empty()) settings.config.metrics.placement = group.placement;
  override(settings.config, group);
  return settings;
}

std::vector<LayerSettings> layer_settings(const ControllerConfig& config, std::int64_t step) {
  const ControllerConfig common = config_at(config, step);
  if (config.layers.empty()) return {{layer_ids(config), common}};
  std::vector<LayerSettings> all;
  all.reserve(config.layers.size());
  for (const LayerGroup& group : config.layers) all.push_back(settings_of(common, group));
  return all;
}

bool frozen_after(const TimelineEntry& entry, int layer, bool frozen) {
  return !holds(entry.thaw, layer) && (frozen || holds(entry.freeze, layer));
}

bool frozen_at(const ControllerConfig& config, int layer, std::int64_t step) {
  bool frozen = false;
  for (const LayerGroup& group : config.layers) frozen |= group.frozen && holds(group.ids, layer);
  for (const TimelineEntry& entry : config.timeline) {
    if (entry.from <= step) frozen = frozen_after(entry, layer, frozen);
  }
  return frozen;
}

std::vector<int> layer_ids(const ControllerConfig& config) {
  std::vector<int> ids;
  for (const LayerGroup& group : config.layers) ids.insert(ids.end(), group.ids.begin(), group.ids.end());
  if (config.layers.empty()) {
    ids.resize(static_cast<std::size_t>(config.model.layers));
    std::iota(ids.begin(), ids.end(), 0);
  }
  return ids;
}

std::string_view name_of(GainSchedule::Shape shape) {
  return Names<GainSchedule::Shape, 3>{{"linear", "cosine", "step"}}[shape];
}

double gain_at(const std::optional<GainSchedule>& schedule, std::int64_t step) {
  if (!schedule || step < schedule->from) return 1;
  if (step >= schedule->until || schedule->shape == GainSchedule::Shape::kStep) return schedule->last;
  const double x =
      static_cast<double>(step - schedule->from) / static_cast<double>(schedule->until - schedule->from);
  const double left =
      schedule->shape == GainSchedule::Shape::kLinear ? 1 - x : (1 + std::cos(std::numbers::pi * x)) / 2;
  return schedule->last + (1 - schedule->last) * left;
}

}  // namespace moectl
