#include "export/step_sample.h"

#include <algorithm>
#include <numeric>

#include "moectl/monitor.h"

namespace moectl {
namespace {

constexpr auto kBias = static_cast<std::size_t>(Actuator::kExpertBias);

ActuatorSample sample_of(const ActuatorReport& report) {
  ActuatorSample sample{report.applied, {}, {}, report.reasons, report.responsiveness};
  if (!report.applied.empty()) {
    const auto [min, max] = std::minmax_element(report.applied.begin(), report.applied.end());
    sample.min = *min;
    sample.max = *max;
  }
  return sample;
}

/// Names that this version does not know are skipped.
LimitReport reasons_of(const LoggedActuator& actuator) {
  LimitReport report;
  for (const std::string& word : actuator.reasons) {
    if (const auto reason = reason_of(word)) report.add(*reason);
  }
  return report;
}

}  // namespace

void relative_loads(std::span<const std::int64_t> counts, const LoadTargets* targets,
                    std::vector<double>& out) {
  out.clear();
  const auto sum = static_cast<double>(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}));
  const double mean = sum / static_cast<double>(counts.size());
  if (!(mean > 0)) return;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const auto count = static_cast<double>(counts[i]);
    out.push_back(targets ? targets->relative(i, count, sum) : count / mean);
  }
}

StepSample sample_of(const StepReport& report, const LayerReport* layer) {
  StepSample sample;
  sample.step = report.step;
  sample.loss = report.info.loss;
  if (layer) {
    sample.targets = layer->targets;
    sample.layer = layer->layer;
    sample.metrics = layer->metrics;
    if (layer->stats && layer->stats->valid()) sample.stats = layer->stats;
    if (sample.stats) sample.tokens = sample.stats->tokens();
    if (layer->monitor) {
      sample.health = name_of(layer->monitor->health());
      sample.alerts = layer->monitor->alerts();
    }
  }
  const ActuatorReport(&actuators)[kActuatorCount] = layer ? layer->actuators : report.model;
  for (std::size_t a = 0; a < kActuatorCount; ++a) sample.actuators[a] = sample_of(actuators[a]);
  if (layer) sample.actuators[kBias].responsiveness = layer->responsiveness;
  return sample;
}

StepSample sample_of(const LogRecord& record, const Metrics& metrics, std::vector<std::string_view>* alerts) {
  StepSample sample;
  sample.step = record.step;
  sample.loss = record.loss;
  sample.layer = record.layer;
  sample.targets = record.targets.get();
  if (record.layer >= 0) sample.metrics = &metrics;
  if (record.stats.experts() > 0) sample.stats = &record.stats;
  sample.tokens = sample.stats ? sample.stats->tokens() : record.tokens;
  sample.health = record.health;
  if (alerts) {
    alerts->assign(record.alerts.begin(), record.alerts.end());
    sample.alerts = *alerts;
  }
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    const auto it = record.actuators.find(std::string(name_of(kActuators[a])));
    if (it == record.actuators.end()) continue;
    const LoggedActuator& logged = it->second;
    sample.actuators[a] = {logged.applied, logged.min, logged.max, reasons_of(logged), logged.responsiveness};
  }
  sample.actuators[kBias].responsiveness = record.responsiveness;
  return sample;
}

bool has_model_actuators(const StepReport& report) {
  return std::any_of(std::begin(report.model), std::end(report.model),
                     [](const ActuatorReport& actuator) { return !actuator.applied.empty(); });
}

void LayerMean::Mean::add(const Metrics::Value& value) {
  if (!value) return;
  sum += *value;
  ++count;
}

std::optional<double> LayerMean::Mean::value() const {
  return count ? std::optional(sum / count) : std::nullopt;
}

void LayerMean::add(const StepSample& sample) {
  if (sample.loss) figures_.loss = sample.loss;
  figures_.tokens = std::max(figures_.tokens, sample.tokens);
  for (const ActuatorSample& actuator : sample.actuators) {
    bool limited = false;
    for (int r = 0; r < kReasonCount; ++r) {
      const auto reason = static_cast<Reason>(r);
      limited = limited || (actuator.reasons.has(reason) && is_limit(reason));
    }
    figures_.limit_hits += limited ? 1 : 0;
  }
  if (!sample.metrics) return;
  const Metrics& metrics = *sample.metrics;
  const FloorInForce floor = floor_of(metrics);
  max_vio_.add(metrics.max_vio);
  cv_.add(metrics.load_cv);
  if (floor.cv) {
    figures_.floor = joined(figures_.floor, floor.sampling ? FloorKind::kSampling : FloorKind::kNoise);
  }
  floor_max_vio_.add(floor.max_vio);
  floor_cv_.add(floor.cv);
  excess_cv_sq_.add(signed_excess_cv_sq(metrics));
  drop_rate_.add(metrics.drop_rate);
  figures_.dead_experts += metrics.dead_experts.value_or(0);
}

StepFigures LayerMean::figures() const {
  StepFigures figures = figures_;
  figures.max_vio = max_vio_.value();
  figures.cv = cv_.value();
  figures.floor_max_vio = floor_max_vio_.value();
  figures.floor_cv = floor_cv_.value();
  figures.excess_cv_sq = excess_cv_sq_.value();
  figures.drop_rate = drop_rate_.value();
  return figures;
}

}  // namespace moectl
