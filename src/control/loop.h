// Controller::Loop: everything a controller holds, and the phases of a step.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "control/actuator_loop.h"
#include "control/choice_check.h"
#include "control/guard.h"
#include "control/inputs.h"
#include "control/notices.h"
#include "control/payload.h"
#include "control/pending_reduction.h"
#include "moectl/controller.h"
#include "moectl/monitor.h"
#include "moectl/state.h"

namespace moectl {

class Controller::Loop {
 public:
  Loop(ControllerConfig config, const PolicyRegistry& registry);

  const ControllerConfig& config() const { return config_; }
  const StatsShape& shape() const { return shape_; }
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
  void hold(bool held) { held_ = held; }
  void freeze(int layer, bool frozen) { layer_at(layer).frozen = frozen; }
  /// The value that the training loop reads. In modes shadow and off it stays as it was made or loaded.
  std::span<const double> in_force(Actuator actuator, int layer) const;

  std::string save();
  /// A loop of the same config, registry, reduction and log, in the saved state. Throws StateError.
  std::unique_ptr<Loop> loaded(std::string_view state) const;

 private:
  struct Layer {
    Layer(const ControllerConfig& config, const PolicyRegistry& registry, int which);

    int index;
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
    double gap_width = 0;   // for what is recorded before the next step
    bool valid = true;      // this step's sums are valid
    bool has_data = false;  // and contain at least one token
    bool told = false;      // the first offence of the sums recorded since the last step was said
    bool told_before = false;
    bool ever_had_data = false;
    bool uncollected_sequences = false;  // under the mutex
    RoutingStats stats;                  // this step's sums, over all ranks
    Metrics metrics;
    std::optional<LayerMonitor> monitor;
    std::optional<LayerGuard> guard;
    std::optional<ResponseCheck> response;
    bool response_told = false;                                     // that the load does not answer
    std::array<std::optional<ActuatorLoop>, kActuatorCount> loops;  // those of `scope: layer`
    std::array<InputWatch, kActuatorCount> inputs;
    std::array<StatsNeeds, kActuatorCount> missing;
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
  void watch_response(Layer& layer);
  std::span<const double> probe_of(std::size_t actuator, int layer) const;
  void propose();
  void guard();
  void limit();
  void log();

  bool logs(std::int64_t step) const { return step % config_.log.every == 0; }
  Layer& layer_at(int layer) const;
  void check_mixture(const StepInfo& info) const;
  void use_local_sums(const StepInfo& info);
  void check_ranks();
  void pack(Payload& payload, const StepInfo& info) const;
  void unpack(Payload& payload);
  void use_previous_sums(const StepInfo& info);
  void say_offences();
  void say_why_invalid();
  void compare_with_config();
  void say_unused_experts();
  void hold_if_some_failed();
  void clear_intake();
  void take_what_was_said();
  std::uint64_t actuation_hash() const;
  template <class Visit>
  void for_each_actuator(Visit&& visit);
  DecisionInputs inputs(ActuatorLoop& loop, std::size_t actuator, int layer);
  DecisionInputs layer_inputs(ActuatorLoop& loop, Layer& layer, std::size_t window);
  DecisionInputs model_inputs(ActuatorLoop& loop, std::size_t actuator);
  bool guard_acts() const;
  StatsNeeds missing(ActuatorLoop& loop, std::size_t actuator, int layer);
  [[noreturn]] static void refuse_repeat(int layer, std::int64_t micro_batch);

  void exchange(StateIo& io);

  ControllerConfig config_;
  PolicyRegistry registry_;
  std::string description_;  // of the config, as far as a saved state depends on it
  StatsShape shape_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::array<std::optional<ActuatorLoop>, kActuatorCount> model_loops_;  // those of `scope: model`
  std::array<InputWatch, kActuatorCount> model_inputs_watch_;
  std::array<StatsNeeds, kActuatorCount> model_missing_;
  // Of those, what was in force when no guard acted: where every guard takes its actuator back to, though another may
  // have moved it already.
  std::array<double, kActuatorCount> before_guards_{};
  std::optional<LoadTargets> load_targets_;
  std::vector<double> targets_;  // the same, [N]
  std::optional<Measurer> measurer_;
  std::array<Metrics, kActuatorCount> model_mean_, model_worst_;

  bool held_ = false;  // by the host
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
  // What the config states, compared with the first steps that have data.
  std::int64_t compared_ = 0;
  bool same_experts_ = true, tokens_compared_ = false, sequences_said_ = false, split_said_ = false;
  int last_used_expert_ = -1;
  std::int64_t fewest_tokens_ = 0;
  std::function<void(const StepReport&)> log_;
  std::vector<LayerReport> layer_reports_;
  StepReport report_;
};

template <class Add>
void Controller::Loop::record(int layer, std::int64_t micro_batch, std::uint64_t fingerprint, Add&& add) {
  Layer& at = layer_at(layer);
  if (config_.mode == Mode::kOff) return;
  const std::lock_guard lock(at.mutex);
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

}  // namespace moectl
