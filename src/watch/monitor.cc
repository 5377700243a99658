#include "moectl/monitor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "watch/health.h"
#include "watch/trend.h"
#include "watch/watch_fields.h"

namespace moectl {
namespace {

// Metrics that the monitor sets.
constexpr Metrics::Value Metrics::*kOfHistory[] = {
    &Metrics::dead_experts,
    &Metrics::token_entropy_slope,
    &Metrics::entropy_slope,
    &Metrics::routing_variance,
    &Metrics::path_efficiency,
    &Metrics::stagnant_experts,
    &Metrics::tail_sensitivity,
    &Metrics::tail_correlation,
    &Metrics::load_autocorrelation,
    &Metrics::oscillation,
    &Metrics::swing,
    &Metrics::shift,
};

constexpr double kStagnantGradient = 0.1;  // of the median over experts
constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();
constexpr double kSlow = 0.2;  // the slow average of losses, relative to `ema`

MonitorOptions checked(const StatsShape& shape, const MonitorOptions& options) {
  if (shape.experts < 1) {
    throw std::invalid_argument("experts: " + std::to_string(shape.experts) + ": must be at least 1");
  }
  if (const auto problem = check_fields(options)) throw std::invalid_argument(text_of(problem));
  return options;
}

// The field of expert_fields() of this name.
const ExpertField& expert_field(std::string_view name) {
  return *std::find_if(expert_fields().begin(), expert_fields().end(),
                       [&](const ExpertField& field) { return field.name == name; });
}

}  // namespace

void copy_history(const Metrics& from, Metrics& to) {
  for (const auto value : kOfHistory) to.*value = from.*value;
}

struct LayerMonitor::Impl {
  Impl(const StatsShape& shape, const MonitorOptions& options, const MetricsOptions& metrics);
  void observe(const RoutingStats& stats, Metrics& metrics, std::optional<double> loss);
  void observe_nothing();
  Trend trend(const MetricField& field) const;
  void exchange(StateIo& io);
  void watch_loads(const RoutingStats& stats, Metrics& metrics);
  void follow_needs(const StatsNeeds& needs);
  void watch_experts(const RoutingStats& stats, Metrics& metrics);
  void watch_tail(const RoutingStats& stats, Metrics& metrics);
  void smooth(const Metrics& metrics);

  StatsShape shape_;
  MonitorOptions options_;
  MetricsOptions metrics_options_;
  LoadTargets targets_;
  std::vector<double> smoothed_;
  std::vector<std::int64_t> below_;
  std::int64_t observed_ = 0, steps_ = 0;
  std::vector<double> load_;  // p of this step
  Metrics smoothed_metrics_;
  History entropy_, token_entropy_;

  // With trends.
  std::optional<LoadTrend> load_trend_;
  std::optional<HistoryTable> history_;  // of each metric, and of the loss

  // With gradients, losses, latencies.
  std::vector<double> values_, grad_norm_, fast_loss_, slow_loss_, update_frequency_;
  std::int64_t gradient_steps_ = 0;
  std::optional<History> tail_, tail_load_;

