#include "control/guard.h"
#include "base/format.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

namespace moectl {
namespace {

// Slow enough to remember what entropy was before a collapse that takes a hundred steps.
constexpr double kEntropyEma = 0.01;
constexpr double kVioEma = 0.1;
constexpr double kGapEma = 0.1;
constexpr double kLoadEma = 0.05;  // chance averages out over twenty steps
// What never balanced cannot lose its balance: the law is too weak for the layer, and a raised load is its daily state.
// A layer has been balanced once MaxVio of all experts but the heaviest, among themselves and smoothed, came within this
// share of what counts as balanced: a law that balances the others and loses hold of one has lost the balance.
constexpr double kWellBalanced = 0.25;
// Of the smoothed MaxVio of single steps, as much counts as lost balance as of smoothed loads. Experts that take each
// other's tokens in turn are heavy in no average; data that differ from step to step look alike, but less so.
constexpr double kInTurn = 0.5;
// Balanced is at least this many times the MaxVio that chance alone is expected to show.
constexpr double kFloors = 2;
// Rolled back or not: an intervention has helped if MaxVio is under this share of what it began at.
constexpr double kHelped = 0.7;
// Balance that is lost while the guard takes itself back, or soon after, doubles the time for which it holds on before it
// tries again, and for which it watches after that: up to 2^6 times.
constexpr std::int64_t kMostRelapses = 6;
// The guard has been needed again soon if it is within this many times `patience` after letting go (doubled likewise).
constexpr std::int64_t kSoon = 4;
// Scalars are taken back in steps of this much of the exponent of their factors.
constexpr double kRung = 0.25;
// Steps of the biases follow the signs of their errors (Rprop, Riedmiller & Braun 1993): how far an expert has to go, and
// how steeply its load answers, differ by orders of magnitude under a softmax.
// Experts that sank together are alike under a softmax: a thousandth of a gap can move all tokens of one to another.
constexpr double kGrow = 1.2, kShrink = 0.5, kSmallestStep = 1.0 / 1024, kLargestStep = 4;
// After a relapse steps go on at the size that was found, yet no smaller than this: the layer is near balance, and a
// first step meant for a collapse would throw it.
constexpr double kSmallestFirstStep = 1.0 / 256;
// Doubled after every relapse and added to steps: it must not overflow.
constexpr std::int64_t kMostSteps = 1'000'000'000'000;
// How fast the scalars are raised after a relapse, while the biases alone do not balance.
constexpr double kRaise = 0.1;
// A scalar is back where it was once it is this close, as a ratio.
constexpr double kBack = 1e-9;

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
    if (value > kMostSteps) return violated(key, static_cast<double>(value), "must be at most 1e12");
    return value < least ? violated(key, static_cast<double>(value),
                                    least == 0 ? "must be at least 0" : "must be at least 1")
                         : std::string();
  };
  for (const std::string& wrong :
       {count("lost_after", o.lost_after, 1), count("warmup", o.warmup, 0), count("confirm", o.confirm, 1),
        count("dwell", o.dwell, 1), count("patience", o.patience, 1), count("cooldown", o.cooldown, 0)}) {
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
  constexpr std::array<std::string_view, 6> kNames = {"watching", "intervening",  "handing_back",
                                                      "holding",  "rolling_back", "cooldown"};
  return kNames[static_cast<std::size_t>(state)];
}

std::string_view name_of(GuardTrigger trigger) {
  constexpr std::array<std::string_view, 7> kNames = {
      "none", "fhs", "entropy_fall", "dead_experts", "max_load", "lost_balance", "relapse"};
  return kNames[static_cast<std::size_t>(trigger)];
}

std::string_view name_of(GuardCause cause) {
  constexpr std::array<std::string_view, 9> kNames = {"none",    "triggered", "balanced", "helped", "lost",
                                                      "no_help", "undone",    "time_up",  "rested"};
  return kNames[static_cast<std::size_t>(cause)];
}

LayerGuard::LayerGuard(const GuardOptions& options, const StatsShape& shape, const LoadTargets& targets)
    : options_(options),
      top_k_(shape.top_k),
      targets_(targets.shares().begin(), targets.shares().end()),
      even_target_(1.0 / targets.wanted()),
      wanted_(targets.wanted()),
      handed_back_(-(std::int64_t{1} << 60)),
      errors_(static_cast<std::size_t>(shape.experts), 0.0),
      smoothed_(static_cast<std::size_t>(shape.experts), 0.0),
      steps_(static_cast<std::size_t>(shape.experts), 1.0),
      bias_before_(static_cast<std::size_t>(shape.experts), 0.0) {
  if (targets.equal()) {
    targets_.assign(errors_.size(), even_target_);
    return;
  }
  entropy_on_target_ = *metrics_on_target(shape, {.targets = targets_}).entropy_normalized;
  const double k = top_k_, even = k / shape.experts, least = options_.max_token_share;
  for (const double w : targets_) {
    const double raised = k < shape.experts ? std::max(0.0, k * w - even) / (1 - even) : 0;
    token_shares_.push_back(least + (1 - least) * raised);
  }
}

// Errors of this step and smoothed, MaxVio of both, the gap, the level of balance, and for how long it has been lost.
void LayerGuard::follow_loads(std::int64_t step, const RoutingStats& stats, const Metrics& metrics) {
  level_ = std::max(options_.recovered_max_vio, kFloors * floor_of(metrics).max_vio.value_or(0));
  const auto total = static_cast<double>(stats.assignments());
  double heaviest = 0, second = 0, target_of_heaviest = 0;  // smoothed loads, relative to their targets
  vio_ = 0;
  for (std::size_t i = 0; i < errors_.size(); ++i) {
    // What is to get nothing has too much by what it gets, in mean targets (load_targets.h).
    const double target = targets_[i] * total, unit = target > 0 ? target : even_target_ * total;
    if (!(unit > 0)) continue;
    errors_[i] = (target - static_cast<double>(stats.counts()[i])) / unit;
    smoothed_[i] = begun_ ? smoothed_[i] + kLoadEma * (errors_[i] - smoothed_[i]) : errors_[i];
    vio_ = std::max(vio_, -errors_[i]);
    const double load = 1 - smoothed_[i];
    second = std::max(second, std::min(heaviest, load));
    if (load > heaviest) {
      heaviest = load;
      target_of_heaviest = targets_[i];
    }
  }
  begun_ = true;
  vio_average_ += kVioEma * (vio_ - vio_average_);
  if (const auto gap = stats.mean_gap(); gap && *gap >= 0) {
    const double now = top_k_ * *gap;
    gap_ = gap_ > 0 ? gap_ + kGapEma * (now - gap_) : now;
  }
  if (step < options_.warmup) return;
  excess_ = std::max(heaviest - 1, kInTurn * vio_average_);
  // second / mean of the others - 1, without the division: "<", since others without any token are not balanced.
  was_balanced_ = was_balanced_ || second * (1 - target_of_heaviest) <
                                       (1 + kWellBalanced * level_) * (1 - heaviest * target_of_heaviest);
  const bool lost = was_balanced_ && excess_ > level_;
  lost_steps_ = lost ? lost_steps_ + 1 : 0;
  lost_sum_ = lost ? lost_sum_ + excess_ : 0;
}

// The load that is farthest above its threshold. Under equal targets all have one, and that is the largest load.
void LayerGuard::watch_max_load(const RoutingStats& stats, const Metrics& metrics) {
  max_load_ = metrics.max_load.value_or(0);
  most_tokens_ = options_.max_token_share;
  const auto total = static_cast<double>(stats.assignments());
  double farthest = -1;
  for (std::size_t i = 0; i < token_shares_.size(); ++i) {
    const double load = static_cast<double>(stats.counts()[i]) / total;
    if (load * top_k_ - token_shares_[i] <= farthest) continue;
    farthest = load * top_k_ - token_shares_[i];
    max_load_ = load;
    most_tokens_ = token_shares_[i];
  }
}

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
    // On its way from even loads to unequal targets the entropy falls, and nothing is wrong with that.
    const double level = std::min(entropy_average_, entropy_on_target_) - options_.entropy_fall;
    if (entropy_known_ && *metrics.entropy_normalized < level) {
      raise(GuardTrigger::kEntropyFall, *metrics.entropy_normalized, level);
    }
    entropy_average_ = entropy_known_
                           ? entropy_average_ + kEntropyEma * (*metrics.entropy_normalized - entropy_average_)
                           : *metrics.entropy_normalized;
    entropy_known_ = true;
  }
  if (metrics.dead_experts && *metrics.dead_experts >= options_.dead_share * wanted_) {
    raise(GuardTrigger::kDeadExperts, *metrics.dead_experts, options_.dead_share * wanted_);
  }
  // With k = N every expert gets every token, and nothing is wrong with that.
  watch_max_load(stats, metrics);
  if (metrics.max_load && top_k_ < stats.experts() && max_load_ * top_k_ > most_tokens_) {
    raise(GuardTrigger::kMaxLoad, max_load_, most_tokens_ / top_k_);
  }
  // A law on its way back has less now than on average since the balance was lost.
  if (lost_steps_ >= options_.lost_after && excess_ * static_cast<double>(lost_steps_) >= lost_sum_) {
    raise(GuardTrigger::kLostBalance, excess_, level_);
  }
  // The recovery goes on being watched: whoever could not hold the balance gets help before all is lost again.
  if (let_go_lately(step) && vio_average_ > bar()) raise(GuardTrigger::kRelapse, vio_average_, bar());
  return seen;
}

