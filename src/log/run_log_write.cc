// Records → JSON lines, without allocating once the buffer has grown to the size of a step.
#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <utility>

#include "base/input_limits.h"
#include "base/printable.h"
#include "log/json_writer.h"
#include "log/log_file.h"
#include "moectl/run_log.h"

namespace moectl {

struct RunLogWriter::File {
  File(const std::string& name, const ControllerConfig& c)
      : path(name), config(c), first_config(to_json(c)), last_config(first_config) {}

  void open(bool append) {
    sink = std::make_unique<LogSink>(path, append ? LogSink::How::kAppend : LogSink::How::kAnew,
                                     is_zipped(path));
    if (!sink->is_open()) give_up(std::strerror(errno ? errno : ENOMEM));
  }

  /// Training goes on without its log; that is said once.
  void give_up(const char* why) {
    if (!good) return;
    good = false;
    sink.reset();
    std::fprintf(stderr, "moectl: %s: run log cannot be written (%s); going on without it\n",
                 message_line(path).c_str(), message_line(why).c_str());
  }

  bool rotates() const { return config.log.rotate_mb > 0 && path != "-"; }

  void put() {
    const auto size = static_cast<std::int64_t>(json.text().size());
    if (good && rotates() && written > header_size &&
        static_cast<double>(written + size) > config.log.rotate_mb * 1e6) {
      rotate();
    }
    if (good && !sink->write(json.text())) give_up(std::strerror(errno ? errno : EIO));
    written += size;
    json.text().clear();
  }

  /// All pieces of a log begin with the config that its first one began with, and say which one holds now: the piece that told of it
  /// may be removed.
  std::string header() const {
    std::string text = "{\"format\":\"moectl-run\",\"version\":1";
    if (rotates()) text += ",\"piece\":" + std::to_string(piece);
    if (shift) text += ",\"shift\":" + std::to_string(*shift);
    text += ",\"config\":" + first_config + "}\n";
    return last_config == first_config ? text : text + changed();
  }

  /// Writes the config of step `step`, unless the log says already that it holds.
  void config_change(std::int64_t step) {
    while (next_entry < config.timeline.size() && config.timeline[next_entry].from <= step) ++next_entry;
    const std::string now = to_json(config_from(config, step));
    if (now == last_config) return;
    last_config = now;
    last_change = step;
    json.text() += changed();
  }
  std::string changed() const {
    return "{\"step\":" + std::to_string(last_change) + ",\"config\":" + last_config + "}\n";
  }
  bool config_changes_at(std::int64_t step) const {
    return next_entry < config.timeline.size() && config.timeline[next_entry].from <= step;
  }

  void start() {
    open(false);
    begin(header());
  }

  void begin(const std::string& first_line) {
    if (good && !sink->write(first_line)) give_up(std::strerror(errno ? errno : EIO));
    written = header_size = static_cast<std::int64_t>(first_line.size());
  }

  /// The next piece is begun beside the full one and then takes its name, so that a full disk or a kill leaves
  /// a log with a header under `path` in any case.
  void rotate() {
    if (piece == kMostPieces) return give_up("its pieces have no more numbers");
    const std::string full = piece_path(path, piece++), part = path + ".part";
    std::error_code failed, ignored;
    sink = std::make_unique<LogSink>(part, LogSink::How::kBeside, is_zipped(path));
    if (!sink->is_open()) return give_up(std::strerror(errno ? errno : ENOMEM));
    begin(header());
    if (good && !sink->flush()) give_up(std::strerror(errno ? errno : EIO));
    if (good) {
      std::filesystem::remove(full, ignored);
      std::filesystem::create_hard_link(path, full, failed);
      if (failed) std::filesystem::rename(path, full, failed);  // a file system without links
      if (!failed) std::filesystem::rename(part, path, failed);
      if (failed) give_up(failed.message().c_str());
    }
    if (!good) {
      std::filesystem::remove(part, ignored);
    } else if (config.log.keep > 0 && piece - 1 > config.log.keep) {
      std::filesystem::remove(piece_path(path, piece - 1 - config.log.keep), ignored);
    }
  }

