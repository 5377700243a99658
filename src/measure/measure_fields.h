// The keys of what is collected and measured.
#pragma once

#include "base/fields.h"
#include "moectl/metrics.h"
#include "moectl/stats_shape.h"

namespace moectl {

using enum Shared;

template <>
inline constexpr auto kFieldsOf<MetricsOptions> = std::tuple{
    Field{"capacity_factor", &MetricsOptions::capacity_factor, kRanks, above(0), "mean loads",
          "Load from which an expert overflows (drop metrics), and from which it counts as hot."},
    Field{"cold_fraction",
          &MetricsOptions::cold_fraction,
          kRanks,
          {.low = 0, .high = 1},
          "mean loads",
          "Load below which an expert counts as cold."},
    Field{"details", &MetricsOptions::details, kRanks,
          "Percentiles of the load, and the churn that the next biases make. Off by default: both sort the "
          "experts."},
    Field{"placement", &MetricsOptions::placement, kRanks, at_least(0),
          "Device of each expert, numbered from 0; without it each expert has a device of its own."},
};

template <>
inline constexpr auto kFieldsOf<StatsNeeds> = std::tuple{
    Field{"gap", &StatsNeeds::gap, kRanks, "Gap between the last chosen and the first unchosen score."},
    Field{"sequences", &StatsNeeds::sequences, kRanks, "Counts per sequence, for the sampling floor."},
    Field{"probabilities", &StatsNeeds::probabilities, kRanks,
          "Sums of the gate's probabilities and entropies."},
    Field{"gradients", &StatsNeeds::gradients, kRanks, "Gradient norm of each expert."},
    Field{"losses", &StatsNeeds::losses, kRanks, "Loss of each expert."},
    Field{"domain_losses", &StatsNeeds::domain_losses, kRanks, "Loss of each domain and expert."},
    Field{"latencies", &StatsNeeds::latencies, kRanks, "Latency of each expert."},
    Field{"margins", &StatsNeeds::margins, kRanks, "Histogram of the margins of each expert."},
    Field{"pairs", &StatsNeeds::pairs, kRanks,
          "Tokens that chose both, for every two experts: N (N - 1)/2 sums a layer."},
};

}  // namespace moectl
