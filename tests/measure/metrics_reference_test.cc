// A second implementation of every metric, straight from its definition: in long double, over tokens and over
// the whole history, with nothing carried from step to step. The library's must agree to 1e-9, name by name,
// and be absent where the definition has no value.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <optional>
#include <random>
#include <string>

#include "moectl/metrics.h"
#include "moectl/monitor.h"

namespace moectl {
namespace {

using Counts = std::vector<std::int64_t>;
using Real = long double;
using Row = std::vector<Real>;
using Reference = std::map<std::string, std::optional<Real>, std::less<>>;

constexpr int kWindow = 20, kDeadAfter = 5;
constexpr Real kEma = 0.125L;

/// One step of one layer, token by token.
struct Step {
  int experts = 0, top_k = 0, domains = 0;
  std::size_t sequences = 0, length = 0;
  Counts chosen{};                  // [tokens × k]
  std::vector<float> rows{};        // [tokens × N] or empty
  Counts domain_ids{};              // [tokens] or empty
  std::vector<double> gradients{};  // [N] or empty
  std::vector<double> latencies{};  // [N] or empty
  std::vector<double> loss_sums{};  // [N] or empty
  std::optional<std::int64_t> dropped{};
  std::optional<double> balance_loss{}, z_loss{};
  std::map<std::string, double> values{};  // of the host, by name

  std::size_t n() const { return static_cast<std::size_t>(experts); }
  std::size_t k() const { return static_cast<std::size_t>(top_k); }
  std::size_t tokens() const { return sequences * length; }
  Counts counts(std::size_t first, std::size_t last) const {  // of these tokens
    Counts c(n(), 0);
    for (std::size_t a = first * k(); a < last * k(); ++a) ++c[static_cast<std::size_t>(chosen[a])];
    return c;
  }
  Counts counts() const { return counts(0, tokens()); }
  Row load() const {
    Row p;
    for (const auto c : counts()) p.push_back(static_cast<Real>(c) / static_cast<Real>(chosen.size()));
    return p;
  }
};

Real fixed(Real value) {
  return std::nearbyint(value * 16777216) / 16777216;
}

Real entropy_of(const Row& p) {
  Real h = 0;
  for (const Real x : p) h -= x > 0 ? x * std::log(x) : 0;
  return h;
}

Real mean_of(const Row& values) {
  return std::accumulate(values.begin(), values.end(), Real{0}) / static_cast<Real>(values.size());
}

Real variance_of(const Row& values) {
  const Real mean = mean_of(values);
  Real sum = 0;
  for (const Real v : values) sum += (v - mean) * (v - mean);
  return sum / static_cast<Real>(values.size());
}

Real distance(const Row& p, const Row& q) {
  Real sum = 0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    sum += (std::sqrt(p[i]) - std::sqrt(q[i])) * (std::sqrt(p[i]) - std::sqrt(q[i]));
  }
  return 4 * std::asin(std::min(Real{1}, std::sqrt(sum) / 2));
}

std::optional<Real> ratio(Real bias, Real within, int experts) {
  if (experts == 1) return std::nullopt;
  if (within < 1e-12L) return bias < 1e-12L ? std::nullopt : std::optional<Real>(1e12L);
  return std::min(bias / within, Real{1e12L});
}

Real percentile(Row values, Real share) {
  std::sort(values.begin(), values.end());
  const Real at = share * static_cast<Real>(values.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<Real>(below)) * (values[above] - values[below]);
}

struct Fit {
  Real slope = 0, correlation = 0;
};
Fit fit(const Row& x, const Row& y) {
  const Real mx = mean_of(x), my = mean_of(y);
  Real xx = 0, yy = 0, xy = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    xx += (x[i] - mx) * (x[i] - mx);
    yy += (y[i] - my) * (y[i] - my);
    xy += (x[i] - mx) * (y[i] - my);
  }
  return {xy / xx, xy / std::sqrt(xx * yy)};
}

// ---- Metrics of one step ----