  /// A resumed run repeats the steps after its checkpoint: they are cut off, with the pieces that hold nothing else.
  void resume(std::int64_t step) {
    try {
      piece = piece_of(path);
      KeptLog kept = keep_before(path, step);
      while (rotates() && kept.bytes == kept.header && piece > 1 &&
             std::filesystem::exists(piece_path(path, piece - 1))) {
        --piece;
        std::filesystem::rename(piece_path(path, piece), path);
        kept = keep_before(path, step);
      }
      written = kept.bytes;
      header_size = kept.header;
      if (!kept.first_config.empty()) first_config = kept.first_config;
      if (!kept.last_config.empty()) last_config = kept.last_config;
      last_change = kept.last_change;
    } catch (const std::exception& e) {
      return give_up(e.what());
    }
    open(true);
    if (good && written == 0) begin(header());  // not even the first line was whole
    config_change(step);
  }

  std::string path;
  ControllerConfig config;
  std::unique_ptr<LogSink> sink;
  bool good = true;
  bool resuming = false;
  std::string first_config, last_config;  // in the header, and the one that holds as far as the log says
  std::int64_t last_change = 0;           // the step that it holds from, or a later one
  std::size_t next_entry = 0;             // of the config's timeline
  JsonWriter json;
  std::optional<std::int64_t> shift;
  std::int64_t piece = 1;
  std::int64_t written = 0, header_size = 0;                 // bytes of this piece before compression
  std::vector<std::pair<std::int64_t, std::int64_t>> order;  // of experts: count, number
  std::vector<ExpertPair> together;

