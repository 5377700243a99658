// schedule: a fixed path over the steps of training: warm up, hold, decay, stay. It ignores all measurements.
//
//   t < warmup:                                    initial → peak, linearly
//   t < decay_start:                               peak
//   decay_start ≤ t < decay_start + decay_steps:   peak → final, with x = (t - decay_start) / decay_steps
//       linear        peak + (final - peak) x
//       cosine        final + (peak - final) (1 + cos πx) / 2
//       exponential   peak · (final / peak)^x
//   afterwards final. A peak of 0 means initial; a final of 0 means peak. t is the step that uses the value, one after
//   the decision.
//
// Sources: the exponential path is the usual annealing of a router's temperature, T0 (T1/T0)^(t/T); the
// linear warm-up and the decay to a small final weight are how auxiliary losses are scheduled in practice;
// cosine after Loshchilov & Hutter, arXiv 1608.03983.
//
// Limitations: the limits' rate, which should be wide, and a cadence above one distort the path.
#include <cmath>
#include <numbers>

#include "policies/builtin.h"
#include "policies/choice.h"

namespace moectl::policies {
namespace {

struct Options {
  double peak = 0;
  std::int64_t warmup = 0;
  double final = 0;
  std::int64_t decay_start = 0;
  std::int64_t decay_steps = 0;
  std::string shape = "cosine";

  static Options from(const PolicyOptions& o) {
    return {.peak = o.number("peak"),
            .warmup = o.integer("warmup"),
            .final = o.number("final"),
            .decay_start = o.integer("decay_start"),
            .decay_steps = o.integer("decay_steps"),
            .shape = o.text("shape")};
  }
};

class Schedule final : public Policy {
 public:
  Schedule(const Options& options, double initial) : options_(options), initial_(initial) {
    if (options_.peak == 0) options_.peak = initial;
    if (options_.final == 0) options_.final = options_.peak;
  }

  void propose(const LayerView& layer, std::span<double> value) override { value[0] = at(layer.step + 1); }

 private:
  double at(std::int64_t step) const {
    const Options& o = options_;
    if (step < o.warmup) {
      return initial_ + (o.peak - initial_) * static_cast<double>(step) / static_cast<double>(o.warmup);
    }
    if (step < o.decay_start) return o.peak;
    if (step >= o.decay_start + o.decay_steps) return o.final;
    const double x = static_cast<double>(step - o.decay_start) / static_cast<double>(o.decay_steps);
    if (o.shape == "linear") return o.peak + (o.final - o.peak) * x;
    if (o.shape == "cosine") return o.final + (o.peak - o.final) * (1 + std::cos(std::numbers::pi * x)) / 2;
    return o.peak * std::pow(o.final / o.peak, x);
  }

  Options options_;
  double initial_;
};

std::string check(const PolicyContext& context, const PolicyOptions& options) {
  const Options o = Options::from(options);
  if (!(context.initial > 0)) return "initial: must be above 0: moves are ratios";
  if (o.final > 0 && o.decay_start < o.warmup) return "decay_start: must not lie before the end of warmup";
  return "";
}

}  // namespace

PolicyDescription schedule() {
  const Options defaults;
  PolicyDescription d;
  d.name = "schedule";
  d.summary = "open-loop path in time: warm up, hold, decay, stay";
  d.actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.options = {
      {"peak", defaults.peak, "of the actuator",
       "value from the end of the warm-up to the decay; 0 = as initial", 0, 1e6},
      {"warmup", defaults.warmup, "steps", "length of the straight line from initial to peak", 0},
      {"final", defaults.final, "of the actuator", "value at the end; 0 = as peak", 0, 1e6},
      {"decay_start", defaults.decay_start, "steps", "step at which the decay begins", 0},
      {"decay_steps", defaults.decay_steps, "steps", "length of the decay; 0 = at once", 0},
      choice("shape", defaults.shape, "how it decays", {"linear", "cosine", "exponential"}),
  };
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<Schedule>(Options::from(options), context.initial);
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
