// moectl metrics TRACE: every metric of every record, or of two tagged windows.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "cli/metrics_counts.h"
#include "cli/metrics_loads.h"
#include "cli/metrics_screen.h"
#include "cli/parts.h"
#include "cli/tool.h"
#include "export/run_figures.h"
#include "log/reshape.h"
#include "measure/cached_measurer.h"
#include "moectl/config.h"
#include "moectl/metrics.h"
#include "moectl/monitor.h"
#include "moectl/run_log.h"

namespace moectl::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string trace, config, format;
  std::vector<std::string> compare;
  bool trends = false, loads = false, format_given = false;
  std::size_t extremes = 4;
  ScreenOptions screen;
};

/// Measures each layer with the options that the config has for it, on records that fit it; without a config, with the
/// targets of the run.
class Measuring {
 public:
  Measuring(const Options& options, const PolicyRegistry& registry)
      : trace_(options.trace), path_(options.config) {
    if (path_.empty()) return;
    const ControllerConfig config = load_config(path_, registry);
    monitor_ = config.monitor;
    defaults_ = defaults_of(config.model);
    for (const LayerSettings& settings : layer_settings(config)) {
      const std::string place =
          config.layers.empty() ? "model" : "layers[" + std::to_string(groups_.size()) + ']';
      if (!config.layers.empty()) {
        for (const int layer : settings.ids) group_of_.emplace(layer, groups_.size());
      }
      groups_.push_back({place, settings.config.model, metrics_options(settings.config)});
    }
  }
  const MonitorOptions& monitor() const { return monitor_; }
  const LogDefaults& defaults() const { return defaults_; }
  /// Throws InputError on a record that does not fit the config.
  MetricsOptions options(const LogRecord& record) const {
    MetricsOptions options;
    if (groups_.empty()) {
      options.targets = targets_of(record);
    } else {
      const Group& group = find_group(record);
      const auto must = [&](const char* field, int found, int wanted) {
        if (found == wanted) return;
        fail(record, field, found,
             "must be " + std::to_string(wanted) + ", " + group.place + '.' + field + " of " + path_);
      };
      must("experts", record.stats.experts(), group.model.experts);
      must("top_k", record.stats.top_k(), group.model.top_k);
      options = group.metrics;
    }
    options.details = true;
    return options;
  }

 private:
  /// Equal layers of the config.
  struct Group {
    std::string place;  // in the config, for messages
    ModelConfig model;
    MetricsOptions metrics;
  };

  const Group& find_group(const LogRecord& record) const {
    if (group_of_.empty()) return groups_.front();
    const auto it = group_of_.find(record.layer);
    if (it == group_of_.end())
      fail(record, "layer", record.layer, "must be an id of the layer groups of " + path_);
    return groups_[it->second];
  }
  [[noreturn]] void fail(const LogRecord& record, const std::string& field, int found,
                         const std::string& constraint) const {
    throw InputError(shown_path(trace_) + ':' + std::to_string(record.line) + ": " + field + ": " +
                     std::to_string(found) + ": " + constraint);
  }

  std::string trace_, path_;
  MonitorOptions monitor_;
  LogDefaults defaults_;
  std::vector<Group> groups_;            // empty without a config
  std::map<int, std::size_t> group_of_;  // by layer; empty if all layers are equal
};

void add_per_expert(const LogRecord& record, const LayerMonitor& monitor, Json& object) {
  const RoutingStats& stats = record.stats;
  std::vector<double> values(static_cast<std::size_t>(stats.experts()));
  for (const ExpertField& field : expert_fields()) {
    // NaN, an expert without data, becomes null.
    if (field.values(stats, values)) object[std::string(field.name)] = values;
  }
  if (const auto frequency = monitor.update_frequency(); !frequency.empty()) {
    object["update_frequency"] = std::vector<double>(frequency.begin(), frequency.end());
  }
  for (const DomainField& field : domain_fields()) {
    for (std::size_t d = 0; d < record.domains.size(); ++d) {
      if (field.values(stats, static_cast<int>(d), values)) {
        object[std::string(field.name)][record.domains[d]] = values;
      }
    }
  }
}

