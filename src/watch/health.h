// HealthMonitor: the state of one layer, its failure modes, alerts and bands, step by step.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/health.h"
#include "moectl/metrics.h"
#include "moectl/state.h"

namespace moectl {

/// A flag with persistence: set after `after` consecutive steps of `enter`, cleared after `after` consecutive steps of
/// `leave`, with at least `dwell` steps between two changes.
class Latch {
 public:
  /// Returns whether it is on.
  bool update(bool enter, bool leave, std::int64_t after, std::int64_t dwell);
  bool on() const { return on_; }

  void exchange(StateIo& io);

 private:
  bool on_ = false;
  std::int64_t run_ = 0;   // consecutive steps that support a change
  std::int64_t age_ = -1;  // steps since the last change; -1 = none yet
};

class HealthMonitor {
 public:
  /// Throws std::invalid_argument on options out of range. `on_target`: metrics_on_target() for unequal
  /// targets; absent metrics mean the values for equal targets.
  HealthMonitor(const StatsShape& shape, HealthOptions options, const Metrics& on_target = {});
  // Alerts are views of the monitor's own names.
  HealthMonitor(const HealthMonitor&) = delete;
  HealthMonitor& operator=(const HealthMonitor&) = delete;
  HealthMonitor(HealthMonitor&&) = default;
  HealthMonitor& operator=(HealthMonitor&&) = default;

  /// `smoothed` holds the moving average of each metric. `swing_cv` is the CV of the load's deviations from
  /// its average. Without data, `metrics` is nullptr. Does not allocate.
  void observe(std::int64_t step, const Metrics* metrics, const Metrics& smoothed, double swing_cv);

  Health state() const { return state_; }
  bool has(FailureMode mode) const { return modes_[static_cast<std::size_t>(mode)].on(); }
  /// The alerts that hold now: failure modes, then alert rules, then "band:METRIC" for broken bands.
  std::span<const std::string_view> alerts() const { return active_; }
  /// The phase in force; empty without phases.
  std::string_view phase() const { return phase_; }

  void exchange(StateIo& io);

 private:
  struct Rule {
    std::size_t field;
    AlertRule rule;
    Latch latch;
  };
  struct Watched {  // a metric with a band in some phase
    std::size_t field;
    std::string alert;
    Latch latch;
  };
  void look(const Metrics& metrics, const Metrics& smoothed, double swing_cv);
  void watch_bands(std::int64_t step, const Metrics& smoothed);
  Health worst() const;

  // For a load that meets its targets: its entropy minus ln k, ln N over its entropy, and its slowest device over the
  // mean. Then the number of experts with a target above 0.
  double log_top_k_, entropy_range_, even_entropy_ = 1, slowdown_ = 1, wanted_;
  HealthOptions options_;
  std::vector<Rule> rules_;
  std::vector<Watched> watched_;
  std::array<bool, kHealthCount> flags_{};
  std::array<Latch, kFailureModeCount> modes_;
  std::array<bool, kFailureModeCount> mode_flags_{};
  Health state_ = Health::kNoData;
  std::int64_t state_age_ = 0, without_data_ = 0, seen_ = 0;
  std::string_view phase_;
  std::vector<std::string_view> active_;
};

}  // namespace moectl
