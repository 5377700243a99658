#include "control/safety.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "base/lanes.h"
#include "base/names.h"
#include "control/config_check.h"
#include "control/config_fields.h"

namespace moectl {
namespace {

constexpr Names<Reason, kReasonCount> kReasonNames{
    {"invalid", "missing_input", "no_data", "policy_failed", "skipped_step", "frozen",   "host_hold",
     "shadow",  "warmup",        "cadence", "cooldown",      "unresponsive", "probe",    "deadband",
     "rate",    "range",         "reach",   "guard",         "oscillation",  "rollback", "fallback"}};

// Weight of the newest loss, drop rate and reversal in their moving averages: a memory of about ten steps,
// short enough to follow the fall of the loss early in training.
constexpr double kEma = 0.1;
// Gain back-off: down fast, up slowly, so that a loop on the edge of stability stays quiet most of the time.
constexpr double kGainDown = 0.9;
constexpr double kGainUp = 1.02;
// Proposals are clipped at this many ranges from the applied value, so that every sum below stays finite.
constexpr double kFarAway = 1048576.0;
constexpr int kMaxCentringSteps = 128;

struct ClippedSum {
  double sum = 0;
  double free = 0;  // how many are not clipped
};

ClippedSum clipped_sum(std::span<const double> w, std::span<const double> lo, std::span<const double> hi,
                       double mu) {
  Double8 sum = splat(0), free = splat(0);
  for_each_eight(w.size(), [&](std::size_t i, auto at) {
    const Double8 v = at.get(&w[i]) - mu;
    const Double8 clipped = smaller(larger(v, at.get(&lo[i])), at.get(&hi[i]));
    sum += at.keep(clipped);
    free += at.keep(equal(clipped, v));
  });
  return {sum_of(sum), sum_of(free)};
}

// The μ for which Σ clip(w - μ, lo, hi) is zero, or as near as the bounds allow. The sum falls with μ and is
// linear between breakpoints: a Newton step is exact once it lands in the right piece, a bisection every
// other step bounds the number of steps. Without randomness or a clock, so the same bits everywhere.
double centring_shift(std::span<const double> w, std::span<const double> lo, std::span<const double> hi,
                      double start) {
  double left = w[0] - hi[0], right = w[0] - lo[0], scale = 0;
  for (std::size_t i = 0; i < w.size(); ++i) {
    left = std::min(left, w[i] - hi[i]);
    right = std::max(right, w[i] - lo[i]);
    scale += std::max(std::abs(lo[i]), std::abs(hi[i]));
  }
  const double rounding = std::numeric_limits<double>::epsilon() * scale;
  double mu = std::clamp(start, left, right);
  for (int step = 0; step < kMaxCentringSteps; ++step) {
    const ClippedSum at = clipped_sum(w, lo, hi, mu);
    if (std::abs(at.sum) <= rounding) break;
    (at.sum > 0 ? left : right) = mu;
    double next = 0.5 * (left + right);
    if (step % 2 == 0 && at.free > 0) {
      const double newton = mu + at.sum / at.free;
      if (newton > left && newton < right) next = newton;
    }
    if (next <= left || next >= right) break;  // nothing lies between the ends
    mu = next;
  }
  return mu;
}

double mean(std::span<const double> values) {
  return sum_of(values) / static_cast<double>(values.size());
}

double take_mean_out(std::span<double> values) {
  const double shift = mean(values);
  for (double& v : values) v -= shift;
  return shift;
}

// The largest of measure(i, at), at least 0.
template <class Measure>
double largest(std::size_t size, Measure measure) {
  Double8 most = splat(0);
  for_each_eight(size, [&](std::size_t i, auto at) { most = larger(most, measure(i, at)); });
  return largest_of(most);
}

bool all_inside(std::span<const double> v, std::span<const double> lo, std::span<const double> hi) {
  return largest(v.size(), [&](std::size_t i, auto at) {
           const Double8 x = at.get(&v[i]);
           return larger(at.get(&lo[i]) - x, x - at.get(&hi[i]));
         }) == 0;
}

}  // namespace

std::string_view name_of(Reason reason) {
  return kReasonNames[reason];
}

std::optional<Reason> reason_of(std::string_view name) {
  return kReasonNames.find(name);
}

bool LimitReport::held() const {
  if (has(Reason::kRollback) || has(Reason::kFallback)) return false;
  for (const Reason hold :
       {Reason::kInvalid, Reason::kMissingInput, Reason::kNoData, Reason::kPolicyFailed, Reason::kSkippedStep,
        Reason::kFrozen, Reason::kHostHold, Reason::kShadow, Reason::kWarmup, Reason::kCadence,
        Reason::kCooldown, Reason::kUnresponsive, Reason::kDeadband}) {
    if (has(hold)) return true;
  }
  return false;
}

Limits default_limits(Actuator actuator, std::optional<double> initial) {
  Limits limits;
  switch (actuator) {
    case Actuator::kExpertBias:
      limits = {.min = -16, .max = 16, .rate = 1, .center = true};
      break;
    case Actuator::kAuxLossWeight:
      limits = {.min = 1e-4, .max = 0.1, .rate = 0.1};
      if (initial == 0.0) limits.min = 0;
      break;
    case Actuator::kRouterTemperature:
      limits = {.min = 0.1, .max = 10, .rate = 0.1};
      break;
  }
  return limits;
}

std::optional<ConfigProblem> problem_in(Actuator actuator, const Limits& limits, double initial) {
  if (auto problem = check_fields(limits)) return problem;
  const auto wrong = [](const char* key, auto value, std::string constraint) {
    return ConfigProblem{key, shown(value), std::move(constraint)};
  };
  const std::string range = '[' + shown(limits.min) + ", " + shown(limits.max) + ']';
  if (limits.min > limits.max)
    return wrong("min", limits.min, "must not exceed max (" + shown(limits.max) + ")");
  // What an actuator allows less of than the list of the keys.
  const Range of_rate = is_multiplicative(actuator) ? kScalarRate : kRate;
  for (const auto& [key, value, range_of_key] :
       {std::tuple{"min", limits.min, range_of(actuator)}, std::tuple{"rate", limits.rate, of_rate}}) {
    const std::string constraint = violated(range_of_key, value);
    if (!constraint.empty()) return wrong(key, value, constraint + " for " + std::string(name_of(actuator)));
  }
  if (limits.center && is_multiplicative(actuator))
    return wrong("center", true, "only expert biases can be centred");
  if (limits.center && (limits.min > 0 || limits.max < 0))
    return wrong("center", true, "the range " + range + " must hold 0");
  if (!std::isfinite(initial) || initial < limits.min || initial > limits.max)
    return wrong("initial", initial, "must lie in [min, max] = " + range);
  return {};
}

SafetyLimiter::SafetyLimiter(Actuator actuator, const Limits& limits, const SafetyOptions& options, int size,
                             double safe_value)
    : actuator_(actuator), limits_(limits), options_(options), safe_value_(safe_value) {
  if (size < 1) throw std::invalid_argument("limiter: size " + std::to_string(size) + " must be at least 1");
  if (const auto wrong = problem_in(actuator, limits, safe_value)) {
    throw std::invalid_argument("limits: " + text_of(wrong));
  }
  const auto n = static_cast<std::size_t>(size);
  for (std::vector<double>* v : {&last_good_, &candidate_}) v->assign(n, safe_value);
  for (std::vector<double>* v : {&last_move_, &next_, &lo_, &hi_, &reach_}) v->assign(n, 0.0);
}

LimitReport SafetyLimiter::apply(const LimitContext& context, std::span<const double> wanted,
                                 std::span<double> applied) {
  if (applied.size() != next_.size() || (!wanted.empty() && wanted.size() != next_.size())) {
    throw std::invalid_argument("limiter: wanted and applied must hold " + std::to_string(next_.size()) +
                                " values, not " + std::to_string(wanted.size()) + " and " +
                                std::to_string(applied.size()));
  }
  LimitReport report;
  const bool jumped = must_roll_back(context);
  if (!jumped) remember_good(context.step, applied);

  const bool due = context.at_cadence && context.has_data && !wanted.empty();
  const bool valid = context.valid && (!due || all_finite(wanted));
  if (!valid || due) invalid_in_row_ = valid ? 0 : invalid_in_row_ + 1;
  if (context.frozen || context.host_hold) {
    report.add(!valid ? Reason::kInvalid : context.frozen ? Reason::kFrozen : Reason::kHostHold);
    return report;
  }
  if (jumped) {
    report.add(Reason::kRollback);
    for (std::size_t i = 0; i < applied.size(); ++i) {
      applied[i] = std::clamp(last_good_[i], limits_.min, limits_.max);
    }
    candidate_ = last_good_;
    last_move_step_ = kNever;  // later jumps are not blamed on this move again
    hold_until_ = context.step + options_.rollback->cooldown + 1;
    std::fill(last_move_.begin(), last_move_.end(), 0.0);
    return report;
  }
  if (!valid) {
    report.add(Reason::kInvalid);
    if (options_.fallback == Fallback::kInitial && options_.fallback_after > 0 &&
        invalid_in_row_ >= options_.fallback_after) {
      report.add(Reason::kFallback);
      take_common_out();
      std::fill(applied.begin(), applied.end(), safe_value_);
    }
    return report;
  }
  if (const auto hold = hold_reason(context)) {
    report.add(*hold);
    return report;
  }
  if (wanted.empty()) {  // a decision is due, but the policy made no proposal
    report.add(Reason::kNoData);
    return report;
  }

  const double far = kFarAway * (limits_.max - limits_.min + limits_.rate);
  Double8 sum = splat(0), most = splat(limits_.min - far), least = splat(limits_.max + far);
  for_each_eight(next_.size(), [&](std::size_t i, auto at) {
    const Double8 next =
        smaller(larger(at.get(&wanted[i]), splat(limits_.min - far)), splat(limits_.max + far));
    at.put(&next_[i], next);
    sum += at.keep(next);
    most = larger(most, next);
    least = smaller(least, next);
  });
  if (context.reach) {
    const double mean = sum_of(sum) / static_cast<double>(next_.size());
    // Rarely so, and then looked at exactly.
    if (std::max(largest_of(most) - mean, mean + largest_of(-least)) > *context.reach)
      stay_within_reach(context, applied, report);
  }
  if (options_.oscillation && back_off(applied) < 1) report.add(Reason::kOscillation);
  if (limits_.deadband > 0 && largest_move(applied) <= limits_.deadband) {
    report.add(Reason::kDeadband);
    return report;
  }
  if (actuator_ == Actuator::kExpertBias) {
    // The mean of values that came from elsewhere goes at once: it changes no choice, so no rate applies. It is taken anew,
    // since a state may say what it likes.
    if (common_ != 0) common_ = mean(applied);
    for (double& value : applied) value -= common_;
    take_common_out();
    clip_biases(applied, report);
  } else {
    clip_scalar(applied[0], report);
  }
  // The last line before values are in force.
  if (!all_finite(next_)) {
    report.add(Reason::kInvalid);
    return report;
  }
  if (!all_equal(next_, applied)) last_move_step_ = context.step;
  std::copy(next_.begin(), next_.end(), applied.begin());
  return report;
}

std::optional<Reason> SafetyLimiter::hold_reason(const LimitContext& context) const {
  if (context.missing_input) return Reason::kMissingInput;
  if (!context.has_data) return Reason::kNoData;
  if (context.policy_failed) return Reason::kPolicyFailed;
  if (context.skipped) return Reason::kSkippedStep;
  if (context.step < limits_.warmup) return Reason::kWarmup;
  if (!context.at_cadence) return Reason::kCadence;
  if (context.step < hold_until_ || context.step - last_move_step_ <= limits_.cooldown)
    return Reason::kCooldown;
  return std::nullopt;
}

// Larger ones are no losses; averages and differences of these are numbers.
constexpr double kLargestLoss = 1e15;

// Updates the averages of loss and drop rate. Returns whether one of them jumped soon after a move.
bool SafetyLimiter::must_roll_back(const LimitContext& context) {
  if (!options_.rollback) return false;
  const RollbackOptions& o = *options_.rollback;
  bool jumped = false;
  const auto follow = [&](std::optional<double> value, double jump, double& ema, bool& seen) {
    if (!value || !(std::abs(*value) <= kLargestLoss)) return;
    if (seen && *value - ema > jump) jumped = true;
    ema = seen ? ema + kEma * (*value - ema) : *value;
    seen = true;
  };
  follow(context.loss, o.loss_jump, loss_ema_, loss_seen_);
  follow(context.drop_rate, o.drop_jump, drop_ema_, drop_seen_);
  return jumped && context.step - last_move_step_ <= o.within;
}

void SafetyLimiter::remember_good(std::int64_t step, std::span<const double> applied) {
  if (!options_.rollback || step - candidate_step_ < options_.rollback->within) return;
  if (candidate_step_ == kNever) candidate_.assign(applied.begin(), applied.end());
  last_good_ = candidate_;
  candidate_.assign(applied.begin(), applied.end());
  candidate_step_ = step;
}

// The largest part of the move to next_, without the common shift that centring removes.
double SafetyLimiter::largest_move(std::span<const double> applied) const {
  if (is_multiplicative(actuator_)) {
    if (next_[0] == applied[0]) return 0;
    return next_[0] > 0 && applied[0] > 0 ? std::abs(std::log(next_[0] / applied[0]))
                                          : std::numeric_limits<double>::max();
  }
  const double shift = limits_.center ? mean(next_) : 0;
  double largest = 0;
  for (std::size_t i = 0; i < next_.size(); ++i) {
    largest = std::max(largest, std::abs(next_[i] - shift - applied[i]));
  }
  return largest;
}

// Shortens the move while successive moves keep reversing. Returns the factor on the move.
double SafetyLimiter::back_off(std::span<const double> applied) {
  const OscillationOptions& o = *options_.oscillation;
  const double shift = limits_.center ? mean(next_) : 0;
  double dot = 0, square = 0, last_square = 0;
  for (std::size_t i = 0; i < next_.size(); ++i) {
    const double move = next_[i] - shift - applied[i];
    dot += move * last_move_[i];
    square += move * move;
    last_square += last_move_[i] * last_move_[i];
    last_move_[i] = move;
  }
  if (square > 0 && last_square > 0) {
    const double reversal = std::max(0.0, -dot / (std::sqrt(square) * std::sqrt(last_square)));
    reversal_ema_ += kEma * (reversal - reversal_ema_);
    gain_ = reversal_ema_ > o.threshold ? std::max(o.min_gain, kGainDown * gain_)
                                        : std::min(1.0, kGainUp * gain_);
  }
  if (gain_ < 1) {
    for (std::size_t i = 0; i < next_.size(); ++i) next_[i] = applied[i] + gain_ * (next_[i] - applied[i]);
  }
  return gain_;
}

// next_ becomes clip(next_ - μ, max(min, applied - rate), min(max, applied + rate)).
void SafetyLimiter::clip_biases(std::span<const double> applied, LimitReport& report) {
  const std::size_t n = next_.size();
  if (limits_.center) {
    const double shift = take_mean_out(next_);
    // After a large common shift, only its rounding is left.
    if (std::abs(shift) > limits_.rate) take_mean_out(next_);
    // Proposals that differ by more than this end at a bound; nearer by, the sum keeps the digits that its zero needs.
    const double far = kFarAway * limits_.rate;
    for (std::size_t i = 0; i < n; ++i)
      next_[i] = std::min(std::max(next_[i], applied[i] - far), applied[i] + far);
  }
  for (std::size_t i = 0; i < n; ++i) {
    lo_[i] = std::min(std::max(limits_.min, applied[i] - limits_.rate), limits_.max);
    hi_[i] = std::max(std::min(limits_.max, applied[i] + limits_.rate), limits_.min);
  }
  if (report.has(Reason::kReach) && limits_.center) {
    for (std::size_t i = 0; i < n; ++i) {
      const double most = std::max(reach_[i], std::abs(applied[i]));
      lo_[i] = std::max(lo_[i], -most);
      hi_[i] = std::min(hi_[i], most);
    }
  }
  if (all_inside(next_, lo_, hi_)) return;
  const double mu = limits_.center ? centring_shift(next_, lo_, hi_, 0) : 0;
  double sum = 0, free = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const double v = next_[i] - mu;
    next_[i] = std::min(std::max(v, lo_[i]), hi_[i]);
    if (v < lo_[i]) report.add(lo_[i] == limits_.min ? Reason::kRange : Reason::kRate);
    if (v > hi_[i]) report.add(hi_[i] == limits_.max ? Reason::kRange : Reason::kRate);
    sum += next_[i];
    free += next_[i] > lo_[i] && next_[i] < hi_[i] ? 1 : 0;
  }
  if (!limits_.center) return;
  for (std::size_t i = 0; i < n && free > 0;
       ++i) {  // restores the last bits, which are lost where next_ was large
    if (next_[i] > lo_[i] && next_[i] < hi_[i]) {
      next_[i] = std::min(std::max(next_[i] - sum / free, lo_[i]), hi_[i]);
    }
  }
  // Ranges that reach far on one side only, with proposals beyond them, leave no shift between all and nothing.
  double rest = 0, scale = 0;
  for (std::size_t i = 0; i < n; ++i) {
    rest += next_[i];
    scale += std::max(std::abs(lo_[i]), std::abs(hi_[i]));
  }
  if (std::abs(rest) <= 4 * std::numeric_limits<double>::epsilon() * scale) return;
  for (std::size_t i = 0; i < n; ++i) {
    const double next = std::min(std::max(next_[i] - rest, lo_[i]), hi_[i]);
    rest -= next_[i] - next;
    next_[i] = next;
  }
}

