#include "moectl/metrics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/fast_log.h"
#include "measure/floors.h"
#include "measure/measure_fields.h"

namespace moectl {
namespace {

__extension__ using Wide = __int128;

constexpr bool kOfLoad = true;

constexpr MetricField kFields[] = {
    {"entropy", "nats", "-sum p ln p", &Metrics::entropy, kOfLoad},
    {"entropy_normalized", "", "entropy / ln N", &Metrics::entropy_normalized, kOfLoad},
    {"effective_experts", "experts", "exp(entropy)", &Metrics::effective_experts, kOfLoad},
    {"kl_to_uniform", "nats", "ln N - entropy", &Metrics::kl_to_uniform, kOfLoad},
    {"load_std", "percentage points", "100 std(p)", &Metrics::load_std, kOfLoad},
    {"load_cv", "", "N std(p); with targets rms(c / (w S) - 1)", &Metrics::load_cv, kOfLoad},
    {"max_load", "", "max p", &Metrics::max_load, kOfLoad},
    {"min_load", "", "min p", &Metrics::min_load, kOfLoad},
    {"max_to_mean", "", "N max p; with targets max c / (w S)", &Metrics::max_to_mean, kOfLoad},
    {"max_vio", "", "max_to_mean - 1", &Metrics::max_vio, kOfLoad},
    {"gini", "", "sum_ij |p_i - p_j| / (2N)", &Metrics::gini, kOfLoad},
    {"utilization_variance", "tokens^2", "var(c)", &Metrics::utilization_variance, kOfLoad},
    {"inactive_experts", "experts", "#(c = 0)", &Metrics::inactive_experts, kOfLoad},
    {"inactive_fraction", "", "#(c = 0) / N", &Metrics::inactive_fraction, kOfLoad},
    {"dead_experts", "experts",
     "#(smoothed p < dead_fraction w for dead_after steps), w = 1/N without targets", &Metrics::dead_experts,
     kOfLoad},
    {"hot_experts", "experts", "#(c > capacity_factor w S), w = 1/N without targets", &Metrics::hot_experts,
     kOfLoad},
    {"cold_experts", "experts", "#(c < cold_fraction w S), w = 1/N without targets", &Metrics::cold_experts,
     kOfLoad},
    {"drop_rate", "", "dropped / S", &Metrics::drop_rate, kOfLoad},
    {"predicted_drop_rate", "", "sum max(0, c - ceil(capacity_factor S/N)) / S",
     &Metrics::predicted_drop_rate, kOfLoad},
    {"straggler_slowdown", "", "max device load / mean device load", &Metrics::straggler_slowdown, kOfLoad},
    {"balancedness", "", "mean device load / max device load", &Metrics::balancedness, kOfLoad},
    {"minority_share", "", "N min p; with targets min c / (w S)", &Metrics::minority_share, kOfLoad},
    {"sequence_cv", "", "sqrt(N sum_ij c_ji^2 / sum_j n_j^2 - 1), c_ji and n_j of sequence j",
     &Metrics::sequence_cv},
    {"load_p5", "mean loads", "5th percentile over experts of N p; with targets of c / (w S)",
     &Metrics::load_p5, kOfLoad},
    {"load_p25", "mean loads", "25th percentile over experts, likewise", &Metrics::load_p25, kOfLoad},
    {"load_p50", "mean loads", "median over experts, likewise", &Metrics::load_p50, kOfLoad},
    {"load_p75", "mean loads", "75th percentile over experts, likewise", &Metrics::load_p75, kOfLoad},
    {"load_p95", "mean loads", "95th percentile over experts, likewise", &Metrics::load_p95, kOfLoad},
    {"noise_floor_cv", "",
     "sqrt((N/k - 1) / T); with targets sqrt(mean(1/(k w) - 1) / T); where tokens choose k_t experts, k = "
     "sum "
     "k_t^2 / S and T = S / k",
     &Metrics::noise_floor_cv},
    {"noise_floor_max_vio", "", "max_vio expected at noise_floor_cv", &Metrics::noise_floor_max_vio},
    {"sampling_floor_cv", "", "sqrt(mean_i var_i) / (S/N), var_i between sequences",
     &Metrics::sampling_floor_cv},
    {"sampling_floor_max_vio", "", "max_vio expected at sampling_floor_cv", &Metrics::sampling_floor_max_vio},
    {"excess_cv", "", "sqrt(max(0, load_cv^2 - floor^2))", &Metrics::excess_cv, kOfLoad},
    {"max_vio_global", "", "max_vio of counts summed over a window", &Metrics::max_vio_global, kOfLoad},
    {"token_entropy", "nats", "mean_t H(p_t)", &Metrics::token_entropy},
    {"router_entropy", "nats", "H(mean_t p_t)", &Metrics::router_entropy},
    {"expert_token_information", "nats", "router_entropy - token_entropy",
     &Metrics::expert_token_information},
    {"token_entropy_slope", "nats/step", "slope over the trend window", &Metrics::token_entropy_slope},
    {"entropy_slope", "nats/step", "slope over the trend window", &Metrics::entropy_slope},
    {"balance_loss", "", "N Σ f_i P_i as the router reports it, mean over micro-batches",
     &Metrics::balance_loss},
    {"z_loss", "", "mean (logsumexp z)² as the router reports it, mean over micro-batches", &Metrics::z_loss},
    {"router_similarity", "",
     "mean |cos| between the router's weights of two experts, as the host reports it",
     &Metrics::router_similarity},
    {"router_condition", "",
     "largest / smallest singular value of the router's weights, as the host reports it",
     &Metrics::router_condition},
    {"expert_output_norm", "", "mean norm of an expert's output, as the host reports it",
     &Metrics::expert_output_norm},
    {"gradient_ratio", "", "gradient norm of the balance loss / of the task's loss, as the host reports it",
     &Metrics::gradient_ratio},
    {"churn", "", "share of tokens whose top-k changes under the next biases: an estimate from sampled gaps",
     &Metrics::churn},
    {"pair_lift", "", "max over pairs of c_ij T / (c_i c_j), of which c_i c_j / T is at least 10",
     &Metrics::pair_lift},
    {"importance_cv", "", "CV of sum_t p_ti", &Metrics::importance_cv},
    {"routing_variance", "", "mean_i var_t p_i over the trend window", &Metrics::routing_variance},
    {"fsi", "rad", "4 asin sqrt(B/2), B = sum (sqrt(p) - sqrt(1/N))^2 / 2", &Metrics::fsi, kOfLoad},
    {"fsi_max", "rad", "2 arccos(1 / sqrt(N))", &Metrics::fsi_max},
    {"fhs", "", "B / W, W = 1 - sqrt(S/T) sum p^1.5 (this project's own statistic)", &Metrics::fhs, kOfLoad},
    {"fhs_alarm", "",
     "fhs > 1 and B > f^2/8 (1 + 3 sqrt(2/(N-1))), f the floor's CV; with targets also B against them",
     &Metrics::fhs_alarm, kOfLoad},
    {"router_fsi", "rad", "fsi of mean_t p_t", &Metrics::router_fsi},
    {"router_fhs", "", "fhs of p_t (this project's own statistic)", &Metrics::router_fhs},
    {"path_efficiency", "", "d(first, last) / sum d(consecutive) over the trend window",
     &Metrics::path_efficiency},
    {"grad_norm_variance", "", "var_i grad_norm", &Metrics::grad_norm_variance},
    {"domain_information", "nats", "sum_d w_d KL(p_d || p)", &Metrics::domain_information},
    {"domain_exclusivity", "", "domain_information / H(w)", &Metrics::domain_exclusivity},
    {"stagnant_experts", "experts", "#(tokens, loss not falling, grad_norm far under the median)",
     &Metrics::stagnant_experts},
    {"latency_p50", "s", "median over experts", &Metrics::latency_p50},
    {"latency_p95", "s", "95th percentile over experts", &Metrics::latency_p95},
    {"latency_p99", "s", "99th percentile over experts", &Metrics::latency_p99},
    {"tail_sensitivity", "s", "slope of max latency on N max p", &Metrics::tail_sensitivity},
    {"tail_correlation", "", "correlation of max latency and N max p", &Metrics::tail_correlation},
    {"load_autocorrelation", "", "EMA of <e_t, e_t-1> / (|e_t| |e_t-1|), e = p - EMA(p)",
     &Metrics::load_autocorrelation},
    {"oscillation", "", "EMA of the share of experts whose e changed sign", &Metrics::oscillation},
    {"swing", "",
     "largest of -a_l and (1 - 1/P) (a_P - mean of a_1 ... a_P-1), a_l the EMA of the lagged correlation of "
     "e",
     &Metrics::swing},
    {"shift", "", "change of the mean load between halves of the window, over its threshold",
     &Metrics::shift},
};

// Counts that lie within this many times N of each other are ranked by a histogram.
constexpr std::size_t kBinsPerExpert = 4;

// Results of one pass over the counts.
struct Totals {
  std::int64_t min, max, sum;
  bool usable;  // no negative count, no overflow
};

Totals total(std::span<const std::int64_t> counts) {
  Totals t{counts[0], counts[0], 0, true};
  std::uint64_t sum = 0;
  std::int64_t signs = 0;
  for (const std::int64_t c : counts) {
    t.min = std::min(t.min, c);
    t.max = std::max(t.max, c);
    sum += static_cast<std::uint64_t>(c);
    signs |=
        static_cast<std::int64_t>(sum);  // the first overflow of a sum of non-negative numbers shows here
  }
  t.sum = static_cast<std::int64_t>(sum);
  t.usable = t.min >= 0 && signs >= 0;
  return t;
}

// Sums of one pass in floating point, eight experts at a time.
struct Sums {
  double root_sq;       // Σ (√q - 1)²
  double q_root_q;      // Σ q √q
  double q_ln_q;        // q = c / mean
  double deviation_sq;  // (c - mean)²
  double inactive, hot, cold;
};

struct Thresholds {
  double hot, cold;
};

// kSmall: every count is under 2^52, so that it converts to double in the vector unit.
template <bool kSmall>
Sums sums_over(std::span<const std::int64_t> counts, const Totals& t, const Thresholds& at_mean) {
  const double n = static_cast<double>(counts.size());
  const double per_mean = n / static_cast<double>(t.sum);
  // Deviations are taken from the smallest count: exact where counts are huge and nearly equal.
  const Wide above_base =
      static_cast<Wide>(t.sum) - static_cast<Wide>(t.min) * static_cast<Wide>(counts.size());
  const double mean = static_cast<double>(above_base) / n;
  constexpr double kTiny = 1e-300;  // added to q it changes nothing but 0, so that 0 ln 0 = 0
  Double8 root_sq = splat(0), q_root_q = splat(0), q_ln_q = splat(0), deviation_sq = splat(0);
  Double8 inactive = splat(0), hot = splat(0), cold = splat(0);
  for_each_eight(counts.size(), [&](std::size_t i, auto at) {
    Double8 c, above;
    if constexpr (kSmall) {
      c = to_double(at.get_int(&counts[i]));
      above = c - static_cast<double>(t.min);
    } else {
      const Int8 whole = at.get_int(&counts[i]);
      c = whole.cast<double>();
      above = (whole - t.min).cast<double>();
    }
    const Double8 q = c * per_mean, root = q.sqrt();
    root_sq += at.keep((root - 1.0) * (root - 1.0));
    q_root_q += q * root;
    q_ln_q += q * fast_log(q + kTiny);
    deviation_sq += at.keep((above - mean) * (above - mean));
    inactive += at.keep(equal(c, splat(0)));
    hot += at.keep(less(splat(at_mean.hot), c));
    cold += at.keep(less(c, splat(at_mean.cold)));
  });
  return {sum_of(root_sq),  sum_of(q_root_q), sum_of(q_ln_q), sum_of(deviation_sq),
          sum_of(inactive), sum_of(hot),      sum_of(cold)};
}

std::int64_t predicted_drops(std::span<const std::int64_t> counts, const Totals& t, double capacity_factor) {
  const double capacity =
      std::ceil(capacity_factor * static_cast<double>(t.sum) / static_cast<double>(counts.size()));
  if (capacity >= static_cast<double>(t.max)) return 0;
  const auto whole = static_cast<std::int64_t>(capacity);
  std::int64_t drops = 0;
  for (const std::int64_t c : counts) drops += std::max<std::int64_t>(0, c - whole);
  return drops;
}

void check(const StatsShape& shape, const MetricsOptions& options) {
  if (const auto problem = check_fields(options)) throw std::invalid_argument(text_of(problem));
  if (!options.placement.empty() && options.placement.size() != static_cast<std::size_t>(shape.experts)) {
    throw std::invalid_argument("placement: " + std::to_string(options.placement.size()) +
                                " devices: must name one for each of " + std::to_string(shape.experts) +
                                " experts");
  }
  for (const int device : options.placement) {
    if (device < 0 || device >= shape.experts) {
      throw std::invalid_argument("placement: " + std::to_string(device) + ": must be 0 to " +
                                  std::to_string(shape.experts - 1));
    }
  }
}

}  // namespace

std::span<const MetricField> metric_fields() {
  return kFields;
}

const MetricField* find_metric(std::string_view name) {
  for (const MetricField& field : kFields) {
    if (field.name == name) return &field;
  }
  return nullptr;
}

Measurer::Measurer(const StatsShape& shape, MetricsOptions options)
    : shape_(shape), options_(std::move(options)), targets_(shape.experts, options_.targets) {
  [[maybe_unused]] const RoutingStats checks_the_shape(shape);
  check(shape_, options_);
  sorted_.resize(static_cast<std::size_t>(shape.experts));
  histogram_.resize(kBinsPerExpert * sorted_.size());
  swap_.resize(sorted_.size());
  if (shape.needs.probabilities || shape.needs.gradients || shape.needs.latencies || options_.details) {
    mean_.resize(sorted_.size());
    mean_root_.resize(sorted_.size());
  }
  if (!options_.placement.empty()) {
    device_load_.resize(
        static_cast<std::size_t>(*std::max_element(options_.placement.begin(), options_.placement.end())) +
        1);
  }
  if (targets_.equal()) inverse_target_ = shape.experts;
  const Floors floors = floors_of(targets_, shape.top_k);
  unit_floor_cv_ = floors.unit_cv;
  floor_to_max_vio_linear_ = floors.linear;
  floor_to_max_vio_square_ = floors.square;
  for (const double w : targets_.shares()) {
    const double apart = std::sqrt(w) - std::sqrt(1.0 / shape.experts);
    target_bias_ += apart * apart / 2;
    if (w > 0) inverse_target_ += 1 / (w * targets_.wanted());
  }
  log_experts_ = fast_log(splat(static_cast<double>(shape.experts)))[0];
}

void Measurer::measure(const RoutingStats& stats, Metrics& out) {
  if (!(stats.shape() == shape_))
    throw std::invalid_argument("stats: shape differs from the measurer's: must be equal");
  out = Metrics{};
  const std::span<const std::int64_t> counts = stats.counts();
  const Totals t = total(counts);
  if (!t.usable || t.sum == 0) return;
  measure_load(counts, t.min, t.max, t.sum, stats.mean_choices(), out);
  if (!targets_.equal()) measure_against_targets(counts, t.sum, out);
  if (const auto dropped = stats.dropped()) out.drop_rate = *dropped / static_cast<double>(t.sum);
  using S = RoutingStats;
  out.balance_loss = stats.balance_loss();
  out.z_loss = stats.z_loss();
  out.router_similarity = stats.mean_of(S::kRouterSimilaritySum, S::kRouterSimilarityRecords);
  out.router_condition = stats.mean_of(S::kRouterConditionSum, S::kRouterConditionRecords);
  out.expert_output_norm = stats.mean_of(S::kExpertOutputNormSum, S::kExpertOutputNormRecords);
  out.gradient_ratio = stats.mean_of(S::kGradientRatioSum, S::kGradientRatioRecords);
  if (options_.details) measure_details(counts, t.sum, out);
  measure_floors(stats, t.sum, out);
  measure_router(stats, out);
  measure_experts(stats, out);
}

void Measurer::measure_load(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max,
                            std::int64_t sum, double choices, Metrics& out) {
  const Totals t{min, max, sum, true};
  const double n = shape_.experts, s = static_cast<double>(sum), mean = s / n;
  const Thresholds at{options_.capacity_factor * mean, options_.cold_fraction * mean};
  const Sums sums =
      max < (std::int64_t{1} << 52) ? sums_over<true>(counts, t, at) : sums_over<false>(counts, t, at);

  // Σ p ln(N p), the distance from uniform, and the entropy from it; clipped where rounding would leave the range.
  const double ln_n = log_experts_;
  const double kl = sums.inactive == shape_.experts - 1 ? ln_n : std::clamp(sums.q_ln_q / n, 0.0, ln_n);
  out.kl_to_uniform = kl;
  out.entropy = ln_n - kl;
  if (shape_.experts > 1) out.entropy_normalized = (ln_n - kl) / ln_n;
  out.effective_experts = std::clamp(std::exp(ln_n - kl), 1.0, n);

  const double variance = sums.deviation_sq / n;
  out.utilization_variance = variance;
  out.load_cv = std::sqrt(variance) / mean;
  out.load_std = 100 * std::sqrt(variance) / s;

  out.max_load = static_cast<double>(max) / s;
  out.min_load = static_cast<double>(min) / s;
  out.max_to_mean = static_cast<double>(max) / mean;
  out.max_vio = *out.max_to_mean - 1;
  out.gini = gini(counts, min, max, sum);

  out.inactive_experts = sums.inactive;
  out.inactive_fraction = sums.inactive / n;
  out.hot_experts = sums.hot;
  out.cold_experts = sums.cold;
  out.predicted_drop_rate = static_cast<double>(predicted_drops(counts, t, options_.capacity_factor)) / s;
  out.straggler_slowdown = straggler(counts, max, sum);
  out.balancedness = 1 / *out.straggler_slowdown;
  out.minority_share = static_cast<double>(min) / mean;

  // With √p = √q / √N: B = ½ Σ (√q - 1)² / N; hard choices of equal weight give W = 1 - √k Σ p^1.5. If tokens choose
  // different numbers, k is their mean S/T: an expert has at most one assignment of each token, so p ≤ T/S and W ≥ 0,
  // and W = 0 still means that all tokens choose alike.
  load_displacement_ = {sums.root_sq / (2 * n), 1 - std::sqrt(choices / n) * sums.q_root_q / n};
  out.fsi = fisher_distance(load_displacement_);
  out.fsi_max = 2 * std::acos(1 / std::sqrt(n));
  out.fhs = fisher_ratio(load_displacement_, shape_.experts);
}

void Measurer::measure_against_targets(std::span<const std::int64_t> counts, std::int64_t sum, Metrics& out) {
  const auto s = static_cast<double>(sum);
  double largest = 0, smallest = std::numeric_limits<double>::infinity(), squares = 0, roots = 0;
  std::int64_t hot = 0, cold = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const auto c = static_cast<double>(counts[i]);
    const double wanted = targets_.load(i, s), relative = targets_.relative(i, c, s);
    const double root = std::sqrt(c / s) - std::sqrt(wanted / s);
    largest = std::max(largest, relative);
    if (targets_.is_wanted(i)) smallest = std::min(smallest, relative);
    squares += (relative - 1) * (relative - 1);
    roots += root * root;
    hot += c > options_.capacity_factor * wanted ? 1 : 0;
    cold += c < options_.cold_fraction * wanted ? 1 : 0;
  }
  out.load_cv = std::sqrt(squares / targets_.wanted());
  out.max_to_mean = largest;
  out.max_vio = largest - 1;
  out.minority_share = smallest;
  out.hot_experts = static_cast<double>(hot);
  out.cold_experts = static_cast<double>(cold);
  target_displacement_ = roots / 2;
}