void load_metrics(const Step& step, const MetricsOptions& options, Reference& r) {
  const auto n = static_cast<Real>(step.experts), k = static_cast<Real>(step.top_k);
  const Counts c = step.counts();
  const Row p = step.load();
  const auto s = static_cast<Real>(step.chosen.size()), mean = s / n;
  Real gini = 0, squares = 0, hot = 0, cold = 0, inactive = 0, over = 0;
  const Real capacity = std::ceil(static_cast<Real>(options.capacity_factor) * s / n);
  for (std::size_t i = 0; i < p.size(); ++i) {
    for (const Real q : p) gini += std::abs(p[i] - q) / (2 * n);
    const auto count = static_cast<Real>(c[i]);
    squares += (count - mean) * (count - mean) / n;
    hot += count > static_cast<Real>(options.capacity_factor) * mean ? 1 : 0;
    cold += count < static_cast<Real>(options.cold_fraction) * mean ? 1 : 0;
    inactive += c[i] == 0 ? 1 : 0;
    over += std::max(Real{0}, count - capacity);
  }
  const Real h = entropy_of(p), top = *std::max_element(p.begin(), p.end());
  r["entropy"] = h;
  if (step.experts > 1) r["entropy_normalized"] = h / std::log(n);
  r["effective_experts"] = std::exp(h);
  r["kl_to_uniform"] = std::log(n) - h;
  r["load_std"] = 100 * std::sqrt(squares) / s;
  r["load_cv"] = std::sqrt(squares) / mean;
  r["max_load"] = top;
  r["min_load"] = *std::min_element(p.begin(), p.end());
  r["max_to_mean"] = n * top;
  r["max_vio"] = n * top - 1;
  r["gini"] = gini;
  r["utilization_variance"] = squares;
  r["inactive_experts"] = inactive;
  r["inactive_fraction"] = inactive / n;
  r["hot_experts"] = hot;
  r["cold_experts"] = cold;
  if (step.balance_loss) r["balance_loss"] = *step.balance_loss;
  if (step.z_loss) r["z_loss"] = *step.z_loss;
  for (const auto& [name, value] : step.values) r[name] = fixed(value);
  if (step.dropped) r["drop_rate"] = static_cast<Real>(*step.dropped) / s;
  r["predicted_drop_rate"] = over / s;
  std::map<int, Real> devices;
  for (std::size_t i = 0; i < p.size(); ++i) {
    devices[options.placement.empty() ? static_cast<int>(i) : options.placement[i]] += p[i];
  }
  Real slowest = 0;
  for (const auto& [device, load] : devices) slowest = std::max(slowest, load);
  r["straggler_slowdown"] = slowest * static_cast<Real>(devices.size());
  r["balancedness"] = 1 / (slowest * static_cast<Real>(devices.size()));
  r["minority_share"] = n * *r["min_load"];
  if (options.details) {
    Row relative;
    for (const Real q : p) relative.push_back(n * q);
    r["load_p5"] = percentile(relative, 0.05L);
    r["load_p25"] = percentile(relative, 0.25L);
    r["load_p50"] = percentile(relative, 0.5L);
    r["load_p75"] = percentile(relative, 0.75L);
    r["load_p95"] = percentile(relative, 0.95L);
  }
  // The CV in each sequence; all are of one length.
  Real within = 0;
  for (std::size_t j = 0; j < step.sequences; ++j) {
    const Counts of = step.counts(j * step.length, (j + 1) * step.length);
    for (const std::int64_t count : of) {
      const Real off = n * static_cast<Real>(count) / (static_cast<Real>(step.length) * k) - 1;
      within += off * off / n / static_cast<Real>(step.sequences);
    }
  }
  r["sequence_cv"] = std::sqrt(within);

  // Floors.
  const auto tokens = static_cast<Real>(step.tokens());
  const Real noise = std::sqrt((n / k - 1) / tokens);
  const auto max_vio = [&](Real f) {
    const Real z = normal_quantile(static_cast<double>((n - 0.375L) / (n + 0.25L)));
    return f * z * std::sqrt(n / (n - 1)) + f * f * (z * z - 1) / 6;
  };
  r["noise_floor_cv"] = noise;
  if (step.experts > 1) r["noise_floor_max_vio"] = max_vio(noise);
  Real floor = noise;
  if (step.sequences >= 2) {
    Real sum = 0;
    for (std::size_t j = 0; j < step.sequences; ++j) {
      const Counts of = step.counts(j * step.length, (j + 1) * step.length);
      for (std::size_t i = 0; i < p.size(); ++i) {
        const Real off = static_cast<Real>(of[i]) - p[i] * static_cast<Real>(step.length) * k;
        sum += off * off;
      }
    }
    const auto j = static_cast<Real>(step.sequences);
    floor = std::sqrt(j / (j - 1) * sum / n) / mean;
    r["sampling_floor_cv"] = floor;
    if (step.experts > 1) r["sampling_floor_max_vio"] = max_vio(floor);
  }
  const Real cv = *r["load_cv"];
  r["excess_cv"] = std::sqrt(std::max(Real{0}, cv * cv - floor * floor));

  // Geometry, from the hard choices.
  Real bias = 0, overlap = 0;
  for (const Real q : p) {
    bias += (std::sqrt(q) - std::sqrt(1 / n)) * (std::sqrt(q) - std::sqrt(1 / n)) / 2;
    overlap += q * std::sqrt(q);
  }
  r["fsi"] = 4 * std::asin(std::sqrt(bias / 2));
  r["fsi_max"] = 2 * std::acos(1 / std::sqrt(n));
  r["fhs"] = ratio(bias, 1 - std::sqrt(k) * overlap, step.experts);
  if (r["fhs"]) {
    const Real clear = floor * floor / 8 * (1 + 3 * std::sqrt(2 / (n - 1)));
    r["fhs_alarm"] = *r["fhs"] > 1 && bias > clear ? 1 : 0;
  }
}

