// multiplicative: a fixed factor up or down, on the sign of a metric's error.
//
//   y = EMA of the metric, weight `ema`
//   y > target · (1 + dead_band):  w ← w · factor
//   y < target · (1 - dead_band):  w ← w / factor
//   (the other way round with effect: raises)
//
// Two laws in use are this one: ReMoE (arXiv 2412.14711) takes the factor 1.2 at every step with no dead
// band; axlearn's AdaptiveLoadBalanceLoss moves a log scale by ±0.01 outside a dead band of an averaged
// over-capacity ratio: metric: predicted_drop_rate, factor: 1.01, ema: 0.1, dead_band: 0.5.
//
// Limitations: the step knows no size of the error. Without a dead band it hunts for ever around the target;
// with one it stops anywhere inside. Between the answer of the router and the pace of the factor lies the
// whole tuning; pi does better on both.
#include <algorithm>
#include <array>
#include <cmath>

#include "builtin.h"

namespace moectl::policies {
namespace {

struct Options {
  std::string metric = "load_cv";
  double target = 0.3;
  std::string effect = "lowers";
  std::string over_layers = "mean";
  double factor = 1.2;
  double ema = 1;
  double dead_band = 0;

  static Options from(const PolicyOptions& o) {
    return {.metric = o.text("metric"),
            .target = o.number("target"),
            .effect = o.text("effect"),
            .over_layers = o.text("over_layers"),
            .factor = o.number("factor"),
            .ema = o.number("ema"),
            .dead_band = o.number("dead_band")};
  }
};

class Multiplicative final : public Policy {
 public:
  explicit Multiplicative(const Options& options) : options_(options), field_(find_metric(options.metric)) {}

  void propose(const LayerView& layer, std::span<double> value) override {
    const Metrics& metrics = options_.over_layers == "worst" ? layer.worst : layer.metrics;
    const Metrics::Value seen = metrics.*(field_->value);
    if (!seen || !std::isfinite(*seen)) return;
    average_ = known_ ? average_ + options_.ema * (*seen - average_) : *seen;
    known_ = true;
    const double band = std::abs(options_.target) * options_.dead_band;
    int direction = average_ > options_.target + band ? 1 : (average_ < options_.target - band ? -1 : 0);
    if (options_.effect == "raises") direction = -direction;
    if (direction > 0) value[0] *= options_.factor;
    if (direction < 0) value[0] /= options_.factor;
  }

  void save(StateWriter& out) const override {
    const std::array<double, 2> state = {average_, known_ ? 1.0 : 0.0};
    out.put("multiplicative", state);
  }
  void load(StateReader& in) override {
    std::array<double, 2> state{};
    in.get("multiplicative", state);
    average_ = state[0];
    known_ = state[1] != 0;
  }

 private:
  Options options_;
  const MetricField* field_;
  double average_ = 0;
  bool known_ = false;
};

std::string check(const PolicyContext& context, const PolicyOptions&) {
  return context.initial > 0 ? "" : "initial: must be above 0: moves are ratios";
}

}  // namespace

PolicyDescription multiplicative() {
  const Options defaults;
  std::vector<std::string> metrics;
  for (const MetricField& field : metric_fields()) metrics.emplace_back(field.name);
  PolicyDescription d;
  d.name = "multiplicative";
  d.summary = "a fixed factor up or down on the sign of a metric's error (ReMoE, axlearn)";
  d.actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.options = {
      {.name = "metric",
       .default_value = defaults.metric,
       .unit = "",
       .description = "the process variable",
       .choices = metrics},
      {.name = "target",
       .default_value = defaults.target,
       .unit = "of the metric",
       .description = "where the metric should be",
       .min = -1e6,
       .max = 1e6},
      {.name = "effect",
       .default_value = defaults.effect,
       .unit = "",
       .description = "what raising the actuator does to the metric",
       .choices = {"lowers", "raises"}},
      {.name = "over_layers",
       .default_value = defaults.over_layers,
       .unit = "",
       .description = "for scope: model, the mean over layers or the largest",
       .choices = {"mean", "worst"}},
      {.name = "factor",
       .default_value = defaults.factor,
       .unit = "",
       .description = "by which the value is multiplied or divided at every decision",
       .min = 1,
       .max = 10},
      {.name = "ema",
       .default_value = defaults.ema,
       .unit = "",
       .description = "weight of the newest window in the averaged metric",
       .min = 1e-3,
       .max = 1},
      {.name = "dead_band",
       .default_value = defaults.dead_band,
       .unit = "of the target",
       .description = "errors no larger than this move nothing",
       .min = 0,
       .max = 10},
  };
  d.make = [](const PolicyContext&, const PolicyOptions& options) {
    return std::make_unique<Multiplicative>(Options::from(options));
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
