#include "control/guard.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>

#include "control/config_fields.h"
#include "moectl/health.h"

namespace moectl {
namespace {

// Slow enough to remember what entropy was before a collapse that takes a hundred steps.
constexpr double kEntropyEma = 0.01;
constexpr double kVioEma = 0.1;
constexpr double kGapEma = 0.1;
constexpr double kLoadEma = 0.05;  // chance averages out over twenty steps
// A layer that was never balanced cannot lose its balance: permanent imbalance is not a loss of balance. A layer counts
// as once balanced when the smoothed MaxVio of all experts but the heaviest, among themselves, came within this share
// of balanced_max_vio_. So a policy that balances the other experts and loses one has lost the balance.
constexpr double kWellBalanced = 0.25;
// Experts that alternate look even on average, so the smoothed loads do not show them. Therefore this part of the
// smoothed MaxVio of single steps counts as imbalance, too. It is not 1, because varying data also raise the MaxVio of
// single steps.
constexpr double kAlternationWeight = 0.5;
// A MaxVio of at most this many floors always counts as balanced: the bound of balance (health.h), and a quarter more
// since single steps scatter about their mean.
constexpr double kFloors = 1.25 * kBalancedFloors;
// An intervention that did not restore balance has helped if MaxVio fell to this share of its value at the start. Then
// it is kept, else rolled back.
constexpr double kPartialSuccess = 0.7;
// Each loss of balance during handing back, or soon after, doubles the time for which the guard holds before it tries
// again, and the time for which it looks for a relapse after that: up to 2^6 times.
constexpr std::int64_t kMostRelapses = 6;
// A loss of balance is a relapse within this many times `patience` after handing back (doubled likewise).
constexpr std::int64_t kRelapseWindow = 4;
// Handing back lowers the exponent of the scalars' factors by this much at a time.
constexpr double kExponentStep = 0.25;
// Steps of the biases follow the signs of their errors (Rprop, Riedmiller & Braun 1993), because under a softmax the
// distance of an expert from its target and the slope of its load differ by orders of magnitude. Experts that sank
// together have nearly equal scores under a softmax: a thousandth of a gap can move all tokens from one to another.
constexpr double kGrow = 1.2, kShrink = 0.5, kSmallestStep = 1.0 / 1024, kLargestStep = 4;
// After a relapse, steps keep the size that was found, but at least this one: the layer is near balance, and a first
// step meant for a collapse would overshoot.
constexpr double kSmallestFirstStep = 1.0 / 256;
// Rise of the scalars' exponent per step after a relapse, while the biases alone do not restore balance.
constexpr double kExponentRaise = 0.1;
// A scalar is restored when it is this close to its former value, as a ratio.
constexpr double kRestoredTolerance = 1e-9;

}  // namespace

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

// Updates the errors of this step and their averages, MaxVio of both, the gap, the bound of balance, and the number of
// steps for which balance has been lost.
void LayerGuard::follow_loads(std::int64_t step, const RoutingStats& stats, const Metrics& metrics) {
  balanced_max_vio_ = std::max(options_.recovered_max_vio, kFloors * floor_of(metrics).max_vio.value_or(0));
  const auto total = static_cast<double>(stats.assignments());
  double heaviest = 0, second = 0, target_of_heaviest = 0;  // smoothed loads, relative to their targets
  vio_ = 0;
  for (std::size_t i = 0; i < errors_.size(); ++i) {
    // An expert that should receive no tokens: its error is -(its tokens / the mean target), as in load_targets.h.
    const double target = targets_[i] * total, unit = target > 0 ? target : even_target_ * total;
    if (!(unit > 0)) continue;
    errors_[i] = (target - static_cast<double>(stats.counts()[i])) / unit;
    smoothed_[i] = observed_ ? smoothed_[i] + kLoadEma * (errors_[i] - smoothed_[i]) : errors_[i];
    vio_ = std::max(vio_, -errors_[i]);
    const double load = 1 - smoothed_[i];
    second = std::max(second, std::min(heaviest, load));
    if (load > heaviest) {
      heaviest = load;
      target_of_heaviest = targets_[i];
    }
  }
  observed_ = true;
  vio_average_ += kVioEma * (vio_ - vio_average_);
  if (const auto gap = stats.mean_gap(); gap && *gap >= 0) {
    const double now = stats.mean_choices() * *gap;
    gap_ = gap_ > 0 ? gap_ + kGapEma * (now - gap_) : now;
  }
  if (step < options_.warmup) return;
  excess_ = std::max(heaviest - 1, kAlternationWeight * vio_average_);
  // second / (mean of the others) - 1 < kWellBalanced · balanced_max_vio_, without the division. "<", not "≤": other
  // experts without any token are not balanced.
  was_balanced_ =
      was_balanced_ || second * (1 - target_of_heaviest) <
                           (1 + kWellBalanced * balanced_max_vio_) * (1 - heaviest * target_of_heaviest);
  const bool lost = was_balanced_ && excess_ > balanced_max_vio_;
  lost_steps_ = lost ? lost_steps_ + 1 : 0;
  lost_sum_ = lost ? lost_sum_ + excess_ : 0;
}

// Finds the load that is farthest above its threshold. With equal targets all thresholds are equal, and it is the
// largest load.
void LayerGuard::watch_max_load(const RoutingStats& stats, const Metrics& metrics) {
  max_load_ = metrics.max_load.value_or(0);
  token_share_limit_ = options_.max_token_share;
  const auto total = static_cast<double>(stats.assignments());
  const double choices = stats.mean_choices();
  double farthest = -1;
  for (std::size_t i = 0; i < token_shares_.size(); ++i) {
    const double load = static_cast<double>(stats.counts()[i]) / total;
    if (load * choices - token_shares_[i] <= farthest) continue;
    farthest = load * choices - token_shares_[i];
    max_load_ = load;
    token_share_limit_ = token_shares_[i];
  }
}

// The trigger that holds now, with its numbers. Entropy is compared with its own past, the other metrics with fixed
// thresholds.
GuardReport LayerGuard::strongest_trigger(std::int64_t step, const RoutingStats& stats,
                                          const Metrics& metrics) {
  GuardReport seen;
  const auto raise = [&seen](GuardTrigger trigger, double value, double threshold) {
    if (seen.trigger == GuardTrigger::kNone) seen = {GuardState::kWatching, trigger, value, threshold};
  };
  if (options_.fhs && metrics.fhs_alarm.value_or(0) > 0 && metrics.fhs)
    raise(GuardTrigger::kFhs, *metrics.fhs, 1);
  if (metrics.entropy_normalized) {
    // When loads move from even to unequal targets, the entropy falls without a fault.
    const double level = std::min(entropy_average_, entropy_on_target_) - options_.entropy_fall;
    if (entropy_known_ && *metrics.entropy_normalized < level) {
      raise(GuardTrigger::kEntropyFall, *metrics.entropy_normalized, level);
    }
    entropy_average_ = entropy_known_
                           ? entropy_average_ + kEntropyEma * (*metrics.entropy_normalized - entropy_average_)
                           : *metrics.entropy_normalized;
    entropy_known_ = true;
  }
  if (metrics.dead_experts && *metrics.dead_experts >= options_.max_dead_share * wanted_) {
    raise(GuardTrigger::kDeadExperts, *metrics.dead_experts, options_.max_dead_share * wanted_);
  }
  // With k = N every expert gets every token, which is no fault.
  watch_max_load(stats, metrics);
  const double choices = stats.mean_choices();
  if (metrics.max_load && top_k_ < stats.experts() && max_load_ * choices > token_share_limit_) {
    raise(GuardTrigger::kMaxLoad, max_load_, token_share_limit_ / choices);
  }
  // If the policy is recovering, the imbalance now is below its average since balance was lost.
  if (lost_steps_ >= options_.lost_after && excess_ * static_cast<double>(lost_steps_) >= lost_sum_) {
    raise(GuardTrigger::kLostBalance, excess_, balanced_max_vio_);
  }
  // After handing back, the guard keeps watching for a relapse, so that it helps before the layer collapses again.
  if (recently_handed_back(step) && vio_average_ > relapse_threshold())
    raise(GuardTrigger::kRelapse, vio_average_, relapse_threshold());
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
  if (state == GuardState::kHandingBack) lower_scalar_exponent();
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
      adapt_bias_steps();
      const bool balanced = seen.trigger == GuardTrigger::kNone && vio_ <= balanced_max_vio_;
      balanced_ = balanced ? balanced_ + 1 : 0;
      if (balanced_ >= options_.dwell) {
        vio_average_ = vio_;  // forgets the collapse: from here on it shows the effect of handing back
        enter(GuardState::kHandingBack, step, GuardCause::kBalanced, vio_, balanced_max_vio_);
      } else if (spent >= options_.patience) {
        // Not balanced in time. An intervention that helped is kept while it helps; one that did not is undone.
        const double bound = kPartialSuccess * start_vio_;
        if (vio_average_ <= bound) {
          partial_success_bound_ = bound;
          enter(GuardState::kHandingBack, step, GuardCause::kHelped, vio_average_, bound);
        } else {
          enter(GuardState::kRollingBack, step, GuardCause::kNoHelp, vio_average_, bound);
        }
      }
      break;
    }
    case GuardState::kHandingBack:
      adapt_bias_steps();
      hand_back(step, in_force);
      break;
    case GuardState::kHolding: {
      adapt_bias_steps();
      const bool stands = vio_average_ <= relapse_threshold();
      if (!stands) scalar_exponent_ = std::min(1.0, scalar_exponent_ + kExponentRaise);
      balanced_ = stands ? balanced_ + 1 : 0;
      confirmed_ = stands ? 0 : confirmed_ + 1;
      if (confirmed_ >= options_.patience) {
        enter(GuardState::kRollingBack, step, GuardCause::kNoHelp, vio_average_, relapse_threshold());
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
      if (scalars_are_back(in_force) && left <= kRestoredTolerance) {
        enter(GuardState::kCooldown, step, GuardCause::kUndone, left, kRestoredTolerance);
      } else if (spent >= options_.patience) {  // a limit prevents the return
        end(GuardState::kCooldown, GuardCause::kTimeUp, options_.patience);
      }
      break;
    }
    case GuardState::kCooldown:
      if (spent >= options_.cooldown) end(GuardState::kWatching, GuardCause::kRested, options_.cooldown);
      break;
  }
}