void LayerGuard::enter(GuardState state, std::int64_t step, GuardCause cause, double value,
                       double threshold) {
  report_.state = state;
  report_.cause = cause;
  report_.value = value;
  report_.threshold = threshold;
  since_ = step;
  confirmed_ = 0;
  balanced_ = 0;
  if (state == GuardState::kHandingBack) take_back_a_rung();
}

void LayerGuard::observe(std::int64_t step, const RoutingStats& stats, const Metrics& metrics,
                         const std::span<const double> (&in_force)[kActuatorCount]) {
  follow_loads(step, stats, metrics);
  const GuardReport seen = strongest_trigger(step, stats, metrics);
  const std::int64_t spent = step - since_;
  const auto end = [&](GuardState next, GuardCause cause, std::int64_t allowed) {
    enter(next, step, cause, static_cast<double>(spent), static_cast<double>(allowed));
  };
  switch (report_.state) {
    case GuardState::kWatching:
      confirmed_ = seen.trigger != GuardTrigger::kNone && step >= options_.warmup ? confirmed_ + 1 : 0;
      report_ = seen;
      if (confirmed_ >= options_.confirm) take_over(step, in_force);
      break;
    case GuardState::kIntervening: {
      size_steps();
      const bool balanced = seen.trigger == GuardTrigger::kNone && vio_ <= level_;
      balanced_ = balanced ? balanced_ + 1 : 0;
      if (balanced_ >= options_.dwell) {
        vio_average_ = vio_;  // forgets the collapse: what counts now is what letting go does
        enter(GuardState::kHandingBack, step, GuardCause::kBalanced, vio_, level_);
      } else if (spent >= options_.patience) {
        // Not balanced in time. What has helped is kept as far as it goes on to help; what has not is undone.
        const double bound = kHelped * start_vio_;
        if (vio_average_ <= bound) {
          helped_ = bound;
          enter(GuardState::kHandingBack, step, GuardCause::kHelped, vio_average_, bound);
        } else {
          enter(GuardState::kRollingBack, step, GuardCause::kNoHelp, vio_average_, bound);
        }
      }
      break;
    }
    case GuardState::kHandingBack:
      size_steps();
      hand_back(step, in_force);
      break;
    case GuardState::kHolding: {
      size_steps();
      const bool stands = vio_average_ <= bar();
      if (!stands) raised_ = std::min(1.0, raised_ + kRaise);
      balanced_ = stands ? balanced_ + 1 : 0;
      confirmed_ = stands ? 0 : confirmed_ + 1;
      if (confirmed_ >= options_.patience) {
        enter(GuardState::kRollingBack, step, GuardCause::kNoHelp, vio_average_, bar());
      } else if (spent >= options_.patience << relapses_ && balanced_ >= options_.dwell) {
        end(GuardState::kHandingBack, GuardCause::kRested, options_.patience << relapses_);
      }
      break;
    }
    case GuardState::kRollingBack: {
      double left = 0;
      for (std::size_t i = 0; i < bias_before_.size(); ++i) {
        left = std::max(left, std::abs(in_force[0][i] - bias_before_[i]));
      }
      if (scalars_are_back(in_force) && left <= kBack) {
        enter(GuardState::kCooldown, step, GuardCause::kUndone, left, kBack);
      } else if (spent >= options_.patience) {  // a limit keeps it from getting back
        end(GuardState::kCooldown, GuardCause::kTimeUp, options_.patience);
      }
      break;
    }
    case GuardState::kCooldown:
      if (spent >= options_.cooldown) end(GuardState::kWatching, GuardCause::kRested, options_.cooldown);
      break;
  }
}

