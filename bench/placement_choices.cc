// Would another planner, or a choice between planners by their past, stand nowhere below EPLB's rules?
//   placement_choices TRACE|SEED…     a trace or run log, or nine runs of the simulated router with that seed, as placement_table has them
// Every planner plans on the first half of a trace and is judged on the second, as in placement_table. A choice tries the planners within the
// first half: they plan on the first 4, 5, 6 and 7 eighths of it and are judged on the eighths that follow, 10 blocks in all. It keeps its
// default unless another planner was more even there by so many standard errors of the paired blocks.
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#include "moectl/placement.h"
#include "placement/eplb_peer.h"
#include "placement_rows.h"

namespace {

using moectl::Placement;

enum Planner { kEplb, kForecast, kMean, kPlanners };

Placement plan(int planner, const Rows& steps, std::size_t to, int devices, int slots) {
  const moectl::PlacementOptions options{.devices = devices, .slots = slots};
  if (planner == kEplb) return {devices, moectl::peer::eplb(joined(steps, to, 1), slots, 1, 1, devices)};
  const std::vector<double> loads =
      planner == kMean ? joined(steps, to, 1)
                       : moectl::forecast_loads(joined(steps, to, 32), static_cast<int>(steps[0].size()));
  return moectl::plan_placement(loads, options, samples_of(steps, to));
}

struct Choice {
  const char* name;
  Planner otherwise;
  std::vector<Planner> others;
  double errors;
};
const std::vector<Choice> kChoices = {
    {"`plan_placement` on the forecast, as it is", kForecast, {}, 0},
    {"on the mean of the half", kMean, {}, 0},
    {"on the forecast; EPLB's rules where they were more even", kForecast, {kEplb}, 0},
    {"the same, by one standard error", kForecast, {kEplb}, 1},
    {"on the forecast or the mean, what was more even", kForecast, {kMean}, 0},
    {"forecast, mean or EPLB's rules, what was most even", kForecast, {kMean, kEplb}, 0},
    {"EPLB's rules, unless forecast or mean was more even by one standard error",
     kEplb,
     {kForecast, kMean},
     1},
    {"the same, by two standard errors", kEplb, {kForecast, kMean}, 2},
};

struct Tally {
  int rows = 0, below = 0;
  double sum = 0, worst = 0;
};

/// By planner: mean balancedness of the 10 blocks.
std::vector<std::vector<double>> past_of(const Rows& steps, int devices, int slots) {
  const std::size_t half = steps.size() / 2, eighth = half / 8;
  std::vector<std::vector<double>> past(kPlanners);
  for (std::size_t origin = 4; origin < 8; ++origin) {
    for (int p = 0; p < kPlanners; ++p) {
      const std::size_t from = half * origin / 8;
      const Placement placement = plan(p, steps, from, devices, slots);
      for (std::size_t block = 0; block < 8 - origin; ++block) {
        double mean = 0;
        for (std::size_t s = from + block * eighth; s < from + (block + 1) * eighth; ++s)
          mean += balancedness(placement, steps[s]) / static_cast<double>(eighth);
        past[static_cast<std::size_t>(p)].push_back(mean);
      }
    }
  }
  return past;
}

void compare(const std::map<int, Rows>& layers, int devices, int slots, std::vector<Tally>& tallies) {
  std::vector<std::vector<double>> gains(kChoices.size());
  for (const auto& [layer, steps] : layers) {
    const std::size_t half = steps.size() / 2;
    std::vector<Placement> plans;
    for (int p = 0; p < kPlanners; ++p) plans.push_back(plan(p, steps, half, devices, slots));
    const auto past = past_of(steps, devices, slots);
    for (std::size_t c = 0; c < kChoices.size(); ++c) {
      const Choice& choice = kChoices[c];
      int chosen = choice.otherwise;
      double most = 0;
      for (const Planner other : choice.others) {
        std::vector<double> gain;
        for (std::size_t b = 0; b < past[other].size(); ++b)
          gain.push_back(past[other][b] - past[choice.otherwise][b]);
        const Mean mean = mean_of(gain);
        if (mean.value <= most || mean.value <= choice.errors * mean.error) continue;
        most = mean.value;
        chosen = other;
      }
      gains[c].resize(steps.size() - half, 0.0);
      for (std::size_t s = half; s < steps.size(); ++s) {
        gains[c][s - half] += (balancedness(plans[static_cast<std::size_t>(chosen)], steps[s]) -
                               balancedness(plans[kEplb], steps[s])) /
                              static_cast<double>(layers.size());
      }
    }
  }
  for (std::size_t c = 0; c < kChoices.size(); ++c) {
    const Mean mean = mean_of(gains[c]);
    Tally& tally = tallies[c];
    ++tally.rows;
    tally.sum += mean.value;
    tally.below += mean.value < -mean.error;
    tally.worst = std::min(tally.worst, mean.value);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Tally> tallies(kChoices.size());
  const auto all_shapes = [&](const std::map<int, Rows>& layers) {
    const auto n = static_cast<int>(layers.begin()->second[0].size());
    compare(layers, 4, n, tallies);
    compare(layers, 4, n + n / 4, tallies);
    compare(layers, 8, n + n / 2, tallies);
  };
  for (int i = 1; i < argc; ++i) {
    const std::string input = argv[i];
    if (input.find_first_not_of("0123456789") != std::string::npos) {
      all_shapes(read(input));
      continue;
    }
    for (const char* policy : {"fixed", "sign_bias", "adaptive_bias"}) {
      for (const auto scenario :
           {moectl::Scenario::kSteady, moectl::Scenario::kShift, moectl::Scenario::kDrift})
        all_shapes(simulated(policy, 64, 6, 4096, scenario, 400, std::stoull(input)));
    }
  }
  std::printf(
      "| planner | rows below EPLB's rules by more than one standard error | worst row | mean "
      "|\n|---|---|---|---|\n");
  for (std::size_t c = 0; c < kChoices.size(); ++c) {
    const Tally& t = tallies[c];
    std::printf("| %s | %d of %d | %+.4f | %+.4f |\n", kChoices[c].name, t.below, t.rows, t.worst,
                t.sum / std::max(1, t.rows));
  }
  return 0;
}
