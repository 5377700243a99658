#include "control/response_check.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>

#include "base/lanes.h"
#include "moectl/health.h"

namespace moectl {
namespace {

constexpr std::array<std::string_view, kResponseCount> kNames = {"not_applicable", "unknown", "answers",
                                                                 "probing", "unresponsive"};

// Slopes assumed without a measured one.
constexpr double kSlopeOfProbability = 1, kSlopeOfLogit = 0.1;
constexpr double kSlopeEma = 0.1, kNoiseEma = 0.1, kMoveEma = 0.1;
constexpr double kMemory = 0.98;  // of the regression on moves: fifty steps
constexpr double kSure = 3;       // standard errors
constexpr double kVerySure = 3.5;
constexpr double kSharp = 0.3;  // the largest standard error of a gain that counts as known
// A layer answers if its gain is surely above kAnswers, and does not if it is very surely below kSilent.
constexpr double kAnswers = 0.25, kSilent = 0.5;
constexpr std::array<double, 8> kSigns = {1, 1, -1, 1, -1, -1, -1, 1};
constexpr double kProbeError = 0.08;   // standard error of the gain after one block
constexpr double kLargestProbe = 0.5;  // relative load
constexpr double kSmallestSize = 1.0 / 64, kSizeStep = 8;
constexpr std::int64_t kPause = 8;  // decisions between the probes of a held layer
constexpr std::int64_t kMaxBlocks = 6;
constexpr std::int64_t kFirstBackoff = 32, kLastBackoff = 128;
// A layer that is balanced has nothing to answer.
constexpr double kImbalance = kBalancedFloors * kBalancedFloors;
constexpr double kReach = 16;
// What a state may hold, so that every product below is a number.
constexpr NumberRange kBias{-1e12, 1e12}, kLoad{0, 1e15}, kSum{-1e200, 1e200};
// The check of a balanced layer is awake for kAwake steps in each kPeriod, and for those that fill its memory.
constexpr std::int64_t kPeriod = 256, kAwake = 16;
constexpr std::int64_t kNap = 8;  // steps without a comparison after an answer

}  // namespace

std::string_view name_of(Response response) {
  return kNames[static_cast<std::size_t>(response)];
}

std::optional<Response> response_of(std::string_view name) {
  const auto it = std::find(kNames.begin(), kNames.end(), name);
  if (it == kNames.end()) return std::nullopt;
  return static_cast<Response>(it - kNames.begin());
}

ResponseCheck::ResponseCheck(const ControllerConfig& config, int layer, std::span<const double> in_force)
    : in_probabilities_(config.model.score_space == ScoreSpace::kProbability),
      experts_(static_cast<std::size_t>(config.model.experts)),
      delay_(static_cast<std::size_t>(config.delay())),
      token_range_(static_cast<double>(config.model.experts) / config.model.top_k),
      clock_(37 * layer % kPeriod),
      rate_(config.expert_bias.limits.rate),
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
      pattern_(experts_, 0.0),
      // Codes of different layers are orthogonal where N is a power of two, so that a layer is not taken for another.
      code_(1 + static_cast<std::size_t>(layer) % (std::max<std::size_t>(std::bit_floor(experts_), 2) - 1)),
      offset_(experts_, 0.0),
      signs_(delay_ + 3, 0.0),
      sign_seen_(
          (kSigns.size() + 1) * static_cast<std::size_t>(std::max(config.expert_bias.limits.cadence,
                                                                  config.expert_bias.limits.cooldown + 1)) +
              delay_ + kLags + 1,
          0.0),
      bias_along_(sign_seen_.size(), 0.0),
      load_along_(sign_seen_.size(), 0.0) {
  slope_sum_ = sum_of(slope_);
  for (std::vector<double>& load : load_) load.assign(experts_, 0.0);
  for (std::size_t i = 0; i < config.model.targets.size(); ++i) {
    weight_[i] = config.model.targets[i] * static_cast<double>(experts_);
    per_weight_[i] = weight_[i] > 0 ? std::min(1 / weight_[i], 1e6) : 0;
  }
}

void ResponseCheck::Sums::add(const Sums& more, double keep) {
  zy = keep * zy + more.zy;
  zx = keep * zx + more.zx;
  zz = keep * zz + more.zz;
}

std::optional<ResponseCheck::Estimate> ResponseCheck::Sums::estimate(double noise_sq) const {
  if (!(zx > 0) || !(zz > 0)) return std::nullopt;
  const Estimate found{zy / zx, std::sqrt(noise_sq * zz) / zx};
  return std::isfinite(found.gain) && std::isfinite(found.error) ? std::optional(found) : std::nullopt;
}

std::span<const double> ResponseCheck::bias(std::size_t ago) const {
  const std::size_t slots = delay_ + 3, at = (newest_ + slots - ago) % slots;
  return std::span(history_).subspan(at * experts_, experts_);
}

void ResponseCheck::remember(std::span<const double> in_force) {
  newest_ = (newest_ + 1) % (delay_ + 3);
  signs_[newest_] = sign_;
  double* const to = history_.data() + newest_ * experts_;
  for_each_eight(experts_, [&](std::size_t i, auto at) {
    at.put(&to[i], smaller(larger(at.get(&in_force[i]), splat(kBias.least)), splat(kBias.most)));
  });
}

void ResponseCheck::observe(const RoutingStats* stats, double load_cv, double floor_cv,
                            std::span<const double> in_force) {
  if (stats == nullptr) {
    remember(in_force);
    restart();
    return;
  }
  floor_sq_ = floor_cv * floor_cv;
  quiet_ = std::max<std::int64_t>(quiet_ - 1, 0);
  clock_ = (clock_ + 1) % kPeriod;
  if (rests(load_cv)) return;
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
  judge();
}

// Follows how far the layer is from balance, and decides whether there is anything to compare at this step.
bool ResponseCheck::rests(double load_cv) {
  const double ratio = std::min(load_cv * load_cv / std::max(floor_sq_, 1e-12), 1e6);
  error_over_floor_ += (error_over_floor_ > 0 ? kNoiseEma : 1) * (ratio - error_over_floor_);
  // The average of a layer that balanced itself at once is still high for thirty steps.
  unbalanced_ = std::min(ratio, error_over_floor_) > kImbalance;
  const bool balanced = error_over_floor_ <= kImbalance && !adjusts();
  if (nap_ > 0) {
    --nap_;
    return true;
  }
  if (!resting_) {
    resting_ = balanced && full() && compared_ >= kAwake;
  } else if (!balanced || clock_ == 0) {
    resting_ = referenced_ = false;
    compared_ = 0;
    if (!balanced) moves_ = {};  // what answered long ago may not answer now
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
  if (probes()) follow_probe();
}

// The load changes expected of the pattern are σ(pattern - mean) =: q. What is seen along q, in patterns: <q, y> / <q, q>,
// and likewise the biases, which hold the probe and what the policy does meanwhile.
void ResponseCheck::follow_probe() {
  if (seen_ == load_along_.size()) return;
  const std::span<const double> now = bias(delay_);
  const double mean = sum_over(experts_,
                               [&](std::size_t i, auto at) -> Double8 {
                                 return at.get(&pattern_[i]) * at.get(&weight_[i]) * at.get(&slope_[i]);
                               }) /
                      weighted_.all;
  const double mean_now = weighted_.now / weighted_.all;
  Double8 qy = splat(0), qb = splat(0), qq = splat(0), noise = splat(0);
  const auto body = [&](std::size_t i, auto at) {
    const Double8 slope = at.get(&slope_[i]), q = at.keep(slope * (at.get(&pattern_[i]) - mean));
    const Double8 load = at.get(&load_[0][i]);
    qy += q * load;
    qb += q * slope * (at.get(&now[i]) - mean_now);
    qq += q * q;
    noise += q * q * load;
  };
  for_each_eight(experts_, body);
  if (!(sum_of(qq) > 1e-100)) return;
  pattern_sq_ = sum_of(qq);
  pattern_noise_ = sum_of(noise);
  load_along_[seen_] = sum_of(qy) / pattern_sq_;
  bias_along_[seen_] = sum_of(qb) / pattern_sq_;
  sign_seen_[seen_] = signs_[(newest_ + signs_.size() - delay_) % signs_.size()];
  ++seen_;
}

void ResponseCheck::judge() {
  if (probes()) {
    const bool all_made = decision_ > static_cast<std::int64_t>(kSigns.size());
    if (!all_made) return;
    // An answer in time is looked for first, then one that is late.
    const std::int64_t in_time = static_cast<std::int64_t>(delay_) + 1;
    if (++waited_ == in_time && finds_answer(1)) return;
    const std::int64_t latest = size_ < 1 ? 0 : static_cast<std::int64_t>(kLags) - 1;
    if (waited_ == in_time + latest) finish_block();
    return;
  }
  if (held_) return;
  const auto answered = [](const std::optional<Estimate>& found) {
    return found && found->gain - kSure * found->error > kAnswers && sharp(*found);
  };
  const std::optional<Estimate> travel = travel_.estimate(2 * noise()),
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
    waits_ = state_ == Response::kProbing && reversed ? Waits::kAtBase : Waits::kNo;
  }
}

void ResponseCheck::set_reference(bool answered) {
  const std::span<const double> now = bias(delay_);
  std::copy(now.begin(), now.end(), reference_bias_.begin());
  std::copy(load_[0].begin(), load_[0].end(), reference_load_.begin());
  referenced_ = true;
  if (held_ || (based_ && !answered && error_over_floor_ > kImbalance)) return;
  std::copy(now.begin(), now.end(), base_.begin());
  based_ = true;
}

// Without a measured slope: as large as the last answer says that it must be.
double ResponseCheck::first_size() const {
  if (scaled_) return 1;
  return found_ && found_->gain > 1 ? std::max(1 / found_->gain, kSmallestSize) : kSmallestSize;
}

void ResponseCheck::start_probe() {
  state_ = Response::kProbing;
  blocks_ = 0;
  probe_ = {};
  held_ = false;
  size_ = first_size();
  start_block();
}

void ResponseCheck::start_block() {
  decision_ = 0;
  waited_ = 0;
  seen_ = 0;
  const double n = static_cast<double>(experts_);
  const double load = std::min(std::sqrt(noise() / (kSigns.size() * n)) / kProbeError, kLargestProbe) * size_;
  const double mean_slope = slope_sum_ / n;
  std::size_t cut = 0;
  for (std::size_t i = 0; i < experts_; ++i) {
    const double size = mean_slope > 0 ? load / std::max(slope_[i], mean_slope / 4) : 0;
    pattern_[i] = std::min(size, rate_ / 2) * (std::popcount(i & code_) % 2 == 0 ? 1 : -1);
    cut += std::min(size, rate_ / 2) < size / 2 ? 1 : 0;
  }
  // A rate that leaves no room for a probe that tells is not fought.
  if (2 * cut > experts_ && !held_) {
    give_up();
    return;
  }
  const double mean = sum_of(pattern_) / n;
  for (double& part : pattern_) part -= mean;
}

// The regression over this block and those before it, for an answer that is `late` steps late.
ResponseCheck::Sums ResponseCheck::answer(std::size_t late) const {
  Sums sums = probe_[late];
  if (seen_ < 5) return sums;
  // A line is taken out of the signs and of what is seen.
  const double n = static_cast<double>(seen_), middle = (n - 1) / 2;
  const auto sign = [&](std::size_t t) { return t < late ? 0 : sign_seen_[t - late]; };
  Line signs, loads;
  for (std::size_t t = 0; t < seen_; ++t) {
    const double from_middle = (static_cast<double>(t) - middle) / (n * (n * n - 1) / 12);
    signs.mean += sign(t) / n;
    signs.slope += sign(t) * from_middle;
    loads.mean += load_along_[t] / n;
    loads.slope += load_along_[t] * from_middle;
  }
  double zy = 0, zx = 0, zz = 0, yy = 0;
  for (std::size_t t = 0; t < seen_; ++t) {
    const double from_middle = static_cast<double>(t) - middle;
    const double z = sign(t) - signs.mean - signs.slope * from_middle;
    const double y = load_along_[t] - loads.mean - loads.slope * from_middle;
    zy += z * y;
    zx += z * bias_along_[t < late ? 0 : t - late];
    zz += z * z;
    yy += y * y;
  }
  // What the regression leaves over counts as noise if it exceeds what sampling explains: tokens come in lumps.
  const double left = zz > 0 ? std::max(0.0, yy - zy * zy / zz) / (n - 3) : 0;
  const double noise_along = std::max(noise() * pattern_noise_ / pattern_sq_, pattern_sq_ * left);
  sums.add({pattern_sq_ * zy, pattern_sq_ * zx, pattern_sq_ * noise_along * zz}, 1);
  return sums;
}

// An instrument that hardly moved says nothing, however large its gain.
bool ResponseCheck::sharp(const Estimate& found) {
  return found.error < std::max(kSharp, kSharp * found.gain / 2);
}

bool ResponseCheck::finds_answer(std::size_t lags) {
  for (std::size_t late = 0; late < lags; ++late) {
    const std::optional<Estimate> found = answer(late).estimate(1);
    if (!found || found->gain - kVerySure * found->error <= 0 || found->gain <= kAnswers) continue;
    if (!sharp(*found)) continue;
    const double in_time = answer(0).estimate(1).value_or(Estimate{}).gain;
    if (late > 0 && found->gain <= 2 * std::abs(in_time)) continue;
    state_ = Response::kAnswers;
    found_ = found;
    late_ = static_cast<int>(late);
    backoff_ = held_ ? kFirstBackoff : std::min(2 * backoff_, kLastBackoff);
    quiet_ = backoff_;
    held_ = false;
    moves_ = {};
    set_reference(/*answered=*/true);
    return true;
  }
  return false;
}

void ResponseCheck::finish_block() {
  if (size_ == 1 && finds_answer(kLags)) return;
  ++blocks_;
  const std::optional<Estimate> found = answer(0).estimate(1);
  if (size_ == 1 && found && found->gain + kVerySure * found->error < kSilent) {
    state_ = Response::kUnresponsive;
    found_ = found;
    late_ = 0;
    held_ = true;
    pause();
    return;
  }
  if (blocks_ >= kMaxBlocks) {
    if (held_) return pause();
    give_up();
    return;
  }
  // A block that did not tell is made again without the policy, whose own moves may have covered it. Blocks of one size add
  // up, but for one that was covered.
  const bool clear = held_ || waits_ != Waits::kNo || (found && found->error < kSharp);
  for (std::size_t late = 0; late < kLags; ++late) probe_[late] = size_ == 1 && clear ? answer(late) : Sums{};
  if (size_ == 1 && waits_ == Waits::kNo) waits_ = Waits::kWhereItIs;
  size_ = std::min(size_ * kSizeStep, 1.0);
  start_block();
}

void ResponseCheck::give_up() {
  state_ = Response::kUnknown;
  found_.reset();
  quiet_ = kLastBackoff;
  set_reference(/*answered=*/false);
}

void ResponseCheck::pause() {
  decision_ = -kPause;
  blocks_ = 0;
  probe_ = {};
}

void ResponseCheck::restart() {
  filled_ = nap_ = compared_ = 0;
  resting_ = referenced_ = false;
  error_over_floor_ = 0;
  if (held_) {
    pause();
  } else {
    state_ = Response::kUnknown;
    found_.reset();
    based_ = false;
  }
}

void ResponseCheck::hold() {
  state_ = Response::kUnresponsive;
  found_ = Estimate{0, 0};
  late_ = 0;
  held_ = true;
  restart();
}

void ResponseCheck::release() {
  held_ = false;
  decision_ = quiet_ = 0;
  restart();
}

double ResponseCheck::next_sign() const {
  const bool moves = probes() && decision_ < static_cast<std::int64_t>(kSigns.size());
  return moves ? kSigns[static_cast<std::size_t>(decision_)] : 0;
}

void ResponseCheck::adjust(std::span<double> wanted, LimitReport& why) const {
  if (held_) why.add(Reason::kUnresponsive);
  if (held_ || (probes() && waits_ == Waits::kAtBase)) std::copy(base_.begin(), base_.end(), wanted.begin());
  if (!probes()) return;
  if (!held_ && waits_ == Waits::kWhereItIs) {
    const std::span<const double> now = bias(0);
    for (std::size_t i = 0; i < experts_; ++i) wanted[i] = now[i] - (sign_ != 0 ? offset_[i] : 0);
  }
  const double sign = next_sign();
  for (std::size_t i = 0; i < experts_; ++i) wanted[i] += sign * pattern_[i];
  why.add(Reason::kProbe);
}

void ResponseCheck::leave_probe() {
  sign_ = 0;
  std::fill(offset_.begin(), offset_.end(), 0.0);
}

void ResponseCheck::on_applied(const LimitReport& why) {
  if (!probes() && !held_) {
    // A probe that was broken off is in force until the biases move again.
    if (sign_ != 0 && (!why.held() || why.has(Reason::kDeadband))) leave_probe();
    return;
  }
  if (why.has(Reason::kGuard) || why.has(Reason::kRollback) || why.has(Reason::kFallback)) {
    leave_probe();
    restart();
  } else if (!why.held() || why.has(Reason::kDeadband)) {
    sign_ = next_sign();
    for (std::size_t i = 0; i < experts_; ++i) offset_[i] = sign_ * pattern_[i];
    decision_ = std::min<std::int64_t>(decision_ + 1, kSigns.size() + 1);
    if (decision_ != 0) return;
    size_ = first_size();
    start_block();
  }
}

Responsiveness ResponseCheck::report() const {
  Responsiveness out{.state = state_, .late = late_, .scaled = scaled_};
  if (found_) {
    out.gain = found_->gain;
    out.error = found_->error;
  }
  return out;
}

std::optional<double> ResponseCheck::reach() const {
  if (!scaled_) return in_probabilities_ ? std::optional<double>(1.0) : std::nullopt;
  const double mean_slope = slope_sum_ / static_cast<double>(experts_);
  if (!(mean_slope > 0)) return std::nullopt;
  // Probabilities lie within [0, 1]; scores that are farther apart than that are none.
  const double range = token_range_ / mean_slope;
  return in_probabilities_ && range < 1 ? std::min(kReach * range, 1.0) : kReach * range;
}

void ResponseCheck::exchange(StateIo& io) {
  const auto sums = [&](Sums& of) {
    io.value("response.zy", of.zy, kSum);
    io.value("response.zx", of.zx, kSum);
    io.value("response.zz", of.zz, {0, kSum.most});
  };
  io.values("response.slope", slope_, kLoad);
  slope_sum_ = sum_of(slope_);
  io.value("response.scaled", scaled_);
  io.values("response.history", history_, kBias);
  std::int64_t newest = static_cast<std::int64_t>(newest_), seen = static_cast<std::int64_t>(seen_);
  io.value("response.newest", newest, {0, static_cast<std::int64_t>(delay_) + 2});
  newest_ = static_cast<std::size_t>(newest);
  io.value("response.steps", filled_);
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
  sums(moves_);
  std::int64_t state = static_cast<std::int64_t>(state_), late = late_;
  io.value("response.state", state, {0, kResponseCount - 1});
  state_ = static_cast<Response>(state);
  io.value("response.quiet", quiet_);
  io.value("response.backoff", backoff_);
  io.values("response.base", base_, kBias);
  io.values("response.pattern", pattern_, kBias);
  constexpr auto kDecisions = static_cast<std::int64_t>(kSigns.size());
  io.value("response.decision", decision_, {-kPause, kDecisions + 1});
  io.value("response.waited", waited_);
  io.value("response.blocks", blocks_);
  io.value("response.size", size_, {0, 1});
  io.values("response.offset", offset_, kBias);
  io.value("response.sign", sign_, {-1, 1});
  io.values("response.signs", signs_, {-1, 1});
  io.values("response.sign_seen", sign_seen_, {-1, 1});
  io.values("response.bias_along", bias_along_, kSum);
  io.values("response.load_along", load_along_, kSum);
  io.value("response.seen", seen, {0, static_cast<std::int64_t>(load_along_.size())});
  seen_ = static_cast<std::size_t>(seen);
  io.value("response.pattern_sq", pattern_sq_, {0, 1e100});
  io.value("response.pattern_noise", pattern_noise_, {0, 1e100});
  for (Sums& probe : probe_) sums(probe);
  io.value("response.late", late, {0, static_cast<std::int64_t>(kLags) - 1});
  late_ = static_cast<int>(late);
  io.value("response.held", held_);
  std::int64_t waits = static_cast<std::int64_t>(waits_);
  io.value("response.waits", waits, {0, 2});
  waits_ = static_cast<Waits>(waits);
  io.value("response.based", based_);
  bool found = found_.has_value();
  Estimate estimate = found_.value_or(Estimate{});
  io.value("response.found", found);
  io.value("response.gain", estimate.gain);
  io.value("response.error", estimate.error, StateIo::kNotNegative);
  found_ = found ? std::optional(estimate) : std::nullopt;
  io.check(held_ == (state_ == Response::kUnresponsive), "response.held", "agree with the state");
  io.check(found || (state_ != Response::kAnswers && !held_), "response.found",
           "be there if the load was judged");
  io.check(state_ != Response::kProbing || decision_ >= 0, "response.decision", "not be negative in a probe");
}

}  // namespace moectl
