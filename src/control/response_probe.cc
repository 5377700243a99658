#include "control/response_probe.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/lanes.h"

namespace moectl {
namespace {

constexpr double kProbeError = 0.08;   // standard error of the gain after one block
constexpr double kLargestProbe = 0.5;  // relative load
// How far the rate may shorten a test move: six clear blocks then leave an error of 0.13, and silence needs 0.14.
constexpr double kMostCut = 4;
constexpr double kSizeStep = 8, kLargestSize = 4;
constexpr double kLeastPattern = 1e-100;  // Σ q², so that what it divides is a number
constexpr double kLeastNoise = 1e-12;     // of a load that does not move at all, squared, in patterns
constexpr std::int64_t kPause = 8;        // decisions between the probes of a held layer
constexpr double kMarkedLoad = 0.06;      // relative load

double steepness(double slope, double mean_slope) {
  return std::max(slope, mean_slope / 4);
}

}  // namespace

Responsiveness responsiveness(Response state, const std::optional<GainEstimate>& found, std::int64_t late,
                              bool scaled) {
  Responsiveness out{.state = state, .late = static_cast<int>(late), .scaled = scaled};
  if (found) {
    out.gain = found->gain;
    out.error = found->error;
  }
  return out;
}

std::optional<GainEstimate> told(GainEstimate found) {
  const auto good = [](double x) { return std::abs(x) <= StateIo::kFinite.most; };
  return good(found.gain) && good(found.error) ? std::optional(found) : std::nullopt;
}

void exchange_found(StateIo& io, const char* found, const char* gain, const char* error,
                    std::optional<GainEstimate>& estimate) {
  bool there = estimate.has_value();
  GainEstimate value = estimate.value_or(GainEstimate{});
  io.value(found, there);
  io.value(gain, value.gain);
  io.value(error, value.error, StateIo::kNotNegative);
  estimate = there ? std::optional(value) : std::nullopt;
}

std::size_t steps_of_block(const Limits& limits, int delay) {
  return (kProbeSigns.size() + 1) * static_cast<std::size_t>(std::max(limits.cadence, limits.cooldown + 1)) +
         static_cast<std::size_t>(delay) + kProbeLags + 1;
}

void GainSums::add(const GainSums& more, double keep) {
  zy = keep * zy + more.zy;
  zx = keep * zx + more.zx;
  zz = keep * zz + more.zz;
}

std::optional<GainEstimate> GainSums::estimate(double noise_sq) const {
  if (!(zx > 0) || !(zz > 0)) return std::nullopt;
  return told({zy / zx, std::sqrt(noise_sq * zz) / zx});
}

void GainSums::exchange(StateIo& io, NumberRange range) {
  io.value("response.zy", zy, range);
  io.value("response.zx", zx, range);
  io.value("response.zz", zz, {0, range.most});
}

void ProbeSeries::add(double sign, double moved, double seen) {
  if (full()) return;
  signs_[size_] = sign;
  moved_[size_] = moved;
  seen_[size_] = seen;
  ++size_;
}

std::optional<ProbeSeries::Fit> ProbeSeries::fit(std::size_t late) const {
  if (size_ < 5) return std::nullopt;
  // A line is taken out of the signs and of what is seen.
  struct Line {
    double mean = 0, slope = 0;
  } signs, values;
  const double n = static_cast<double>(size_), middle = (n - 1) / 2;
  const auto sign = [&](std::size_t t) { return t < late ? 0 : signs_[t - late]; };
  for (std::size_t t = 0; t < size_; ++t) {
    const double from_middle = (static_cast<double>(t) - middle) / (n * (n * n - 1) / 12);
    signs.mean += sign(t) / n;
    signs.slope += sign(t) * from_middle;
    values.mean += seen_[t] / n;
    values.slope += seen_[t] * from_middle;
  }
  Fit fit;
  double yy = 0;
  for (std::size_t t = 0; t < size_; ++t) {
    const double from_middle = static_cast<double>(t) - middle;
    const double z = sign(t) - signs.mean - signs.slope * from_middle;
    const double y = seen_[t] - values.mean - values.slope * from_middle;
    fit.zy += z * y;
    fit.zx += z * moved_[t < late ? 0 : t - late];
    fit.zz += z * z;
    yy += y * y;
  }
  fit.left = fit.zz > 0 ? std::max(0.0, yy - fit.zy * fit.zy / fit.zz) : 0;
  fit.freedom = n - 3;
  return fit;
}

void ProbeSeries::exchange(StateIo& io, const char* signs, const char* moved, const char* seen,
                           const char* size, NumberRange range) {
  io.values(signs, signs_, {-1, 1});
  io.values(moved, moved_, range);
  io.values(seen, seen_, range);
  std::int64_t steps = static_cast<std::int64_t>(size_);
  io.value(size, steps, {0, static_cast<std::int64_t>(seen_.size())});
  size_ = static_cast<std::size_t>(steps);
}

BiasProbe::BiasProbe(const ControllerConfig& config, int layer)
    : experts_(static_cast<std::size_t>(config.model.experts)),
      rate_(config.expert_bias.limits.rate),
      pattern_(experts_, 0.0),
      // Codes of different layers are orthogonal where N is a power of two, so that a layer is not taken for another.
      code_(1 + static_cast<std::size_t>(layer) % (std::max<std::size_t>(std::bit_floor(experts_), 2) - 1)),
      offset_(experts_, 0.0),
      signs_(static_cast<std::size_t>(config.delay()) + 3, 0.0),
      series_(steps_of_block(config.expert_bias.limits, config.delay())) {}

void BiasProbe::begin(double size) {
  blocks_ = 0;
  sums_ = {};
  size_ = size;
}

// Half of the experts up and half down, each by what should change its load by `load` of the mean one.
void BiasProbe::shape(double load, std::span<const double> slope, double mean_slope) {
  decision_ = 0;
  waited_ = 0;
  series_.clear();
  for (std::size_t i = 0; i < experts_; ++i) {
    pattern_[i] = (mean_slope > 0 ? std::min(load / steepness(slope[i], mean_slope), rate_ / 2) : 0) *
                  (std::popcount(i & code_) % 2 == 0 ? 1 : -1);
  }
  const double mean = sum_of(pattern_) / static_cast<double>(experts_);
  for (double& part : pattern_) part -= mean;
}

void BiasProbe::start_marks(std::span<const double> slope, double mean_slope) {
  shape(kMarkedLoad, slope, mean_slope);
}

bool BiasProbe::start_block(std::span<const double> slope, double mean_slope, double noise_sq) {
  const double n = static_cast<double>(experts_);
  const double base = std::sqrt(noise_sq / (kProbeSigns.size() * n)) / kProbeError;
  const double small = std::min(size_, 1.0), large = std::max(size_, 1.0);
  const double load = small * std::min(large * base, kLargestProbe),
               needed = small * std::min(base, kLargestProbe);
  shape(load, slope, mean_slope);
  std::size_t cut = 0;
  for (std::size_t i = 0; i < experts_; ++i)
    cut += mean_slope > 0 && rate_ / 2 < needed / steepness(slope[i], mean_slope) / kMostCut ? 1 : 0;
  return 2 * cut <= experts_;
}

// The load changes expected of the pattern are σ(pattern - mean) =: q. What is seen along q, in patterns: <q, y> / <q, q>,
// and likewise the biases, which hold the probe and what the policy does meanwhile.
void BiasProbe::observe(const Seen& seen, std::size_t at_step) {
  if (series_.full()) return;
  const double mean =
      sum_over(experts_,
               [&](std::size_t i, auto at) -> Double8 {
                 return at.get(&pattern_[i]) * at.get(&seen.weight[i]) * at.get(&seen.slope[i]);
               }) /
      seen.share;
  const double mean_now = seen.bias_share / seen.share;
  Double8 qy = splat(0), qb = splat(0), qq = splat(0), noise = splat(0);
  const auto body = [&](std::size_t i, auto at) {
    const Double8 slope = at.get(&seen.slope[i]), q = at.keep(slope * (at.get(&pattern_[i]) - mean));
    const Double8 load = at.get(&seen.load[i]);
    qy += q * load;
    qb += q * slope * (at.get(&seen.bias[i]) - mean_now);
    qq += q * q;
    noise += q * q * load;
  };
  for_each_eight(experts_, body);
  if (!(sum_of(qq) > kLeastPattern)) return;
  pattern_sq_ = sum_of(qq);
  pattern_noise_ = sum_of(noise);
  series_.add(signs_[at_step], sum_of(qb) / pattern_sq_, sum_of(qy) / pattern_sq_);
}

GainSums BiasProbe::block(std::size_t late, double noise_sq) const {
  const std::optional<ProbeSeries::Fit> fit = series_.fit(late);
  if (!fit || !(pattern_sq_ > kLeastPattern)) return {};
  // What the regression leaves over counts as noise if it exceeds what sampling explains: tokens come in lumps. A block
  // counts by its precision, so that one in which the router itself was changed weighs little.
  const double sampling = noise_sq * pattern_noise_ / (pattern_sq_ * pattern_sq_);
  const double noise = std::max({sampling, fit->left / fit->freedom, kLeastNoise});
  return {fit->zy / noise, fit->zx / noise, fit->zz / noise};
}

std::optional<GainEstimate> BiasProbe::answer(std::size_t late, double noise_sq) const {
  GainSums sums = block(late, noise_sq);
  sums.add(sums_[late], 1);
  return sums.estimate(1);
}

void BiasProbe::end_block(bool clear, double noise_sq) {
  const std::optional<GainEstimate> alone = block(0, noise_sq).estimate(1);
  for (std::size_t late = 0; late < kProbeLags; ++late) {
    if (size_ < 1 || !clear) {
      sums_[late] = {};
    } else {
      sums_[late].add(block(late, noise_sq), 1);
    }
  }
  if (size_ < 1) {
    size_ = std::min(size_ * kSizeStep, 1.0);
  } else if (alone) {
    size_ = std::clamp(size_ * alone->error / kProbeError, size_, kLargestSize);
  }
}

void BiasProbe::pause() {
  decision_ = -kPause;
  blocks_ = 0;
  sums_ = {};
}

double BiasProbe::next_sign() const {
  const bool moves = decision_ >= 0 && decision_ < static_cast<std::int64_t>(kProbeSigns.size());
  return moves ? kProbeSigns[static_cast<std::size_t>(decision_)] : 0;
}

void BiasProbe::add_to(std::span<double> wanted) const {
  const double sign = next_sign();
  for (std::size_t i = 0; i < experts_; ++i) wanted[i] += sign * pattern_[i];
}

bool BiasProbe::advance() {
  sign_ = next_sign();
  for (std::size_t i = 0; i < experts_; ++i) offset_[i] = sign_ * pattern_[i];
  decision_ = std::min<std::int64_t>(decision_ + 1, kProbeSigns.size() + 1);
  return decision_ == 0;
}

void BiasProbe::leave() {
  sign_ = 0;
  std::fill(offset_.begin(), offset_.end(), 0.0);
}

void BiasProbe::exchange(StateIo& io, NumberRange bias, NumberRange sum) {
  io.values("response.pattern", pattern_, bias);
  constexpr auto kDecisions = static_cast<std::int64_t>(kProbeSigns.size());
  io.value("response.decision", decision_, {-kPause, kDecisions + 1});
  io.value("response.waited", waited_);
  io.value("response.blocks", blocks_);
  io.value("response.size", size_, {0, kLargestSize});
  io.values("response.offset", offset_, bias);
  io.value("response.sign", sign_, {-1, 1});
  io.values("response.signs", signs_, {-1, 1});
  series_.exchange(io, "response.sign_seen", "response.bias_along", "response.load_along", "response.seen",
                   {-1e90, 1e90});
  io.value("response.pattern_sq", pattern_sq_, {0, 1e100});
  io.value("response.pattern_noise", pattern_noise_, {0, 1e100});
  for (GainSums& sums : sums_) sums.exchange(io, sum);
}

}  // namespace moectl
