// ChoiceCheck: whether a router chooses by the bias of its own layer, judged exactly on a few tokens.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>

#include "moectl/controller.h"

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

/// The verdicts on one layer, over steps.
class ChoiceCheck {
 public:
  /// Returns what to say, once: a verdict that stood in three steps without a good one between them; else empty.
  std::string observe(const WiringVerdict& verdict, std::int64_t step);
  /// Whether the router surely uses another bias than its layer's: so it was in three steps, and no record said since
  /// that it is right. A choice that is not of the recorded scores, or a bias of unknown origin, may still answer.
  bool miswired(std::int64_t step) const {
    return surely_wrong_ >= kSteps && step - last_step_ <= kRemembered;
  }

 private:
  static constexpr int kSteps = 3;
  // Steps without a verdict after which a held layer is let go. Where its test moves are too small to be seen in the scores,
  // a fault that lasts is seen again as soon as the policy's are not.
  static constexpr std::int64_t kRemembered = 24;
  Wiring last_ = Wiring::kUnknown;
  int steps_ = 0;         // in which last_ stood
  int surely_wrong_ = 0;  // steps whose verdict was one of another bias, since a verdict that is none
  std::int64_t last_step_ = -1;
};

}  // namespace moectl
