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

// One expert has no other to take tokens from.
bool checks_response(const ControllerConfig& config) {
  return config.safety.responsiveness && config.model.experts > 1;
}

bool environment_holds() {
  const char* const value = std::getenv("MOECTL_HOLD");
  return value != nullptr && *value != '\0' && std::string_view(value) != "0";
}

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
    if (of.config.actuator(kActuators[a]).scope == Scope::kLayer) loops[a].emplace(make_loop(a, registry));
  }
  intake = RoutingStats(of.shape);
  stats = RoutingStats(of.shape);
  monitor.emplace(of.shape, of.config.monitor, metrics_options(of.config));
  if (of.config.guard.enabled) guard.emplace(of.config.guard, of.shape, of.load_targets);
  if (checks_response(of.config)) response.emplace(of.config, id);
}

ActuatorLoop Controller::Loop::Layer::make_loop(std::size_t actuator, const PolicyRegistry& registry) const {
  ActuatorLoop loop(kActuators[actuator], group->config, registry, id);
  loop.make_windows({&group->shape, 1});
  return loop;
}

Controller::Loop::Loop(ControllerConfig config, const PolicyRegistry& registry, std::int64_t step)
    : config_(std::move(config)), registry_(registry), payload_({}, 0) {
  validate(config_, registry_);
  held_ = environment_holds();
  for (const TimelineEntry& entry : config_.timeline) {
    if (entry.from <= step) settings_from_ = entry.from;
  }
  std::vector<LayerSettings> settings = layer_settings(config_, step);
  std::vector<StatsNeeds> needs(settings.size());
  const auto add_needs = [&](std::int64_t from) {
    const std::vector<LayerSettings> then = layer_settings(config_, from);
    for (std::size_t g = 0; g < then.size(); ++g) needs[g] |= shape_of(then[g].config, registry_).needs;
  };
  add_needs(0);
  for (const TimelineEntry& entry : config_.timeline) add_needs(entry.from);
  // What serves the whole model is fed by every layer that has none of its own.
  StatsNeeds common;
  for (const StatsNeeds& of_group : needs) common |= of_group;
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    if (config_.actuator(kActuators[a]).scope == Scope::kModel) needs.assign(needs.size(), common);
  }
  std::vector<StatsShape> shapes;
  for (std::size_t g = 0; g < settings.size(); ++g) {
    const std::vector<int> ids = settings[g].ids;
    const bool frozen = settings[g].frozen;
    groups_.push_back(std::make_unique<Group>(std::move(settings[g]), registry_));
    Group& group = *groups_.back();
    group.shape.needs = needs[g];
    group.measurer.emplace(group.shape, metrics_options(group.config));
    group.description = describe_for_state(group.config, group.shape);
    for (const int id : ids) {
      layers_.push_back(std::make_unique<Layer>(group, registry_, layers_.size(), id));
      layers_.back()->frozen = frozen;
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
  start_from_files();
  mixture_.assign(config_.model.domains.size(), 0);
  notices_ = Notices(layers_.size());
  std::vector<std::size_t> sizes;
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
    if (fresh) file->second = read_biases(initial.file);
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
  if (actuator == Actuator::kExpertBias && at.response) {
    at.response.emplace(config, at.id);
    at.response_told = false;
  }
  if (at.guard) at.guard.emplace(config.guard, at.group->shape, at.group->load_targets);
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
  const StatsShape& shape = at.group->shape;
  const auto n = static_cast<std::size_t>(shape.experts), k = static_cast<std::size_t>(shape.top_k);
  const std::size_t tokens = sample.experts.size() / k;
  if (sample.experts.size() != tokens * k || sample.biased_scores.size() != tokens * n ||
      (!sample.scores.empty() && sample.scores.size() != tokens * n)) {
    throw std::invalid_argument(
        "choice sample: must hold tokens × top_k experts and tokens × experts scores");
  }
  if (config_.mode == Mode::kOff || config_.model.delay > 0) return;
  const auto bias_of = [this](int l) {
    return layers_[static_cast<std::size_t>(l)]
        ->loops[static_cast<std::size_t>(Actuator::kExpertBias)]
        ->applied();
  };
  const std::lock_guard lock(at.mutex);
  WiringVerdict verdict = judge_choices(sample, shape.top_k, static_cast<int>(at.index),
                                        static_cast<int>(layers_.size()), bias_of);
  if (verdict.other_layer >= 0) {
    verdict.other_layer = layers_[static_cast<std::size_t>(verdict.other_layer)]->id;
  }
  const std::string text = at.choices.observe(verdict, steps_);
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
    say_offences();
    hold_if_some_failed();
    unpack(payload_);
    clear_intake();
  } else {
    use_local_sums(info);
  }
  if (!reduction_) host_holds_ = held_;
}

