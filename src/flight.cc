#include "flight.h"

#include <algorithm>
#include <utility>

namespace moectl {

Flight::~Flight() {
  if (!flying() || !wait_) return;
  try {
    wait_();
  } catch (const std::exception&) {
    // Nobody is left who could want these sums.
  }
}

void Flight::start(const Reduction& reduction, const Exchange& exchange) {
  fly(reduction, &exchange);
}

void Flight::fly(const Reduction& reduction, const Exchange* exchange) {
  std::copy(share_.all().begin(), share_.all().end(), sums_.all().begin());
  rethrow_as_reduction_error([&] {
    if (exchange != nullptr && *exchange) {
      wait_ = (*exchange)(sums_.all(), share_.all(), reduction);
    } else {
      wait_ = reduction ? reduction.start(sums_.all()) : Reduction::Wait();
    }
  });
  state_ = State::kFlying;
}

void Flight::land(const Reduction& reduction, Payload& total) {
  // What failed before is complete in the share: sums from elsewhere were added to it.
  if (state_ == State::kShare) fly(reduction, nullptr);
  state_ = State::kShare;
  if (const Reduction::Wait wait = std::exchange(wait_, {})) rethrow_as_reduction_error(wait);
  sums_.check();
  std::swap(total, sums_);
  state_ = State::kEmpty;
}

void Flight::save(StateWriter& out) const {
  out.put("to_send", std::int64_t{loaded() ? 1 : 0});
  if (loaded()) out.put("share", share_.all());
}

void Flight::load(StateReader& in) {
  state_ = in.get_int("to_send") != 0 ? State::kShare : State::kEmpty;
  if (loaded()) in.get("share", share_.all());
}

}  // namespace moectl