// Outwards only: a bias that is farther out already, as one that was loaded, may stay or come back.
// Without what is known to be good, noise would take far biases inwards step by step, and never back.
void SafetyLimiter::stay_within_reach(const LimitContext& context, std::span<const double> applied,
                                      LimitReport& report) {
  const double reach = *context.reach;
  const std::span<const double> good = context.known_good;
  const double good_mean = good.empty() ? 0 : mean(good);
  const double wanted_mean = mean(next_), applied_mean = mean(applied);
  bool inside = true;
  for (std::size_t i = 0; i < next_.size(); ++i) {
    reach_[i] = std::max(
        {reach, std::abs(applied[i] - applied_mean), good.empty() ? 0 : std::abs(good[i] - good_mean)});
    inside = inside && std::abs(next_[i] - wanted_mean) <= reach_[i];
    lo_[i] = -reach_[i];
  }
  if (inside) return;
  report.add(Reason::kReach);
  // What is clipped on one side moves the mean; the distances from that one count, or the biases would creep outwards.
  const double mu = centring_shift(next_, lo_, reach_, wanted_mean);
  for (std::size_t i = 0; i < next_.size(); ++i) {
    next_[i] = mu + std::min(std::max(next_[i] - mu, lo_[i]), reach_[i]);
  }
}

