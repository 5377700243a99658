#include "cli/report_data.h"

#include "base/format.h"
#include "cli/parts.h"
#include "cli/tool.h"
#include "export/step_sample.h"
#include "log/reshape.h"
#include "measure/percentiles.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace moectl::cli {
namespace {

using nlohmann::json;

constexpr std::size_t kColumns = 600;
const char* const kFixed = "fixed";  // the policy that moves nothing
// Names of alerts that are drawn: one row each. The others are counted.
constexpr std::size_t kAlerts = 40;
constexpr std::size_t kAlertLayers = 8;  // named for each column
constexpr std::size_t kPairs = 12;       // shown of each layer
// Points of all experts' loss curves together, about five bytes each.
constexpr std::size_t kLossPoints = 200000;
// Cells of all expert maps of a run together: a byte each, and a third more as text.
constexpr std::size_t kCells = 900000;

/// How many columns the page has room for, of maps with so many rows in all.
std::size_t map_columns(std::size_t rows) {
  return std::clamp<std::size_t>(kCells / std::max<std::size_t>(rows, 1), 20, 300);
}

std::string base64(const std::vector<unsigned char>& bytes) {
  static const char* const kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  text.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    unsigned word = 0;
    for (std::size_t j = 0; j < 3; ++j) word = word << 8 | (i + j < bytes.size() ? bytes[i + j] : 0U);
    for (std::size_t j = 0; j < 4; ++j) {
      text += i + j <= bytes.size() ? kDigits[word >> (18 - 6 * j) & 63] : '=';
    }
  }
  return text;
}

/// Five digits: more than a screen shows, and a third of the bytes.
json rounded(double value) {
  if (!std::isfinite(value)) return nullptr;
  return rounded_to(value, 5);
}

json lines_of(const Row& row) {
  json mean = json::array(), min = json::array(), max = json::array();
  bool spread = false;
  for (const Extremes& e : row) {
    mean.push_back(e.count ? rounded(e.sum / static_cast<double>(e.count)) : json(nullptr));
    min.push_back(e.count ? rounded(e.min) : json(nullptr));
    max.push_back(e.count ? rounded(e.max) : json(nullptr));
    spread = spread || (e.count && e.min != e.max);
  }
  if (!spread) return {{"mean", mean}};
  return {{"mean", mean}, {"min", min}, {"max", max}};
}

void put(Row& row, std::size_t column, double value) {
  if (!std::isfinite(value)) return;
  if (row.size() <= column) row.resize(column + 1);
  row[column].add(value);
}

template <typename T, typename Merge>
void halve_row(std::vector<T>& row, Merge merge) {
  for (std::size_t i = 0; 2 * i < row.size(); ++i) {
    T both = std::move(row[2 * i]);
    if (2 * i + 1 < row.size()) merge(both, row[2 * i + 1]);
    row[i] = std::move(both);
  }
  row.resize((row.size() + 1) / 2);
}

/// The section of each actuator, with the names of all policies that move it. Where the config's own moves nothing, the
/// first of a group of layers or of the timeline that does.
nlohmann::json sections_of(const nlohmann::json& config) {
  nlohmann::json sections = nlohmann::json::object();
  for (const Actuator which : kActuators) {
    const std::string name(name_of(which));
    if (!config.contains(name)) continue;
    nlohmann::json lead = config[name], policies = nlohmann::json::array();
    const auto take = [&](const nlohmann::json& from) {
      if (!from.contains(name)) return;
      const nlohmann::json& section = from[name];
      const std::string policy = section.value("policy", kFixed);
      if (policy == kFixed || std::find(policies.begin(), policies.end(), policy) != policies.end()) return;
      if (policies.empty()) lead = section;
      policies.push_back(policy);
    };
    take(config);
    for (const char* list : {"layers", "timeline"}) {
      if (!config.contains(list)) continue;
      for (const nlohmann::json& entry : config[list]) take(entry);
    }
    if (policies.empty()) policies.push_back(kFixed);
    sections[name] = lead;
    sections[name]["policies"] = policies;
  }
  return sections;
}

}  // namespace

