// What of a running loop is saved, and what of a saved state another config can take over.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/fields.h"
#include "control/config_groups.h"
#include "control/loop.h"
#include "measure/saved_sums.h"

namespace moectl {
namespace {

// What stands first in a state.
struct Head {
  std::int64_t steps = 0, settings_from = 0;
  void exchange(StateIo& io) {
    io.value("steps", steps);
    io.value("settings_from", settings_from);
  }
};

// What stands first of a layer.
struct LayerHead {
  std::string config;
  bool frozen = false, by_host = false;
  void exchange(StateIo& io) {
    io.text("config", config);
    io.value("frozen", frozen);
    io.value("frozen_by_host", by_host);
  }
};

void exchange_pending(StateIo& io, PendingReduction& pending, bool& arrived, Payload& sums) {
  pending.exchange(io);
  io.value("arrived", arrived);
  sums.exchange(io, "sums", arrived);
}

using Fate = KeptPart::Fate;

/// The lines of `a` and `b` that differ, as pairs; a key that only one of them has with an empty line in the other.
std::vector<std::pair<std::string, std::string>> differences(const std::string& a, const std::string& b) {
  const auto lines_of = [](std::string_view text) {
    std::vector<std::pair<std::string, std::string>> lines;  // key, line
    while (!text.empty()) {
      const std::string_view line = text.substr(0, text.find('\n'));
      lines.emplace_back(line.substr(0, line.find(": ")), line);
      text.remove_prefix(std::min(text.size(), line.size() + 1));
    }
    return lines;
  };
  const auto left = lines_of(a), right = lines_of(b);
  const auto find = [](const auto& lines, const std::string& key) {
    const auto at =
        std::find_if(lines.begin(), lines.end(), [&](const auto& line) { return line.first == key; });
    return at == lines.end() ? std::string() : at->second;
  };
  std::vector<std::pair<std::string, std::string>> found;
  for (const auto& [key, line] : left) {
    if (const std::string other = find(right, key); other != line) found.emplace_back(line, other);
  }
  for (const auto& [key, line] : right) {
    if (find(left, key).empty()) found.emplace_back("", line);
  }
  return found;
}

// The message, as: config differs: saved with "model.experts: 16", this run has "model.experts: 8"
std::string first_difference(const std::string& saved, const std::string& own) {
  const auto all = differences(saved, own);
  if (all.empty()) return "config differs";
  const auto& [before, now] = all.front();
  return "config differs: saved with \"" + before + "\", this run has \"" + now +
         "\"; what fits can be taken over with Keep::what_fits";
}

/// What differs of the keys that begin with one of `keys`: "metrics.ema: 0.1, now 0.2".
std::string changes(const std::string& saved, const std::string& own,
                    std::initializer_list<std::string_view> keys) {
  const auto value_of = [](const std::string& line) {
    const std::size_t colon = line.find(": ");
    return line.empty()                 ? std::string("none")
           : colon == std::string::npos ? std::string("given")
                                        : line.substr(colon + 2);
  };
  std::string text;
  for (const auto& [before, now] : differences(saved, own)) {
    const std::string& line = before.empty() ? now : before;
    if (std::none_of(keys.begin(), keys.end(), [&](std::string_view key) { return line.starts_with(key); }))
      continue;
    text += (text.empty() ? "" : "; ") + line.substr(0, line.find(": ")) + ": " + value_of(before) +
            ", now " + value_of(now);
  }
  return text;
}

// The ids of micro-batches and the fingerprints of their records, -1 and 0 in rooms that are free. Hosts say how many
// there are, the config does not: up to kRoom the state has one length, and beyond it grows by as much.
void exchange_ids(StateIo& io, std::vector<std::int64_t>& ids, std::vector<std::uint64_t>& fingerprints) {
  constexpr std::size_t kRoom = 64;
  std::vector<std::int64_t> rooms = ids, prints(fingerprints.begin(), fingerprints.end());
  rooms.resize(std::max<std::size_t>(1, (ids.size() + kRoom - 1) / kRoom) * kRoom, -1);
  prints.resize(rooms.size(), 0);
  io.list("micro_batches", rooms, {-1, StateIo::kAnyInteger.most});
  io.list("fingerprints", prints, StateIo::kAnyInteger);
  if (!io.reads()) return;
  io.check(prints.size() == rooms.size(), "fingerprints", "be as many as micro-batches");
  ids.clear();
  fingerprints.clear();
  for (std::size_t i = 0; i < rooms.size(); ++i) {
    if (rooms[i] < 0) continue;
    ids.push_back(rooms[i]);
    fingerprints.push_back(static_cast<std::uint64_t>(prints[i]));
  }
}

std::string section_of(int layer) {
  return "layer " + std::to_string(layer);
}

}  // namespace

std::string Controller::Loop::save() {
  finish_pending();
  StateIo out;
  exchange(out);
  return out.bytes();
}

void Controller::Loop::finish_pending() {
  if (!pending_ || !pending_->in_flight()) return;
  try {
    pending_->finish(reduction_, payload_);
    arrived_ = true;
  } catch (const ReductionError&) {
    // The next step sends this rank's sums again and throws then.
  }
}

std::string Controller::Loop::save_layer(int layer) {
  Layer& at = layer_at(layer);
  finish_pending();
  StateIo out;
  Head{steps_, settings_from_}.exchange(out);
  out.section(section_of(at.id), [&](StateIo& io) { exchange_layer(io, at); });
  exchange_common(out);
  if (pending_) out.section("sums", [&](StateIo& io) { exchange_sums_of(io, at); });
  return out.bytes();
}

// With `lag: 1`: what was summed of the layer, and not yet decided on.
void Controller::Loop::exchange_sums_of(StateIo& io, const Layer& layer) {
  bool arrived = arrived_;
  io.value("arrived", arrived);
  payload_.exchange_layer(io, layer.index, arrived);
  arrived_ |= arrived;
}

// What is no state: it stays with the controller.
void Controller::Loop::take_over_from(const Loop& other) {
  reduction_ = other.reduction_;
  exchange_ = other.exchange_;
  ranks_checked_ = other.ranks_checked_;
  log_ = other.log_;
  log_failed_ = other.log_failed_;
  held_ = other.held_;
}

// What the host froze or thawed stays so; else the timeline decides.
void Controller::Loop::freeze_as(const Loop& other) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    if (other.frozen_by_host(*other.layers_[l])) layers_[l]->frozen = other.layers_[l]->frozen;
  }
}

