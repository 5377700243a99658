// What a loop is made of: groups of equal layers, their actuators, and the values that they begin with.
#include <map>
#include <stdexcept>
#include <utility>

#include "base/host_hold.h"
#include "base/input_limits.h"
#include "control/config_groups.h"
#include "control/config_keys.h"
#include "control/loop.h"
#include "moectl/bias_file.h"

namespace moectl {
namespace {

// The sums of a layer are those of all its settings to come, so that a payload keeps its size over the timeline.
StatsShape shape_of(const ControllerConfig& config, const PolicyRegistry& registry) {
  StatsShape shape{.experts = config.model.experts, .top_k = config.model.top_k, .needs = config.collect};
  shape.needs.domains = static_cast<int>(config.model.domains.size());
  shape.needs.split_sequences = config.model.split_sequences;
  shape.needs.sequences |= config.model.split_sequences > 0;
  for (const Actuator which : kActuators) {
    const int layer = config.actuator(which).scope == Scope::kModel ? -1 : 0;
    shape.needs |= ActuatorLoop(which, config, registry, layer).needs();
  }
  if (config.guard.enabled) shape.needs |= LayerGuard::needs();
  return shape;
}

// Throws unless the values may come into force.
std::span<const double> checked(Actuator actuator, const Limits& limits, std::size_t size, int layer,
                                std::span<const double> values) {
  const std::string where = "adopt: layer " + std::to_string(layer) + ": " + std::string(name_of(actuator));
  if (values.size() != size) {
    throw std::invalid_argument(where + ": " + std::to_string(values.size()) + " values: must be " +
                                std::to_string(size));
  }
  for (std::size_t i = 0; i < size; ++i) {
    if (values[i] >= limits.min && values[i] <= limits.max) continue;
    throw std::invalid_argument(where + '[' + std::to_string(i) + "]: " + shown(values[i]) +
                                ": must be within limits.min and limits.max, " + shown(limits.min) + " to " +
                                shown(limits.max));
  }
  return values;
}

}  // namespace

Controller::Loop::Group::Group(LayerSettings of, const PolicyRegistry& registry)
    : config(std::move(of.config)),
      shape(shape_of(config, registry)),
      load_targets(config.model.experts, config.model.targets),
      targets(config.model.targets) {
  if (targets.empty()) {
    const auto experts = static_cast<std::size_t>(config.model.experts);
    targets.assign(experts, 1.0 / static_cast<double>(experts));
  }
}

Controller::Loop::Layer::Layer(Group& of, const PolicyRegistry& registry, std::size_t at, int own_id)
    : group(&of), index(at), id(own_id) {
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    if (of.config.actuator(kActuators[a]).scope != Scope::kLayer) continue;
    loops[a].emplace(kActuators[a], of.config, registry, id);
    loops[a]->make_windows({&of.shape, 1});
  }
  intake = RoutingStats(of.shape);
  stats = RoutingStats(of.shape);
  monitor.emplace(of.shape, of.config.monitor, metrics_options(of.config));
  if (of.config.guard.enabled) guard.emplace(of.config.guard, of.shape, of.load_targets);
  if (of.config.metrics.details) move.resize(static_cast<std::size_t>(of.shape.experts));
}

std::span<const double> Controller::Loop::Layer::biases_then(std::int64_t step,
                                                             std::int64_t steps_ago) const {
  const std::span<const double> now = loops[static_cast<std::size_t>(Actuator::kExpertBias)]->applied();
  const std::int64_t delay = group->config.delay();
  if (steps_ago == 0 || past_biases.empty()) return now;
  const auto row = static_cast<std::size_t>((step + delay - steps_ago) % delay);
  return std::span(past_biases).subspan(row * now.size(), now.size());
}

void Controller::Loop::Layer::remember_biases(std::int64_t step) {
  if (past_biases.empty()) return;
  const std::span<const double> now = biases_then(step, 0);
  const auto row = static_cast<std::size_t>(step % group->config.delay());
  std::copy(now.begin(), now.end(), past_biases.begin() + static_cast<std::ptrdiff_t>(row * now.size()));
}

void Controller::Loop::Layer::forget_biases() {
  const bool kept = group->shape.needs.required_bins || group->shape.needs.required_local;
  const std::int64_t delay = kept ? group->config.delay() : 0;
  past_biases.resize(static_cast<std::size_t>(delay) * static_cast<std::size_t>(group->shape.experts));
  for (std::int64_t step = 0; step < delay; ++step) remember_biases(step);
}

