// law_table [SECTION…] [--seeds N] [--first-seed S]: every bias policy on the simulated router, side by side on the
// same seeds, S to S + N - 1 (1 to 3). Prints Markdown; figures are medians over the seeds. Sections (all by default):
// summary, feedforward, grid, laws, scale, delay, dead, lumpy. `summary` is the table of
// policies/README.md; `grid` holds adaptive_bias against its bounds, run by run, and can be narrowed to some plants:
// `--experts 8,16`, `--tokens 1024,2048,8192` (2048: rescaled scores and delays).
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <set>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "law_grid.h"
#include "moectl/policy.h"

namespace moectl::bench {
namespace {

// What is asked for on the command line.
Grid which;

// A policy, and the option by which its gain is scaled, with its default; empty: it has none.
struct TunedLaw : Law {
  std::string gain_option;
  double gain = 0;

  Law scaled(double factor) const {
    Law law = *this;
    law.options.emplace_back(gain_option, gain * factor);
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
    {{"adaptive", "adaptive_bias", {}}, "", 0},
    {{"adaptive counts", "adaptive_bias", {{"form", std::string("counts")}}}, "", 0},
};

std::vector<Law> all_laws() {
  std::vector<Law> laws(kTunedLaws.begin(), kTunedLaws.end());
  laws.push_back(kRescue);
  return laws;
}

std::string all_three(const RunFigures& f) {
  return number(f.ratio) + " · " + steps_text(f.settle) + " · " + steps_text(f.back);
}
std::string ratio_only(const RunFigures& f) {
  return number(f.ratio);
}

// One table: a row a plant, a column a policy.
void side_by_side(const char* title, const std::vector<std::pair<std::string, SimulationOptions>>& rows,
                  const std::function<std::string(const RunFigures&)>& cell, bool declared = true) {
  std::vector<Law> laws = all_laws();
  // Rescue is not to be had where routing is late.
  if (rows.back().second.delay > 0) laws.pop_back();
  std::vector<RunFigures> figures(rows.size() * laws.size());
  in_parallel(figures.size(), [&](std::size_t i) {
    figures[i] = measure(laws[i % laws.size()], rows[i / laws.size()].second, which.seeds, 600, declared);
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

// Largest power of two by which the gain can be multiplied with the loop still settled at the end; 0 = not even one.
int gain_margin(const TunedLaw& law, SimulationOptions plant) {
  int margin = 0;
  if (law.gain_option.empty()) return -1;
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
  const std::size_t rows = kTunedLaws.size(), cells = rows * kSpaceCount;
  std::vector<RunFigures> figures(cells);
  std::vector<int> margins(cells);
  in_parallel(2 * cells, [&](std::size_t i) {
    const TunedLaw& law = kTunedLaws[i / 2 / kSpaceCount];
    SimulationOptions plant = plant_of(16, 2, 2048, kSpaces[i / 2 % kSpaceCount]);
    plant.seed = static_cast<std::uint64_t>(which.seeds.first);
    if (i % 2 == 1) {
      margins[i / 2] = gain_margin(law, plant);
      return;
    }
    plant.scenario = Scenario::kShift;
    figures[i / 2] = measure(law, plant, which.seeds);
  });
  std::printf(
      "\n### Laws side by side: settle · back after the shift · × floor · gain margin (16/2, T 2048, medians "
      "of "
      "%d seeds)\n\n",
      which.seeds.count);
  std::printf("| law |");
  for (const Space& space : kSpaces) std::printf(" %s |", space.name);
  std::printf("\n|---|---|---|---|\n");
  for (std::size_t row = 0; row < rows; ++row) {
    std::printf("| %s |", kTunedLaws[row].name.c_str());
    for (std::size_t at = 0; at < kSpaceCount; ++at) {
      const std::size_t i = row * kSpaceCount + at;
      const RunFigures& f = figures[i];
      std::printf(" %s · %s · %s · %s |", steps_text(f.settle).c_str(), steps_text(f.back).c_str(),
                  number(f.ratio).c_str(),
                  margins[i] < 0   ? "–"
                  : margins[i] > 0 ? std::to_string(margins[i]).c_str()
                                   : "< 1");
    }
    std::printf("\n");
  }
}

// Domains that alternate at random from step to step, of which one is switched on at step 300.
void feedforward() {
  struct Result {
    double ratio = 0, area = 0;
  };
  const std::size_t ways = 2, all = static_cast<std::size_t>(which.seeds.count) * ways;
  std::vector<Result> results(all);
  in_parallel(all, [&](std::size_t i) {
    SimulationOptions plant = plant_of(16, 2, 2048, kSpaces[1]);
    plant.seed = static_cast<std::uint64_t>(which.seeds.first) + i / ways;
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
  for (std::size_t seed = 0; seed < static_cast<std::size_t>(which.seeds.count); ++seed) {
    const Result &off = results[seed * ways], &tags = results[seed * ways + 1];
    std::printf("| %zu | %.2f | %.2f | %.1f | %.1f |\n", static_cast<std::size_t>(which.seeds.first) + seed,
                off.ratio, tags.ratio, off.area, tags.area);
    for (std::size_t w = 0; w < ways; ++w) {
      mean[w].ratio += results[seed * ways + w].ratio / which.seeds.count;
      mean[w].area += results[seed * ways + w].area / which.seeds.count;
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

void delay() {
  std::vector<std::pair<std::string, SimulationOptions>> rows;
  for (int late : {0, 1, 2, 4, 8}) {
    SimulationOptions plant = plant_of(16, 2, 2048, kSpaces[1]);
    plant.delay = late;
    plant.scenario = late > 0 ? Scenario::kDelay : Scenario::kSteady;
    rows.emplace_back(std::to_string(late) + " steps late", plant);
  }
  side_by_side("Declared delay: × floor (sigmoid 16/2, T 2048)", rows, ratio_only);
  rows.clear();
  for (const Space& space : kSpaces) {
    SimulationOptions plant = plant_of(16, 2, 2048, space);
    plant.delay = 4;
    plant.scenario = Scenario::kDelay;
    rows.emplace_back(space.name, plant);
  }
  side_by_side("A delay of 4 steps that is not declared: × floor (16/2, T 2048)", rows, ratio_only, false);
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
               [](const RunFigures& f) { return steps_text(f.sunk_back); });
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

// "8,16": numbers above 0. False if it holds anything else.
bool read_list(const std::string& text, std::set<std::int64_t>& out) {
  std::istringstream in(text);
  for (std::string item; std::getline(in, item, ',');) {
    const std::int64_t value = std::atoll(item.c_str());
    if (value <= 0 || std::to_string(value) != item) return false;
    out.insert(value);
  }
  return !out.empty();
}

int main_of(int argc, char** argv) {
  const std::vector<std::pair<std::string, void (*)()>> sections = {{"summary", summary},
                                                                    {"feedforward", feedforward},
                                                                    {"grid", [] { grid(which); }},
                                                                    {"laws", laws},
                                                                    {"scale", scale},
                                                                    {"delay", delay},
                                                                    {"dead", dead},
                                                                    {"lumpy", lumpy}};
  std::set<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--seeds" && i + 1 < argc) {
      which.seeds.count = std::max(1, std::atoi(argv[++i]));
      continue;
    }
    if (arg == "--first-seed" && i + 1 < argc) {
      which.seeds.first = std::max(1, std::atoi(argv[++i]));
      continue;
    }
    if (arg == "--experts" && i + 1 < argc && read_list(argv[i + 1], which.experts)) {
      ++i;
      continue;
    }
    if (arg == "--tokens" && i + 1 < argc && read_list(argv[i + 1], which.tokens)) {
      ++i;
      continue;
    }
    const bool known =
        std::any_of(sections.begin(), sections.end(), [&](const auto& s) { return s.first == arg; });
    if (!known) {
      std::fprintf(stderr,
                   "usage: law_table [--seeds N] [--first-seed S] [--experts N,…] [--tokens T,…] "
                   "[summary|feedforward|grid|laws|scale|delay|dead|lumpy]…\n");
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