ReportRun::ReportRun(const std::string& path, std::optional<std::int64_t> shift) : name_(path) {
  LogReader reader(path, FaultPolicy::kSalvage);
  header_ = reader.header();
  shift_ = shift ? shift : header_.shift;
  figures_ = RunFigures(shift_);
  if (!header_.config_json.empty()) take_config(nlohmann::json::parse(header_.config_json));
  targets_ = header_.targets;
  // What the page will not show of the experts need not be kept: with hundreds in each of many layers it would be most
  // of the memory. Four times the columns of the load and bias maps are enough to choose from.
  std::size_t rows = 2U * static_cast<std::size_t>(header_.layers.value_or(1)) *
                     static_cast<std::size_t>(header_.experts.value_or(1));
  for (const LogGroup& group : header_.groups) {
    rows += 2U * group.layers.size() * static_cast<std::size_t>(group.experts.value_or(1));
  }
  while (kColumns / (2 * expert_each_) >= 4 * map_columns(rows)) expert_each_ *= 2;
  WholeRecords records = whole_records(reader);
  std::string in_force = header_.config_json;
  while (const auto record = records.next()) {
    // The reader may be some steps further, and what it read last may hold for this step already.
    const std::vector<ConfigChange>& all = reader.config_changes();
    const auto next = std::ranges::upper_bound(all, record->step, {}, &ConfigChange::step);
    const std::string& now = next == all.begin() ? header_.config_json : std::prev(next)->config_json;
    if (now != in_force) {
      in_force = now;
      take_config(nlohmann::json::parse(now));
    }
    add(*record);
  }
  tell_config_changes(reader.config_changes());
  say_faults(reader, path);
  faults_ = reader.faults();
  fault_count_ = reader.fault_count();
  if (layers_.empty()) {
    throw InputError(shown_path(path) +
                     (records_ == 0 ? ": holds no record" : ": no record of a layer tagged 'train'") +
                     (faults_.empty() ? "" : "; the first fault is " + faults_.front()));
  }
}

/// The config from here on. The page names every policy of the run; advice is on the config in force.
void ReportRun::take_config(const nlohmann::json& config) {
  const nlohmann::json now = sections_of(config);
  nlohmann::json merged = config;
  merged.update(now);
  advice_.take_config(std::move(merged));
  if (sections_.is_null()) sections_ = nlohmann::json::object();
  const nlohmann::json none = nlohmann::json::array({kFixed});
  for (const auto& [name, section] : now.items()) {
    nlohmann::json& known = sections_[name];
    if (!known.is_null() && section["policies"] == none) continue;  // what moved it before is shown
    nlohmann::json policies = nlohmann::json::array();
    if (!known.is_null() && known["policies"] != none) policies = known["policies"];
    for (const nlohmann::json& policy : section["policies"]) {
      if (std::find(policies.begin(), policies.end(), policy) == policies.end()) policies.push_back(policy);
    }
    known = section;
    known["policies"] = std::move(policies);
  }
}

std::size_t ReportRun::column_of(std::int64_t step) {
  if (!first_) first_ = step;
  // A run that was joined to another may begin before it: such steps share the first column.
  const auto column = [&] {
    return static_cast<std::size_t>(std::max<std::int64_t>(0, step - *first_) / width_);
  };
  while (column() >= kColumns) halve();
  last_ = std::max(last_, step);
  return column();
}

/// Columns of the rows of single experts.
std::size_t ReportRun::expert_columns() const {
  const std::size_t all = static_cast<std::size_t>((last_ - *first_) / width_) + 1;
  return (all + expert_each_ - 1) / expert_each_;
}

template <typename Visit>
void ReportRun::for_each_row(Visit visit) {
  for (auto& [name, row] : series_) visit(row);
  for (auto& [name, track] : tracks_) visit(track.value);
  for (auto& [number, layer] : layers_) {
    visit(layer.max_vio);
    for (auto* rows : {&layer.load, &layer.bias, &layer.loss}) {
      for (Row& row : *rows) visit(row);
    }
  }
}

void ReportRun::halve() {
  width_ *= 2;
  for_each_row([](Row& row) { halve_row(row, [](Extremes& a, const Extremes& b) { a.merge(b); }); });
  for (auto& [name, track] : tracks_) {
    halve_row(track.reasons, [](auto& a, const auto& b) {
      for (const auto& [reason, count] : b) a[reason] += count;
    });
  }
  for (auto& [name, alert] : alerts_) {
    halve_row(alert.layers, [](std::set<int>& a, const std::set<int>& b) { a.insert(b.begin(), b.end()); });
  }
  for (auto& [number, layer] : layers_) {
    halve_row(layer.health, [](Health& a, Health b) { a = std::max(a, b); });
  }
}

