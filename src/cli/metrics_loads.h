// `moectl metrics TRACE --loads`: how the loads of single experts are spread, and the most and least loaded ones.
#pragma once

#include <functional>
#include <string>

#include "cli/metrics_counts.h"
#include "moectl/metrics.h"

namespace moectl::cli {

/// Loads of the counts summed over all training records: percentiles over the experts of each layer, and over those of all
/// layers; the `extremes` most and least loaded experts of each, and the pairs that the same tokens choose most. `format`: table, csv or json.
int print_loads(LogReader& reader, Counted& counted,
                const std::function<MetricsOptions(const LogRecord&)>& options_of, std::size_t extremes,
                const std::string& format);

}  // namespace moectl::cli
