// Metrics: measures of the balance of a layer over a window of steps. Pure functions of a RoutingStats.
//
// Notation: c_i assignments to expert i before capacity, S = Σ c_i, p_i = c_i / S, N experts, k choices a token, k_t those
// of token t where they differ (then S = Σ k_t), T tokens. Logarithms are natural, standard deviations are population
// (divide by N). With S = 0 every metric is absent: "no data" is never 0 and never NaN.
//
// Unequal targets. w_i is the target share of expert i. Metrics marked (w) compare each load with its own target; the
// formula given is the one for equal targets, the part behind (w) the one for unequal targets. The other metrics ignore
// targets: they are defined against a uniform load, or are physical quantities. metrics_on_target() gives the values
// that they take on a load that meets its targets exactly; thresholds should be compared with those values.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "moectl/load_targets.h"
#include "moectl/stats.h"

namespace moectl {

/// One field for each metric. Absent = not defined for this input (no data, N = 1, input not given). `metric_fields()`
/// is the same list by name, with units and formulas.
struct Metrics {
  using Value = std::optional<double>;

  // Load: utilization and imbalance, from counts.
  Value entropy;             ///< -Σ p ln p, nats, [0, ln N].
  Value entropy_normalized;  ///< entropy / ln N, [0, 1]; absent for N = 1.
  Value effective_experts;   ///< exp(entropy), [1, N].
  Value kl_to_uniform;       ///< ln N - entropy, nats.
  Value load_std;            ///< 100 · std(p), percentage points.
  Value load_cv;      ///< N · std(p), [0, √(N-1)]; (w) RMS of (relative load - 1) over experts with a
                      ///< target above 0.
  Value max_load;     ///< max p.
  Value min_load;     ///< min p.
  Value max_to_mean;  ///< N · max p; (w) the largest relative load.
  Value max_vio;      ///< max_to_mean - 1 (MaxVio, arXiv 2408.15664).
  Value gini;         ///< Σ_ij |p_i - p_j| / (2N), [0, (N-1)/N].
  Value utilization_variance;  ///< variance of c, tokens².
  Value inactive_experts;      ///< experts with c = 0.
  Value inactive_fraction;     ///< inactive_experts / N.
  Value
      dead_experts;  ///< smoothed load under dead_fraction of the mean, (w) of its target, for dead_after steps;
                     ///< set by the monitor.
  Value hot_experts;   ///< c > capacity_factor · mean, (w) · its target.
  Value cold_experts;  ///< c < cold_fraction · mean, (w) · its target.
  Value drop_rate;     ///< dropped / S as measured by the router.
  Value
      predicted_drop_rate;  ///< Σ max(0, c - ⌈capacity_factor · S/N⌉) / S: the same capacity for every expert.
  Value straggler_slowdown;  ///< max over devices of load / mean device load, ≥ 1.
  Value balancedness;        ///< 1 / straggler_slowdown: mean over largest device load, (0, 1].
  /// N · min p, [0, 1]; (w) the smallest relative load, over experts with a target above 0.
  Value minority_share;
  /// RMS over sequences of the CV in each, weighted by their assignments²: √(N Σ_ij c_ji² / Σ_j n_j² - 1).
  Value sequence_cv;
  // Percentiles over experts of N p, (w) the relative load; with MetricsOptions::details.
  Value load_p5, load_p25, load_p50, load_p75, load_p95;

  // Floors: the value that perfectly balanced routing would still show on this number of tokens.
  /// For independent tokens: √((N/k - 1)/T), (w) √(mean of (1/(k w) - 1)/T over experts with a target above 0). Where
  /// tokens choose k_t experts, with k = Σ k_t²/S and T = S/k: √(N/S - Σ k_t²/S²).
  Value noise_floor_cv;
  Value noise_floor_max_vio;     ///< expected MaxVio at that CV.
  Value sampling_floor_cv;       ///< cluster-robust, from per-sequence sums: real, correlated tokens.
  Value sampling_floor_max_vio;  ///< expected MaxVio at that CV.
  Value excess_cv;               ///< √max(0, load_cv² - floor²): the part that control can remove.
  Value max_vio_global;  ///< max_vio of counts summed over a window of steps; set by the code that sums them.

