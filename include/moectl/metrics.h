// Metrics: what the sums of a window say about the balance of a layer. Pure functions of a RoutingStats.
//
// Notation: c_i assignments to expert i before capacity, S = Σ c_i, p_i = c_i / S, N experts, k choices a
// token, T tokens. Logarithms are natural, standard deviations are population (divide by N). With S = 0 every
// metric is absent: "no data" is never 0 and never NaN.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "moectl/stats.h"

namespace moectl {

/// One field a row of the table of metrics. Absent = not defined for this input (no data, N = 1, input not
/// given). `metric_fields()` is the same list by name, with units and formulas.
struct Metrics {
  using Value = std::optional<double>;

  // Load: utilization and imbalance, from counts.
  Value entropy;               ///< -Σ p ln p, nats, [0, ln N].
  Value entropy_normalized;    ///< entropy / ln N, [0, 1]; absent for N = 1.
  Value effective_experts;     ///< exp(entropy), [1, N].
  Value kl_to_uniform;         ///< ln N - entropy, nats.
  Value load_std;              ///< 100 · std(p), percentage points.
  Value load_cv;               ///< N · std(p), [0, √(N-1)].
  Value max_load;              ///< max p.
  Value min_load;              ///< min p.
  Value max_to_mean;           ///< N · max p.
  Value max_vio;               ///< max_to_mean - 1 (MaxVio, arXiv 2408.15664).
  Value gini;                  ///< Σ_ij |p_i - p_j| / (2N), [0, (N-1)/N].
  Value utilization_variance;  ///< variance of c, tokens².
  Value inactive_experts;      ///< experts with c = 0.
  Value inactive_fraction;     ///< that, over N.
  Value dead_experts;          ///< smoothed load long under dead_fraction of the mean; set by the monitor.
  Value hot_experts;           ///< c > capacity_factor · mean.
  Value cold_experts;          ///< c < cold_fraction · mean.
  Value drop_rate;             ///< dropped / S as measured by the router.
  Value predicted_drop_rate;   ///< Σ max(0, c - ⌈capacity_factor · S/N⌉) / S.
  Value straggler_slowdown;    ///< max over devices of load / mean device load, ≥ 1.

  // Floors: what perfectly balanced routing would still show on this many tokens.
  Value noise_floor_cv;          ///< √((N/k - 1)/T): independent tokens.
  Value noise_floor_max_vio;     ///< expected MaxVio at that CV.
  Value sampling_floor_cv;       ///< cluster-robust, from per-sequence sums: real, correlated tokens.
  Value sampling_floor_max_vio;  ///< expected MaxVio at that CV.
  Value excess_cv;               ///< √max(0, load_cv² - floor²): what control can remove.
};

struct MetricsOptions {
  double capacity_factor = 1.25;  ///< > 0; also the threshold of hot_experts.
  double cold_fraction = 0.1;     ///< in [0, 1].
  /// Device of each expert [N], numbered from 0; empty = one expert a device.
  std::vector<int> placement{};
};

/// Name, unit and meaning of one metric, and where it lies in Metrics.
struct MetricField {
  std::string_view name;
  std::string_view unit;
  std::string_view formula;
  Metrics::Value Metrics::*value;
};

/// Every scalar metric, in the order of the table: the names are those of run logs, configs and `moectl
/// metrics`.
std::span<const MetricField> metric_fields();
/// nullptr if there is no metric of that name.
const MetricField* find_metric(std::string_view name);

/// Computes metrics without allocating: holds the scratch space that sorting needs. Not thread-safe; one a
/// thread.
class Measurer {
 public:
  /// Throws std::invalid_argument on options out of range or a placement that is not [N].
  Measurer(const StatsShape& shape, MetricsOptions options);
  /// All metrics of the window. `stats` must have the shape given at construction (std::invalid_argument).
  void measure(const RoutingStats& stats, Metrics& out);

 private:
  void measure_load(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max,
                    std::int64_t sum, Metrics& out);
  void measure_floors(const RoutingStats& stats, std::int64_t sum, Metrics& out);
  double gini(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max, std::int64_t sum);
  double straggler(std::span<const std::int64_t> counts, std::int64_t max, std::int64_t sum);
  double sampling_floor(const RoutingStats& stats, std::int64_t sum) const;

  StatsShape shape_;
  MetricsOptions options_;
  std::vector<std::int64_t> sorted_, swap_;  // of the sort
  std::vector<std::int64_t> device_load_;
  double log_experts_ = 0;              // ln N
  double floor_to_max_vio_linear_ = 0;  // MaxVio of a CV floor f: linear · f + square · f²
  double floor_to_max_vio_square_ = 0;
};

/// Convenience for single use: allocates.
Metrics measure(const RoutingStats& stats, const MetricsOptions& options = {});

/// √((N/k - 1)/T): CV of perfectly balanced routing of T independent tokens. Absent for T ≤ 0.
std::optional<double> noise_floor_cv(int experts, int top_k, double tokens);
/// Expected MaxVio of N experts whose loads scatter with this CV, `f z √(N/(N-1)) + f² (z²-1)/6` with
/// z = Φ⁻¹((N-.375)/(N+.25)) (Blom's score of the largest of N). Absent for N = 1.
std::optional<double> max_vio_of_cv(int experts, double cv);
/// load_cv² - floor², signed, with the sampling floor where known, else the noise floor. Average this, not
/// excess_cv.
std::optional<double> signed_excess_cv_sq(const Metrics& metrics);
/// The sampling floor of MaxVio where known, else the noise floor.
std::optional<double> floor_max_vio(const Metrics& metrics);
/// Φ⁻¹, the standard normal quantile, for 0 < p < 1; absolute error below 1e-12.
double normal_quantile(double p);

}  // namespace moectl
