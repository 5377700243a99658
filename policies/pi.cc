// pi: proportional-integral control of a scalar actuator on any metric; on the auxiliary-loss weight it is
// its tuner.
//
//   y    = EMA of the process variable, weight `ema`
//   e    = clip((y - target) / scale, -1, 1),  scale = |target| (1 for a target of 0); sign turned if
//   `effect: raises`;
//          0 while |e| ≤ dead_band
//   Δ    = kp · (e_t - e_{t-1}) + ki · e_t
//   ln w ← ln w + Δ
//
// The actuator is moved in its logarithm because both weight and temperature act by ratio: from 1e-4 to 1e-3
// is as far as from 1e-2 to 1e-1, and one pair of gains serves the whole range. Velocity form: the value in
// force is the integral, so nothing winds up behind a bound; and a proportional kick that a cooldown or a
// dead band of the limits held back is not lost, because e_{t-1} stays that of the last move that was made.
//
// The process variable of `excess_cv` is the signed excess, averaged before the root is taken:
// y = sgn(x) √|x|, x = EMA of (load_cv² - floor²). Even perfectly balanced routing shows the CV of sampling,
// and no weight removes that part; a target on load_cv itself, once it lies under the floor, drives the
// weight to its upper bound and costs loss. The rectified excess_cv is biased near zero, the signed one is
// not.
//
// Source: Åström & Murray, "Feedback Systems" (2nd ed. 2021), ch. 11, for the velocity form and anti-windup.
// The fixed steps in use elsewhere (ReMoE, arXiv 2412.14711: ×1.2 or ÷1.2 at every step) know no size of an
// error and hunt for ever; see multiplicative.
//
// Limitations
// - The router answers to the weight over tens of steps. Give it time: a cadence of about ten steps, and
// gains that
//   are small against the delay. The defaults suit a router that settles in some hundred steps.
// - A stronger auxiliary loss makes routing itself less specific, which lowers the floor and can cost loss;
// the target
//   says how much balance is wanted, not how much is good.
// - A temperature does not move the load of deterministic top-k routing. Use metrics that it moves.
#include <algorithm>
#include <array>
#include <cmath>

#include "builtin.h"

namespace moectl::policies {
namespace {

constexpr std::string_view kExcess = "excess_cv";

struct Options {
  std::string metric = std::string(kExcess);
  double target = 0.1;
  std::string effect = "lowers";
  std::string over_layers = "mean";
  double kp = 1.0;
  double ki = 0.15;
  double ema = 0.3;
  double dead_band = 0.05;

  static Options from(const PolicyOptions& o) {
    return {.metric = o.text("metric"),
            .target = o.number("target"),
            .effect = o.text("effect"),
            .over_layers = o.text("over_layers"),
            .kp = o.number("kp"),
            .ki = o.number("ki"),
            .ema = o.number("ema"),
            .dead_band = o.number("dead_band")};
  }
};

class Pi final : public Policy {
 public:
  explicit Pi(const Options& options)
      : options_(options),
        excess_(options.metric == kExcess),
        field_(find_metric(options.metric)),
        scale_(options.target != 0 ? std::abs(options.target) : 1.0),
        direction_(options.effect == "raises" ? -1.0 : 1.0) {}

  StatsNeeds needs() const override { return {.sequences = excess_}; }

  void propose(const LayerView& layer, std::span<double> value) override {
    const Metrics::Value seen = measured(options_.over_layers == "worst" ? layer.worst : layer.metrics);
    if (!seen || !std::isfinite(*seen)) return;
    average_ = known_ ? average_ + options_.ema * (*seen - average_) : *seen;
    const double y = excess_ ? std::copysign(std::sqrt(std::abs(average_)), average_) : average_;
    error_ = std::clamp(direction_ * (y - options_.target) / scale_, -1.0, 1.0);
    if (std::abs(error_) <= options_.dead_band) error_ = 0;
    if (!known_) last_error_ = error_;
    known_ = true;
    value[0] *= std::exp(options_.kp * (error_ - last_error_) + options_.ki * error_);
  }

  void on_applied(std::span<const double>, const LimitReport& why) override {
    // A held move is made up for later; after a warm-up, a freeze or bad data the past is past.
    const bool pending = why.held() && (why.has(Reason::kCooldown) || why.has(Reason::kDeadband));
    if (!pending) last_error_ = error_;
  }

  void save(StateWriter& out) const override {
    const std::array<double, 4> state = {average_, error_, last_error_, known_ ? 1.0 : 0.0};
    out.put("pi", state);
  }

  void load(StateReader& in) override {
    std::array<double, 4> state{};
    in.get("pi", state);
    average_ = state[0];
    error_ = state[1];
    last_error_ = state[2];
    known_ = state[3] != 0;
  }

 private:
  Metrics::Value measured(const Metrics& metrics) const {
    return excess_ ? signed_excess_cv_sq(metrics) : metrics.*(field_->value);
  }

  Options options_;
  bool excess_;
  const MetricField* field_;
  double scale_, direction_;
  double average_ = 0;
  double error_ = 0, last_error_ = 0;
  bool known_ = false;
};

std::string check(const PolicyContext& context, const PolicyOptions& options) {
  const Options o = Options::from(options);
  if (!(context.initial > 0)) return "initial: must be above 0: moves are ratios";
  if (!(context.min > 0)) return "limits.min: must be above 0: moves are ratios";
  if (o.metric == kExcess && o.target < 0) return "target: must be at least 0 for excess_cv";
  return "";
}

}  // namespace

PolicyDescription pi() {
  const Options defaults;
  std::vector<std::string> metrics;
  for (const MetricField& field : metric_fields()) metrics.emplace_back(field.name);
  PolicyDescription d;
  d.name = "pi";
  d.summary = "log-domain proportional-integral control on any metric; tunes the auxiliary-loss weight";
  d.actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.options = {
      {.name = "metric",
       .default_value = defaults.metric,
       .unit = "",
       .description = "the process variable; excess_cv is averaged signed, in squares",
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
      {.name = "kp",
       .default_value = defaults.kp,
       .unit = "log ratio",
       .description = "move for a change of the relative error by 1",
       .min = 0,
       .max = 100},
      {.name = "ki",
       .default_value = defaults.ki,
       .unit = "log ratio a decision",
       .description = "move at every decision for a relative error of 1",
       .min = 0,
       .max = 100},
      {.name = "ema",
       .default_value = defaults.ema,
       .unit = "",
       .description = "weight of the newest window in the averaged metric",
       .min = 1e-3,
       .max = 1},
      {.name = "dead_band",
       .default_value = defaults.dead_band,
       .unit = "of the target",
       .description = "relative errors no larger than this are taken as zero",
       .min = 0,
       .max = 1},
  };
  d.make = [](const PolicyContext&, const PolicyOptions& options) {
    return std::make_unique<Pi>(Options::from(options));
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
