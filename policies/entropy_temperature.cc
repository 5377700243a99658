// entropy_temperature: holds the entropy of a token's router distribution at a set-point by moving the temperature.
//
//   h   = EMA of token_entropy / ln N
//   ln T += gain · (target - h)          0 while |target - h| ≤ error_tolerance
//
// Too little entropy raises T, too much lowers it, and at the set-point T does not move. Soft actor-critic adjusts its
// temperature by the same dual step (Haarnoja et al., arXiv 1812.05905, eq. 18).
//
// Limitations
// - It controls how undecided the router is on each token, not the load. Without biases, or with biases on logits, the
//   top-k choice does not depend on T. With biases on probabilities, a higher T increases the effect of the biases.
// - It needs the router's probabilities.
#include <cmath>

#include "policies/builtin.h"

namespace moectl::policies {
namespace {

struct Options {
  double target = 0.7;
  double gain = 0.1;
  double ema = 0.1;
  double error_tolerance = 0.01;

  static Options from(const PolicyOptions& o) {
    return {.target = o.number("target"),
            .gain = o.number("gain"),
            .ema = o.number("ema"),
            .error_tolerance = o.number("error_tolerance")};
  }
};

class EntropyTemperature final : public Policy {
 public:
  EntropyTemperature(const Options& options, int experts)
      : options_(options), largest_(std::log(static_cast<double>(experts))) {}

  StatsNeeds needs() const override { return {.probabilities = true}; }

  void propose(const LayerView& layer, std::span<double> value) override {
    if (!layer.metrics.token_entropy || !(largest_ > 0)) return;
    const double seen = *layer.metrics.token_entropy / largest_;
    average_ = known_ ? average_ + options_.ema * (seen - average_) : seen;
    known_ = true;
    const double error = options_.target - average_;
    if (std::abs(error) > options_.error_tolerance) value[0] *= std::exp(options_.gain * error);
  }

  void exchange(StateIo& io) override {
    io.value("entropy_temperature.average", average_);
    io.value("entropy_temperature.known", known_);
  }

 private:
  Options options_;
  double largest_;
  double average_ = 0;
  bool known_ = false;
};

}  // namespace

PolicyDescription entropy_temperature() {
  const Options defaults;
  PolicyDescription d;
  d.name = "entropy_temperature";
  d.summary =
      "holds the entropy of each token's router distribution at a set-point (as in soft actor-critic)";
  d.actuators = {Actuator::kRouterTemperature};
  d.options = {
      {"target", defaults.target, "of ln N", "mean entropy of a token's distribution", 0, 1},
      {"gain", defaults.gain, "log ratio", "move of ln T at every decision for an error of 1", 0, 100},
      {"ema", defaults.ema, "", "weight of the newest window in the averaged entropy", 1e-3, 1},
      {"error_tolerance", defaults.error_tolerance, "of ln N", "errors no larger than this move nothing", 0,
       1},
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<EntropyTemperature>(Options::from(options), context.experts);
  };
  return d;
}

}  // namespace moectl::policies