Json json_of(const Metrics& metrics) {
  Json object = Json::object();
  for (const MetricField& field : metric_fields()) {
    const Metrics::Value& value = metrics.*field.value;
    object[std::string(field.name)] = value ? Json(*value) : Json(nullptr);
  }
  return object;
}

std::vector<std::string> names() {
  std::vector<std::string> names;
  for (const MetricField& field : metric_fields()) names.emplace_back(field.name);
  return names;
}

/// Quoted as RFC 4180 says where a comma or a quote needs it. Line breaks of a name become escapes, so that
/// a line is a row.
std::string csv_cell(const std::string& text) {
  std::string cell = printable(text);
  if (cell.find_first_of(",\"") == std::string::npos) return cell;
  for (std::size_t at = 0; (at = cell.find('"', at)) != std::string::npos; at += 2) cell.insert(at, 1, '"');
  return '"' + cell + '"';
}

void print_csv(const std::vector<std::string>& cells) {
  for (std::size_t i = 0; i < cells.size(); ++i) std::cout << (i ? "," : "") << csv_cell(cells[i]);
  std::cout << '\n';
}

// ---- Record by record. ----

/// The history that smoothed metrics need, a layer and tag at a time.
class Histories {
 public:
  explicit Histories(const MonitorOptions& options, bool loads_only) : options_(options) {
    options_.trends = true;
    options_.loads_only = loads_only;
  }
  const LayerMonitor& observe(const LogRecord& record, Metrics& metrics, const MetricsOptions& how) {
    auto& [monitor, targets] = monitors_[{record.layer, record.tag, record.stats.experts()}];
    if (!monitor || targets != how.targets) {  // a history against other targets is another history
      // Inputs may be present in some records only.
      StatsShape shape = record.stats.shape();
      shape.needs.gradients = shape.needs.losses = shape.needs.latencies = true;
      monitor = std::make_unique<LayerMonitor>(shape, options_, how);
      targets = how.targets;
    }
    monitor->observe(record.stats, metrics, record.loss);
    metrics.churn = churn_.of(record);
    return *monitor;
  }

 private:
  MonitorOptions options_;
  struct History {
    std::unique_ptr<LayerMonitor> monitor;
    std::vector<double> targets;
  };
  std::map<std::tuple<int, std::string, int>, History> monitors_;
  Churn churn_;
};

int print_records(LogReader& reader, const Measuring& how, Counted& counted, const std::string& format) {
  Histories histories(how.monitor(), true);
  CachedMeasurer measurer;
  std::vector<std::string> header = {"step", "layer"};
  for (const std::string& name : names()) header.push_back(name);
  Table table(header);
  bool begun = false;
  while (const auto record = reader.next()) {
    if (!counted.has_counts(*record)) continue;
    if (!std::exchange(begun, true) && format == "csv") print_csv(header);
    const MetricsOptions options = how.options(*record);
    Metrics metrics = measurer.measure(record->stats, options);
    const LayerMonitor& monitor = histories.observe(*record, metrics, options);
    if (format == "json") {
      Json line = {{"step", record->step}, {"layer", record->layer}};
      if (record->tag != "train") line["tag"] = record->tag;
      line["metrics"] = json_of(metrics);
      add_per_expert(*record, monitor, line["metrics"]);
      std::cout << json_text(line) << '\n';
      continue;
    }
    std::vector<std::string> row = {std::to_string(record->step), std::to_string(record->layer)};
    for (const MetricField& field : metric_fields()) {
      const Metrics::Value& value = metrics.*field.value;
      row.push_back(format == "table" ? brief(value) : value ? exact(*value) : "");
    }
    if (format == "csv") {
      print_csv(row);
    } else {
      table.add(std::move(row));
    }
  }
  if (!counted.any()) counted.fail("no record of a layer has counts");
  if (format == "table") std::cout << table.text();
  return 0;
}

// ---- Trends of each layer. ----

/// The end of one layer's history under one tag, and the evidence on its auxiliary loss.
struct Course {
  const LayerMonitor* monitor = nullptr;
  std::int64_t steps = 0;
  std::map<std::string, std::int64_t> health, alerts;  // steps spent in each
  std::vector<AuxLossSample> aux_loss;
  std::optional<double> weight;  // in force: what the step before applied
};