void SafetyLimiter::clip_scalar(double applied, LimitReport& report) {
  const double wanted = next_[0];
  if (wanted == applied && wanted >= limits_.min && wanted <= limits_.max) return;
  const double lo = std::min(std::max(limits_.min, applied * std::exp(-limits_.rate)), limits_.max);
  const double hi = std::max(std::min(limits_.max, applied * std::exp(limits_.rate)), limits_.min);
  next_[0] = std::min(std::max(wanted, lo), hi);
  if (wanted < lo) report.add(lo == limits_.min ? Reason::kRange : Reason::kRate);
  if (wanted > hi) report.add(hi == limits_.max ? Reason::kRange : Reason::kRate);
}

void SafetyLimiter::start_from(std::span<const double> applied) {
  *this = SafetyLimiter(actuator_, limits_, options_, static_cast<int>(applied.size()), safe_value_);
  go_back_to(applied);
}

void SafetyLimiter::go_back_to(std::span<const double> applied) {
  std::copy(applied.begin(), applied.end(), last_good_.begin());
  std::copy(applied.begin(), applied.end(), candidate_.begin());
  common_ = limits_.center ? mean(applied) : 0;
}

// Of what may be put in force again, too: else a roll-back would bring it back, and it would leave at the rate.
void SafetyLimiter::take_common_out() {
  if (common_ == 0) return;
  for (std::vector<double>* values : {&last_good_, &candidate_}) {
    for (double& value : *values) value = std::clamp(value - common_, limits_.min, limits_.max);
  }
  common_ = 0;
}