double Measurer::straggler(std::span<const std::int64_t> counts, std::int64_t max, std::int64_t sum) {
  if (options_.placement.empty()) return static_cast<double>(max) * shape_.experts / static_cast<double>(sum);
  std::fill(device_load_.begin(), device_load_.end(), 0);
  for (std::size_t i = 0; i < counts.size(); ++i) {
    device_load_[static_cast<std::size_t>(options_.placement[i])] += counts[i];
  }
  return static_cast<double>(*std::max_element(device_load_.begin(), device_load_.end())) *
         static_cast<double>(device_load_.size()) / static_cast<double>(sum);
}

// Exact in integers, and linear. Where counts lie close together, Σ_ij |c_i - c_j| = 2 Σ_v F(v) (N - F(v)), F(v)
// the number of counts up to v, from a histogram.
double Measurer::gini(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max,
                      std::int64_t sum) {
  const auto range = static_cast<std::uint64_t>(max - min);
  if (range == 0) return 0;
  if (range >= histogram_.size()) return gini_by_rank(counts, min, max, sum);
  std::fill_n(histogram_.begin(), range + 1, 0);
  for (const std::int64_t c : counts) ++histogram_[static_cast<std::uint64_t>(c - min)];
  const auto n = static_cast<std::int64_t>(counts.size());
  std::int64_t up_to = 0, pairs = 0;
  for (std::uint64_t v = 0; v < range; ++v) {
    up_to += histogram_[v];
    pairs += up_to * (n - up_to);
  }
  return static_cast<double>(pairs) / (static_cast<double>(n) * static_cast<double>(sum));
}

