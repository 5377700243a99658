#include "control/loop.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "control/config_keys.h"

namespace moectl {
namespace {

StepInfo usable(StepInfo info) {
  if (info.loss && !std::isfinite(*info.loss)) info.loss.reset();
  if (info.gradient_norm && !std::isfinite(*info.gradient_norm)) info.gradient_norm.reset();
  return info;
}

bool acts(GuardState state) {
  return state != GuardState::kWatching && state != GuardState::kCooldown;
}

// For metrics that fall as balance gets worse, the worst layer has the smallest value.
bool falls_with_imbalance(const MetricField& field) {
  return field.value == &Metrics::entropy || field.value == &Metrics::entropy_normalized ||
         field.value == &Metrics::effective_experts || field.value == &Metrics::min_load;
}

}  // namespace

Controller::Loop::Layer::Layer(const ControllerConfig& config, const PolicyRegistry& registry, int index) {
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    if (config.actuator(kActuators[a]).scope == Scope::kLayer) {
      loops[a].emplace(kActuators[a], config, registry, index);
    }
  }
}

Controller::Loop::Loop(ControllerConfig config, const PolicyRegistry& registry)
    : config_(std::move(config)), registry_(registry), payload_(0, 0, 0) {
  validate(config_, registry_);
  const ModelConfig& model = config_.model;
  const auto layers = static_cast<std::size_t>(model.layers);
  const auto experts = static_cast<std::size_t>(model.experts);
  for (int l = 0; l < model.layers; ++l) layers_.push_back(std::make_unique<Layer>(config_, registry_, l));
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    const ActuatorConfig& own = config_.actuator(kActuators[a]);
    if (own.scope == Scope::kModel) model_loops_[a].emplace(kActuators[a], config_, registry_, -1);
    initial_[a].assign(kActuators[a] == Actuator::kExpertBias ? experts : 1, own.initial);
  }

  load_targets_.emplace(model.experts, model.targets);
  shape_ = {.experts = model.experts, .top_k = model.top_k, .needs = config_.collect};
  shape_.needs.domains = static_cast<int>(model.domains.size());
  for_each_actuator([this](ActuatorLoop& loop, std::size_t, int) { shape_.needs |= loop.needs(); });
  if (config_.guard.enabled) shape_.needs |= LayerGuard::needs();
  for_each_actuator(
      [&](ActuatorLoop& loop, std::size_t, int layer) { loop.make_windows(shape_, layer < 0 ? layers : 1); });
  for (const auto& layer : layers_) {
    layer->intake = RoutingStats(shape_);
    layer->stats = RoutingStats(shape_);
    layer->monitor.emplace(shape_, config_.monitor, metrics_options(config_));
    if (config_.guard.enabled) layer->guard.emplace(config_.guard, shape_, *load_targets_);
  }
  description_ = describe_for_state(config_, shape_);
  measurer_.emplace(shape_, metrics_options(config_));
  targets_ = model.targets;
  if (targets_.empty()) targets_.assign(experts, 1.0 / static_cast<double>(experts));
  mixture_.assign(model.domains.size(), 0);
  notices_ = Notices(layers);
  payload_ = Payload(layers, shape_.flat_size(), model.domains.size());
  if (config_.lag == 1) pending_.emplace(payload_);
  if (config_.mode != Mode::kOff) layer_reports_.resize(layers);
}

const StepReport& Controller::Loop::step(const StepInfo& info) {
  check_mixture(info);
  if (steps_ == 0 || logs(steps_ - 1)) notices_.clear();
  if (config_.mode == Mode::kOff) {
    info_ = usable(info);
  } else {
    reduce(info);
    measure();
    watch();
    propose();
    guard();
    limit();
  }
  take_what_was_said();
  log();
  return report_;
}

