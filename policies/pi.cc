// pi: proportional-integral control of a scalar actuator on any metric. On the auxiliary-loss weight, it tunes the
// weight until the metric is at its target.
//
// The idea. If the metric is above its target, the actuator moves; the farther, the more. The integral part (ki) moves
// it for as long as the error lasts; the proportional part (kp) answers to changes of the error at once. Errors within
// `error_tolerance` cause no move, and an error beyond it causes one only if it is more than noise.
//
//   y    = EMA of the metric, weight `ema`
//   e    = clip((y - target) / scale, -1, 1),  scale = |target|, 1 for a target of 0; -e if `effect: raises`
//   d    = the part of e beyond the tolerance: sgn(e) max(0, |e| - error_tolerance)
//   Δ    = kp · (d_t - d_last) + Σ ki · e,   d_last of the last move, the sum over the decisions since then,
//                                            except those at which the error vanishes by itself
//   ln w ← ln w + Δ   if |e| > error_tolerance and the evidence is complete, else ln w
//
// Logarithm. Both weight and temperature act by ratio: from 1e-4 to 1e-3 is as far as from 1e-2 to 1e-1. So the
// actuator moves in its logarithm, and one pair of gains serves the whole range.
//
// Velocity form. The applied value is the integral, so nothing winds up behind a bound. d_last belongs to the last move
// that was made, so a proportional part that was held back, by the limits or for lack of evidence, is made up for
// later. At a bound, where evidence is not required, d_last is the d that is nearest to leaving the bound. So noise
// does not move the value off the bound, and any smaller error does. With e in place of d, a steep router would swing
// from one edge of the tolerance to the other.
//
// Evidence is a sum over windows, one for each side of the tolerance (Page's test):
//
//   S ← clip(S + clip((±ε - error_tolerance)/σ, -4, 4), 0, 5),   complete at 5
//
// ε is the error of one window, and σ its noise, measured from second differences of the windows, so that steady change
// of the router is not counted as noise. Each move lowers S by two, so a further move soon follows if it is needed. A
// large error is answered at every decision, a small one after as many windows as it takes to tell it from noise.
//
// Errors that vanish by themselves. If the error, at its pace over about ten decisions, will be gone within thirty, ki
// does not act. Otherwise the integral would push a router that follows slowly far beyond the target; below some weight
// a further decrease has no effect, and the way back is long.
//
// Excess. For `excess_cv` the policy averages the signed excess before it takes the root: y = sgn(x) √|x|,
// x = EMA of (load_cv² - floor²). Even perfectly balanced routing shows the CV of sampling, which no weight removes. A
// target on load_cv below the floor would drive the weight to its upper bound and cost loss. The rectified excess_cv is
// biased near zero, the signed one is not.
//
// Sources: Åström & Murray, "Feedback Systems" (2nd ed. 2021), ch. 11, for the velocity form and anti-windup; Page,
// "Continuous inspection schemes" (Biometrika 41, 1954), for the test. The fixed steps in use elsewhere (ReMoE, arXiv
// 2412.14711: ×1.2 or ÷1.2 at every step) ignore the size of the error and never settle; see multiplicative.
//
// Limitations
// - The router answers to the weight over tens of steps. Use a cadence of five to ten steps, and gains that are small
//   for the delay. The defaults suit a router that settles in about ten decisions.
// - A router has memory: preferences that a weight far too high has levelled come back only as fast as the task teaches
//   them, under any policy.
// - A stronger auxiliary loss makes routing itself less specific, which lowers the floor and can cost loss;
//   the target says how much balance is wanted, not how much is good.
// - A temperature does not move the load of deterministic top-k routing. Use metrics that it moves.
#include <algorithm>
#include <cmath>

#include "policies/builtin.h"
#include "policies/set_point.h"

namespace moectl::policies {
namespace {

constexpr std::string_view kExcess = "excess_cv";
constexpr double kComplete = 5;        // evidence required for a move
constexpr double kSpent = 2;           // evidence that a move uses up
constexpr double kMostOfOne = 4;       // most evidence from one window: less than complete
constexpr double kSlower = 0.25;       // weight of the slower average, in ema
constexpr double kSoon = 30;           // an error that vanishes within so many decisions is left alone by ki
constexpr double kWildest = 4;         // errors of one window are clipped here
constexpr double kNoiseMemory = 0.05;  // weight of the newest window in σ²

struct Options {
  SetPoint set_point;
  double kp = 1.0;
  double ki = 0.15;