// With counts ascending, Σ_ij |c_i - c_j| = 2 Σ_r (2r - N + 1) c_(r), r = 0…N-1. Ranks come from a radix sort, least
// significant digit first, of c - min; the last pass moves nothing, because the sum needs only each expert's rank. A pass
// reads all values of its digit as well as all counts, so a digit has no more values than twice the experts.
double Measurer::gini_by_rank(std::span<const std::int64_t> counts, std::int64_t min, std::int64_t max,
                              std::int64_t sum) {
  const int bits = static_cast<int>(std::bit_width(static_cast<std::uint64_t>(max - min)));
  constexpr int kMaxDigit = 11;
  const int widest = std::min(kMaxDigit, static_cast<int>(std::bit_width(counts.size())));
  const int passes = (bits + widest - 1) / widest;
  const int digit = (bits + passes - 1) / passes;
  const std::uint64_t mask = (std::uint64_t{1} << digit) - 1;
  const auto n = static_cast<std::int64_t>(counts.size());

  std::uint32_t place[1 << kMaxDigit];
  const std::int64_t* from = counts.data();
  std::int64_t* to = sorted_.data();
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = pass * digit;
    const auto key = [&](std::int64_t c) { return (static_cast<std::uint64_t>(c - min) >> shift) & mask; };
    std::fill_n(place, mask + 1, 0);
    for (std::size_t i = 0; i < counts.size(); ++i) ++place[key(from[i])];
    std::uint32_t before = 0;
    for (std::uint64_t d = 0; d <= mask; ++d) before += std::exchange(place[d], before);
    if (pass + 1 < passes) {
      for (std::size_t i = 0; i < counts.size(); ++i) to[place[key(from[i])]++] = from[i];
      from = to;
      to = to == sorted_.data() ? swap_.data() : sorted_.data();
      continue;
    }
    // |2r - N + 1| < N: the sum stays under N S.
    if (sum < (std::int64_t{1} << 62) / n) {
      std::int64_t ranked = 0;
      for (std::size_t i = 0; i < counts.size(); ++i)
        ranked += (2 * std::int64_t{place[key(from[i])]++} - n + 1) * from[i];
      return static_cast<double>(ranked) / static_cast<double>(n * sum);
    }
    Wide ranked = 0;
    for (std::size_t i = 0; i < counts.size(); ++i) {
      ranked += static_cast<Wide>(2 * std::int64_t{place[key(from[i])]++} - n + 1) * from[i];
    }
    return static_cast<double>(ranked) / static_cast<double>(static_cast<Wide>(n) * sum);
  }
  return 0;
}