  void record(const StepReport& report, const LayerReport& layer, std::string_view tag);
  void model_record(const StepReport& report, std::string_view tag);
  void info(const StepReport& report, std::string_view tag);
  void sums(const RoutingStats& stats);
  void extremes(const RoutingStats& stats);
  void margins(const RoutingStats& stats);
  void pairs(const RoutingStats& stats);
  void means(std::span<const std::int64_t> sums, std::span<const std::int64_t> tokens);
  void metrics(const LayerReport& layer);
  void health(const LayerMonitor& monitor);
  void responsiveness(const Responsiveness& found);
  void notices(const StepReport& report, int layer);
  void actuators(const ActuatorReport (&reports)[kActuatorCount]);
};

RunLogWriter::RunLogWriter(const std::string& path, const ControllerConfig& config, bool append,
                           std::optional<std::int64_t> shift)
    : file_(std::make_unique<File>(path, config)) {
  file_->shift = shift;
  std::error_code none;
  if (append && path != "-" && std::filesystem::file_size(path, none) > 0 && !none) {
    file_->resuming = true;
    return;
  }
  file_->start();
}

RunLogWriter::RunLogWriter(std::function<void(std::string_view)> out, const ControllerConfig& config)
    : file_(std::make_unique<File>("-", config)) {
  file_->sink = std::make_unique<LogSink>(std::move(out));
  file_->begin(file_->header());
}

RunLogWriter::~RunLogWriter() = default;
bool RunLogWriter::ok() const {
  return file_->good;
}

void RunLogWriter::flush() {
  if (file_->good && file_->sink && !file_->sink->flush()) {
    file_->give_up(errno ? std::strerror(errno) : "compression failed");
  }
}

void RunLogWriter::write(const StepReport& report, std::string_view tag) {
  File& file = *file_;
  if (!file.good) return;
  file.json.text().clear();  // what could not be handed over
  if (std::exchange(file.resuming, false)) file.resume(report.step);
  if (file.config_changes_at(report.step)) file.config_change(report.step);
  for (const LayerReport& layer : report.layers) file.record(report, layer, tag);
  file.model_record(report, tag);
  file.put();
}

namespace {

auto of_layer(int layer) {
  return [layer](const Notice& notice) { return notice.layer == layer; };
}

bool decided(const ActuatorReport& report) {
  return !report.applied.empty();
}
bool decided(const ActuatorReport (&reports)[kActuatorCount]) {
  return std::any_of(std::begin(reports), std::end(reports),
                     [](const ActuatorReport& r) { return decided(r); });
}

}  // namespace

void RunLogWriter::File::record(const StepReport& report, const LayerReport& layer, std::string_view tag) {
  json.raw("{\"step\":");
  json.value(report.step);
  json.field("layer", std::int64_t{layer.layer});
  if (layer.stats) sums(*layer.stats);
  info(report, tag);
  if (layer.metrics) metrics(layer);
  if (layer.guard.state != GuardState::kWatching || layer.guard.trigger != GuardTrigger::kNone ||
      layer.guard.cause != GuardCause::kNone) {
    json.key("guard");
    json.raw('{');
    json.field("state", name_of(layer.guard.state));
    json.field("trigger", name_of(layer.guard.trigger));
    json.field("cause", name_of(layer.guard.cause));
    json.field("value", layer.guard.value);
    json.field("threshold", layer.guard.threshold);
    json.raw('}');
  }
  if (layer.monitor) health(*layer.monitor);
  if (layer.responsiveness.state != Response::kNotApplicable) responsiveness(layer.responsiveness);
  notices(report, layer.layer);
  if (decided(layer.actuators)) actuators(layer.actuators);
  json.raw("}\n");
}

void RunLogWriter::File::model_record(const StepReport& report, std::string_view tag) {
  const bool any = decided(report.model);
  if (!any && std::none_of(report.notices.begin(), report.notices.end(), of_layer(-1))) return;
  json.raw("{\"step\":");
  json.value(report.step);
  json.raw(",\"layer\":null");
  info(report, tag);
  notices(report, -1);
  if (any) actuators(report.model);
  json.raw("}\n");
}

void RunLogWriter::File::info(const StepReport& report, std::string_view tag) {
  if (tag != "train") json.field("tag", tag);
  if (report.info.loss && std::isfinite(*report.info.loss)) json.field("loss", *report.info.loss);
  const auto& mixture = report.info.next_mixture;
  if (mixture.empty() || mixture.size() != config.model.domains.size()) return;
  json.key("next_mixture");
  json.raw('{');
  for (std::size_t d = 0; d < mixture.size(); ++d) json.field(config.model.domains[d], mixture[d]);
  json.raw('}');
}

/// 0/0 is written as null: an expert without tokens has no loss.
void RunLogWriter::File::means(std::span<const std::int64_t> sums, std::span<const std::int64_t> tokens) {
  json.raw('[');
  for (std::size_t i = 0; i < sums.size(); ++i) {
    if (i) json.raw(',');
    json.value(from_fixed(sums[i]) / static_cast<double>(tokens[i]));
  }
  json.raw(']');
}

namespace {

bool any_above_zero(std::span<const std::int64_t> counts) {
  return std::any_of(counts.begin(), counts.end(), [](std::int64_t count) { return count > 0; });
}

}  // namespace

void RunLogWriter::File::sums(const RoutingStats& stats) {
  using S = RoutingStats;
  // Sums that an invalid record or an overflow has spoilt would not read back; the reasons say what happened.
  const bool valid = stats.valid();
  json.field("tokens", valid ? stats.tokens() : 0);
  json.field("top_k", std::int64_t{stats.top_k()});
  if (config.log.extremes > 0 && valid && stats.assignments() > 0) extremes(stats);
  if (!config.log.per_expert || !valid) return;
  const auto whole = [&](std::string_view name, S::Array which) {
    json.key(name);
    json.array(stats.array(which));
  };
  const auto fixed = [&](std::string_view name, S::Array which, double factor = 1) {
    json.key(name);
    json.array(stats.array(which), [&](std::int64_t sum) { return from_fixed(sum) * factor; });
  };
  whole("counts", S::kCounts);
  if (stats.choices_sq() > 0 && stats.choices_sq() != stats.tokens() * stats.top_k() * stats.top_k())
    json.field("choices_sq", stats.choices_sq());
  if (stats.mean_gap()) json.field("gap_sum", from_fixed(stats.scalar(S::kGapSum)));
  if (stats.mean_gap() && stats.scalar(S::kGapWidthSum) > 0) {
    json.field("gap_width_sum", from_fixed(stats.scalar(S::kGapWidthSum)));
    whole("gap_near", S::kGapNear);
  }
  if (stats.has_sequences()) {
    json.field("sequences", stats.scalar(S::kSequences));
    json.field("sequence_len_sq", stats.scalar(S::kSequenceLenSq));
    whole("sequence_sq", S::kSequenceSq);
    whole("sequence_cross", S::kSequenceCross);
  }
  if (stats.has_probabilities()) {
    json.field("token_entropy_sum", from_fixed(stats.scalar(S::kTokenEntropySum)));
    fixed("prob_sum", S::kProbSum);
    fixed("sqrt_prob_sum", S::kSqrtProbSum);
  }
  if (stats.has_margins()) margins(stats);
  if (stats.has_pairs()) pairs(stats);
  if (stats.dropped()) json.field("dropped", stats.scalar(S::kDropped));
  for (const auto& [name, sum, records] : S::recorded_values()) {
    if (const auto value = stats.mean_of(sum, records)) json.field(name, *value);
  }
  if (const auto n = stats.scalar(S::kGradRecords); n > 0)
    fixed("grad_norm", S::kGradNormSum, 1.0 / static_cast<double>(n));
  if (const auto n = stats.scalar(S::kLatencyRecords); n > 0)
    fixed("latency", S::kLatencySum, 1.0 / static_cast<double>(n));
  if (any_above_zero(stats.array(S::kExpertLossTokens))) {
    json.key("expert_loss");
    means(stats.array(S::kExpertLossSum), stats.array(S::kExpertLossTokens));
  }
  if (!stats.has_domains()) return;
  json.key("domain_counts");
  json.raw('{');
  for (std::size_t d = 0; d < config.model.domains.size(); ++d) {
    json.key(config.model.domains[d]);
    json.array(stats.domain_counts(static_cast<int>(d)));
  }
  json.raw('}');
  if (!any_above_zero(stats.array(S::kDomainLossTokens))) return;
  json.key("domain_loss");
  json.raw('{');
  const auto n = static_cast<std::size_t>(stats.experts());
  for (std::size_t d = 0; d < config.model.domains.size(); ++d) {
    json.key(config.model.domains[d]);
    means(stats.array(S::kDomainLossSum).subspan(d * n, n),
          stats.array(S::kDomainLossTokens).subspan(d * n, n));
  }
  json.raw('}');
}

/// The most and the least loaded experts, as [number, count]; of equal counts the lower number first. The pairs with the
/// largest lift, as [number, number, tokens].
void RunLogWriter::File::extremes(const RoutingStats& stats) {
  const std::span<const std::int64_t> counts = stats.counts();
  order.resize(counts.size());
  for (std::size_t i = 0; i < counts.size(); ++i) order[i] = {counts[i], static_cast<std::int64_t>(i)};
  const auto shown = std::min(static_cast<std::size_t>(config.log.extremes), order.size());
  const auto write = [&](std::string_view name, auto before) {
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(), before);
    json.key(name);
    json.raw('[');
    for (std::size_t r = 0; r < shown; ++r) {
      json.raw(r ? ",[" : "[");
      json.value(order[r].second);
      json.raw(',');
      json.value(order[r].first);
      json.raw(']');
    }
    json.raw(']');
  };
  write("most_loaded", [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  write("least_loaded", std::less<>());
  if (!stats.has_pairs()) return;
  json.key("most_paired");
  json.raw('[');
  bool first = true;
  paired_experts(stats, static_cast<std::size_t>(config.log.extremes), together);
  for (const ExpertPair& pair : together) {
    json.raw(first ? "[" : ",[");
    first = false;
    json.value(std::int64_t{pair.first});
    json.raw(',');
    json.value(std::int64_t{pair.second});
    json.raw(',');
    json.value(pair.tokens);
    json.raw(']');
  }
  json.raw(']');
}

/// For each expert the number of the first expert behind it that shares a token with it, then the tokens that it shares with
/// each from there to the last that does.
void RunLogWriter::File::pairs(const RoutingStats& stats) {
  json.key("pairs");
  json.raw('[');
  std::span<const std::int64_t> left = stats.array(RoutingStats::kPairs);
  for (int i = 0; i < stats.experts(); ++i) {
    const auto behind = left.first(static_cast<std::size_t>(stats.experts() - 1 - i));
    left = left.subspan(behind.size());
    const auto is_used = [](std::int64_t count) { return count != 0; };
    const auto first = std::find_if(behind.begin(), behind.end(), is_used);
    const auto last = std::find_if(behind.rbegin(), behind.rend(), is_used).base();
    json.raw(i ? ",[" : "[");
    if (first < last) json.value(i + 1 + static_cast<std::int64_t>(first - behind.begin()));
    for (auto other = first; other < last; ++other) {
      json.raw(',');
      json.value(*other);
    }
    json.raw(']');
  }
  json.raw(']');
}

/// For each expert the number of its first bin that holds a token, then the counts from there to the last
/// that does; most bins are empty.
void RunLogWriter::File::margins(const RoutingStats& stats) {
  json.key("margins");
  json.raw('[');
  for (int i = 0; i < stats.experts(); ++i) {
    const auto bins = stats.margins(i);
    const auto is_used = [](std::int64_t count) { return count != 0; };
    const auto first = std::find_if(bins.begin(), bins.end(), is_used);
    const auto last = std::find_if(bins.rbegin(), bins.rend(), is_used).base();
    if (i) json.raw(',');
    json.raw('[');
    json.value(static_cast<std::int64_t>(first - bins.begin()));
    for (auto bin = first; bin < last; ++bin) {
      json.raw(',');
      json.value(*bin);
    }
    json.raw(']');
  }
  json.raw(']');
}

void RunLogWriter::File::metrics(const LayerReport& layer) {
  json.key("metrics");
  json.raw('{');
  for (const MetricField& field : metric_fields()) {
    const Metrics::Value& value = (*layer.metrics).*field.value;
    json.field(field.name, value ? *value : std::nan(""));
  }
  // Of the experts, only what the sums of one record cannot tell.
  if (layer.monitor && config.log.per_expert && !layer.monitor->update_frequency().empty()) {
    json.key("update_frequency");
    json.array(layer.monitor->update_frequency());
  }
  json.raw('}');
}

void RunLogWriter::File::health(const LayerMonitor& monitor) {
  json.field("health", name_of(monitor.health()));
  json.key("alerts");
  json.raw('[');
  bool first = true;
  for (const std::string_view alert : monitor.alerts()) {
    if (!first) json.raw(',');
    first = false;
    json.value(alert);
  }
  json.raw(']');
}

void RunLogWriter::File::responsiveness(const Responsiveness& found) {
  json.key("responsiveness");
  json.raw('{');
  json.field("state", name_of(found.state));
  if (found.gain && found.error) {
    json.field("gain", *found.gain);
    json.field("error", *found.error);
    json.field("slope", found.scaled ? "measured" : "assumed");
    if (found.late > 0) json.field("late", std::int64_t{found.late});
  }
  json.raw('}');
}

void RunLogWriter::File::notices(const StepReport& report, int layer) {
  bool first = true;
  for (const Notice& notice : report.notices) {
    if (notice.layer != layer) continue;
    if (std::exchange(first, false)) {
      json.key("notices");
      json.raw('[');
    } else {
      json.raw(',');
    }
    json.raw('{');
    json.field("kind", name_of(notice.kind));
    json.field("step", notice.step);
    json.field("text", notice.text);
    json.raw('}');
  }
  if (!first) json.raw(']');
}

void RunLogWriter::File::actuators(const ActuatorReport (&reports)[kActuatorCount]) {
  json.key("actuators");
  json.raw('{');
  for (const Actuator which : kActuators) {
    const ActuatorReport& report = reports[static_cast<std::size_t>(which)];
    if (!decided(report)) continue;
    json.key(name_of(which));
    json.raw('{');
    if (which != Actuator::kExpertBias || config.log.per_expert) {
      if (!report.proposed.empty()) {
        json.key("proposed");
        json.array(report.proposed);
      }
      json.key("applied");
      json.array(report.applied);
      if (!report.deployed.empty()) {
        json.key("deployed");
        json.array(report.deployed);
      }
    } else {
      const auto [min, max] = std::minmax_element(report.applied.begin(), report.applied.end());
      json.field("min", *min);
      json.field("max", *max);
    }
    json.key("reasons");
    json.raw('[');
    bool first = true;
    for (int r = 0; r < kReasonCount; ++r) {
      if (!report.reasons.has(static_cast<Reason>(r))) continue;
      if (!first) json.raw(',');
      first = false;
      json.value(name_of(static_cast<Reason>(r)));
    }
    json.raw(']');
    if (report.responsiveness.state != Response::kNotApplicable) responsiveness(report.responsiveness);
    json.raw('}');
  }
  json.raw('}');
}

}  // namespace moectl
