// proportional_bias: every bias moves in proportion to its expert's load error.
//
//   e_i = c̄_i - c_i                              c̄_i target load of the window, S its assignments
//   none:  Δ_i = u · e_i / S                      share of all assignments (LongCat-Flash, arXiv 2509.01322)
//   mean:  Δ_i = u · e_i / c̄_i                    relative error: +1 for an expert without tokens; -1 for one with
//                                                  tokens that should receive none
//   rms:   Δ_i = u · e_i / RMS(e)                 direction only, of length u√N (Su, kexue.fm)
//   Δ_i clipped to ±clip·u;  zero_mean_move: Δ -= mean(Δ);  b += 2^(-t/half_life) · Δ
//
// arXiv 2408.15664 compares proportional steps with sign steps at 1 B parameters: balance a little better, perplexity a
// little worse. Su finds rms better than sign at equal u. He does not clip; a clip of √N or more does the same here.
//
// Limitations: u has the unit of a score and must be found for each router; above about one score gap at the
// selection threshold the loop oscillates. rms steps as far at balance as in collapse, so it never settles.
#include <algorithm>
#include <cmath>

#include "base/lanes.h"
#include "policies/builtin.h"
#include "policies/choice.h"
#include "policies/load_error.h"

namespace moectl::policies {
namespace {

struct Options {
  double step = 1e-2;
  std::string normalise = "mean";
  double clip = 1;
  bool zero_mean_move = true;
  double half_life = 0;

  static Options from(const PolicyOptions& o) {
    return {.step = o.number("step"),
            .normalise = o.text("normalise"),
            .clip = o.number("clip"),
            .zero_mean_move = o.flag("zero_mean_move"),
            .half_life = o.number("half_life")};
  }
};

class ProportionalBias final : public Policy {
 public:
  ProportionalBias(const Options& options, int experts)
      : options_(options), delta_(static_cast<std::size_t>(experts), 0.0) {}

  void propose(const LayerView& layer, std::span<double> bias) override {
    const std::span<const std::int64_t> counts = layer.stats.counts();
    const auto total = static_cast<double>(layer.stats.assignments());
    if (!(total > 0)) return;
    for (std::size_t i = 0; i < delta_.size(); ++i) {
      const double target = layer.targets[i] * total;
      const double error = target - static_cast<double>(counts[i]);
      delta_[i] = options_.normalise == "mean" ? relative_error(target, error) : error / total;
    }
    const auto n = static_cast<double>(delta_.size());
    double scale = options_.step;
    if (options_.normalise == "rms") {
      const double rms = std::sqrt(dot(delta_, delta_) / n);
      if (rms < kBalanced) return;
      scale /= rms;
    }
    const double bound = options_.step * options_.clip;
    for (double& d : delta_) d = std::min(std::max(scale * d, -bound), bound);
    const double shift = options_.zero_mean_move ? sum_of(delta_) / n : 0;
    const double fade =
        options_.half_life > 0 ? std::exp2(-static_cast<double>(layer.step) / options_.half_life) : 1;
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] += fade * (delta_[i] - shift);
  }

 private:
  // Errors this small are the rounding of a target; a direction cannot be read from them.
  static constexpr double kBalanced = 1e-12;

  Options options_;
  std::vector<double> delta_;
};

}  // namespace

PolicyDescription proportional_bias() {
  const Options defaults;
  PolicyDescription d;
  d.name = "proportional_bias";
  d.summary = "step in proportion to each expert's load error: raw, relative or RMS-normalised";
  d.actuators = {Actuator::kExpertBias};
  d.options = {
      {"step", defaults.step, "score", "move for a normalised error of 1", 0, 1e6},
      choice("normalise", defaults.normalise,
             "what errors are divided by: none = all assignments, mean = the target load, rms = their RMS",
             {"none", "mean", "rms"}),
      {"clip", defaults.clip, "", "largest normalised error that counts", 1e-6, 1e6},
      {"zero_mean_move", defaults.zero_mean_move, "", "take the mean out of each move"},
      {"half_life", defaults.half_life, "steps", "after which the step has halved; 0 = it stays", 0, 1e12},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<ProportionalBias>(Options::from(options), context.experts);
  };
  return d;
}

}  // namespace moectl::policies
