// PendingReduction: one step's payload while it is summed over all ranks; the loop uses the result a step later.
#pragma once

#include <cstdint>
#include <exception>

#include "control/payload.h"
#include "moectl/controller.h"
#include "moectl/state.h"

namespace moectl {

class PendingReduction {
 public:
  /// Of payloads of the size of `like`.
  explicit PendingReduction(const Payload& like) : local_sums_(like), sums_(like) {}
  /// Waits: the collective writes to this memory.
  ~PendingReduction();
  PendingReduction(const PendingReduction&) = delete;
  PendingReduction& operator=(const PendingReduction&) = delete;

  /// Whether a reduction is running, or its sums wait to be sent again.
  bool loaded() const { return state_ != State::kEmpty; }
  bool in_flight() const { return state_ == State::kInFlight; }
  /// Buffer for this rank's sums. Fill it before start(), and not while loaded().
  Payload& local_sums() { return local_sums_; }
  /// Starts to sum the local sums. Throws ReductionError, and is then not loaded.
  void start(const Reduction& reduction, const Exchange& exchange);
  /// Waits for the sums over all ranks and puts them into `total`. Throws ReductionError; the local sums are
  /// then kept, and the next call sends it again.
  void finish(const Reduction& reduction, Payload& total);

  void exchange(StateIo& io);

 private:
  enum class State { kEmpty, kLocalSums, kInFlight };
  void launch(const Reduction& reduction, const Exchange* exchange);

  State state_ = State::kEmpty;
  Payload local_sums_, sums_;
  Reduction::Wait wait_;
};

}  // namespace moectl