  // Routing distribution, from router probabilities; slopes and variance set by the monitor.
  Value token_entropy;             ///< mean_t H(p_t), nats: how undecided the router is on each token.
  Value router_entropy;            ///< H(mean_t p_t), nats.
  Value expert_token_information;  ///< router_entropy - token_entropy, nats: mutual information.
  Value token_entropy_slope;       ///< of token_entropy, per step, over the trend window.
  Value entropy_slope;             ///< of entropy, per step, over the trend window.
  Value balance_loss;              ///< N Σ f_i P_i as the router reports it, mean over micro-batches.
  Value z_loss;  ///< mean (logsumexp z)² as the router reports it, mean over micro-batches.
  /// mean |cos| between the router's weights of two experts, as the host reports it.
  Value router_similarity;
  Value router_condition;    ///< largest over smallest singular value of the router's weights, likewise.
  Value expert_output_norm;  ///< mean norm of an expert's output, likewise.
  Value gradient_ratio;      ///< norm of the balance loss's gradient over that of the task's, likewise.
  /// Estimated share of tokens whose top-k changes under the next biases, from a sample of the gaps (estimate_churn); set
  /// by the controller with MetricsOptions::details, and by the code that knows two biases.
  Value churn;
  Value pair_lift;         ///< Largest lift of two experts (ExpertPair), of those that meet often enough.
  Value importance_cv;     ///< CV of Σ_t p_ti.
  Value routing_variance;  ///< variance of p_i over the steps of the trend window, mean over experts.

  // Geometry of the simplex: Fisher metrics. `fsi` follows the equation reported for the index of that name in arXiv
  // 2604.14500. The paper's FHS formula is not known to this project: `fhs` is the project's own statistic with the
  // same threshold. The paper's AUC and its recovery rate are not claimed for `fhs`.
  Value fsi;      ///< Fisher–Rao distance of the load to uniform: 2 arccos Σ √(p_i/N), [0, fsi_max].
  Value fsi_max;  ///< 2 arccos(1/√N).
  Value
      fhs;  ///< B / W (Displacement, with k = S/T): token-independent over token-dependent preference, [0, 1e12].
  /// 1 if fhs > 1 and B exceeds the scatter of the floor, else 0; (w) B measured from the targets must exceed that too,
  /// and a quarter of the targets' own B.
  Value fhs_alarm;
  Value router_fsi;       ///< fsi of the mean router probabilities.
  Value router_fhs;       ///< fhs of the router probabilities.
  Value path_efficiency;  ///< d(first, last) / Σ d(consecutive) of loads over the trend window: 1 = steady
                          ///< drift.

  // Learning dynamics and expert health, from optional inputs.
  Value grad_norm_variance;  ///< over experts.
  Value domain_information;  ///< Σ_d w_d KL(p_d || p), nats: mutual information of expert and domain.
  Value domain_exclusivity;  ///< domain_information / H(w), [0, 1]: 1 = every expert serves one domain alone.
  Value stagnant_experts;  ///< experts with tokens, but without gradient or falling loss; set by the monitor.

  // Serving, from latencies; percentiles over experts.
  Value latency_p50;       ///< seconds.
  Value latency_p95;       ///< seconds.
  Value latency_p99;       ///< seconds.
  Value tail_sensitivity;  ///< slope of the slowest expert's latency over N · max p; set by the monitor.
  Value tail_correlation;  ///< correlation of the two; set by the monitor.