void Controller::Loop::record(int layer, std::int64_t micro_batch, const RoutingBatch& batch) {
  Layer& at = layer_at(layer);
  record(layer, micro_batch, micro_batch < 0 ? 0 : fingerprint_of(batch), [&](RoutingStats& sums) {
    if (micro_batch < 0) at.repeats.observe(batch, at.group->shape.top_k);
    sums.add(batch);
    at.uncollected_sequences |=
        !at.group->shape.needs.sequences && (batch.sequence_length > 0 || !batch.sequence_ids.empty());
  });
}

void Controller::Loop::record_foreign(int layer, std::int64_t micro_batch,
                                      const std::function<void(RoutingStats&)>& add) {
  Layer& at = layer_at(layer);
  record(layer, micro_batch, 0, [&](RoutingStats& sums) {
    at.backup = sums;
    try {
      add(sums);
    } catch (...) {
      std::swap(sums, at.backup);
      throw;
    }
  });
}

void Controller::Loop::refuse_repeat(int layer, std::int64_t micro_batch) {
  throw std::invalid_argument(
      "record: layer " + std::to_string(layer) + ", micro_batch " + std::to_string(micro_batch) +
      ": two records with different experts came under this id since the last step: a "
      "repeat must be the same record (recomputation); give each micro-batch of a step "
      "an id of its own");
}

// With `lag: 1`: starts the reduction of this step's sums, and decides on the sums of the step before.
void Controller::Loop::use_previous_sums(const StepInfo& info) {
  if (pending_->loaded()) {
    pending_->finish(reduction_, payload_);
    arrived_ = true;
  }
  if (arrived_) hold_if_some_failed();
  pack(pending_->local_sums(), info);
  pending_->start(reduction_, exchange_);
  say_offences();
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
  check_same_everywhere(reduction_, describe_for_ranks(config_, sums_of_layers()));
  ranks_checked_ = true;
}

void Controller::Loop::pack(Payload& payload, const StepInfo& info) const {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    payload.put(l, layers_[l]->intake.flat());
    payload.put_miswired(l, layers_[l]->choices.miswired(steps_));
  }
  bool failed = false;
  for (const auto& layer : layers_) {
    for (const auto& loop : layer->loops) failed |= loop && loop->failed();
  }
  for (const auto& loop : model_loops_) failed |= loop && loop->failed();
  payload.put(info, actuation_hash(), failed, held_);
}

void Controller::Loop::unpack(Payload& payload) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const std::span<const std::int64_t> total = payload.layer(l);
    RoutingStats& stats = layers_[l]->stats;
    std::copy(total.begin(), total.end(), stats.flat().begin());
    if (!payload.in_range(l)) {  // a sum may have wrapped around, and back into its range
      stats.set_scalar(RoutingStats::kInvalidRecords, std::max<std::int64_t>(1, stats.invalid_records()));
    }
    layers_[l]->miswired = payload.miswired(l);
  }
  say_who_holds(payload);
  info_ = payload.info(mixture_);
}

// Ranks must do the same, so all hold where one does.
void Controller::Loop::say_who_holds(const Payload& payload) {
  const bool some = payload.held() > 0;
  if (some && !host_holds_ && payload.held() < payload.ranks()) {
    notices_.add(NoticeKind::kHold, -1, steps_,
                 {Number(payload.held()).text(), " of ", Number(payload.ranks()).text(),
                  " ranks are held by hold() or by MOECTL_HOLD in their environment: all ranks hold"});
  }
  host_holds_ = some;
}

