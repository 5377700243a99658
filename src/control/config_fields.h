// The keys of a config, section by section. A new key is a member of its struct and one line here (or in
// watch_fields.h, measure_fields.h): docs/config.md.
#pragma once

#include "base/input_limits.h"
#include "moectl/config.h"
#include "watch/watch_fields.h"

namespace moectl {

// Beyond these, sums over experts and factors e^rate would no longer be numbers, and means would lose their digits.
inline constexpr double kFarthest = 1e9;
inline constexpr Range kApplied = {.low = -kFarthest, .high = kFarthest, .words = "from -1e9 to 1e9"};
inline constexpr Range kRate = {
    .low = 0, .high = kFarthest, .above_low = true, .words = "above 0 and at most 1e9"};
/// Of the two scalars, which move by ratios: a factor of e^100 in one decision.
inline constexpr Range kScalarRate = {.low = 0, .high = 100, .above_low = true};
inline constexpr Range kWeight = {.low = 0, .high = kFarthest, .words = "from 0 to 1e9"};
/// A float32 that the router divides by.
inline constexpr Range kTemperature = {.low = 1 / kFarthest, .high = kFarthest, .words = "from 1e-9 to 1e9"};
/// What may be in force, whatever the limits of a config.
constexpr const Range& range_of(Actuator which) {
  return which == Actuator::kAuxLossWeight       ? kWeight
         : which == Actuator::kRouterTemperature ? kTemperature
                                                 : kApplied;
}
inline constexpr Range kPolicy = {.words = "a policy that serves the actuator"};
inline constexpr Range kMegabytes = {.low = 0, .high = 1e6, .words = "from 0 (never) to 1e6"};
inline constexpr Range kLayers = {.low = 1, .high = kMostLayers};
inline constexpr Range kExperts = {.low = 1, .high = kMostExperts};
inline constexpr Range kDelay = {.low = 0, .high = kLongestDelay};
inline constexpr Range kSequences = {.low = 0, .high = 1 << 20};
inline constexpr Range kLag = {.low = 0, .high = 1, .words = "0 or 1"};
inline constexpr Range kThreshold = {.low = 0, .high = 1, .above_low = true, .below_high = true};
inline constexpr Range kShare = {.low = 0, .high = 1, .above_low = true, .words = "in (0, 1]"};

constexpr std::array<Mode, 3> choices_of(Mode) {
  return {Mode::kActive, Mode::kShadow, Mode::kOff};
}
constexpr std::array<Fallback, 2> choices_of(Fallback) {
  return {Fallback::kHold, Fallback::kInitial};
}
constexpr std::array<Scope, 2> choices_of(Scope) {
  return {Scope::kLayer, Scope::kModel};
}
constexpr std::array<GainSchedule::Shape, 3> choices_of(GainSchedule::Shape) {
  return {GainSchedule::Shape::kLinear, GainSchedule::Shape::kCosine, GainSchedule::Shape::kStep};
}
constexpr std::array<ScoreSpace, 2> choices_of(ScoreSpace) {
  return {ScoreSpace::kProbability, ScoreSpace::kLogit};
}

// The registry checks options: which there are depends on the policy.
inline std::optional<ConfigProblem> check_value(const FieldInfo&, const PolicyOptions&) {
  return {};
}

std::string shown(const Initial& initial);
/// Checked together with the limits.
inline std::optional<ConfigProblem> check_value(const FieldInfo&, const Initial&) {
  return {};
}

template <>
inline constexpr auto kFieldsOf<ModelConfig> = std::tuple{
    Field{"layers", &ModelConfig::layers, kRanks, kLayers, "MoE layers.", Presence::kRequired},
    Field{"experts", &ModelConfig::experts, kState, kExperts, "Experts N of each layer.",
          Presence::kRequired},
    Field{"top_k", &ModelConfig::top_k, kState, kExperts, "Experts that a token chooses, at most N.",
          Presence::kRequired},
    Field{"tokens_per_step", &ModelConfig::tokens_per_step, kRanks, steps_from(0), "tokens",
          "Tokens of one step over all ranks; 0: not known. Sets the noise floor that targets are compared "
          "with."},
    Field{"score_space", &ModelConfig::score_space, kState,
          "Where the selection bias is added: to the gate's probabilities or to its logits."},
    Field{"delay", &ModelConfig::delay, kState, kDelay, "steps",
          "Steps by which the recorded routing is late for a reason outside the controller."},
    Field{"domains", &ModelConfig::domains, kState, "Names of the domains whose tokens are counted apart."},
    Field{
        "split_sequences", &ModelConfig::split_sequences, kState, kSequences, "sequences",
        "Sequences of a step that may be split over ranks or records: pieces with the same id, from 0 to one "
        "below this, "
        "count as one sequence. Adds as many integers an expert and layer to the collective; 0: ids hold "
        "within a "
        "record."},
    Field{"targets", &ModelConfig::targets, kState, at_least(0),
          "Wanted share of the load of each expert, at most 1/top_k each, summing to 1; without it equal "
          "shares."},
};

template <>
inline constexpr auto kFieldsOf<Limits> = std::tuple{
    Field{"min", &Limits::min, kRanks, kApplied,
          "Smallest value that is applied; a loss weight: at least 0 (default 1e-4 if `initial` is not 0), a "
          "temperature: at least 1e-9."},
    Field{"max", &Limits::max, kRanks, kApplied, "Largest value that is applied."},
    Field{"rate", &Limits::rate, kRanks, kRate,
          "Largest move of one decision: score units for biases, |ln(new/old)| for the two scalars, at most "
          "100."},
    Field{"center", &Limits::center, kRanks, "Biases only: keeps the mean of the applied biases at 0."},
    Field{"deadband", &Limits::deadband, kRanks, at_least(0),
          "Moves no larger than this are not made; unit of rate."},
    Field{"warmup", &Limits::warmup, kRanks, steps_from(0), "steps",
          "Steps at the start in which nothing moves."},
    Field{"cadence", &Limits::cadence, kState, steps_from(1), "steps",
          "Steps between decisions; each is made on the sums of all of them."},
    Field{"cooldown", &Limits::cooldown, kRanks, steps_from(0), "steps",
          "Steps without a move after each move."},
};

template <>
inline constexpr auto kFieldsOf<GainSchedule> = std::tuple{
    Field{"shape", &GainSchedule::shape, kRanks,
          "How the part of each move that is made falls from 1 to last: linearly, as a cosine, or at once at "
          "from."},
    Field{"from", &GainSchedule::from, kRanks, steps_from(0), "steps",
          "Up to this step moves are made in full."},
    Field{"until", &GainSchedule::until, kRanks, steps_from(0), "steps",
          "From this step on, the part last of each move is made."},
    Field{"last", &GainSchedule::last, kRanks, Range{.low = 0, .high = 1},
          "Part of each proposed move that is made at the end; 0: none."},
};

template <>
inline constexpr auto kFieldsOf<ActuatorConfig> = std::tuple{
    Field{"policy", &ActuatorConfig::policy, kState, kPolicy, "What decides the actuator's value."},
    Field{"options", &ActuatorConfig::options, kState, "Options of the policy, listed below."},
    Field{
        "initial", &ActuatorConfig::initial, kRanks,
        "Value at the start, within the limits. Biases also: a list of one value an expert, or the name of a "
        "file of biases by layer, as `moectl biases` writes one."},
    Field{"scope", &ActuatorConfig::scope, kState,
          "One value a layer, or one for the whole model (scalars only)."},
    Field{"limits", &ActuatorConfig::limits, kRanks, "What bounds the actuator."},
    Field{"gain_schedule", &ActuatorConfig::gain_schedule, kRanks,
          "Biases only: makes each proposed move smaller towards the end of a run."},
};

template <>
inline constexpr auto kFieldsOf<RollbackOptions> = std::tuple{
    Field{"loss_jump", &RollbackOptions::loss_jump, kRanks, above(0), "nats",
          "Loss above its moving average that counts as a jump."},
    Field{"drop_jump", &RollbackOptions::drop_jump, kRanks, above(0),
          "Drop rate above its moving average that counts as a jump."},
    Field{"within", &RollbackOptions::within, kRanks, steps_from(1), "steps",
          "Steps after a move during which a jump is blamed on the move."},
    Field{"cooldown", &RollbackOptions::cooldown, kRanks, steps_from(0), "steps",
          "Steps without a move after a rollback."},
};

template <>
inline constexpr auto kFieldsOf<OscillationOptions> = std::tuple{
    Field{"threshold", &OscillationOptions::threshold, kRanks, kThreshold,
          "Moves are shortened while the moving average of their reversals is above this."},
    Field{"min_gain", &OscillationOptions::min_gain, kRanks, kPositivePart, "Smallest factor on a move."},
};

template <>
inline constexpr auto kFieldsOf<SafetyOptions> = std::tuple{
    Field{"rollback", &SafetyOptions::rollback, kRanks,
          "Goes back to the last good value when loss or drop rate jumps after a move."},
    Field{"oscillation", &SafetyOptions::oscillation, kRanks, "Shortens moves that keep reversing."},
    Field{"fallback_after", &SafetyOptions::fallback_after, kRanks, steps_from(0), "steps",
          "Invalid steps since the last valid decision, after which a notice is raised and fallback acts; 0: "
          "never."},
    Field{"fallback", &SafetyOptions::fallback, kRanks,
          "hold: invalid data never move a value; initial: after fallback_after, the initial value is "
          "applied until data are valid again."},
    Field{"responsiveness", &SafetyOptions::responsiveness, kState,
          "Whether biases that the load does not answer and temperatures that the token entropy does not "
          "answer are held, and biases stay within what the scores justify."},
};

template <>
inline constexpr auto kFieldsOf<GuardOptions> = std::tuple{
    Field{"enabled", &GuardOptions::enabled, kState, "Whether the guard acts."},
    Field{"fhs", &GuardOptions::fhs, kRanks, "Trigger: FHS is above 1 and clear of the noise."},
    Field{"entropy_fall", &GuardOptions::entropy_fall, kRanks, kShare,
          "Trigger: entropy_normalized is this far below its slow average."},
    Field{"max_dead_share", &GuardOptions::max_dead_share, kRanks, kShare,
          "Trigger: this share of the experts with a target above 0 is dead."},
    Field{"max_token_share", &GuardOptions::max_token_share, kRanks, kShare,
          "Trigger: this share of the tokens chooses one expert (raised for experts with large targets)."},
    Field{"lost_after", &GuardOptions::lost_after, kRanks, steps_from(1), "steps",
          "Trigger: in a layer that was balanced, one expert stays overloaded and rising for this long."},
    Field{"warmup", &GuardOptions::warmup, kRanks, steps_from(0), "steps",
          "Steps at the start without a trigger."},
    Field{"confirm", &GuardOptions::confirm, kRanks, steps_from(1), "steps",
          "Steps in a row for which a trigger must hold."},
    Field{"aux_factor", &GuardOptions::aux_factor, kRanks, at_least(1),
          "Largest factor by which an intervention raises the auxiliary loss weight."},
    Field{"temperature_factor", &GuardOptions::temperature_factor, kRanks, at_least(1),
          "Largest factor by which an intervention raises the router temperature."},
    Field{"bias_step", &GuardOptions::bias_step, kRanks, at_least(0), "score gaps",
          "First move of a bias for a relative error of 1."},
    Field{"recovered_max_vio", &GuardOptions::recovered_max_vio, kRanks, above(0),
          "MaxVio up to which a layer counts as balanced, or twice its floor, if that is more."},
    Field{"dwell", &GuardOptions::dwell, kRanks, steps_from(1), "steps",
          "Steps of balance before handing back, and before each further step of it."},
    Field{"patience", &GuardOptions::patience, kRanks, steps_from(1), "steps",
          "Steps without recovery after which an intervention is rolled back."},
    Field{"cooldown", &GuardOptions::cooldown, kRanks, steps_from(0), "steps",
          "Steps after a rollback before the next intervention."},
};

template <>
inline constexpr auto kFieldsOf<LogConfig> = std::tuple{
    Field{"every", &LogConfig::every, kNone, steps_from(1), "steps", "Steps between records."},
    Field{"per_expert", &LogConfig::per_expert, kNone, "Arrays over experts in each record."},
    Field{"extremes", &LogConfig::extremes, kNone, at_least(0), "experts",
          "Number of experts in each record from either end, the most and the least loaded, by number and "
          "count, "
          "and of the pairs that the same tokens choose most; 0: none."},
    Field{"rotate_mb", &LogConfig::rotate_mb, kNone, kMegabytes, "10^6 bytes",
          "A piece of the log ends before it grows above this size."},
    Field{"keep", &LogConfig::keep, kNone, steps_from(0),
          "Finished pieces that stay, older ones are removed; 0: all. Needs rotate_mb."},
};

inline constexpr std::tuple kOverrides{
    Field{"expert_bias", &SectionOverrides::expert_bias, kRanks, "Instead of the config's expert_bias."},
    Field{"aux_loss_weight", &SectionOverrides::aux_loss_weight, kRanks,
          "Instead of the config's aux_loss_weight."},
    Field{"router_temperature", &SectionOverrides::router_temperature, kRanks,
          "Instead of the config's router_temperature."},
    Field{"guard", &SectionOverrides::guard, kRanks, "Instead of the config's guard."},
    Field{"safety", &SectionOverrides::safety, kRanks, "Instead of the config's safety."},
};

template <>
inline constexpr auto kFieldsOf<LayerGroup> = std::tuple_cat(
    std::tuple{
        Field{"ids", &LayerGroup::ids, kState, at_least(0),
              "The model's own ids of the layers; instead of them first and count."},
        Field{"first", &LayerGroup::first, kState, at_least(0),
              "The id of the first layer; without it the one after the group before, or 0.",
              Presence::kMinusOneIsAbsent},
        Field{"count", &LayerGroup::count, kState, kLayers, "Number of layers.", Presence::kMinusOneIsAbsent},
        Field{"experts", &LayerGroup::experts, kState, kExperts, "Instead of model.experts.",
              Presence::kMinusOneIsAbsent},
        Field{"top_k", &LayerGroup::top_k, kState, kExperts, "Instead of model.top_k.",
              Presence::kMinusOneIsAbsent},
        Field{"targets", &LayerGroup::targets, kState, at_least(0),
              "Instead of model.targets, which must be left out where every group has its own."},
        Field{"placement", &LayerGroup::placement, kRanks, at_least(0), "Instead of metrics.placement."},
        Field{"frozen", &LayerGroup::frozen, kRanks, "Whether the actuators are held from the start."},
    },
    kOverrides);

template <>
inline constexpr auto kFieldsOf<TimelineEntry> = std::tuple_cat(
    std::tuple{
        Field{"from", &TimelineEntry::from, kRanks, steps_from(1), "steps",
              "The first step that it holds for.", Presence::kRequired},
        Field{"freeze", &TimelineEntry::freeze, kRanks, at_least(0),
              "Ids of layers whose actuators are held from here on."},
        Field{"thaw", &TimelineEntry::thaw, kRanks, at_least(0), "Ids of layers that go on from here."},
    },
    kOverrides);

template <>
inline constexpr auto kFieldsOf<ControllerConfig> = std::tuple{
    Field{"mode", &ControllerConfig::mode, kRanks,
          "active: decide and apply; shadow: decide and log, move nothing; off: do nothing."},
    Field{"lag", &ControllerConfig::lag, kState, kLag, "steps",
          "0: a step waits for the sums of all ranks; 1: it decides on those of the step before."},
    Field{"model", &ControllerConfig::model, kState, "The model.", Presence::kRequired},
    Field{"metrics", &ControllerConfig::metrics, kRanks, "How metrics are computed."},
    Field{"metrics", &ControllerConfig::monitor, kRanks, "How metrics are followed over steps."},
    Field{"health", +[](ControllerConfig& c) -> HealthOptions& { return c.monitor.health; }, kRanks,
          "Health of the layers."},
    Field{"expert_bias", &ControllerConfig::expert_bias, kRanks, "The biases of the experts."},
    Field{"aux_loss_weight", &ControllerConfig::aux_loss_weight, kRanks, "The auxiliary loss weight."},
    Field{"router_temperature", &ControllerConfig::router_temperature, kRanks, "The router temperature."},
    Field{"safety", &ControllerConfig::safety, kRanks, "Supervision of every actuator."},
    Field{"guard", &ControllerConfig::guard, kRanks, "Supervisor against collapse."},
    Field{"log", &ControllerConfig::log, kNone, "The run log."},
    Field{"collect", &ControllerConfig::collect, kRanks,
          "Sums that are collected whether or not a policy asks for them."},
    Field{"layers", &ControllerConfig::layers, kRanks,
          "Groups of layers with experts or settings of their own; without it model.layers equal layers."},
    Field{"timeline", &ControllerConfig::timeline, kRanks, "What changes from a step on."},
};

/// Sections that a group or a timeline entry may give in place of the config's own.
template <class T>
inline constexpr bool kIsSection =
    std::is_same_v<T, ActuatorConfig> || std::is_same_v<T, GuardOptions> || std::is_same_v<T, SafetyOptions>;

}  // namespace moectl
