#include "relay_experiment.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

namespace moectl::policies {
namespace {

constexpr double kSwing = 0.7;              // h: the relay halves and doubles the actuator
constexpr std::int64_t kLongestWait = 400;  // decisions
constexpr std::size_t kSamples = 200;       // decisions of the relay, at most
// The first half cycle still carries the approach; two whole cycles are evaluated.
constexpr std::int64_t kCycles = 2;
constexpr double kKpMin = 0.05, kKpMax = 3, kKiMin = 0.005, kKiMax = 0.5;

}  // namespace

RelayExperiment::RelayExperiment(double hysteresis)
    : hysteresis_(hysteresis), u_(kSamples, 0.0), e_(kSamples, 0.0) {}

std::optional<PiGains> RelayExperiment::gains() const {
  if (!done() || !(kp_ > 0)) return std::nullopt;
  return PiGains{kp_, ki_};
}

double RelayExperiment::next(double error, double in_force) {
  if (phase_ == Phase::kWaiting) {
    if (direction_ == 0) direction_ = error > 0 ? 1 : -1;
    if (error * direction_ <= hysteresis_) {
      phase_ = Phase::kRelay;
      decisions_ = 0;
    } else if (++decisions_ >= kLongestWait) {
      phase_ = Phase::kDone;
    }
  }
  return phase_ == Phase::kRelay ? relay(error, in_force) : 0;
}

double RelayExperiment::relay(double error, double in_force) {
  const auto at = static_cast<std::size_t>(decisions_);
  u_[at] = in_force;
  e_[at] = error;
  if (direction_ > 0 ? error < -hysteresis_ : error > hysteresis_) {
    direction_ = -direction_;
    if (direction_ > 0 && ++turns_ == 1) first_ = decisions_;
    if (turns_ == 1 + kCycles) {
      evaluate();
      phase_ = Phase::kDone;
      return 0;
    }
  }
  if (static_cast<std::size_t>(++decisions_) == kSamples) {
    phase_ = Phase::kDone;
    return 0;
  }
  return kSwing * direction_;
}

// First Fourier coefficients over whole cycles, samples first_ … decisions_ - 1.
void RelayExperiment::evaluate() {
  const double period = static_cast<double>(decisions_ - first_) / static_cast<double>(kCycles);
  const double omega = 2 * std::numbers::pi / period;
  std::array<double, 2> u{}, e{};
  for (std::int64_t t = first_; t < decisions_; ++t) {
    const double angle = omega * static_cast<double>(t - first_);
    const std::array<double, 2> wave = {std::cos(angle), std::sin(angle)};
    for (std::size_t i = 0; i < 2; ++i) {
      u[i] += u_[static_cast<std::size_t>(t)] * wave[i];
      e[i] += e_[static_cast<std::size_t>(t)] * wave[i];
    }
  }
  const double answer = std::hypot(e[0], e[1]);
  if (!(answer > 0)) return;
  kp_ = std::clamp(std::hypot(u[0], u[1]) / answer / 3.2, kKpMin, kKpMax);
  ki_ = std::clamp(kp_ / period, kKiMin, kKiMax);
}

void RelayExperiment::save(StateWriter& out) const {
  const std::array<std::int64_t, 4> steps = {static_cast<std::int64_t>(phase_), decisions_, turns_, first_};
  const std::array<double, 3> values = {direction_, kp_, ki_};
  out.put("relay_steps", steps);
  out.put("relay_values", values);
  out.put("relay_u", u_);
  out.put("relay_e", e_);
}

void RelayExperiment::load(StateReader& in) {
  std::array<std::int64_t, 4> steps{};
  std::array<double, 3> values{};
  in.get("relay_steps", steps);
  in.get("relay_values", values);
  in.get("relay_u", u_);
  in.get("relay_e", e_);
  const std::int64_t most = steps[0] == 0 ? kLongestWait : static_cast<std::int64_t>(kSamples);
  if (steps[0] < 0 || steps[0] > 2 || steps[1] < 0 || steps[1] > most || steps[3] < 0 ||
      (steps[0] == 1 && (steps[1] == most || steps[3] > steps[1]))) {
    throw StateError("relay_steps: not a state of the experiment");
  }
  phase_ = static_cast<Phase>(steps[0]);
  decisions_ = steps[1];
  turns_ = steps[2];
  first_ = steps[3];
  direction_ = values[0];
  kp_ = values[1];
  ki_ = values[2];
}

}  // namespace moectl::policies
