// Controller: the control loop, and the main class of the library.
//
//   moectl::Controller controller(moectl::load_config("adaptive_bias.yaml"));
//   ...forward:   controller.record(layer, batch);          // any number of times, from any threads
//   ...optimizer: controller.step({.loss = loss});          // once an optimizer step
//   ...router:    controller.bias(layer), controller.aux_loss_weight(layer), controller.temperature(layer)
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moectl/config.h"
#include "moectl/guard.h"
#include "moectl/limits.h"
#include "moectl/metrics.h"
#include "moectl/notice.h"
#include "moectl/policy.h"
#include "moectl/responsiveness.h"
#include "moectl/stats.h"

namespace moectl {

/// A collective failed, or ranks disagree. The controller's state is unchanged, the last applied values stay in force,
/// and the step may be tried again.
class ReductionError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Sums a payload in place over all ranks that share the layers (an all-reduce of int64 with SUM). Made from any
/// callable that takes a std::span<std::int64_t>. A blocking callable returns when the sums are complete. A
/// non-blocking one starts the reduction and returns a callable that waits for it; with `lag: 1` the reduction then
/// overlaps with the next step. The payload is neither moved nor changed before the wait. Both throw on failure.
class Reduction {
 public:
  using Wait = std::function<void()>;

  Reduction() = default;
  Reduction(std::nullptr_t) {}
  template <class Callable>
  requires(!std::same_as<std::remove_cvref_t<Callable>, Reduction> &&
           std::invocable<Callable&, std::span<std::int64_t>>) Reduction(Callable sum) {
    if constexpr (std::is_void_v<std::invoke_result_t<Callable&, std::span<std::int64_t>>>) {
      start_ = [sum = std::move(sum)](std::span<std::int64_t> payload) mutable {
        sum(payload);
        return Wait();
      };
    } else {
      start_ = std::move(sum);
    }
  }

  explicit operator bool() const { return static_cast<bool>(start_); }
  /// Starts the reduction. Returns a callable that waits for the sums, or an empty one if they are complete.
  Wait start(std::span<std::int64_t> payload) const { return start_(payload); }
  void operator()(std::span<std::int64_t> payload) const {
    if (const Wait wait = start_(payload)) wait();
  }
  /// The non-blocking callable that this was made from if its type is `Callable`, else null.
  template <class Callable>
  const Callable* target() const {
    return start_.template target<Callable>();
  }