  static Options from(const PolicyOptions& o) {
    return {.set_point = SetPoint::from(o), .kp = o.number("kp"), .ki = o.number("ki")};
  }
};

// The standard deviation of a series without its steady change.
class Noise {
 public:
  void add(double x) {
    const double second = x - 2 * last_ + before_;
    before_ = last_;
    last_ = x;
    if (++seen_ < 3) return;
    variance_ += std::max(kNoiseMemory, 1 / (seen_ - 2)) * (second * second / 6 - variance_);
  }
  double deviation() const { return std::sqrt(variance_); }
  void exchange(StateIo& io) {
    constexpr double kMost = 4 * kWildest;  // of `second`
    io.value("pi.noise.last", last_, {-kWildest, kWildest});
    io.value("pi.noise.before", before_, {-kWildest, kWildest});
    io.value("pi.noise.variance", variance_, {0, kMost * kMost});
    io.value("pi.noise.seen", seen_, StateIo::kNotNegative);
  }

 private:
  double last_ = 0, before_ = 0, variance_ = 0, seen_ = 0;
};

class Pi final : public Policy {
 public:
  explicit Pi(const Options& options)
      : options_(options),
        goal_(options.set_point),
        excess_(goal_.metric->name == kExcess),
        scale_(goal_.target != 0 ? std::abs(goal_.target) : 1.0) {}

  StatsNeeds needs() const override {
    StatsNeeds needs = required();
    needs.sequences = excess_;  // for a better floor
    return needs;
  }
  StatsNeeds required() const override { return goal_.needs(); }

  void propose(const LayerView& layer, std::span<double> value) override {
    decided_ = false;
    const Metrics::Value seen = measured(goal_.metrics(layer));
    if (!seen || !std::isfinite(*seen)) return;
    average_ = known_ ? average_ + goal_.ema * (*seen - average_) : *seen;
    error_ = std::clamp(error_of(average_), -1.0, 1.0);
    const double single = std::clamp(error_of(*seen), -kWildest, kWildest);
    noise_.add(single);
    if (!known_) slow_ = error_, last_beyond_ = beyond();
    slow_ += kSlower * goal_.ema * (error_ - slow_);
    known_ = true;
    add_evidence(single);
    if (!vanishes_by_itself()) pending_ += options_.ki * error_;
    decided_ = is_out();
    if (!decided_) return;
    move_ = options_.kp * (beyond() - last_beyond_) + pending_;
    value[0] *= std::exp(move_);
  }

  void on_applied(std::span<const double>, const LimitReport& why) override {
    // A move held by cooldown or deadband is made up for later; one held by a warm-up, a freeze or bad data is not.
    if (!decided_ || (why.held() && (why.has(Reason::kCooldown) || why.has(Reason::kDeadband)))) return;
    pending_ = 0;
    above_ = std::max(0.0, above_ - kSpent);
    below_ = std::max(0.0, below_ - kSpent);
    bounded_ = why.has(Reason::kRange) && move_ != 0;
    if (bounded_) {
      last_beyond_ = move_ > 0 ? std::min(last_beyond_, beyond()) : std::max(last_beyond_, beyond());
    } else {
      last_beyond_ = beyond();
    }
  }

  void exchange(StateIo& io) override {
    io.value("pi.average", average_);
    io.value("pi.error", error_, {-1, 1});
    io.value("pi.last_beyond", last_beyond_, {-1, 1});
    io.value("pi.slow", slow_, {-1, 1});
    io.value("pi.above", above_, {0, kComplete});
    io.value("pi.below", below_, {0, kComplete});
    io.value("pi.pending", pending_);
    io.value("pi.known", known_);
    io.value("pi.bounded", bounded_);
    noise_.exchange(io);
  }