  // Time; set by the monitor.
  Value load_autocorrelation;  ///< of successive deviations of the load from its average, smoothed, [-1, 1].
  Value oscillation;  ///< smoothed share of experts whose deviation changed sign, [0, 1]; white noise: ½.
  Value swing;        ///< strongest anticorrelation over lags 1 … 8, smoothed, [0, 1].
  Value shift;        ///< change-point statistic of the load vector, in units of its threshold.
};

struct MetricsOptions {
  double capacity_factor = 1.25;  ///< > 0; also the threshold of hot_experts.
  double cold_fraction = 0.1;     ///< in [0, 1].
  /// Percentiles of the load, and churn: they sort, so they are computed only where they are asked for.
  bool details = false;
  /// Device of each expert [N], numbered from 0; empty = one expert a device.
  std::vector<int> placement{};
  /// Wanted share of the load of each expert [N], in [0, 1], summing to 1; empty = equal.
  std::vector<double> targets{};
  friend bool operator==(const MetricsOptions&, const MetricsOptions&) = default;
};

/// Name, unit and formula of one metric, and its member of Metrics.
struct MetricField {
  std::string_view name;
  std::string_view unit;
  std::string_view formula;
  Metrics::Value Metrics::*value;
  /// It follows from the experts' loads, which biases bring to balance whatever its set-point is.
  bool of_load = false;
};

/// Every scalar metric, in the order of the table: the names are those of run logs, configs and `moectl metrics`.
std::span<const MetricField> metric_fields();
/// nullptr if there is no metric of that name.
const MetricField* find_metric(std::string_view name);

/// A value for each expert. `values` fills `out` [N] from the sums and returns true, or returns false if the input was
/// not given; NaN marks an expert without data.
struct ExpertField {
  std::string_view name;
  std::string_view unit;
  std::string_view formula;
  bool (*values)(const RoutingStats& stats, std::span<double> out);
};
std::span<const ExpertField> expert_fields();

/// Two experts and the tokens that chose both. Lift: those tokens over what independent choices would give,
/// `c_ij T / (c_i c_j)`.
struct ExpertPair {
  int first = 0, second = 0;  ///< first < second.
  std::int64_t tokens = 0;
  double lift = 0;
};
/// Fills `out` with at most `most` pairs, those with the largest lift, the largest first; of equal ones the one with more
/// tokens. Pairs of which fewer than ten tokens are expected are left out: their lift is chance. None without has_pairs(),
/// or at k = 1. Allocates only until `out` has held as many.
void paired_experts(const RoutingStats& stats, std::size_t most, std::vector<ExpertPair>& out);
/// The lift of the first of them, without allocating.
std::optional<double> largest_pair_lift(const RoutingStats& stats);

/// A value for each (domain, expert). `values` fills `out` [N] for one domain, as in ExpertField.
struct DomainField {
  std::string_view name;
  std::string_view unit;
  std::string_view formula;
  bool (*values)(const RoutingStats& stats, int domain, std::span<double> out);
};
std::span<const DomainField> domain_fields();

/// The two parts of the Fisher metrics of N experts, in squared Hellinger distance.
struct Displacement {
  double bias = 0;    ///< B = ½ Σ (√p̄_i - √(1/N))²: the preference that all tokens share.
  double within = 0;  ///< W = 1 - Σ r_i √p̄_i: the part that differs between tokens.
};
/// From mean probabilities p̄ and mean roots r_i = mean_t √p_ti, both [N].
Displacement displacement(std::span<const double> mean, std::span<const double> mean_root);
/// 4 asin √(B/2): Fisher–Rao distance to uniform.
double fisher_distance(const Displacement& displacement);
/// B / W; 1e12 where only W vanishes, absent where both do or N = 1.
std::optional<double> fisher_ratio(const Displacement& displacement, int experts);
/// 4 asin(‖√p - √q‖ / 2): Fisher–Rao distance between two loads [N].
double fisher_distance(std::span<const double> p, std::span<const double> q);

/// Computes metrics without allocating: holds the scratch space that sorting needs. Not thread-safe; one a thread.
class Measurer {
 public:
  /// Throws std::invalid_argument on options out of range or a placement that is not [N].
  Measurer(const StatsShape& shape, MetricsOptions options);
  /// All metrics of the window. `stats` must have the shape given at construction (std::invalid_argument).
  void measure(const RoutingStats& stats, Metrics& out);

