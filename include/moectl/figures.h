// Figures: the numbers by which runs are compared.
//
// A run is a sequence of steps; each step is averaged over its layers. Terms:
//   steady window   the last 100 steps before the shift of the data, or of the run if there is no shift
//   settle          the first step after which the 5-step median of layer-mean MaxVio stays below 1.6 times the mean
//                   floor (kBalancedFloors, health.h) of the steady window for 20 steps
//   excess area     Σ over the 100 steps after a shift of max(0, MaxVio - its mean over the last 100 steps of the run)
// A mean over steps weighs each step by its tokens; settle and excess area count steps. A ratio to a floor is a ratio of
// means. The floor is the sampling floor where known, else the noise floor.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/controller.h"
#include "moectl/health.h"
#include "moectl/metrics.h"

namespace moectl {

/// Which floor a figure is compared with.
enum class FloorKind {
  kNone,
  kNoise,
  kSampling,
  kMixed
};  // mixed: some layers or steps have a sampling floor
/// "noise floor", "sampling floor", "mixed floors"; empty without a floor.
std::string_view name_of(FloorKind floor);

/// One step, over all its layers. Absent values: no layer had data.
struct StepFigures {
  std::int64_t step = 0;
  std::int64_t tokens = 0;  ///< Of a layer; the weight of the step in a mean over steps. 0: not known.
  std::optional<double> max_vio, cv;              ///< Means over layers.
  std::optional<double> floor_max_vio, floor_cv;  ///< Likewise.
  std::optional<double> excess_cv_sq;             ///< Likewise: load_cv² less the floor's, signed.
  std::optional<double> drop_rate;                ///< Likewise, of layers whose router reports it.
  double dead_experts = 0;                        ///< Sum over layers.
  std::int64_t limit_hits = 0;  ///< Actuators whose proposal a limit changed; see is_limit().
  std::optional<double> loss;
  FloorKind floor = FloorKind::kNone;  ///< Which floor_max_vio and floor_cv are.
};

/// True for reasons that shorten, clip or override a move (rate, range, reach, guard, oscillation, rollback, fallback); false
/// for holds that are planned (cadence, warm-up, …) or follow from missing data.
bool is_limit(Reason reason);

/// One step of a running controller.
StepFigures figures_of(const StepReport& report);

/// The figures of a run.
struct Figures {
  std::int64_t steps = 0;
  std::optional<std::int64_t> settle;                                    ///< Absent = never settled.
  std::optional<double> max_vio, max_vio_over_floor, cv, cv_over_floor;  ///< Over the steady window.
  /// Over the steady window: the root of the mean signed square, with its sign.
  std::optional<double> excess_cv;
  std::optional<double> excess_area;  ///< Absent without a shift.
  /// MaxVio over the floor in the run's last 100 steps: how far the run recovered from the shift. Absent without a
  /// shift.
  std::optional<double> end_over_floor;
  std::optional<double> dead_experts;  ///< Mean over the run's last 100 steps of the sum over layers.
  /// Share of the assignments dropped for lack of capacity in the run's last 100 steps; absent if no router reports it.
  std::optional<double> drop_rate;
  std::int64_t limit_hits = 0;            ///< Over the whole run.
  std::optional<double> loss;             ///< Mean of the last 100 steps that have a loss.
  std::optional<double> validation_loss;  ///< Of the last validation pass; filled in by readers of logs.
  /// MaxVio of the counts summed over the steady window, mean over layers; filled in by readers of logs.
  std::optional<double> max_vio_global;
  FloorKind floor = FloorKind::kNone;  ///< What the steady window is compared with.
};

/// `steps` in order. `shift`: the first step with changed data.
Figures compute_figures(std::span<const StepFigures> steps, std::optional<std::int64_t> shift = {});

/// Reads a run log or a trace (metrics are computed where it has none). `shift` overrides the one in its
/// header. Throws LogError.
Figures read_figures(const std::string& path, std::optional<std::int64_t> shift = {});

/// Means over the steps, by their tokens, in units of the mean floor.
OverFloor over_floor(std::span<const StepFigures> steps);

/// The figures by name, in the order of tables; absent ones are absent.
std::vector<std::pair<std::string, std::optional<double>>> fields_of(const Figures& figures);

}  // namespace moectl
