// ChoiceCheck: whether a router chooses by the bias of its own layer, judged exactly on a few tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "moectl/controller.h"
#include "moectl/state.h"

namespace moectl {

enum class Wiring {
  kUnknown,      ///< The bias is too small to tell.
  kGood,         ///< The experts are the k largest of scores + bias.
  kNotAdded,     ///< Chosen on the scores alone.
  kWrongSign,    ///< Chosen on scores - bias.
  kWrongLayer,   ///< Chosen on scores + the bias of another layer.
  kOtherBias,    ///< Chosen on scores + something else, as an old copy of the bias.
  kOtherChoice,  ///< Not the k largest of what was compared: replayed or masked routes.
};

struct WiringVerdict {
  Wiring what = Wiring::kUnknown;
  int other_layer = -1;  ///< Of kWrongLayer.
};

/// The bias of a layer that is in force.
using BiasOf = std::function<std::span<const double>(int layer)>;

/// Without `scores` in the sample the bias is not judged.
WiringVerdict judge_choices(const ChoiceSample& sample, int top_k, int layer, int layers,
                            const BiasOf& bias_of);

/// What a step showed of a layer's wiring. A choice that is not of the recorded scores, or a bias of unknown origin, may
/// still answer: neither counts as another bias.
enum class WiringSeen : std::uint8_t { kNothing, kNoOther, kOther };

inline constexpr int kWiringSteps = 3;  // until a verdict counts

/// The verdicts of this rank on one layer, over steps.
class ChoiceCheck {
 public:
  /// Returns what to say, once: a verdict that stood in three steps without a good one between them; else empty.
  std::string observe(const WiringVerdict& verdict, std::int64_t step);
  /// Of the step that is recorded; a sample that shows another bias outweighs others.
  WiringSeen seen() const { return seen_; }
  void end_step() { seen_ = WiringSeen::kNothing; }
  void exchange_seen(StateIo& io) { io.choice("wiring_seen", seen_, WiringSeen::kOther); }

 private:
  WiringSeen seen_ = WiringSeen::kNothing;
  Wiring last_ = Wiring::kUnknown;
  int steps_ = 0;  // in which last_ stood
  std::int64_t last_step_ = -1;
};

/// What all ranks saw of one layer, over steps: the same on every rank.
class WiringMemory {
 public:
  void observe(WiringSeen seen);
  /// Whether the router surely uses another bias than its layer's: so it was in three steps, and none said since that it
  /// does not.
  bool miswired() const { return steps_ >= kWiringSteps; }
  /// That a router uses no other bias tells something only after it was seen to use one.
  WiringSeen news(WiringSeen seen) const {
    return seen == WiringSeen::kNoOther && steps_ == 0 ? WiringSeen::kNothing : seen;
  }
  void exchange(StateIo& io);

 private:
  // Steps without a verdict after which a held layer is let go. Where its test moves are too small to be seen in the scores,
  // a fault that lasts is seen again as soon as the policy's are not.
  static constexpr std::int64_t kRemembered = 24;
  std::int64_t steps_ = 0, quiet_ = 0;
};

}  // namespace moectl
