// What law_table's sections share: the plants, the runs of a policy on them, and how figures are written.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "closed_loop.h"

namespace moectl::bench {

/// The seeds that every figure is taken over.
struct Seeds {
  int count = 3, first = 1;
};

struct Space {
  const char* name;
  SimulatedGate gate;
  ScoreSpace space;
};
inline constexpr Space kSpaces[] = {{"softmax", SimulatedGate::kSoftmax, ScoreSpace::kProbability},
                                    {"sigmoid", SimulatedGate::kSigmoid, ScoreSpace::kProbability},
                                    {"logit", SimulatedGate::kSigmoid, ScoreSpace::kLogit}};
inline constexpr std::size_t kSpaceCount = std::size(kSpaces);

SimulationOptions plant_of(int experts, int top_k, std::int64_t tokens, const Space& space);
/// "softmax 16/2 T 2048"
std::string name_of_plant(const SimulationOptions& plant, const char* space);

/// What one run shows. Steps are -1 for never.
struct RunFigures {
  double ratio = 0;                         ///< Steady MaxVio over the floor, over the last 100 steps.
  int settle = 0, back = 0, sunk_back = 0;  ///< Before the event, after it; the sunk expert's return.
  double swing = 0, own_swing = 0;          ///< The most negative correlations of the last 100 steps' errors.
};

/// `declared`: the config says by how many steps the statistics are late.
RunFigures measure_run(const Law& law, const SimulationOptions& plant, std::int64_t steps,
                       bool declared = true);
/// Medians over the seeds.
RunFigures measure(const Law& law, SimulationOptions plant, const Seeds& seeds, std::int64_t steps = 600,
                   bool declared = true);

/// The lower of two middle ones, so that it is a figure that a run showed; of steps, never counts as most.
template <class T>
T median(std::vector<T> values, T never) {
  std::sort(values.begin(), values.end(), [&](const T& a, const T& b) {
    if (a == never || b == never) return a != never && b == never;
    return a < b;
  });
  return values[(values.size() - 1) / 2];
}

std::string steps_text(int steps);
std::string number(double value);

}  // namespace moectl::bench