// A first collapse is met with all that there is. Who let go lately was balancing by the biases alone, and goes back
// to that: it was the last step that held.
void LayerGuard::take_over(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]) {
  std::copy(in_force[0].begin(), in_force[0].end(), bias_before_.begin());
  aux_before_ = in_force[1][0];
  temperature_before_ = in_force[2][0];
  const bool again = let_go_lately(step);
  if (!again) {
    start_vio_ = vio_average_ = vio_;
    helped_ = 0;
  }
  relapses_ = again ? std::min(relapses_ + 1, kMostRelapses) : 0;
  raised_ = again ? 0 : 1;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const double size = again ? std::max(std::abs(steps_[i]), kSmallestFirstStep) : 1;
    steps_[i] = errors_[i] < 0 ? -size : size;
  }
  enter(again ? GuardState::kHolding : GuardState::kIntervening, step, GuardCause::kTriggered, report_.value,
        report_.threshold);
}

// A rung of the scalars at a time, each watched for `dwell` steps; once they are back where they were, the biases.
// Where the balance is lost the guard goes back to the rung before and holds on there.
void LayerGuard::hand_back(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]) {
  confirmed_ = vio_average_ > bar() ? confirmed_ + 1 : 0;
  ++balanced_;
  if (confirmed_ >= options_.confirm) {
    relapses_ = std::min(relapses_ + 1, kMostRelapses);
    raised_ = held_;
    enter(GuardState::kHolding, step, GuardCause::kLost, vio_average_, bar());
  } else if (balanced_ < options_.dwell || confirmed_ > 0) {
    return;
  } else if (raised_ > 0) {
    take_back_a_rung();
    report_.cause = GuardCause::kBalanced;
    report_.value = vio_average_;
    report_.threshold = bar();
  } else if (const bool back = scalars_are_back(in_force); back || balanced_ >= options_.patience) {
    handed_back_ = step;
    if (back) {
      enter(GuardState::kWatching, step, GuardCause::kBalanced, vio_average_, bar());
    } else {  // a limit keeps them from getting back
      enter(GuardState::kWatching, step, GuardCause::kTimeUp, static_cast<double>(balanced_),
            static_cast<double>(options_.patience));
    }
  }
}

