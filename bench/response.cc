// response_table: how often healthy loops are held, and how soon a wrong wiring is noticed, on simulated routers.
//
//   response_table [--first-seed S] [--runs R] [--steps N] [--after A]
//
// Healthy: R runs of N steps over three gates, four sizes and two policies, with and without a shift; none should be
// held. Mistakes: the router ignores the bias, subtracts it, or replays the routes of one step, for 150 steps; then
// it is mended. They begin at once or, with --after, in a loop that has run well for A to A + 63 steps. The table says when
// the controller held the biases, how long after what is missing surely could be seen, and when the load was balanced after that.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/health.h"
#include "moectl/simulation.h"

namespace moectl {
namespace {

enum class Mistake { kNone, kForgotten, kFlipped, kReplayed };
constexpr const char* kMistakes[] = {"none", "forgotten", "flipped", "replayed"};
constexpr int kMended = 150;

struct Router {
  SimulatedGate gate;
  ScoreSpace space;
  int experts, top_k;
  std::int64_t tokens;
};

std::vector<Router> routers() {
  std::vector<Router> out;
  for (const auto& [experts, top_k, tokens] :
       {std::tuple{8, 1, 1024}, {16, 2, 2048}, {64, 6, 4096}, {256, 8, 8192}}) {
    out.push_back({SimulatedGate::kSoftmax, ScoreSpace::kProbability, experts, top_k, tokens});
    out.push_back({SimulatedGate::kSigmoid, ScoreSpace::kProbability, experts, top_k, tokens});
    out.push_back({SimulatedGate::kSigmoid, ScoreSpace::kLogit, experts, top_k, tokens});
  }
  return out;
}

struct Outcome {
  int held = 0, probing = 0;  // steps
  int noticed = -1, balanced = -1;
  double floors = 0;  // MaxVio over its floor, mean over the steps
  int told = -1;      // the first step at which what is missing exceeds three standard deviations
};

// The sum of the innovations since the mistake began: the change of the load that the biases should have made less the one that
// was seen, along the way of the biases, in standard deviations. It is formed here, apart from the check that is judged: with the
// slopes of when it began, one load as reference, and the noise of sampling alone.
class InnovationSum {
 public:
  void begin(const RoutingStats& stats, std::span<const double> bias) {
    bias_.assign(bias.begin(), bias.end());
    slope_.resize(bias.size());
    load_ = loads_of(stats);
    known_ = stats.load_slope(slope_);
  }

  double in_deviations(const RoutingStats& stats, std::span<const double> bias) {
    if (!known_) known_ = stats.load_slope(slope_);  // at a first step no width is known yet
    double all = 0, mean = 0;
    for (std::size_t i = 0; i < bias_.size(); ++i) {
      all += slope_[i];
      mean += slope_[i] * (bias[i] - bias_[i]);
    }
    if (!known_ || !(all > 0)) return 0;
    mean /= all;
    const std::vector<double> load = loads_of(stats);
    const double noise = static_cast<double>(load.size()) / static_cast<double>(stats.assignments());
    double missing = 0, variance = 0;
    for (std::size_t i = 0; i < bias_.size(); ++i) {
      const double expected = slope_[i] * (bias[i] - bias_[i] - mean);
      missing += expected * (expected - (load[i] - load_[i]));
      variance += expected * expected * noise * (load[i] + load_[i]);
    }
    return variance > 0 ? missing / std::sqrt(variance) : 0;
  }

 private:
  static std::vector<double> loads_of(const RoutingStats& stats) {
    std::vector<double> loads;
    const double scale =
        static_cast<double>(stats.counts().size()) / static_cast<double>(stats.assignments());
    for (const std::int64_t count : stats.counts()) loads.push_back(static_cast<double>(count) * scale);
    return loads;
  }