// Policies' memories may now differ between ranks, so no rank may ask one again until a common state is loaded. All go
// back to what was in force before the decision that failed: the same values.
void Controller::Loop::hold_if_some_failed() {
  if (ranks_differ_ || !payload_.some_failed()) return;
  ranks_differ_ = true;
  // What a rank made of a probe is not what the others made of it.
  for (const auto& layer : layers_) {
    if (layer->response) layer->response->restart();
  }
  const std::size_t decisions = pending_ ? 2 : 1;  // since the hash in these sums
  for_each_actuator([&](ActuatorLoop& loop, std::size_t, int) { loop.undo(decisions); });
  notices_.add(
      NoticeKind::kPolicyFailed, -1, steps_,
      {"a policy failed on some of the ranks: all ranks hold the values in force before it until one "
       "state is loaded on all of them"});
}

void Controller::Loop::say_offences() {
  for (const auto& one : layers_) {
    Layer& layer = *one;
    const Offence& offence = layer.intake.offence();
    layer.told_before = std::exchange(layer.told, !offence.empty());
    if (layer.told) notices_.add(NoticeKind::kInvalid, layer.id, steps_, {offence.words()});
  }
}

void Controller::Loop::clear_intake() {
  for (const auto& layer : layers_) {
    layer->intake.clear();
    layer->seen.clear();
    layer->fingerprints.clear();
    layer->repeats.end_step();
  }
}

void Controller::Loop::use_local_sums(const StepInfo& info) {
  say_offences();
  for (const auto& layer : layers_) {
    std::swap(layer->stats, layer->intake);
    layer->miswired = layer->choices.miswired(steps_);
  }
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
    if (layer->response) watch_response(*layer);
  }
  for_each_actuator([this](ActuatorLoop& loop, std::size_t, int only) {
    if (!loop.has_windows() || !loop.due(steps_)) return;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (only >= 0 && l != static_cast<std::size_t>(only)) continue;
      copy_history(layers_[l]->metrics, loop.window_metrics(only < 0 ? l : 0));
    }
  });
}

void Controller::Loop::watch_response(Layer& layer) {
  ResponseCheck& check = *layer.response;
  const bool applies = config_.mode == Mode::kActive && !layer.frozen && !host_holds_;
  if (applies && layer.miswired) {
    check.forget();
    layer.response_told = false;
    return;
  }
  // Without assignments no load is known: a record may hold tokens that chose no expert.
  check.observe(applies && layer.metrics.max_load ? &layer.stats : nullptr, layer.metrics.load_cv.value_or(0),
                floor_of(layer.metrics).cv.value_or(0),
                layer.loops[static_cast<std::size_t>(Actuator::kExpertBias)]->applied());
  if (!applies) return;
  const Responsiveness now = check.report();
  const bool silent = now.state == Response::kUnresponsive;
  if (silent == layer.response_told) return;
  if (!silent && now.state != Response::kAnswers) return;
  layer.response_told = silent;
  const Number gain(*now.gain), error(*now.error);
  if (!silent) {
    notices_.add(
        NoticeKind::kUnresponsive, layer.id, steps_,
        {"the load answers again (gain ", gain.text(), " ± ", error.text(), "): the policy goes on"});
  } else if (*now.gain + 3 * *now.error < 0) {
    notices_.add(
        NoticeKind::kUnresponsive, layer.id, steps_,
        {"the load goes the other way (gain ", gain.text(), " ± ", error.text(),
         "): is the bias subtracted from the scores? The biases are held where the load last answered"});
  } else {
    notices_.add(NoticeKind::kUnresponsive, layer.id, steps_,
                 {"the load does not answer (gain ", gain.text(), " ± ", error.text(),
                  "): does the router add this layer's bias to the scores that top-k compares? Are routes "
                  "replayed or masked? Held where the load last answered"});
  }
}

