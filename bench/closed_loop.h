// What the experiment programs share: one closed-loop run of a policy on the simulated router, and its figures.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "moectl/config.h"
#include "moectl/figures.h"
#include "moectl/simulation.h"

namespace moectl::bench {

/// A policy under test: a policy of the expert biases with its options.
struct Law {
  std::string name;                                          ///< As printed.
  std::string policy;                                        ///< As registered.
  std::vector<std::pair<std::string, OptionValue>> options;  ///< Of equal names the last.
};

/// One run.
struct Series {
  std::vector<StepFigures> steps;
  std::vector<std::vector<double>> loads;  ///< Of the experts of layer 0 over their mean, a row a step.
};

/// A config with `law` on the biases of the plant, its delay declared. Limits are set wide, so that policies are
/// compared and not limits: range ±16 and rate 1 in units of the plant's score scale (×8 for logits), everything else
/// off.
ControllerConfig config_for(const Law& law, const SimulationOptions& plant);

/// One run of the config on the plant.
Series run(const ControllerConfig& config, const SimulationOptions& plant, std::int64_t steps);

/// The figures of the steps [from, to), as figures.h defines them: the steady window is their last hundred.
Figures figures_between(const Series& series, std::size_t from, std::size_t to);
/// Steps from `from` until settled; -1 = never.
int settle(const Series& series, std::size_t from, std::size_t to);

/// Calls work(0) … work(count - 1) on all cores; results do not depend on the order.
void in_parallel(std::size_t count, const std::function<void(std::size_t)>& work);

}  // namespace moectl::bench