// Of the timeline, the entries up to settings_from_ have taken place.
bool Controller::Loop::frozen_by_host(const Layer& layer) const {
  return layer.frozen != frozen_at(config_, layer.id, settings_from_);
}

namespace {

// The last step before a saved state: entries of the timeline that hold from the next step on have not taken place.
std::int64_t last_of(std::int64_t steps) {
  return std::max<std::int64_t>(0, steps - 1);
}

}  // namespace

std::unique_ptr<Controller::Loop> Controller::Loop::loaded(std::string_view state, Keep keep,
                                                           std::vector<KeptPart>& parts) const {
  StateIo in(state);
  StateIo peek = in;
  Head head;
  head.exchange(peek);
  auto fresh = std::make_unique<Loop>(config_, registry_,
                                      keep == Keep::everything ? head.settings_from : last_of(head.steps));
  if (keep == Keep::everything) {
    fresh->exchange(in);
    in.finish();
  } else {
    fresh->keep_what_fits(in, parts);
  }
  fresh->take_over_from(*this);
  return fresh;
}

std::unique_ptr<Controller::Loop> Controller::Loop::layer_loaded(int layer, std::string_view state, Keep keep,
                                                                 std::vector<KeptPart>& parts) {
  StateIo in(state);
  Head head;
  head.exchange(in);
  const std::string name = section_of(layer_at(layer).id);
  if (!in.find(name)) {
    throw StateError("state: must hold " + name + ", as save_layer(" + std::to_string(layer) + ") writes it");
  }
  std::vector<KeptPart> own;  // of the other layers: all stays
  const std::string before = save();
  auto fresh = std::make_unique<Loop>(config_, registry_,
                                      keep == Keep::everything ? head.settings_from : last_of(head.steps));
  fresh->keep_what_fits(StateIo(before), own);
  fresh->take_over_from(*this);
  fresh->steps_ = head.steps;
  fresh->freeze_as(*this);
  Layer& at = fresh->layer_at(layer);
  at.frozen = frozen_at(config_, at.id, fresh->settings_from_);  // the state knows what the host did
  if (keep == Keep::everything) {
    in.section(name, [&](StateIo& io) { fresh->exchange_layer(io, at); });
    fresh->exchange_common(in);
    if (fresh->pending_) in.section("sums", [&](StateIo& io) { fresh->exchange_sums_of(io, at); });
    in.finish();
    return fresh;
  }
  fresh->keep_layer(*in.find(name), at, parts);
  if (const auto common = in.find("model")) fresh->keep_common(*common, parts);
  if (fresh->pending_) {
    in.tried("sums", [&](StateIo& io) { fresh->exchange_sums_of(io, at); });
  }
  return fresh;
}

