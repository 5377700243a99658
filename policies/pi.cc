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
// `autotune: true` starts with an experiment (relay_experiment.h) that goes to the target from wherever the
// first value is, lets the loop swing around it by a factor of e for some fifty decisions, and reads from the
// swing the gains that suit this router. It needs no model and no gain; if it cannot finish, kp and ki stay
// as given.
//
// Source: Åström & Murray, "Feedback Systems" (2nd ed. 2021), ch. 11, for the velocity form and anti-windup.
// The fixed steps in use elsewhere (ReMoE, arXiv 2412.14711: ×1.2 or ÷1.2 at every step) know no size of an
// error and hunt for ever; see multiplicative.
//
// Limitations
// - The router answers to the weight over tens of steps. Give it time: a cadence of five to ten steps, and
//   gains that are small against the delay. The defaults suit a router that settles in some hundred steps.
// - A stronger auxiliary loss makes routing itself less specific, which lowers the floor and can cost loss;
//   the target says how much balance is wanted, not how much is good.
// - A temperature does not move the load of deterministic top-k routing. Use metrics that it moves.
#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "builtin.h"
#include "relay_experiment.h"
#include "set_point.h"

namespace moectl::policies {
namespace {

constexpr std::string_view kExcess = "excess_cv";

struct Options {
  SetPoint set_point;
  double kp = 1.0;
  double ki = 0.15;
  double ema = 0.3;
  double dead_band = 0.05;
  bool autotune = false;

  static Options from(const PolicyOptions& o) {
    return {.set_point = SetPoint::from(o),
            .kp = o.number("kp"),
            .ki = o.number("ki"),
            .ema = o.number("ema"),
            .dead_band = o.number("dead_band"),
            .autotune = o.flag("autotune")};
  }
};

// Of the experiment's relay: clear of the dead band and of the noise of a window.
double hysteresis_of(const Options& options) {
  return std::max(options.dead_band, 0.05);
}

class Pi final : public Policy {
 public:
  Pi(const Options& options, const PolicyContext& context)
      : options_(options),
        excess_(options.set_point.metric->name == kExcess),
        scale_(options.set_point.target != 0 ? std::abs(options.set_point.target) : 1.0),
        lowest_(std::log(context.min)),
        highest_(std::log(context.max)) {
    if (options.autotune) experiment_.emplace(hysteresis_of(options));
  }

  StatsNeeds needs() const override { return {.sequences = excess_}; }

  void propose(const LayerView& layer, std::span<double> value) override {
    const Metrics::Value seen = measured(options_.set_point.metrics(layer));
    if (!seen || !std::isfinite(*seen)) return;
    average_ = known_ ? average_ + options_.ema * (*seen - average_) : *seen;
    const double y = excess_ ? std::copysign(std::sqrt(std::abs(average_)), average_) : average_;
    error_ = std::clamp(options_.set_point.error(y) / scale_, -1.0, 1.0);
    const double seen_error = error_;
    if (std::abs(error_) <= options_.dead_band) error_ = 0;
    if (!known_) {
      last_error_ = error_;
      centre_ = std::log(value[0]);
    }
    known_ = true;
    const double move = options_.kp * (error_ - last_error_) + options_.ki * error_;
    if (experiment_ && !experiment_->done()) {
      // What is in force swings, so the law goes on from where it would be without.
      centre_ = std::clamp(centre_ + move, lowest_, highest_);
      value[0] = std::exp(centre_ + experiment_->next(seen_error, std::log(value[0])));
      if (experiment_->done()) adopt();
    } else {
      value[0] *= std::exp(move);
    }
  }

  void on_applied(std::span<const double>, const LimitReport& why) override {
    // A held move is made up for later; after a warm-up, a freeze or bad data the past is past.
    const bool pending = why.held() && (why.has(Reason::kCooldown) || why.has(Reason::kDeadband));
    if (!pending) last_error_ = error_;
  }

  void save(StateWriter& out) const override {
    const std::array<double, 5> state = {average_, error_, last_error_, centre_, known_ ? 1.0 : 0.0};
    out.put("pi", state);
    if (experiment_) experiment_->save(out);
  }

  void load(StateReader& in) override {
    std::array<double, 5> state{};
    in.get("pi", state);
    average_ = state[0];
    error_ = state[1];
    last_error_ = state[2];
    centre_ = state[3];
    known_ = state[4] != 0;
    if (!experiment_) return;
    experiment_->load(in);
    if (experiment_->done()) adopt();
  }

 private:
  Metrics::Value measured(const Metrics& metrics) const {
    return excess_ ? signed_excess_cv_sq(metrics) : metrics.*(options_.set_point.metric->value);
  }
  void adopt() {
    if (const std::optional<PiGains> gains = experiment_->gains()) {
      options_.kp = gains->kp;
      options_.ki = gains->ki;
    }
  }

  Options options_;
  bool excess_;
  double scale_, lowest_, highest_;
  std::optional<RelayExperiment> experiment_;
  double average_ = 0;
  double error_ = 0, last_error_ = 0;
  double centre_ = 0;  // ln of where the law would be, while an experiment makes the value swing
  bool known_ = false;
};

std::string check(const PolicyContext& context, const PolicyOptions& options) {
  const Options o = Options::from(options);
  if (!(context.initial > 0)) return "initial: must be above 0: moves are ratios";
  if (!(context.min > 0)) return "limits.min: must be above 0: moves are ratios";
  if (o.set_point.metric->name == kExcess && o.set_point.target < 0)
    return "target: must be at least 0 for excess_cv";
  return "";
}

}  // namespace

PolicyDescription pi() {
  const Options defaults;
  PolicyDescription d;
  d.name = "pi";
  d.summary = "log-domain proportional-integral control on any metric; tunes the auxiliary-loss weight";
  d.actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.options = SetPoint::options(kExcess, 0.1);
  d.options.push_back({.name = "kp",
                       .default_value = defaults.kp,
                       .unit = "log ratio",
                       .description = "move for a change of the relative error by 1",
                       .min = 0,
                       .max = 100});
  d.options.push_back({.name = "ki",
                       .default_value = defaults.ki,
                       .unit = "log ratio a decision",
                       .description = "move at every decision for a relative error of 1",
                       .min = 0,
                       .max = 100});
  d.options.push_back(ema_option(defaults.ema));
  d.options.push_back({.name = "dead_band",
                       .default_value = defaults.dead_band,
                       .unit = "of the target",
                       .description = "relative errors no larger than this are taken as zero",
                       .min = 0,
                       .max = 1});
  d.options.push_back(
      {.name = "autotune",
       .default_value = defaults.autotune,
       .unit = "",
       .description = "find kp and ki by a relay experiment first; those given serve if it fails"});
  d.make = [](const PolicyContext& context, const PolicyOptions& options) {
    return std::make_unique<Pi>(Options::from(options), context);
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
