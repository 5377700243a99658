#include "export/run_figures.h"

namespace moectl {

Metrics RecordMetrics::of(const LogRecord& record) {
  Metrics metrics;
  if (record.tag != "train" || record.layer < 0) return metrics;
  if (!record.metrics.empty()) {
    for (const auto& [name, value] : record.metrics) {
      if (const MetricField* field = find_metric(name)) metrics.*field->value = value;
    }
  } else if (record.stats.experts() > 0) {
    const MetricsOptions options{.targets = targets_of(record)};
    metrics = measurer_.measure(record.stats, options);
    auto& monitor = monitors_[record.layer];
    if (!monitor) monitor = std::make_unique<LayerMonitor>(record.stats.shape(), MonitorOptions(), options);
    monitor->observe(record.stats, metrics);
  }
  return metrics;
}

std::vector<double> targets_of(const LogRecord& record) {
  if (!record.targets) return {};
  return {record.targets->shares().begin(), record.targets->shares().end()};
}

LimitReport reasons_of(const LoggedActuator& actuator) {
  LimitReport report;
  for (const std::string& word : actuator.reasons) {
    if (const auto reason = reason_of(word)) report.add(*reason);
  }
  return report;
}

void RunFigures::add(const LogRecord& record, const Metrics& metrics) {
  if (record.tag == "validation" && record.loss) validation_[record.step] = *record.loss;
  if (record.tag != "train") return;
  steps_.try_emplace(record.step, record.step).first->second.add(sample_of(record, metrics));
}

Figures RunFigures::figures(std::optional<std::int64_t> shift) const {
  std::vector<StepFigures> row;
  row.reserve(steps_.size());
  for (const auto& [number, step] : steps_) row.push_back(step.figures());
  Figures figures = compute_figures(row, shift);
  if (!validation_.empty()) figures.validation_loss = validation_.rbegin()->second;
  return figures;
}

Figures read_figures(const std::string& path, std::optional<std::int64_t> shift) {
  LogReader reader(path);
  return read_figures(reader, shift);
}

Figures read_figures(LogReader& reader, std::optional<std::int64_t> shift) {
  if (!shift) shift = reader.header().shift;
  RecordMetrics metrics;
  RunFigures run;
  while (const auto record = reader.next()) run.add(*record, metrics.of(*record));
  return run.figures(shift);
}

}  // namespace moectl