void router_metrics(const Step& step, Reference& r) {
  if (step.rows.empty()) return;
  const std::size_t n = step.n(), tokens = step.tokens();
  Row sums(n, 0), roots(n, 0);
  Real entropy = 0, total = 0;
  for (std::size_t t = 0; t < tokens; ++t) {
    const float* row = &step.rows[t * n];
    const Real sum = std::accumulate(row, row + n, Real{0});
    Row p(n);
    for (std::size_t i = 0; i < n; ++i) {
      p[i] = row[i] / sum;
      sums[i] += fixed(p[i]);
      roots[i] += fixed(std::sqrt(p[i]));
      total += fixed(p[i]);
    }
    entropy += fixed(entropy_of(p));
  }
  for (std::size_t i = 0; i < n; ++i) {
    sums[i] /= total;
    roots[i] /= static_cast<Real>(tokens);
  }
  const auto experts = static_cast<Real>(n);
  r["token_entropy"] = entropy / static_cast<Real>(tokens);
  r["router_entropy"] = entropy_of(sums);
  r["expert_token_information"] = std::max(Real{0}, *r["router_entropy"] - *r["token_entropy"]);
  r["importance_cv"] = std::sqrt(variance_of(sums)) * experts;
  Real bias = 0, overlap = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const Real apart = std::sqrt(sums[i]) - std::sqrt(1 / experts);
    bias += apart * apart / 2;
    overlap += roots[i] * std::sqrt(sums[i]);
  }
  r["router_fsi"] = 4 * std::asin(std::sqrt(bias / 2));
  r["router_fhs"] = ratio(bias, 1 - overlap, step.experts);
}

void expert_metrics(const Step& step, Reference& r) {
  const auto row = [](const std::vector<double>& values) {
    Row out;
    for (const double v : values) out.push_back(fixed(v));
    return out;
  };
  if (!step.domain_ids.empty()) {
    const auto d = static_cast<std::size_t>(step.domains);
    std::vector<Row> joint(d, Row(step.n(), 0));
    const auto share = 1 / static_cast<Real>(step.chosen.size());
    for (std::size_t a = 0; a < step.chosen.size(); ++a) {
      joint[static_cast<std::size_t>(step.domain_ids[a / step.k()])]
           [static_cast<std::size_t>(step.chosen[a])] += share;
    }
    const Row p = step.load();
    Real information = 0;
    Row weights;
    for (const Row& of_domain : joint) {
      const Real weight = std::accumulate(of_domain.begin(), of_domain.end(), Real{0});
      weights.push_back(weight);
      for (std::size_t i = 0; i < p.size(); ++i) {
        if (of_domain[i] > 0) information += of_domain[i] * std::log(of_domain[i] / (weight * p[i]));
      }
    }
    r["domain_information"] = information;
    if (entropy_of(weights) > 1e-12L) r["domain_exclusivity"] = information / entropy_of(weights);
  }
  const Counts counts = step.counts();
  std::optional<Real> lift;
  for (std::size_t i = 0; i < step.n(); ++i) {
    for (std::size_t j = i + 1; j < step.n(); ++j) {
      std::int64_t both = 0;
      for (std::size_t token = 0; token < step.tokens(); ++token) {
        const auto chosen = std::span(step.chosen).subspan(token * step.k(), step.k());
        both += std::ranges::count(chosen, i) > 0 && std::ranges::count(chosen, j) > 0;
      }
      const auto expected = static_cast<Real>(counts[i] * counts[j]) / static_cast<Real>(step.tokens());
      if (step.top_k > 1 && expected >= 10)
        lift = std::max(lift.value_or(0), static_cast<Real>(both) / expected);
    }
  }
  if (lift) r["pair_lift"] = *lift;
  if (!step.gradients.empty()) r["grad_norm_variance"] = variance_of(row(step.gradients));
  if (!step.latencies.empty()) {
    r["latency_p50"] = percentile(row(step.latencies), 0.5L);
    r["latency_p95"] = percentile(row(step.latencies), 0.95L);
    r["latency_p99"] = percentile(row(step.latencies), 0.99L);
  }
}

