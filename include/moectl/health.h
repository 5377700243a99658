// Health of one layer: a state, named failure modes, alerts and bands, each with its own way in, a looser way
// out and a dwell, so that none of them flaps.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/bands.h"

namespace moectl {

/// In order of severity: where several apply, the last of them is reported.
enum class Health {
  kNoData,  ///< No token yet, or none for `dwell` steps.
  kHealthy,
  kWeakSpecialization,  ///< Near uniform (or the targets) and the expert tells nothing of token or domain. Off
                        ///< unless asked for.
  kStagnant,            ///< Experts that get tokens and learn nothing.
  kImbalanced,          ///< More imbalance than sampling explains.
  kOscillating,         ///< The load swings back and forth, wider than sampling does.
  kCollapsing,          ///< Experts are dying, entropy heads for collapse, or the Fisher alarm stands.
  kCollapsed,           ///< Few experts carry the load.
};
inline constexpr int kHealthCount = 8;
std::string_view name_of(Health health);
/// The state of that name; absent if none has it.
std::optional<Health> health_of(std::string_view name);

/// What is going wrong, by the name that the field has for it. Several can hold at once.
enum class FailureMode {
  kExpertCollapse,         ///< Collapsing or collapsed.
  kRoutingOscillation,     ///< Oscillating.
  kBrittleSpecialization,  ///< Experts serve one domain alone: the load follows the mixture.
  kInferenceBottleneck,    ///< One expert or device holds up the rest, more than its target does.
  kSilentCapacityLoss,     ///< Dead experts or dropped tokens, whatever the averages say.
};
inline constexpr int kFailureModeCount = 5;
std::string_view name_of(FailureMode mode);

struct AlertRule {
  std::string name{};                      ///< Reported; by default "METRIC above VALUE".
  std::string metric{};                    ///< Of metric_fields().
  std::optional<double> above{}, below{};  ///< One of them.
  int for_steps = 1;       ///< Steps in a row before it is raised, and before it is lifted; ≥ 1.
  std::int64_t after = 0;  ///< Looked at from this step on; ≥ 0.
};

struct Phase {
  std::string name{};       ///< "early", "mid", "late", … ; may be empty.
  std::int64_t until = -1;  ///< The step at which it ends; -1 = never (the last phase only).
  Bands bands{};            ///< Replace the common bands of the same metrics.
};

struct HealthOptions {
  int dwell = 20;                    ///< Steps a state, failure mode, alert or band stays as it is; ≥ 1.
  bool weak_specialization = false;  ///< Whether that state is looked for.
  Bands bands{};                     ///< On smoothed metrics, in every phase.
  std::vector<Phase> phases{};       ///< In order of `until`.
  std::vector<AlertRule> alerts{};   ///< On the step's metrics.
};

/// What is wrong with the options, as "key: value: constraint"; empty if nothing.
std::string check_health(const HealthOptions& options);
/// The bands in force at a step.
Bands bands_at(const HealthOptions& options, std::int64_t step);

// ---- Can the auxiliary loss go? ----

/// One step of one layer.
struct AuxLossSample {
  double weight = 0;               ///< In force.
  double signed_excess_cv_sq = 0;  ///< load_cv² - floor².
  bool healthy = true;
};

struct AuxLossReview {
  enum class Verdict { kNotEnoughEvidence, kRaise, kKeep, kLower, kSwitchOff, kAlreadyOff };
  Verdict verdict = Verdict::kNotEnoughEvidence;
  double excess_cv = 0;         ///< Over the samples looked at: √max(0, mean signed square).
  double excess_cv_at_low = 0;  ///< Over the quarter of them with the lowest weights.
  double lowest_weight = 0, highest_weight = 0;  ///< Means of the lowest and of the highest quarter.
  std::string reason;                            ///< One sentence with the numbers.
};
std::string_view name_of(AuxLossReview::Verdict verdict);

/// Whether the auxiliary loss can be lowered or switched off, from what was recorded: balance that held while
/// the weight came down to a quarter is evidence; balance at one weight is a reason to try half of it.
AuxLossReview review_aux_loss(std::span<const AuxLossSample> samples);

}  // namespace moectl