std::optional<double> applied_weight(const LogRecord& record) {
  const auto it = record.actuators.find(std::string(name_of(Actuator::kAuxLossWeight)));
  if (it == record.actuators.end() || it->second.applied.size() != 1) return std::nullopt;
  return it->second.applied[0];
}

void print_course(int layer, const std::string& tag, const Course& course, const std::string& format,
                  Table& table) {
  Json trends = Json::object();
  for (const MetricField& field : metric_fields()) {
    const LayerMonitor::Trend trend = course.monitor->trend(field);
    if (!trend.ema) continue;
    const std::optional<double> values[] = {trend.ema, trend.slope, trend.autocorrelation, trend.sign_flips,
                                            trend.loss_correlation};
    if (format == "json") {
      Json one = Json::object();
      const char* const keys[] = {"ema", "slope", "autocorrelation", "oscillation", "loss_correlation"};
      for (std::size_t i = 0; i < 5; ++i) one[keys[i]] = values[i] ? Json(*values[i]) : Json(nullptr);
      trends[std::string(field.name)] = one;
      continue;
    }
    std::vector<std::string> row = {std::string(field.name), std::to_string(layer), tag};
    for (const auto& value : values)
      row.push_back(format == "table" ? brief(value) : value ? exact(*value) : "");
    if (format == "csv") {
      print_csv(row);
    } else {
      table.add(std::move(row));
    }
  }
  if (format != "json") return;
  const AuxLossReview review = review_aux_loss(course.aux_loss);
  const Json line = {
      {"layer", layer},
      {"tag", tag},
      {"steps", course.steps},
      {"health", name_of(course.monitor->health())},
      {"steps_in_health", course.health},
      {"steps_with_alert", course.alerts},
      {"trends", trends},
      {"aux_loss_review",
       {{"verdict", name_of(review.verdict)}, {"reason", review.reason}, {"excess_cv", review.excess_cv}}}};
  std::cout << json_text(line) << '\n';
}

int print_trends(LogReader& reader, const Measuring& how, Counted& counted, const std::string& format) {
  Histories histories(how.monitor(), false);
  CachedMeasurer measurer;
  std::map<std::pair<int, std::string>, Course> courses;
  std::optional<double> model_weight;
  WholeRecords records = whole_records(reader);
  while (const auto record = records.next()) {
    if (record->layer < 0) model_weight = applied_weight(*record);
    if (!counted.has_counts(*record)) continue;
    const MetricsOptions options = how.options(*record);
    Metrics metrics = measurer.measure(record->stats, options);
    Course& course = courses[{record->layer, record->tag}];
    course.monitor = &histories.observe(*record, metrics, options);
    ++course.steps;
    ++course.health[std::string(name_of(course.monitor->health()))];
    for (const std::string_view alert : course.monitor->alerts()) ++course.alerts[std::string(alert)];
    const std::optional<double> weight = course.weight ? course.weight : model_weight;
    if (const auto excess = signed_excess_cv_sq(metrics); excess && weight) {
      course.aux_loss.push_back({*weight, *excess, course.monitor->health() == Health::kHealthy});
    }
    if (const auto applied = applied_weight(*record)) course.weight = applied;
  }
  if (!counted.any()) counted.fail("no record of a layer has counts");
  const std::vector<std::string> header = {"metric", "layer",           "tag",         "ema",
                                           "slope",  "autocorrelation", "oscillation", "loss_correlation"};
  if (format == "csv") print_csv(header);
  Table table(header);
  for (const auto& [key, course] : courses) print_course(key.first, key.second, course, format, table);
  if (format == "table") {
    std::cout << table.text();
    for (const auto& [key, course] : courses) {
      std::cout << "layer " << key.first << ", " << printable(key.second) << ": "
                << name_of(course.monitor->health());
      for (const auto& [alert, steps] : course.alerts)
        std::cout << "; " << printable(alert) << " for " << steps << " steps";
      const AuxLossReview review = review_aux_loss(course.aux_loss);
      std::cout << "; aux loss: " << name_of(review.verdict) << " (" << review.reason << ")\n";
    }
  }
  return 0;
}

