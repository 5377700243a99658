#include "control/scalar_response.h"

#include <algorithm>
#include <cmath>

#include "control/config_fields.h"

namespace moectl {
namespace {

constexpr double kTravel = 0.1;             // of ln T, since the last answer: large enough to ask
constexpr double kSize = 0.1;               // of ln T
constexpr double kSmallest = 0.005;         // below it a probe tells nothing
constexpr std::int64_t kLongestStay = 16;   // decisions
constexpr double kSilent = 0.1;             // gain
constexpr double kSure = 5, kVerySure = 6;  // standard errors
constexpr double kLeastRoom = 1e-4;         // nats for each unit of ln T: at its bound no entropy can answer
constexpr std::int64_t kFewestBlocks = 2, kMostBlocks = 12;
constexpr std::int64_t kQuiet = 512, kQuietUntold = 4096;  // decisions after an answer, after none
constexpr std::int64_t kPause = 4;                         // decisions between the blocks of a held value
constexpr NumberRange kLog{-100, 100}, kSum{-1e100, 1e100};

// Both ways need room in the range, and few enough decisions for the rate.
double size_within(const Limits& limits) {
  return std::min({kSize, std::log(limits.max / limits.min) / 4, limits.rate * kLongestStay / 2});
}

}  // namespace

ScalarResponse::ScalarResponse(const Limits& limits, int delay, double in_force)
    : min_(limits.min),
      max_(limits.max),
      size_(size_within(limits)),
      stay_(size_ < kSmallest ? 1 : static_cast<std::int64_t>(std::ceil(2 * size_ / limits.rate - 1e-9))),
      back_(static_cast<std::int64_t>(kProbeSigns.size()) * stay_ + 1),
      idle_(back_ + 1),
      // A delay of less than a window blurs the window's answer, and does not move it.
      slots_(static_cast<std::size_t>(delay / limits.cadence) + 1),
      reference_(in_force),
      base_(in_force),
      log_(slots_, std::log(in_force)),
      signs_(slots_, 0.0),
      series_(static_cast<std::size_t>(idle_ * (limits.cooldown + 1)) + slots_ + kProbeLags) {}

void ScalarResponse::observe(double entropy, double largest, double in_force) {
  newest_ = (newest_ + 1) % slots_;
  log_[newest_] = std::log(in_force);
  signs_[newest_] = sign_;
  quiet_ = std::max<std::int64_t>(quiet_ - 1, 0);
  const std::size_t then = (newest_ + 1) % slots_;
  if (!probes()) {
    const double moved = std::abs(log_[newest_] - std::log(reference_));
    if (!held_ && quiet_ == 0 && moved >= kTravel) start_probe(in_force);
    return;
  }
  series_.add(signs_[then], log_[then] - std::log(base_), entropy);
  expected_ += 2 * std::max(0.0, std::min(entropy, largest - entropy));
  ++steps_;
  if (decision_ < back_) return;
  if (++waited_ >= static_cast<std::int64_t>(slots_ + kProbeLags)) finish_block();
}

void ScalarResponse::restart(double in_force) {
  newest_ = (newest_ + 1) % slots_;
  log_[newest_] = std::log(in_force);
  signs_[newest_] = sign_;
  if (held_) return pause();
  end(Response::kUnknown, {}, 0);
  reference_ = in_force;
}

// In the middle of the range, so that test moves both ways have room.
void ScalarResponse::start_probe(double in_force) {
  if (size_ < kSmallest) return;
  base_ = std::clamp(in_force, min_ * std::exp(size_), max_ * std::exp(-size_));
  state_ = Response::kProbing;
  blocks_ = steps_ = 0;
  expected_ = 0;
  sums_ = {};
  start_block();
}

void ScalarResponse::start_block() {
  decision_ = waited_ = 0;
  series_.clear();
}

std::optional<GainEstimate> ScalarResponse::estimate(std::size_t late) const {
  const Sums& sums = sums_[late];
  const double assumed = steps_ > 0 ? expected_ / static_cast<double>(steps_) : 0;
  if (!(sums.zx > 0) || !(sums.freedom > 0) || assumed < kLeastRoom) return std::nullopt;
  const double error = std::sqrt(sums.left / sums.freedom * sums.zz) / sums.zx;
  return told({sums.zy / sums.zx / assumed, error / assumed});
}

void ScalarResponse::finish_block() {
  ++blocks_;
  for (std::size_t late = 0; late < kProbeLags; ++late) {
    const auto fit = series_.fit(late);
    if (!fit) continue;
    Sums& sums = sums_[late];
    sums.zy += fit->zy;
    sums.zx += fit->zx;
    sums.zz += fit->zz;
    sums.left += fit->left;
    sums.freedom += fit->freedom;
  }
  const std::optional<GainEstimate> in_time = estimate(0);
  for (std::size_t late = 0; late < kProbeLags; ++late) {
    const std::optional<GainEstimate> found = estimate(late);
    if (!found || found->gain - kSure * found->error <= 0 || found->gain <= kSilent) continue;
    if (late > 0 && in_time && found->gain <= 2 * std::abs(in_time->gain)) continue;
    late_ = static_cast<std::int64_t>(late);
    reference_ = base_;
    held_ = false;
    return end(Response::kAnswers, found, kQuiet);
  }
  if (blocks_ >= (held_ ? 1 : kFewestBlocks) && in_time &&
      in_time->gain + kVerySure * in_time->error < kSilent) {
    state_ = Response::kUnresponsive;
    found_ = in_time;
    late_ = 0;
    held_ = true;
    base_ = std::clamp(reference_, min_ * std::exp(size_), max_ * std::exp(-size_));
    return pause();
  }
  if (blocks_ < kMostBlocks) return start_block();
  if (held_) return pause();
  reference_ = base_;
  end(Response::kUnknown, {}, kQuietUntold);
}

void ScalarResponse::end(Response state, std::optional<GainEstimate> found, std::int64_t quiet) {
  state_ = state;
  found_ = found;
  decision_ = idle_;
  quiet_ = quiet;
}

// After a block without an answer the blocks before it are forgotten: the router may have been mended since.
void ScalarResponse::pause() {
  decision_ = -kPause;
  blocks_ = steps_ = 0;
  expected_ = 0;
  sums_ = {};
}

double ScalarResponse::next_sign() const {
  return decision_ >= 0 && decision_ < back_ - 1 ? kProbeSigns[static_cast<std::size_t>(decision_ / stay_)]
                                                 : 0;
}

double ScalarResponse::adjust(LimitReport& why) const {
  if (held_) why.add(Reason::kUnresponsive);
  if (probes()) why.add(Reason::kProbe);
  return base_ * std::exp(size_ * next_sign());
}

void ScalarResponse::on_applied(const LimitReport& why, double applied) {
  if (why.has(Reason::kGuard) || why.has(Reason::kRollback) || why.has(Reason::kFallback)) {
    sign_ = offset_ = 0;
    if (held_) return pause();
    end(Response::kUnknown, {}, 0);
    reference_ = applied;
    return;
  }
  // A probe that was broken off is in force until the value moves again.
  if (why.held() && !why.has(Reason::kDeadband)) return;
  sign_ = next_sign();
  offset_ = sign_ != 0 ? applied - base_ : 0;
  if (!adjusts()) return;
  if (decision_ < back_) ++decision_;
  if (decision_ == 0) start_block();
}

bool ScalarResponse::has_news() {
  const bool silent = state_ == Response::kUnresponsive;
  if (silent == told_ || (!silent && state_ != Response::kAnswers)) return false;
  told_ = silent;
  return true;
}

void ScalarResponse::exchange(StateIo& io) {
  io.choice("scalar_response.state", state_, Response::kUnresponsive);
  io.value("scalar_response.held", held_);
  io.value("scalar_response.told", told_);
  io.value("scalar_response.late", late_, {0, static_cast<std::int64_t>(kProbeLags) - 1});
  exchange_found(io, "scalar_response.found", "scalar_response.gain", "scalar_response.error", found_);
  // What was in force when the limits were others, too.
  io.value("scalar_response.reference", reference_, {kTemperature.low, kTemperature.high});
  io.value("scalar_response.base", base_, {kTemperature.low, kTemperature.high});
  io.value("scalar_response.decision", decision_, {-kPause, idle_});
  io.value("scalar_response.waited", waited_);
  io.value("scalar_response.blocks", blocks_);
  io.value("scalar_response.quiet", quiet_);
  io.value("scalar_response.sign", sign_, {-1, 1});
  io.value("scalar_response.offset", offset_, {-kTemperature.high, kTemperature.high});
  io.values("scalar_response.log", log_, kLog);
  io.values("scalar_response.signs", signs_, {-1, 1});
  std::int64_t newest = static_cast<std::int64_t>(newest_);
  io.value("scalar_response.newest", newest, {0, static_cast<std::int64_t>(slots_) - 1});
  newest_ = static_cast<std::size_t>(newest);
  series_.exchange(io, "scalar_response.sign_seen", "scalar_response.moved", "scalar_response.entropy",
                   "scalar_response.seen", kSum);
  for (Sums& sums : sums_) {
    io.value("scalar_response.zy", sums.zy, kSum);
    io.value("scalar_response.zx", sums.zx, kSum);
    io.value("scalar_response.zz", sums.zz, {0, kSum.most});
    io.value("scalar_response.left", sums.left, {0, kSum.most});
    io.value("scalar_response.freedom", sums.freedom, {0, kSum.most});
  }
  io.value("scalar_response.expected", expected_, {0, kSum.most});
  io.value("scalar_response.steps", steps_);
  io.check(held_ == (state_ == Response::kUnresponsive), "scalar_response.held", "agree with the state");
  io.check(found_ || (state_ != Response::kAnswers && !held_), "scalar_response.found",
           "be there if the entropy was judged");
  io.check(probes() || state_ != Response::kProbing, "scalar_response.decision", "be in a probe");
}

}  // namespace moectl
