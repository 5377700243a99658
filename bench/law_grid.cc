#include "law_grid.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

namespace moectl::bench {
namespace {

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
void run_all(std::vector<Trial>& trials, const Grid& which) {
  std::erase_if(trials, [&](const Trial& trial) {
    return (!which.experts.empty() && !which.experts.count(trial.plant.experts)) ||
           (!which.tokens.empty() && !which.tokens.count(trial.plant.tokens));
  });
  const auto each = static_cast<std::size_t>(which.seeds.count);
  std::vector<std::pair<Trial*, std::size_t>> jobs;
  for (Trial& trial : trials) {
    trial.plant.seed = static_cast<std::uint64_t>(which.seeds.first);
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

}  // namespace

void grid(const Grid& which) {
  const Law adaptive{"adaptive", "adaptive_bias", {}}, rescue{"rescue", "adaptive_bias", {{"rescue", true}}};
  const Law counts{"counts", "adaptive_bias", {{"form", std::string("counts")}}};
  std::vector<Trial> shifts, sinks, others;
  for (const Space& space : kSpaces) {
    for (int n : {8, 16, 64, 256}) {
      for (int k : {1, 2, 6, 8}) {
        if (k >= n) continue;
        for (std::int64_t t : {1024, 8192, 65536}) {
          SimulationOptions plant = plant_of(n, k, t, space);
          const std::string name = name_of_plant(plant, space.name);
          plant.scenario = Scenario::kShift;
          shifts.push_back({adaptive, plant, 600, name});
          plant.scenario = Scenario::kDead;
          sinks.push_back({rescue, plant, 360, name});
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
      others.push_back({counts, scaled, 600, name + " counts only" + times});
    }
    for (int late : {1, 2, 4, 8}) {
      SimulationOptions delayed = plant;
      delayed.scenario = Scenario::kDelay;
      delayed.delay = late;
      others.push_back({adaptive, delayed, 600, name + " delay " + std::to_string(late)});
    }
  }
  run_all(shifts, which);

  std::printf(
      "\n### adaptive_bias, unchanged defaults: shift at step 300, steady over steps 500–599, medians of "
      "%d\n\n",
      which.seeds.count);
  std::printf("| plant | × floor | settle | back |\n|---|---|---|---|\n");
  Bound steady("steady MaxVio ≤ 1.25 × floor"), settled("settled in ≤ 30 steps"),
      back("back after a shift in ≤ 30 (softmax N = 256: 75)"), sunk("sunk expert back in ≤ 25, with rescue"),
      rescaled("scores × 100 and ÷ 100, with the gap and counts only: ≤ 1.25 × floor"),
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
  run_all(sinks, which);
  run_all(others, which);
  for (const Trial& t : sinks) {
    for (std::size_t i = 0; i < t.runs.size(); ++i) {
      sunk.judge(t, i, within(t.runs[i].sunk_back, 25), steps_text(t.runs[i].sunk_back));
    }
  }
  for (const Trial& t : others) {
    const bool late = t.plant.delay > 0;
    Bound& bound = late ? delayed : rescaled;
    for (std::size_t i = 0; i < t.runs.size(); ++i) {
      bound.judge(t, i, t.runs[i].ratio <= (late ? 1.5 : 1.25), number(t.runs[i].ratio));
      judge_swing(t, i);
    }
  }
  std::printf("\n| bound | runs | missed by |\n|---|---|---|\n");
  for (const Bound* bound : {&steady, &settled, &back, &sunk, &rescaled, &delayed, &cycle}) bound->print();
}

}  // namespace moectl::bench