void Controller::Loop::exchange(StateIo& io) {
  Head head{steps_, settings_from_};
  head.exchange(io);
  steps_ = head.steps;
  settings_from_ = head.settings_from;
  std::vector<std::int64_t> ids(ids_.begin(), ids_.end());
  io.list("layers", ids);
  if (!std::equal(ids.begin(), ids.end(), ids_.begin(), ids_.end())) {
    const auto words = [](const auto& of) {
      return std::to_string(of.size()) + " layers" +
             (of.empty() ? "" : ", " + std::to_string(of.front()) + " to " + std::to_string(of.back()));
    };
    throw StateError("config differs: saved with " + words(ids) + ", this run has " + words(ids_) +
                     "; what fits can be taken over with Keep::what_fits");
  }
  for (const auto& layer : layers_) {
    io.section(section_of(layer->id), [&](StateIo& inner) { exchange_layer(inner, *layer); });
  }
  exchange_common(io);
  if (!pending_) return;
  io.section("pending", [&](StateIo& inner) { exchange_pending(inner, *pending_, arrived_, payload_); });
}

void Controller::Loop::exchange_layer(StateIo& io, Layer& layer) {
  const std::string& own = layer.group->description;
  LayerHead head{own, layer.frozen, frozen_by_host(layer)};
  head.exchange(io);
  if (head.config != own) throw StateError(first_difference(head.config, own));
  layer.frozen = head.frozen;
  io.section("intake", [&](StateIo& inner) { exchange_recorded(inner, layer); });
  io.section("watch", [&](StateIo& inner) { layer.monitor->exchange(inner); });
  if (layer.guard) io.section("guard", [&](StateIo& inner) { layer.guard->exchange(inner); });
  if (layer.biases().checks_load()) {
    io.section("responsiveness", [&](StateIo& inner) { layer.biases().exchange_load_check(inner); });
  }
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    if (!layer.loops[a]) continue;
    io.section(name_of(kActuators[a]), [&](StateIo& inner) { layer.loops[a]->exchange(inner); });
  }
  // For those who deploy from a saved state: it follows from the rest.
  std::vector<double> deployed = deployment_bias(layer.id);
  io.section("deployed", [&](StateIo& inner) { inner.values("values", deployed); });
}

void Controller::Loop::exchange_recorded(StateIo& io, Layer& layer) {
  io.value("gap_width", layer.gap_width, StateIo::kNotNegative);
  layer.intake.set_gap_width(layer.gap_width);
  if (!layer.past_biases.empty()) io.values("past_biases", layer.past_biases);
  exchange_sums(io, "recorded", layer.intake);
  exchange_ids(io, layer.seen, layer.fingerprints);
  layer.choices.exchange_seen(io);
}

// Of the whole model.
void Controller::Loop::exchange_common(StateIo& io) {
  if (!has_guards() && std::none_of(model_loops_.begin(), model_loops_.end(),
                                    [](const auto& loop) { return loop.has_value(); }))
    return;
  io.section("model", [&](StateIo& inner) {
    for (std::size_t a = 0; a < kActuatorCount; ++a) {
      if (!model_loops_[a]) continue;
      inner.section(name_of(kActuators[a]), [&](StateIo& own) { model_loops_[a]->exchange(own); });
    }
    if (has_guards()) inner.values("before_guards", before_guards_);
  });
}

// ---- Keep::what_fits ----

