// law_table [SECTION…] [--seeds N]: every law of the biases on the simulated router, side by side on the same
// seeds. Prints Markdown. Sections (all by default): summary, feedforward, grid, laws, scale, first_gain, delay, dead,
// lumpy. `summary` is the table of policies/README.md.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <vector>

#include "closed_loop.h"
#include "moectl/policy.h"

namespace moectl::bench {
namespace {

int seeds = 3;

// A law, and the option by which its gain is scaled, with its default.
struct TunedLaw : Law {
  std::string gain_option;
  double gain = 0;

  Law scaled(double factor) const {
    Law law = *this;
    law.options.emplace_back(gain_option, gain * factor);
    // Its bound moves along, or it would be the bound that is measured.
    if (policy == "adaptive_bias") law.options.emplace_back("gain_max", std::max(1.0, gain * factor));
    return law;
  }
};

const Law kAdaptive{"adaptive", "adaptive_bias", {}};
const Law kCounts{"adaptive counts", "adaptive_bias", {{"form", std::string("counts")}}};
const Law kRescue{"adaptive, rescue", "adaptive_bias", {{"rescue", true}}};

const std::vector<TunedLaw> kTunedLaws = {
    {{"sign 1e-3", "sign_bias", {{"step", 1e-3}}}, "step", 1e-3},
    {{"sign 1e-2", "sign_bias", {{"step", 1e-2}}}, "step", 1e-2},
    {{"proportional", "proportional_bias", {}}, "step", 1e-2},
    {{"tanh momentum", "tanh_momentum_bias", {}}, "step", 5e-4},
    {{"quantile", "quantile_bias", {}}, "gain", 0.3},
    {{"adaptive", "adaptive_bias", {}}, "gain", 0.25},
    {{"adaptive counts", "adaptive_bias", {{"form", std::string("counts")}}}, "gain", 1e-3},
};

std::vector<Law> all_laws() {
  std::vector<Law> laws(kTunedLaws.begin(), kTunedLaws.end());
  laws.push_back(kRescue);
  return laws;
}

struct Space {
  const char* name;
  SimulatedGate gate;
  ScoreSpace space;
};
const std::vector<Space> kSpaces = {{"softmax", SimulatedGate::kSoftmax, ScoreSpace::kProbability},
                                    {"sigmoid", SimulatedGate::kSigmoid, ScoreSpace::kProbability},
                                    {"logit", SimulatedGate::kSigmoid, ScoreSpace::kLogit}};

SimulationOptions plant_of(int experts, int top_k, std::int64_t tokens, const Space& space) {
  SimulationOptions plant;
  plant.experts = experts;
  plant.top_k = top_k;
  plant.tokens = tokens;
  plant.gate = space.gate;
  plant.score_space = space.space;
  return plant;
}

struct LawFigures {
  double ratio = 0;                         // steady MaxVio over the floor, mean over seeds
  int settle = 0, back = 0, sunk_back = 0;  // the worst of the seeds; -1 = a seed never did
};

int worse(int a, int b) {
  return a < 0 || b < 0 ? -1 : std::max(a, b);
}

// Figures over seeds: settle before the event, back after it, steady over the last 100 steps.
LawFigures measure(const Law& law, SimulationOptions plant, std::int64_t steps = 600,
                   std::int64_t event = 300) {
  LawFigures f;
  for (int seed = 1; seed <= seeds; ++seed) {
    plant.seed = static_cast<std::uint64_t>(seed);
    plant.event_step = event;
    ControllerConfig config = config_for(law, plant);
    config.model.delay = plant.delay;
    const Series s = run(config, plant, steps);
    const std::size_t size = s.steps.size(), at = static_cast<std::size_t>(event);
    f.ratio += figures_between(s, 0, size).max_vio_over_floor.value_or(0) / seeds;
    f.settle = worse(f.settle, settle(s, 0, at));
    f.back = worse(f.back, settle(s, at, size));
    int first = -1;
    for (std::size_t i = at; i < size && first < 0; ++i) {
      if (s.lowest_load[i] > 0.5) first = static_cast<int>(i - at);
    }
    f.sunk_back = worse(f.sunk_back, first);
  }
  return f;
}

std::string steps_text(int steps) {
  return steps < 0 ? "never" : std::to_string(steps);
}

void grid() {
  std::printf("\n### adaptive_bias, unchanged defaults: shift at step 300, steady over steps 500–599\n\n");
  std::printf("| scores | N | k | T | × floor | settle | back |\n|---|---|---|---|---|---|---|\n");
  std::vector<SimulationOptions> plants;
  std::vector<const Space*> spaces;
  for (const Space& space : kSpaces) {
    for (int n : {8, 16, 64, 256}) {
      for (int k : {1, 2, 6, 8}) {
        if (k >= n) continue;
        for (std::int64_t t : {1024, 8192, 65536}) {
          if (t == 65536 && !(k == 2 && n <= 64)) continue;  // an hour otherwise
          plants.push_back(plant_of(n, k, t, space));
          plants.back().scenario = Scenario::kShift;
          spaces.push_back(&space);
        }
      }
    }
  }
  std::vector<LawFigures> figures(plants.size());
  in_parallel(plants.size(), [&](std::size_t i) { figures[i] = measure(kAdaptive, plants[i]); });
  int met = 0;
  for (std::size_t i = 0; i < plants.size(); ++i) {
    const LawFigures& f = figures[i];
    const bool wide = spaces[i]->gate == SimulatedGate::kSoftmax && plants[i].experts == 256;
    const bool good =
        f.ratio <= 1.25 && f.settle >= 0 && f.settle <= 30 && f.back >= 0 && f.back <= (wide ? 75 : 30);
    met += good;
    std::printf("| %s | %d | %d | %lld | %.2f | %s | %s |%s\n", spaces[i]->name, plants[i].experts,
                plants[i].top_k, static_cast<long long>(plants[i].tokens), f.ratio,
                steps_text(f.settle).c_str(), steps_text(f.back).c_str(), good ? "" : " ✗");
  }
  std::printf("\n%d of %zu cells within 1.25 × floor, settled in 30, back in 30 (softmax N = 256: 75).\n",
              met, plants.size());
}

// One table: a row a plant, a column a law.
void side_by_side(const char* title, const std::vector<std::pair<std::string, SimulationOptions>>& rows,
                  const std::function<std::string(const LawFigures&)>& cell, std::int64_t steps = 600) {
  const std::vector<Law> laws = all_laws();
  std::vector<LawFigures> figures(rows.size() * laws.size());
  in_parallel(figures.size(), [&](std::size_t i) {
    figures[i] = measure(laws[i % laws.size()], rows[i / laws.size()].second, steps);
  });
  std::printf("\n### %s\n\n| plant |", title);
  for (const Law& law : laws) std::printf(" %s |", law.name.c_str());
  std::printf("\n|---|");
  for (std::size_t i = 0; i < laws.size(); ++i) std::printf("---|");
  for (std::size_t i = 0; i < figures.size(); ++i) {
    if (i % laws.size() == 0) std::printf("\n| %s |", rows[i / laws.size()].first.c_str());
    std::printf(" %s |", cell(figures[i]).c_str());
  }
  std::printf("\n");
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  return text;
}
std::string all_three(const LawFigures& f) {
  return number(f.ratio) + " · " + steps_text(f.settle) + " · " + steps_text(f.back);
}
std::string ratio_only(const LawFigures& f) {
  return number(f.ratio);
}

std::string name_of_plant(const SimulationOptions& p, const char* space) {
  return std::string(space) + " " + std::to_string(p.experts) + "/" + std::to_string(p.top_k) + " T " +
         std::to_string(p.tokens);
}

// Largest power of two by which the gain can be multiplied with the loop still settled at the end; 0 = not even one.
int gain_margin(const TunedLaw& law, SimulationOptions plant) {
  int margin = 0;
  for (int factor = 1; factor <= 64; factor *= 2) {
    // Relaxation by more than two diverges by construction; the option ends before.
    if (law.policy == "quantile_bias" && law.gain * factor > 2) break;
    const Series s = run(config_for(law.scaled(factor), plant), plant, 500);
    if (!(figures_between(s, 0, s.steps.size()).max_vio_over_floor.value_or(9) < 1.6)) break;
    margin = factor;
  }
  return margin;
}

void summary() {
  const std::size_t rows = kTunedLaws.size(), cells = rows * kSpaces.size();
  std::vector<LawFigures> figures(cells);
  std::vector<int> margins(cells);
  in_parallel(2 * cells, [&](std::size_t i) {
    const TunedLaw& law = kTunedLaws[i / 2 / kSpaces.size()];
    SimulationOptions plant = plant_of(16, 2, 2048, kSpaces[i / 2 % kSpaces.size()]);
    if (i % 2 == 1) {
      margins[i / 2] = gain_margin(law, plant);
      return;
    }
    plant.scenario = Scenario::kShift;
    figures[i / 2] = measure(law, plant);
  });
  std::printf(
      "\n### Laws side by side: settle · back after the shift · × floor · gain margin (16/2, T 2048, %d "
      "seeds)\n\n",
      seeds);
  std::printf("| law |");
  for (const Space& space : kSpaces) std::printf(" %s |", space.name);
  std::printf("\n|---|---|---|---|\n");
  for (std::size_t row = 0; row < rows; ++row) {
    std::printf("| %s |", kTunedLaws[row].name.c_str());
    for (std::size_t at = 0; at < kSpaces.size(); ++at) {
      const std::size_t i = row * kSpaces.size() + at;
      const LawFigures& f = figures[i];
      std::printf(" %s · %s · %s · %s |", steps_text(f.settle).c_str(), steps_text(f.back).c_str(),
                  number(f.ratio).c_str(), margins[i] > 0 ? std::to_string(margins[i]).c_str() : "< 1");
    }
    std::printf("\n");
  }
}

// Domains that alternate at random from step to step, of which one is switched on at step 300.
void feedforward() {
  struct Result {
    double ratio = 0, area = 0;
  };
  const std::size_t ways = 2, all = static_cast<std::size_t>(seeds) * ways;
  std::vector<Result> results(all);
  in_parallel(all, [&](std::size_t i) {
    SimulationOptions plant = plant_of(16, 2, 2048, kSpaces[1]);
    plant.seed = i / ways + 1;
    plant.mixture_spread = 1;
    plant.scenario = Scenario::kShift;
    ControllerConfig config = config_for(kAdaptive, plant);
    config.model.domains = {"a", "b", "c", "d"};
    config.expert_bias.options.set("feedforward", std::string(i % ways == 1 ? "tags" : "off"));
    const Series s = run(config, plant, 600);
    const Figures f = compute_figures(s.steps, plant.event_step);
    results[i] = {f.max_vio_over_floor.value_or(0), f.excess_area.value_or(0)};
  });
  std::printf(
      "\n### adaptive_bias with and without feed-forward: mixtures drawn at every step, a domain switched on "
      "at "
      "step 300\n\n| seed | × floor off | × floor tags | excess area off | excess area tags "
      "|\n|---|---|---|---|---|\n");
  Result mean[2];
  for (std::size_t seed = 0; seed < static_cast<std::size_t>(seeds); ++seed) {
    const Result &off = results[seed * ways], &tags = results[seed * ways + 1];
    std::printf("| %zu | %.2f | %.2f | %.1f | %.1f |\n", seed + 1, off.ratio, tags.ratio, off.area,
                tags.area);
    for (std::size_t w = 0; w < ways; ++w) {
      mean[w].ratio += results[seed * ways + w].ratio / seeds;
      mean[w].area += results[seed * ways + w].area / seeds;
    }
  }
  std::printf("| mean | %.2f | %.2f | %.1f | %.1f |\n", mean[0].ratio, mean[1].ratio, mean[0].area,
              mean[1].area);
}

void laws() {
  std::vector<std::pair<std::string, SimulationOptions>> rows;
  for (const Space& space : kSpaces) {
    for (auto [n, k, t] : {std::tuple{16, 2, 2048}, std::tuple{64, 6, 8192}, std::tuple{256, 8, 4096}}) {
      SimulationOptions plant = plant_of(n, k, t, space);
      plant.scenario = Scenario::kShift;
      rows.emplace_back(name_of_plant(plant, space.name), plant);
    }
  }
  side_by_side("Laws side by side: × floor · settle · back after the shift", rows, all_three);
}

void scale() {
  std::vector<std::pair<std::string, SimulationOptions>> rows;
  for (double factor : {0.01, 1.0, 100.0}) {
    for (const Space& space : kSpaces) {
      SimulationOptions plant = plant_of(16, 2, 2048, space);
      plant.score_scale = factor;
      plant.scenario = Scenario::kShift;
      char name[64];
      std::snprintf(name, sizeof name, "%s × %g", space.name, factor);
      rows.emplace_back(name, plant);
    }
  }
  side_by_side("Scores rescaled: × floor · settle · back (16 experts, top-2, T 2048)", rows, all_three);
}

void first_gain() {
  std::printf(
      "\n### First gain of counts-only wrong by a factor: × floor · settle · back (16/2, T 2048)\n\n");
  std::printf("| scores | ÷ 100 | ÷ 10 | × 1 | × 10 | × 100 |\n|---|---|---|---|---|---|\n");
  const std::vector<double> factors = {0.01, 0.1, 1, 10, 100};
  std::vector<LawFigures> figures(kSpaces.size() * factors.size());
  in_parallel(figures.size(), [&](std::size_t i) {
    const Space& space = kSpaces[i / factors.size()];
    SimulationOptions plant = plant_of(16, 2, 2048, space);
    plant.scenario = Scenario::kShift;
    Law law = kCounts;
    const double right = space.space == ScoreSpace::kLogit ? 1e-2 : 1e-3;
    law.options.emplace_back("gain", right * factors[i % factors.size()]);
    figures[i] = measure(law, plant);
  });
  for (std::size_t i = 0; i < figures.size(); ++i) {
    if (i % factors.size() == 0) std::printf("| %s |", kSpaces[i / factors.size()].name);
    std::printf(" %s |%s", all_three(figures[i]).c_str(),
                i % factors.size() + 1 == factors.size() ? "\n" : "");
  }
}

void delay() {
  std::vector<std::pair<std::string, SimulationOptions>> rows;
  for (int late : {0, 1, 2, 4, 8}) {
    SimulationOptions plant = plant_of(16, 2, 2048, kSpaces[1]);
    plant.delay = late;
    plant.scenario = late > 0 ? Scenario::kDelay : Scenario::kSteady;
    rows.emplace_back(std::to_string(late) + " steps late", plant);
  }
  side_by_side("Declared delay: × floor (sigmoid 16/2, T 2048)", rows, ratio_only);
}

void dead() {
  std::vector<std::pair<std::string, SimulationOptions>> rows;
  for (const Space& space : kSpaces) {
    for (auto [n, k, t] : {std::tuple{16, 2, 2048}, std::tuple{64, 6, 8192}}) {
      SimulationOptions plant = plant_of(n, k, t, space);
      plant.scenario = Scenario::kDead;
      rows.emplace_back(name_of_plant(plant, space.name), plant);
    }
  }
  side_by_side("A sunk expert: steps until every expert has half its load again", rows,
               [](const LawFigures& f) { return steps_text(f.sunk_back); });
}

void lumpy() {
  std::vector<std::pair<std::string, SimulationOptions>> rows;
  for (const Space& space : kSpaces) {
    for (double spread : {0.02, 0.1, 0.3}) {
      SimulationOptions plant = plant_of(16, 2, 2048, space);
      plant.clusters = 12;
      plant.token_spread = spread;
      char name[64];
      std::snprintf(name, sizeof name, "%s, spread %g", space.name, spread);
      rows.emplace_back(name, plant);
    }
  }
  side_by_side("Lumpy routing, twelve clusters: × floor (16/2, T 2048)", rows, ratio_only);
}

int main_of(int argc, char** argv) {
  const std::vector<std::pair<std::string, void (*)()>> sections = {
      {"summary", summary}, {"feedforward", feedforward}, {"grid", grid},   {"laws", laws},
      {"scale", scale},     {"first_gain", first_gain},   {"delay", delay}, {"dead", dead},
      {"lumpy", lumpy}};
  std::set<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--seeds" && i + 1 < argc) {
      seeds = std::max(1, std::atoi(argv[++i]));
      continue;
    }
    const bool known =
        std::any_of(sections.begin(), sections.end(), [&](const auto& s) { return s.first == arg; });
    if (!known) {
      std::fprintf(stderr,
                   "usage: law_table [--seeds N] "
                   "[summary|feedforward|grid|laws|scale|first_gain|delay|dead|lumpy]…\n");
      return 2;
    }
    wanted.insert(arg);
  }
  for (const auto& [name, section] : sections) {
    if (wanted.empty() || wanted.count(name) > 0) section();
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace moectl::bench

int main(int argc, char** argv) {
  return moectl::bench::main_of(argc, argv);
}