 private:
  std::function<Wait(std::span<std::int64_t>)> start_;
};

/// For adapters that hold further sums elsewhere, as on an accelerator. With `lag: 1` it is called instead of
/// `reduction`, which may be empty (no other ranks), and starts it. The callable that it returns waits, adds the
/// adapter's sums of this rank to `own`, and stores the total over all ranks of the payload and the adapter's sums in
/// `payload`.
using Exchange = std::function<Reduction::Wait(std::span<std::int64_t> payload, std::span<std::int64_t> own,
                                               const Reduction& reduction)>;

/// One actuator in one step. Spans are [N] for biases, [1] for scalars, valid until the next step.
struct ActuatorReport {
  std::span<const double> proposed;  ///< Empty if the policy was not asked.
  /// In force from the next step on. Mode shadow: what would be in force if the controller acted in this step.
  std::span<const double> applied;
  /// Biases to deploy or validate with: `applied` without feed-forward and probes. Empty where it has neither.
  /// Mode shadow: what is in force.
  std::span<const double> deployed{};
  LimitReport reasons;
  /// Of a temperature: whether the token entropy answers it. Of biases: LayerReport::responsiveness. Not applicable to the
  /// weight of the auxiliary loss, which acts through the learning, and not within the steps of a test.
  Responsiveness responsiveness{};
  StatsNeeds missing{};  ///< What the policy requires and this decision's sums lack (`missing_input`).
};

struct LayerReport {
  int layer = 0;                             ///< The model's own id.
  const RoutingStats* stats = nullptr;       ///< This step's sums, over all ranks.
  const Metrics* metrics = nullptr;          ///< This step's metrics.
  const LoadTargets* targets = nullptr;      ///< The layer's targets; null = equal.
  const LayerMonitor* monitor = nullptr;     ///< Trends, health and alerts after this step.
  ActuatorReport actuators[kActuatorCount];  ///< In the order of kActuators; empty for `scope: model`.
  Responsiveness responsiveness;             ///< Of the biases.
  GuardReport guard;                         ///< kWatching without a trigger if the guard is off.
};

/// The record of one step in memory, as the run log writes it. Views into the controller, valid until the next step.
/// With `lag: 1`, stats, metrics and info are those of the step before.
struct StepReport {
  std::int64_t step = 0;
  StepInfo info;
  std::span<const LayerReport> layers;
  ActuatorReport model[kActuatorCount];  ///< Actuators of `scope: model`; others are empty.
  /// What was found in this step; with `log.every` above 1, since the last step that it selects.
  std::span<const Notice> notices;
};

/// A few tokens of one layer's forward pass, to see whether its router chooses by its bias.
struct ChoiceSample {
  std::span<const std::int64_t> experts{};  ///< [tokens × k]
  /// [tokens × N] the biased scores that selection compared, -inf for experts excluded from the choice. Required.
  std::span<const float> biased_scores{};
  /// [tokens × N] the same before the bias was added. Empty = not known: then only the choice itself is checked.
  std::span<const float> scores{};
};

/// What `load` takes of a state.
enum class Keep {
  everything,  ///< All of it; the state must be of the same config.
  what_fits,   ///< Values in force in any case, memories where they fit.
};

/// What the step that comes does with a layer's biases.
struct LayerPlan {
  bool frozen = false;      ///< By the config, its timeline or freeze().
  bool decided = false;     ///< A policy or the guard decides about them, be it applied or not.
  bool ever_moves = false;  ///< Some step of the config may move them; freeze() and hold() aside.
};

/// What became of one part of a state that was loaded with Keep::what_fits.
struct KeptPart {
  enum class Fate {
    kKept,
    kAdapted,  ///< Kept as far as the config allows.
    kDropped,  ///< Starts anew.
  };
  int layer = -1;   ///< -1 for the whole model.
  std::string key;  ///< As the config says it: "expert_bias", "expert_bias.policy", "health".
  Fate fate = Fate::kKept;
  std::string why{};  ///< Of what was adapted or dropped.
};
std::string_view name_of(KeptPart::Fate fate);

/// Controls any number of layers. `layer` is everywhere the model's own id of a layer: 0 to model.layers - 1, or one of
/// the ids of the config's layer groups.
class Controller {
 public:
  /// Validates the config; throws ConfigError.
  explicit Controller(ControllerConfig config, const PolicyRegistry& registry = PolicyRegistry::builtin());
  ~Controller();
  Controller(Controller&&) noexcept;
  Controller& operator=(Controller&&) noexcept;

  const ControllerConfig& config() const;
  /// The ids of the layers, in the order of reports.
  const std::vector<int>& layers() const;
  /// The shape of a layer's stats: all that the policies and the log need.
  const StatsShape& shape(int layer) const;

  // ---- Recording. Thread-safe; different layers run in parallel. ----
  /// Adds one micro-batch. With `micro_batch` ≥ 0, a second record of the same (layer, micro-batch) before the next
  /// step is ignored, so that activation recomputation does not count twice; one with other experts or another mask
  /// throws std::invalid_argument. Malformed data makes the step invalid for the layer (it holds), and a notice names
  /// the first offence; an unknown layer or sizes that do not fit throw std::invalid_argument. What throws has recorded
  /// nothing.
  void record(int layer, const RoutingBatch& batch, std::int64_t micro_batch = -1);
  /// Adds sums that were formed elsewhere. Their shape must be shape(layer).
  void record(int layer, const RoutingStats& stats);
  /// Adds per-expert observations to the layer's sums under its lock (gradient norms, losses, latencies).
  /// `micro_batch` as above, but a repeat is not compared. If `add` throws, nothing is recorded.
  void record_with(int layer, const std::function<void(RoutingStats&)>& add, std::int64_t micro_batch = -1);

  /// Checks that the experts are the k largest of the biased scores, and that those are the scores plus the bias in
  /// force. What is wrong in three steps is a notice of kind `wiring` on this rank: not added, wrong sign, another
  /// layer's bias, something else, or replayed routes. Not with `model.delay`: the bias was another one then. Throws
  /// std::invalid_argument as `record`.
  void check_choices(int layer, const ChoiceSample& sample);