void Controller::Loop::check_choices(int layer, const ChoiceSample& sample) {
  Layer& at = layer_at(layer);
  const auto n = static_cast<std::size_t>(shape_.experts), k = static_cast<std::size_t>(shape_.top_k);
  const std::size_t tokens = sample.experts.size() / k;
  if (sample.experts.size() != tokens * k || sample.biased_scores.size() != tokens * n ||
      (!sample.scores.empty() && sample.scores.size() != tokens * n)) {
    throw std::invalid_argument(
        "choice sample: must hold tokens × top_k experts and tokens × experts scores");
  }
  if (config_.mode == Mode::kOff || config_.model.delay > 0) return;
  const auto bias_of = [this](int l) { return in_force(Actuator::kExpertBias, l); };
  const std::lock_guard lock(at.mutex);
  const std::string text =
      at.choices.observe(judge_choices(sample, shape_.top_k, layer, config_.model.layers, bias_of), steps_);
  if (!text.empty()) say(NoticeKind::kWiring, layer, text);
}

void Controller::Loop::say(NoticeKind kind, int layer, std::string_view text) {
  const std::lock_guard lock(said_mutex_);
  said_.push_back({kind, layer, std::string(text)});
}

void Controller::Loop::take_what_was_said() {
  const std::lock_guard lock(said_mutex_);
  for (const Said& said : said_) notices_.add(said.kind, said.layer, steps_, {said.text});
  said_.clear();
}

// Replaces this rank's sums by the sums over all ranks. Nothing else changes until the collective has succeeded, so a
// step whose reduction throws can be tried again.
void Controller::Loop::reduce(const StepInfo& info) {
  check_ranks();
  if (pending_) {
    use_previous_sums(info);
  } else if (reduction_) {
    pack(payload_, info);
    payload_.reduce(reduction_);
    unpack(payload_);
    clear_intake();
  } else {
    use_local_sums(info);
  }
}

// With `lag: 1`: starts the reduction of this step's sums, and decides on the sums of the step before.
void Controller::Loop::use_previous_sums(const StepInfo& info) {
  if (pending_->loaded()) {
    pending_->finish(reduction_, payload_);
    arrived_ = true;
  }
  pack(pending_->local_sums(), info);
  pending_->start(reduction_, exchange_);
  if (std::exchange(arrived_, false)) {
    unpack(payload_);
  } else {
    for (const auto& layer : layers_) layer->stats.clear();
    info_ = StepInfo{};
  }
  clear_intake();
}

void Controller::Loop::check_ranks() {
  if (!reduction_ || ranks_checked_) return;
  check_same_everywhere(reduction_, describe_for_ranks(config_, shape_));
  ranks_checked_ = true;
}

void Controller::Loop::pack(Payload& payload, const StepInfo& info) const {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const std::span<const std::int64_t> own = layers_[l]->intake.flat();
    std::copy(own.begin(), own.end(), payload.layer(l).begin());
  }
  payload.put(info, actuation_hash());
}

void Controller::Loop::unpack(Payload& payload) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const std::span<const std::int64_t> total = payload.layer(l);
    std::copy(total.begin(), total.end(), layers_[l]->stats.flat().begin());
  }
  info_ = payload.info(mixture_);
}

void Controller::Loop::clear_intake() {
  for (const auto& layer : layers_) {
    layer->intake.clear();
    layer->seen.clear();
  }
}

void Controller::Loop::use_local_sums(const StepInfo& info) {
  for (const auto& layer : layers_) std::swap(layer->stats, layer->intake);
  clear_intake();
  info_ = usable(info);
  const bool negative =
      std::any_of(info.next_mixture.begin(), info.next_mixture.end(), [](std::int64_t n) { return n < 0; });
  info_.next_mixture = {};
  if (!info.next_mixture.empty() && !negative) {
    std::copy(info.next_mixture.begin(), info.next_mixture.end(), mixture_.begin());
    info_.next_mixture = mixture_;
  }
}

