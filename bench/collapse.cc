// collapse_table [--runs N] [--first-seed S] [--steps K]: the guard on seeded collapses of four kinds and on healthy
// runs, against the same runs without it. Prints Markdown.
//
// The plant is simulation.h's, 16 experts, top-2, 512 tokens a step, gates and score spaces in turn by seed; the event
// comes at step 200 of 600, or of K (a cold start at step 0). A run has recovered if MaxVio stays at 1 or below on
// average over its last 50 steps. Healthy runs are steady, shift, noise and drift under policies that balance: any
// intervention in them is a false one. The guard was developed on seeds 1–600; other seeds show what it does on runs
// that it has never met. A guarded run that has recovered needed no guard, or ends handed back (the guard watches, and
// may yet have to come back), holding (or in another trial to let go after a hold), or at work; decisions are changes
// of the guard's state, and would show one that goes in circles. `fixed` leaves all three actuators alone, with an
// auxiliary weight of 1e-3, so that the guard is the only one to act; `sign 1e-3` is the policy in common use;
// `adaptive` needs no guard here, and must not be harmed.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "closed_loop.h"
#include "moectl/controller.h"

namespace moectl::bench {
namespace {

constexpr std::int64_t kEvent = 200, kWindow = 50;
constexpr std::array<CollapseKind, 4> kKinds = {CollapseKind::kColdStart, CollapseKind::kRunaway,
                                                CollapseKind::kDeadThird, CollapseKind::kPoisonedBias};
constexpr std::array<Scenario, 4> kHealthy = {Scenario::kSteady, Scenario::kShift, Scenario::kNoise,
                                              Scenario::kDrift};

struct Outcome {
  bool recovered = false;
  GuardState end = GuardState::kWatching;
  bool held = false;  // the guard had to come back, or to stop on its way
  int interventions = 0;
  int decisions = 0;
};

// `seed` counts from 0.
SimulationOptions plant_of(std::size_t seed) {
  SimulationOptions plant;
  plant.tokens = 512;
  plant.seed = seed + 1;
  plant.event_step = kEvent;
  plant.gate = seed % 3 == 0 ? SimulatedGate::kSoftmax : SimulatedGate::kSigmoid;
  plant.score_space = seed % 3 == 2 ? ScoreSpace::kLogit : ScoreSpace::kProbability;
  return plant;
}

Outcome run_guarded(const Law& law, const SimulationOptions& plant, std::int64_t steps, bool guard) {
  ControllerConfig config = config_for(law, plant);
  config.aux_loss_weight.initial = law.policy == "fixed" ? 1e-3 : 0;
  config.guard.enabled = guard;
  Controller controller(config);
  Outcome out;
  double vio = 0;
  simulate(controller, plant, steps, [&](const StepReport& report) {
    const LayerReport& layer = report.layers.front();
    out.decisions += layer.guard.state != out.end;
    out.interventions += layer.guard.state == GuardState::kIntervening && out.end != GuardState::kIntervening;
    out.end = layer.guard.state;
    out.held = out.held || out.end == GuardState::kHolding;
    if (report.step >= steps - kWindow) vio += layer.metrics->max_vio.value_or(0) / kWindow;
  });
  out.recovered = vio <= 1;
  return out;
}

int main_of(int argc, char** argv) {
  std::size_t runs = 200, first = 0;
  std::int64_t steps = 600;
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    const int value = i + 1 < argc ? std::atoi(argv[i + 1]) : 0;
    if (option == "--runs" && value >= 4) {
      runs = static_cast<std::size_t>(value);
    } else if (option == "--first-seed" && value >= 1) {
      first = static_cast<std::size_t>(value - 1);
    } else if (option == "--steps" && value >= 300) {
      steps = value;
    } else {
      std::fprintf(
          stderr,
          "usage: collapse_table [--runs N] [--first-seed S] [--steps K], N >= 4, S >= 1, K >= 300\n");
      return 2;
    }
  }
  const Law fixed{"fixed", "fixed", {}}, sign{"sign 1e-3", "sign_bias", {{"step", 1e-3}}},
      adaptive{"adaptive", "adaptive_bias", {}};
  std::printf("Seeds %zu to %zu, %lld steps.\n\n", first + 1, first + runs, static_cast<long long>(steps));
  std::printf(
      "| law | collapse | runs | recovered with guard | of these not needed | handed back | holding | at "
      "work | "
      "most decisions | without |\n|---|---|---|---|---|---|---|---|---|---|\n");
  for (const Law& law : {fixed, sign, adaptive}) {
    std::vector<Outcome> with(runs), without(runs);
    in_parallel(2 * runs, [&](std::size_t i) {
      SimulationOptions plant = plant_of(first + i / 2);
      plant.scenario = Scenario::kCollapse;
      plant.collapse = kKinds[(first + i / 2) % kKinds.size()];
      (i % 2 == 0 ? with : without)[i / 2] = run_guarded(law, plant, steps, i % 2 == 0);
    });
    const auto print = [&](const std::string& name, const std::function<bool(std::size_t)>& counts) {
      int n = 0, guarded = 0, untouched = 0, handed_back = 0, holding = 0, decisions = 0, alone = 0;
      for (std::size_t i = 0; i < runs; ++i) {
        if (!counts(i)) continue;
        ++n;
        guarded += with[i].recovered;
        untouched += with[i].recovered && with[i].interventions == 0;
        handed_back += with[i].recovered && with[i].interventions > 0 && !with[i].held &&
                       with[i].end == GuardState::kWatching;
        holding += with[i].recovered && with[i].held;
        decisions = std::max(decisions, with[i].decisions);
        alone += without[i].recovered;
      }
      std::printf("| %s | %s | %d | %d (%.1f %%) | %d | %d | %d | %d | %d | %d (%.1f %%) |\n",
                  law.name.c_str(), name.c_str(), n, guarded, 100.0 * guarded / n, untouched, handed_back,
                  holding, guarded - untouched - handed_back - holding, decisions, alone, 100.0 * alone / n);
    };
    for (std::size_t kind = 0; kind < kKinds.size(); ++kind) {
      print(std::string(name_of(kKinds[kind])),
            [&](std::size_t i) { return (first + i) % kKinds.size() == kind; });
    }
    print("all", [](std::size_t) { return true; });
    std::fflush(stdout);
  }
  std::printf("\n| law | healthy runs | with an intervention |\n|---|---|---|\n");
  for (const Law& law : {sign, adaptive}) {
    std::vector<Outcome> outcomes(runs);
    in_parallel(runs, [&](std::size_t i) {
      SimulationOptions plant = plant_of(first + i);
      plant.scenario = kHealthy[(first + i) % kHealthy.size()];
      outcomes[i] = run_guarded(law, plant, steps, true);
    });
    const auto disturbed =
        std::count_if(outcomes.begin(), outcomes.end(), [](const Outcome& o) { return o.interventions > 0; });
    std::printf("| %s | %zu | %d |\n", law.name.c_str(), runs, static_cast<int>(disturbed));
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace moectl::bench

int main(int argc, char** argv) {
  return moectl::bench::main_of(argc, argv);
}