// A first collapse is met with biases and scalars. After a recent handing back, the guard returns to the biases alone,
// because that was the last state with balance.
void LayerGuard::take_over(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]) {
  std::copy(in_force[0].begin(), in_force[0].end(), bias_before_.begin());
  aux_before_ = in_force[1][0];
  temperature_before_ = in_force[2][0];
  const bool again = recently_handed_back(step);
  if (!again) {
    start_vio_ = vio_average_ = vio_;
    partial_success_bound_ = 0;
  }
  relapses_ = again ? std::min(relapses_ + 1, kMostRelapses) : 0;
  scalar_exponent_ = again ? 0 : 1;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const double size = again ? std::max(std::abs(steps_[i]), kSmallestFirstStep) : 1;
    steps_[i] = errors_[i] < 0 ? -size : size;
  }
  enter(again ? GuardState::kHolding : GuardState::kIntervening, step, GuardCause::kTriggered, report_.value,
        report_.threshold);
}

// Lowers the scalars one step at a time and watches each for `dwell` steps; when they have their former values,
// releases the biases. If balance is lost, the guard returns to the step before and holds there.
void LayerGuard::hand_back(std::int64_t step, const std::span<const double> (&in_force)[kActuatorCount]) {
  confirmed_ = vio_average_ > relapse_threshold() ? confirmed_ + 1 : 0;
  ++balanced_;
  if (confirmed_ >= options_.confirm) {
    relapses_ = std::min(relapses_ + 1, kMostRelapses);
    scalar_exponent_ = last_good_exponent_;
    enter(GuardState::kHolding, step, GuardCause::kLost, vio_average_, relapse_threshold());
  } else if (balanced_ < options_.dwell || confirmed_ > 0) {
    return;
  } else if (scalar_exponent_ > 0) {
    lower_scalar_exponent();
    report_.cause = GuardCause::kBalanced;
    report_.value = vio_average_;
    report_.threshold = relapse_threshold();
  } else if (const bool back = scalars_are_back(in_force); back || balanced_ >= options_.patience) {
    handed_back_ = step;
    if (back) {
      enter(GuardState::kWatching, step, GuardCause::kBalanced, vio_average_, relapse_threshold());
    } else {  // a limit prevents the return
      enter(GuardState::kWatching, step, GuardCause::kTimeUp, static_cast<double>(balanced_),
            static_cast<double>(options_.patience));
    }
  }
}

