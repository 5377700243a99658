// What the report page shows of a run, gathered from its log in one pass.
#include "cli/report_data.h"

#include "base/format.h"
#include "cli/parts.h"
#include "cli/tool.h"
#include "export/step_sample.h"
#include "log/reshape.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <set>

namespace moectl::cli {
namespace {

using nlohmann::json;

const char* const kFixed = "fixed";  // the policy that moves nothing

void put(Row& row, std::size_t column, double value) {
  if (!std::isfinite(value)) return;
  if (row.size() <= column) row.resize(column + 1);
  row[column].add(value);
}

void merge(Extremes& into, const Extremes& more) {
  into.merge(more);
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
  // Each once, in the order of the records: a late record does not bring an old one back.
  std::set<std::shared_ptr<const std::string>> taken = {nullptr};
  const auto take = [&](const std::shared_ptr<const std::string>& config) {
    if (taken.insert(config).second) take_config(nlohmann::json::parse(*config));
  };
  take(header_.config_json);
  targets_ = header_.targets;
  WholeRecords records = whole_records(reader);
  while (const auto record = records.next()) {
    take(record->config_json);
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
  for_each_row([](Row& row) { halve_row(row, merge); });
  for (auto& [name, track] : tracks_) {
    halve_row(track.reasons, [](auto& a, const auto& b) {
      for (const auto& [reason, count] : b) a[reason] += count;
    });
  }
  for (auto& [name, alert] : alerts_) {
    std::map<std::size_t, std::set<int>> halved;
    for (auto& [column, layers] : alert.layers) halved[column / 2].merge(layers);
    alert.layers = std::move(halved);
  }
  for (auto& [number, layer] : layers_) {
    halve_row(layer.health, [](Health& a, Health b) { a = std::max(a, b); });
  }
}

// What the page will not show of the experts need not be kept: with hundreds in each of many layers it would be most of the
// memory. A few times the columns of its maps are enough to choose from, the fewer the more experts there are.
void ReportRun::grow(std::vector<Row>& rows, std::size_t size) {
  if (size <= rows.size()) return;
  expert_rows_ += size - rows.size();
  if (expert_rows_ > kMostRows)
    throw InputError(shown_path(name_) + ": loads, biases and losses of more than " +
                     std::to_string(kMostRows) +
                     " experts, over all layers: a page must have at most that many");
  rows.resize(size);
  const std::size_t choice = expert_rows_ > kManyRows ? 1 : 4;
  while (kColumns / (2 * expert_each_) >= choice * map_columns(expert_rows_)) {
    expert_each_ *= 2;
    for (auto& [number, layer] : layers_) {
      for (auto* all : {&layer.load, &layer.bias, &layer.loss}) {
        for (Row& row : *all) halve_row(row, merge);
      }
    }
  }
}

void ReportRun::add_alert(const std::string& name, const LogRecord& record, std::size_t column) {
  const auto [it, is_new] = alerts_.try_emplace(name);
  Alert& alert = it->second;
  if (is_new) alert.first = record.step;
  if (is_new || record.step != alert.last) ++alert.steps;
  alert.last = record.step;
  alert.layers[column].insert(record.layer);
}

/// Each key that changed, as a notice.
void ReportRun::tell_config_changes(const std::vector<ConfigChange>& changes) {
  using nlohmann::json;
  json before = json::parse(header_.config_json ? *header_.config_json : "{}");
  for (const ConfigChange& change : changes) {
    const json now = json::parse(*change.config_json);
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
  const RoutingStats& stats = record.stats;
  add_pairs(layer.pairs, stats);
  const auto n = static_cast<std::size_t>(stats.experts());
  const bool has_load = n > 0 && stats.assignments() > 0, has_loss = stats.shape().needs.losses;
  const auto biases = record.actuators.find("expert_bias");
  if (has_load) grow(layer.load, n);
  if (biases != record.actuators.end()) grow(layer.bias, biases->second.applied.size());
  if (has_loss) grow(layer.loss, n);
  const std::size_t coarse = column / expert_each_;
  if (has_load) {
    relative_loads(stats.counts(), record.targets.get(), loads_);
    for (std::size_t i = 0; i < n; ++i) put(layer.load[i], coarse, loads_[i]);
  }
  if (biases != record.actuators.end()) {
    const std::vector<double>& bias = biases->second.applied;
    for (std::size_t i = 0; i < bias.size(); ++i) put(layer.bias[i], coarse, bias[i]);
  }
  if (has_loss) {
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

}  // namespace moectl::cli