// ---- Two windows. ----

/// What `--compare` names: a tag, or the steps of it in [from, to): "validation", "train@0:360", "train@360:".
struct WindowName {
  std::string text, tag;
  std::int64_t from = 0, to = std::numeric_limits<std::int64_t>::max();

  explicit WindowName(const std::string& name) : text(name), tag(name) {
    const std::size_t at = name.find('@');
    if (at == std::string::npos) return;
    tag = name.substr(0, at);
    const std::size_t colon = name.find(':', at);
    const auto number = [&](std::size_t begin, std::size_t end, std::int64_t& value) {
      if (begin == end) return true;
      const auto [last, error] = std::from_chars(name.data() + begin, name.data() + end, value);
      return error == std::errc() && last == name.data() + end && value >= 0;
    };
    if (colon == std::string::npos || !number(at + 1, colon, from) || !number(colon + 1, name.size(), to)) {
      throw InputError("--compare: " + name + ": must be TAG or TAG@FROM:TO, of steps");
    }
  }
  bool has(const LogRecord& record) const {
    return record.tag == tag && record.step >= from && record.step < to;
  }
};

/// Sums of each layer over the records of a window: a whole validation pass, or a run before a shift.
class Window {
 public:
  struct Layer {
    RoutingStats stats;
    MetricsOptions options;
    std::vector<std::string> domains;
    double loss_sum = 0, loss_tokens = 0;  // a loss is a mean over tokens
    std::optional<double> loss() const {
      return loss_tokens > 0 ? std::optional<double>(loss_sum / loss_tokens) : std::nullopt;
    }
  };

  void add(const LogRecord& record, const MetricsOptions& options) {
    auto [it, is_new] = layers_.try_emplace(record.layer);
    Layer& layer = it->second;
    layer.options = options;
    if (record.loss) {
      const auto tokens = static_cast<double>(record.stats.tokens());
      layer.loss_sum += *record.loss * tokens;
      layer.loss_tokens += tokens;
    }
    if (is_new) {
      layer.stats = reshaped(record.stats, record.domains, record.stats.shape().needs, record.domains);
      layer.domains = record.domains;
      return;
    }
    add_recorded(layer.stats, layer.domains, record.stats, record.domains);
    require_range(layer.stats, record.layer, "the records of the window");
  }
  const std::map<int, Layer>& layers() const { return layers_; }

 private:
  std::map<int, Layer> layers_;
};

/// Fisher–Rao distance between two loads, in [0, π].
std::optional<double> load_distance(const RoutingStats& a, const RoutingStats& b) {
  const auto shares = [](const RoutingStats& stats) {
    std::vector<double> p(stats.counts().begin(), stats.counts().end());
    for (double& share : p) share /= static_cast<double>(stats.assignments());
    return p;
  };
  if (a.assignments() <= 0 || b.assignments() <= 0) return std::nullopt;
  return fisher_distance(shares(a), shares(b));
}