void ReportRun::add_alert(const std::string& name, const LogRecord& record, std::size_t column) {
  const auto [it, is_new] = alerts_.try_emplace(name);
  Alert& alert = it->second;
  if (is_new) alert.first = record.step;
  if (is_new || record.step != alert.last) ++alert.steps;
  alert.last = record.step;
  if (alert.layers.size() <= column) alert.layers.resize(column + 1);
  alert.layers[column].insert(record.layer);
}

/// Each key that changed, as a notice.
void ReportRun::tell_config_changes(const std::vector<ConfigChange>& changes) {
  using nlohmann::json;
  json before = json::parse(header_.config_json.empty() ? "{}" : header_.config_json);
  for (const ConfigChange& change : changes) {
    const json now = json::parse(change.config_json);
    const json was = before.flatten(), is = now.flatten();
    const auto tell = [&](const std::string& key, const std::string& from, const std::string& to) {
      if (key.starts_with("/timeline")) return;
      std::string name = key.substr(1);
      std::replace(name.begin(), name.end(), '/', '.');
      const std::string text = name + ": " + from + ", from here on " + to;
      notices_[{"config", -1, text}] = {text, change.step, 1};
    };
    for (const auto& [key, value] : was.items()) {
      if (!is.contains(key)) tell(key, value.dump(), "none");
    }
    for (const auto& [key, value] : is.items()) {
      if (!was.contains(key)) {
        tell(key, "none", value.dump());
      } else if (was[key] != value) {
        tell(key, was[key].dump(), value.dump());
      }
    }
    before = now;
  }
}

void ReportRun::add_response(const LogRecord& record, const std::string& actuator,
                             const Responsiveness& found) {
  if (found.state == Response::kNotApplicable) return;
  Answer& answer = answers_[{record.layer, actuator}];
  answer.last = found;
  if (found.state == Response::kUnresponsive && answer.held++ == 0) answer.first_held = record.step;
}

json ReportRun::responses_json() const {
  auto out = nlohmann::json::array();
  for (const auto& [where, answer] : answers_) {
    const Responsiveness& found = answer.last;
    nlohmann::json one = {{"layer", where.first < 0 ? nlohmann::json(nullptr) : nlohmann::json(where.first)},
                          {"actuator", where.second},
                          {"state", name_of(found.state)},
                          {"late", found.late},
                          {"held", answer.held}};
    if (found.gain && found.error) {
      one["gain"] = rounded(*found.gain);
      one["error"] = rounded(*found.error);
      one["slope"] = found.scaled ? "measured" : "assumed";
    }
    if (answer.held > 0) one["first_held"] = answer.first_held;
    out.push_back(one);
  }
  return out;
}

json ReportRun::notices_json() const {
  nlohmann::json all = nlohmann::json::array();
  for (const auto& [which, told] : notices_) {
    const auto& [kind, layer, text] = which;
    all.push_back({{"kind", kind},
                   {"layer", layer < 0 ? nlohmann::json(nullptr) : nlohmann::json(layer)},
                   {"first", told.first},
                   {"count", told.count},
                   {"text", told.text}});
  }
  return all;
}

json ReportRun::alerts_json() const {
  nlohmann::json all = nlohmann::json::array();
  for (const auto& [name, alert] : alerts_) {
    if (all.size() == kAlerts) break;
    nlohmann::json columns = nlohmann::json::array();
    std::set<int> ever;
    for (std::size_t c = 0; c < alert.layers.size(); ++c) {
      const std::set<int>& layers = alert.layers[c];
      if (layers.empty()) continue;
      ever.insert(layers.begin(), layers.end());
      nlohmann::json named = nlohmann::json::array();
      for (const int layer : layers) {
        if (named.size() < kAlertLayers) named.push_back(layer);
      }
      columns.push_back({c, layers.size(), named});
    }
    all.push_back({{"name", name},
                   {"first", alert.first},
                   {"last", alert.last},
                   {"steps", alert.steps},
                   {"layers", ever.size()},
                   {"columns", columns}});
  }
  return all;
}

/// A mean a column, of as many columns as the page has room for.
json ReportRun::loss_lines(const Layer& layer, std::size_t columns) const {
  const std::size_t each = (expert_columns() + columns - 1) / columns;
  nlohmann::json lines = nlohmann::json::array();
  for (const Row& row : layer.loss) {
    nlohmann::json line = nlohmann::json::array();
    for (std::size_t from = 0; from < row.size(); from += each) {
      Extremes point;
      for (std::size_t i = from; i < std::min(from + each, row.size()); ++i) point.merge(row[i]);
      line.push_back(point.count ? rounded(point.sum / static_cast<double>(point.count))
                                 : nlohmann::json(nullptr));
    }
    lines.push_back(std::move(line));
  }
  return {{"each", each * expert_each_}, {"lines", lines}};
}