std::span<const double> Controller::Loop::probe_of(std::size_t actuator, int layer) const {
  if (kActuators[actuator] != Actuator::kExpertBias) return {};
  const auto& check = layers_[static_cast<std::size_t>(layer)]->response;
  return check ? check->offset() : std::span<const double>();
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
                  .info = info_},
                 probe_of(actuator, layer), notices_);
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
         ", which are not recorded for all tokens: held. `moectl check` lists what a config needs from the "
         "router"});
  }
  return missing;
}

void Controller::Loop::limit() {
  const bool many_ranks = reduction_ || exchange_;
  for_each_actuator([&](ActuatorLoop& loop, std::size_t actuator, int layer) {
    if (many_ranks) loop.remember();
    if (ranks_differ_) return loop.hold_ranks();
    const DecisionInputs seen = inputs(loop, actuator, layer);
    const bool decides = seen.valid && seen.has_data && loop.due(steps_);
    const StatsNeeds lacking = decides ? missing(loop, actuator, layer) : StatsNeeds{};
    (layer < 0 ? model_missing_ : layers_[static_cast<std::size_t>(layer)]->missing)[actuator] = lacking;
    const bool biases = kActuators[actuator] == Actuator::kExpertBias;
    std::optional<ResponseCheck>* check =
        biases ? &layers_[static_cast<std::size_t>(layer)]->response : nullptr;
    loop.limit({.step = steps_,
                .valid = seen.valid,
                .has_data = seen.has_data,
                .skipped = info_.skipped,
                .frozen = seen.frozen,
                .host_hold = host_holds_,
                .miswired = check != nullptr && *check && layers_[static_cast<std::size_t>(layer)]->miswired,
                .at_cadence = loop.due(steps_),
                .missing_input = lacking != StatsNeeds{} && !loop.taken_over(),
                .loss = info_.loss,
                .drop_rate = seen.drop_rate},
               check != nullptr && *check ? &**check : nullptr, notices_);
  });
}

void Controller::Loop::log() {
  for (std::size_t l = 0; l < layer_reports_.size(); ++l) {
    const Layer& layer = *layers_[l];
    LayerReport& out = layer_reports_[l];
    out.layer = layer.id;
    out.targets = &layer.group->load_targets;
    out.stats = &layer.stats;
    out.metrics = &layer.metrics;
    if (layer.guard) out.guard = layer.guard->report();
    out.monitor = &*layer.monitor;
    const bool checked = layer.response && config_.mode == Mode::kActive && !layer.frozen && !host_holds_;
    out.responsiveness = !checked         ? Responsiveness{}
                         : layer.miswired ? Responsiveness{.state = Response::kUnresponsive}
                                          : layer.response->report();
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

std::size_t Controller::Loop::sums_of_layers() const {
  std::size_t sums = 0;
  for (const auto& layer : layers_) sums += layer->group->shape.flat_size();
  return sums;
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

void Controller::Loop::set_reduction(Reduction reduction) {
  const auto has_rows = [](const auto& group) { return group->shape.needs.margin_rows; };
  if (reduction && std::any_of(groups_.begin(), groups_.end(), has_rows)) {
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
  return own.loops[a] ? own.loops[a]->applied() : model_loops_[a]->applied();
}

std::vector<double> Controller::Loop::deployment_bias(int layer) const {
  const Layer& at = layer_at(layer);
  const auto a = static_cast<std::size_t>(Actuator::kExpertBias);
  return at.loops[a]->deployment(probe_of(a, static_cast<int>(at.index)),
                                 at.group->config.expert_bias.limits);
}

// Hash of the values in force, the step and the frozen layers: a rank with another hash has diverged.
std::uint64_t Controller::Loop::actuation_hash() const {
  auto hash = static_cast<std::uint64_t>(steps_);
  for (const auto& layer : layers_) {
    hash = hash * 31 + (layer->frozen ? 1 : 0);
    for (const auto& loop : layer->loops) {
      if (loop) hash = hash_values(loop->applied(), hash) + (loop->failed() ? 1 : 0);
    }
  }
  for (const auto& loop : model_loops_) {
    if (loop) hash = hash_values(loop->applied(), hash) + (loop->failed() ? 1 : 0);
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
