// The state after the last step → metric families, on the naming rules of prometheus.io/docs/practices/naming:
// base units in the name, ratios from 0 to 1, counters ending in _total.
#include "moectl/prometheus.h"

#include <CivetServer.h>
#include <arpa/inet.h>
#include <prometheus/collectable.h>
#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

#include "base/input_limits.h"
#include "base/printable.h"
#include "export/step_sample.h"
#include "moectl/health.h"

namespace moectl {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;

/// What is known of one layer, or of the whole-model actuators.
struct LayerState {
  Metrics metrics;
  std::vector<std::int64_t> assigned;  // [N]: of all steps
  std::vector<double> loads;           // [N]: relative, of the last; none without a token
  std::vector<ExpertPair> pairs;       // of the last step, the largest lift first
  std::int64_t tokens = 0, dropped = 0;
  bool reports_drops = false;
  std::string health;
  std::map<std::string, bool, std::less<>> alerts;  // the names met first, and whether each stands
  struct ActuatorState {
    std::vector<double> applied;
    std::optional<double> min, max;
    std::int64_t reasons[kReasonCount] = {};
    Responsiveness responsiveness;
  } actuators[kActuatorCount];

  void add(const StepSample& sample, std::size_t most_pairs);
};

/// A counter stops at its largest value: one that turned negative would be none.
void count_up(std::int64_t& counter, std::int64_t more) {
  if (__builtin_add_overflow(counter, more, &counter)) counter = std::numeric_limits<std::int64_t>::max();
}

void LayerState::add(const StepSample& sample, std::size_t most_pairs) {
  if (sample.metrics) metrics = *sample.metrics;
  if (sample.stats) {
    const RoutingStats& stats = *sample.stats;
    const auto counts = stats.counts();
    relative_loads(stats.counts(), sample.targets, loads);
    if (most_pairs > 0) paired_experts(stats, most_pairs, pairs);
    assigned.resize(counts.size(), 0);
    for (std::size_t i = 0; i < counts.size(); ++i) count_up(assigned[i], counts[i]);
    count_up(tokens, stats.tokens());
    if (stats.dropped()) {
      reports_drops = true;
      count_up(dropped, stats.scalar(RoutingStats::kDropped));
    }
  }
  health = sample.health;
  for (auto& [name, stands] : alerts) stands = false;
  for (const std::string_view alert : sample.alerts) {
    if (const auto it = alerts.find(alert); it != alerts.end()) {
      it->second = true;
    } else if (alerts.size() < kMostNames) {
      alerts.emplace(alert, true);
    }
  }
  for (std::size_t a = 0; a < kActuatorCount; ++a) {
    const ActuatorSample& from = sample.actuators[a];
    ActuatorState& to = actuators[a];
    to.responsiveness = from.responsiveness;
    if (!from.min) continue;
    to.applied.assign(from.applied.begin(), from.applied.end());
    to.min = from.min;
    to.max = from.max;
    for (int r = 0; r < kReasonCount; ++r) to.reasons[r] += from.reasons.has(static_cast<Reason>(r)) ? 1 : 0;
  }
}

/// All of it: copied whole at a scrape.
struct Totals {
  std::map<int, LayerState> layers;
  std::map<std::pair<int, std::string>, std::int64_t> notices;  // by layer and kind
  std::int64_t step = 0, steps = 0, log_faults = 0;
  double written_at = 0;
  std::optional<double> loss;
};

std::string label_of(int layer) {
  return layer < 0 ? "model" : std::to_string(layer);
}

/// The name, and what the value is to be multiplied with, in base units.
std::pair<std::string, double> base_units(const MetricField& field) {
  const std::string name = "moectl_" + std::string(field.name);
  // Shares are called ratios, whatever the field calls them.
  static constexpr std::pair<std::string_view, std::string_view> kRatios[] = {
      {"max_load", "max_load_ratio"},
      {"min_load", "min_load_ratio"},
      {"inactive_fraction", "inactive_ratio"},
      {"drop_rate", "drop_ratio"},
      {"predicted_drop_rate", "predicted_drop_ratio"}};
  for (const auto& [ours, theirs] : kRatios) {
    if (field.name == ours) return {"moectl_" + std::string(theirs), 1};
  }
  if (field.unit == "percentage points") return {name + "_ratio", 0.01};
  if (field.unit == "nats") return {name + "_nats", 1};
  if (field.unit == "nats/step") return {name + "_nats_per_step", 1};
  if (field.unit == "rad") return {name + "_radians", 1};
  if (field.unit == "s") return {name + "_seconds", 1};
  if (field.unit == "tokens^2") return {name + "_square_tokens", 1};
  return {name, 1};
}

using Labels = std::vector<ClientMetric::Label>;

/// The families of a state, one after another.
class Families {
 public:
  void begin(std::string name, std::string help, MetricType type) {
    families_.push_back({std::move(name), std::move(help), type, {}});
  }
  void gauge(std::string name, std::string help) {
    begin(std::move(name), std::move(help), MetricType::Gauge);
  }
  void counter(std::string name, std::string help) {
    begin(std::move(name), std::move(help), MetricType::Counter);
  }
  void add(Labels labels, double value) {
    ClientMetric& metric = families_.back().metric.emplace_back();
    metric.label = std::move(labels);
    (families_.back().type == MetricType::Gauge ? metric.gauge.value : metric.counter.value) =
        value + 0.0;  // of -0 makes 0
  }
  void add(Labels labels, std::int64_t value) { add(std::move(labels), static_cast<double>(value)); }