void ReportRun::add(const LogRecord& record) {
  ++records_;
  if (record.tag == "validation" && record.loss) validation_[record.step] = *record.loss;
  const Metrics metrics = metrics_.of(record);
  figures_.add(record, metrics);
  if (record.tag != "train") return;
  advice_.add(record, metrics);
  const std::size_t column = column_of(record.step);
  const auto put_metric = [&](const char* name, const Metrics::Value& value) {
    if (value) put(series_[name], column, *value);
  };
  if (record.loss) put(series_["loss"], column, *record.loss);
  const FloorInForce floor = floor_of(metrics);
  put_metric("max_vio", metrics.max_vio);
  put_metric("max_vio_floor", floor.max_vio);
  put_metric("cv", metrics.load_cv);
  put_metric("cv_floor", floor.cv);
  put_metric("dead_experts", metrics.dead_experts);
  for (const auto& [name, actuator] : record.actuators) {
    Track& track = tracks_[name];
    for (const double value : actuator.applied) put(track.value, column, value);
    if (actuator.applied.empty()) {
      for (const auto& end : {actuator.min, actuator.max}) {
        if (end) put(track.value, column, *end);
      }
    }
    if (track.reasons.size() <= column) track.reasons.resize(column + 1);
    for (const std::string& reason : actuator.reasons) ++track.reasons[column][reason];
    add_response(record, name, actuator.responsiveness);
  }
  add_response(record, std::string(name_of(Actuator::kExpertBias)), record.responsiveness);
  for (const std::string& alert : record.alerts) {
    add_alert(alert, record, column);
  }
  for (const LoggedNotice& notice : record.notices) {
    const bool invalid = notice.kind == name_of(NoticeKind::kInvalid);
    Told& told = notices_[{notice.kind, record.layer, invalid ? "" : notice.text}];
    if (told.count++ > 0) continue;
    told.first = notice.step;
    told.text = notice.text;
  }
  if (record.layer < 0) return;
  if (header_.groups.empty()) targets_ = record.targets;
  Layer& layer = layers_[record.layer];
  if (metrics.max_load) {
    layer.last.emplace_back(metrics, record.tokens);
    if (layer.last.size() > kSteadyWindow) layer.last.pop_front();
  }
  if (metrics.max_vio) {
    put(layer.max_vio, column, *metrics.max_vio);
    LayerMean mean(record.step);
    mean.add(sample_of(record, metrics));
    layer.now.push_back(mean.figures());
    if (layer.now.size() > kSteadyWindow) layer.now.pop_front();
  }
  if (!record.health.empty()) {
    if (layer.health.size() <= column) layer.health.resize(column + 1, Health::kNoData);
    Health& worst = layer.health[column];
    worst = std::max(worst, health_of(record.health).value_or(Health::kNoData));
  }
  const std::size_t coarse = column / expert_each_;
  const RoutingStats& stats = record.stats;
  add_pairs(layer.pairs, stats);
  const auto n = static_cast<std::size_t>(stats.experts());
  if (n > 0 && stats.assignments() > 0) {
    layer.load.resize(n);
    relative_loads(stats.counts(), record.targets.get(), loads_);
    for (std::size_t i = 0; i < n; ++i) put(layer.load[i], coarse, loads_[i]);
  }
  if (const auto it = record.actuators.find("expert_bias"); it != record.actuators.end()) {
    const std::vector<double>& bias = it->second.applied;
    layer.bias.resize(std::max(layer.bias.size(), bias.size()));
    for (std::size_t i = 0; i < bias.size(); ++i) put(layer.bias[i], coarse, bias[i]);
  }
  if (stats.shape().needs.losses) {
    layer.loss.resize(n);
    const auto sums = stats.array(RoutingStats::kExpertLossSum),
               tokens = stats.array(RoutingStats::kExpertLossTokens);
    for (std::size_t i = 0; i < n; ++i) {
      if (tokens[i] > 0) put(layer.loss[i], coarse, from_fixed(sums[i]) / static_cast<double>(tokens[i]));
    }
  }
  for (std::size_t d = 0; d < record.domains.size(); ++d) {
    std::vector<double>& counts = layer.domains[record.domains[d]];
    counts.resize(n, 0);
    const auto more = stats.domain_counts(static_cast<int>(d));
    for (std::size_t i = 0; i < n; ++i) counts[i] += static_cast<double>(more[i]);
  }
}

