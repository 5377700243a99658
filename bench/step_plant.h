// A layer whose load answers: what the benchmarks of a step feed, so that the policy decides and nothing is held.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "moectl/stats.h"

namespace moectl::bench {

// A plant: the relative load of an expert rises by 100 a unit of its bias, and scatters as sampling makes it. In each
// step the router wants loads that have moved by `drift`.
class StepPlant {
 public:
  StepPlant(const StatsShape& shape, int layers, double drift)
      : drift_(drift),
        wanted_(static_cast<std::size_t>(layers),
                std::vector<double>(static_cast<std::size_t>(shape.experts), 0.0)),
        sums_(shape) {}

  const RoutingStats& route(int layer, std::span<const double> bias) {
    constexpr double kTokens = 2048, kSlope = 100, kNear = 0.2, kWidth = kNear / kSlope;
    const std::span<std::int64_t> counts = sums_.mutable_array(RoutingStats::kCounts);
    const std::span<std::int64_t> near = sums_.mutable_array(RoutingStats::kGapNear);
    std::vector<double>& wanted = wanted_[static_cast<std::size_t>(layer)];
    double mean = 0;
    for (const double b : bias) mean += b / static_cast<double>(bias.size());
    std::int64_t total = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      wanted[i] = 0.9 * wanted[i] + drift_ * normal_(random_);
      const double load = std::max(0.0, 1 + wanted[i] + kSlope * (bias[i] - mean));
      const double seen = kTokens * load + std::sqrt(kTokens * load) * normal_(random_);
      total += counts[i] = std::llround(std::max(0.0, seen));
      if (!near.empty()) near[i] = std::llround(kNear * seen / sums_.top_k());
    }
    const std::int64_t missing = (sums_.top_k() - total % sums_.top_k()) % sums_.top_k();
    counts[0] += missing;
    const std::int64_t tokens = (total + missing) / sums_.top_k();
    sums_.set_scalar(RoutingStats::kTokens, tokens);
    sums_.set_scalar(RoutingStats::kChoicesSq, tokens * sums_.top_k() * sums_.top_k());
    if (near.empty()) return sums_;  // of a policy that knows no gap
    sums_.set_scalar(RoutingStats::kGapTokens, tokens);
    sums_.set_scalar(RoutingStats::kGapSum, to_fixed(1 / kSlope) * tokens);
    sums_.set_scalar(RoutingStats::kGapWidthSum, to_fixed(kWidth) * tokens);
    return sums_;
  }

 private:
  double drift_;
  std::vector<std::vector<double>> wanted_;
  RoutingStats sums_;
  std::mt19937_64 random_{1};
  std::normal_distribution<double> normal_;
};

}  // namespace moectl::bench
