#include "control/response_check.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/lanes.h"
#include "base/names.h"
#include "moectl/health.h"

namespace moectl {
namespace {

constexpr Names<Response, kResponseCount> kNames{
    {"not_applicable", "unknown", "answers", "probing", "unresponsive"}};

// Slopes assumed without a measured one.
constexpr double kSlopeOfProbability = 1, kSlopeOfLogit = 0.1;
constexpr double kSlopeEma = 0.1, kNoiseEma = 0.1, kMoveEma = 0.1;
constexpr double kMemory = 0.98;  // of the regression on moves: fifty steps
constexpr double kSure = 3;       // standard errors
constexpr double kVerySure = 3.5;
constexpr double kSharp = 0.3;  // the largest standard error of a gain that counts as known
// A layer answers if its gain is surely above kAnswers, and does not if it is very surely below kSilent.
constexpr double kAnswers = 0.25, kSilent = 0.5;
constexpr double kSmallestSize = 1.0 / 64;
constexpr std::int64_t kMaxBlocks = 6;
constexpr std::int64_t kFirstBackoff = 32, kLastBackoff = 128;
// A layer that is balanced has nothing to answer.
constexpr double kImbalance = kBalancedFloors * kBalancedFloors;
constexpr double kReach = 16;
// What a state may hold, so that every product below is a number.
constexpr NumberRange kBias{-1e12, 1e12}, kLoad{0, 1e15}, kSum{-1e200, 1e200};
// The check of a balanced layer is awake for kAwake steps in each kPeriod, and for those that fill its memory.
constexpr std::int64_t kPeriod = 512, kAwake = 16;
constexpr std::int64_t kFewest = 4;  // assignments an expert in a step; with fewer, slopes are mostly noise
constexpr std::int64_t kSameLoads = 8;  // steps with the same loads
constexpr std::int64_t kNap = 12;       // steps without a comparison after an answer

}  // namespace

std::string_view name_of(Response response) {
  return kNames[response];
}

std::optional<Response> response_of(std::string_view name) {
  return kNames.find(name);
}

ResponseCheck::ResponseCheck(const ControllerConfig& config, int layer, std::span<const double> in_force)
    : in_probabilities_(config.model.score_space == ScoreSpace::kProbability),
      experts_(static_cast<std::size_t>(config.model.experts)),
      delay_(static_cast<std::size_t>(config.delay())),
      token_range_(static_cast<double>(config.model.experts) / config.model.top_k),
      clock_(std::int64_t{37} * layer % kPeriod),
      assumed_slope_(config.model.score_space == ScoreSpace::kLogit ? kSlopeOfLogit : kSlopeOfProbability),
      weight_(experts_, 1.0),
      per_weight_(experts_, 1.0),
      slope_(experts_, assumed_slope_),
      slope_now_(experts_, 0.0),
      history_((delay_ + 3) * experts_, 0.0),
      move_mean_(experts_, 0.0),
      reference_load_(experts_, 0.0),
      reference_bias_(experts_, 0.0),
      backoff_(kFirstBackoff),
      base_(in_force.begin(), in_force.end()),
      probe_(config, layer) {
  slope_sum_ = sum_of(slope_);
  for (std::vector<double>& load : load_) load.assign(experts_, 0.0);
  for (std::size_t i = 0; i < config.model.targets.size(); ++i) {
    weight_[i] = config.model.targets[i] * static_cast<double>(experts_);
    per_weight_[i] = weight_[i] > 0 ? std::min(1 / weight_[i], 1e6) : 0;
  }
}

std::span<const double> ResponseCheck::bias(std::size_t ago) const {
  return std::span(history_).subspan(place(ago) * experts_, experts_);
}

void ResponseCheck::remember(std::span<const double> in_force) {
  newest_ = (newest_ + 1) % (delay_ + 3);
  probe_.remember(newest_);
  double* const to = history_.data() + newest_ * experts_;
  for_each_eight(experts_, [&](std::size_t i, auto at) {
    at.put(&to[i], smaller(larger(at.get(&in_force[i]), splat(kBias.least)), splat(kBias.most)));
  });
}

void ResponseCheck::observe(const RoutingStats* stats, double load_cv, double floor_cv,
                            std::span<const double> in_force, bool trusted) {
  if (stats == nullptr || stats->assignments() < kFewest * static_cast<std::int64_t>(experts_)) {
    remember(in_force);
    skip();
    return;
  }
  skipped_ = 0;
  floor_sq_ = floor_cv * floor_cv;
  quiet_ = std::max<std::int64_t>(quiet_ - 1, 0);
  clock_ = (clock_ + 1) % kPeriod;
  if (rests(load_cv, in_force)) return;
  remember(in_force);
  follow(*stats);
  ++filled_;
  if (filled_ <= static_cast<std::int64_t>(delay_)) return;
  if (!referenced_) {
    set_reference(/*answered=*/false);
    std::fill(move_mean_.begin(), move_mean_.end(), 0.0);
    return;
  }
  if (held_ && !probes()) return;
  compare();
  judge(trusted);
}

// Follows how far the layer is from balance, and decides whether there is anything to compare at this step.
bool ResponseCheck::rests(double load_cv, std::span<const double> in_force) {
  const double ratio = std::min(load_cv * load_cv / std::max(floor_sq_, 1e-12), 1e6);
  error_over_floor_ += (error_over_floor_ > 0 ? kNoiseEma : 1) * (ratio - error_over_floor_);
  // The average of a layer that balanced itself at once is still high for thirty steps.
  unbalanced_ = std::min(ratio, error_over_floor_) > kImbalance;
  // Loads that are the same again and again are no new routing, however even they are: it is asked what moves them.
  same_loads_ = load_cv == last_cv_ ? std::min(same_loads_ + 1, kSameLoads) : 0;
  last_cv_ = load_cv;
  unbalanced_ |= same_loads_ >= kSameLoads;
  const bool balanced = error_over_floor_ <= kImbalance && same_loads_ < kSameLoads && !adjusts();
  if (nap_ > 0) {
    --nap_;
    return true;
  }
  if (!resting_) {
    resting_ = balanced && full() && compared_ >= kAwake;
    if (resting_) keep_base(bias(delay_));
  } else if (!balanced || clock_ == 0) {
    resting_ = referenced_ = false;
    compared_ = 0;
    if (!balanced) moves_ = {};  // what answered long ago may not answer now
  } else if (clock_ % kAwake == 0 && ratio <= kImbalance) {
    keep_base(in_force);  // a rest is long, and the router goes on forming
  }
  if (resting_) filled_ = 0;
  return resting_;
}

// The one pass over the experts that every step needs: slopes, loads, how much they scatter, and what compare() takes out
// of the biases. Only differences between experts count: a bias that all have in common does nothing, so each expected
// change is taken less the mean that leaves the sum of all loads as it is.
void ResponseCheck::follow(const RoutingStats& stats) {
  std::swap(load_[2], load_[1]);
  std::swap(load_[1], load_[0]);
  const bool measured = stats.load_slope(slope_now_);
  const double newest = !measured ? 0 : scaled_ ? kSlopeEma : 1;
  if (measured && !scaled_) moves_ = {};
  scaled_ |= measured;
  const double scale = static_cast<double>(experts_) / static_cast<double>(stats.assignments());
  const std::span<const std::int64_t> counts = stats.counts();
  const std::span<const double> now = bias(delay_), last = bias(delay_ + 1), before = bias(delay_ + back());
  Double8 changes = splat(0), slopes = splat(0), all = splat(0), at_now = splat(0), at_last = splat(0),
          at_before = splat(0), at_reference = splat(0);
  for_each_eight(experts_, [&](std::size_t i, auto at) {
    const Double8 per_weight = at.get(&per_weight_[i]), old = at.get(&slope_[i]);
    const Double8 slope =
        smaller(old + newest * (at.get(&slope_now_[i]) * per_weight - old), splat(kLoad.most));
    at.put(&slope_[i], slope);
    slopes += slope;
    const Double8 load = at.get(&counts[i]) * scale * per_weight, change = load - at.get(&load_[1][i]);
    at.put(&load_[0][i], load);
    changes += change * change;
    const Double8 w = at.get(&weight_[i]) * slope;
    all += w;
    at_now += w * at.get(&now[i]);
    at_last += w * at.get(&last[i]);
    at_before += w * at.get(&before[i]);
    at_reference += w * at.get(&reference_bias_[i]);
  });
  slope_sum_ = sum_of(slopes);
  within_one_ |= in_probabilities_ && scaled_ && token_range_ * static_cast<double>(experts_) < slope_sum_;
  weighted_ = {sum_of(all), sum_of(at_now), sum_of(at_last), sum_of(at_before), sum_of(at_reference)};
  if (filled_ == 0) return;  // no load before it
  const double change_sq = sum_of(changes) / (2 * static_cast<double>(experts_));
  noise_sq_ += (noise_sq_ > 0 ? kNoiseEma : 1) * (change_sq - noise_sq_);
}

// The regressions. After a pause the travel is known first; the moves need the steps before.
void ResponseCheck::compare() {
  const bool known = full();
  const double follow_moves = known ? kMoveEma : 0;
  ++compared_;
  const std::span<const double> now = bias(delay_), last = bias(delay_ + 1), before = bias(delay_ + back());
  const std::span<const double> load = load_[0], load_before = load_[back()];
  if (known) moves_.add({}, kMemory);
  travel_ = {};
  if (!(weighted_.all > 0)) return;
  const double mean_now = weighted_.now / weighted_.all, mean_last = weighted_.last / weighted_.all,
               mean_before = weighted_.before / weighted_.all,
               mean_reference = weighted_.reference / weighted_.all;
  Double8 zy = splat(0), zx = splat(0), zz = splat(0), wy = splat(0), ww = splat(0), noise = splat(0);
  const auto body = [&](std::size_t i, auto at) {
    const Double8 slope = at.get(&slope_[i]), b = at.get(&now[i]) - mean_now, y = at.get(&load[i]);
    const Double8 move = at.keep(b - (at.get(&last[i]) - mean_last)), mean = at.get(&move_mean_[i]);
    const Double8 z = slope * (move - mean);
    at.put(&move_mean_[i], mean + follow_moves * (move - mean));
    zy += at.keep(z * (y - at.get(&load_before[i])));
    zx += at.keep(z * slope * (b - (at.get(&before[i]) - mean_before)));
    zz += at.keep(z * z * y);
    const Double8 w = at.keep(slope * (b - (at.get(&reference_bias_[i]) - mean_reference)));
    wy += w * (y - at.get(&reference_load_[i]));
    ww += w * w;
    noise += w * w * y;
  };
  for_each_eight(experts_, body);
  if (known) moves_.add({sum_of(zy), sum_of(zx), sum_of(zz)}, 1);
  travel_ = {sum_of(wy), sum_of(ww), sum_of(noise)};
  if (!probes()) return;
  probe_.observe({weight_, slope_, now, load, weighted_.all, weighted_.now}, place(delay_));
}

void ResponseCheck::judge(bool trusted) {
  if (probes()) {
    if (!probe_.all_made() || for_wiring_) return;
    // An answer in time is looked for first, then one that is late.
    const std::int64_t in_time = static_cast<std::int64_t>(delay_) + 1;
    const std::int64_t waited = probe_.wait();
    if (waited == in_time && finds_answer(1)) return;
    const std::int64_t latest = probe_.size() < 1 ? 0 : static_cast<std::int64_t>(kProbeLags) - 1;
    if (waited == in_time + latest) finish_block(trusted);
    return;
  }
  if (held_) return;
  const auto answered = [](const std::optional<GainEstimate>& found) {
    return found && found->gain - kSure * found->error > kAnswers && sharp(*found);
  };
  const std::optional<GainEstimate> travel = travel_.estimate(2 * noise()),
                                    moves = full() ? moves_.estimate(2 * noise()) : std::nullopt;
  // Moves are remembered over pauses: where the whole way since the last answer surely led to nothing, they are old.
  const bool silent = travel && travel->gain + kSure * travel->error < kAnswers;
  const bool by_travel = answered(travel), by_moves = !silent && answered(moves);
  const bool falls_short = travel && travel->gain + kSure * travel->error < 1;
  if (by_travel || (falls_short && by_moves)) set_reference(/*answered=*/true);
  if (by_travel || by_moves) {
    state_ = Response::kAnswers;
    found_ = by_moves ? moves : travel;
    nap_ = kNap;
    filled_ = 0;
  } else if (falls_short && full() && quiet_ == 0 && unbalanced_) {
    start_probe();
    // Where the load seems to go the other way, the policy would run away. Only moves tell: along the whole way, an
    // expert that sank for a reason of its own looks the same.
    const bool reversed = moves && moves->gain + kVerySure * moves->error < 0;
    waits_ = state_ == Response::kProbing && reversed && !trusted ? Waits::kAtBase : Waits::kNo;
  }
}

void ResponseCheck::set_reference(bool answered) {
  const std::span<const double> now = bias(delay_);
  std::copy(now.begin(), now.end(), reference_bias_.begin());
  std::copy(load_[0].begin(), load_[0].end(), reference_load_.begin());
  referenced_ = true;
  if (!held_ && (!based_ || answered || error_over_floor_ <= kImbalance)) keep_base(now);
}

void ResponseCheck::keep_base(std::span<const double> biases) {
  std::ranges::transform(biases, base_.begin(),
                         [](double b) { return std::clamp(b, kBias.least, kBias.most); });
  based_ = true;
}

// Without a measured slope: as large as the last answer says that it must be.
double ResponseCheck::first_size() const {
  if (scaled_) return 1;
  return found_ && found_->gain > 1 ? std::max(1 / found_->gain, kSmallestSize) : kSmallestSize;
}

void ResponseCheck::start_probe() {
  state_ = Response::kProbing;
  held_ = false;
  probe_.begin(first_size());
  start_block();
}

// A rate that leaves no room for a probe that tells is not fought.
void ResponseCheck::start_block() {
  const bool room = probe_.start_block(slope_, slope_sum_ / static_cast<double>(experts_), noise());
  if (!room && !held_) give_up();
}

void ResponseCheck::start_marks() {
  probe_.start_marks(slope_, slope_sum_ / static_cast<double>(experts_));
}

// An instrument that hardly moved says nothing, however large its gain.
bool ResponseCheck::sharp(const GainEstimate& found) {
  return found.error < std::max(kSharp, kSharp * found.gain / 2);
}

bool ResponseCheck::finds_answer(std::size_t lags) {
  for (std::size_t late = 0; late < lags; ++late) {
    const std::optional<GainEstimate> found = probe_.answer(late, noise());
    if (!found || found->gain - kVerySure * found->error <= 0 || found->gain <= kAnswers) continue;
    if (!sharp(*found)) continue;
    const double in_time = probe_.answer(0, noise()).value_or(GainEstimate{}).gain;
    if (late > 0 && found->gain <= 2 * std::abs(in_time)) continue;
    state_ = Response::kAnswers;
    found_ = found;
    late_ = static_cast<std::int64_t>(late);
    backoff_ = held_ ? kFirstBackoff : std::min(2 * backoff_, kLastBackoff);
    quiet_ = backoff_;
    held_ = false;
    moves_ = {};
    set_reference(/*answered=*/true);
    return true;
  }
  return false;
}

void ResponseCheck::finish_block(bool trusted) {
  const bool whole = probe_.size() >= 1;
  if (whole && finds_answer(kProbeLags)) return;
  const std::int64_t blocks = probe_.count_block();
  const std::optional<GainEstimate> found = probe_.answer(0, noise());
  if (whole && found && found->gain + kVerySure * found->error < kSilent) {
    // A small part of what was expected is an answer all the same: slopes mislead where tokens hardly lie near the threshold.
    if (trusted || found->gain - kVerySure * found->error > 0) return give_up();
    state_ = Response::kUnresponsive;
    found_ = found;
    late_ = 0;
    held_ = true;
    probe_.pause();
    return;
  }
  if (blocks >= kMaxBlocks) {
    if (held_) return probe_.pause();
    give_up();
    return;
  }
  // A block that did not tell is made again without the policy, whose own moves may have covered it. Whole blocks
  // add up, each by its precision, but for one that was covered.
  const bool clear = held_ || waits_ != Waits::kNo || (found && found->error < kSharp);
  probe_.end_block(clear, noise());
  if (whole && waits_ == Waits::kNo) waits_ = Waits::kWhereItIs;
  start_block();
}

void ResponseCheck::give_up() {
  state_ = Response::kUnknown;
  found_.reset();
  quiet_ = kLastBackoff;
  set_reference(/*answered=*/false);
}

void ResponseCheck::forget_steps() {
  filled_ = nap_ = compared_ = 0;
  resting_ = referenced_ = false;
  error_over_floor_ = 0;
}

// A step of which nothing is known, or too few tokens. What was learnt stays, as long as in a pause after an answer.
void ResponseCheck::skip() {
  filled_ = 0;
  if (skipped_ < kNap) {
    ++skipped_;
    return;
  }
  const bool based = based_;  // no guard and no rollback moved the biases
  restart();
  based_ = based;
}

void ResponseCheck::restart() {
  forget_steps();
  if (for_wiring_) {
    start_marks();
  } else if (held_) {
    probe_.pause();
  } else {
    state_ = Response::kUnknown;
    found_.reset();
    based_ = false;
  }
}

void ResponseCheck::hold_for_wiring() {
  state_ = Response::kUnresponsive;
  found_ = GainEstimate{0, 0};
  late_ = 0;
  held_ = for_wiring_ = true;
  restart();
}

void ResponseCheck::release() {
  held_ = for_wiring_ = false;
  state_ = Response::kUnknown;
  found_.reset();
  probe_.stop();
  quiet_ = 0;
  forget_steps();
}

void ResponseCheck::adjust(std::span<double> wanted, LimitReport& why) const {
  if (held_) why.add(Reason::kUnresponsive);
  if (held_ || (probes() && waits_ == Waits::kAtBase)) std::copy(base_.begin(), base_.end(), wanted.begin());
  if (!probes()) return;
  if (!held_ && waits_ == Waits::kWhereItIs) {
    const std::span<const double> now = bias(0);
    const std::span<const double> offset = probe_.offset();
    for (std::size_t i = 0; i < experts_; ++i) wanted[i] = now[i] - (offset.empty() ? 0 : offset[i]);
  }
  probe_.add_to(wanted);
  why.add(Reason::kProbe);
}

void ResponseCheck::on_applied(const LimitReport& why) {
  if (!probes() && !held_) {
    // A probe that was broken off is in force until the biases move again.
    if (!offset().empty() && (!why.held() || why.has(Reason::kDeadband))) leave_probe();
    return;
  }
  if (why.has(Reason::kGuard) || why.has(Reason::kRollback) || why.has(Reason::kFallback)) {
    leave_probe();
    restart();
  } else if (!why.held() || why.has(Reason::kDeadband)) {
    const bool paused_till_now = probe_.advance();
    if (for_wiring_) {
      if (probe_.last_made()) start_marks();
      return;
    }
    if (!paused_till_now) return;
    probe_.begin(first_size());
    start_block();
  }
}

std::optional<double> ResponseCheck::reach() const {
  if (in_probabilities_ && (within_one_ || !scaled_)) return 1;
  const double mean_slope = slope_sum_ / static_cast<double>(experts_);
  if (!scaled_ || !(mean_slope > 0)) return std::nullopt;
  return kReach * token_range_ / mean_slope;
}

void ResponseCheck::exchange(StateIo& io) {
  io.values("response.slope", slope_, kLoad);
  slope_sum_ = sum_of(slope_);
  io.value("response.scaled", scaled_);
  io.values("response.history", history_, kBias);
  std::int64_t newest = static_cast<std::int64_t>(newest_);
  io.value("response.newest", newest, {0, static_cast<std::int64_t>(delay_) + 2});
  newest_ = static_cast<std::size_t>(newest);
  io.value("response.steps", filled_);
  io.value("response.skipped", skipped_, {0, kNap});
  io.value("response.clock", clock_, {0, kPeriod - 1});
  io.value("response.resting", resting_);
  io.value("response.referenced", referenced_);
  io.value("response.nap", nap_, {0, kNap});
  io.value("response.compared", compared_);
  for (std::vector<double>& load : load_) io.values("response.load", load, kLoad);
  io.values("response.move_mean", move_mean_, kBias);
  io.values("response.reference_load", reference_load_, kLoad);
  io.values("response.reference_bias", reference_bias_, kBias);
  io.value("response.floor_sq", floor_sq_, {0, 1e100});
  io.value("response.noise_sq", noise_sq_, {0, 1e100});
  io.value("response.error_over_floor", error_over_floor_, {0, 1e6});
  io.value("response.last_cv", last_cv_, StateIo::kNotNegative);
  io.value("response.same_loads", same_loads_, {0, kSameLoads});
  moves_.exchange(io, kSum);
  io.choice("response.state", state_, Response::kUnresponsive);
  io.value("response.quiet", quiet_);
  io.value("response.backoff", backoff_);
  io.values("response.base", base_, kBias);
  io.value("response.within_one", within_one_);
  probe_.exchange(io, kBias, kSum);
  io.value("response.late", late_, {0, static_cast<std::int64_t>(kProbeLags) - 1});
  io.value("response.held", held_);
  io.value("response.for_wiring", for_wiring_);
  io.choice("response.waits", waits_, Waits::kAtBase);
  io.value("response.based", based_);
  exchange_found(io, "response.found", "response.gain", "response.error", found_);
  io.check(held_ || !for_wiring_, "response.for_wiring", "be held");
  io.check(held_ == (state_ == Response::kUnresponsive), "response.held", "agree with the state");
  io.check(found_ || (state_ != Response::kAnswers && !held_), "response.found",
           "be there if the load was judged");
  io.check(state_ != Response::kProbing || !probe_.paused(), "response.decision",
           "not be negative in a probe");
}

}  // namespace moectl
