// law_table [SECTION…] [--seeds N] [--first-seed S]: every law of the biases on the simulated router, side by side on
// the same seeds, S to S + N - 1 (1 to 3). Prints Markdown; figures are medians over the seeds. Sections (all by
// default): summary, feedforward, grid, laws, scale, first_gain, delay, dead, lumpy. `summary` is the table of
// policies/README.md; `grid` holds adaptive_bias against its bounds, run by run, and can be narrowed to some plants:
// `--experts 8,16`, `--tokens 1024,2048,8192` (2048: rescaled scores, first gains and delays).
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

#include "closed_loop.h"
#include "moectl/policy.h"

namespace moectl::bench {
namespace {

int seeds = 3;
int first_seed = 1;
// What the grid is narrowed to; empty = all.
std::set<std::int64_t> only_experts, only_tokens;

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

// What one run shows. Steps are -1 for never.
struct RunFigures {
  double ratio = 0;                         // steady MaxVio over the floor, over the last 100 steps
  int settle = 0, back = 0, sunk_back = 0;  // before the event, after it; the sunk expert's return
  double swing = 0, own_swing = 0;          // the most negative correlations of the last 100 steps' errors
};

// The expert that has least in the first three steps of the event, and the first of five steps after it over which it
// has half its load on average.
int sunk_expert_back(const Series& s, std::size_t event) {
  const auto sum = [&](std::size_t expert, std::size_t from, std::size_t steps) {
    double load = 0;
    for (std::size_t i = from; i < from + steps; ++i) load += s.loads[i][expert];
    return load;
  };
  std::size_t sunk = 0;
  for (std::size_t e = 1; e < s.loads[event].size(); ++e) {
    if (sum(e, event, 3) < sum(sunk, event, 3)) sunk = e;
  }
  for (std::size_t i = event; i + 5 <= s.loads.size(); ++i) {
    if (sum(sunk, i, 5) >= 2.5) return static_cast<int>(i - event);
  }
  return -1;
}

// The most negative autocorrelation, at any lag up to 20, of the errors of the last 100 steps: of all experts
// together (first), and of the expert that has the worst (second). A limit cycle shows at half its period.
std::pair<double, double> swings(const Series& s) {
  const std::size_t window = 100, from = s.loads.size() - window, experts = s.loads.back().size();
  std::vector<double> square(experts, 0.0), product(experts);
  const auto error = [&](std::size_t step, std::size_t e) { return 1 - s.loads[from + step][e]; };
  for (std::size_t e = 0; e < experts; ++e) {
    for (std::size_t i = 0; i < window; ++i) square[e] += error(i, e) * error(i, e);
  }
  double all_squares = 0, swing = 0, own_swing = 0;
  for (const double sq : square) all_squares += sq;
  for (std::size_t lag = 1; lag <= 20; ++lag) {
    double all = 0;
    for (std::size_t e = 0; e < experts; ++e) {
      product[e] = 0;
      for (std::size_t i = lag; i < window; ++i) product[e] += error(i, e) * error(i - lag, e);
      all += product[e];
      if (square[e] > 0) own_swing = std::min(own_swing, product[e] / square[e]);
    }
    if (all_squares > 0) swing = std::min(swing, all / all_squares);
  }
  return {swing, own_swing};
}

RunFigures measure_run(const Law& law, const SimulationOptions& plant, std::int64_t steps,
                       bool declared = true) {
  RunFigures f;
  ControllerConfig config = config_for(law, plant);
  if (declared) config.model.delay = plant.delay;
  const Series s = run(config, plant, steps);
  const std::size_t size = s.steps.size(), at = static_cast<std::size_t>(plant.event_step);
  f.ratio = figures_between(s, 0, size).max_vio_over_floor.value_or(0);
  f.settle = settle(s, 0, at);
  f.back = settle(s, at, size);
  if (plant.scenario == Scenario::kDead) f.sunk_back = sunk_expert_back(s, at);
  std::tie(f.swing, f.own_swing) = swings(s);
  return f;
}

// The lower of two middle ones, so that it is a figure that a run showed; of steps, never counts as most.
template <class T>
T median(std::vector<T> values, T never) {
  std::sort(values.begin(), values.end(), [&](const T& a, const T& b) {
    if (a == never || b == never) return a != never && b == never;
    return a < b;
  });
  return values[(values.size() - 1) / 2];
}

// Medians over the seeds.
RunFigures measure(const Law& law, SimulationOptions plant, std::int64_t steps = 600, bool declared = true) {
  std::vector<double> ratio;
  std::vector<int> settled, back, sunk_back;
  for (int i = 0; i < seeds; ++i) {
    plant.seed = static_cast<std::uint64_t>(first_seed + i);
    const RunFigures f = measure_run(law, plant, steps, declared);
    ratio.push_back(f.ratio);
    settled.push_back(f.settle);
    back.push_back(f.back);
    sunk_back.push_back(f.sunk_back);
  }
  return {.ratio = median(ratio, -1.0),
          .settle = median(settled, -1),
          .back = median(back, -1),
          .sunk_back = median(sunk_back, -1)};
}

std::string steps_text(int steps) {
  return steps < 0 ? "never" : std::to_string(steps);
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", value);
  return text;
}

std::string name_of_plant(const SimulationOptions& p, const char* space) {
  return std::string(space) + " " + std::to_string(p.experts) + "/" + std::to_string(p.top_k) + " T " +
         std::to_string(p.tokens);
}

// One plant that adaptive_bias is held against, and the runs of its seeds.
struct Trial {
  Law law;
  SimulationOptions plant;
  std::int64_t steps;
  std::string name;
  std::vector<RunFigures> runs{};
};

// A bound, and how many runs kept it.
class Bound {
 public:
  explicit Bound(std::string what) : what_(std::move(what)) {}
  void judge(const Trial& trial, std::size_t run, bool kept, const std::string& value) {
    ++runs_;
    kept_ += kept;
    if (!kept)
      missed_.push_back(trial.name + " seed " + std::to_string(trial.plant.seed + run) + ": " + value);
  }
  void print() const {
    if (runs_ == 0) return;
    std::printf("| %s | %d of %d |", what_.c_str(), kept_, runs_);
    for (std::size_t i = 0; i < missed_.size(); ++i) std::printf("%s %s", i ? ";" : "", missed_[i].c_str());
    std::printf(" |\n");
  }