 private:
  Metrics::Value measured(const Metrics& metrics) const {
    return excess_ ? signed_excess_cv_sq(metrics) : metrics.*(goal_.metric->value);
  }
  // e of a measured value, or of an average of measured values; not clipped.
  double error_of(double value) const {
    const double y = excess_ ? std::copysign(std::sqrt(std::abs(value)), value) : value;
    return goal_.error(y) / scale_;
  }
  // Whether the error, at its present pace, will be gone within kSoon decisions.
  bool vanishes_by_itself() const {
    if (bounded_) return false;  // nothing was moved, so a falling error is noise
    const double gone = error_ > 0 ? slow_ - error_ : error_ - slow_;
    const double behind =
        (1 / kSlower - 1) / goal_.ema;  // lag of the slower average behind the faster one, decisions
    return gone * kSoon > behind * std::abs(error_);
  }
  // d of the equations above.
  double beyond() const {
    return std::copysign(std::max(0.0, std::abs(error_) - goal_.error_tolerance), error_);
  }
  // Adds the evidence of one window.
  void add_evidence(double single) {
    const double sigma = std::max(noise_.deviation(), 1e-9);
    const auto sum = [&](double before, double beyond) {
      return std::clamp(before + std::clamp(beyond / sigma, -kMostOfOne, kMostOfOne), 0.0, kComplete);
    };
    above_ = sum(above_, single - goal_.error_tolerance);
    below_ = sum(below_, -single - goal_.error_tolerance);
  }
  // Whether the error is beyond the tolerance. Always true without a tolerance; also at a bound, where no decision
  // moves the value until the error falls.
  bool is_out() {
    if (goal_.error_tolerance == 0 || bounded_) return true;
    if (std::abs(error_) <= goal_.error_tolerance) {
      pending_ = 0;
      return false;
    }
    return (error_ > 0 ? above_ : below_) >= kComplete;
  }

  Options options_;
  SetPoint goal_;
  bool excess_;
  double scale_;
  Noise noise_;  // of the windows' errors
  double average_ = 0;
  double error_ = 0, last_beyond_ = 0, slow_ = 0;
  double above_ = 0, below_ = 0;  // evidence that the error lies beyond the tolerance, on either side
  double pending_ = 0;            // integral part of ln w since the last move
  double move_ = 0;               // move of ln w, from propose to on_applied
  bool decided_ = false;          // whether the last propose made a move
  bool known_ = false;
  bool bounded_ = false;  // the last move was clipped at a bound
};

std::string check(const PolicyContext& context, const PolicyOptions& options) {
  const Options o = Options::from(options);
  if (!(context.initial > 0)) return "initial: must be above 0: moves are ratios";
  if (!(context.min > 0)) return "limits.min: must be above 0: moves are ratios";
  if (o.set_point.metric->name == kExcess && o.set_point.target < 0)
    return "target: must be at least 0 for excess_cv";
  if (o.set_point.error_tolerance > 1) return "error_tolerance: must be at most 1: errors are clipped there";
  return "";
}

}  // namespace

PolicyDescription pi() {
  const Options defaults;
  PolicyDescription d;
  d.name = "pi";
  d.summary = "log-domain proportional-integral control on any metric; tunes the auxiliary-loss weight";
  d.actuators = {Actuator::kAuxLossWeight, Actuator::kRouterTemperature};
  d.options = SetPoint::options(kExcess, 0.1, 0.3, 0.05);
  d.options.push_back(
      {"kp", defaults.kp, "log ratio", "move for a change of the relative error by 1", 0, 100});
  d.options.push_back({"ki", defaults.ki, "log ratio a decision",
                       "move at every decision for a relative error of 1", 0, 100});
  d.details =
      "On aux_loss_weight: the weight multiplies Switch's loss N sum f P, where f sums to 1. The same number "
      "as\n"
      "Hugging Face's router_aux_loss_coef counts k times as much there, since its f sums to k.\n"
      "Which target to give: docs/targets.md.\n";
  d.make = [](const PolicyContext&, const PolicyOptions& options) {
    return std::make_unique<Pi>(Options::from(options));
  };
  d.check = check;
  return d;
}

}  // namespace moectl::policies
