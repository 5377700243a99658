#include "control/actuator_loop.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "base/foreign.h"
#include "base/lanes.h"
#include "control/config_fields.h"
#include "measure/offence.h"
#include "measure/saved_sums.h"

namespace moectl {
namespace {

std::unique_ptr<Policy> make_policy(Actuator actuator, const ControllerConfig& config,
                                    const PolicyRegistry& registry, int layer) {
  const ActuatorConfig& own = config.actuator(actuator);
  const PolicyDescription* description = registry.find(own.policy);
  if (description == nullptr) {
    throw std::invalid_argument(std::string(name_of(actuator)) + ".policy: " + own.policy +
                                ": not registered");
  }
  const PolicyContext context{.actuator = actuator,
                              .layer = layer,
                              .experts = config.model.experts,
                              .top_k = config.model.top_k,
                              .domains = static_cast<int>(config.model.domains.size()),
                              .delay = config.delay(),
                              .score_space = config.model.score_space,
                              .initial = own.initial,
                              .min = own.limits.min,
                              .max = own.limits.max,
                              .cadence = own.limits.cadence};
  const std::string who = std::string(name_of(actuator)) + ".policy: " + own.policy;
  auto policy = call_foreign(who, [&] { return description->make(context, own.options); });
  if (policy == nullptr) throw std::invalid_argument(who + ": made no policy: must return one, or throw");
  return policy;
}

int size_of(Actuator actuator, const ControllerConfig& config) {
  return actuator == Actuator::kExpertBias ? config.model.experts : 1;
}

}  // namespace

/// What is said of a check: what the answer is, and what follows or may be the cause.
struct ResponseWords {
  struct Sentence {
    std::string_view what, then;
  };
  Sentence answers, reversed, silent;
};

namespace {

constexpr ResponseWords kLoadWords{
    {"the load answers again", "the policy goes on"},
    {"the load goes the other way",
     "is the bias subtracted from the scores? The biases are held where the load last answered"},
    {"the load does not answer",
     "does the router add this layer's bias, and not another layer's, to the scores that top-k compares? Are "
     "routes replayed or masked? Held where the load last answered"}};
constexpr ResponseWords kEntropyWords{
    {"router_temperature: the token entropy answers again", "the policy goes on"},
    {"router_temperature: the token entropy falls where the temperature rises",
     "are the logits multiplied by the temperature? Or are they nearly all positive, under sigmoids? Held "
     "where "
     "the entropy last answered"},
    {"router_temperature: the token entropy does not answer",
     "does the router divide its logits by the temperature in force? Held where the entropy last answered"}};

}  // namespace

ActuatorLoop::ActuatorLoop(Actuator actuator, const ControllerConfig& config, const PolicyRegistry& registry,
                           int layer)
    : actuator_(actuator),
      layer_(layer),
      name_(config.actuator(actuator).policy),
      policy_(make_policy(actuator, config, registry, layer)),
      limiter_(actuator, config.actuator(actuator).limits, config.safety, size_of(actuator, config),
               config.actuator(actuator).initial),
      safety_(config.safety),
      gain_schedule_(config.actuator(actuator).gain_schedule),
      cadence_(config.actuator(actuator).limits.cadence),
      shadow_(config.mode == Mode::kShadow),
      limits_(config.actuator(actuator).limits) {
  applied_.assign(static_cast<std::size_t>(size_of(actuator, config)), config.actuator(actuator).initial);
  proposed_ = guarded_ = base_ = shadow_applied_ = deployed_ = before_[0] = before_[1] = applied_;
  start_checks(config);
}

void ActuatorLoop::start_checks(const ControllerConfig& config) {
  load_check_.reset();
  response_told_ = false;
  entropy_check_.reset();
  entropy_offset_ = 0;
  if (!safety_.responsiveness) return;
  // One expert has no other to take tokens from.
  if (actuator_ == Actuator::kExpertBias && config.model.experts > 1) {
    load_check_.emplace(config, layer_, applied_);
  }
  // A fixed temperature makes no move, so nothing can be known of it.
  if (actuator_ == Actuator::kRouterTemperature && name_ != "fixed") {
    entropy_check_.emplace(limits_, config.delay(), applied_[0]);
  }
}

StatsNeeds ActuatorLoop::needs() const {
  StatsNeeds needs = policy_->needs();
  if (load_check_ && name_ != "fixed") needs |= ResponseCheck::needs();
  return needs;
}

std::span<const double> ActuatorLoop::probe() const {
  if (load_check_) return load_check_->offset();
  return entropy_offset_ != 0 ? std::span(&entropy_offset_, 1) : std::span<const double>();
}

void ActuatorLoop::watch_load(bool applies, WiringSeen seen, bool told, const RoutingStats& stats,
                              const Metrics& metrics, std::int64_t step, Notices& notices) {
  wiring_.observe(seen);
  if (load_check_->held_for_wiring() && !wiring_.miswired()) load_check_->release();
  // A router that was seen to choose by its own biases is not held, whatever the load does: slopes may mislead.
  if (load_check_->holds() && !load_check_->held_for_wiring() && wiring_.uses_own()) {
    load_check_->release();
    response_told_ = false;
    notices.add(NoticeKind::kUnresponsive, layer_, step,
                {"the router was seen to choose by these biases: the policy goes on"});
  }
  // Without assignments no load is known: a record may hold tokens that chose no expert.
  load_check_->observe(applies && metrics.max_load ? &stats : nullptr, metrics.load_cv.value_or(0),
                       floor_of(metrics).cv.value_or(0), applied_, wiring_.uses_own());
  if (!applies) return;
  if (wiring_.miswired() && !load_check_->held_for_wiring()) {
    load_check_->hold_for_wiring();
    if (!told)
      notices.add(
          NoticeKind::kWiring, layer_, step,
          {"the router was seen to use another bias than this layer's, on this rank or on others: held"});
  }
  if (load_check_->held_for_wiring()) return;  // told by the check of the wiring, which knows more
  const Responsiveness now = load_check_->report();
  const bool silent = now.state == Response::kUnresponsive;
  if (silent == response_told_ || (!silent && now.state != Response::kAnswers)) return;
  response_told_ = silent;
  say_response(kLoadWords, now, step, notices);
}

void ActuatorLoop::watch_entropy(bool applies, const std::optional<EntropySeen>& seen, std::int64_t step,
                                 Notices& notices) {
  entropy_checked_ = applies;
  if (!applies || !seen) return entropy_check_->restart(applied_[0]);
  entropy_check_->observe(seen->entropy, seen->largest, applied_[0]);
  if (entropy_check_->has_news()) say_response(kEntropyWords, entropy_check_->report(), step, notices);
}

void ActuatorLoop::say_response(const ResponseWords& words, const Responsiveness& now, std::int64_t step,
                                Notices& notices) {
  const Number gain(*now.gain), error(*now.error);
  const auto& [what, then] = now.state == Response::kAnswers  ? words.answers
                             : *now.gain + 3 * *now.error < 0 ? words.reversed
                                                              : words.silent;
  notices.add(NoticeKind::kUnresponsive, layer_, step,
              {what, " (gain ", gain.text(), " ± ", error.text(), "): ", then});
}

void ActuatorLoop::make_windows(std::span<const StatsShape> shapes) {
  if (cadence_ == 1) return;
  for (const StatsShape& shape : shapes) windows_.emplace_back(shape);
  window_metrics_.resize(shapes.size());
}

void ActuatorLoop::adopt(std::span<const double> values, const ControllerConfig& config,
                         const PolicyRegistry& registry) {
  auto policy = make_policy(actuator_, config, registry, layer_);
  std::copy(values.begin(), values.end(), applied_.begin());
  proposed_ = guarded_ = base_ = shadow_applied_ = before_[0] = before_[1] = applied_;
  policy_ = std::move(policy);
  limiter_.start_from(applied_);
  start_checks(config);
  asked_ = failed_ = failing_ = owed_ = guard_took_over_ = false;
  for (RoutingStats& window : windows_) window.clear();
}

void ActuatorLoop::propose(const LayerView& view, Notices& notices) {
  const std::span<const double> probe = view.probe;
  std::copy(applied_.begin(), applied_.end(), proposed_.begin());
  for (std::size_t i = 0; i < probe.size(); ++i) proposed_[i] -= probe[i];
  asked_ = call_held([&] { policy_->propose(view, proposed_); },
                     [&](const char* message) { fail(view.step, message, notices); });
  if (const double gain = gain_at(gain_schedule_, view.step); gain != 1) {
    for (std::size_t i = 0; i < proposed_.size(); ++i) {
      const double start = applied_[i] - (probe.empty() ? 0 : probe[i]);
      proposed_[i] = start + gain * (proposed_[i] - start);
    }
  }
  failed_ = !asked_ || owed_;
  owed_ = false;
}

// Said once, when it begins.
void ActuatorLoop::fail(std::int64_t step, std::string_view message, Notices& notices) {
  if (!std::exchange(failing_, true)) {
    notices.add(NoticeKind::kPolicyFailed, layer_, step,
                {name_of(actuator_), ": policy ", name_, " threw: ", message, ": held"});
  }
}

void ActuatorLoop::limit(LimitContext context, Notices& notices) {
  std::span<const double> wanted;
  if (guard_took_over_) {
    wanted = guarded_;
  } else if (asked_) {
    wanted = proposed_;
  }
  context.policy_failed = failed_ && !guard_took_over_;
  LimitReport held;
  if (load_check_) {
    if (!load_check_->holds() && !guard_took_over_) {
      context.reach = load_check_->reach();
      context.known_good = load_check_->known_good();
    }
    if (asked_ && !guard_took_over_ && load_check_->adjusts()) {
      std::copy(proposed_.begin(), proposed_.end(), guarded_.begin());
      load_check_->adjust(guarded_, held);
      wanted = guarded_;
    }
  }
  const bool entropy = entropy_check_ && entropy_checked_;
  if (entropy && asked_ && !guard_took_over_ && entropy_check_->adjusts()) {
    guarded_[0] = entropy_check_->adjust(held);
    wanted = guarded_;
  }
  if (shadow_) {
    // What was not applied must not be built upon: each step starts from what is in force.
    std::copy(applied_.begin(), applied_.end(), shadow_applied_.begin());
    reasons_ = limiter_.apply(context, wanted, shadow_applied_);
    if (asked_) held.add(Reason::kShadow);
  } else {
    reasons_ = limiter_.apply(context, wanted, applied_);
  }
  if (guard_took_over_) reasons_.add(Reason::kGuard);
  if (load_check_) load_check_->on_applied(reasons_);
  if (entropy) {
    entropy_check_->on_applied(reasons_, applied_[0]);
    entropy_offset_ = entropy_check_->offset();
  }
  reasons_.add(held);
  if (reasons_.has(Reason::kInvalid)) say_invalid(context, notices);
  if (asked_) {
    std::span<const double> told = applied_;
    if (const std::span<const double> part = probe(); !part.empty()) {
      for (std::size_t i = 0; i < base_.size(); ++i) base_[i] = applied_[i] - part[i];
      told = base_;
    }
    const bool good = call_held([&] { policy_->on_applied(told, reasons_); },
                                [&](const char* message) { fail(context.step, message, notices); });
    owed_ = !good;
    if (good && !failed_) failing_ = false;
  }
  const bool spoilt = context.at_cadence && std::any_of(windows_.begin(), windows_.end(),
                                                        [](const RoutingStats& w) { return !w.valid(); });
  if (asked_ || failed_ || spoilt) {
    for (RoutingStats& window : windows_) window.clear();
  }
}

// A proposal that is not finite, and the fallback when it is due.
void ActuatorLoop::say_invalid(const LimitContext& context, Notices& notices) {
  const auto bad =
      std::find_if(proposed_.begin(), proposed_.end(), [](double x) { return !std::isfinite(x); });
  if (context.valid && asked_ && !guard_took_over_ && bad != proposed_.end()) {
    const Offence offence = offence_at("proposed", bad - proposed_.begin(), *bad, "must be finite");
    notices.add(NoticeKind::kInvalid, layer_, context.step,
                {name_of(actuator_), ": policy ", name_, ": ", offence.words(), ": held"});
  }
  // A fixed value has nothing to lose.
  if (name_ == "fixed" || safety_.fallback_after == 0 || limiter_.invalid_in_row() != safety_.fallback_after)
    return;
  const std::string_view what =
      safety_.fallback == Fallback::kInitial
          ? ": the initial value is applied until data are valid (safety.fallback: initial)"
          : ": held (safety.fallback: hold)";
  notices.add(NoticeKind::kFallback, layer_, context.step,
              {name_of(actuator_),
               ": as many decisions in a row without valid data as safety.fallback_after says", what});
}

void ActuatorLoop::hold_ranks() {
  reasons_ = {};
  reasons_.add(Reason::kPolicyFailed);
}

void ActuatorLoop::remember() {
  std::swap(before_[0], before_[1]);
  std::copy(applied_.begin(), applied_.end(), before_[0].begin());
}

void ActuatorLoop::undo(std::size_t decisions) {
  applied_ = before_[decisions - 1];
  limiter_.go_back_to(applied_);
  if (entropy_check_) {
    LimitReport why;
    why.add(Reason::kRollback);
    entropy_check_->on_applied(why, applied_[0]);
    entropy_offset_ = entropy_check_->offset();
  }
  if (!load_check_) return;
  load_check_->leave_probe();
  load_check_->restart();
}

ActuatorReport ActuatorLoop::report() {
  const bool others = deployment(deployed_) || shadow_;
  return {.proposed = asked_ ? std::span<const double>(proposed_) : std::span<const double>(),
          .applied = shadow_ ? shadow_applied_ : applied_,
          .deployed = others ? std::span<const double>(deployed_) : std::span<const double>(),
          .reasons = reasons_,
          .responsiveness = entropy_check_ && entropy_checked_ ? entropy_check_->report() : Responsiveness{}};
}

bool ActuatorLoop::deployment(std::span<double> out) const {
  const std::span<const double> part = shadow_ ? std::span<const double>() : probe();
  const auto without_probe = [&] {
    std::copy(applied_.begin(), applied_.end(), out.begin());
    for (std::size_t i = 0; i < part.size(); ++i) out[i] -= part[i];
  };
  without_probe();
  if (shadow_) return false;  // nothing of the policy's is in force
  try {
    policy_->leave_for_deployment(out);
  } catch (...) {
    out[0] = std::nan("");
  }
  // A policy that throws, or leaves what is no number, has no say in it.
  if (!all_finite(out)) without_probe();
  if (all_equal(out, applied_)) return false;
  double mean = 0;
  for (const double value : out) mean += value / static_cast<double>(out.size());
  for (double& value : out) value = std::clamp(value - (limits_.center ? mean : 0), limits_.min, limits_.max);
  return true;
}

void ActuatorLoop::exchange(StateIo& io) {
  // Whatever the limits: those of the run that saved may have been wider, as far as a config may set them.
  const Range& range = range_of(actuator_);
  io.values("applied", applied_, {range.low, range.high});
  std::string policy = name_;
  io.text("policy", policy);
  io.section("failure", [&](StateIo& inner) { exchange_failure(inner); });
  before_[0] = before_[1] = applied_;
  io.section("limits", [&](StateIo& inner) { limiter_.exchange(inner); });
  io.section("memory", [&](StateIo& inner) { policy_->exchange(inner); });
  io.section("windows", [&](StateIo& inner) { exchange_windows(inner); });
  if (entropy_check_) io.section("responsiveness", [&](StateIo& inner) { exchange_entropy_check(inner); });
}

void ActuatorLoop::exchange_failure(StateIo& io) {
  io.value("failure.now", failed_);
  io.value("failure.owed", owed_);
}

void ActuatorLoop::exchange_entropy_check(StateIo& io) {
  entropy_check_->exchange(io);
  io.value("entropy_checked", entropy_checked_);  // at the last decision: a roll-back comes between two
  entropy_offset_ = entropy_check_->offset();
}

void ActuatorLoop::exchange_load_check(StateIo& io) {
  load_check_->exchange(io);
  io.value("response_told", response_told_);
  wiring_.exchange(io);
}

void ActuatorLoop::exchange_windows(StateIo& io) {
  for (RoutingStats& window : windows_) exchange_sums(io, "window", window);
}

std::string ActuatorLoop::keep_memory(const StateIo& in, const ControllerConfig& config) {
  std::string wrong = in.tried("memory", [&](StateIo& io) { policy_->exchange(io); });
  if (!wrong.empty()) return wrong;
  if (!in.tried("failure", [&](StateIo& io) { exchange_failure(io); }).empty()) failed_ = owed_ = false;
  if (!in.tried("limits", [&](StateIo& io) { limiter_.exchange(io); }).empty() || !limiter_.fits()) {
    limiter_.start_from(applied_);
  }
  if (!in.tried("windows", [&](StateIo& io) { exchange_windows(io); }).empty()) {
    for (RoutingStats& window : windows_) window.clear();
  }
  if (entropy_check_ &&
      !in.tried("responsiveness", [&](StateIo& io) { exchange_entropy_check(io); }).empty()) {
    start_checks(config);
  }
  return "";
}

}  // namespace moectl
