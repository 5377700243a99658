// ScalarResponse: finds out whether the token entropy answers the router's temperature, and holds the temperature if not.
//
// A higher temperature must raise the mean entropy of a token's distribution, H. How much depends on the router, so only
// sign and presence are judged: the gain is the change of H over one that is assumed, 2 min(H, ln N - H) for each unit of
// ln T. That is what a softmax of nearly equal logits shows. A softmax of any spread shows .45 of it or more (8 to 256
// experts, normal logits), sigmoids of a spread up to 8 .13 or more. Normalised sigmoids of logits that are nearly all
// positive answer the other way: a temperature is then the wrong lever, and is held as well.
//
// A policy moves because of the entropy, and routers sharpen by themselves, so its own moves prove nothing. Once they add up to
// a tenth of ln T, a probe asks: the policy waits, and the temperature goes a tenth of ln T up and down around where it is,
// with the signs of response_probe.h, each for as many decisions as the rate needs for the way (two by default). The error
// comes from what the regression leaves over, never from a model of the noise. An answer is five standard errors above
// nothing. Silence is six below a tenth of what is assumed, after at least two blocks: with 38 degrees of freedom that is
// wrong less than once in a million. Then a block in 26 decisions finds out when the entropy answers again. At most one probe
// begins in 512 decisions of a temperature that answers, and in 4096 of one that did not tell.
//
// Time is counted in decisions. An answer may come up to four of them later than the declared delay.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "control/response_probe.h"
#include "moectl/config.h"
#include "moectl/limits.h"
#include "moectl/responsiveness.h"
#include "moectl/state.h"

namespace moectl {

/// Does not allocate after construction.
class ScalarResponse {
 public:
  /// `limits`: of the temperature; `in_force`: the value that it begins with.
  ScalarResponse(const Limits& limits, int delay, double in_force);

  /// One decision. `entropy`: mean token entropy, nats; `largest`: ln N; `in_force`: the value in force now.
  void observe(double entropy, double largest, double in_force);
  /// Nothing is known of this decision, or the value moved for another reason.
  void restart(double in_force);

  bool holds() const { return held_; }
  bool adjusts() const { return held_ || probes(); }
  /// What is wanted in the place of the policy's proposal: held, or the next part of a probe.
  double adjust(LimitReport& why) const;
  /// Told what the limits, or the guard, made of that.
  void on_applied(const LimitReport& why, double applied);
  /// The part of the value in force that is a probe.
  double offset() const { return offset_; }

  Responsiveness report() const { return responsiveness(state_, found_, late_, /*scaled=*/false); }
  /// True once after the verdict changed between silence and an answer.
  bool has_news();

  void exchange(StateIo& io);

 private:
  struct Sums {
    double zy = 0, zx = 0, zz = 0, left = 0, freedom = 0;
  };
  bool probes() const { return decision_ >= 0 && decision_ < idle_; }
  double next_sign() const;
  std::optional<GainEstimate> estimate(std::size_t late) const;
  void start_probe(double in_force);
  void start_block();
  void finish_block();
  void end(Response state, std::optional<GainEstimate> found, std::int64_t quiet);
  void pause();

  double min_, max_, size_;  // of a test move, of ln T
  // A block: eight test moves of `stay_` decisions, then back at `base_` until answers that are late have been seen.
  std::int64_t stay_, back_, idle_;
  std::size_t slots_;  // delay + 1
  Response state_ = Response::kUnknown;
  bool held_ = false, told_ = false;
  std::int64_t late_ = 0;
  std::optional<GainEstimate> found_;
  double reference_;               // where the entropy last answered
  double base_;                    // of the probe, or where the value is held
  std::int64_t decision_ = idle_;  // of the block; negative: before it
  std::int64_t waited_ = 0, blocks_ = 0, quiet_ = 0;
  double sign_ = 0, offset_ = 0;     // in force
  std::vector<double> log_, signs_;  // in force at the last decisions, a ring of `slots_`
  std::size_t newest_ = 0;
  ProbeSeries series_;
  std::array<Sums, kProbeLags> sums_{};  // over the blocks of the probe
  double expected_ = 0;                  // Σ over its steps of what is assumed, nats for each unit of ln T
  std::int64_t steps_ = 0;
};

}  // namespace moectl