int print_comparison(LogReader& reader, const Measuring& how, Counted& counted, const Options& options) {
  const WindowName first_window(options.compare[0]), second_window(options.compare[1]);
  const std::string &first = first_window.text, &second = second_window.text;
  // Parts of a step are added up, unless a window names a rank or a micro-batch.
  const TagParts one = parts_of(first_window.tag), other = parts_of(second_window.tag);
  const bool micro_batches = one.micro_batch || other.micro_batch;
  WholeRecords records = whole_records(reader, one.rank || other.rank);
  Window a, b;
  while (const auto record = micro_batches ? reader.next() : records.next()) {
    if (!counted.has_counts(*record)) continue;
    const MetricsOptions measured = how.options(*record);
    if (first_window.has(*record)) a.add(*record, measured);
    if (second_window.has(*record)) b.add(*record, measured);
  }
  if (!counted.any()) counted.fail("no record of a layer has counts");
  for (const auto& [tag, window] : {std::pair{&first, &a}, std::pair{&second, &b}}) {
    if (window->layers().empty()) throw InputError("--compare: " + *tag + ": no record is in this window");
  }
  std::vector<std::string> header = {"metric", "layer", first, second, "difference"};
  if (options.format == "csv") print_csv(header);
  Table table(header);
  for (const auto& of_layer : a.layers()) {
    const int layer = of_layer.first;
    const Window::Layer& left = of_layer.second;
    const auto it = b.layers().find(layer);
    if (it == b.layers().end() || it->second.stats.experts() != left.stats.experts()) continue;
    const Window::Layer& right = it->second;
    Metrics x = measure(left.stats, left.options), y = measure(right.stats, right.options);
    for (Metrics* of_window : {&x, &y}) of_window->max_vio_global = of_window->max_vio;
    Json metrics = Json::object();
    const auto add = [&](const std::string& name, const Metrics::Value& u, const Metrics::Value& v) {
      const Metrics::Value difference = u && v ? Metrics::Value(*v - *u) : std::nullopt;
      if (options.format == "json") {
        const auto json = [](const Metrics::Value& value) { return value ? Json(*value) : Json(nullptr); };
        metrics[name] = {{first, json(u)}, {second, json(v)}, {"difference", json(difference)}};
        return;
      }
      const bool table_wanted = options.format == "table";
      const auto cell = [&](const Metrics::Value& value) {
        return table_wanted ? brief(value) : value ? exact(*value) : std::string();
      };
      std::vector<std::string> row = {name, std::to_string(layer), cell(u), cell(v), cell(difference)};
      if (table_wanted) {
        table.add(std::move(row));
      } else {
        print_csv(row);
      }
    };
    for (const MetricField& field : metric_fields()) {
      if (field.name == "dead_experts") continue;  // needs a history; a window has none
      add(std::string(field.name), x.*field.value, y.*field.value);
    }
    add("loss", left.loss(), right.loss());
    if (options.format == "json") {
      const auto distance = load_distance(left.stats, right.stats);
      const Json line = {{"layer", layer},
                         {"tags", {first, second}},
                         {"load_distance", distance ? Json(*distance) : Json(nullptr)},
                         {"metrics", metrics}};
      std::cout << json_text(line) << '\n';
    }
  }
  if (options.format == "table") std::cout << table.text();
  return 0;
}

int metrics(const Options& options, const PolicyRegistry& registry) {
  const char* const other = options.loads              ? "--loads"
                            : options.trends           ? "--trends"
                            : !options.compare.empty() ? "--compare"
                                                       : nullptr;
  if (other && options.format == "screen")
    throw InputError(std::string("--format: screen: must be json, csv or table with ") + other);
  const Measuring how(options, registry);
  LogReader reader(options.trace);
  reader.set_defaults(how.defaults());
  Counted counted(options.trace);
  const auto options_of = [&how](const LogRecord& record) { return how.options(record); };
  if (options.loads) {
    const bool on_terminal = !options.format_given && isatty(STDOUT_FILENO) == 1;
    const int code =
        print_loads(reader, counted, options_of, options.extremes, on_terminal ? "table" : options.format);
    say_faults(reader, options.trace);
    return code;
  }
  const bool summary = options.screen.sum || options.screen.all || !options.screen.by.empty();
  const bool terminal = !options.format_given && isatty(STDOUT_FILENO) == 1;
  if (options.format == "screen" || (options.compare.empty() && !options.trends && (summary || terminal))) {
    ScreenOptions screen = options.screen;
    screen.json = options.format_given && options.format == "json";
    if (summary && options.format_given && options.format != "json" && options.format != "screen")
      throw InputError("--format: " + options.format + ": must be screen or json with --sum, --by or --all");
    const int code = print_screen(reader, counted, options_of, screen);
    say_faults(reader, options.trace);
    return code;
  }
  const int code = options.trends            ? print_trends(reader, how, counted, options.format)
                   : options.compare.empty() ? print_records(reader, how, counted, options.format)
                                             : print_comparison(reader, how, counted, options);
  say_faults(reader, options.trace);
  return code;
}

}  // namespace

