// What the experiment programs share: one closed-loop run of a law on the simulated router, and its figures.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "moectl/config.h"
#include "moectl/simulation.h"

namespace moectl::bench {

/// A law under test: a policy of the expert biases with its options.
struct Law {
  std::string name;    ///< As printed.
  std::string policy;  ///< As registered.
  std::vector<std::pair<std::string, OptionValue>> options;
};

/// The series of one run: means over layers, one value a step.
struct Series {
  std::vector<double> max_vio, floor, cv, floor_cv;
  std::vector<double> lowest_load;  ///< Of any expert of layer 0, over the mean load.
  std::vector<double> aux_weight;   ///< Layer 0's.
  std::int64_t limited = 0;         ///< Steps in which a limit acted on layer 0's biases.
};

/// A config with `law` on the biases of the plant. Limits are set wide, so that laws are compared and not
/// limits: range ±16 and rate 1 in units of the plant's score scale (×8 for logits), everything else off.
ControllerConfig config_for(const Law& law, const SimulationOptions& plant);

/// One run of the config on the plant.
Series run(const ControllerConfig& config, const SimulationOptions& plant, std::int64_t steps);

double mean(const std::vector<double>& values, std::size_t first, std::size_t last);
/// Mean MaxVio over mean floor, over [first, last).
double over_floor(const Series& series, std::size_t first, std::size_t last);
/// First step at or after `from` (counted from it) after which the 5-step median of MaxVio stays under 1.6
/// times the mean floor for 20 steps; -1 = never.
int settle(const Series& series, std::size_t from, std::size_t to);
/// Σ over 100 steps from `event` of max(0, MaxVio - mean MaxVio of the run's last 100 steps).
double excess_area(const Series& series, std::size_t event);

/// Calls work(0) … work(count - 1) on all cores; results do not depend on the order.
void in_parallel(std::size_t count, const std::function<void(std::size_t)>& work);

}  // namespace moectl::bench