void LayerGuard::lower_scalar_exponent() {
  last_good_exponent_ = scalar_exponent_;
  scalar_exponent_ = std::max(0.0, scalar_exponent_ - kExponentStep);
  balanced_ = 0;
}

void LayerGuard::adapt_bias_steps() {
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    const bool turned = (errors_[i] < 0) != (steps_[i] < 0);
    const double size =
        std::clamp(std::abs(steps_[i]) * (turned ? kShrink : kGrow), kSmallestStep, kLargestStep);
    steps_[i] = errors_[i] < 0 ? -size : size;
  }
}

double LayerGuard::relapse_threshold() const {
  return std::max(balanced_max_vio_, partial_success_bound_);
}

bool LayerGuard::recently_handed_back(std::int64_t step) const {
  return step - handed_back_ < kRelapseWindow * options_.patience << relapses_;
}

bool LayerGuard::scalars_are_back(const std::span<const double> (&in_force)[kActuatorCount]) const {
  const auto near = [](double a, double b) { return std::abs(a - b) <= kRestoredTolerance * std::abs(b); };
  return near(in_force[1][0], aux_before_) && near(in_force[2][0], temperature_before_);
}

bool LayerGuard::overrides(Actuator actuator, const Limits& limits, std::span<const double> in_force,
                           std::span<double> wanted) const {
  const bool undoing = report_.state == GuardState::kRollingBack;
  if (report_.state == GuardState::kWatching || report_.state == GuardState::kCooldown) return false;
  if (actuator == Actuator::kExpertBias) {
    // Also while the scalars return: scores in probability space change with the temperature, and so does the effect of
    // the biases.
    if (undoing) {
      std::copy(bias_before_.begin(), bias_before_.end(), wanted.begin());
      return true;
    }
    // The gap is the unit of a step. Without it, the rate is the only known scale of the scores.
    const double step = gap_ > 0 ? options_.bias_step * gap_ : limits.rate;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      wanted[i] = in_force[i] + step * std::abs(steps_[i]) * std::min(std::max(errors_[i], -1.0), 1.0);
    }
    return true;
  }
  const bool aux = actuator == Actuator::kAuxLossWeight;
  const double before = aux ? aux_before_ : temperature_before_;
  const double factor = aux ? options_.aux_factor : options_.temperature_factor;
  wanted[0] = undoing ? before : before * std::pow(factor, scalar_exponent_);
  return true;
}

