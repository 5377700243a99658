#include "law_runs.h"
#include "base/format.h"

#include <cstdio>
#include <tuple>

namespace moectl::bench {
namespace {

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

}  // namespace

SimulationOptions plant_of(int experts, int top_k, std::int64_t tokens, const Space& space) {
  SimulationOptions plant;
  plant.experts = experts;
  plant.top_k = top_k;
  plant.tokens = tokens;
  plant.gate = space.gate;
  plant.score_space = space.space;
  return plant;
}

RunFigures measure_run(const Law& law, const SimulationOptions& plant, std::int64_t steps, bool declared) {
  RunFigures f;
  ControllerConfig config = config_for(law, plant);
  if (!declared) config.model.delay = 0;
  const Series s = run(config, plant, steps);
  const std::size_t size = s.steps.size(), at = static_cast<std::size_t>(plant.event_step);
  f.ratio = figures_between(s, 0, size).max_vio_over_floor.value_or(0);
  f.settle = settle(s, 0, at);
  f.back = settle(s, at, size);
  if (plant.scenario == Scenario::kDead) f.sunk_back = sunk_expert_back(s, at);
  std::tie(f.swing, f.own_swing) = swings(s);
  return f;
}

RunFigures measure(const Law& law, SimulationOptions plant, const Seeds& seeds, std::int64_t steps,
                   bool declared) {
  std::vector<double> ratio;
  std::vector<int> settled, back, sunk_back;
  for (int i = 0; i < seeds.count; ++i) {
    plant.seed = static_cast<std::uint64_t>(seeds.first + i);
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
  return fixed(value, 2);
}

std::string name_of_plant(const SimulationOptions& p, const char* space) {
  return std::string(space) + " " + std::to_string(p.experts) + "/" + std::to_string(p.top_k) + " T " +
         std::to_string(p.tokens);
}

}  // namespace moectl::bench