  std::vector<double> bias_, slope_, load_;
  bool known_ = false;
};

// The mistake begins at step `begin`; what is noticed is counted from there.
Outcome run(const Router& router, const std::string& policy, Mistake mistake, bool shift, std::uint64_t seed,
            int begin, int steps, bool check = true) {
  ControllerConfig config;
  config.model = {.layers = 1,
                  .experts = router.experts,
                  .top_k = router.top_k,
                  .tokens_per_step = router.tokens,
                  .score_space = router.space};
  config.expert_bias.policy = policy;
  config.safety.responsiveness = check;
  Controller controller(config);
  SimulatedRouter simulated({.experts = router.experts,
                             .top_k = router.top_k,
                             .tokens = router.tokens,
                             .gate = router.gate,
                             .score_space = router.space,
                             .seed = seed,
                             .scenario = shift ? Scenario::kShift : Scenario::kSteady,
                             .event_step = steps / 2});
  RoutingStats seen({.experts = router.experts, .top_k = router.top_k, .needs = {.gap = true}});
  InnovationSum missing;
  std::vector<double> bias;
  std::vector<std::int64_t> choices;
  std::vector<float> top_values;
  Outcome out;
  for (int step = 0; step < steps; ++step) {
    const int since = step - begin;
    const bool wrong = mistake != Mistake::kNone && since >= 0 && since < kMended;
    bias.assign(controller.bias(0).begin(), controller.bias(0).end());
    const double factor = !wrong                           ? 1
                          : mistake == Mistake::kForgotten ? 0
                          : mistake == Mistake::kFlipped   ? -1
                                                           : 1;
    for (double& b : bias) b *= factor;
    RoutingBatch batch = simulated.route(bias);
    if (wrong && mistake == Mistake::kReplayed) {
      if (since == 0) {
        choices.assign(batch.experts.begin(), batch.experts.end());
        top_values.assign(batch.top_values.begin(), batch.top_values.end());
      }
      batch = {.experts = choices, .top_values = top_values};
    }
    seen.clear();
    seen.add(batch);
    seen.set_gap_width(seen.next_gap_width().value_or(0));
    if (wrong && since == 0) missing.begin(seen, controller.bias(0));
    if (wrong && out.told < 0 && missing.in_deviations(seen, controller.bias(0)) > 3) out.told = since;
    controller.record(0, batch);
    const LayerReport& layer = controller.step().layers[0];
    const bool held = layer.responsiveness.state == Response::kUnresponsive;
    out.held += held ? 1 : 0;
    out.probing += layer.responsiveness.state == Response::kProbing ? 1 : 0;
    if (held && since >= 0 && out.noticed < 0) out.noticed = since;
    const double floors = *layer.metrics->max_vio / *floor_of(*layer.metrics).max_vio;
    out.floors += floors / steps;
    if (since >= kMended && out.balanced < 0 && floors < kBalancedFloors) out.balanced = since - kMended;
  }
  return out;
}

// Each with the check and without it, on the same data: what test moves cost in balance.
void healthy(std::uint64_t seed, int runs, int steps) {
  const std::vector<Router> all = routers();
  struct Sums {
    int runs = 0, held = 0, probing = 0;
    double with = 0, without = 0;
  } sums[2];
  for (int i = 0; i < runs; ++i) {
    const Router& router = all[static_cast<std::size_t>(i) % all.size()];
    const bool second = static_cast<std::size_t>(i) / all.size() % 2 == 1;
    const bool shift = static_cast<std::size_t>(i) / all.size() / 2 % 2 == 1;
    const auto once = [&](bool check) {
      return run(router, second ? "sign_bias" : "adaptive_bias", Mistake::kNone, shift,
                 seed + static_cast<std::uint64_t>(i), 0, steps, check);
    };
    const Outcome out = once(true);
    Sums& of = sums[second ? 1 : 0];
    ++of.runs;
    of.held += out.held > 0 ? 1 : 0;
    of.probing += out.probing;
    of.with += out.floors;
    of.without += once(false).floors;
  }
  std::printf(
      "| healthy | runs of %d steps | held | steps with a probe | MaxVio over its floor, mean of all steps | "
      "without the check "
      "|\n|---|---|---|---|---|---|\n",
      steps);
  for (const Sums& of : sums) {
    if (of.runs == 0) continue;
    std::printf("| `%s` | %d | %d | %.2f %% | %.3f | %.3f |\n", &of == sums ? "adaptive_bias" : "sign_bias",
                of.runs, of.held, 100.0 * of.probing / (static_cast<double>(of.runs) * steps),
                of.with / of.runs, of.without / of.runs);
  }
  std::printf("\n");
}

void mistakes(std::uint64_t seed, int after) {
  std::printf(
      "| policy | mistake | runs | noticed (median step) | latest | never | after three deviations (median) "
      "| latest | "
      "balanced after mending (median) | latest | never |\n|---|---|---|---|---|---|---|---|---|---|---|\n");
  for (const std::string policy : {"adaptive_bias", "proportional_bias", "sign_bias"}) {
    for (const Mistake mistake : {Mistake::kForgotten, Mistake::kFlipped, Mistake::kReplayed}) {
      std::vector<int> noticed, surely, balanced;
      int runs = 0;
      for (const Router& router : routers()) {
        ++seed;
        const int begin = after > 0 ? after + static_cast<int>(37 * seed % 64) : 0;  // wherever a rest ends
        const Outcome out = run(router, policy, mistake, false, seed, begin, begin + kMended + 150);
        ++runs;
        if (out.noticed >= 0) noticed.push_back(out.noticed);
        if (out.noticed >= 0 && out.told >= 0) surely.push_back(out.noticed - out.told);
        if (out.balanced >= 0) balanced.push_back(out.balanced);
      }
      std::sort(noticed.begin(), noticed.end());
      std::sort(surely.begin(), surely.end());
      std::sort(balanced.begin(), balanced.end());
      const auto row = [&](const std::vector<int>& steps) {
        if (steps.empty()) {
          std::printf(" - | - | %d |", runs);
        } else {
          std::printf(" %d | %d | %d |", steps[steps.size() / 2], steps.back(),
                      runs - static_cast<int>(steps.size()));
        }
      };
      std::printf("| `%s` | %s | %d |", policy.c_str(), kMistakes[static_cast<int>(mistake)], runs);
      row(noticed);
      if (surely.empty()) {
        std::printf(" - | - |");
      } else {
        std::printf(" %d | %d |", surely[surely.size() / 2], surely.back());
      }
      row(balanced);
      std::printf("\n");
    }
  }
}

}  // namespace
}  // namespace moectl

int main(int argc, char** argv) {
  std::uint64_t seed = 1;
  int runs = 200, steps = 300, after = 0;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const long value = std::strtol(argv[i + 1], nullptr, 10);
    if (name == "--first-seed") {
      seed = static_cast<std::uint64_t>(value);
    } else if (name == "--runs") {
      runs = static_cast<int>(value);
    } else if (name == "--steps") {
      steps = static_cast<int>(value);
    } else if (name == "--after") {
      after = static_cast<int>(value);
    } else {
      std::fprintf(stderr, "usage: response_table [--first-seed S] [--runs R] [--steps N] [--after A]\n");
      return 2;
    }
  }
  moectl::healthy(seed, runs, steps);
  moectl::mistakes(seed + 100000, after);
  return 0;
}