void LayerGuard::exchange(StateIo& io) {
  io.choice("guard.state", report_.state, GuardState::kCooldown);
  io.choice("guard.trigger", report_.trigger, GuardTrigger::kRelapse);
  io.choice("guard.cause", report_.cause, GuardCause::kRested);
  io.value("guard.value", report_.value, StateIo::kAnyNumber);  // these two are for the log only
  io.value("guard.threshold", report_.threshold, StateIo::kAnyNumber);
  io.value("guard.since", since_);
  io.value("guard.confirmed", confirmed_);
  io.value("guard.balanced", balanced_);
  io.value("guard.relapses", relapses_, {0, kMostRelapses});
  io.value("guard.handed_back", handed_back_, {-StateIo::kMostCount, StateIo::kMostCount});
  io.value("guard.entropy_average", entropy_average_);
  io.value("guard.entropy_known", entropy_known_);
  io.value("guard.begun", observed_);
  io.value("guard.gap", gap_, StateIo::kNotNegative);
  io.value("guard.vio_average", vio_average_);
  io.value("guard.start_vio", start_vio_);
  io.value("guard.partial_success_bound", partial_success_bound_);
  io.value("guard.was_balanced", was_balanced_);
  io.value("guard.lost_sum", lost_sum_);
  io.value("guard.lost_steps", lost_steps_);
  io.value("guard.scalar_exponent", scalar_exponent_, {0, 1});
  io.value("guard.last_good_exponent", last_good_exponent_, {0, 1});
  io.values("guard.errors", errors_);  // a step without data decides on those of the step before
  io.values("guard.smoothed_errors", smoothed_);
  io.values("guard.bias_steps", steps_);
  io.values("guard.bias_before", bias_before_);
  io.value("guard.aux_before", aux_before_);
  io.value("guard.temperature_before", temperature_before_);
}

}  // namespace moectl
