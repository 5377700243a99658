// Sums for tests: all that can be collected, and records of counts alone.
#pragma once

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/stats.h"

namespace moectl {

/// All that a record can give, but for the required biases.
inline StatsNeeds every_input(int domains = 2) {
  return {.gap = true,
          .sequences = true,
          .probabilities = true,
          .gradients = true,
          .losses = true,
          .domain_losses = true,
          .latencies = true,
          .margins = true,
          .pairs = true,
          .domains = domains};
}

/// One policy of the biases, and wide limits.
inline ControllerConfig config_of_biases(const std::string& policy, int layers, int experts, int top_k) {
  ControllerConfig config;
  config.model.layers = layers;
  config.model.experts = experts;
  config.model.top_k = top_k;
  config.expert_bias.policy = policy;
  config.expert_bias.limits = {.min = -16, .max = 16, .rate = 1, .center = true};
  return config;
}

/// A micro-batch of which only the counts are known, of as few tokens as they allow.
inline void record_counts(Controller& controller, int layer, const std::vector<std::int64_t>& counts) {
  const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  controller.record_with(
      layer, [&](RoutingStats& sums) { sums.add_counts(counts, (total + sums.top_k() - 1) / sums.top_k()); });
}

}  // namespace moectl