// Computes the metrics of the step, and at decisions those of the windows. Invalid sums are left out of the windows, so
// that one bad record does not spoil the steps around it.
void Controller::Loop::measure() {
  for (const auto& layer : layers_) {
    layer->valid = layer->stats.valid();
    layer->has_data = layer->stats.tokens() > 0;
    layer->metrics = Metrics{};
    if (layer->valid && layer->has_data) {
      measurer_->measure(layer->stats, layer->metrics);
      layer->gap_width = layer->stats.next_gap_width().value_or(layer->gap_width);
    }
    layer->intake.set_gap_width(layer->gap_width);
  }
  for_each_actuator([this](ActuatorLoop& loop, std::size_t, int only) {
    if (!loop.has_windows()) return;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (only >= 0 && l != static_cast<std::size_t>(only)) continue;
      const std::size_t window = only < 0 ? l : 0;
      if (layers_[l]->valid && layers_[l]->has_data) loop.window(window) += layers_[l]->stats;
      if (!loop.due(steps_)) continue;
      loop.window_metrics(window) = Metrics{};
      // Sums that overflowed, or were loaded so, hold the decision.
      if (loop.window(window).tokens() > 0 && loop.window(window).valid()) {
        measurer_->measure(loop.window(window), loop.window_metrics(window));
      }
    }
  });
}

// Updates values with history: smoothed loads, trends, health. Windows take them from their last step.
void Controller::Loop::watch() {
  for (const auto& layer : layers_) {
    if (layer->valid && layer->has_data) {
      layer->monitor->observe(layer->stats, layer->metrics, info_.loss);
    } else {
      layer->monitor->observe_nothing();
    }
  }
  for_each_actuator([this](ActuatorLoop& loop, std::size_t, int only) {
    if (!loop.has_windows() || !loop.due(steps_)) return;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (only >= 0 && l != static_cast<std::size_t>(only)) continue;
      copy_history(layers_[l]->metrics, loop.window_metrics(only < 0 ? l : 0));
    }
  });
}

// Asks every policy that has valid data and a decision due, also while its actuator is held, so that its averages stay
// current.
void Controller::Loop::propose() {
  for_each_actuator([this](ActuatorLoop& loop, std::size_t actuator, int layer) {
    loop.begin();
    if (!loop.due(steps_)) return;
    const DecisionInputs seen = inputs(loop, actuator, layer);
    if (!seen.valid || !seen.has_data) return;
    loop.propose({.step = steps_,
                  .layer = layer,
                  .stats = *seen.stats,
                  .metrics = *seen.metrics,
                  .worst = *seen.worst,
                  .monitor = *seen.monitor,
                  .targets = targets_,
                  .info = info_});
  });
}

bool Controller::Loop::guard_acts() const {
  return std::any_of(layers_.begin(), layers_.end(),
                     [](const auto& layer) { return layer->guard && acts(layer->guard->report().state); });
}

// Where a layer's guard intervenes, its wish takes the place of the proposal. An actuator of the whole model, a scalar,
// goes where the layer wants it that asks for most: guards only ever raise scalars.
void Controller::Loop::guard() {
  if (!config_.guard.enabled) return;
  if (!guard_acts()) {
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      if (model_loops_[a]) before_guards_[a] = model_loops_[a]->applied()[0];
    }
  }
  for (const auto& layer : layers_) {
    if (!layer->valid || !layer->has_data || layer->frozen) continue;
    const bool acting = acts(layer->guard->report().state);
    std::span<const double> in_force[kActuatorCount];
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      if (layer->loops[a]) {
        in_force[a] = layer->loops[a]->applied();
      } else {
        in_force[a] = acting ? model_loops_[a]->applied() : std::span<const double>(&before_guards_[a], 1);
      }
    }
    layer->guard->observe(steps_, layer->stats, layer->metrics, in_force);
  }
  for_each_actuator([this](ActuatorLoop& loop, std::size_t actuator, int only) {
    const Limits& limits = config_.actuator(kActuators[actuator]).limits;
    const auto overridden_by = [&](const Layer& layer, std::span<double> wanted) {
      return layer.guard->overrides(kActuators[actuator], limits, loop.applied(), wanted);
    };
    if (only >= 0) {
      if (overridden_by(*layers_[static_cast<std::size_t>(only)], loop.guarded())) loop.take_over();
      return;
    }
    bool any = false;
    double most = 0, wanted = 0;
    for (const auto& layer : layers_) {
      if (!overridden_by(*layer, {&wanted, 1})) continue;
      most = any ? std::max(most, wanted) : wanted;
      any = true;
    }
    if (!any) return;
    loop.guarded()[0] = most;
    loop.take_over();
  });
}