/// A byte a cell, row by row: 0…254 from -scale to scale (of log2 of the ratio, or of the value); 255 where
/// nothing was recorded. Of what falls into a cell, the value furthest from the middle is kept.
json ReportRun::expert_map(const std::vector<Row>& rows, std::size_t columns, double scale,
                           bool log_ratio) const {
  const auto middle = [&](double v) {
    // An expert with no tokens has the lowest colour, not none.
    return log_ratio ? std::log2(std::max(v, 1e-9)) : v;
  };
  const std::size_t all = expert_columns(), each = (all + columns - 1) / columns;
  std::vector<unsigned char> bytes;
  for (const Row& row : rows) {
    for (std::size_t from = 0; from < all; from += each) {
      Extremes cell;
      for (std::size_t i = from; i < std::min(from + each, row.size()); ++i) cell.merge(row[i]);
      if (cell.count == 0) {
        bytes.push_back(255);
        continue;
      }
      const double low = middle(cell.min), high = middle(cell.max);
      const double value = std::clamp((std::abs(low) > std::abs(high) ? low : high) / scale, -1.0, 1.0);
      bytes.push_back(static_cast<unsigned char>(std::lround((value + 1) * 127)));
    }
  }
  return {{"rows", rows.size()}, {"each", each * expert_each_}, {"scale", scale}, {"data", base64(bytes)}};
}

/// The last hundred steps, shift or not, by the definition of balance: the mean over layers, and the worst layer.
json ReportRun::now_json() const {
  nlohmann::json now = {{"bound", kBalancedFloors}};
  std::vector<StepFigures> all;
  double worst = -1;
  std::int64_t above = 0;
  for (const auto& [number, layer] : layers_) {
    if (layer.now.empty()) continue;
    const std::vector<StepFigures> steps(layer.now.begin(), layer.now.end());
    all.insert(all.end(), steps.begin(), steps.end());
    const auto over = over_floor(steps).worst();
    if (!over) continue;
    above += *over > kBalancedFloors ? 1 : 0;
    if (*over <= worst) continue;
    worst = *over;
    now["worst_layer"] = number;
    now["worst"] = rounded(*over);
  }
  const OverFloor mean = over_floor(all);
  const auto put_value = [&](const char* name, std::optional<double> value) {
    now[name] = value ? rounded(*value) : nlohmann::json(nullptr);
  };
  put_value("max_vio_over_floor", mean.max_vio);
  put_value("cv_over_floor", mean.cv);
  // Of a hand-made log a floor may stand in another layer than the metric.
  const bool known = mean.worst() && now.contains("worst_layer");
  now["known"] = known;
  now["layers_above"] = above;
  now["balanced"] = known && *mean.worst() <= kBalancedFloors && above == 0;
  FloorKind floor = FloorKind::kNone;
  for (const StepFigures& step : all) floor = joined(floor, step.floor);
  now["floor"] = name_of(floor);
  return now;
}

/// Every metric that has a value in the last hundred steps: its mean over them, weighted by tokens as in figures.cc, in the
/// layers from the lowest to the highest, percentiles over layers, and over all.
json ReportRun::table_json() const {
  nlohmann::json rows = nlohmann::json::array();
  for (const MetricField& field : metric_fields()) {
    Extremes layers;
    std::vector<double> means;
    int lowest = 0, highest = 0;
    for (const auto& [number, layer] : layers_) {
      const auto has = [&](const Metrics& metrics) {
        const Metrics::Value& value = metrics.*field.value;
        return value && std::isfinite(*value);
      };
      const bool known = std::ranges::any_of(
          layer.last, [&](const auto& step) { return step.second > 0 && has(step.first); });
      double sum = 0, weights = 0;
      for (const auto& [metrics, tokens] : layer.last) {
        if (!has(metrics)) continue;
        const double weight = known ? static_cast<double>(tokens) : 1;
        sum += *(metrics.*field.value) * weight;
        weights += weight;
      }
      if (!(weights > 0)) continue;
      const double mean = sum / weights;
      if (layers.count == 0 || mean < layers.min) lowest = number;
      if (layers.count == 0 || mean > layers.max) highest = number;
      layers.add(mean);
      means.push_back(mean);
    }
    if (layers.count == 0) continue;
    Percentiles percentiles(means);
    nlohmann::json over_layers = nlohmann::json::array();
    for (const double share : {0.05, 0.25, 0.5, 0.75, 0.95})
      over_layers.push_back(rounded(percentiles.next(share)));
    rows.push_back({{"name", field.name},
                    {"unit", field.unit},
                    {"formula", field.formula},
                    {"mean", rounded(layers.sum / static_cast<double>(layers.count))},
                    {"low", rounded(layers.min)},
                    {"low_layer", lowest},
                    {"over_layers", over_layers},
                    {"high", rounded(layers.max)},
                    {"high_layer", highest}});
  }
  return rows;
}