void Controller::Loop::keep_what_fits(const StateIo& state, std::vector<KeptPart>& parts) {
  StateIo in = state;
  Head head;
  head.exchange(in);
  steps_ = head.steps;
  std::vector<std::int64_t> ids;
  in.list("layers", ids);
  for (const auto& layer : layers_) {
    const auto section = in.find(section_of(layer->id));
    if (section) {
      keep_layer(*section, *layer, parts);
    } else {
      parts.push_back(
          {layer->id, "layer", Fate::kDropped, "not in the state: starts from its initial values"});
    }
  }
  for (const std::int64_t id : ids) {
    if (id < static_cast<std::int64_t>(index_of_id_.size()) &&
        index_of_id_[static_cast<std::size_t>(id)] >= 0)
      continue;
    parts.push_back({static_cast<int>(id), "layer", Fate::kDropped, "this run has no such layer"});
  }
  if (const auto common = in.find("model")) keep_common(*common, parts);
  if (!pending_) return;
  // All or nothing: what other ranks have of the same step must go with it.
  const std::string wrong = in.tried("pending", [&](StateIo& io) {
    PendingReduction& pending = pending_.emplace(payload_);
    bool arrived = false;
    Payload sums = payload_;
    exchange_pending(io, pending, arrived, sums);
    payload_ = std::move(sums);
    arrived_ = arrived;
  });
  if (wrong.empty()) return;
  pending_.emplace(payload_);
  parts.push_back({-1, "lag", Fate::kDropped, "the sums of the last step do not fit: the first step holds"});
}

void Controller::Loop::keep_common(const StateIo& in, std::vector<KeptPart>& parts) {
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    const auto section = in.find(name_of(kActuators[a]));
    if (!section) continue;
    if (model_loops_[a]) {
      keep_actuator(*section, *model_loops_[a], model_config_, kActuators[a], -1, "", parts);
    } else {
      // What served the whole model goes on in every layer.
      for (const auto& layer : layers_) {
        keep_actuator(*section, *layer->loops[a], layer->group->config, kActuators[a], layer->id, "", parts);
      }
    }
    if (model_loops_[a]) before_guards_[a] = model_loops_[a]->applied()[0];
  }
}

void Controller::Loop::keep_layer(StateIo in, Layer& layer, std::vector<KeptPart>& parts) {
  const std::string& own = layer.group->description;
  LayerHead head;
  head.exchange(in);
  const std::string& saved = head.config;
  // What the host had changed by freeze() holds again; else the config that holds now decides.
  if (head.by_host && head.frozen != layer.frozen) {
    layer.frozen = head.frozen;
    parts.push_back({layer.id, "frozen", Fate::kAdapted,
                     head.frozen ? "freeze() of the host holds the layer" : "the host has thawed the layer"});
  }
  const auto report = [&](const char* key, const std::string& wrong,
                          std::initializer_list<std::string_view> keys) {
    const std::string because = wrong.empty() ? "" : changes(saved, own, keys);
    parts.push_back(
        {layer.id, key, wrong.empty() ? Fate::kKept : Fate::kDropped, because.empty() ? wrong : because});
    return !wrong.empty();
  };
  const bool recorded_lost =
      report("recorded sums", in.tried("intake", [&](StateIo& io) { exchange_recorded(io, layer); }),
             {"model.", "collected sums", "collect."});
  if (recorded_lost) {
    layer.intake.clear();
    layer.seen.clear();
    layer.fingerprints.clear();
    layer.gap_width = 0;
    layer.intake.set_gap_width(0);
  }
  if (report("health", in.tried("watch", [&](StateIo& io) { layer.monitor->exchange(io); }),
             {"model.experts", "metrics.", "health", "collect."})) {
    layer.monitor.emplace(layer.group->shape, layer.group->config.monitor,
                          metrics_options(layer.group->config));
  }
  if (layer.guard && report("guard", in.tried("guard", [&](StateIo& io) { layer.guard->exchange(io); }),
                            {"model.experts", "guard"})) {
    layer.guard.emplace(layer.group->config.guard, layer.group->shape, layer.group->load_targets);
  }
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    const auto section = in.find(name_of(kActuators[a]));
    if (!section) continue;
    if (layer.loops[a]) {
      keep_actuator(*section, *layer.loops[a], layer.group->config, kActuators[a], layer.id, saved, parts);
    } else if (model_loops_[a]) {
      keep_actuator(*section, *model_loops_[a], model_config_, kActuators[a], -1, saved, parts);
    }
  }
  if (recorded_lost) layer.forget_biases();
  // What the load last answered to is no longer known where biases were changed.
  ActuatorLoop& biases = layer.biases();
  if (biases.checks_load() &&
      report("safety.responsiveness",
             in.tried("responsiveness", [&](StateIo& io) { biases.exchange_load_check(io); }),
             {"model.", "safety.responsiveness", "expert_bias.limits"})) {
    biases.start_checks(layer.group->config);
  }
}

