// One layer of one step, the same whether a running controller reports it or a log is read: what feeds and
// exports take in.
#pragma once

#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "moectl/controller.h"
#include "moectl/figures.h"
#include "moectl/limits.h"
#include "moectl/metrics.h"
#include "moectl/run_log.h"

namespace moectl {

struct ActuatorSample {
  std::span<const double> applied;  ///< Empty if not logged.
  std::optional<double> min, max;   ///< Of applied; absent if the actuator decided nothing here.
  LimitReport reasons;
  Responsiveness responsiveness{};
};

/// Views of memory that belongs to the report or the record.
struct StepSample {
  std::int64_t step = 0;
  int layer = -1;  ///< -1: the actuators of `scope: model`.
  std::optional<double> loss;
  std::int64_t tokens = 0;
  const Metrics* metrics = nullptr;      ///< May be null.
  const RoutingStats* stats = nullptr;   ///< May be null.
  const LoadTargets* targets = nullptr;  ///< Null: equal ones.
  std::string_view health;               ///< Empty if not known.
  std::span<const std::string_view> alerts;
  ActuatorSample actuators[kActuatorCount];
};

/// What figures of both kinds are compared with.
FloorKind joined(FloorKind a, FloorKind b);
/// Relative load of each expert (load_targets.h) in `out`; none without a token.
void relative_loads(std::span<const std::int64_t> counts, const LoadTargets* targets,
                    std::vector<double>& out);

/// The sample of a report's layer, or of its whole-model actuators where `layer` is null.
StepSample sample_of(const StepReport& report, const LayerReport* layer);
/// The sample of a record. The names of its alerts are put into `alerts`; without one they are left out.
StepSample sample_of(const LogRecord& record, const Metrics& metrics,
                     std::vector<std::string_view>* alerts = nullptr);
/// True if the report has actuators of `scope: model`.
bool has_model_actuators(const StepReport& report);

/// Sums up the layers of one step, one after another.
class LayerMean {
 public:
  explicit LayerMean(std::int64_t step) { figures_.step = step; }
  void add(const StepSample& sample);
  StepFigures figures() const;

 private:
  struct Mean {
    double sum = 0;
    int count = 0;
    void add(const Metrics::Value& value);
    std::optional<double> value() const;
  };
  StepFigures figures_;
  Mean max_vio_, cv_, floor_max_vio_, floor_cv_, excess_cv_sq_, drop_rate_;
};

}  // namespace moectl
