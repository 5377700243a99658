#include "moectl/guard.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <sstream>
#include <string>

namespace moectl {
namespace {

// Slow enough to remember what entropy was before a collapse that takes a hundred steps.
constexpr double kEntropyEma = 0.01;
constexpr double kVioEma = 0.1;
constexpr double kGapEma = 0.1;
// Rolled back or not: an intervention has helped if MaxVio is under this share of what it began at.
constexpr double kHelped = 0.7;
// A relapse doubles the time for which balance must hold before the guard lets go again, up to 2^6 times.
constexpr std::int64_t kMostRelapses = 6;
// Steps of the biases follow the signs of their errors (Rprop, Riedmiller & Braun 1993): how far an expert has to go, and
// how steeply its load answers, differ by orders of magnitude under a softmax.
constexpr double kGrow = 1.2, kShrink = 0.5, kSmallestStep = 1.0 / 64, kLargestStep = 4;
// A scalar is back where it was once it is this close, as a ratio.
constexpr double kBack = 1e-9;

std::string violated(const char* key, double value, const char* constraint) {
  std::ostringstream out;
  out << key << ": " << value << ": " << constraint;
  return out.str();
}

bool is_share(double x) {
  return x > 0 && x <= 1;
}

}  // namespace

std::string check_guard(const GuardOptions& o) {
  if (!is_share(o.entropy_fall)) return violated("entropy_fall", o.entropy_fall, "must be in (0, 1]");
  if (!is_share(o.dead_share)) return violated("dead_share", o.dead_share, "must be in (0, 1]");
  if (!is_share(o.max_token_share))
    return violated("max_token_share", o.max_token_share, "must be in (0, 1]");
  const auto count = [](const char* key, std::int64_t value, std::int64_t least) {
    return value < least ? violated(key, static_cast<double>(value),
                                    least == 0 ? "must be at least 0" : "must be at least 1")
                         : std::string();
  };
  for (const std::string& wrong :
       {count("warmup", o.warmup, 0), count("confirm", o.confirm, 1), count("dwell", o.dwell, 1),
        count("patience", o.patience, 1), count("cooldown", o.cooldown, 0)}) {
    if (!wrong.empty()) return wrong;
  }
  if (!(o.aux_factor >= 1) || !std::isfinite(o.aux_factor)) {
    return violated("aux_factor", o.aux_factor, "must be at least 1 and finite");
  }
  if (!(o.temperature_factor >= 1) || !std::isfinite(o.temperature_factor)) {
    return violated("temperature_factor", o.temperature_factor, "must be at least 1 and finite");
  }
  if (!(o.bias_step >= 0) || !std::isfinite(o.bias_step)) {
    return violated("bias_step", o.bias_step, "must be at least 0 and finite");
  }
  if (!(o.recovered_max_vio > 0)) {
    return violated("recovered_max_vio", o.recovered_max_vio, "must be above 0");
  }
  return "";
}

std::string_view name_of(GuardState state) {
  constexpr std::array<std::string_view, 5> kNames = {"watching", "intervening", "handing_back",
                                                      "rolling_back", "cooldown"};
  return kNames[static_cast<std::size_t>(state)];
}

std::string_view name_of(GuardTrigger trigger) {
  constexpr std::array<std::string_view, 6> kNames = {"none",         "fhs",      "entropy_fall",
                                                      "dead_experts", "max_load", "relapse"};
  return kNames[static_cast<std::size_t>(trigger)];
}

LayerGuard::LayerGuard(const GuardOptions& options, int experts, int top_k)
    : options_(options),
      top_k_(top_k),
      handed_back_(-(std::int64_t{1} << 60)),
      errors_(static_cast<std::size_t>(experts), 0.0),
      steps_(static_cast<std::size_t>(experts), 1.0),
      bias_before_(static_cast<std::size_t>(experts), 0.0) {}

// The trigger that stands, with its numbers. Entropy is held against its own past, the rest against levels.
GuardReport LayerGuard::strongest_trigger(std::int64_t step, const RoutingStats& stats,
                                          const Metrics& metrics) {
  GuardReport seen;
  const auto raise = [&seen](GuardTrigger trigger, double value, double threshold) {
    if (seen.trigger == GuardTrigger::kNone) seen = {GuardState::kWatching, trigger, value, threshold};
  };
  if (options_.fhs && metrics.fhs_alarm.value_or(0) > 0 && metrics.fhs)
    raise(GuardTrigger::kFhs, *metrics.fhs, 1);
  if (metrics.entropy_normalized) {
    const double level = entropy_average_ - options_.entropy_fall;
    if (entropy_known_ && *metrics.entropy_normalized < level) {
      raise(GuardTrigger::kEntropyFall, *metrics.entropy_normalized, level);
    }
    entropy_average_ = entropy_known_
                           ? entropy_average_ + kEntropyEma * (*metrics.entropy_normalized - entropy_average_)
                           : *metrics.entropy_normalized;
    entropy_known_ = true;
  }
  const auto experts = static_cast<double>(stats.experts());
  if (metrics.dead_experts && *metrics.dead_experts >= options_.dead_share * experts) {
    raise(GuardTrigger::kDeadExperts, *metrics.dead_experts, options_.dead_share * experts);
  }
  // With k = N every expert gets every token, and nothing is wrong with that.
  if (metrics.max_load && top_k_ < stats.experts() && *metrics.max_load * top_k_ > options_.max_token_share) {
    raise(GuardTrigger::kMaxLoad, *metrics.max_load, options_.max_token_share / top_k_);
  }
  // The recovery goes on being watched: whoever could not hold the balance gets help before all is lost again.
  if (step - handed_back_ < options_.patience && vio_average_ > options_.recovered_max_vio) {
    raise(GuardTrigger::kRelapse, vio_average_, options_.recovered_max_vio);
  }
  return seen;
}

void LayerGuard::enter(GuardState state, std::int64_t step) {
  report_.state = state;
  since_ = step;
  confirmed_ = 0;
  balanced_ = 0;
}

void LayerGuard::observe(std::int64_t step, const RoutingStats& stats, const Metrics& metrics,
                         std::span<const double> targets,
                         const std::span<const double> (&in_force)[kActuatorCount]) {
  const auto total = static_cast<double>(stats.assignments());
  double worst = 0;
  for (std::size_t i = 0; i < errors_.size(); ++i) {
    const double target = targets[i] * total;
    errors_[i] = target > 0 ? (target - static_cast<double>(stats.counts()[i])) / target : 0;
    worst = std::max(worst, -errors_[i]);
  }
  vio_average_ += kVioEma * (worst - vio_average_);
  if (const auto gap = stats.mean_gap(); gap && *gap >= 0) {
    const double now = top_k_ * *gap;
    gap_ = gap_ > 0 ? gap_ + kGapEma * (now - gap_) : now;
  }
  const GuardReport seen = strongest_trigger(step, stats, metrics);
  switch (report_.state) {
    case GuardState::kWatching:
      confirmed_ = seen.trigger != GuardTrigger::kNone && step >= options_.warmup ? confirmed_ + 1 : 0;
      report_ = seen;
      if (confirmed_ < options_.confirm) break;
      std::copy(in_force[0].begin(), in_force[0].end(), bias_before_.begin());
      aux_before_ = in_force[1][0];
      temperature_before_ = in_force[2][0];
      start_vio_ = worst;
      vio_average_ = worst;
      relapses_ = step - handed_back_ < options_.patience ? std::min(relapses_ + 1, kMostRelapses) : 0;
      for (std::size_t i = 0; i < steps_.size(); ++i) steps_[i] = errors_[i] < 0 ? -1 : 1;
      enter(GuardState::kIntervening, step);
      break;
    case GuardState::kIntervening:
      size_steps();
      balanced_ =
          seen.trigger == GuardTrigger::kNone && worst <= options_.recovered_max_vio ? balanced_ + 1 : 0;
      if (balanced_ >= options_.dwell << relapses_) {
        enter(GuardState::kHandingBack, step);
      } else if (step - since_ >= options_.patience << relapses_) {
        // Not balanced in time. What has helped is kept, and the scalars go back; what has not is undone.
        enter(vio_average_ <= kHelped * start_vio_ ? GuardState::kHandingBack : GuardState::kRollingBack,
              step);
      }
      break;
    case GuardState::kHandingBack:
      size_steps();
      // Balance must have outlived the scalars' return before the biases are let go as well.
      balanced_ = scalars_are_back(in_force) && worst <= options_.recovered_max_vio ? balanced_ + 1 : 0;
      if (balanced_ >= options_.dwell || step - since_ >= options_.patience) {
        handed_back_ = step;
        enter(GuardState::kWatching, step);
      }
      break;
    case GuardState::kRollingBack:
      if (scalars_are_back(in_force) &&
          std::equal(in_force[0].begin(), in_force[0].end(), bias_before_.begin(),
                     [](double a, double b) { return std::abs(a - b) < kBack; })) {
        enter(GuardState::kCooldown, step);
      } else if (step - since_ >= options_.patience) {  // a limit keeps it from getting back
        enter(GuardState::kCooldown, step);
      }
      break;
    case GuardState::kCooldown:
      if (step - since_ >= options_.cooldown) enter(GuardState::kWatching, step);
      break;
  }
}

void LayerGuard::size_steps() {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const bool turned = (errors_[i] < 0) != (steps_[i] < 0);
    const double size =
        std::clamp(std::abs(steps_[i]) * (turned ? kShrink : kGrow), kSmallestStep, kLargestStep);
    steps_[i] = errors_[i] < 0 ? -size : size;
  }
}

