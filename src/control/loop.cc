#include "control/loop.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <utility>

#include "base/foreign.h"
#include "control/config_groups.h"
#include "control/config_keys.h"
#include "measure/offence.h"
#include "moectl/bias_file.h"

namespace moectl {
namespace {

bool acts(GuardState state) {
  return state != GuardState::kWatching && state != GuardState::kCooldown;
}

// For metrics that fall as balance gets worse, the worst layer has the smallest value.
bool falls_with_imbalance(const MetricField& field) {
  return field.value == &Metrics::entropy || field.value == &Metrics::entropy_normalized ||
         field.value == &Metrics::effective_experts || field.value == &Metrics::min_load ||
         field.value == &Metrics::minority_share || field.value == &Metrics::balancedness ||
         field.value == &Metrics::load_p5 || field.value == &Metrics::load_p25 ||
         field.value == &Metrics::load_p50;
}

}  // namespace

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
    measure_churn();
  }
  take_what_was_said();
  log();
  return report_;
}

// Computes the metrics of the step, and at decisions those of the windows. Invalid sums are left out of the windows, so
// that one bad record does not spoil the steps around it.
void Controller::Loop::measure() {
  for (const auto& layer : layers_) {
    layer->valid = layer->stats.valid();
    if (layer->valid && layer->group->shape.needs.split_sequences > 0) {
      layer->stats.join_sequences();
      layer->valid = layer->stats.valid();
    }
    layer->has_data = layer->stats.tokens() > 0;
    layer->metrics = Metrics{};
    if (layer->valid && layer->has_data) {
      layer->group->measurer->measure(layer->stats, layer->metrics);
      layer->gap_width = layer->stats.next_gap_width().value_or(layer->gap_width);
    }
    layer->intake.set_gap_width(layer->gap_width);
    layer->stats.set_routed_under(layer->biases_then(steps_, layer->group->config.delay()));
    layer->remember_biases(steps_);
  }
  say_why_invalid();
  compare_with_config();
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
        layers_[l]->group->measurer->measure(loop.window(window), loop.window_metrics(window));
      }
    }
  });
}

// Names the first offence of sums that cannot be used, as far as this rank knows it and has not said it.
void Controller::Loop::say_why_invalid() {
  for (const auto& one : layers_) {
    const Layer& layer = *one;
    if (layer.valid || (pending_ ? layer.told_before : layer.told)) continue;
    const Offence offence = first_offence(layer.stats);
    notices_.add(
        NoticeKind::kInvalid, layer.id, steps_,
        {offence.empty()
             ? "invalid records of another rank, which names the first offence, or counted on a device"
             : offence.words()});
  }
}

// Says once what the config states and the data contradict.
void Controller::Loop::compare_with_config() {
  if (!sequences_said_) {
    for (const auto& layer : layers_) sequences_said_ |= layer->uncollected_sequences;
    if (sequences_said_) {
      notices_.add(
          NoticeKind::kConfig, -1, steps_,
          {"records name their sequences, which nothing collects: with collect: {sequences: true} the "
           "sampling floor is known"});
    }
  }
  for (const auto& layer : layers_) {
    if (!split_said_ && layer->stats.tokens_beyond_split() > 0) {
      split_said_ = true;
      notices_.add(
          NoticeKind::kConfig, -1, steps_,
          {"model.split_sequences is ",
           Number(std::int64_t{layer->group->config.model.split_sequences}).text(),
           ", and a sequence came with an id that is not below it: the sampling floor is not known"});
    }
    if (layer->steps_outside == Layer::kSurelyOutside && !std::exchange(scores_said_, true)) {
      notices_.add(
          NoticeKind::kConfig, layer->id, steps_,
          {"the values by which experts were chosen, less the biases in force, are no probabilities, and "
           "model.score_space says so: is the bias added to logits (then say score_space: logit), or "
           "does the router add other biases than bias(layer)?"});
    }
    if (!layer->repeats.is_news()) continue;
    notices_.add(
        NoticeKind::kConfig, layer->id, steps_,
        {"the same experts were recorded twice in several steps, without a micro_batch: a forward pass "
         "that activation checkpointing repeats counts once only if record() is given the micro_batch"});
  }
  std::size_t begin = 0;
  for (std::size_t g = 0; g < groups_.size(); ++g) {
    const Group& group = *groups_[g];
    const auto size = static_cast<std::size_t>(group.config.model.layers);
    comparisons_[g].observe(
        group.config.model, group.targets, size,
        [&](std::size_t i) {
          const Layer& layer = *layers_[begin + i];
          return ConfigComparison::Layer{layer.id, layer.valid && layer.has_data ? &layer.stats : nullptr};
        },
        steps_, notices_);
    begin += size;
  }
}

