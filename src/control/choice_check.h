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
  kFits,         ///< The experts are the k largest of what was compared; which bias that holds is not known.
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

/// What a step showed of a layer's wiring: its own bias in use, or another one's. A choice that is not of the recorded
/// scores, or a bias of unknown origin, may still answer: it counts as neither.
enum class WiringSeen : std::uint8_t { kNothing, kOwn, kNoOther, kOther };

inline constexpr int kWiringSteps = 3;  // until a verdict counts
/// Steps without it until it is forgotten. A router that does wrong in every second step, or in two of five, does wrong.
inline constexpr int kClearSteps = 5;

/// The verdicts of this rank on one layer, over steps.
class ChoiceCheck {
 public:
  /// Returns what to say, once: a fault that was seen in three steps, with fewer than five good ones between them; else
  /// empty.
  std::string observe(const WiringVerdict& verdict, std::int64_t step);
  /// Of the step that is recorded; a sample that shows another bias outweighs others.
  WiringSeen seen() const { return seen_; }
  void end_step() { seen_ = WiringSeen::kNothing; }
  /// Whether this rank has said of the present fault that the router uses another bias.
  bool told() const;
  void exchange_seen(StateIo& io) { io.choice("wiring_seen", seen_, WiringSeen::kOther); }

 private:
  WiringSeen seen_ = WiringSeen::kNothing;
  Wiring fault_ = Wiring::kUnknown;
  int steps_ = 0;                                  // in which it stood
  int good_ = 0;                                   // since then
  std::int64_t last_fault_ = -1, last_good_ = -1;  // steps
};

/// What all ranks saw of one layer, over steps: the same on every rank.
class WiringMemory {
 public:
  void observe(WiringSeen seen);
  /// Whether the router surely uses another bias than its layer's: so it was in three steps, with fewer than five between
  /// or after them that said that it does not.
  bool miswired() const { return steps_ >= kWiringSteps; }
  /// What is to be told and remembered of a step. Which bias a router uses tells something only after it was seen to use
  /// another one, or while it is asked whether the load answers. So what was sampled before is in no state.
  WiringSeen news(WiringSeen seen, bool asked) const {
    return seen == WiringSeen::kOther || asked || steps_ > 0 || own_ > 0 ? seen : WiringSeen::kNothing;
  }
  /// Whether the router was lately seen to use its layer's bias, and nothing else since.
  bool uses_own() const { return own_ > 0; }
  void exchange(StateIo& io);

 private:
  // Steps without a verdict after which a held layer is let go. Where its test moves are too small to be seen in the scores,
  // a fault that lasts is seen again as soon as the policy's are not.
  static constexpr std::int64_t kRemembered = 24;
  std::int64_t steps_ = 0, good_ = 0, quiet_ = 0;
  std::int64_t own_ = 0;  // steps for which that it uses its own is remembered
};

}  // namespace moectl