void Measurer::measure_floors(const RoutingStats& stats, std::int64_t sum, Metrics& out) {
  const auto max_vio = [this](double cv) {
    return Floors{unit_floor_cv_, floor_to_max_vio_linear_, floor_to_max_vio_square_}.max_vio(cv);
  };
  const bool has_max_vio = shape_.experts > 1;
  const auto tokens = static_cast<double>(stats.tokens()), s = static_cast<double>(sum),
             squares = static_cast<double>(stats.choices_sq());
  if (squares == tokens * shape_.top_k * shape_.top_k) {  // every token chose k
    out.noise_floor_cv = targets_.equal() ? moectl::noise_floor_cv(shape_.experts, shape_.top_k, tokens)
                                          : unit_floor_cv_ / std::sqrt(tokens);
  } else if (squares * tokens >= (1 - 1e-9) * s * s) {  // known for all: never less, by Cauchy and Schwarz
    // A token with k_t choices selects expert i with probability k_t w_i: the count has the mean w_i S and the variance
    // w_i S - w_i² Σ k_t². In units of the mean, as if S²/Σk² tokens chose Σk²/S experts each.
    out.noise_floor_cv = std::sqrt(std::max(0.0, inverse_target_ / s - squares / (s * s)));
  }
  if (out.noise_floor_cv && has_max_vio) out.noise_floor_max_vio = max_vio(*out.noise_floor_cv);
  if (stats.has_sequences() && stats.scalar(RoutingStats::kSequences) >= 2) {
    out.sampling_floor_cv = sampling_floor(stats, sum);
    if (has_max_vio) out.sampling_floor_max_vio = max_vio(*out.sampling_floor_cv);
  }
  if (stats.has_sequences() && stats.scalar(RoutingStats::kSequenceLenSq) > 0) {
    double squares_of_sequences = 0;
    for (const std::int64_t square : stats.array(RoutingStats::kSequenceSq))
      squares_of_sequences += static_cast<double>(square);
    const auto length_sq = static_cast<double>(stats.scalar(RoutingStats::kSequenceLenSq));
    out.sequence_cv = std::sqrt(std::max(0.0, shape_.experts * squares_of_sequences / length_sq - 1));
  }
  if (const auto excess = signed_excess_cv_sq(out)) out.excess_cv = std::sqrt(std::max(0.0, *excess));
  const auto floor = floor_of(out).cv;
  if (out.fhs && floor) {
    // Near uniform, B is CV²/8, and the floor's CV² scatters by √(2/(N-1)) of itself. Experts weigh in B as in the
    // targets, so the noise of B over M experts is (M/k - 1)/T, however small some targets are. If few experts have a
    // target above 0, FHS is above 1 on target, and one token of an expert with target 0 exceeds the noise. Therefore a
    // load that is less than half as far (in √B) from its targets as those are from uniform has not collapsed.
    double chance = *floor * *floor;
    if (!targets_.equal() && unit_floor_cv_ > 0) {
      const double even = static_cast<double>(targets_.wanted()) / shape_.top_k - 1;
      chance *= even / (unit_floor_cv_ * unit_floor_cv_);
    }
    const double clear = chance / 8 * (1 + 3 * std::sqrt(2.0 / std::max(1, targets_.wanted() - 1)));
    const double bias =
        targets_.equal() ? load_displacement_.bias : std::min(load_displacement_.bias, target_displacement_);
    out.fhs_alarm = *out.fhs > 1 && bias > std::max(clear, target_bias_ / 4) ? 1 : 0;
  }
}

