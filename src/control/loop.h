// Controller::Loop: everything a controller holds, and the phases of a step.
#pragma once

#include <array>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "control/actuator_loop.h"
#include "control/choice_check.h"
#include "control/config_comparison.h"
#include "control/guard.h"
#include "control/inputs.h"
#include "control/notices.h"
#include "control/payload.h"
#include "control/pending_reduction.h"
#include "moectl/controller.h"
#include "moectl/monitor.h"
#include "moectl/state.h"

namespace moectl {

/// Without what is no number, or too large to be added up over ranks: one rank decides as many do.
inline StepInfo usable(StepInfo info) {
  if (info.loss && !fits_fixed(*info.loss)) info.loss.reset();
  if (info.gradient_norm && !fits_fixed(*info.gradient_norm)) info.gradient_norm.reset();
  return info;
}

// Members stand in the order of their meaning; there is one Loop a controller, so that its padding costs nothing.
class Controller::Loop {  // NOLINT(clang-analyzer-optin.performance.Padding)
 public:
  /// `step`: of the config's timeline. `goes_on`: the values in force come from another loop, so that those that the config
  /// begins with do not matter.
  Loop(ControllerConfig config, const PolicyRegistry& registry, std::int64_t step = 0, bool goes_on = false);

  const ControllerConfig& config() const { return config_; }
  const StatsShape& shape(int layer) const { return layer_at(layer).group->shape; }
  const std::vector<int>& ids() const { return ids_; }
  const StepReport& report() const { return report_; }
  std::int64_t steps() const { return steps_; }

  /// Runs `add` on the layer's sums under its lock; with `micro_batch` ≥ 0 only the first time before the next step.
  /// If `add` throws, nothing is recorded. `fingerprint`: of the record; 0 = not known.
  template <class Add>
  void record(int layer, std::int64_t micro_batch, std::uint64_t fingerprint, Add&& add);
  /// The same where `add` is the host's: what it added before it threw is taken back.
  void record(int layer, std::int64_t micro_batch, const RoutingBatch& batch);
  void record_foreign(int layer, std::int64_t micro_batch, const std::function<void(RoutingStats&)>& add);
  void check_choices(int layer, const ChoiceSample& sample);
  void say(NoticeKind kind, int layer, std::string_view text);
  const StepReport& step(const StepInfo& info);

  void set_reduction(Reduction reduction);
  void set_exchange(Exchange exchange) { exchange_ = std::move(exchange); }
  void set_log(std::function<void(const StepReport&)> log) { log_ = std::move(log); }
  void begin_at(std::int64_t step) { steps_ = step; }
  void hold(bool held) { held_ = held; }
  void freeze(int layer, bool frozen) { layer_at(layer).frozen = frozen; }
  LayerPlan plan(int layer) const;
  void adopt(Actuator actuator, int layer, std::span<const double> values);
  /// The value that the training loop reads. In modes shadow and off it stays as it was made or loaded.
  std::span<const double> in_force(Actuator actuator, int layer) const;

  std::vector<double> deployment_bias(int layer) const;

  std::string save();
  /// A loop of the same config, registry, reduction and log, in the saved state. Throws StateError.
  std::unique_ptr<Loop> loaded(std::string_view state, Keep keep, std::vector<KeptPart>& parts) const;
  std::string save_layer(int layer);
  /// A loop like this one, in which one layer is in the saved state.
  std::unique_ptr<Loop> layer_loaded(int layer, std::string_view state, Keep keep,
                                     std::vector<KeptPart>& parts);
  /// Whether the timeline changes something at the step that comes; a loop that goes on with the change.
  bool timeline_due() const;
  std::unique_ptr<Loop> at_next_entry();

 private:
  // Equal layers.
  struct Group {
    Group(LayerSettings of, const PolicyRegistry& registry);

    ControllerConfig config;  // of these layers, without groups
    std::string description;  // of it, as far as a saved state depends on it
    StatsShape shape;
    LoadTargets load_targets;
    std::vector<double> targets;  // the same, [N]
    std::optional<Measurer> measurer;
    std::vector<bool> decided;  // whether its biases are, before the timeline and from each of its entries on
  };
  struct Layer {
    Layer(Group& group, const PolicyRegistry& registry, std::size_t index, int id);

