// What of a running loop is saved.
#include <algorithm>
#include <string>
#include <vector>

#include "control/loop.h"
#include "measure/saved_sums.h"

namespace moectl {
namespace {

// The message, as: config differs: saved with "model.experts: 16", this run has "model.experts: 8"
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

}  // namespace

std::string Controller::Loop::save() {
  if (pending_ && pending_->in_flight()) {
    try {
      pending_->finish(reduction_, payload_);
      arrived_ = true;
    } catch (const ReductionError&) {
      // The next step sends this rank's sums again and throws then.
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
  fresh->held_ = held_;
  return fresh;
}

void Controller::Loop::exchange(StateIo& io) {
  std::string saved = description_;
  io.text("config", saved);
  if (saved != description_) throw StateError(first_difference(saved, description_));
  io.value("steps", steps_);
  for (const auto& layer : layers_) {
    io.value("frozen", layer->frozen);
    io.value("gap_width", layer->gap_width, StateIo::kNotNegative);
    layer->intake.set_gap_width(layer->gap_width);
    exchange_sums(io, "recorded", layer->intake);
    exchange_ids(io, layer->seen, layer->fingerprints);
    layer->monitor->exchange(io);
    if (layer->guard) layer->guard->exchange(io);
    if (layer->response) {
      layer->response->exchange(io);
      io.value("response_told", layer->response_told);
    }
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