// Cluster-robust variance of each count, the sequence being the cluster: J/(J-1) Σ_j (c_ji - p_i n_j)².
double Measurer::sampling_floor(const RoutingStats& stats, std::int64_t sum) const {
  const std::span<const std::int64_t> counts = stats.counts();
  const std::span<const std::int64_t> squares = stats.array(RoutingStats::kSequenceSq);
  const std::span<const std::int64_t> cross = stats.array(RoutingStats::kSequenceCross);
  const auto sequences = static_cast<double>(stats.scalar(RoutingStats::kSequences));
  const auto length_sq = static_cast<double>(stats.scalar(RoutingStats::kSequenceLenSq));
  const double s = static_cast<double>(sum), n = shape_.experts;
  double total = 0;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double p = static_cast<double>(counts[i]) / s;
    const double variance =
        static_cast<double>(squares[i]) - 2 * p * static_cast<double>(cross[i]) + p * p * length_sq;
    if (targets_.equal()) {
      total += variance;
      continue;
    }
    // In units of the mean load, as below: relative() - 1 per assignment.
    const double unit = n * (targets_.is_wanted(i) ? targets_.load(i, 1) : 1.0 / targets_.wanted());
    total += variance / (unit * unit);
  }
  const double mean_variance = sequences / (sequences - 1) * std::max(0.0, total) / targets_.wanted();
  return std::sqrt(mean_variance) / (s / n);
}