void Controller::Loop::keep_actuator(const StateIo& section, ActuatorLoop& loop,
                                     const ControllerConfig& config, Actuator actuator, int layer,
                                     const std::string& saved, std::vector<KeptPart>& parts) {
  const std::string key(name_of(actuator));
  StateIo in = section;
  std::vector<double> values;
  in.list("applied", values);
  std::string policy;
  in.text("policy", policy);
  if (values.size() != loop.applied().size()) {
    parts.push_back({layer, key, Fate::kDropped,
                     shown(static_cast<std::int64_t>(values.size())) + " values, now " +
                         shown(static_cast<std::int64_t>(loop.applied().size()))});
    return;
  }
  const Limits& limits = config.actuator(actuator).limits;
  std::int64_t cut = 0;
  for (double& value : values) {
    const double inside = std::clamp(value, limits.min, limits.max);
    cut += inside != value;
    value = inside;
  }
  loop.adopt(values, config, registry_);
  if (cut > 0 && layer >= 0) layer_at(layer).intake.drop_required();
  if (cut > 0) {
    parts.push_back({layer, key, Fate::kAdapted,
                     shown(cut) + " of " + shown(static_cast<std::int64_t>(values.size())) +
                         " values cut to limits.min, limits.max (" + shown(limits.min) + " to " +
                         shown(limits.max) + ')'});
  } else {
    parts.push_back({layer, key, Fate::kKept});
  }
  const std::string& own = config.actuator(actuator).policy;
  if (policy != own) {
    parts.push_back(
        {layer, key + ".policy", Fate::kDropped, policy + ", now " + own + ": starts without memory"});
    return;
  }
  const std::string options =
      changes(saved, layer < 0 ? saved : layer_at(layer).group->description, {key + ".options", "model."});
  std::string wrong;
  if (cut > 0) {
    wrong = "the values in force were cut to the limits";
  } else {
    wrong = loop.keep_memory(in, config);
    if (!wrong.empty()) loop.adopt(values, config, registry_);
  }
  if (!wrong.empty() && !options.empty()) wrong = options;
  parts.push_back({layer, key + ".policy",
                   !wrong.empty()    ? Fate::kDropped
                   : options.empty() ? Fate::kKept
                                     : Fate::kAdapted,
                   wrong.empty() ? options : wrong});
}

// ---- The timeline ----

bool Controller::Loop::timeline_due() const {
  return std::any_of(config_.timeline.begin(), config_.timeline.end(), [this](const TimelineEntry& entry) {
    return entry.from > settings_from_ && entry.from <= steps_;
  });
}

LayerPlan Controller::Loop::plan(int layer) const {
  const Layer& at = layer_at(layer);
  LayerPlan plan{.frozen = at.frozen, .ever_moves = at.ever_moves};
  std::size_t passed = 0;
  for (const TimelineEntry& entry : config_.timeline) {
    if (entry.from > steps_) break;
    ++passed;
    if (entry.from > settings_from_) plan.frozen = frozen_after(entry, layer, plan.frozen);
  }
  plan.decided = at.group->decided[passed];
  return plan;
}

std::unique_ptr<Controller::Loop> Controller::Loop::at_next_entry() {
  std::vector<KeptPart> parts;
  const std::string state = save();
  auto fresh = std::make_unique<Loop>(config_, registry_, steps_, /*goes_on=*/true);
  fresh->keep_what_fits(StateIo(state), parts);
  fresh->take_over_from(*this);
  for (const int id : ids_) fresh->freeze(id, plan(id).frozen);
  for (const TimelineEntry& entry : config_.timeline) {
    if (entry.from <= settings_from_ || entry.from > steps_) continue;
    fresh->say(NoticeKind::kConfig, -1,
               "timeline: the entry from step " + std::to_string(entry.from) + " holds from here on");
  }
  {
    const std::lock_guard lock(said_mutex_);
    for (Said& said : said_) fresh->said_.push_back(std::move(said));
  }
  return fresh;
}

}  // namespace moectl
