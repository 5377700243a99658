// What of a running loop is saved.
#include <cmath>
#include <string>

#include "control/loop.h"
#include "measure/saved_sums.h"

namespace moectl {
namespace {

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

std::string Controller::Loop::save() {
  if (pending_ && pending_->in_flight()) {
    try {
      pending_->finish(reduction_, payload_);
      arrived_ = true;
    } catch (const ReductionError&) {
      // The next step says so, when it sends this rank's share again.
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