    ActuatorLoop& biases() { return *loops[static_cast<std::size_t>(Actuator::kExpertBias)]; }

    Group* group;
    std::size_t index;
    int id;  // the model's own
    // Recording, under the mutex.
    std::mutex mutex;
    RoutingStats intake;
    std::vector<std::int64_t> seen;           // micro-batches recorded since the last step
    std::vector<std::uint64_t> fingerprints;  // of their records
    RoutingStats backup;                      // of the sums, while the host adds to them
    ChoiceCheck choices;
    RepeatWatch repeats;
    // Deciding.
    bool frozen = false;
    bool ever_moves = false;  // its biases, at some step of the config
    double gap_width = 0;     // for what is recorded before the next step
    bool valid = true;        // this step's sums are valid
    bool has_data = false;    // and contain at least one token
    bool told = false;        // the first offence of the sums recorded since the last step was said
    bool told_before = false;
    bool uncollected_sequences = false;  // under the mutex
    // Of [0, 1], less the biases, where scores are probabilities: since the last step, under the mutex; and in how many steps, of
    // the first few. A wrong wiring makes such values too, and names itself once the biases have moved a little.
    static constexpr int kSurelyOutside = 4;
    bool values_outside = false;
    int steps_outside = 0;
    RoutingStats stats;  // this step's sums, over all ranks
    Metrics metrics;
    std::optional<LayerMonitor> monitor;
    std::optional<LayerGuard> guard;
    WiringSeen wiring = WiringSeen::kNothing;                       // in this step, by all ranks
    std::array<std::optional<ActuatorLoop>, kActuatorCount> loops;  // those of `scope: layer`
    std::array<InputWatch, kActuatorCount> inputs;
    std::array<StatsNeeds, kActuatorCount> missing;
    /// The biases that routers had in a step, up to config.delay() steps ago; `step` is the one now.
    std::span<const double> biases_then(std::int64_t step, std::int64_t steps_ago) const;
    void remember_biases(std::int64_t step);
    /// As if they had been in force all the time.
    void forget_biases();
    // With required biases: those of the last config.delay() steps, of step s in row s mod delay [delay × N]; else empty.
    std::vector<double> past_biases;
    std::vector<double> move;  // of the biases in this step, with metrics.details [N]; else empty
  };
  // The inputs of one decision.
  struct DecisionInputs {
    bool valid = true;
    bool has_data = false;
    bool frozen = false;
    const RoutingStats* stats = nullptr;
    const Metrics* metrics = nullptr;
    const Metrics* worst = nullptr;
    const LayerMonitor* monitor = nullptr;
    std::optional<double> drop_rate;
  };

  // The phases of step(), in order.
  void reduce(const StepInfo& info);
  void measure();
  void watch();
  bool applies(const Layer& layer) const;
  void propose();
  void guard();
  double largest_entropy(int layer) const;
  void limit();
  void measure_churn();
  void log();

  bool logs(std::int64_t step) const { return step % config_.log.every == 0; }
  Layer& layer_at(int layer) const;
  void check_mixture(const StepInfo& info) const;
  void use_local_sums(const StepInfo& info);
  void check_ranks();
  void pack(Payload& payload, const StepInfo& info) const;
  void unpack(Payload& payload);
  void say_who_holds(const Payload& payload);
  void use_previous_sums(const StepInfo& info);
  void say_offences();
  void say_why_invalid();
  void compare_with_config();
  void hold_if_some_failed();
  void clear_intake();
  void take_what_was_said();
  std::uint64_t actuation_hash() const;
  template <class Visit>
  void for_each_actuator(Visit&& visit);
  DecisionInputs inputs(ActuatorLoop& loop, std::size_t actuator, int layer);
  DecisionInputs layer_inputs(ActuatorLoop& loop, Layer& layer, std::size_t window);
  DecisionInputs model_inputs(ActuatorLoop& loop, std::size_t actuator);
  bool has_guards() const;
  bool guard_acts() const;
  std::size_t sums_of_layers() const;
  void start_from_files();
  StatsNeeds missing(ActuatorLoop& loop, std::size_t actuator, int layer);
  [[noreturn]] static void refuse_repeat(int layer, std::int64_t micro_batch);

