#include "control/pending_reduction.h"

#include <algorithm>
#include <utility>

namespace moectl {

PendingReduction::~PendingReduction() {
  if (!in_flight() || !wait_) return;
  try {
    wait_();
  } catch (...) {
    // The sums are no longer needed, so an error is ignored.
  }
}

void PendingReduction::start(const Reduction& reduction, const Exchange& exchange) {
  launch(reduction, &exchange);
}

void PendingReduction::launch(const Reduction& reduction, const Exchange* exchange) {
  std::copy(local_sums_.all().begin(), local_sums_.all().end(), sums_.all().begin());
  rethrow_as_reduction_error([&] {
    if (exchange != nullptr && *exchange) {
      wait_ = (*exchange)(sums_.all(), local_sums_.all(), reduction);
    } else {
      wait_ = reduction ? reduction.start(sums_.all()) : Reduction::Wait();
    }
  });
  state_ = State::kInFlight;
}

void PendingReduction::finish(const Reduction& reduction, Payload& total) {
  // A payload that failed before is complete: the sums from elsewhere were added to local_sums_.
  if (state_ == State::kLocalSums) launch(reduction, nullptr);
  state_ = State::kLocalSums;
  if (const Reduction::Wait wait = std::exchange(wait_, {})) rethrow_as_reduction_error(wait);
  sums_.check();
  std::swap(total, sums_);
  state_ = State::kEmpty;
}

void PendingReduction::exchange(StateIo& io) {
  bool to_send = loaded();
  io.value("to_send", to_send);
  if (io.reads()) state_ = to_send ? State::kLocalSums : State::kEmpty;
  local_sums_.exchange(io, "local_sums", to_send);
}

}  // namespace moectl
