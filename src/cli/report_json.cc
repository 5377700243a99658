// What the page is given of a run.
#include "cli/report_data.h"

#include "cli/tool.h"
#include "measure/percentiles.h"

#include <algorithm>
#include <cmath>

namespace moectl::cli {
namespace {

using nlohmann::json;

// Names of alerts that are drawn: one row each. The others are counted.
constexpr std::size_t kAlerts = 40;
constexpr std::size_t kAlertLayers = 8;  // named for each column
constexpr std::size_t kPairs = 12;       // shown of each layer
// Points of all experts' loss curves together, about five bytes each.
constexpr std::size_t kLossPoints = 200000;
// Cells of all expert maps of a run together: a byte each, and a third more as text.
constexpr std::size_t kCells = 900000;

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

}  // namespace

std::size_t map_columns(std::size_t rows) {
  return std::clamp<std::size_t>(kCells / std::max<std::size_t>(rows, 1), 20, 300);
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
    for (const auto& [c, layers] : alert.layers) {
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
  out["config"] = header_.config_json ? nlohmann::json::parse(*header_.config_json) : nlohmann::json(nullptr);
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
