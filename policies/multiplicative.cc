// multiplicative: multiplies the actuator by a fixed factor, or divides it, depending on the sign of a metric's error.
//
//   y = EMA of the metric, weight `ema`
//   y > target · (1 + error_tolerance):  w ← w · factor
//   y < target · (1 - error_tolerance):  w ← w / factor
//   (reversed with effect: raises)
//
// Two methods in use are special cases: ReMoE (arXiv 2412.14711; megatron/training/training.py of thu-ml/ReMoE, commit
// 463c6af) takes the factor 1.2 at every step with no tolerance; axlearn's AdaptiveLoadBalanceLoss moves a log scale by
// ±0.01 outside a tolerance of an averaged over-capacity ratio: metric: predicted_drop_rate, factor: 1.01, ema: 0.1,
// error_tolerance: 0.5. ReMoE controls the sparsity of a ReLU router, 1 - k/N, which a larger L1 weight can only raise.
// The CV of the load and the auxiliary-loss weight have no such monotonic relation.
//
// Limitations
// - The step ignores the size of the error. Without a tolerance the value oscillates around the target; with one it
//   stops anywhere inside. The factor must be tuned to the response of the router; pi does better.
// - A factor of 1.2 at every step is too fast for a load that takes tens of steps to respond. Then the response
//   reverses: the gradient of so strong an auxiliary loss unbalances the load itself, more weight makes it worse, and
//   the value runs to its bound. On the simulated router under a softmax a fixed weight of 1 ends at 64 floors;
//   starting at 0.01 the weight is at 0.8 when the CV first meets 1.3 floors, after 25 steps, and ends at its bound of
//   100, 65 floors, in two runs of three (`moectl simulate --gate softmax --scenario shift --layers 1 --steps 1200`,
//   seeds 2001 to 2003); with `cadence: 10` at 1.6 to 1.8 in all.
#include <algorithm>
#include <cmath>

#include "policies/builtin.h"
#include "policies/set_point.h"

namespace moectl::policies {
namespace {

struct Options {
  SetPoint set_point;
  double factor = 1.2;

  static Options from(const PolicyOptions& o) {
    return {.set_point = SetPoint::from(o), .factor = o.number("factor")};
  }
};

class Multiplicative final : public Policy {
 public:
  explicit Multiplicative(const Options& options) : options_(options) {}

  StatsNeeds needs() const override { return options_.set_point.needs(); }

  void propose(const LayerView& layer, std::span<double> value) override {
    const SetPoint& goal = options_.set_point;
    const Metrics::Value seen = goal.metrics(layer).*(goal.metric->value);
    if (!seen || !std::isfinite(*seen)) return;
    average_ = known_ ? average_ + goal.ema * (*seen - average_) : *seen;
    known_ = true;
    const double error = goal.error(average_);
    const double band = std::abs(goal.target) * goal.error_tolerance;
    if (error > band) value[0] *= options_.factor;
    if (error < -band) value[0] /= options_.factor;
  }

  void exchange(StateIo& io) override {
    io.value("multiplicative.average", average_);
    io.value("multiplicative.known", known_);
  }

 private:
  Options options_;
  double average_ = 0;
  bool known_ = false;
};

std::string check(const PolicyContext& context, const PolicyOptions&) {
  return context.initial > 0 ? "" : "initial: must be above 0: moves are ratios";
}

}  // namespace

PolicyDescription multiplicative() {
  const Options defaults;
  PolicyDescription d;
  d.name = "multiplicative";
  d.summary = "a fixed factor up or down on the sign of a metric's error (ReMoE, axlearn)";
  d.actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.options = SetPoint::options("load_cv", 0.3, 1.0, 0.0);
  d.options.push_back({"factor", defaults.factor, "",
                       "by which the value is multiplied or divided at every decision", 1, 10});
  d.make = [](const PolicyContext&, const PolicyOptions& options) {
    return std::make_unique<Multiplicative>(Options::from(options));
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
