#include "policies/step_experiment.h"

#include <algorithm>
#include <cmath>
#include <span>

namespace moectl::policies {
namespace {

constexpr double kHeight = 1;               // h: a factor of e
constexpr double kNear = 0.2;               // averaged error at which a step may be made
constexpr double kStill = 0.04;             // and how near its slower average must be by then
constexpr double kFar = 0.5;                // averaged error that ends the first half at once, as does
constexpr double kClear = 0.08;             // answer that ends the first half, or
constexpr double kClearOfNoise = 5;         // so many standard deviations of the averaged error
constexpr std::int64_t kShortestHalf = 6;   // decisions, on the first try; n times that on the nth
constexpr std::int64_t kFewest = 12;        // decisions to fit to
constexpr std::int64_t kLongestWait = 400;  // decisions
constexpr std::int64_t kPause = 10;  // decisions for the law before each try: also the noise needs some
constexpr std::int64_t kMostTries = 4;
constexpr double kSignificant = 4;  // standard errors
constexpr double kAsGood = 4;       // squares that scatter makes of no difference, in residual variances
constexpr double kNoisyMove = 0.1;  // of u, by one standard deviation of the averaged error
constexpr double kKpMin = 0.05, kKpMax = 8, kKiMin = 0.002, kKiMax = 0.5;

// Standard deviation of the mean of windows with the newest at weight `ema`, in those of one window.
double share_of_noise(double ema) {
  return std::sqrt(ema / (2 - ema));
}

// Takes the straight line out that fits best.
void detrend(std::span<double> v) {
  const auto n = static_cast<double>(v.size());
  double sum = 0, moment = 0;
  for (std::size_t t = 0; t < v.size(); ++t) {
    sum += v[t];
    moment += v[t] * (static_cast<double>(t) - (n - 1) / 2);
  }
  const double mean = sum / n, slope = moment / (n * (n * n - 1) / 12);
  for (std::size_t t = 0; t < v.size(); ++t) v[t] -= mean + slope * (static_cast<double>(t) - (n - 1) / 2);
}

// Of the whole experiment, in decisions.
std::int64_t length(std::int64_t half) {
  return std::max<std::int64_t>(2 * half, kFewest);
}

double product(std::span<const double> a, std::span<const double> b) {
  double sum = 0;
  for (std::size_t t = 0; t < a.size(); ++t) sum += a[t] * b[t];
  return sum;
}

}  // namespace

std::optional<PiGains> StepExperiment::gains() const {
  if (!done() || !(kp_ > 0)) return std::nullopt;
  return PiGains{kp_, ki_};
}

bool StepExperiment::begins(const ErrorSeen& seen) {
  if (++decisions_ > kLongestWait) phase_ = Phase::kDone;
  return !done() && decisions_ > kPause && std::abs(seen.averaged) <= kNear &&
         std::abs(seen.averaged - seen.slow) <= kStill;
}

std::optional<double> StepExperiment::next(const ErrorSeen& seen, double in_force) {
  if (phase_ == Phase::kDone) return std::nullopt;
  if (phase_ == Phase::kWaiting) {
    if (!begins(seen)) return std::nullopt;
    phase_ = Phase::kStep;
    decisions_ = half_ = 0;
    centre_ = in_force;
    from_ = seen.averaged;
    direction_ = from_ > 0 ? 1 : -1;
  }
  const auto at = static_cast<std::size_t>(decisions_++);
  u_[at] = in_force - centre_;
  e_[at] = seen.single;
  // Far on the wrong side, or still far long after the way back: something else has happened to the router.
  const bool far = std::abs(seen.averaged) >= kFar;
  if (far && (seen.averaged * direction_ > 0 || (half_ > 0 && decisions_ >= kFewest))) {
    ++tries_;
    phase_ = tries_ == kMostTries ? Phase::kDone : Phase::kWaiting;
    decisions_ = 0;
    return centre_;
  }
  if (half_ == 0) {
    const std::int64_t least =
        std::min(kShortestHalf * (tries_ + 1), static_cast<std::int64_t>(kLongestHalf));
    const double answer = (from_ - seen.averaged) * direction_;
    const double clear = std::max(kClear, kClearOfNoise * seen.noise * share_of_noise(ema_));
    if ((decisions_ >= least && answer >= clear) || far ||
        decisions_ == static_cast<std::int64_t>(kLongestHalf)) {
      half_ = decisions_;
    }
  } else if (decisions_ == length(half_)) {
    ++tries_;
    evaluate(seen.noise);
    phase_ = kp_ > 0 || tries_ == kMostTries ? Phase::kDone : Phase::kWaiting;
    decisions_ = 0;
    return centre_;
  }
  return half_ == 0 ? centre_ + kHeight * direction_ : centre_;
}

void StepExperiment::evaluate(double noise) {
  const auto n = static_cast<std::size_t>(decisions_);
  const std::span<double> e(e_.data(), n);
  detrend(e);
  const double whole = product(e, e);
  std::array<double, 2 * kLongestHalf> filtered{};
  const std::span<double> x(filtered.data(), n);
  double best = whole, gain = 0, lag = 0;
  double best_of_lag = whole;
  int delay = 0;
  // Once to see how well it can be done, once for the longest lag that does nearly so.
  for (const bool choose : {false, true}) {
    const double enough = best * (1 + kAsGood / (static_cast<double>(n) - 5));
    for (int octave = 0; octave <= 7; ++octave) {
      const double tau = 1 << octave;
      const double follow = -std::expm1(-1 / tau);
      for (int d = 0; d <= 4; ++d) {
        double now = 0;
        for (std::size_t t = 0; t < n; ++t) {
          const double u = t >= static_cast<std::size_t>(d) ? u_[t - static_cast<std::size_t>(d)] : 0;
          x[t] = now += follow * (u - now);
        }
        detrend(x);
        const double size = product(x, x), k = size > 0 ? -product(e, x) / size : 0;
        const double left = std::max(0.0, whole - k * k * size);
        const double error = std::sqrt(left / (static_cast<double>(n) - 5));
        if (!(k > 0) || k * std::sqrt(size) < kSignificant * error) continue;
        if (!choose) {
          best = std::min(best, left);
        } else if (left <= enough && (tau > lag || left < best_of_lag)) {
          gain = k;
          lag = tau;
          delay = d;
          best_of_lag = left;
        }
      }
    }
  }
  if (!(gain > 0)) return;
  // Of two lags the smaller counts half as lag and half as delay.
  const double own = (1 - ema_) / ema_, smaller = std::min(own, lag) / 2;
  const double slow = std::max(own, lag) + smaller, theta = delay + 1 + smaller;
  const double quiet = kNoisyMove / std::max(noise * share_of_noise(ema_), 1e-9);
  kp_ = std::clamp(std::min(slow / (3 * gain * theta), quiet), kKpMin, kKpMax);
  ki_ = std::clamp(kp_ / std::min(slow, 4 * theta), kKiMin, kKiMax);
}

void StepExperiment::exchange(StateIo& io) {
  constexpr auto kLongest = static_cast<std::int64_t>(kLongestHalf);
  io.choice("experiment.phase", phase_, Phase::kDone);
  io.value("experiment.decisions", decisions_);
  io.value("experiment.half", half_, {0, kLongest});
  io.value("experiment.tries", tries_, {0, kMostTries});
  io.check(phase_ != Phase::kStep || decisions_ < (half_ > 0 ? length(half_) : kLongest),
           "experiment.decisions", "be within the experiment");
  io.value("experiment.centre", centre_);
  io.value("experiment.direction", direction_);
  io.value("experiment.from", from_);
  io.value("experiment.kp", kp_, {0, kKpMax});
  io.value("experiment.ki", ki_, {0, kKiMax});
  io.values("experiment.u", u_);
  io.values("experiment.e", e_);
}

}  // namespace moectl::policies