bool SafetyLimiter::fits() const {
  const auto inside = [this](double x) { return x >= limits_.min && x <= limits_.max; };
  return std::all_of(last_good_.begin(), last_good_.end(), inside) &&
         std::all_of(candidate_.begin(), candidate_.end(), inside);
}

void SafetyLimiter::exchange(StateIo& io) {
  constexpr IntegerRange kStep{kNever, -kNever};
  io.values("limiter.last_good", last_good_);
  io.values("limiter.candidate", candidate_);
  io.value("limiter.candidate_step", candidate_step_, kStep);
  io.values("limiter.last_move", last_move_);
  io.value("limiter.invalid_in_row", invalid_in_row_);
  io.value("limiter.last_move_step", last_move_step_, kStep);
  io.value("limiter.hold_until", hold_until_, kStep);
  io.value("limiter.loss_average", loss_ema_);
  io.value("limiter.loss_seen", loss_seen_);
  io.value("limiter.drop_average", drop_ema_);
  io.value("limiter.drop_seen", drop_seen_);
  io.value("limiter.reversal", reversal_ema_);
  io.value("limiter.gain", gain_, {0, 1});
  io.value("limiter.common", common_, {kApplied.low, kApplied.high});
  if (!limits_.center) common_ = 0;
}

}  // namespace moectl
