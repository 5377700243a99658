// soak [STEPS]: so many steps of one process (default ten million), with random faults, freezes, reloads and changes of the
// policy. 3 layers × 16 experts, adaptive_bias with the guard, pi, lag 1. What must hold: memory is flat, a state has one
// length, the limits hold at every step, the balance at the end is that of the beginning, and each fault is recovered
// from. Prints a table of the run and one of the faults, with the steps from the end of each to balance; exits with 1 where
// something does not hold.
//
// The router is as small as one can be: expert i gets a share ∝ exp(preference_i + 4 bias_i), of 4096 choices a step, with
// noise; preferences walk, so that there is always something to balance.
#include <malloc.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"

namespace {

using moectl::Controller;
using moectl::ControllerConfig;
using moectl::Reason;

constexpr int kLayers = 3, kExperts = 16;
constexpr std::int64_t kTokens = 2048;

ControllerConfig config_of(const std::string& policy) {
  return moectl::parse_config(
      "version: 1\nlag: 1\nmodel: {layers: 3, experts: 16, top_k: 2, tokens_per_step: 2048}\n"
      "expert_bias: {policy: " +
      policy +
      ", limits: {min: -4, max: 4, rate: 0.1}}\n"
      "aux_loss_weight: {policy: pi, scope: model, initial: 0.001, options: {metric: max_vio, "
      "target: 0.3}}\nguard: {enabled: true}\nsafety: {rollback: {}}\n");
}

class Router {
 public:
  explicit Router(std::uint64_t seed) : random_(seed), noise_(0, 1) {
    for (double& p : preferences_) p = noise_(random_);
  }
  /// The counts of a step under these biases.
  std::array<std::int64_t, kExperts> route(std::span<const double> bias) {
    std::array<double, kExperts> share;
    double sum = 0;
    for (std::size_t i = 0; i < kExperts; ++i) {
      preferences_[i] = 0.99999 * preferences_[i] + 0.004 * noise_(random_);
      share[i] = std::exp(preferences_[i] + 4 * bias[i]);
      sum += share[i];
    }
    std::array<std::int64_t, kExperts> counts{};
    std::int64_t left = 2 * kTokens;
    for (std::size_t i = 0; i < kExperts; ++i) {
      const double mean = 2 * kTokens * share[i] / sum;
      counts[i] = std::clamp<std::int64_t>(std::llround(mean + std::sqrt(mean) * noise_(random_)), 0,
                                           std::min(left, kTokens));
      left -= counts[i];
    }
    return counts;
  }

 private:
  std::mt19937_64 random_;
  std::normal_distribution<double> noise_;
  std::array<double, kExperts> preferences_{};
};

long resident_kilobytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmRSS:")) return std::atol(line.c_str() + 6);
  }
  return 0;
}

enum Fault {
  kNoTokens,
  kInvalidRecord,
  kNoLoss,
  kLossJump,
  kSkipped,
  kFailedReduction,
  kFrozen,
  kHeld,
  kReload,
  kBrokenState,
  kPolicyChange,
  kAdopt,
  kFaults
};
struct Kind {
  const char* name;
  std::int64_t lasts;  // steps
};
constexpr Kind kKinds[] = {{"no tokens for 20 steps", 20},
                           {"invalid records for 20 steps", 20},
                           {"NaN and infinite losses", 20},
                           {"the loss jumps by 3", 1},
                           {"skipped steps", 20},
                           {"a reduction that fails", 1},
                           {"a frozen layer, 50 steps", 50},
                           {"held by the host, 50 steps", 50},
                           {"saved, made anew, loaded", 0},
                           {"a state with a flipped bit", 0},
                           {"another policy, 50 steps", 50},
                           {"biases adopted at random", 0}};
// The worst layer's MaxVio, smoothed over ten steps, counts as balanced below this.
constexpr double kBalanced = 0.45;

