// Figures: the few numbers by which runs are compared.
//
// A run is a row of steps, each summed up over its layers. Words with one meaning:
//   steady window   the last 100 steps before the shift, if there is one, else the last 100 of the run
//   settle          the first step after which the 5-step median of layer-mean MaxVio stays under 1.6 times
//   the mean
//                   floor of the steady window for 20 steps
//   excess area     Σ over the 100 steps from a shift on of max(0, MaxVio - its mean over the run's last 100
//   steps)
// A mean over steps weighs each step by its tokens; settle and excess area count steps. A ratio to a floor is a mean over a mean. The floor is the sampling floor where known, else the noise
// floor.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/metrics.h"

namespace moectl {

/// One step, over all its layers. Absent: no layer had data.
struct StepFigures {
  std::int64_t step = 0;
  std::int64_t tokens = 0;  ///< Of a layer; the weight of the step in a mean over steps. 0: not known.
  std::optional<double> max_vio, cv;              ///< Means over layers.
  std::optional<double> floor_max_vio, floor_cv;  ///< Likewise.
  std::optional<double> excess_cv_sq;             ///< Likewise: load_cv² less the floor's, signed.
  std::optional<double> drop_rate;                ///< Likewise, of layers whose router reports it.
  double dead_experts = 0;                        ///< Sum over layers.
  std::int64_t limit_hits = 0;  ///< Actuators that a limit kept from their proposal; see is_limit().
  std::optional<double> loss;
};

/// True for what shortens, clips or overrides a move (rate, range, guard, oscillation, rollback, fallback);
/// false for holds that are part of the plan or of missing data.
bool is_limit(Reason reason);

/// One step of a running controller.
StepFigures figures_of(const StepReport& report);

/// The figures of a run.
struct Figures {
  std::int64_t steps = 0;
  std::optional<std::int64_t> settle;                                    ///< Absent: never.
  std::optional<double> max_vio, max_vio_over_floor, cv, cv_over_floor;  ///< Over the steady window.
  std::optional<double>
      excess_cv;  ///< Over the steady window: the root of the mean signed square, with its sign.
  std::optional<double> excess_area;  ///< Absent without a shift.
  /// MaxVio over the floor in the run's last 100 steps: what became of the shift. Absent without one.
  std::optional<double> end_over_floor;
  std::optional<double> dead_experts;  ///< Mean over the run's last 100 steps of the sum over layers.
  /// Share of the assignments dropped for lack of capacity, likewise; absent if no router reports it.
  std::optional<double> drop_rate;
  std::int64_t limit_hits = 0;            ///< Over the whole run.
  std::optional<double> loss;             ///< Mean of the last 100 steps that have one.
  std::optional<double> validation_loss;  ///< Of the last validation pass; filled in by readers of logs.
};

/// `steps` in order. `shift`: the first step with other data.
Figures compute_figures(std::span<const StepFigures> steps, std::optional<std::int64_t> shift = {});

/// Reads a run log or a trace (metrics are computed where it has none). `shift` overrides the one in its
/// header. Throws LogError.
Figures read_figures(const std::string& path, std::optional<std::int64_t> shift = {});

/// The figures by name, in the order of tables; absent ones are absent.
std::vector<std::pair<std::string, std::optional<double>>> fields_of(const Figures& figures);

}  // namespace moectl
