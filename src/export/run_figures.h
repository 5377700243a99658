// From the records of a file to the figures of its run.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "export/step_sample.h"
#include "log/parts.h"
#include "measure/cached_measurer.h"
#include "moectl/monitor.h"
#include "moectl/run_log.h"

namespace moectl {

inline constexpr std::size_t kSteadyWindow = 100;  // steps

/// The churn that each record's biases make of its routing: from the biases in force before it.
class Churn {
 public:
  std::optional<double> of(const LogRecord& record);

 private:
  struct Before {
    std::int64_t step = 0;
    std::vector<double> biases;
  };
  std::map<std::pair<int, std::string>, Before> before_;
  std::vector<double> change_;
  std::vector<std::pair<double, double>> scratch_;
};

/// The metrics of training records: those they carry, else those of their counts against their targets (with the default
/// options). Other records, and those of whole-model actuators, have none.
class RecordMetrics {
 public:
  /// `details`: also what the record does not carry and its sums tell: percentiles of the load, churn.
  explicit RecordMetrics(bool details = false) : details_(details) {}
  Metrics of(const LogRecord& record);

 private:
  bool details_;
  Churn churn_;
  CachedMeasurer measurer_;
  std::map<int, std::unique_ptr<LayerMonitor>> monitors_;
};

/// What the targets of a record are, as an option.
std::vector<double> targets_of(const LogRecord& record);

/// The figures of a log's whole steps; see read_figures(). `summed`: see RunFigures.
Figures read_figures(WholeRecords& records, std::optional<std::int64_t> shift,
                     std::size_t summed = kSteadyWindow);

/// MaxVio of counts summed over steps, mean over layers: what alternates or is small in single steps, and stays.
class SummedCounts {
 public:
  /// The last `window` records of each layer; 0: all.
  explicit SummedCounts(std::size_t window) : window_(window) {}
  /// Throws LogError where the counts of a layer sum to more than 64 bits hold.
  void add(const LogRecord& record);
  std::optional<double> max_vio() const;

 private:
  struct Layer {
    std::vector<std::int64_t> sum;
    std::int64_t total = 0;                       // of the sum
    std::vector<std::vector<std::int64_t>> ring;  // the records in the sum
    std::size_t oldest = 0;
    std::shared_ptr<const LoadTargets> targets;
  };
  std::size_t window_;
  std::map<int, Layer> layers_;
};

/// Takes in a run record by record.
class RunFigures {
 public:
  /// `shift` as in compute_figures(); `summed`: the steps before it whose counts are summed, 0 for all.
  explicit RunFigures(std::optional<std::int64_t> shift, std::size_t summed = kSteadyWindow)
      : shift_(shift), summed_(summed) {}
  void add(const LogRecord& record, const Metrics& metrics);
  Figures figures() const;

 private:
  std::optional<std::int64_t> shift_;
  SummedCounts summed_;
  std::map<std::int64_t, LayerMean> steps_;
  std::map<std::int64_t, double> validation_;
};

}  // namespace moectl