void LayerGuard::take_back_a_rung() {
  held_ = raised_;
  raised_ = std::max(0.0, raised_ - kRung);
  balanced_ = 0;
}

void LayerGuard::size_steps() {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const bool turned = (errors_[i] < 0) != (steps_[i] < 0);
    const double size =
        std::clamp(std::abs(steps_[i]) * (turned ? kShrink : kGrow), kSmallestStep, kLargestStep);
    steps_[i] = errors_[i] < 0 ? -size : size;
  }
}

double LayerGuard::bar() const {
  return std::max(level_, helped_);
}

bool LayerGuard::let_go_lately(std::int64_t step) const {
  return step - handed_back_ < kSoon * options_.patience << relapses_;
}

bool LayerGuard::scalars_are_back(const std::span<const double> (&in_force)[kActuatorCount]) const {
  const auto near = [](double a, double b) { return std::abs(a - b) <= kBack * std::abs(b); };
  return near(in_force[1][0], aux_before_) && near(in_force[2][0], temperature_before_);
}

bool LayerGuard::overrides(Actuator actuator, const Limits& limits, std::span<const double> in_force,
                           std::span<double> wanted) const {
  const bool undoing = report_.state == GuardState::kRollingBack;
  if (report_.state == GuardState::kWatching || report_.state == GuardState::kCooldown) return false;
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
  const double factor = aux ? options_.aux_factor : options_.temperature_factor;
  wanted[0] = undoing ? before : before * std::pow(factor, raised_);
  return true;
}