Controller::Loop::Loop(ControllerConfig config, const PolicyRegistry& registry, std::int64_t step,
                       bool goes_on)
    : config_(std::move(config)), registry_(registry), payload_({}, 0) {
  validate(config_, registry_);
  held_ = environment_holds();
  for (const TimelineEntry& entry : config_.timeline) {
    if (entry.from <= step) settings_from_ = entry.from;
  }
  std::vector<LayerSettings> settings = layer_settings(config_, step);
  std::vector<StatsNeeds> needs(settings.size());
  std::vector<std::vector<bool>> decided(settings.size());
  std::vector<std::int64_t> starts = {0};
  for (const TimelineEntry& entry : config_.timeline) starts.push_back(entry.from);
  for (const std::int64_t from : starts) {
    const std::vector<LayerSettings> then = layer_settings(config_, from);
    for (std::size_t g = 0; g < then.size(); ++g) {
      const ControllerConfig& own = then[g].config;
      needs[g] |= shape_of(own, registry_).needs;
      decided[g].push_back(own.expert_bias.policy != "fixed" || own.guard.enabled);
    }
  }
  // What serves the whole model is fed by every layer that has none of its own.
  StatsNeeds common;
  for (const StatsNeeds& of_group : needs) common |= of_group;
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    if (config_.actuator(kActuators[a]).scope == Scope::kModel) needs.assign(needs.size(), common);
  }
  double numbers = 0;
  for (std::size_t g = 0; g < settings.size(); ++g) {
    const ModelConfig& model = settings[g].config.model;
    const StatsShape shape{.experts = model.experts, .top_k = model.top_k, .needs = needs[g]};
    numbers += static_cast<double>(shape.flat_size()) * static_cast<double>(settings[g].ids.size());
  }
  if (numbers > static_cast<double>(kMostNumbers)) {
    throw ConfigError("model: " + shown(numbers) + " numbers in the sums of all layers: must be at most " +
                      shown(kMostNumbers) + ": fewer layers, experts, domains or needs of policies");
  }
  std::vector<StatsShape> shapes;
  for (std::size_t g = 0; g < settings.size(); ++g) {
    const std::vector<int> ids = settings[g].ids;
    groups_.push_back(std::make_unique<Group>(std::move(settings[g]), registry_));
    Group& group = *groups_.back();
    group.shape.needs = needs[g];
    group.measurer.emplace(group.shape, metrics_options(group.config));
    group.description = describe_for_state(group.config, group.shape);
    group.decided = std::move(decided[g]);
    for (const int id : ids) {
      layers_.push_back(std::make_unique<Layer>(group, registry_, layers_.size(), id));
      Layer& layer = *layers_.back();
      layer.frozen = frozen_at(config_, id, step);
      bool frozen = frozen_at(config_, id, 0);
      layer.ever_moves = group.decided[0] && !frozen;
      for (std::size_t e = 0; e < config_.timeline.size() && !layer.ever_moves; ++e) {
        frozen = frozen_after(config_.timeline[e], id, frozen);
        layer.ever_moves = group.decided[e + 1] && !frozen;
      }
      layer.ever_moves &= config_.mode == Mode::kActive;
      churn_scratch_.reserve(layers_.back()->move.size());  // a step allocates nothing
      shapes.push_back(group.shape);
    }
  }
  for (const auto& group : groups_)
    comparisons_.emplace_back(static_cast<std::size_t>(group->config.model.layers));
  ids_ = layer_ids(config_);
  for (const auto& layer : layers_) {
    const auto id = static_cast<std::size_t>(layer->id);
    if (index_of_id_.size() <= id) index_of_id_.resize(id + 1, -1);
    index_of_id_[id] = static_cast<std::int32_t>(layer->index);
  }
  model_config_ = config_at(config_, step);
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    if (model_config_.actuator(kActuators[a]).scope != Scope::kModel) continue;
    model_loops_[a].emplace(kActuators[a], model_config_, registry_, -1);
    model_loops_[a]->make_windows(shapes);
  }
  if (!goes_on) start_from_files();
  for (const auto& layer : layers_) layer->forget_biases();
  mixture_.assign(config_.model.domains.size(), 0);
  notices_ = Notices(layers_.size());
  std::vector<std::size_t> sizes;
  sizes.reserve(shapes.size());
  for (const StatsShape& shape : shapes) sizes.push_back(shape.flat_size());
  payload_ = Payload(sizes, config_.model.domains.size());
  if (config_.lag == 1) pending_.emplace(payload_);
  if (config_.mode != Mode::kOff) layer_reports_.resize(layers_.size());
}

// `initial:` of the biases as a list or a file.
void Controller::Loop::start_from_files() {
  std::map<std::string, LayerBiases> files;
  for (const auto& layer : layers_) {
    const Initial& initial = layer->group->config.expert_bias.initial;
    if (!initial.values.empty()) adopt(Actuator::kExpertBias, layer->id, initial.values);
    if (initial.file.empty()) continue;
    const auto [file, fresh] = files.try_emplace(initial.file);
    try {
      if (fresh) file->second = read_biases(initial.file);
    } catch (const ConfigError& error) {
      throw ConfigError("expert_bias.initial: " + std::string(error.what()));
    }
    const auto found = file->second.find(layer->id);
    if (found == file->second.end()) {
      throw ConfigError("expert_bias.initial: " + initial.file + ": must hold layer " +
                        std::to_string(layer->id));
    }
    try {
      adopt(Actuator::kExpertBias, layer->id, found->second);
    } catch (const std::invalid_argument& error) {
      throw ConfigError("expert_bias.initial: " + initial.file + ": " + error.what());
    }
  }
}

void Controller::Loop::adopt(Actuator actuator, int layer, std::span<const double> values) {
  const auto a = static_cast<std::size_t>(actuator);
  Layer& at = layer_at(layer);
  if (!at.loops[a]) {
    model_loops_[a]->adopt(checked(actuator, model_config_.actuator(actuator).limits, 1, layer, values),
                           model_config_, registry_);
    return;
  }
  const ControllerConfig& config = at.group->config;
  at.loops[a]->adopt(
      checked(actuator, config.actuator(actuator).limits, at.loops[a]->applied().size(), layer, values),
      config, registry_);
  // What was recorded in this step was routed under other biases.
  if (actuator == Actuator::kExpertBias) at.intake.drop_required();
  if (at.guard) at.guard.emplace(config.guard, at.group->shape, at.group->load_targets);
}

}  // namespace moectl
