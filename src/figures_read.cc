// Figures from files: run logs carry metrics, traces get theirs here.
#include <map>
#include <memory>

#include "moectl/figures.h"
#include "moectl/monitor.h"
#include "moectl/run_log.h"

namespace moectl {
namespace {

/// The metrics of a record: those it carries, else those of its counts.
class RecordMetrics {
 public:
  Metrics of(const LogRecord& record) {
    Metrics metrics;
    if (!record.metrics.empty()) {
      for (const auto& [name, value] : record.metrics) {
        if (const MetricField* field = find_metric(name)) metrics.*field->value = value;
      }
    } else if (record.stats.experts() > 0) {
      metrics = measure(record.stats);
      auto& monitor = monitors_[record.layer];
      if (!monitor) monitor = std::make_unique<LayerMonitor>(record.stats.shape(), MonitorOptions());
      monitor->observe(record.stats, metrics);
    }
    return metrics;
  }

 private:
  std::map<int, std::unique_ptr<LayerMonitor>> monitors_;
};

LimitReport reasons_of(const LoggedActuator& actuator) {
  LimitReport report;
  for (const std::string& word : actuator.reasons) {
    if (const auto reason = reason_of(word)) report.add(*reason);
  }
  return report;
}

}  // namespace

Figures read_figures(const std::string& path, std::optional<std::int64_t> shift) {
  LogReader reader(path);
  if (!shift) shift = reader.header().shift;
  RecordMetrics metrics;
  std::map<std::int64_t, LayerMean> steps;
  std::map<std::int64_t, double> validation;
  while (const auto record = reader.next()) {
    if (record->tag == "validation" && record->loss) validation[record->step] = *record->loss;
    if (record->tag != "train") continue;
    LayerMean& step = steps.try_emplace(record->step, record->step).first->second;
    if (record->layer >= 0) step.add(metrics.of(*record));
    for (const auto& [name, actuator] : record->actuators) step.add(reasons_of(actuator));
    if (record->loss) step.set_loss(record->loss);
  }
  std::vector<StepFigures> row;
  row.reserve(steps.size());
  for (const auto& [number, step] : steps) row.push_back(step.figures());
  Figures figures = compute_figures(row, shift);
  if (!validation.empty()) figures.validation_loss = validation.rbegin()->second;
  return figures;
}

}  // namespace moectl