  /// Without those that have no sample: a name is there from its first value on.
  std::vector<MetricFamily> take() {
    std::erase_if(families_, [](const MetricFamily& family) { return family.metric.empty(); });
    return std::move(families_);
  }

 private:
  std::vector<MetricFamily> families_;
};

void add_run(const Totals& all, Families& out) {
  out.gauge("moectl_step", "The last step.");
  if (all.steps > 0) out.add({}, all.step);
  out.counter("moectl_steps_total", "Steps taken in.");
  out.add({}, all.steps);
  out.gauge("moectl_loss", "Loss of the last step that had one, as the host reported it.");
  if (all.loss) out.add({}, *all.loss);
  out.gauge("moectl_last_record_timestamp_seconds",
            "When the last step arrived, in seconds since the epoch.");
  if (all.steps > 0) out.add({}, all.written_at);
  out.counter("moectl_log_faults_total", "Faults of the log: skipped lines and missing records.");
  out.add({}, all.log_faults);
}

void add_metrics(const Totals& all, const PrometheusOptions& options, Families& out) {
  for (const MetricField& field : metric_fields()) {
    if (!options.metrics.empty() && std::ranges::find(options.metrics, field.name) == options.metrics.end())
      continue;
    const auto [name, factor] = base_units(field);
    out.gauge(name, std::string(field.formula) + ", of the last step.");
    for (const auto& [layer, state] : all.layers) {
      if (const Metrics::Value& value = state.metrics.*field.value) {
        out.add({{"layer", label_of(layer)}}, *value * factor);
      }
    }
  }
}

/// The most and the least loaded experts of each layer.
void add_extremes(const Totals& all, std::size_t most, Families& out) {
  std::vector<std::pair<double, std::size_t>> order;
  const auto each = [&](auto value_of) {
    for (const auto& [layer, state] : all.layers) {
      order.clear();
      for (std::size_t i = 0; i < state.loads.size(); ++i) order.emplace_back(state.loads[i], i);
      const std::size_t shown = std::min(most, order.size());
      // cppcheck-suppress containerOutOfBounds ; shown is at most the size
      const auto middle = order.begin() + static_cast<std::ptrdiff_t>(shown);
      for (const char* const end : {"most", "least"}) {
        // Of equal loads, the lower number first.
        const double sign = end == std::string_view("most") ? -1 : 1;
        std::partial_sort(order.begin(), middle, order.end(), [sign](const auto& a, const auto& b) {
          return std::pair(sign * a.first, a.second) < std::pair(sign * b.first, b.second);
        });
        for (std::size_t r = 0; r < shown; ++r) {
          out.add({{"layer", label_of(layer)}, {"end", end}, {"rank", std::to_string(r + 1)}},
                  value_of(order[r]));
        }
      }
    }
  };
  out.gauge("moectl_load_extreme_ratio",
            "Load of the most and the least loaded experts over their target loads, in the last step.");
  each([](const auto& entry) { return entry.first; });
  out.gauge("moectl_load_extreme_expert", "The number of that expert.");
  each([](const auto& entry) { return static_cast<double>(entry.second); });
  const auto each_pair = [&](const char* name, const char* help, auto value_of) {
    out.gauge(name, help);
    for (const auto& [layer, state] : all.layers) {
      for (std::size_t r = 0; r < state.pairs.size(); ++r)
        out.add({{"layer", label_of(layer)}, {"rank", std::to_string(r + 1)}}, value_of(state.pairs[r]));
    }
  };
  each_pair("moectl_pair_extreme_ratio",
            "Lift of the experts that the same tokens choose most, in the last step.",
            [](const ExpertPair& pair) { return pair.lift; });
  each_pair("moectl_pair_extreme_first_expert", "The lower number of the two.",
            [](const ExpertPair& pair) { return static_cast<double>(pair.first); });
  each_pair("moectl_pair_extreme_second_expert", "The higher number of the two.",
            [](const ExpertPair& pair) { return static_cast<double>(pair.second); });
}

void add_loads(const Totals& all, const PrometheusOptions& options, Families& out) {
  out.counter("moectl_tokens_total", "Tokens routed.");
  for (const auto& [layer, state] : all.layers) {
    if (!state.assigned.empty()) out.add({{"layer", label_of(layer)}}, state.tokens);
  }
  out.counter("moectl_dropped_assignments_total",
              "Choices of an expert that were dropped, where the router says.");
  for (const auto& [layer, state] : all.layers) {
    if (state.reports_drops) out.add({{"layer", label_of(layer)}}, state.dropped);
  }
  if (options.extremes >= 0) {
    add_extremes(all, static_cast<std::size_t>(options.extremes), out);
    return;
  }
  const auto each_expert = [&](const auto LayerState::*values) {
    for (const auto& [layer, state] : all.layers) {
      const auto& of_layer = state.*values;
      for (std::size_t i = 0; i < of_layer.size(); ++i) {
        out.add({{"layer", label_of(layer)}, {"expert", std::to_string(i)}}, of_layer[i]);
      }
    }
  };
  out.counter("moectl_expert_assignments_total", "Choices of the expert, before any capacity limit.");
  each_expert(&LayerState::assigned);
  out.gauge("moectl_expert_load_ratio",
            "Load of the expert over its target load (model.targets, else the mean load), in the last step.");
  each_expert(&LayerState::loads);
}

void add_actuators(const Totals& all, const PrometheusOptions& options, Families& out) {
  constexpr auto kBias = static_cast<std::size_t>(Actuator::kExpertBias);
  out.gauge("moectl_expert_bias", "Selection bias of the expert, in units of its score.");
  for (const auto& [layer, state] : all.layers) {
    const auto& applied = state.actuators[kBias].applied;
    for (std::size_t i = 0; i < applied.size() && options.extremes < 0; ++i) {
      out.add({{"layer", label_of(layer)}, {"expert", std::to_string(i)}}, applied[i]);
    }
  }
  out.gauge("moectl_expert_bias_largest", "Largest selection bias of the layer.");
  for (const auto& [layer, state] : all.layers) {
    if (const auto& max = state.actuators[kBias].max) out.add({{"layer", label_of(layer)}}, *max);
  }
  out.gauge("moectl_expert_bias_smallest", "Smallest selection bias of the layer.");
  for (const auto& [layer, state] : all.layers) {
    if (const auto& min = state.actuators[kBias].min) out.add({{"layer", label_of(layer)}}, *min);
  }
  out.gauge("moectl_actuator_value", "Value of a scalar actuator in force.");
  for (const auto& [layer, state] : all.layers) {
    for (const Actuator which : kActuators) {
      if (which == Actuator::kExpertBias) continue;
      if (const auto& value = state.actuators[static_cast<std::size_t>(which)].max) {
        out.add({{"layer", label_of(layer)}, {"actuator", std::string(name_of(which))}}, *value);
      }
    }
  }
  out.counter(
      "moectl_actuator_reasons_total",
      "Steps in which a limit, a hold or a roll-back kept the actuator from its proposal, by reason.");
  for (const auto& [layer, state] : all.layers) {
    for (const Actuator which : kActuators) {
      const auto& actuator = state.actuators[static_cast<std::size_t>(which)];
      if (!actuator.min) continue;
      // All reasons from the start: a rate needs the zero before the first one.
      for (int r = 0; r < kReasonCount; ++r) {
        out.add({{"layer", label_of(layer)},
                 {"actuator", std::string(name_of(which))},
                 {"reason", std::string(name_of(static_cast<Reason>(r)))}},
                actuator.reasons[r]);
      }
    }
  }
}

void add_health(const Totals& all, Families& out) {
  out.gauge("moectl_health", "1 for the state that the layer is in, 0 for the others.");
  for (const auto& [layer, state] : all.layers) {
    if (state.health.empty()) continue;
    for (int h = 0; h < kHealthCount; ++h) {
      const std::string_view name = name_of(static_cast<Health>(h));
      out.add({{"layer", label_of(layer)}, {"state", std::string(name)}}, name == state.health ? 1.0 : 0.0);
    }
  }
  out.gauge("moectl_alert", "1 while the alert, failure mode or broken band stands, 0 after it.");
  for (const auto& [layer, state] : all.layers) {
    for (const auto& [name, stands] : state.alerts) {
      out.add({{"layer", label_of(layer)}, {"alert", name}}, stands ? 1.0 : 0.0);
    }
  }
}

void add_responsiveness(const Totals& all, Families& out) {
  const auto each = [&](auto&& visit) {
    for (const auto& [layer, state] : all.layers) {
      for (const Actuator which : kActuators) {
        visit(Labels{{"layer", label_of(layer)}, {"actuator", std::string(name_of(which))}},
              state.actuators[static_cast<std::size_t>(which)].responsiveness);
      }
    }
  };
  out.gauge("moectl_response",
            "1 for what is known of the answer to the actuator (the load's to the biases, "
            "the token entropy's to the temperature), 0 for the rest.");
  each([&](const Labels& labels, const Responsiveness& found) {
    if (found.state == Response::kNotApplicable) return;
    for (int r = 0; r < kResponseCount; ++r) {
      const auto one = static_cast<Response>(r);
      if (one == Response::kNotApplicable) continue;
      Labels with_state = labels;
      with_state.push_back({"state", std::string(name_of(one))});
      out.add(std::move(with_state), one == found.state ? 1.0 : 0.0);
    }
  });
  const auto figure = [&](const char* name, const char* help, std::optional<double> Responsiveness::*which) {
    out.gauge(name, help);
    each([&](const Labels& labels, const Responsiveness& found) {
      if (const std::optional<double> value = found.*which) out.add(labels, *value);
    });
  };
  figure("moectl_response_gain_ratio", "Change that was seen over the change that the moves let expect.",
         &Responsiveness::gain);
  figure("moectl_response_gain_error_ratio", "Standard error of moectl_response_gain_ratio.",
         &Responsiveness::error);
}

void add_notices(const Totals& all, Families& out) {
  out.counter("moectl_notices_total", "What was found that a user should act on; the run log has the words.");
  // All kinds from the start: an increase needs the zero before the first one.
  auto counts = all.notices;
  for (int kind = 0; kind < kNoticeKindCount; ++kind) {
    const std::string name(name_of(static_cast<NoticeKind>(kind)));
    counts.try_emplace({-1, name}, 0);
    for (const auto& [layer, state] : all.layers) counts.try_emplace({layer, name}, 0);
  }
  for (const auto& [where, count] : counts) {
    out.add({{"layer", label_of(where.first)}, {"kind", where.second}}, static_cast<double>(count));
  }
}

std::vector<MetricFamily> families_of(const Totals& all, const PrometheusOptions& options) {
  Families out;
  add_run(all, out);
  add_metrics(all, options, out);
  add_loads(all, options, out);
  add_actuators(all, options, out);
  add_health(all, out);
  add_responsiveness(all, out);
  add_notices(all, out);
  return out.take();
}

/// The address as the web server takes it. A name, a list of ports or a mark of TLS, which would mean something to the
/// server underneath, is no address here.
std::string checked_address(const std::string& address) {
  const std::size_t colon = address.rfind(':');
  const std::string port = colon == std::string::npos ? address : address.substr(colon + 1);
  std::string host = colon == std::string::npos ? "127.0.0.1" : address.substr(0, colon);
  const bool digits =
      !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == std::string::npos;
  const bool six = host.size() > 2 && host.front() == '[' && host.back() == ']';
  in6_addr parsed{};  // room for either
  const bool numeric = six ? inet_pton(AF_INET6, host.substr(1, host.size() - 2).c_str(), &parsed) == 1
                           : inet_pton(AF_INET, host.c_str(), &parsed) == 1;
  if (!digits || std::stoi(port) > 65535 || !numeric) {
    throw std::invalid_argument("address: " + shown_briefly(address) +
                                ": must be HOST:PORT with a numeric host, as 127.0.0.1:9464 or [::1]:9464, "
                                "or a PORT of the loopback address");
  }
  return host + ':' + port;
}

/// A request must arrive as a whole within a second, and so many connections may wait for theirs at the same time: others
/// that idle or trickle hold up a scrape for about a second.
const std::vector<std::string> kServer = {"num_threads", "32", "request_timeout_ms", "1000"};

/// Refuses what is not a plain GET of /metrics, before the server looks at it, and has its connection closed. A request
/// with a body must not reach the server, which reads a body to its end however long that takes, and holds a thread so
/// long.
int refuse_all_but_scrapes(mg_connection* connection) {
  const mg_request_info& request = *mg_get_request_info(connection);
  const char* const length = mg_get_header(connection, "Content-Length");
  const auto refuse = [&](int status, const char* why) {
    mg_send_http_error(connection, status, "%s", why);
    return status;
  };
  if (request.request_method != std::string_view("GET")) return refuse(405, "only GET is answered");
  if (request.local_uri != std::string_view("/metrics")) return refuse(404, "only /metrics is here");
  if ((length != nullptr && length != std::string_view("0")) ||
      mg_get_header(connection, "Transfer-Encoding") != nullptr)
    return refuse(400, "a request must have no body");
  return 0;
}

}  // namespace

