// sign_bias: the published loss-free method. At every decision each bias moves by the same small step, up if its expert
// has too few tokens and down if it has too many.
//
//   e_i = c̄_i - c_i,     Δ_i = u · sign(e_i),  sign(0) = 0
//   zero_mean_move:  Δ_i -= mean(Δ)
//   b_i += Δ_i
//
// c_i assignments of expert i in the window, c̄_i its target load (S/N unless targets are configured), u the step.
//
// Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664, u = 1e-3 on sigmoid
// scores. Megatron-Core does the same without zero_mean_move, torchtitan with it. DeepSeek-V3 (arXiv 2412.19437) sets u
// to 0 for the last 500 billion tokens, as `freeze_after` does here. With uniform targets the integers N·c_i and S are
// compared, so that no rounding of a mean can change a sign.
//
// Limitations
// - u has the unit of a score. 1e-3 fits sigmoid gates of moderate spread. With a sharper or flatter router it is slow
//   early and noisy late, and no single value suits both.
// - The size of an error is ignored: an expert without any token moves no faster than one that lacks a single token,
//   and at balance every bias keeps stepping by ±u.
// - Without zero_mean_move, the mean of the biases drifts. The drift changes no selection, but uses up range and
//   precision.
#include <algorithm>
#include <cmath>

#include "base/lanes.h"
#include "policies/builtin.h"

namespace moectl::policies {
namespace {

struct Options {
  double step = 1e-3;
  bool zero_mean_move = true;
  std::int64_t freeze_after = 0;

  static Options from(const PolicyOptions& o) {
    return {.step = o.number("step"),
            .zero_mean_move = o.flag("zero_mean_move"),
            .freeze_after = o.integer("freeze_after")};
  }
};

class SignBias final : public Policy {
 public:
  SignBias(const Options& options, int experts)
      : options_(options), delta_(static_cast<std::size_t>(experts)) {}

  void propose(const LayerView& layer, std::span<double> bias) override {
    if (options_.freeze_after > 0 && layer.step >= options_.freeze_after) return;
    move_towards_target(layer.stats, layer.targets);
    const double shift = options_.zero_mean_move ? sum_of(delta_) / static_cast<double>(delta_.size()) : 0;
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] += delta_[i] - shift;
  }

 private:
  void move_towards_target(const RoutingStats& stats, std::span<const double> targets) {
    const std::span<const std::int64_t> counts = stats.counts();
    const std::int64_t total = stats.assignments();
    if (std::all_of(targets.begin(), targets.end(), [&](double t) { return t == targets[0]; })) {
      // c against S/N without the product N·c, which hostile counts could overflow.
      const auto n = static_cast<std::int64_t>(counts.size());
      const std::int64_t below = total / n, above = below + (total % n > 0 ? 1 : 0);
      for (std::size_t i = 0; i < delta_.size(); ++i) {
        delta_[i] = options_.step * static_cast<double>((counts[i] < above) - (counts[i] > below));
      }
      return;
    }
    for (std::size_t i = 0; i < delta_.size(); ++i) {
      const double error = targets[i] * static_cast<double>(total) - static_cast<double>(counts[i]);
      delta_[i] = options_.step * static_cast<double>((error > 0) - (error < 0));
    }
  }

  Options options_;
  std::vector<double> delta_;
};

}  // namespace

PolicyDescription sign_bias() {
  const Options defaults;
  PolicyDescription d;
  d.name = "sign_bias";
  d.summary = "fixed step on the sign of each expert's load error (DeepSeek loss-free; Megatron, torchtitan)";
  d.actuators = {Actuator::kExpertBias};
  d.options = {
      {"step", defaults.step, "score a step", "how far each bias moves at every decision", 0, 1e6},
      {"zero_mean_move", defaults.zero_mean_move, "",
       "take the mean out of each move (torchtitan); false moves all by ±step (Megatron)"},
      {"freeze_after", defaults.freeze_after, "steps",
       "from this step on the biases stay as they are; 0 = never", 0},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<SignBias>(Options::from(options), context.experts);
  };
  return d;
}

}  // namespace moectl::policies
