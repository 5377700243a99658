// tanh_momentum_bias: a proportional step that saturates softly, with momentum.
//
//   v_i = (c̄_i - c_i) / c̄_i                      -1 for an expert with tokens that should receive none
//   Δ_i = λ tanh(κ v_i),  Δ -= mean(Δ)
//   m   = β m + (1 - β) Δ
//   b  += m
//
// Small errors move the bias in proportion (slope λκ), large ones by at most λ: between proportional_bias and
// sign_bias. The constants λ = 5e-4, κ = 2, β = 0.5 are those of SMEBU, soft-clamped momentum expert bias updates
// (Singh et al., Arcee Trinity Large technical report, arXiv 2602.17004, 2026). The report itself was not available:
// equations and constants are from secondary sources.
//
// Limitations: λ has the unit of a score. The momentum delays the response by β/(1-β) steps, which costs
// stability at a high gain. The step is bounded, the bias is not; the limits bound it.
#include <cmath>

#include "base/lanes.h"
#include "policies/builtin.h"
#include "policies/load_error.h"

namespace moectl::policies {
namespace {

struct Options {
  double step = 5e-4;
  double steepness = 2;
  double momentum = 0.5;

  static Options from(const PolicyOptions& o) {
    return {.step = o.number("step"), .steepness = o.number("steepness"), .momentum = o.number("momentum")};
  }
};

class TanhMomentumBias final : public Policy {
 public:
  TanhMomentumBias(const Options& options, int experts)
      : options_(options),
        delta_(static_cast<std::size_t>(experts), 0.0),
        momentum_(static_cast<std::size_t>(experts), 0.0) {}

  void propose(const LayerView& layer, std::span<double> bias) override {
    const std::span<const std::int64_t> counts = layer.stats.counts();
    const auto total = static_cast<double>(layer.stats.assignments());
    for (std::size_t i = 0; i < delta_.size(); ++i) {
      const double target = layer.targets[i] * total;
      const double error = relative_error(target, target - static_cast<double>(counts[i]));
      delta_[i] = options_.step * std::tanh(options_.steepness * error);
    }
    const double shift = sum_of(delta_) / static_cast<double>(delta_.size());
    for (std::size_t i = 0; i < bias.size(); ++i) {
      momentum_[i] = options_.momentum * momentum_[i] + (1 - options_.momentum) * (delta_[i] - shift);
      bias[i] += momentum_[i];
    }
  }

  // A held bias must not go on gathering momentum behind the hold.
  void on_applied(std::span<const double>, const LimitReport& why) override {
    if (!why.held()) return;
    for (double& m : momentum_) m = 0;
  }

  void exchange(StateIo& io) override { io.values("tanh_momentum.momentum", momentum_); }

 private:
  Options options_;
  std::vector<double> delta_, momentum_;
};

}  // namespace

PolicyDescription tanh_momentum_bias() {
  const Options defaults;
  PolicyDescription d;
  d.name = "tanh_momentum_bias";
  d.summary = "softly saturating step with momentum (SMEBU)";
  d.actuators = {Actuator::kExpertBias};
  d.options = {
      {"step", defaults.step, "score a step", "largest move of one decision", 0, 1e6},
      {"steepness", defaults.steepness, "", "relative errors above about 1/steepness saturate", 0, 1e6},
      {"momentum", defaults.momentum, "", "share of the last move that is kept", 0, 0.999},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<TanhMomentumBias>(Options::from(options), context.experts);
  };
  return d;
}

}  // namespace moectl::policies