bool LayerGuard::scalars_are_back(const std::span<const double> (&in_force)[kActuatorCount]) const {
  const auto near = [](double a, double b) { return std::abs(a - b) <= kBack * std::abs(b); };
  return near(in_force[1][0], aux_before_) && near(in_force[2][0], temperature_before_);
}

bool LayerGuard::overrides(Actuator actuator, const Limits& limits, std::span<const double> in_force,
                           std::span<double> wanted) const {
  const bool intervening = report_.state == GuardState::kIntervening;
  const bool undoing = report_.state == GuardState::kRollingBack;
  const bool handing_back = report_.state == GuardState::kHandingBack;
  if (!intervening && !undoing && !handing_back) return false;
  if (actuator == Actuator::kExpertBias) {
    // Also while the scalars glide back: scores in probability space change with the temperature, and with them
    // what the biases weigh.
    if (undoing) {
      std::copy(bias_before_.begin(), bias_before_.end(), wanted.begin());
      return true;
    }
    // The gap is the unit of a step; without one, the rate is all that is known of the scores.
    const double step = gap_ > 0 ? options_.bias_step * gap_ : limits.rate;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      wanted[i] = in_force[i] + step * std::abs(steps_[i]) * std::min(std::max(errors_[i], -1.0), 1.0);
    }
    return true;
  }
  const bool aux = actuator == Actuator::kAuxLossWeight;
  const double before = aux ? aux_before_ : temperature_before_;
  wanted[0] = intervening ? before * (aux ? options_.aux_factor : options_.temperature_factor) : before;
  return true;
}

