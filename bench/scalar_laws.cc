// scalar_law_table [--seeds N] [--first-seed S]: the policies of the auxiliary-loss weight and of the router
// temperature on the simulated router, side by side on the same seeds, S to S + N - 1 (1 to 3). Prints Markdown;
// figures are medians over the seeds.
//
// The weight: no bias is used, so that a policy has the load to itself; 16 experts, top-2, 2048 tokens a step, a domain
// switched on at step 600 of 1200. Policies with a set-point are told to hold 1.3 floors, the others have their ready
// config's options. Settle and back are the contract's (figures.h): MaxVio under 1.6 floors. The temperature:
// entropy_temperature holds the tokens' entropy, which does not move the load, so its error is shown instead: settled
// is |H / ln N - target| ≤ 0.02 over 20 steps. Gain margin: the largest power of two (up to 64) by which the gain can
// be multiplied with the run still settled at its end. Limits are set wide, so that policies are compared and not
// limits.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "base/format.h"
#include "closed_loop.h"
#include "moectl/controller.h"
#include "moectl/metrics.h"

namespace moectl::bench {
namespace {

constexpr std::int64_t kSteps = 1200, kEvent = 600;
constexpr double kFloors = 1.3;         // what set-points ask for
constexpr double kEntropyClose = 0.02;  // of H / ln N
constexpr int kExperts = 16, kTopK = 2, kTokens = 2048, kLargestMargin = 64;

int seeds = 3, first_seed = 1;

struct ScalarLaw {
  std::string name, policy;
  double initial = 0.01;
  std::int64_t cadence = 1;
  std::vector<std::pair<std::string, OptionValue>> options = {};
  std::function<void(PolicyOptions&, double factor)> scale = nullptr;  // none: it has no gain
};

double floor_cv() {
  return *noise_floor_cv(kExperts, kTopK, kTokens);
}

std::vector<ScalarLaw> weight_laws() {
  const double excess = floor_cv() * std::sqrt(kFloors * kFloors - 1);
  const auto scale_pi = [](PolicyOptions& o, double factor) {
    o.set("kp", 1.0 * factor);
    o.set("ki", 0.15 * factor);
  };
  return {{"fixed 0.01", "fixed"},
          {"fixed 0.1", "fixed", 0.1},
          {"schedule",
           "schedule",
           1e-3,
           1,
           {{"peak", 0.01},
            {"warmup", std::int64_t{100}},
            {"final", 1e-3},
            {"decay_start", std::int64_t{1000}},
            {"decay_steps", std::int64_t{9000}}}},
          {"rules", "rules"},
          {"multiplicative",
           "multiplicative",
           0.01,
           1,
           {{"metric", std::string("load_cv")}, {"target", kFloors * floor_cv()}},
           [](PolicyOptions& o, double factor) { o.set("factor", std::pow(1.2, factor)); }},
          {"pi", "pi", 0.01, 5, {{"target", excess}}, scale_pi}};
}

const ScalarLaw kTemperatureLaw = {
    "entropy_temperature", "entropy_temperature", 1, 1, {}, [](PolicyOptions& o, double factor) {
      o.set("gain", 0.1 * factor);
    }};

SimulationOptions plant_of(SimulatedGate gate, int seed) {
  SimulationOptions plant;
  plant.experts = kExperts;
  plant.top_k = kTopK;
  plant.tokens = kTokens;
  plant.gate = gate;
  plant.seed = static_cast<std::uint64_t>(seed);
  plant.scenario = Scenario::kShift;
  plant.event_step = kEvent;
  return plant;
}

ControllerConfig config_of(const ScalarLaw& law, Actuator actuator, const SimulationOptions& plant,
                           double factor) {
  ControllerConfig config = config_for({"", "fixed", {}}, plant);
  ActuatorConfig& moved = config.actuator(actuator);
  moved.policy = law.policy;
  moved.initial = law.initial;
  for (const auto& [name, value] : law.options) moved.options.set(name, value);
  if (factor != 1) law.scale(moved.options, factor);
  moved.limits = {.min = 1e-5, .max = 100, .rate = 10, .cadence = law.cadence};
  return config;
}

struct Figure {
  int settle = -1, back = -1;
  double end = 0;  // MaxVio over its floor, or the error of the entropy
};

// First of twenty steps in [from, to) that all lie within, counted from `from`; -1 = none.
int first_of_twenty(const std::vector<double>& errors, std::size_t from, std::size_t to, double within) {
  std::size_t run = 0;
  for (std::size_t i = from; i < to; ++i) {
    run = errors[i] <= within ? run + 1 : 0;
    if (run == 20) return static_cast<int>(i + 1 - 20 - from);
  }
  return -1;
}

Figure weight_run(const ScalarLaw& law, SimulatedGate gate, int seed, double factor) {
  const SimulationOptions plant = plant_of(gate, seed);
  const Series s = run(config_of(law, Actuator::kAuxLossWeight, plant, factor), plant, kSteps);
  return {settle(s, 0, kEvent), settle(s, kEvent, kSteps),
          figures_between(s, 0, kSteps).max_vio_over_floor.value_or(0)};
}

Figure temperature_run(const ScalarLaw& law, SimulatedGate gate, int seed, double factor) {
  const SimulationOptions plant = plant_of(gate, seed);
  Controller controller(config_of(law, Actuator::kRouterTemperature, plant, factor));
  const double target = controller.config().router_temperature.options.number("target");
  std::vector<double> errors;
  double end = 0;
  simulate(controller, plant, kSteps, [&](const StepReport& report) {
    const double entropy = report.layers.front().metrics->token_entropy.value_or(0) / std::log(kExperts);
    errors.push_back(std::abs(entropy - target));
    if (report.step >= kSteps - 100) end += errors.back() / 100;
  });
  return {first_of_twenty(errors, 0, kEvent, kEntropyClose),
          first_of_twenty(errors, kEvent, kSteps, kEntropyClose), end};
}

using Run = Figure (*)(const ScalarLaw&, SimulatedGate, int, double);

// The lower of two middle ones; never counts as most.
template <class T>
T median(std::vector<T> values) {
  std::sort(values.begin(), values.end(), [](T a, T b) { return a >= 0 && (b < 0 || a < b); });
  return values[(values.size() - 1) / 2];
}

std::string steps_text(int steps) {
  return steps < 0 ? "never" : std::to_string(steps);
}

std::string cell(const ScalarLaw& law, SimulatedGate gate, Run run_one, double settled) {
  std::vector<int> settles, backs;
  std::vector<double> ends;
  for (int i = 0; i < seeds; ++i) {
    const Figure f = run_one(law, gate, first_seed + i, 1);
    settles.push_back(f.settle);
    backs.push_back(f.back);
    ends.push_back(f.end);
  }
  int margin = 0;
  for (int factor = 1; law.scale && factor <= kLargestMargin; factor *= 2) {
    if (!(run_one(law, gate, first_seed, factor).end < settled)) break;
    margin = factor;
  }
  const std::string end = fixed(median(ends), settled > 1 ? 2 : 3);
  return steps_text(median(settles)) + " · " + steps_text(median(backs)) + " · " + end + " · " +
         (!law.scale   ? "–"
          : margin > 0 ? std::to_string(margin)
                       : "< 1");
}

void table(const char* title, const std::vector<ScalarLaw>& laws, Run run_one, double settled) {
  std::vector<std::string> cells(2 * laws.size());
  in_parallel(cells.size(), [&](std::size_t i) {
    const SimulatedGate gate = i % 2 == 0 ? SimulatedGate::kSoftmax : SimulatedGate::kSigmoid;
    cells[i] = cell(laws[i / 2], gate, run_one, settled);
  });
  std::printf("\n### %s\n\n| law | softmax | sigmoid |\n|---|---|---|\n", title);
  for (std::size_t i = 0; i < laws.size(); ++i) {
    std::printf("| %s | %s | %s |\n", laws[i].name.c_str(), cells[2 * i].c_str(), cells[2 * i + 1].c_str());
  }
  std::fflush(stdout);
}

int main_of(int argc, char** argv) {
  for (int i = 1; i < argc; i += 2) {
    const std::string option = argv[i];
    const int value = i + 1 < argc ? std::atoi(argv[i + 1]) : 0;
    if (option == "--seeds" && value >= 1) {
      seeds = value;
    } else if (option == "--first-seed" && value >= 1) {
      first_seed = value;
    } else {
      std::fprintf(stderr, "usage: scalar_law_table [--seeds N] [--first-seed S], both at least 1\n");
      return 2;
    }
  }
  table("Auxiliary-loss weight: settle · back after the shift · × floor · gain margin", weight_laws(),
        weight_run, 1.6);
  table("Router temperature: settle · back after the shift · error of H / ln N · gain margin",
        {kTemperatureLaw}, temperature_run, kEntropyClose);
  return 0;
}

}  // namespace
}  // namespace moectl::bench

int main(int argc, char** argv) {
  return moectl::bench::main_of(argc, argv);
}