class PrometheusFeed::State : public prometheus::Collectable {
 public:
  explicit State(PrometheusOptions options) : options_(std::move(options)) {
    for (const std::string& name : options_.metrics) {
      if (!find_metric(name))
        throw std::invalid_argument("metrics: " + shown_briefly(name) + ": must be a metric");
    }
    if (options_.extremes < -1)
      throw std::invalid_argument("extremes: " + std::to_string(options_.extremes) + ": must be at least -1");
  }

  std::vector<MetricFamily> Collect() const override {
    std::unique_lock lock(mutex_);
    const Totals copy = totals_;
    lock.unlock();
    return families_of(copy, options_);
  }

  void add(const StepReport& report) {
    const std::scoped_lock lock(mutex_);
    for (const LayerReport& layer : report.layers) add(sample_of(report, &layer));
    if (has_model_actuators(report)) add(sample_of(report, nullptr));
    for (const Notice& notice : report.notices) {
      ++totals_.notices[{notice.layer, std::string(name_of(notice.kind))}];
    }
  }
  void add(const LogRecord& record, const Metrics& metrics) {
    const std::scoped_lock lock(mutex_);
    add(sample_of(record, metrics, &alerts_));
    for (const LoggedNotice& notice : record.notices) {
      // A log may name kinds without end; each would be a series that stays.
      ++totals_.notices[{record.layer, notice_kind_of(notice.kind) ? notice.kind : "other"}];
    }
  }
  void set_log_faults(std::int64_t count) {
    const std::scoped_lock lock(mutex_);
    totals_.log_faults = count;
  }