void LayerGuard::save(StateWriter& out) const {
  const std::array<std::int64_t, 12> steps = {static_cast<std::int64_t>(report_.state),
                                              static_cast<std::int64_t>(report_.trigger),
                                              static_cast<std::int64_t>(report_.cause),
                                              since_,
                                              confirmed_,
                                              balanced_,
                                              entropy_known_ ? 1 : 0,
                                              relapses_,
                                              handed_back_,
                                              lost_steps_,
                                              begun_ ? 1 : 0,
                                              was_balanced_ ? 1 : 0};
  out.put("guard_steps", steps);
  const std::array<double, 12> values = {
      report_.value,       report_.threshold, entropy_average_, gap_,    start_vio_, aux_before_,
      temperature_before_, vio_average_,      lost_sum_,        raised_, held_,      helped_};
  out.put("guard_values", values);
  out.put("guard_bias_before", bias_before_);
  out.put("guard_bias_steps", steps_);
  out.put("guard_errors", errors_);  // a step without data decides on those of the step before
  out.put("guard_smoothed_errors", smoothed_);
}

void LayerGuard::load(StateReader& in) {
  std::array<std::int64_t, 12> steps{};
  in.get("guard_steps", steps);
  std::array<double, 12> values{};
  in.get("guard_values", values);
  in.get("guard_bias_before", bias_before_);
  in.get("guard_bias_steps", steps_);
  in.get("guard_errors", errors_);
  in.get("guard_smoothed_errors", smoothed_);
  const auto all_finite = [](std::span<const double> v) {
    return std::all_of(v.begin(), v.end(), [](double x) { return std::isfinite(x); });
  };
  // The first two are for the log, and may hold a threshold that is infinite.
  for (const std::span<const double> v :
       {std::span<const double>(values).subspan(2), std::span<const double>(bias_before_),
        std::span<const double>(steps_), std::span<const double>(errors_),
        std::span<const double>(smoothed_)}) {
    if (!all_finite(v)) throw StateError("guard: a saved value is not finite");
  }
  if (steps[0] < 0 || steps[0] > 5 || steps[1] < 0 || steps[1] > 6 || steps[2] < 0 || steps[2] > 8 ||
      steps[7] < 0 || steps[7] > kMostRelapses) {
    throw StateError("guard_steps: not a state, trigger or cause of the guard");
  }
  report_ = {static_cast<GuardState>(steps[0]), static_cast<GuardTrigger>(steps[1]), values[0], values[1],
             static_cast<GuardCause>(steps[2])};
  since_ = steps[3];
  confirmed_ = steps[4];
  balanced_ = steps[5];
  entropy_known_ = steps[6] != 0;
  relapses_ = steps[7];
  handed_back_ = steps[8];
  lost_steps_ = steps[9];
  begun_ = steps[10] != 0;
  was_balanced_ = steps[11] != 0;
  entropy_average_ = values[2];
  gap_ = values[3];
  start_vio_ = values[4];
  aux_before_ = values[5];
  temperature_before_ = values[6];
  vio_average_ = values[7];
  lost_sum_ = values[8];
  raised_ = values[9];
  held_ = values[10];
  helped_ = values[11];
}

}  // namespace moectl
