// collapse_table [--runs N]: the guard on seeded collapses of four kinds and on healthy runs, against the same runs
// without it. Prints Markdown.
//
// The plant is simulation.h's, 16 experts, top-2, 512 tokens a step, gates and score spaces in turn by seed; the event
// comes at step 200 of 600 (a cold start at step 0). A run has recovered if MaxVio stays at 1 or below on average over
// its last 50 steps. Healthy runs are steady, shift, noise and drift under laws that balance: any intervention in
// them is a false one. `fixed` leaves all three actuators alone, with an auxiliary weight of 1e-3, so that the guard is
// the only one to act; `sign 1e-3` is the law in common use.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "closed_loop.h"
#include "moectl/controller.h"

namespace moectl::bench {
namespace {

constexpr std::int64_t kSteps = 600, kEvent = 200, kWindow = 50;
constexpr std::array<CollapseKind, 4> kKinds = {CollapseKind::kColdStart, CollapseKind::kRunaway,
                                                CollapseKind::kDeadThird, CollapseKind::kPoisonedBias};
constexpr std::array<Scenario, 4> kHealthy = {Scenario::kSteady, Scenario::kShift, Scenario::kNoise,
                                              Scenario::kDrift};

struct Outcome {
  bool recovered = false;
  int interventions = 0;
};

SimulationOptions plant_of(std::size_t seed) {
  SimulationOptions plant;
  plant.tokens = 512;
  plant.seed = seed + 1;
  plant.event_step = kEvent;
  plant.gate = seed % 3 == 0 ? SimulatedGate::kSoftmax : SimulatedGate::kSigmoid;
  plant.score_space = seed % 3 == 2 ? ScoreSpace::kLogit : ScoreSpace::kProbability;
  return plant;
}

Outcome run_guarded(const Law& law, const SimulationOptions& plant, bool guard) {
  ControllerConfig config = config_for(law, plant);
  config.aux_loss_weight.initial = law.policy == "fixed" ? 1e-3 : 0;
  config.guard.enabled = guard;
  Controller controller(config);
  Outcome out;
  double vio = 0;
  GuardState before = GuardState::kWatching;
  simulate(controller, plant, kSteps, [&](const StepReport& report) {
    const LayerReport& layer = report.layers.front();
    out.interventions += layer.guard.state == GuardState::kIntervening && before != GuardState::kIntervening;
    before = layer.guard.state;
    if (report.step >= kSteps - kWindow) vio += layer.metrics->max_vio.value_or(0) / kWindow;
  });
  out.recovered = vio <= 1;
  return out;
}

int main_of(int argc, char** argv) {
  std::size_t runs = 200;
  if (argc == 3 && std::string(argv[1]) == "--runs") {
    runs = static_cast<std::size_t>(std::max(4, std::atoi(argv[2])));
  } else if (argc != 1) {
    std::fprintf(stderr, "usage: collapse_table [--runs N]\n");
    return 2;
  }
  const Law fixed{"fixed", "fixed", {}}, sign{"sign 1e-3", "sign_bias", {{"step", 1e-3}}},
      adaptive{"adaptive", "adaptive_bias", {}};
  std::printf("| law | collapse | runs | recovered with guard | without |\n|---|---|---|---|---|\n");
  for (const Law& law : {fixed, sign}) {
    std::vector<Outcome> with(runs), without(runs);
    in_parallel(2 * runs, [&](std::size_t i) {
      SimulationOptions plant = plant_of(i / 2);
      plant.scenario = Scenario::kCollapse;
      plant.collapse = kKinds[i / 2 % kKinds.size()];
      (i % 2 == 0 ? with : without)[i / 2] = run_guarded(law, plant, i % 2 == 0);
    });
    int all_with = 0, all_without = 0;
    for (std::size_t kind = 0; kind < kKinds.size(); ++kind) {
      int n = 0, a = 0, b = 0;
      for (std::size_t i = kind; i < runs; i += kKinds.size()) {
        ++n;
        a += with[i].recovered;
        b += without[i].recovered;
      }
      all_with += a;
      all_without += b;
      std::printf("| %s | %s | %d | %d | %d |\n", law.name.c_str(),
                  std::string(name_of(kKinds[kind])).c_str(), n, a, b);
    }
    std::printf("| %s | all | %zu | %d (%.0f %%) | %d (%.0f %%) |\n", law.name.c_str(), runs, all_with,
                100.0 * all_with / static_cast<double>(runs), all_without,
                100.0 * all_without / static_cast<double>(runs));
    std::fflush(stdout);
  }
  std::printf("\n| law | healthy runs | with an intervention |\n|---|---|---|\n");
  for (const Law& law : {sign, adaptive}) {
    std::vector<Outcome> outcomes(runs);
    in_parallel(runs, [&](std::size_t i) {
      SimulationOptions plant = plant_of(i);
      plant.scenario = kHealthy[i % kHealthy.size()];
      outcomes[i] = run_guarded(law, plant, true);
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