// What the policy requires and the sums of its decision lack: said once it has lasted.
StatsNeeds Controller::Loop::missing(ActuatorLoop& loop, std::size_t actuator, int layer) {
  const StatsNeeds required = loop.required();
  StatsNeeds missing;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    if (layer >= 0 && l != static_cast<std::size_t>(layer)) continue;
    const RoutingStats& stats = *layer_inputs(loop, *layers_[l], layer < 0 ? l : 0).stats;
    if (stats.tokens() > 0) missing |= missing_in(stats, required);
  }
  const ActuatorConfig& own = config_.actuator(kActuators[actuator]);
  InputWatch& watch =
      layer < 0 ? model_inputs_watch_[actuator] : layers_[static_cast<std::size_t>(layer)]->inputs[actuator];
  if (watch.observe(missing, own.limits.cadence, config_.monitor.health.dwell)) {
    notices_.add(
        NoticeKind::kMissingInput, layer, steps_,
        {name_of(kActuators[actuator]), ": policy ", own.policy, " needs ", input_name(missing),
         ", which are not recorded for all tokens: held. `moectl check` lists what a config needs from the "
         "router"});
  }
  return missing;
}

void Controller::Loop::limit() {
  for_each_actuator([this](ActuatorLoop& loop, std::size_t actuator, int layer) {
    const DecisionInputs seen = inputs(loop, actuator, layer);
    const bool decides = seen.valid && seen.has_data && loop.due(steps_);
    const StatsNeeds lacking = decides ? missing(loop, actuator, layer) : StatsNeeds{};
    (layer < 0 ? model_missing_ : layers_[static_cast<std::size_t>(layer)]->missing)[actuator] = lacking;
    loop.limit({.step = steps_,
                .valid = seen.valid,
                .has_data = seen.has_data,
                .skipped = info_.skipped,
                .frozen = seen.frozen,
                .at_cadence = loop.due(steps_),
                .missing_input = lacking != StatsNeeds{} && !loop.taken_over(),
                .loss = info_.loss,
                .drop_rate = seen.drop_rate});
  });
}

void Controller::Loop::log() {
  for (std::size_t l = 0; l < layer_reports_.size(); ++l) {
    const Layer& layer = *layers_[l];
    LayerReport& out = layer_reports_[l];
    out.layer = static_cast<int>(l);
    out.stats = &layer.stats;
    out.metrics = &layer.metrics;
    if (layer.guard) out.guard = layer.guard->report();
    out.monitor = &*layer.monitor;
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      if (!layer.loops[a]) continue;
      out.actuators[a] = layer.loops[a]->report();
      out.actuators[a].missing = layer.missing[a];
    }
  }
  if (config_.mode != Mode::kOff) {
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      if (!model_loops_[a]) continue;
      report_.model[a] = model_loops_[a]->report();
      report_.model[a].missing = model_missing_[a];
    }
  }
  report_.step = steps_++;
  report_.info = info_;
  report_.layers = layer_reports_;
  report_.targets = &*load_targets_;
  report_.notices = notices_.all();
  if (log_ && config_.mode != Mode::kOff && logs(report_.step)) log_(report_);
}

Controller::Loop::Layer& Controller::Loop::layer_at(int layer) const {
  if (layer < 0 || layer >= config_.model.layers) {
    throw std::invalid_argument("layer: " + std::to_string(layer) + ": must be in [0, " +
                                std::to_string(config_.model.layers) + ")");
  }
  return *layers_[static_cast<std::size_t>(layer)];
}

void Controller::Loop::check_mixture(const StepInfo& info) const {
  if (!info.next_mixture.empty() && info.next_mixture.size() != mixture_.size()) {
    throw std::invalid_argument("next_mixture: " + std::to_string(info.next_mixture.size()) +
                                " values: must be one for each of the " + std::to_string(mixture_.size()) +
                                " domains of the model");
  }
}

void Controller::Loop::set_reduction(Reduction reduction) {
  if (reduction && shape_.needs.margin_rows) {
    throw std::invalid_argument(
        "reduction: given: a policy wants every token's margins in one process (quantile_bias: form: exact); "
        "over ranks use its histogram form");
  }
  reduction_ = std::move(reduction);
  ranks_checked_ = false;
}

