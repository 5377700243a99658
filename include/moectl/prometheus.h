// A metrics endpoint for Prometheus, fed by a running controller or by a log that is read.
//
//   moectl::PrometheusFeed feed("127.0.0.1:9464");
//   controller.set_log([&](const moectl::StepReport& report) { feed.write(report); });
//
// Component `prometheus` of the package (target moectl::prometheus); `moectl watch --listen` is the same feed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "moectl/controller.h"
#include "moectl/run_log.h"

namespace prometheus {
class Exposer;
}

namespace moectl {

/// Serves the state after the last step at http://ADDRESS/metrics. Every name begins with `moectl_` and has its
/// unit in it: gauges for each metric of metric_fields() by `layer`, the load and bias of each expert by `layer`
/// and `expert`, scalar actuators and the reasons that acted by `actuator` and `reason`, health by `state`,
/// alerts by name; counters of steps, tokens, assignments and drops end in `_total`.
///
/// Counters count what was written here: with `log.every: 10` a tenth of the steps. They start at zero with the
/// feed. A scrape copies the state and holds a step up for no longer than that.
class PrometheusFeed {
 public:
  /// HOST:PORT, port 0 for any that is free, [::1]:9464 for IPv6. There is no authentication: an address other
  /// than the loopback one is for a network that is trusted. Throws std::invalid_argument on anything that is
  /// no address, std::runtime_error if it cannot be listened at.
  explicit PrometheusFeed(const std::string& address);
  ~PrometheusFeed();

  /// One step. From one thread; scrapes may come at any time. Does not allocate in the steady state.
  void write(const StepReport& report);
  /// One record of a log; other tags than `train` are passed over. `metrics`: those of the record.
  void write(const LogRecord& record, const Metrics& metrics);
  /// How many faults the reader of the log has met so far.
  void set_log_faults(std::int64_t count);

  /// The port listened at.
  int port() const;
  /// The state as a scrape shows it, without the exposer's own metrics.
  std::string text() const;

 private:
  class State;
  std::shared_ptr<State> state_;
  std::unique_ptr<prometheus::Exposer> exposer_;
};

}  // namespace moectl