void LayerGuard::save(StateWriter& out) const {
  const std::array<std::int64_t, 8> steps = {static_cast<std::int64_t>(report_.state),
                                             static_cast<std::int64_t>(report_.trigger),
                                             since_,
                                             confirmed_,
                                             balanced_,
                                             entropy_known_ ? 1 : 0,
                                             relapses_,
                                             handed_back_};
  out.put("guard_steps", steps);
  const std::array<double, 8> values = {report_.value, report_.threshold, entropy_average_,    gap_,
                                        start_vio_,    aux_before_,       temperature_before_, vio_average_};
  out.put("guard_values", values);
  out.put("guard_bias_before", bias_before_);
  out.put("guard_bias_steps", steps_);
}

void LayerGuard::load(StateReader& in) {
  std::array<std::int64_t, 8> steps{};
  in.get("guard_steps", steps);
  std::array<double, 8> values{};
  in.get("guard_values", values);
  in.get("guard_bias_before", bias_before_);
  in.get("guard_bias_steps", steps_);
  if (steps[0] < 0 || steps[0] > 4 || steps[1] < 0 || steps[1] > 5 || steps[6] < 0 ||
      steps[6] > kMostRelapses) {
    throw StateError("guard_steps: not a state or trigger of the guard");
  }
  report_ = {static_cast<GuardState>(steps[0]), static_cast<GuardTrigger>(steps[1]), values[0], values[1]};
  since_ = steps[2];
  confirmed_ = steps[3];
  balanced_ = steps[4];
  entropy_known_ = steps[5] != 0;
  relapses_ = steps[6];
  handed_back_ = steps[7];
  entropy_average_ = values[2];
  gap_ = values[3];
  start_vio_ = values[4];
  aux_before_ = values[5];
  temperature_before_ = values[6];
  vio_average_ = values[7];
}

}  // namespace moectl