std::span<const double> Controller::Loop::in_force(Actuator actuator, int layer) const {
  const Layer& own = layer_at(layer);
  const auto a = static_cast<std::size_t>(actuator);
  if (config_.mode != Mode::kActive) return initial_[a];
  return own.loops[a] ? own.loops[a]->applied() : model_loops_[a]->applied();
}

// Hash of the values in force, the step and the frozen layers: a rank with another hash has diverged.
std::uint64_t Controller::Loop::actuation_hash() const {
  auto hash = static_cast<std::uint64_t>(steps_);
  for (const auto& layer : layers_) {
    hash = hash * 31 + (layer->frozen ? 1 : 0);
    for (const auto& loop : layer->loops) {
      if (loop) hash = hash_values(loop->applied(), hash);
    }
  }
  for (const auto& loop : model_loops_) {
    if (loop) hash = hash_values(loop->applied(), hash);
  }
  return hash;
}

template <class Visit>
void Controller::Loop::for_each_actuator(Visit&& visit) {
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (auto& loop = layers_[l]->loops[a]) visit(*loop, a, static_cast<int>(l));
    }
    if (model_loops_[a]) visit(*model_loops_[a], a, -1);
  }
}

Controller::Loop::DecisionInputs Controller::Loop::inputs(ActuatorLoop& loop, std::size_t actuator,
                                                          int layer) {
  return layer < 0 ? model_inputs(loop, actuator)
                   : layer_inputs(loop, *layers_[static_cast<std::size_t>(layer)], 0);
}

Controller::Loop::DecisionInputs Controller::Loop::layer_inputs(ActuatorLoop& loop, Layer& layer,
                                                                std::size_t window) {
  const bool windowed = loop.has_windows() && loop.due(steps_);
  const RoutingStats& stats = windowed ? loop.window(window) : layer.stats;
  const Metrics& metrics = windowed ? loop.window_metrics(window) : layer.metrics;
  return {.valid = layer.valid && (!windowed || stats.valid()),
          .has_data = stats.tokens() > 0,
          .frozen = layer.frozen,
          .stats = &stats,
          .metrics = &metrics,
          .worst = &metrics,
          .monitor = &*layer.monitor,
          .drop_rate = layer.metrics.drop_rate};
}

// The model's actuators use the mean and the worst over layers of each metric. Bad data in one layer holds them. They
// are frozen when all layers are frozen.
Controller::Loop::DecisionInputs Controller::Loop::model_inputs(ActuatorLoop& loop, std::size_t actuator) {
  Metrics& mean = model_mean_[actuator];
  Metrics& worst = model_worst_[actuator];
  DecisionInputs all = layer_inputs(loop, *layers_[0], 0);
  std::optional<double> drop_sum;
  double drops = 0;
  for (std::size_t l = 1; l < layers_.size(); ++l) {
    const DecisionInputs one = layer_inputs(loop, *layers_[l], l);
    all.valid &= one.valid;
    all.has_data |= one.has_data;
    all.frozen &= one.frozen;
  }
  for (const auto& layer : layers_) {
    if (!layer->metrics.drop_rate) continue;
    drop_sum = drop_sum.value_or(0) + *layer->metrics.drop_rate;
    drops += 1;
  }
  all.drop_rate = drop_sum ? std::optional<double>(*drop_sum / drops) : std::nullopt;
  all.metrics = &mean;
  all.worst = &worst;
  if (!loop.due(steps_) || !all.valid) return all;
  for (const MetricField& field : metric_fields()) {
    const bool falls = falls_with_imbalance(field);
    double sum = 0, count = 0, extreme = 0;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const Metrics::Value value = (*layer_inputs(loop, *layers_[l], l).metrics).*field.value;
      if (!value) continue;
      sum += *value;
      extreme = count == 0 ? *value : falls ? std::min(extreme, *value) : std::max(extreme, *value);
      count += 1;
    }
    mean.*field.value = count > 0 ? Metrics::Value(sum / count) : std::nullopt;
    worst.*field.value = count > 0 ? Metrics::Value(extreme) : std::nullopt;
  }
  return all;
}

}  // namespace moectl
