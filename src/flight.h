// Flight: one step's payload on its way to the sum over all ranks, for a loop that takes it a step later.
#pragma once

#include <cstdint>
#include <exception>

#include "moectl/controller.h"
#include "moectl/state.h"
#include "payload.h"

namespace moectl {

class Flight {
 public:
  /// Of payloads of the size of `like`.
  explicit Flight(const Payload& like) : share_(like), sums_(like) {}
  /// Waits: the collective writes to this memory.
  ~Flight();
  Flight(const Flight&) = delete;
  Flight& operator=(const Flight&) = delete;

  /// Whether a step's sums are on their way or waiting to be sent again.
  bool loaded() const { return state_ != State::kEmpty; }
  bool flying() const { return state_ == State::kFlying; }
  /// Room for this rank's share; to be filled before start() and not while loaded().
  Payload& share() { return share_; }
  /// Starts to sum the share. Throws ReductionError, and is then not loaded.
  void start(const Reduction& reduction, const Exchange& exchange);
  /// Waits for the sums over all ranks and puts them into `total`. Throws ReductionError; the share is then
  /// kept, and the next call sends it again.
  void land(const Reduction& reduction, Payload& total);

  void save(StateWriter& out) const;
  void load(StateReader& in);

 private:
  enum class State { kEmpty, kShare, kFlying };
  void fly(const Reduction& reduction, const Exchange* exchange);

  State state_ = State::kEmpty;
  Payload share_, sums_;
  Reduction::Wait wait_;
};

}  // namespace moectl