json ReportRun::json() const {
  const std::size_t columns = static_cast<std::size_t>((last_ - *first_) / width_) + 1;
  nlohmann::json out = {
      {"name", name_},          {"first", *first_},    {"last", last_},     {"width", width_},
      {"columns", columns},     {"records", records_}, {"faults", faults_}, {"fault_count", fault_count_},
      {"alerts", alerts_json()}};
  out["alert_names"] = alerts_.size();
  out["notices"] = notices_json();
  out["shift"] = shift_ ? nlohmann::json(*shift_) : nlohmann::json(nullptr);
  out["config"] =
      header_.config_json.empty() ? nlohmann::json(nullptr) : nlohmann::json::parse(header_.config_json);
  out["sections"] = sections_;
  if (targets_) out["targets"] = targets_->shares();
  const Figures figures = figures_.figures();
  for (const auto& [name, value] : fields_of(figures)) {
    out["figures"][name] = value ? nlohmann::json(*value) : nlohmann::json(nullptr);
  }
  out["floor"] = name_of(figures.floor);
  out["now"] = now_json();
  out["responses"] = responses_json();
  out["metrics"] = table_json();
  out["advice"] = advice_.sentences(out["now"], figures.dead_experts.value_or(0));
  out["validation"] = nlohmann::json::array();
  for (const auto& [step, loss] : validation_) out["validation"].push_back({step, rounded(loss)});
  out["series"] = nlohmann::json::object();
  for (const auto& [name, row] : series_) out["series"][name] = lines_of(row);
  out["actuators"] = nlohmann::json::object();
  for (const auto& [name, track] : tracks_) {
    nlohmann::json marks = nlohmann::json::array();
    for (std::size_t c = 0; c < track.reasons.size(); ++c) {
      if (!track.reasons[c].empty()) marks.push_back({c, track.reasons[c]});
    }
    out["actuators"][name] = {{"value", lines_of(track.value)}, {"marks", marks}};
  }
  std::size_t cells = 0, curves = 0;
  double widest = 1e-12;
  for (const auto& [number, layer] : layers_) {
    cells += layer.load.size() + layer.bias.size();
    curves += layer.loss.size();
    for (const Row& row : layer.bias) {
      for (const Extremes& e : row) {
        if (e.count) widest = std::max({widest, std::abs(double{e.min}), std::abs(double{e.max})});
      }
    }
  }
  const std::size_t for_maps = map_columns(cells);
  const std::size_t loss_columns =
      std::clamp<std::size_t>(kLossPoints / std::max<std::size_t>(curves, 1), 12, kColumns);
  out["layers"] = nlohmann::json::array();
  for (const auto& [number, layer] : layers_) {
    nlohmann::json vio = nlohmann::json::array();
    for (const Extremes& e : layer.max_vio) vio.push_back(e.count ? rounded(e.max) : nlohmann::json(nullptr));
    nlohmann::json one = {{"layer", number}, {"max_vio", vio}};
    if (!layer.load.empty()) one["load"] = expert_map(layer.load, for_maps, 3, true);
    if (!layer.bias.empty()) one["bias"] = expert_map(layer.bias, for_maps, widest, false);
    if (!layer.health.empty()) one["health"] = layer.health;
    if (!layer.domains.empty()) one["domains"] = layer.domains;
    if (layer.pairs) {
      one["pairs"] = nlohmann::json::array();
      std::vector<ExpertPair> pairs;
      paired_experts(*layer.pairs, kPairs, pairs);
      for (const ExpertPair& pair : pairs)
        one["pairs"].push_back({pair.first, pair.second, pair.tokens, rounded(pair.lift)});
    }
    if (!layer.loss.empty()) one["loss"] = loss_lines(layer, loss_columns);
    out["layers"].push_back(one);
  }
  for (int h = 0; h < kHealthCount; ++h) out["health_names"].push_back(name_of(static_cast<Health>(h)));
  return out;
}

}  // namespace moectl::cli