// ---- Metrics of a history, from all of it ----

Row smoothed_load(const std::vector<Step>& history, std::size_t steps) {
  Row s = history[0].load();
  for (std::size_t t = 1; t < steps; ++t) {
    const Row p = history[t].load();
    for (std::size_t i = 0; i < s.size(); ++i) s[i] += kEma * (p[i] - s[i]);
  }
  return s;
}

void trend_metrics(const std::vector<Step>& history, const std::vector<Reference>& before,
                   const MonitorOptions& options, Reference& r) {
  const std::size_t now = history.size() - 1, n = history[0].n();
  std::vector<Row> loads, errors;
  for (std::size_t t = 0; t <= now; ++t) {
    loads.push_back(history[t].load());
    errors.emplace_back(n, 0);
    if (t == 0) continue;
    const Row s = smoothed_load(history, t);
    for (std::size_t i = 0; i < n; ++i) errors[t][i] = loads[t][i] - s[i];
  }
  const auto of = [&](std::string_view name, std::size_t t) {
    return t == now ? r.find(name)->second : before[t].find(name)->second;
  };
  const std::size_t oldest = now + 1 > kWindow ? now + 1 - kWindow : 0;
  const auto slope = [&](std::string_view name) -> std::optional<Real> {
    Row x, y;
    for (std::size_t t = oldest; t <= now; ++t) {
      x.push_back(static_cast<Real>(t));
      y.push_back(*of(name, t));
    }
    return x.size() < 2 ? std::nullopt : std::optional<Real>(fit(x, y).slope);
  };
  r["entropy_slope"] = slope("entropy");
  if (r.contains("token_entropy")) r["token_entropy_slope"] = slope("token_entropy");

  // Dead: smoothed load under the fraction for so many steps on end, up to now.
  std::vector<std::size_t> below(n, 0);
  const Real limit = static_cast<Real>(options.dead_fraction) / static_cast<Real>(n);
  for (std::size_t t = 0; t <= now; ++t) {
    const Row s = smoothed_load(history, t + 1);
    for (std::size_t i = 0; i < n; ++i) below[i] = s[i] < limit ? below[i] + 1 : 0;
  }
  r["dead_experts"] = static_cast<Real>(
      std::count_if(below.begin(), below.end(), [](std::size_t b) { return b >= kDeadAfter; }));

  // The window: the half that runs, and the half before it.
  constexpr std::size_t kHalf = kWindow / 2;
  const std::size_t block = now / kHalf * kHalf, begin = block >= kHalf ? block - kHalf : 0;
  Real variance = 0, path = 0;
  for (std::size_t i = 0; i < n; ++i) {
    Row of_expert;
    for (std::size_t t = begin; t <= now; ++t) of_expert.push_back(loads[t][i]);
    variance += variance_of(of_expert) / static_cast<Real>(n);
  }
  for (std::size_t t = begin + 1; t <= now; ++t) path += distance(loads[t - 1], loads[t]);
  r["routing_variance"] = variance;
  if (path > 0) r["path_efficiency"] = std::min(Real{1}, distance(loads[begin], loads[now]) / path);

  // Shift: tested at every fourth step, once there are eight steps of this block and all of the last.
  if (begin < block) {
    r["shift"] = 0;
    for (std::size_t t = 0; t <= now; t += 4) {
      const std::size_t own = t / kHalf * kHalf;
      if (own < kHalf || t - own + 1 < 8 || n < 2) continue;
      Real moved = 0, expected = 0;
      for (std::size_t i = 0; i < n; ++i) {
        Row reference, recent;
        for (std::size_t u = own - kHalf; u < own; ++u) reference.push_back(loads[u][i]);
        for (std::size_t u = t - 7; u <= t; ++u) recent.push_back(loads[u][i]);
        const Real apart = mean_of(recent) - mean_of(reference);
        moved += apart * apart;
        expected += variance_of(reference) * kHalf / (kHalf - 1) * (1 / Real{8} + 1 / Real{kHalf});
      }
      r["shift"] = moved / expected / (1 + 6 * std::sqrt(2 / static_cast<Real>(n - 1)));
    }
  }

  // Correlations of what the average did not foresee.
  if (now < 2) return;
  const auto product = [&](std::size_t t, std::size_t u) {
    return std::inner_product(errors[t].begin(), errors[t].end(), errors[u].begin(), Real{0});
  };
  std::map<std::size_t, Real> lagged;
  Real flips = 0.5L;
  for (std::size_t t = 1; t <= now; ++t) {
    for (const std::size_t lag : {1U, 2U, 3U, 4U, 5U, 6U, 8U}) {
      if (t < lag + 1 || product(t, t) == 0 || product(t - lag, t - lag) == 0) continue;
      lagged[lag] +=
          kEma * (product(t, t - lag) / std::sqrt(product(t, t) * product(t - lag, t - lag)) - lagged[lag]);
    }
    if (t < 2) continue;
    Real changed = 0;
    for (std::size_t i = 0; i < n; ++i) changed += errors[t][i] * errors[t - 1][i] < 0 ? 1 : 0;
    flips += kEma * (changed / static_cast<Real>(n) - flips);
  }
  r["load_autocorrelation"] = lagged[1];
  r["oscillation"] = flips;
  Real swing = 0;
  for (const auto& [lag, a] : lagged) swing = std::max(swing, -a);
  for (std::size_t period = 2; period <= 6; ++period) {
    Real others = 0;
    for (std::size_t lag = 1; lag < period; ++lag) others += lagged[lag] / static_cast<Real>(period - 1);
    swing = std::max(swing,
                     (lagged[period] - others) * static_cast<Real>(period - 1) / static_cast<Real>(period));
  }
  r["swing"] = std::min(swing, Real{1});
}

