// A metrics endpoint for Prometheus, fed by a running controller or from a log.
//
//   moectl::PrometheusFeed feed("127.0.0.1:9464");
//   controller.set_log([&](const moectl::StepReport& report) { feed.write(report); });
//
// Component `prometheus` of the package (target moectl::prometheus); `moectl watch --listen` is the same feed.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/run_log.h"

namespace prometheus {
class Exposer;
}

namespace moectl {

/// How many series there are: what a server keeps is chosen by its user.
struct PrometheusOptions {
  /// Metrics served for each layer, of metric_fields(); empty: all.
  std::vector<std::string> metrics{};
  /// -1: a series for each expert's load, assignments and bias. K ≥ 0: instead of them, the K most and the K least loaded
  /// experts of each layer, by load and by number (`moectl_load_extreme_ratio`, `moectl_load_extreme_expert` with `end`,
  /// most or least, and `rank`), and with collect.pairs the K pairs that the same tokens choose most
  /// (`moectl_pair_extreme_ratio`, …): 4K or 7K series a layer, however many experts there are.
  int extremes = -1;
};

/// Serves the state after the last step at http://ADDRESS/metrics. Every name begins with `moectl_` and contains its
/// unit: gauges for each metric of metric_fields() by `layer`, the load and bias of each expert by `layer`
/// and `expert`, scalar actuators and the reasons that acted by `actuator` and `reason`, health and the
/// load's response to the biases by `state`, its gain, alerts by name; counters of steps, tokens, assignments and drops end in `_total`.
///
/// Counters count the steps that were written to this feed: with `log.every: 10`, a tenth of all steps. They start at
/// zero with the feed. A scrape delays a step only while it copies the state.
class PrometheusFeed {
 public:
  /// HOST:PORT with a numeric host, [::1]:9464 for IPv6; PORT alone is one of 127.0.0.1; port 0 takes any free port. There
  /// is no authentication and no encryption: use an address other than loopback only in a trusted network. It answers
  /// only GET of /metrics without a body, and drops a request that does not arrive within a second, so that connections that
  /// idle or trickle do not keep others waiting. Throws std::invalid_argument if `address` is not an address or an option
  /// is out of range, std::runtime_error if it cannot listen there.
  explicit PrometheusFeed(const std::string& address, PrometheusOptions options = {});
  ~PrometheusFeed();

  /// Writes one step. Call from one thread; scrapes may come at any time. Does not allocate in the steady state.
  void write(const StepReport& report);
  /// Writes one record of a log; records with a tag other than `train` are skipped. `metrics`: those of the record.
  void write(const LogRecord& record, const Metrics& metrics);
  /// The number of faults that the reader of the log has met so far.
  void set_log_faults(std::int64_t count);

  /// The port of the endpoint.
  int port() const;
  /// The state as a scrape shows it, without the exposer's own metrics.
  std::string text() const;

 private:
  class State;
  std::shared_ptr<State> state_;
  std::unique_ptr<prometheus::Exposer> exposer_;
};

}  // namespace moectl