  HealthMonitor health_;
};

LayerMonitor::Impl::Impl(const StatsShape& shape, const MonitorOptions& options,
                         const MetricsOptions& metrics)
    : shape_(shape),
      options_(checked(shape, options)),
      metrics_options_(metrics),
      targets_(shape.experts, metrics.targets),
      smoothed_(static_cast<std::size_t>(shape.experts), 0.0),
      below_(static_cast<std::size_t>(shape.experts), 0),
      load_(static_cast<std::size_t>(shape.experts), 0.0),
      entropy_(static_cast<std::size_t>(options.trend_window)),
      token_entropy_(static_cast<std::size_t>(options.trend_window)),
      health_(shape, options.health, targets_.equal() ? Metrics{} : metrics_on_target(shape, metrics)) {
  const auto window = static_cast<std::size_t>(options.trend_window);
  if (options.trends) {
    load_trend_.emplace(targets_, options.trend_window, options.ema);
    if (!options.loads_only) history_.emplace(window, metric_fields().size() + 1);
  }
  follow_needs(shape.needs);
}

// Records of a file may hold what those before did not; those of a controller have one shape.
void LayerMonitor::Impl::follow_needs(const StatsNeeds& needs) {
  const std::size_t experts = smoothed_.size();
  const auto window = static_cast<std::size_t>(options_.trend_window);
  if (values_.empty() && (needs.gradients || needs.losses || needs.latencies)) values_.resize(experts);
  if (needs.gradients && grad_norm_.empty()) {
    grad_norm_.assign(experts, 0.0);
    update_frequency_.assign(experts, 0.0);
  }
  if (needs.losses && fast_loss_.empty()) {
    fast_loss_.assign(experts, std::nan(""));
    slow_loss_.assign(experts, std::nan(""));
  }
  if (needs.latencies && !tail_) {
    tail_.emplace(window);
    tail_load_.emplace(window);
  }
}

void LayerMonitor::Impl::observe_nothing() {
  health_.observe(steps_++, nullptr, smoothed_metrics_, 0);
}

void LayerMonitor::Impl::observe(const RoutingStats& stats, Metrics& metrics, std::optional<double> loss) {
  copy_history(Metrics{}, metrics);
  if (!metrics.max_load) {
    observe_nothing();
    return;
  }
  if (stats.counts().size() != smoothed_.size()) {
    throw std::invalid_argument("stats: " + std::to_string(stats.counts().size()) + " experts: must be " +
                                std::to_string(smoothed_.size()));
  }
  watch_loads(stats, metrics);
  follow_needs(stats.shape().needs);
  if (!values_.empty()) watch_experts(stats, metrics);
  if (tail_) watch_tail(stats, metrics);
  smooth(metrics);
  if (history_) {
    const std::span<double> row = history_->push();
    for (std::size_t f = 0; f + 1 < row.size(); ++f) {
      row[f] = (metrics.*(metric_fields()[f].value)).value_or(kUnknown);
    }
    row.back() = loss.value_or(kUnknown);
  }
  ++observed_;
  health_.observe(steps_++, &metrics, smoothed_metrics_, load_trend_ ? load_trend_->deviation_cv() : 0);
}

void LayerMonitor::Impl::watch_loads(const RoutingStats& stats, Metrics& metrics) {
  const std::span<const std::int64_t> counts = stats.counts();
  const double assignments = static_cast<double>(stats.assignments());
  const double share = 1 / assignments;  // a division for each expert would cost as much as all the rest
  for (std::size_t i = 0; i < counts.size(); ++i) load_[i] = static_cast<double>(counts[i]) * share;
  if (load_trend_) load_trend_->observe(load_, smoothed_, metrics);
  const double weight = observed_ == 0 ? 1.0 : options_.ema;
  std::int64_t dead = 0;
  const auto follow = [&](auto threshold_of) {
    for (std::size_t i = 0; i < counts.size(); ++i) {
      smoothed_[i] += weight * (load_[i] - smoothed_[i]);
      below_[i] = smoothed_[i] < threshold_of(i) ? below_[i] + 1 : 0;
      dead += below_[i] >= options_.dead_after ? 1 : 0;
    }
  };
  if (targets_.equal()) {
    const double threshold = options_.dead_fraction / static_cast<double>(counts.size());
    follow([=](std::size_t) { return threshold; });
  } else {
    follow([&](std::size_t i) { return options_.dead_fraction * targets_.load(i, 1); });
  }
  metrics.dead_experts = static_cast<double>(dead);
  entropy_.push(*metrics.entropy);
  metrics.entropy_slope = slope(entropy_.values());
  if (metrics.token_entropy) {
    token_entropy_.push(*metrics.token_entropy);
    metrics.token_entropy_slope = slope(token_entropy_.values());
  }
}

// An expert is stagnant if it gets tokens, its loss does not fall (the fast average is not below the slow one), and its
// gradient is far below those of the others. Experts that should receive no tokens are exempt.
void LayerMonitor::Impl::watch_experts(const RoutingStats& stats, Metrics& metrics) {
  static const ExpertField& gradient = expert_field("grad_norm");
  static const ExpertField& expert_loss = expert_field("expert_loss");
  const bool has_gradient = gradient.values(stats, values_);
  if (has_gradient) {
    const double weight = gradient_steps_ == 0 ? 1.0 : options_.ema;
    ++gradient_steps_;
    for (std::size_t i = 0; i < values_.size(); ++i) {
      grad_norm_[i] += weight * (values_[i] - grad_norm_[i]);
      const double updated = values_[i] > 0 ? 1 : 0;
      double& frequency = update_frequency_[i];
      // Usually every expert had a gradient at every step, and no division is needed.
      if (frequency != updated) frequency += (updated - frequency) / static_cast<double>(gradient_steps_);
    }
  }
  const bool has_loss = expert_loss.values(stats, values_);
  if (has_loss) {
    const double fast_weight = options_.ema, slow_weight = kSlow * options_.ema;
    for (std::size_t i = 0; i < values_.size(); ++i) {  // NaN: no loss this time, no average yet
      const double loss = values_[i], fast = fast_loss_[i], slow = slow_loss_[i];
      const bool known = loss == loss, first = fast != fast;
      const double new_fast = first ? loss : fast + fast_weight * (loss - fast);
      const double new_slow = first ? loss : slow + slow_weight * (loss - slow);
      fast_loss_[i] = known ? new_fast : fast;
      slow_loss_[i] = known ? new_slow : slow;
    }
  }
  if (!has_gradient || !has_loss || observed_ + 1 < options_.trend_window) return;
  const auto stagnant_under = [&](double limit) {
    std::int64_t stagnant = 0;
    for (std::size_t i = 0; i < below_.size(); ++i) {
      const bool wanted = targets_.is_wanted(i), alive = (below_[i] == 0) & wanted;
      const bool learns = fast_loss_[i] < slow_loss_[i];
      stagnant += (alive & !learns & (grad_norm_[i] < limit)) ? 1 : 0;
    }
    return stagnant;
  };
  // The median is at most the largest value. Usually no expert is far below even that, and the median is not needed.
  std::int64_t stagnant =
      stagnant_under(kStagnantGradient * *std::max_element(grad_norm_.begin(), grad_norm_.end()));
  if (stagnant > 0) {
    std::copy(grad_norm_.begin(), grad_norm_.end(), values_.begin());
    const auto middle = values_.begin() + static_cast<std::ptrdiff_t>(values_.size() / 2);
    std::nth_element(values_.begin(), middle, values_.end());
    stagnant = stagnant_under(kStagnantGradient * *middle);
  }
  metrics.stagnant_experts = static_cast<double>(stagnant);
}

// The latency of a layer is that of its slowest expert.
void LayerMonitor::Impl::watch_tail(const RoutingStats& stats, Metrics& metrics) {
  static const ExpertField& latency = expert_field("latency");
  if (!latency.values(stats, values_)) return;
  tail_->push(*std::max_element(values_.begin(), values_.end()));
  // The actual load of each device, whatever its target.
  tail_load_->push(targets_.equal() ? *metrics.max_to_mean : *metrics.max_load * shape_.experts);
  const Regression line = regression(tail_load_->values(), tail_->values());
  metrics.tail_sensitivity = line.slope;
  metrics.tail_correlation = line.correlation;
}

void LayerMonitor::Impl::smooth(const Metrics& metrics) {
  for (const MetricField& field : metric_fields()) {
    const Metrics::Value& value = metrics.*(field.value);
    Metrics::Value& smoothed = smoothed_metrics_.*(field.value);
    // An infinite one would stay in the average for good.
    if (value && std::isfinite(*value))
      smoothed = smoothed ? *smoothed + options_.ema * (*value - *smoothed) : *value;
  }
}

LayerMonitor::Trend LayerMonitor::Impl::trend(const MetricField& field) const {
  if (!history_) return {};
  const std::vector<double> values =
      history_->column(static_cast<std::size_t>(&field - metric_fields().data()));
  return {smoothed_metrics_.*(field.value), slope(values), moectl::autocorrelation(values),
          moectl::sign_flips(values), correlation(values, history_->column(metric_fields().size()))};
}

// ---- State ----

void LayerMonitor::Impl::exchange(StateIo& io) {
  io.value("monitor.observed", observed_);
  io.value("monitor.steps", steps_);
  io.value("monitor.gradient_steps", gradient_steps_);
  io.values("monitor.smoothed", smoothed_, {0, 1});
  io.values("monitor.below", below_);
  std::vector<double> metrics;
  for (const MetricField& field : metric_fields()) {
    metrics.push_back((smoothed_metrics_.*(field.value)).value_or(kUnknown));
  }
  io.values("monitor.metrics", metrics, StateIo::kAnyNumber);
  for (std::size_t f = 0; f < metrics.size(); ++f) {
    smoothed_metrics_.*(metric_fields()[f].value) =
        std::isfinite(metrics[f]) ? Metrics::Value(metrics[f]) : Metrics::Value();
  }
  entropy_.exchange(io);
  token_entropy_.exchange(io);
  if (load_trend_) {
    load_trend_->exchange(io);
    if (history_) history_->exchange(io);
  }
  io.values("monitor.grad_norm", grad_norm_, StateIo::kNotNegative);
  io.values("monitor.update_frequency", update_frequency_, {0, 1});
  io.values("monitor.fast_loss", fast_loss_, StateIo::kAnyNumber);
  io.values("monitor.slow_loss", slow_loss_, StateIo::kAnyNumber);
  if (tail_) {
    tail_->exchange(io);
    tail_load_->exchange(io);
  }
  health_.exchange(io);
}

// ---- LayerMonitor: the public class ----

LayerMonitor::LayerMonitor(const StatsShape& shape, const MonitorOptions& options,
                           const MetricsOptions& metrics)
    : impl_(std::make_unique<Impl>(shape, options, metrics)) {}
LayerMonitor::~LayerMonitor() = default;
LayerMonitor::LayerMonitor(LayerMonitor&&) noexcept = default;
LayerMonitor& LayerMonitor::operator=(LayerMonitor&&) noexcept = default;

void LayerMonitor::observe(const RoutingStats& stats, Metrics& metrics, std::optional<double> loss) {
  impl_->observe(stats, metrics, loss);
}
void LayerMonitor::observe_nothing() {
  impl_->observe_nothing();
}
std::span<const double> LayerMonitor::smoothed_load() const {
  return impl_->smoothed_;
}
const Metrics& LayerMonitor::smoothed() const {
  return impl_->smoothed_metrics_;
}
std::span<const std::int64_t> LayerMonitor::steps_below() const {
  return impl_->below_;
}
bool LayerMonitor::is_dead(int expert) const {
  return impl_->below_[static_cast<std::size_t>(expert)] >= impl_->options_.dead_after;
}
std::int64_t LayerMonitor::steps_observed() const {
  return impl_->observed_;
}
std::span<const double> LayerMonitor::update_frequency() const {
  return impl_->gradient_steps_ > 0 ? std::span<const double>(impl_->update_frequency_)
                                    : std::span<const double>();
}
Health LayerMonitor::health() const {
  return impl_->health_.state();
}
bool LayerMonitor::has(FailureMode mode) const {
  return impl_->health_.has(mode);
}
std::span<const std::string_view> LayerMonitor::alerts() const {
  return impl_->health_.alerts();
}
std::string_view LayerMonitor::phase() const {
  return impl_->health_.phase();
}
LayerMonitor::Trend LayerMonitor::trend(const MetricField& field) const {
  return impl_->trend(field);
}
void LayerMonitor::exchange(StateIo& io) {
  if (!io.reads()) return impl_->exchange(io);
  // Read into another: a bad state leaves this one as it was.
  Impl fresh(impl_->shape_, impl_->options_, impl_->metrics_options_);
  fresh.exchange(io);
  *impl_ = std::move(fresh);
}

}  // namespace moectl