void expert_trends(const std::vector<Step>& history, const std::vector<Reference>& before,
                   const MonitorOptions& options, Reference& r) {
  const std::size_t now = history.size() - 1, n = history[0].n();
  const auto max_to_mean = [&](std::size_t t) {
    return *(t == now ? r : before[t]).find("max_to_mean")->second;
  };
  if (!history[0].latencies.empty()) {
    Row x, y;
    for (std::size_t t = now + 1 > kWindow ? now + 1 - kWindow : 0; t <= now; ++t) {
      x.push_back(max_to_mean(t));
      y.push_back(fixed(*std::max_element(history[t].latencies.begin(), history[t].latencies.end())));
    }
    if (variance_of(x) > 1e-20L) {
      r["tail_sensitivity"] = fit(x, y).slope;
      if (x.size() > 2) r["tail_correlation"] = fit(x, y).correlation;
    }
  }
  if (history[0].gradients.empty() || history[0].loss_sums.empty() || now + 1 < kWindow) return;
  Row gradient(n, 0), fast(n, NAN), slow(n, NAN);
  for (std::size_t t = 0; t <= now; ++t) {
    const Counts c = history[t].counts();
    for (std::size_t i = 0; i < n; ++i) {
      const Real norm = fixed(history[t].gradients[i]);
      gradient[i] += (t == 0 ? 1 : kEma) * (norm - gradient[i]);
      if (c[i] == 0) continue;
      const Real loss = fixed(history[t].loss_sums[i]) / static_cast<Real>(c[i]);
      fast[i] = std::isnan(fast[i]) ? loss : fast[i] + kEma * (loss - fast[i]);
      slow[i] = std::isnan(slow[i]) ? loss : slow[i] + 0.2L * kEma * (loss - slow[i]);
    }
  }
  Row sorted = gradient;
  std::sort(sorted.begin(), sorted.end());
  const Row s = smoothed_load(history, now + 1);
  Real stagnant = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const bool alive = s[i] >= static_cast<Real>(options.dead_fraction) / static_cast<Real>(n);
    stagnant += alive && !(fast[i] < slow[i]) && gradient[i] < 0.1L * sorted[n / 2] ? 1 : 0;
  }
  r["stagnant_experts"] = stagnant;
}