  // ---- Deciding. ----
  /// Once an optimizer step: reduce, measure, decide, limit. With `lag: 1` it starts to reduce this step's sums and
  /// decides on those of the step before; the first step has none and holds. Bad data never throws; a failed collective
  /// throws ReductionError with nothing changed. Once the sums have arrived, the step completes: a policy that throws is
  /// held (`policy_failed`) while all else is decided, a log callback that throws is reported once, both as a notice. If
  /// a policy fails on some ranks only, all ranks go back to the values before it at the next step, and hold until a
  /// state is loaded. Not to be called while another thread records.
  const StepReport& step(const StepInfo& info = {});
  /// The report of the last step.
  const StepReport& report() const;
  /// The step that comes next: those before it, counted from 0.
  std::int64_t steps() const;
  /// For a controller that is new in the middle of a training: `step` is the training's next one. The log goes on from
  /// there, and so do warm-ups, schedules and the timeline. On every rank alike, before the first step(). Throws
  /// std::invalid_argument otherwise, or if `step` is negative.
  void begin_at(std::int64_t step);

  /// Sets the sum over ranks. Without it, this process is the only rank. The first reduction checks that all ranks have
  /// the same layers, shape and config; every reduction checks that all applied the same values (else ReductionError).
  void set_reduction(Reduction reduction);
  void set_exchange(Exchange exchange);
  /// Called with every report that `log.every` selects, at the end of step(). An exception of it is a notice.
  void set_log(std::function<void(const StepReport&)> log);
  /// Holds one layer's actuators (a frozen or fine-tuned router) until unfrozen.
  void freeze(int layer, bool frozen = true);
  /// What the step that comes does with a layer's biases.
  LayerPlan plan(int layer) const;
  /// Holds every actuator where it is and keeps measuring, until hold(false): the host's emergency brake. So does the
  /// environment variable MOECTL_HOLD, if it is set to anything but 0 when the controller is made. Not saved.
  void hold(bool held = true);

  /// Adds a notice of the host's own to the next step's report. Thread-safe.
  void say(NoticeKind kind, int layer, std::string_view text);

  // ---- The values in force, which the router reads. ----
  std::span<const double> bias(int layer) const;  ///< [N]
  /// What to deploy or validate with [N]: the biases in force without what serves the next batch alone (feed-forward, a
  /// probe).
  std::vector<double> deployment_bias(int layer) const;
  double aux_loss_weight(int layer) const;
  double temperature(int layer) const;

  // ---- Values from elsewhere: a checkpoint of another trainer, an older run. ----
  /// Puts biases [N] in force at once; the policy goes on from there. With `limits.center` their mean, which changes no
  /// choice, is taken out by the next decision. On every rank alike, between two steps. Throws std::invalid_argument if
  /// one lies outside the limits.
  void adopt(int layer, std::span<const double> biases);
  /// Likewise. With `scope: model` for all layers.
  void adopt_aux_loss_weight(int layer, double weight);
  void adopt_temperature(int layer, double temperature);

  // ---- State: everything that the next step depends on, to the bit. ----
  /// With `lag: 1`, waits for the pending reduction and stores its sums. If it fails, stores this rank's own sums, and
  /// the next step sends them again.
  std::string save() const;
  /// Throws StateError; the running state is then untouched. Sums recorded but not yet stepped are part of the state.
  void load(std::string_view state);
  /// With Keep::what_fits, of a state of another config: another policy, other options, layers more or less. Returns what
  /// became of each part.
  std::vector<KeptPart> load(std::string_view state, Keep keep);
  /// The state of one layer, to be loaded under the same id, also into a controller of other layers (another split of
  /// the model over pipelines). All layers of a checkpoint must be of one step. What serves the whole model (`scope:
  /// model`) is part of every layer's state.
  std::string save_layer(int layer) const;
  std::vector<KeptPart> load_layer(int layer, std::string_view state, Keep keep = Keep::everything);

  class Loop;

 private:
  std::unique_ptr<Loop> loop_;
};

}  // namespace moectl