 private:
  void measure_load(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max,
                    std::int64_t sum, double choices, Metrics& out);
  void measure_against_targets(std::span<const std::int64_t> counts, std::int64_t sum, Metrics& out);
  void measure_floors(const RoutingStats& stats, std::int64_t sum, Metrics& out);
  void measure_router(const RoutingStats& stats, Metrics& out);
  void measure_experts(const RoutingStats& stats, Metrics& out);
  void measure_details(std::span<const std::int64_t> counts, std::int64_t sum, Metrics& out);
  double gini(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max, std::int64_t sum);
  double gini_by_rank(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max,
                      std::int64_t sum);
  double straggler(std::span<const std::int64_t> counts, std::int64_t max, std::int64_t sum);
  double sampling_floor(const RoutingStats& stats, std::int64_t sum) const;

  StatsShape shape_;
  MetricsOptions options_;
  LoadTargets targets_;
  std::vector<std::int64_t> histogram_;      // of counts that lie close together
  std::vector<std::int64_t> sorted_, swap_;  // of the sort
  std::vector<std::int64_t> device_load_;
  std::vector<double> mean_, mean_root_;  // of probabilities; of an expert's gradients or latencies
  Displacement load_displacement_;        // of the last load
  double target_displacement_ = 0;        // B of the last load against its targets
  double target_bias_ = 0;                // B of the targets
  double log_experts_ = 0;                // ln N
  double unit_floor_cv_ = 0;              // noise_floor_cv of one token
  double inverse_target_ = 0;             // mean of 1/w over experts with a target above 0
  double floor_to_max_vio_linear_ = 0;    // MaxVio of a CV floor f: linear · f + square · f²
  double floor_to_max_vio_square_ = 0;
};

/// Convenience for single use: allocates.
Metrics measure(const RoutingStats& stats, const MetricsOptions& options = {});

/// The metrics of a load that meets its targets exactly, p = w: entropies, kl_to_uniform, load_std, largest and
/// smallest load, gini, inactive experts and straggler_slowdown; load_cv and max_vio are 0. Other metrics are absent.
Metrics metrics_on_target(const StatsShape& shape, const MetricsOptions& options);

/// The share of tokens whose top-k would change if the biases [N] moved by `change` [N], in units of the scores: an
/// estimate, from the sample of tokens whose gap is near (RoutingStats::set_gap_width), which takes the last chosen and the
/// first unchosen expert as independent. Small moves are what it is for: with larger ones it is a little low.
/// Absent if the sample is not known, or has all its gaps at one expert. `scratch` is resized to N: given again, nothing
/// is allocated. Throws std::invalid_argument on another number of changes.
std::optional<double> estimate_churn(const RoutingStats& stats, std::span<const double> change,
                                     std::vector<std::pair<double, double>>& scratch);

/// √((N/k - 1)/T): CV of perfectly balanced routing of T independent tokens. Absent for T ≤ 0.
std::optional<double> noise_floor_cv(int experts, int top_k, double tokens);
/// The same for experts with these targets, as metric noise_floor_cv (w).
std::optional<double> noise_floor_cv(const LoadTargets& targets, int top_k, double tokens);
/// Expected MaxVio of N experts whose loads scatter with CV f: `f z √(N/(N-1)) + f² (z²-1)/6`, where
/// z = Φ⁻¹((N - 0.375)/(N + 0.25)) is Blom's score of the largest of N. Absent for N = 1.
std::optional<double> max_vio_of_cv(int experts, double cv);
/// Expected MaxVio at noise_floor_cv. Absent for T ≤ 0 or N = 1.
std::optional<double> noise_floor_max_vio(const LoadTargets& targets, int top_k, double tokens);
/// load_cv² - floor², signed, with the sampling floor where known, else the noise floor. Average this value rather than
/// excess_cv, whose cut at 0 biases an average upwards.
std::optional<double> signed_excess_cv_sq(const Metrics& metrics);
/// The floor that a load is judged by.
struct FloorInForce {
  std::optional<double> cv, max_vio;
  bool sampling = false;  ///< The sampling floor; else the noise floor.
  std::string_view name() const { return sampling ? "sampling floor" : "noise floor"; }
};
/// The sampling floor where known, else the noise floor.
FloorInForce floor_of(const Metrics& metrics);
/// Φ⁻¹, the standard normal quantile, for 0 < p < 1; absolute error below 1e-12.
double normal_quantile(double p);

}  // namespace moectl
