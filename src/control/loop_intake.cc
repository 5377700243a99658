// What is recorded, and how it becomes the sums of a step over all ranks.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "control/config_keys.h"
#include "control/loop.h"
#include "measure/offence.h"

namespace moectl {

void Controller::Loop::set_reduction(Reduction reduction) {
  reduction_ = std::move(reduction);
  ranks_checked_ = false;
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
  const auto bias_of = [this](int l) { return layers_[static_cast<std::size_t>(l)]->biases().applied(); };
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
  if (layer != -1) layer_at(layer);  // a notice of a layer that is not there would be in no record
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
    const ModelConfig& model = at.group->config.model;
    at.values_outside |= !batch.top_values.empty() && sums.valid() && model.delay == 0 &&
                         model.score_space == ScoreSpace::kProbability &&
                         !leaves_probabilities(batch, model.top_k, at.biases().applied());
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
    for (const auto& layer : layers_) {
      layer->stats.clear();
      layer->wiring = WiringSeen::kNothing;
    }
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
    payload.put_wiring(l, layers_[l]->biases().news(layers_[l]->choices.seen()));
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
    layers_[l]->wiring = payload.wiring(l);
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
    // What the wiring explains says nothing of the scores.
    if (layer->choices.seen() >= WiringSeen::kNoOther) layer->steps_outside = 0;
    if (std::exchange(layer->values_outside, false) && layer->choices.seen() < WiringSeen::kNoOther)
      layer->steps_outside = std::min(layer->steps_outside + 1, Layer::kSurelyOutside);
    layer->choices.end_step();
  }
}

void Controller::Loop::use_local_sums(const StepInfo& info) {
  say_offences();
  for (const auto& layer : layers_) {
    std::swap(layer->stats, layer->intake);
    layer->wiring = layer->biases().news(layer->choices.seen());
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

std::size_t Controller::Loop::sums_of_layers() const {
  std::size_t sums = 0;
  for (const auto& layer : layers_) sums += layer->group->shape.flat_size();
  return sums;
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

}  // namespace moectl
