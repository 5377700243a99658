// Health of one layer: a state, named failure modes, alerts and bands. Each has a threshold to enter, a looser one to
// leave and a minimum number of steps between changes (`dwell`), so that none switches back and forth.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/bands.h"
#include "moectl/metrics.h"

namespace moectl {

// ---- What is balanced ----
//
// A load is balanced while neither its MaxVio nor its CV is above 1.6 times the floor: the sampling floor where
// sequences are recorded, else the noise floor. Health, report, watch, compare, guard and monitoring use this one
// definition. What lies above is imbalanced; collapsing and collapsed are its worse forms.

inline constexpr double kBalancedFloors = 1.6;

/// A load in units of the floor that it is judged by: 1 is as even as chance allows. Infinite where the floor is 0 and the
/// load is not on target. Absent: no data, or no floor.
struct OverFloor {
  std::optional<double> max_vio, cv;
  bool sampling = false;  ///< Over the sampling floor; else over the noise floor.
  /// The larger of the two; what balance is judged by.
  std::optional<double> worst() const {
    return max_vio && cv ? std::max(*max_vio, *cv) : max_vio ? max_vio : cv;
  }
};
/// Of a single window; or of means, in which case it is a ratio of means.
OverFloor over_floor(const Metrics& metrics);

/// In order of severity: if several apply, the last of them is reported.
enum class Health {
  kNoData,  ///< No token yet, or none for `dwell` steps.
  kHealthy,
  kWeakSpecialization,  ///< Load near uniform (or the targets), and routing is uninformative about token and domain.
                        ///< Off by default.
  kStagnant,            ///< Experts get tokens, but neither gradient nor falling loss.
  kImbalanced,   ///< MaxVio or CV, smoothed, above kBalancedFloors floors: more than sampling explains.
  kOscillating,  ///< The load swings back and forth by more than sampling explains.
  kCollapsing,   ///< Imbalanced, and experts are dying, entropy falls towards collapse, or fhs_alarm holds.
  kCollapsed,    ///< Imbalanced, and few experts carry the load.
};
inline constexpr int kHealthCount = 8;
std::string_view name_of(Health health);
/// The state of that name; absent if none has it.
std::optional<Health> health_of(std::string_view name);

/// Failure modes by their names in the field. Several can hold at the same time.
enum class FailureMode {
  kExpertCollapse,         ///< Collapsing or collapsed.
  kRoutingOscillation,     ///< Oscillating.
  kBrittleSpecialization,  ///< Experts serve one domain alone: the load follows the mixture.
  kInferenceBottleneck,    ///< One expert or device is slower than the rest by more than its target explains.
  kSilentCapacityLoss,     ///< Dead experts or dropped tokens, whatever the averages say.
};
inline constexpr int kFailureModeCount = 5;
std::string_view name_of(FailureMode mode);

struct AlertRule {
  std::string name{};                      ///< Name in reports; by default "METRIC above VALUE".
  std::string metric{};                    ///< A name of metric_fields().
  std::optional<double> above{}, below{};  ///< Exactly one is set.
  int for_steps = 1;       ///< Consecutive steps before the alert is raised, and before it is cleared; ≥ 1.
  std::int64_t after = 0;  ///< The first step at which the rule applies; ≥ 0.
};

struct Phase {
  std::string name{};       ///< "early", "mid", "late", … ; may be empty.
  std::int64_t until = -1;  ///< The step at which the phase ends; -1 = never (the last phase only).
  Bands bands{};            ///< They replace the common bands of the same metrics.
};

struct HealthOptions {
  int dwell = 20;  ///< Smallest number of steps between changes of a state, mode, alert or band; ≥ 1.
  bool weak_specialization = false;  ///< Whether kWeakSpecialization can be reported.
  Bands bands{};                     ///< On smoothed metrics; they apply in every phase.
  std::vector<Phase> phases{};       ///< In order of `until`.
  std::vector<AlertRule> alerts{};   ///< On the metrics of the step.
};

/// The bands in force at a step.
Bands bands_at(const HealthOptions& options, std::int64_t step);

// ---- Can the auxiliary loss be switched off? ----

/// One step of one layer.
struct AuxLossSample {
  double weight = 0;               ///< Auxiliary-loss weight in force.
  double signed_excess_cv_sq = 0;  ///< load_cv² - floor².
  bool healthy = true;
};

struct AuxLossReview {
  enum class Verdict { kNotEnoughEvidence, kRaise, kKeep, kLower, kSwitchOff, kAlreadyOff };
  Verdict verdict = Verdict::kNotEnoughEvidence;
  double excess_cv = 0;         ///< Over all samples: √max(0, mean of signed_excess_cv_sq).
  double excess_cv_at_low = 0;  ///< Over the quarter of the samples with the lowest weights.
  double lowest_weight = 0, highest_weight = 0;  ///< Means of the lowest and of the highest quarter.
  std::string reason;                            ///< One sentence with the numbers.
};
std::string_view name_of(AuxLossReview::Verdict verdict);

/// Judges from recorded samples whether the auxiliary loss can be lowered or switched off. Balance that held while the
/// weight fell to a quarter is evidence for switching off; balance at one weight is a reason to try half of it.
AuxLossReview review_aux_loss(std::span<const AuxLossSample> samples);

}  // namespace moectl
