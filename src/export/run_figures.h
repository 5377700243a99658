// From the records of a file to the figures of its run.
#pragma once

#include <map>
#include <memory>
#include <optional>

#include "export/step_sample.h"
#include "measure/cached_measurer.h"
#include "moectl/monitor.h"
#include "moectl/run_log.h"

namespace moectl {

/// The metrics of training records: those they carry, else those of their counts against their targets (with the default
/// options). Other records, and those of whole-model actuators, have none.
class RecordMetrics {
 public:
  Metrics of(const LogRecord& record);

 private:
  CachedMeasurer measurer_;
  std::map<int, std::unique_ptr<LayerMonitor>> monitors_;
};

/// What the targets of a record are, as an option.
std::vector<double> targets_of(const LogRecord& record);

/// The reasons of a logged actuator; names that this version does not know are skipped.
LimitReport reasons_of(const LoggedActuator& actuator);

/// The figures of a log that is open; see read_figures().
Figures read_figures(LogReader& log, std::optional<std::int64_t> shift);

/// Takes in a run record by record.
class RunFigures {
 public:
  void add(const LogRecord& record, const Metrics& metrics);
  Figures figures(std::optional<std::int64_t> shift) const;

 private:
  std::map<std::int64_t, LayerMean> steps_;
  std::map<std::int64_t, double> validation_;
};

}  // namespace moectl