 private:
  void add(const StepSample& sample) {
    if (totals_.steps == 0 || sample.step != totals_.step) {
      ++totals_.steps;
      totals_.step = sample.step;
    }
    if (sample.loss) totals_.loss = sample.loss;
    totals_.written_at =
        std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
    totals_.layers[sample.layer].add(sample, static_cast<std::size_t>(std::max(0, options_.extremes)));
  }

  const PrometheusOptions options_;
  mutable std::mutex mutex_;
  Totals totals_;
  std::vector<std::string_view> alerts_;  // scratch space of add()
};

PrometheusFeed::PrometheusFeed(const std::string& address, PrometheusOptions options)
    : state_(std::make_shared<State>(std::move(options))) {
  std::vector<std::string> server = {"listening_ports", checked_address(address)};
  server.insert(server.end(), kServer.begin(), kServer.end());
  CivetCallbacks callbacks;
  callbacks.begin_request = refuse_all_but_scrapes;
  try {
    exposer_ = std::make_unique<prometheus::Exposer>(server, &callbacks);
  } catch (const std::exception& e) {
    throw std::runtime_error(address + ": cannot be listened at (in use?): " + e.what());
  }
  exposer_->RegisterCollectable(state_);
}

PrometheusFeed::~PrometheusFeed() = default;

void PrometheusFeed::write(const StepReport& report) {
  state_->add(report);
}

void PrometheusFeed::write(const LogRecord& record, const Metrics& metrics) {
  if (record.tag == "train") state_->add(record, metrics);
}

void PrometheusFeed::set_log_faults(std::int64_t count) {
  state_->set_log_faults(count);
}

int PrometheusFeed::port() const {
  return exposer_->GetListeningPorts().front();
}

std::string PrometheusFeed::text() const {
  return prometheus::TextSerializer().Serialize(state_->Collect());
}

}  // namespace moectl