struct Recovery {
  std::int64_t count = 0, steps = 0, longest = 0;
  double highest = 0;  // smoothed MaxVio
};

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t steps = argc > 1 ? std::atoll(argv[1]) : 10'000'000;
  if (steps < 100'000) {
    std::fprintf(stderr, "soak: STEPS must be at least 100000\n");
    return 2;
  }
  const ControllerConfig config = config_of("adaptive_bias"), other = config_of("sign_bias");
  std::optional<Controller> controller;
  bool reduction_fails = false, other_policy = false;
  const auto make = [&](const ControllerConfig& of) {
    controller.emplace(of);
    controller->set_reduction([&](std::span<std::int64_t>) {
      if (reduction_fails) throw std::runtime_error("a rank is gone");
    });
  };
  make(config);
  std::vector<Router> routers;
  for (std::uint64_t l = 0; l < kLayers; ++l) routers.emplace_back(l + 1);
  std::mt19937_64 random(42);
  std::array<Recovery, kFaults> recoveries{};
  std::int64_t fault = -1, fault_at = 0, last_above = -1, next_fault = 2000, violations = 0;
  std::size_t state_size = 0, other_size = 0;
  int bad = 0;
  const auto broken = [&](const char* what, std::int64_t step) {
    if (++bad <= 10) std::printf("BROKEN at step %lld: %s\n", static_cast<long long>(step), what);
  };
  std::printf("%12s %12s %12s %10s %12s %14s %10s\n", "step", "seconds", "resident KB", "heap KB",
              "state bytes", "max_vio, mean", "largest");
  const auto start = std::chrono::steady_clock::now();
  double vio_sum = 0, vio_largest = 0, first_vio = 0, last_vio = 0;
  std::int64_t vio_count = 0;
  std::size_t first_heap = 0, last_heap = 0;
  long first_resident = 0, last_resident = 0;
  const std::int64_t part = steps / 10;
  double smooth = 0;
  for (std::int64_t step = 0; step < steps; ++step) {
    if (fault < 0 && step >= next_fault) {
      fault = static_cast<std::int64_t>(random() % kFaults);
      fault_at = step;
      last_above = -1;
    }
    const std::int64_t since = fault >= 0 ? step - fault_at : -1;
    const auto active = [&](Fault which, std::int64_t length) { return fault == which && since < length; };
    if (since == 0) {
      if (fault == kFrozen) controller->freeze(0, true);
      if (fault == kHeld) controller->hold(true);
      if (fault == kReload || fault == kPolicyChange) {
        const std::string state = controller->save();
        make(fault == kReload ? config : other);
        controller->load(state, fault == kReload ? moectl::Keep::everything : moectl::Keep::what_fits);
        other_policy = fault == kPolicyChange;
        std::size_t& size = other_policy ? other_size : state_size;
        const std::size_t now = controller->save().size();
        if (size == 0) size = now;
        if (size != now) broken("the state has another length", step);
      }
      if (fault == kBrokenState) {
        std::string state = controller->save();
        char& byte = state[random() % state.size()];
        byte = static_cast<char>(byte ^ (1 << random() % 8));
        try {
          controller->load(state);
          broken("an altered state was loaded", step);
        } catch (const moectl::StateError&) {
        }
      }
      if (fault == kAdopt) {
        for (int l = 0; l < kLayers; ++l) {
          std::vector<double> values(kExperts);
          for (double& value : values) value = static_cast<double>(random() % 4000) / 1000 - 2;
          controller->adopt(l, values);
        }
      }
    }
    if (since == 50) {
      if (fault == kFrozen) controller->freeze(0, false);
      if (fault == kHeld) controller->hold(false);
      if (fault == kPolicyChange) {
        const std::string state = controller->save();
        make(config);
        controller->load(state, moectl::Keep::what_fits);
        other_policy = false;
      }
    }
    std::array<std::array<double, kExperts>, kLayers> before;
    double worst = 0;
    for (int l = 0; l < kLayers; ++l) {
      const auto bias = controller->bias(l);
      std::ranges::copy(bias, before[static_cast<std::size_t>(l)].begin());
      const auto counts = routers[static_cast<std::size_t>(l)].route(bias);
      std::int64_t most = 0, sum = 0;
      for (const std::int64_t count : counts) {
        most = std::max(most, count);
        sum += count;
      }
      worst = std::max(worst, static_cast<double>(most) * kExperts / static_cast<double>(sum) - 1);
      if (active(kNoTokens, 20)) continue;
      if (active(kInvalidRecord, 20)) {
        controller->record(l, {.experts = std::vector<std::int64_t>{0, 99}});
        continue;
      }
      controller->record_with(l, [&](moectl::RoutingStats& sums) { sums.add_counts(counts, kTokens); });
    }
    moectl::StepInfo info{.loss = 2.5 + 0.01 * static_cast<double>(random() % 10)};
    if (active(kNoLoss, 20)) info.loss = since % 2 ? std::nan("") : HUGE_VAL;
    if (active(kLossJump, 1)) *info.loss += 3;
    info.skipped = active(kSkipped, 20);
    if (active(kFailedReduction, 1)) {
      reduction_fails = true;
      try {
        controller->step(info);
        broken("a failed reduction was no error", step);
      } catch (const moectl::ReductionError&) {
      }
      reduction_fails = false;
    }
    const moectl::StepReport& report = controller->step(info);
    for (int l = 0; l < kLayers; ++l) {
      const auto bias = controller->bias(l);
      const auto& why = report.layers[static_cast<std::size_t>(l)].actuators[0].reasons;
      const bool jumps =
          why.has(Reason::kRollback) || why.has(Reason::kFallback) || (fault == kAdopt && since < 3);
      double sum = 0;
      bool holds = true;
      for (std::size_t i = 0; i < kExperts; ++i) {
        holds &= std::isfinite(bias[i]) && bias[i] >= -4 && bias[i] <= 4;
        holds &= jumps || std::abs(bias[i] - before[static_cast<std::size_t>(l)][i]) <= 0.1 * (1 + 1e-9);
        sum += bias[i];
      }
      holds &= jumps || std::abs(sum) < 1e-9;
      const double weight = controller->aux_loss_weight(l), temperature = controller->temperature(l);
      holds &= weight >= 1e-4 && weight <= 0.1 && temperature >= 0.1 && temperature <= 10;
      if (!holds) {
        ++violations;
        broken("a value in force is not within its limits", step);
      }
    }
    smooth += 0.1 * (worst - smooth);
    if (fault >= 0) {
      double& highest = recoveries[static_cast<std::size_t>(fault)].highest;
      highest = std::max(highest, smooth);
      if (smooth >= kBalanced) last_above = since;
    }
    if (fault < 0 && step >= 2000) {
      vio_sum += worst;
      vio_largest = std::max(vio_largest, worst);
      ++vio_count;
    } else if (since >= 60 && smooth < kBalanced) {
      Recovery& recovery = recoveries[static_cast<std::size_t>(fault)];
      const std::int64_t took = std::max<std::int64_t>(last_above + 1 - kKinds[fault].lasts, 0);
      ++recovery.count;
      recovery.steps += took;
      recovery.longest = std::max(recovery.longest, took);
      fault = -1;
      next_fault = step + 100 + static_cast<std::int64_t>(random() % 400);
    } else if (since > 5000) {
      broken("not balanced 5000 steps after a fault", step);
      fault = -1;
      next_fault = step + 1000;
    }
    if ((step + 1) % part != 0) continue;
    const double mean = vio_sum / static_cast<double>(std::max<std::int64_t>(vio_count, 1));
    last_heap = mallinfo2().uordblks;
    last_resident = resident_kilobytes();
    if (step + 1 == part) {
      first_heap = last_heap;
      first_resident = last_resident;
      first_vio = mean;
    }
    last_vio = mean;
    std::printf("%12lld %12.1f %12ld %10zu %12zu %14.4f %10.3f\n", static_cast<long long>(step + 1),
                std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(),
                last_resident, last_heap / 1024, controller->save().size(), mean, vio_largest);
    std::fflush(stdout);
    vio_sum = vio_largest = 0;
    vio_count = 0;
  }
  std::printf("\n%-32s %10s %16s %10s %18s\n", "fault", "times", "steps after, mean", "longest",
              "highest, smoothed");
  for (std::size_t f = 0; f < kFaults; ++f) {
    const Recovery& r = recoveries[f];
    std::printf("%-32s %10lld %16.1f %10lld %18.3f\n", kKinds[f].name, static_cast<long long>(r.count),
                static_cast<double>(r.steps) / static_cast<double>(std::max<std::int64_t>(r.count, 1)),
                static_cast<long long>(r.longest), r.highest);
  }
  if (last_heap > first_heap + 256 * 1024) broken("the heap grew", steps);
  if (last_resident > first_resident + 4096) broken("resident memory grew", steps);
  if (std::abs(last_vio - first_vio) > 0.2 * first_vio) broken("the balance drifted", steps);
  std::printf("\nlimits violated: %lld; broken: %d\n", static_cast<long long>(violations), bad);
  return bad == 0 ? 0 : 1;
}
