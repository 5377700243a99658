// plant_table [--seeds N] [--first-seed S] [--laws NAME,…] [--only TEXT,…]: each bias law on each simulated plant, one
// line a run, with tabs: law, plant, seed, × floor, settle, excess area, end × floor, wander. `laws.py` makes tables of it.
//
// Plants: three gates; 8 to 512 experts, top-1 to top-8, 1024 to 65536 tokens; tokens in sequences, in lumps, mixtures that
// vary; drift, a dead expert, biases that begin wrong; a delay that is declared, and one that is not; ten times the tokens
// from step 300 on. 600 steps; the data shift at step 300 unless the plant says otherwise. The check of the response is
// off: it would hold some of these loops, and laws are compared here.
// Wander: root mean square of the step-to-step change of MaxVio over the floor, in the steady window.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "law_runs.h"
#include "moectl/controller.h"

namespace moectl::bench {
namespace {

constexpr std::int64_t kSteps = 600, kShift = 300, kWindow = 100;

struct Plant {
  std::string name;
  SimulationOptions options;
  bool declared = true, tenfold = false;
};

const std::vector<Law> kLaws = {
    {"adaptive", "adaptive_bias", {}},
    {"counts", "adaptive_bias", {{"form", std::string("counts")}}},
    {"K3", "quantile_bias", {{"form", std::string("k3")}, {"gain", 1.0}}},
    {"quantile", "quantile_bias", {}},
    {"sign 1e-3", "sign_bias", {{"step", 1e-3}}},
    {"sign 1e-2", "sign_bias", {{"step", 1e-2}}},
    {"proportional", "proportional_bias", {{"step", 1e-2}}},
};

std::vector<Plant> plants() {
  struct Size {
    int experts, top_k;
    std::int64_t tokens;
  };
  constexpr Size kSizes[] = {{8, 1, 1024},   {8, 2, 8192},   {8, 6, 8192},   {16, 1, 8192},  {16, 2, 1024},
                             {16, 2, 2048},  {16, 2, 8192},  {16, 2, 65536}, {16, 8, 65536}, {64, 1, 8192},
                             {64, 6, 4096},  {64, 6, 65536}, {64, 8, 1024},  {256, 1, 8192}, {256, 6, 1024},
                             {256, 8, 8192}, {512, 8, 8192}};
  std::vector<Plant> all;
  for (const Space& space : kSpaces) {
    const auto add = [&](Size size, const std::string& what, const auto& change) {
      SimulationOptions options = plant_of(size.experts, size.top_k, size.tokens, space);
      options.scenario = Scenario::kShift;
      Plant plant{name_of_plant(options, space.name) + (what.empty() ? "" : ", " + what), options};
      change(plant);
      all.push_back(plant);
    };
    constexpr Size kSmall{16, 2, 2048}, kMiddle{64, 6, 8192};
    for (const Size size : kSizes) add(size, "", [](Plant&) {});
    add(kSmall, "sequences of 128", [](Plant& p) { p.options.sequence_length = 128; });
    add(kMiddle, "sequences of 256", [](Plant& p) { p.options.sequence_length = 256; });
    for (const double spread : {0.02, 0.1}) {
      add(kSmall, spread < 0.05 ? "lumps of .02" : "lumps of .1", [&](Plant& p) {
        p.options.clusters = 12;
        p.options.token_spread = spread;
        p.options.scenario = Scenario::kSteady;
      });
    }
    add(kSmall, "noise", [](Plant& p) { p.options.scenario = Scenario::kNoise; });
    add(kSmall, "drift", [](Plant& p) { p.options.scenario = Scenario::kDrift; });
    add(kSmall, "dead expert", [](Plant& p) { p.options.scenario = Scenario::kDead; });
    add(kMiddle, "dead expert", [](Plant& p) { p.options.scenario = Scenario::kDead; });
    add(kSmall, "wrong biases at the start", [](Plant& p) {
      p.options.scenario = Scenario::kCollapse;
      p.options.collapse = CollapseKind::kPoisonedBias;
      p.options.event_step = 0;
    });
    add(kSmall, "tenfold batch", [](Plant& p) { p.tenfold = true; });
    for (const int late : {1, 2, 4, 8})
      add(kSmall, "delay " + std::to_string(late), [&](Plant& p) { p.options.delay = late; });
    add({64, 6, 4096}, "delay 4", [](Plant& p) { p.options.delay = 4; });
    for (const int late : {1, 2, 3, 4}) {
      add(kSmall, "undeclared delay " + std::to_string(late), [&](Plant& p) {
        p.options.delay = late;
        p.declared = false;
      });
    }
    add({64, 6, 4096}, "undeclared delay 4", [](Plant& p) {
      p.options.delay = 4;
      p.declared = false;
    });
  }
  return all;
}

std::vector<StepFigures> run(const Law& law, const Plant& plant) {
  ControllerConfig config = config_for(law, plant.options);
  if (!plant.declared) config.model.delay = 0;
  if (plant.tenfold) config.model.tokens_per_step = 0;  // not known
  config.safety.responsiveness = false;
  config.collect.sequences = plant.options.sequence_length > 0;
  Controller controller(config);
  SimulationOptions options = plant.options;
  options.biased_scores = controller.shape(0).needs.biased_scores();
  SimulatedRouter router(options);
  std::deque<RoutingStats> late;
  std::vector<StepFigures> steps;
  for (std::int64_t step = 0; step < kSteps; ++step) {
    if (plant.tenfold && step == kShift) router.set_tokens(10 * options.tokens);
    const RoutingBatch batch = router.route(controller.bias(0));
    if (options.delay == 0) {
      controller.record(0, batch);
    } else {
      double width = 0;
      controller.record_with(0, [&](RoutingStats& stats) { width = stats.gap_width(); });
      RoutingStats& stats = late.emplace_back(controller.shape(0));
      stats.set_gap_width(width);
      stats.add(batch);
      if (late.size() > static_cast<std::size_t>(options.delay)) {
        controller.record(0, late.front());
        late.pop_front();
      }
    }
    const StepFigures figures = figures_of(controller.step());
    if (figures.max_vio) steps.push_back(figures);
  }
  return steps;
}

void print(const Law& law, const Plant& plant, const std::vector<StepFigures>& steps) {
  const bool whole = plant.options.event_step == 0 || plant.options.scenario == Scenario::kSteady;
  const Figures figures = whole ? compute_figures(steps) : compute_figures(steps, plant.options.event_step);
  const std::size_t end = whole ? steps.size() : static_cast<std::size_t>(kShift - plant.options.delay);
  double square = 0;
  for (std::size_t i = end - kWindow + 1; i < end; ++i) {
    const double change = (*steps[i].max_vio - *steps[i - 1].max_vio) / *steps[i].floor_max_vio;
    square += change * change;
  }
  const auto text = [](const auto& value, const char* format) {
    char out[32];
    std::snprintf(out, sizeof out, format, value ? static_cast<double>(*value) : 0);
    return std::string(value ? out : "-");
  };
  std::printf("%s\t%s\t%llu\t%s\t%s\t%s\t%s\t%.4f\n", law.name.c_str(), plant.name.c_str(),
              static_cast<unsigned long long>(plant.options.seed),
              text(figures.max_vio_over_floor, "%.4f").c_str(), text(figures.settle, "%.0f").c_str(),
              text(figures.excess_area, "%.3f").c_str(), text(figures.end_over_floor, "%.4f").c_str(),
              std::sqrt(square / (kWindow - 1)));
  std::fflush(stdout);
}

std::vector<std::string> list(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream in(text);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

int main_of(int argc, char** argv) {
  Seeds seeds;
  std::vector<std::string> laws, only;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i], value = i + 1 < argc ? argv[++i] : "";
    if (option == "--seeds") {
      seeds.count = std::max(1, std::atoi(value.c_str()));
    } else if (option == "--first-seed") {
      seeds.first = std::max(1, std::atoi(value.c_str()));
    } else if (option == "--laws") {
      laws = list(value);
    } else if (option == "--only") {
      only = list(value);
    } else {
      std::fprintf(stderr,
                   "usage: plant_table [--seeds N] [--first-seed S] [--laws NAME,…] [--only TEXT,…]\n");
      return 2;
    }
  }
  struct Job {
    const Law* law;
    Plant plant;
  };
  std::vector<Job> jobs;
  for (const Law& law : kLaws) {
    if (!laws.empty() && std::find(laws.begin(), laws.end(), law.name) == laws.end()) continue;
    for (Plant plant : plants()) {
      const auto named = [&](const std::string& text) { return plant.name.find(text) != std::string::npos; };
      if (!only.empty() && std::none_of(only.begin(), only.end(), named)) continue;
      if (law.name == "K3" && plant.options.score_space == ScoreSpace::kLogit)
        continue;  // its bins need [0, 1]
      for (int i = 0; i < seeds.count; ++i) {
        plant.options.seed = static_cast<std::uint64_t>(seeds.first + i);
        jobs.push_back({&law, plant});
      }
    }
  }
  std::mutex printing;
  in_parallel(jobs.size(), [&](std::size_t i) {
    const std::vector<StepFigures> steps = run(*jobs[i].law, jobs[i].plant);
    const std::lock_guard lock(printing);
    print(*jobs[i].law, jobs[i].plant, steps);
  });
  return 0;
}

}  // namespace
}  // namespace moectl::bench

int main(int argc, char** argv) {
  return moectl::bench::main_of(argc, argv);
}