// ---- Random steps ----

struct Kind {
  int experts, top_k;
  std::size_t sequences, length;
  int domains;
  bool rows, experts_known;
};

Step random_step(const Kind& kind, std::size_t at, std::mt19937_64& random) {
  Step step{.experts = kind.experts,
            .top_k = kind.top_k,
            .domains = kind.domains,
            .sequences = kind.sequences,
            .length = kind.length};
  const std::size_t n = step.n();
  std::uniform_real_distribution<double> uniform(0, 1);
  // How uneven this step is: from all tokens on k experts to even; expert 0 is mostly left out.
  const double skew = at % 7 == 0 ? 20 : at % 5 == 0 ? 0 : 2 * uniform(random);
  std::vector<double> weight(n);
  for (std::size_t i = 0; i < n; ++i) {
    weight[i] = std::exp(-skew * static_cast<double>(i) / static_cast<double>(n));
    if (i == 0 && n > 4) weight[i] = 1e-7;
  }
  for (std::size_t t = 0; t < step.tokens(); ++t) {
    std::vector<double> left = weight;
    for (std::size_t j = 0; j < step.k(); ++j) {
      std::discrete_distribution<std::size_t> draw(left.begin(), left.end());
      const std::size_t expert = draw(random);
      step.chosen.push_back(static_cast<std::int64_t>(expert));
      left[expert] = 0;
      if (std::accumulate(left.begin(), left.end(), 0.0) <= 0) std::fill(left.begin(), left.end(), 1e-300);
    }
    if (kind.domains > 0) {
      step.domain_ids.push_back(static_cast<std::int64_t>(
          at % 6 == 1 ? 0
                      : (static_cast<std::size_t>(step.chosen.back()) + random() % 2) %
                            static_cast<std::size_t>(kind.domains)));
    }
    if (!kind.rows) continue;
    const auto shape = random() % 3;  // one-hot, uniform, anything
    for (std::size_t i = 0; i < n; ++i) {
      step.rows.push_back(shape == 0   ? (static_cast<std::int64_t>(i) == step.chosen.back() ? 1.0F : 0.0F)
                          : shape == 1 ? 0.25F
                                       : static_cast<float>(random() % 1000));
    }
    if (shape == 2) step.rows[step.rows.size() - n] += 1;  // never all zero
  }
  if (at % 3 != 2) step.dropped = static_cast<std::int64_t>(random() % 9);
  if (at % 3 != 0) step.balance_loss = 1 + static_cast<double>(random() % 100) / 64;
  if (at % 3 != 1) step.z_loss = static_cast<double>(random() % 640) / 64;
  const char* const of_host[] = {"router_similarity", "router_condition", "expert_output_norm",
                                 "gradient_ratio"};
  for (std::size_t v = 0; v < 4; ++v) {
    if (at % 4 != v) step.values[of_host[v]] = uniform(random) * 8;
  }
  if (!kind.experts_known) return step;
  const Counts counts = step.counts();
  for (std::size_t i = 0; i < n; ++i) {
    // The last expert gets tokens and learns nothing.
    const bool idle = i + 1 == n && n > 4;
    step.gradients.push_back(idle ? 1e-3 : 0.5 + uniform(random));
    step.latencies.push_back(uniform(random) * 1e-2);
    const double loss = idle ? 3 : -1 + 4 * std::exp(-0.02 * static_cast<double>(at));
    step.loss_sums.push_back(loss * static_cast<double>(counts[i]));
  }
  return step;
}

