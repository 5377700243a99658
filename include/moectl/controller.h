// Controller: the loop, and the one class most users touch.
//
//   moectl::Controller controller(moectl::load_config("adaptive_bias.yaml"));
//   ...forward:   controller.record(layer, batch);          // any number of times, from any threads
//   ...optimizer: controller.step({.loss = loss});          // once an optimizer step
//   ...router:    controller.bias(layer), controller.aux_loss_weight(layer), controller.temperature(layer)
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/config.h"
#include "moectl/guard.h"
#include "moectl/metrics.h"
#include "moectl/policy.h"
#include "moectl/safety.h"
#include "moectl/stats.h"

namespace moectl {

/// A collective failed, or ranks disagree. The controller's state is unchanged and the last applied values
/// stay in force; the step may be tried again.
class ReductionError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Sums the payload in place over all ranks that share the layers (an all-reduce of int64 with SUM). Throws
/// on failure.
using Reduction = std::function<void(std::span<std::int64_t> payload)>;

/// What one actuator did in one step. Spans are [N] for biases, [1] for scalars, valid until the next step.
struct ActuatorReport {
  std::span<const double> proposed;  ///< Empty if the policy was not asked.
  std::span<const double> applied;   ///< In force from the next step on (in shadow: what would be).
  LimitReport reasons;
};

struct LayerReport {
  int layer = 0;
  const RoutingStats* stats = nullptr;       ///< This step's sums, over all ranks.
  const Metrics* metrics = nullptr;          ///< This step's metrics.
  const LayerMonitor* monitor = nullptr;     ///< Trends, health and alerts after this step.
  ActuatorReport actuators[kActuatorCount];  ///< In the order of kActuators; empty for `scope: model`.
  GuardReport guard;                         ///< Watching, without a trigger, if the guard is off.
};

/// The record of one step, in memory: what the run log writes. Views into the controller, valid until the
/// next step.
struct StepReport {
  std::int64_t step = 0;
  StepInfo info;
  std::span<const LayerReport> layers;
  ActuatorReport model[kActuatorCount];  ///< Actuators of `scope: model`; others are empty.
};

class Controller {
 public:
  /// Validates the config; throws ConfigError.
  explicit Controller(ControllerConfig config, const PolicyRegistry& registry = PolicyRegistry::builtin());
  ~Controller();
  Controller(Controller&&) noexcept;
  Controller& operator=(Controller&&) noexcept;

  const ControllerConfig& config() const;
  /// The shape that every layer's stats have: what the policies and the log ask for.
  const StatsShape& shape() const;

  // ---- Recording: thread-safe, different layers in parallel. ----
  /// Adds one micro-batch. With `micro_batch` ≥ 0, a second record of the same (layer, micro-batch) before
  /// the next step is ignored, so that activation recomputation does not count twice. Malformed data makes
  /// the step invalid for the layer (it holds); an unknown layer or sizes that do not fit throw
  /// std::invalid_argument.
  void record(int layer, const RoutingBatch& batch, std::int64_t micro_batch = -1);
  /// Adds sums formed elsewhere; the shape must be shape().
  void record(int layer, const RoutingStats& stats);
  /// Adds per-expert observations to the layer's sums under its lock (gradient norms, losses, latencies).
  void record(int layer, const std::function<void(RoutingStats&)>& add);

  // ---- Deciding. ----
  /// Once an optimizer step: reduce, measure, decide, limit. Bad data never throws; a failed collective
  /// throws ReductionError with nothing changed. Not to be called while another thread records.
  const StepReport& step(const StepInfo& info = {});
  /// The report of the last step.
  const StepReport& report() const;
  std::int64_t steps() const;

  /// Sums over ranks; without one, this process is alone. The first reduction checks that all ranks have the
  /// same layers, shape and config, every one that all applied the same values (ReductionError otherwise).
  void set_reduction(Reduction reduction);
  /// Called with every report that `log.every` selects, at the end of step().
  void set_log(std::function<void(const StepReport&)> log);
  /// Holds one layer's actuators (a frozen or fine-tuned router) until unfrozen.
  void freeze(int layer, bool frozen = true);

  // ---- What is in force: what the router reads. ----
  std::span<const double> bias(int layer) const;  ///< [N]
  double aux_loss_weight(int layer) const;
  double temperature(int layer) const;

  // ---- State: everything the next step depends on, to the bit. ----
  std::string save() const;
  /// Throws StateError; the running state is then untouched. Sums recorded but not yet stepped are part of
  /// the state.
  void load(std::string_view state);

  class Loop;

 private:
  std::unique_ptr<Loop> loop_;
};

}  // namespace moectl