// Updates values with history: smoothed loads, trends, health. Windows take them from their last step.
void Controller::Loop::watch() {
  for (const auto& layer : layers_) {
    if (layer->valid && layer->has_data) {
      layer->monitor->observe(layer->stats, layer->metrics, info_.loss);
    } else {
      layer->monitor->observe_nothing();
    }
    if (layer->biases().checks_load()) {
      layer->biases().watch_load(applies(*layer), layer->wiring, layer->choices.told(), layer->stats,
                                 layer->metrics, steps_, notices_);
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

// Whether what is decided for a layer comes into force.
bool Controller::Loop::applies(const Layer& layer) const {
  return config_.mode == Mode::kActive && !layer.frozen && !host_holds_;
}

// Asks every policy that has valid data and a decision due, also while its actuator is held, so that its averages stay
// current.
void Controller::Loop::propose() {
  for_each_actuator([this](ActuatorLoop& loop, std::size_t actuator, int layer) {
    loop.begin();
    if (!loop.due(steps_) || ranks_differ_) return;
    const DecisionInputs seen = inputs(loop, actuator, layer);
    if (!seen.valid || !seen.has_data) return;
    loop.propose({.step = steps_,
                  .layer = layer < 0 ? -1 : layers_[static_cast<std::size_t>(layer)]->id,
                  .stats = *seen.stats,
                  .metrics = *seen.metrics,
                  .worst = *seen.worst,
                  .monitor = *seen.monitor,
                  .targets = layers_[static_cast<std::size_t>(std::max(layer, 0))]->group->targets,
                  .info = info_,
                  .probe = loop.probe()},
                 notices_);
  });
}

bool Controller::Loop::has_guards() const {
  return std::any_of(layers_.begin(), layers_.end(),
                     [](const auto& layer) { return layer->guard.has_value(); });
}

bool Controller::Loop::guard_acts() const {
  return std::any_of(layers_.begin(), layers_.end(),
                     [](const auto& layer) { return layer->guard && acts(layer->guard->report().state); });
}

// Where a layer's guard intervenes, its wish takes the place of the proposal. An actuator of the whole model, a scalar,
// goes where the layer wants it that asks for most: guards only ever raise scalars.
void Controller::Loop::guard() {
  if (!has_guards()) return;
  if (!guard_acts()) {
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      if (model_loops_[a]) before_guards_[a] = model_loops_[a]->applied()[0];
    }
  }
  for (const auto& layer : layers_) {
    if (!layer->guard || !layer->valid || !layer->has_data || layer->frozen) continue;
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
    const auto overridden_by = [&](const Layer& layer, std::span<double> wanted) {
      if (!layer.guard) return false;
      const ControllerConfig& config =
          only < 0 ? model_config_ : layers_[static_cast<std::size_t>(only)]->group->config;
      const Limits& limits = config.actuator(kActuators[actuator]).limits;
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
  const Layer* const one = layer < 0 ? nullptr : layers_[static_cast<std::size_t>(layer)].get();
  const ControllerConfig& config = one == nullptr ? model_config_ : one->group->config;
  const ActuatorConfig& own = config.actuator(kActuators[actuator]);
  InputWatch& watch =
      layer < 0 ? model_inputs_watch_[actuator] : layers_[static_cast<std::size_t>(layer)]->inputs[actuator];
  if (watch.observe(missing, own.limits.cadence, config_.monitor.health.dwell)) {
    notices_.add(
        NoticeKind::kMissingInput, one == nullptr ? -1 : one->id, steps_,
        {name_of(kActuators[actuator]), ": policy ", own.policy, " needs ", input_name(missing),
         (", which are not recorded for all tokens: held. `moectl check` lists what a config needs from the "
          "router")});
  }
  return missing;
}

// ln N: of a layer, or the mean over all.
double Controller::Loop::largest_entropy(int layer) const {
  if (layer >= 0) return std::log(layers_[static_cast<std::size_t>(layer)]->group->config.model.experts);
  double sum = 0;
  for (const auto& one : layers_) sum += std::log(one->group->config.model.experts);
  return sum / static_cast<double>(layers_.size());
}

void Controller::Loop::limit() {
  const bool many_ranks = reduction_ || exchange_;
  for (const auto& layer : layers_) {
    if (layer->move.empty()) continue;
    const std::span<const double> before = layer->biases().applied();
    std::copy(before.begin(), before.end(), layer->move.begin());
  }
  for_each_actuator([&](ActuatorLoop& loop, std::size_t actuator, int layer) {
    if (many_ranks) loop.remember();
    if (ranks_differ_) return loop.hold_ranks();
    const DecisionInputs seen = inputs(loop, actuator, layer);
    const bool decides = seen.valid && seen.has_data && loop.due(steps_);
    const StatsNeeds lacking = decides ? missing(loop, actuator, layer) : StatsNeeds{};
    (layer < 0 ? model_missing_ : layers_[static_cast<std::size_t>(layer)]->missing)[actuator] = lacking;
    if (loop.checks_entropy() && loop.due(steps_)) {
      const bool applies = config_.mode == Mode::kActive && !seen.frozen && !host_holds_;
      const Metrics::Value entropy =
          seen.valid && seen.has_data ? seen.metrics->token_entropy : Metrics::Value();
      std::optional<ActuatorLoop::EntropySeen> found;
      if (entropy) found = {*entropy, largest_entropy(layer)};
      loop.watch_entropy(applies, found, steps_, notices_);
    }
    loop.limit({.step = steps_,
                .valid = seen.valid,
                .has_data = seen.has_data,
                .skipped = info_.skipped,
                .frozen = seen.frozen,
                .host_hold = host_holds_,
                .at_cadence = loop.due(steps_),
                .missing_input = lacking != StatsNeeds{} && !loop.taken_over(),
                .loss = info_.loss,
                .drop_rate = seen.drop_rate},
               notices_);
  });
}

void Controller::Loop::measure_churn() {
  for (const auto& layer : layers_) {
    if (layer->move.empty()) continue;
    const std::span<const double> after = layer->biases().applied();
    for (std::size_t i = 0; i < after.size(); ++i) layer->move[i] = after[i] - layer->move[i];
    if (layer->metrics.max_load)
      layer->metrics.churn = estimate_churn(layer->stats, layer->move, churn_scratch_);
  }
}

void Controller::Loop::log() {
  for (std::size_t l = 0; l < layer_reports_.size(); ++l) {
    Layer& layer = *layers_[l];
    LayerReport& out = layer_reports_[l];
    out.layer = layer.id;
    out.targets = &layer.group->load_targets;
    out.stats = &layer.stats;
    out.metrics = &layer.metrics;
    if (layer.guard) out.guard = layer.guard->report();
    out.monitor = &*layer.monitor;
    const bool checked = layer.biases().checks_load() && applies(layer);
    out.responsiveness = checked ? layer.biases().load_response() : Responsiveness{};
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
  report_.notices = notices_.all();
  if (!log_ || config_.mode == Mode::kOff || !logs(report_.step)) return;
  call_held([this] { log_(report_); },
            [this](const char* message) {
              if (std::exchange(log_failed_, true)) return;
              notices_.add(NoticeKind::kLog, -1, report_.step, {"the log callback threw: ", message});
              report_.notices = notices_.all();
            });
}

Controller::Loop::Layer& Controller::Loop::layer_at(int layer) const {
  const auto id = static_cast<std::size_t>(layer);
  if (layer >= 0 && id < index_of_id_.size() && index_of_id_[id] >= 0) {
    return *layers_[static_cast<std::size_t>(index_of_id_[id])];
  }
  if (config_.layers.empty()) {
    throw std::invalid_argument("layer: " + std::to_string(layer) + ": must be in [0, " +
                                std::to_string(config_.model.layers) + ")");
  }
  throw std::invalid_argument("layer: " + std::to_string(layer) +
                              ": must be the id of a layer of the config's groups");
}

void Controller::Loop::check_mixture(const StepInfo& info) const {
  if (!info.next_mixture.empty() && info.next_mixture.size() != mixture_.size()) {
    throw std::invalid_argument("next_mixture: " + std::to_string(info.next_mixture.size()) +
                                " values: must be one for each of the " + std::to_string(mixture_.size()) +
                                " domains of the model");
  }
}

std::span<const double> Controller::Loop::in_force(Actuator actuator, int layer) const {
  const Layer& own = layer_at(layer);
  const auto a = static_cast<std::size_t>(actuator);
  return own.loops[a] ? own.loops[a]->applied() : model_loops_[a]->applied();
}

std::vector<double> Controller::Loop::deployment_bias(int layer) const {
  const ActuatorLoop& biases = layer_at(layer).biases();
  std::vector<double> values(biases.applied().size());
  biases.deployment(values);
  return values;
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