RoutingStats stats_of(const Step& step) {
  RoutingStats stats({step.experts,
                      step.top_k,
                      {.sequences = true,
                       .probabilities = !step.rows.empty(),
                       .gradients = !step.gradients.empty(),
                       .losses = !step.loss_sums.empty(),
                       .latencies = !step.latencies.empty(),
                       .pairs = true,
                       .domains = step.domains}});
  EXPECT_TRUE(stats.add({.experts = step.chosen,
                         .sequence_length = static_cast<std::int64_t>(step.length),
                         .probabilities = step.rows,
                         .domain_ids = step.domain_ids,
                         .dropped = step.dropped,
                         .balance_loss = step.balance_loss,
                         .z_loss = step.z_loss}));
  for (const auto& [name, value] : step.values) EXPECT_TRUE(stats.add_value(name, value));
  if (!step.gradients.empty()) {
    EXPECT_TRUE(stats.add_grad_norms(step.gradients));
  }
  if (!step.latencies.empty()) {
    EXPECT_TRUE(stats.add_latencies(step.latencies));
  }
  if (!step.loss_sums.empty()) {
    EXPECT_TRUE(stats.add_expert_losses(step.loss_sums, step.counts()));
  }
  return stats;
}

TEST(MetricsReference, EveryMetricOfEveryStepOfARandomHistory) {
  std::mt19937_64 random(77);
  std::map<std::string_view, int> present, absent;
  for (const Kind& kind :
       {Kind{1, 1, 4, 8, 0, true, true}, Kind{2, 1, 2, 16, 2, true, true}, Kind{3, 3, 1, 40, 3, true, true},
        Kind{5, 2, 8, 4, 0, false, false}, Kind{8, 2, 4, 32, 4, true, true},
        Kind{17, 4, 4, 16, 3, true, true}, Kind{64, 1, 4, 16, 0, true, false}}) {
    MetricsOptions options;
    options.details = kind.experts != 64;
    if (kind.experts == 8) options.placement = {0, 0, 1, 1, 2, 2, 2, 2};
    const MonitorOptions monitoring{.ema = static_cast<double>(kEma),
                                    .dead_fraction = 0.1,
                                    .dead_after = kDeadAfter,
                                    .trend_window = kWindow,
                                    .trends = true};
    std::vector<Step> history;
    std::vector<Reference> references;
    std::optional<LayerMonitor> monitor;
    std::optional<Measurer> measurer;
    for (std::size_t t = 0; t < 55; ++t) {
      history.push_back(random_step(kind, t, random));
      const RoutingStats stats = stats_of(history.back());
      if (!monitor) monitor.emplace(stats.shape(), monitoring);
      if (!measurer) measurer.emplace(stats.shape(), options);
      Metrics found;
      measurer->measure(stats, found);
      monitor->observe(stats, found);
      Reference want;
      load_metrics(history.back(), options, want);
      router_metrics(history.back(), want);
      expert_metrics(history.back(), want);
      trend_metrics(history, references, monitoring, want);
      expert_trends(history, references, monitoring, want);
      for (const MetricField& field : metric_fields()) {
        const Metrics::Value value = found.*field.value;
        const auto it = want.find(field.name);
        const bool wanted = it != want.end() && it->second;
        (wanted ? present : absent)[field.name] += 1;
        ASSERT_EQ(value.has_value(), wanted)
            << field.name << " of " << kind.experts << " experts, step " << t;
        if (!wanted) continue;
        const auto expected = static_cast<double>(*it->second);
        // A square root of a difference loses half of its digits where the difference vanishes.
        const double tolerance = field.name == "excess_cv" && expected < 1e-4 ? 1e-6 : 1e-9;
        ASSERT_NEAR(*value, expected, tolerance * std::max(1.0, std::abs(expected)))
            << field.name << " of " << kind.experts << " experts, step " << t;
      }
      references.push_back(std::move(want));
    }
  }
  // Nothing was skipped: every metric but those of two windows or two biases was compared, and all that have
  // conditions were seen without as well.
  for (const MetricField& field : metric_fields()) {
    if (field.name == "max_vio_global" || field.name == "churn") {
      EXPECT_EQ(present[field.name], 0);
    } else {
      EXPECT_GT(present[field.name], 30) << field.name;
    }
  }
  for (const char* name : {"drop_rate", "sampling_floor_cv", "token_entropy", "domain_information",
                           "domain_exclusivity", "grad_norm_variance", "stagnant_experts", "latency_p99",
                           "tail_sensitivity", "fhs", "entropy_normalized", "shift", "balance_loss", "z_loss",
                           "router_condition", "load_p50", "pair_lift"}) {
    EXPECT_GT(absent[name], 0) << name;
  }
}

}  // namespace
}  // namespace moectl
