// The keys of a layer's history and health.
#pragma once

#include "base/input_limits.h"
#include "measure/measure_fields.h"
#include "moectl/health.h"
#include "moectl/monitor.h"

namespace moectl {

/// The names of all metrics.
std::vector<std::string> metric_names();
/// A band of an unknown metric, or one that is no range.
std::optional<ConfigProblem> check_value(const FieldInfo& field, const Bands& bands);
/// What is wrong with the options.
std::optional<ConfigProblem> problem_in(const HealthOptions& options);

inline constexpr Range kTrendWindow = {.low = 4, .high = kLongestWindow};
inline constexpr Range kBandEnds = {.words = "METRIC: [lowest, highest]"};
inline constexpr Range kMetric = {.words = "a metric", .choices = metric_names};

// `health` is a section of its own.
template <>
inline constexpr auto kFieldsOf<MonitorOptions> = std::tuple{
    Field{"dead_fraction",
          &MonitorOptions::dead_fraction,
          kState,
          {.low = 0, .high = 1, .below_high = true},
          "mean loads",
          "Smoothed load below which an expert may be dead; with targets, of the expert's own."},
    Field{"dead_after", &MonitorOptions::dead_after, kState, steps_from(1), "steps",
          "Steps in a row below dead_fraction after which an expert is dead."},
    Field{"ema", &MonitorOptions::ema, kState, kPositivePart,
          "Weight of the newest value in every moving average."},
    Field{"trend_window", &MonitorOptions::trend_window, kState, kTrendWindow, "steps",
          "Steps over which trends are taken."},
    Field{"trends", &MonitorOptions::trends, kState,
          "Trends of the loads and of every metric: what oscillation and shift need. On by default with a "
          "section health."},
};

template <>
inline constexpr auto kFieldsOf<Phase> = std::tuple{
    Field{"name", &Phase::name, kRanks, "Name of the phase in reports."},
    Field{"until", &Phase::until, kState, steps_from(1), "steps",
          "Step at which the phase ends; left out in the last phase only.", Presence::kMinusOneIsAbsent},
    Field{"bands", &Phase::bands, kPresent, kBandEnds,
          "In this phase in place of the common bands of the same metrics."},
};

template <>
inline constexpr auto kFieldsOf<AlertRule> = std::tuple{
    Field{"metric", &AlertRule::metric, kState, kMetric, "What is watched, step by step.",
          Presence::kRequired},
    Field{"name", &AlertRule::name, kRanks, "Name in reports; by default \"METRIC above VALUE\"."},
    Field{"above", &AlertRule::above, kRanks, "Raised above this value. Either above or below is given."},
    Field{"below", &AlertRule::below, kRanks, "Raised below this value."},
    Field{"for", &AlertRule::for_steps, kRanks, steps_from(1), "steps",
          "Steps in a row before the alert is raised, and before it is lifted."},
    Field{"after", &AlertRule::after, kRanks, steps_from(0), "steps", "First step that is looked at."},
};

template <>
inline constexpr auto kFieldsOf<HealthOptions> = std::tuple{
    Field{"dwell", &HealthOptions::dwell, kState, steps_from(1), "steps",
          "Steps for which a health state, failure mode, alert or band stays as it is."},
    Field{"weak_specialization", &HealthOptions::weak_specialization, kState,
          "Whether weak specialization is looked for."},
    Field{"bands", &HealthOptions::bands, kPresent, kBandEnds,
          "Wanted ranges of smoothed metrics, in every phase."},
    Field{"phases", &HealthOptions::phases, kRanks, "Phases of the training, in order."},
    Field{"alerts", &HealthOptions::alerts, kRanks, "Rules on metrics of single steps."},
};

}  // namespace moectl