Metrics measure(const RoutingStats& stats, const MetricsOptions& options) {
  Metrics out;
  Measurer(stats.shape(), options).measure(stats, out);
  return out;
}

Metrics metrics_on_target(const StatsShape& shape, const MetricsOptions& options) {
  check(shape, options);
  const LoadTargets targets(shape.experts, options.targets);
  std::vector<double> loads(static_cast<std::size_t>(shape.experts));
  for (std::size_t i = 0; i < loads.size(); ++i) loads[i] = targets.load(i, 1);
  std::vector<double> devices = loads;
  if (!options.placement.empty()) {
    devices.assign(
        static_cast<std::size_t>(*std::max_element(options.placement.begin(), options.placement.end())) + 1,
        0.0);
    for (std::size_t i = 0; i < loads.size(); ++i)
      devices[static_cast<std::size_t>(options.placement[i])] += loads[i];
  }
  std::sort(loads.begin(), loads.end());
  const double n = shape.experts, log_n = std::log(n);
  double entropy = 0, deviation_sq = 0, ranked = 0, rank = 0;
  for (const double w : loads) {
    entropy -= w > 0 ? w * std::log(w) : 0;
    deviation_sq += (w - 1 / n) * (w - 1 / n);
    ranked += (2 * rank++ - n + 1) * w;
  }
  Metrics out;
  out.entropy = targets.equal() ? log_n : entropy;
  if (shape.experts > 1) out.entropy_normalized = *out.entropy / log_n;
  out.effective_experts = std::exp(*out.entropy);
  out.kl_to_uniform = log_n - *out.entropy;
  out.load_std = targets.equal() ? 0 : 100 * std::sqrt(deviation_sq / n);
  out.load_cv = 0;
  out.max_load = loads.back();
  out.min_load = loads.front();
  out.max_to_mean = 1;
  out.max_vio = 0;
  out.minority_share = 1;
  out.gini = targets.equal() ? 0 : ranked / n;
  out.inactive_experts = n - targets.wanted();
  out.inactive_fraction = *out.inactive_experts / n;
  out.straggler_slowdown =
      *std::max_element(devices.begin(), devices.end()) * static_cast<double>(devices.size());
  out.balancedness = 1 / *out.straggler_slowdown;
  return out;
}

std::optional<double> signed_excess_cv_sq(const Metrics& metrics) {
  const auto floor = floor_of(metrics).cv;
  if (!metrics.load_cv || !floor) return std::nullopt;
  return *metrics.load_cv * *metrics.load_cv - *floor * *floor;
}

FloorInForce floor_of(const Metrics& m) {
  return {m.sampling_floor_cv ? m.sampling_floor_cv : m.noise_floor_cv,
          m.sampling_floor_max_vio ? m.sampling_floor_max_vio : m.noise_floor_max_vio,
          m.sampling_floor_cv.has_value()};
}

}  // namespace moectl