  void finish_pending();
  void take_over_from(const Loop& other);
  void freeze_as(const Loop& other);
  bool frozen_by_host(const Layer& layer) const;
  void exchange(StateIo& io);
  void exchange_layer(StateIo& io, Layer& layer);
  void exchange_recorded(StateIo& io, Layer& layer);
  void exchange_common(StateIo& io);
  void exchange_sums_of(StateIo& io, const Layer& layer);
  void keep_what_fits(const StateIo& state, std::vector<KeptPart>& parts);
  void keep_layer(StateIo in, Layer& layer, std::vector<KeptPart>& parts);
  void keep_common(const StateIo& in, std::vector<KeptPart>& parts);
  void keep_actuator(const StateIo& section, ActuatorLoop& loop, const ControllerConfig& config,
                     Actuator actuator, int layer, const std::string& saved, std::vector<KeptPart>& parts);

  ControllerConfig config_;
  PolicyRegistry registry_;
  ControllerConfig model_config_;   // of the step, without groups: what holds for actuators of `scope: model`
  std::int64_t settings_from_ = 0;  // the step of the timeline that layers were made for
  std::vector<std::unique_ptr<Group>> groups_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<int> ids_;                                                 // of the layers, in their order
  std::vector<std::int32_t> index_of_id_;                                // -1 = no such layer
  std::array<std::optional<ActuatorLoop>, kActuatorCount> model_loops_;  // those of `scope: model`
  std::array<InputWatch, kActuatorCount> model_inputs_watch_;
  std::array<StatsNeeds, kActuatorCount> model_missing_;
  // Of those, what was in force when no guard acted: where every guard takes its actuator back to, though another may
  // have moved it already.
  std::array<double, kActuatorCount> before_guards_{};
  std::array<Metrics, kActuatorCount> model_mean_, model_worst_;
  std::vector<std::pair<double, double>> churn_scratch_;

  bool held_ = false;        // by the host of this rank
  bool host_holds_ = false;  // in this step, by the host of some rank
  std::int64_t steps_ = 0;
  StepInfo info_;                      // of this step, over all ranks
  std::vector<std::int64_t> mixture_;  // storage of info_.next_mixture
  Reduction reduction_;
  Exchange exchange_;
  bool ranks_checked_ = false;
  Payload payload_;
  std::optional<PendingReduction> pending_;  // with `lag: 1`: the sums of the step before
  bool arrived_ = false;                     // payload_ holds them, reduced
  bool ranks_differ_ = false;                // a policy failed on some of them: all hold
  Notices notices_{0};
  struct Said {
    NoticeKind kind;
    int layer;
    std::string text;
  };
  std::mutex said_mutex_;
  std::vector<Said> said_;  // since the last step
  bool log_failed_ = false;
  std::vector<ConfigComparison> comparisons_;  // one a group
  bool sequences_said_ = false, split_said_ = false, scores_said_ = false;
  std::function<void(const StepReport&)> log_;
  std::vector<LayerReport> layer_reports_;
  StepReport report_;
};

template <class Add>
void Controller::Loop::record(int layer, std::int64_t micro_batch, std::uint64_t fingerprint, Add&& add) {
  Layer& at = layer_at(layer);
  if (config_.mode == Mode::kOff) return;
  const std::lock_guard lock(at.mutex);
  at.intake.set_routed_under(at.biases_then(steps_, at.group->config.model.delay));
  if (micro_batch < 0) return add(at.intake);
  for (std::size_t i = 0; i < at.seen.size(); ++i) {
    if (at.seen[i] != micro_batch) continue;
    if (fingerprint != 0 && at.fingerprints[i] != 0 && fingerprint != at.fingerprints[i]) {
      refuse_repeat(layer, micro_batch);
    }
    return;
  }
  // Room first: once the sums have changed, nothing may throw.
  at.fingerprints.reserve(at.seen.capacity() + 1);
  at.seen.push_back(micro_batch);
  try {
    add(at.intake);
  } catch (...) {
    at.seen.pop_back();
    throw;
  }
  at.fingerprints.push_back(fingerprint);
}

template <class Visit>
void Controller::Loop::for_each_actuator(Visit&& visit) {
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      if (auto& loop = layers_[l]->loops[a]) visit(*loop, a, static_cast<int>(l));
    }
    if (model_loops_[a]) visit(*model_loops_[a], a, -1);
  }
}

}  // namespace moectl