void add_metrics(CLI::App& app, Tool& tool) {
  CLI::App* command = app.add_subcommand("metrics", "Print every metric of every record of a trace");
  std::string footer = "Metrics (absent ones are null, an empty cell, or '-'):\n";
  std::size_t widest = 0;
  for (const MetricField& field : metric_fields()) widest = std::max(widest, field.name.size());
  for (const MetricField& field : metric_fields()) {
    footer += "  " + std::string(field.name) + std::string(widest + 2 - field.name.size(), ' ') +
              std::string(field.formula) + (field.unit.empty() ? "" : "  [" + std::string(field.unit) + "]") +
              '\n';
  }
  footer += "Per expert, in json only, where the record has them:\n";
  const auto add_line = [&](const auto& field) {
    footer += "  " + std::string(field.name) + "  " + std::string(field.formula) +
              (field.unit.empty() ? "" : "  [" + std::string(field.unit) + "]") + '\n';
  };
  for (const ExpertField& field : expert_fields()) add_line(field);
  footer +=
      "  update_frequency  share of the records with grad_norm, up to this one, in which it is above 0\n";
  footer += "Per domain and expert, in json only, as {domain: [...]}:\n";
  for (const DomainField& field : domain_fields()) add_line(field);
  command->footer(footer +
                  "\nCVs divide by N. NeMo AutoModel's divides by N - 1: sqrt(N/(N-1)) times as large.\n"
                  "\nExamples:\n"
                  "  moectl metrics trace.jsonl --format screen   # what a terminal shows: is it balanced?\n"
                  "  moectl metrics trace.jsonl --sum\n"
                  "  moectl metrics trace.jsonl --loads --extremes 8\n"
                  "  moectl metrics trace.jsonl.gz --format csv > metrics.csv\n"
                  "  moectl metrics run.jsonl --compare train validation --format table\n"
                  "  moectl metrics run.jsonl --compare train@0:360 train@360: --format table\n"
                  "  moectl metrics run.jsonl --trends --format table");
  auto options = std::make_shared<Options>();
  add_trace(*command, options->trace);
  command->add_option(
      "--config", options->config,
      "Take capacity factor, thresholds, placement and targets from this config, of layers that differ each "
      "from its own group (without it, targets from the run log itself)");
  command
      ->add_option("--compare", options->compare,
                   "Sum all records of each tag into one window per layer, and compare the two windows")
      ->expected(2)
      ->type_name("TAG");
  command
      ->add_flag(
          "--trends", options->trends,
          "How each metric of each layer moved over the trend window at the end, its correlation with the "
          "loss, health, and a review of the auxiliary loss")
      ->excludes("--compare");
  CLI::Option* loads =
      command
          ->add_flag(
              "--loads", options->loads,
              "Percentiles of the load over the experts of each layer and over those of all layers, and the "
              "most and least loaded experts, of the counts summed over all steps")
          ->excludes("--compare")
          ->excludes("--trends");
  command
      ->add_option(
          "--extremes", options->extremes,
          "With --loads: this many of the most and of the least loaded experts, and of the pairs that "
          "the same tokens choose most")
      ->check(whole_number(0, 65536))
      ->capture_default_str()
      ->needs(loads);
  command
      ->add_flag("--sum", options->screen.sum,
                 "The screen for the counts summed over all steps: is there an imbalance that stays?")
      ->excludes("--compare")
      ->excludes("--trends");
  command
      ->add_flag("--all", options->screen.all,
                 "The screen with all its rows, in order; else the worst of many")
      ->excludes("--compare")
      ->excludes("--trends");
  command
      ->add_option("--by", options->screen.by,
                   "The screen with a row for each tag, domain or rank (tags that `import --by rank` writes)")
      ->check(CLI::IsMember({"tag", "domain", "rank"}))
      ->excludes("--compare")
      ->excludes("--trends");
  CLI::Option* format = add_format(*command, options->format, {"json", "csv", "table", "screen"});
  format->description(
      "How to print; screen, which a terminal gets by default, says whether each layer is balanced");
  command->callback([&tool, options, format] {
    options->format_given = format->count() > 0;
    tool.run = [&tool, options] { return metrics(*options, tool.registry); };
  });
}

}  // namespace moectl::cli