 private:
  std::string what_;
  int runs_ = 0, kept_ = 0;
  std::vector<std::string> missed_;
};

// Runs those trials that the grid is narrowed to, drops the others.
void run_all(std::vector<Trial>& trials) {
  std::erase_if(trials, [](const Trial& trial) {
    return (!only_experts.empty() && !only_experts.count(trial.plant.experts)) ||
           (!only_tokens.empty() && !only_tokens.count(trial.plant.tokens));
  });
  const auto each = static_cast<std::size_t>(seeds);
  std::vector<std::pair<Trial*, std::size_t>> jobs;
  for (Trial& trial : trials) {
    trial.plant.seed = static_cast<std::uint64_t>(first_seed);
    trial.runs.resize(each);
    for (std::size_t i = 0; i < each; ++i) jobs.emplace_back(&trial, i);
  }
  // The longest first, or one core would be left alone with it at the end.
  std::stable_sort(jobs.begin(), jobs.end(), [](const auto& a, const auto& b) {
    const auto work = [](const Trial& t) { return t.plant.tokens * t.plant.experts * t.steps; };
    return work(*a.first) > work(*b.first);
  });
  in_parallel(jobs.size(), [&](std::size_t job) {
    const auto [trial, i] = jobs[job];
    SimulationOptions plant = trial->plant;
    plant.seed += i;
    trial->runs[i] = measure_run(trial->law, plant, trial->steps);
  });
}

bool within(int steps, int bound) {
  return steps >= 0 && steps <= bound;
}

// Everything that adaptive_bias is to keep with its defaults, over experts, top-k, tokens and score spaces.
void grid() {
  std::vector<Trial> shifts, sinks, others;
  for (const Space& space : kSpaces) {
    for (int n : {8, 16, 64, 256}) {
      for (int k : {1, 2, 6, 8}) {
        if (k >= n) continue;
        for (std::int64_t t : {1024, 8192, 65536}) {
          SimulationOptions plant = plant_of(n, k, t, space);
          const std::string name = name_of_plant(plant, space.name);
          plant.scenario = Scenario::kShift;
          shifts.push_back({kAdaptive, plant, 600, name});
          plant.scenario = Scenario::kDead;
          sinks.push_back({kRescue, plant, 360, name});
        }
      }
    }
    const SimulationOptions plant = plant_of(16, 2, 2048, space);
    const std::string name = name_of_plant(plant, space.name);
    for (double factor : {0.01, 100.0}) {
      const std::string times = factor < 1 ? " ÷ 100" : " × 100";
      SimulationOptions scaled = plant;
      scaled.score_scale = factor;
      others.push_back(
          {{"", "adaptive_bias", {{"form", std::string("gap")}}}, scaled, 600, name + " scores" + times});
      Law law = kCounts;
      law.options.emplace_back("gain", factor * (space.space == ScoreSpace::kLogit ? 1e-2 : 1e-3));
      others.push_back({law, plant, 600, name + " first gain" + times});
    }
    for (int late : {1, 2, 4, 8}) {
      SimulationOptions delayed = plant;
      delayed.scenario = Scenario::kDelay;
      delayed.delay = late;
      others.push_back({kAdaptive, delayed, 600, name + " delay " + std::to_string(late)});
    }
  }
  run_all(shifts);

  std::printf(
      "\n### adaptive_bias, unchanged defaults: shift at step 300, steady over steps 500–599, medians of "
      "%d\n\n",
      seeds);
  std::printf("| plant | × floor | settle | back |\n|---|---|---|---|\n");
  Bound steady("steady MaxVio ≤ 1.25 × floor"), settled("settled in ≤ 30 steps"),
      back("back after a shift in ≤ 30 (softmax N = 256: 75)"), sunk("sunk expert back in ≤ 25, with rescue"),
      rescaled("scores × 100 and ÷ 100: ≤ 1.25 × floor"),
      first_gain("first gain × 100 and ÷ 100, counts only: ≤ 1.25"),
      delayed("declared delay of 1, 2, 4, 8: ≤ 1.5 × floor"),
      cycle("no limit cycle: no correlation under -0.2 together, -0.5 of one expert");
  const auto judge_swing = [&](const Trial& t, std::size_t i) {
    const RunFigures& f = t.runs[i];
    cycle.judge(t, i, f.swing > -0.2 && f.own_swing > -0.5, number(f.swing) + ", " + number(f.own_swing));
  };
  int cells = 0;
  for (const Trial& t : shifts) {
    const bool wide = t.plant.gate == SimulatedGate::kSoftmax && t.plant.experts == 256;
    std::vector<double> ratio;
    std::vector<int> settles, backs;
    for (std::size_t i = 0; i < t.runs.size(); ++i) {
      const RunFigures& f = t.runs[i];
      steady.judge(t, i, f.ratio <= 1.25, number(f.ratio));
      settled.judge(t, i, within(f.settle, 30), steps_text(f.settle));
      back.judge(t, i, within(f.back, wide ? 75 : 30), steps_text(f.back));
      judge_swing(t, i);
      ratio.push_back(f.ratio);
      settles.push_back(f.settle);
      backs.push_back(f.back);
    }
    const double r = median(ratio, -1.0);
    const int s = median(settles, -1), b = median(backs, -1);
    const bool good = r <= 1.25 && within(s, 30) && within(b, wide ? 75 : 30);
    cells += good;
    std::printf("| %s | %.2f | %s | %s |%s\n", t.name.c_str(), r, steps_text(s).c_str(),
                steps_text(b).c_str(), good ? "" : " ✗");
  }
  std::printf("\n%d of %zu plants keep the first three bounds by their medians.\n", cells, shifts.size());
  std::fflush(stdout);
  run_all(sinks);
  run_all(others);
  for (const Trial& t : sinks) {
    for (std::size_t i = 0; i < t.runs.size(); ++i) {
      sunk.judge(t, i, within(t.runs[i].sunk_back, 25), steps_text(t.runs[i].sunk_back));
    }
  }
  for (const Trial& t : others) {
    const bool late = t.plant.delay > 0;
    Bound& bound = late ? delayed : t.plant.score_scale != 1 ? rescaled : first_gain;
    for (std::size_t i = 0; i < t.runs.size(); ++i) {
      bound.judge(t, i, t.runs[i].ratio <= (late ? 1.5 : 1.25), number(t.runs[i].ratio));
      judge_swing(t, i);
    }
  }
  std::printf("\n| bound | runs | missed by |\n|---|---|---|\n");
  for (const Bound* bound : {&steady, &settled, &back, &sunk, &rescaled, &first_gain, &delayed, &cycle})
    bound->print();
}

// One table: a row a plant, a column a law.
void side_by_side(const char* title, const std::vector<std::pair<std::string, SimulationOptions>>& rows,
                  const std::function<std::string(const RunFigures&)>& cell, bool declared = true) {
  std::vector<Law> laws = all_laws();
  // Rescue is not to be had where routing is late.
  if (rows.back().second.delay > 0) laws.pop_back();
  std::vector<RunFigures> figures(rows.size() * laws.size());
  in_parallel(figures.size(), [&](std::size_t i) {
    figures[i] = measure(laws[i % laws.size()], rows[i / laws.size()].second, 600, declared);
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

std::string all_three(const RunFigures& f) {
  return number(f.ratio) + " · " + steps_text(f.settle) + " · " + steps_text(f.back);
}
std::string ratio_only(const RunFigures& f) {
  return number(f.ratio);
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
  std::vector<RunFigures> figures(cells);
  std::vector<int> margins(cells);
  in_parallel(2 * cells, [&](std::size_t i) {
    const TunedLaw& law = kTunedLaws[i / 2 / kSpaces.size()];
    SimulationOptions plant = plant_of(16, 2, 2048, kSpaces[i / 2 % kSpaces.size()]);
    plant.seed = static_cast<std::uint64_t>(first_seed);
    if (i % 2 == 1) {
      margins[i / 2] = gain_margin(law, plant);
      return;
    }
    plant.scenario = Scenario::kShift;
    figures[i / 2] = measure(law, plant);
  });
  std::printf(
      "\n### Laws side by side: settle · back after the shift · × floor · gain margin (16/2, T 2048, medians "
      "of "
      "%d seeds)\n\n",
      seeds);
  std::printf("| law |");
  for (const Space& space : kSpaces) std::printf(" %s |", space.name);
  std::printf("\n|---|---|---|---|\n");
  for (std::size_t row = 0; row < rows; ++row) {
    std::printf("| %s |", kTunedLaws[row].name.c_str());
    for (std::size_t at = 0; at < kSpaces.size(); ++at) {
      const std::size_t i = row * kSpaces.size() + at;
      const RunFigures& f = figures[i];
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
    plant.seed = static_cast<std::uint64_t>(first_seed) + i / ways;
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
    std::printf("| %zu | %.2f | %.2f | %.1f | %.1f |\n", static_cast<std::size_t>(first_seed) + seed,
                off.ratio, tags.ratio, off.area, tags.area);
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
  std::vector<RunFigures> figures(kSpaces.size() * factors.size());
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
    if (arg == "--first-seed" && i + 1 < argc) {
      first_seed = std::max(1, std::atoi(argv[++i]));
      continue;
    }
    if (arg == "--experts" && i + 1 < argc && read_list(argv[i + 1], only_experts)) {
      ++i;
      continue;
    }
    if (arg == "--tokens" && i + 1 < argc && read_list(argv[i + 1], only_tokens)) {
      ++i;
      continue;
    }
    const bool known =
        std::any_of(sections.begin(), sections.end(), [&](const auto& s) { return s.first == arg; });
    if (!known) {
      std::fprintf(stderr,
                   "usage: law_table [--seeds N] [--first-seed S] [--experts N,…] [--tokens T,…] "
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
