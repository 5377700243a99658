// What the report page shows of a run: everything downsampled to a bounded number of columns, extremes kept.
#pragma once

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "cli/advice.h"
#include "export/run_figures.h"
#include "moectl/health.h"
#include "moectl/run_log.h"

namespace moectl::cli {

/// How many columns the page shows of a run at most.
inline constexpr std::size_t kColumns = 600;

/// How many columns the page has room for, of maps with so many rows in all.
std::size_t map_columns(std::size_t rows);
/// Rows of one expert that a run may have, and those from which memory counts more than what the maps may choose from.
inline constexpr std::size_t kMostRows = std::size_t{1} << 20, kManyRows = 100'000;

/// Smallest, largest and mean of what fell into one column.
struct Extremes {
  float min = 0, max = 0;
  double sum = 0;
  std::int64_t count = 0;
  void add(double value) {
    constexpr double kMost = 1e30;  // inside a float, and more than anything that can be drawn
    const double v = std::clamp(value, -kMost, kMost);
    merge({static_cast<float>(v), static_cast<float>(v), v, 1});
  }
  void merge(const Extremes& other) {
    if (other.count == 0) return;
    min = count ? std::min(min, other.min) : other.min;
    max = count ? std::max(max, other.max) : other.max;
    sum += other.sum;
    count += other.count;
  }
};

/// A row of columns, each of `width` steps. When the row is full its columns are merged in pairs.
using Row = std::vector<Extremes>;

class ReportRun {
 public:
  /// Reads the whole file, skipping what cannot be read. Throws LogError if there is nothing to read.
  ReportRun(const std::string& path, std::optional<std::int64_t> shift);
  nlohmann::json json() const;
  const std::vector<std::string>& faults() const { return faults_; }
  std::int64_t fault_count() const { return fault_count_; }

 private:
  struct Layer {
    Row max_vio;
    std::deque<StepFigures> now;                         // the last steps, of this layer
    std::vector<Row> load, bias, loss;                   // [N]
    std::vector<Health> health;                          // worst in each column
    std::deque<std::pair<Metrics, std::int64_t>> last;   // of the last hundred steps, with their tokens
    std::map<std::string, std::vector<double>> domains;  // counts of the whole run, [N]
    std::optional<RoutingStats> pairs;                   // likewise
  };
  /// One actuator over all layers.
  struct Track {
    Row value;
    std::vector<std::map<std::string, std::int64_t>> reasons;  // how often, by column
  };

  /// Whether an actuator was answered.
  struct Answer {
    Responsiveness last;                    // that was known
    std::int64_t held = 0, first_held = 0;  // steps without an answer
  };

  /// When an alert stood, and in which layers.
  struct Alert {
    std::map<std::size_t, std::set<int>> layers;  // by column
    std::int64_t first = 0, last = 0, steps = 0;
  };

  /// How often a notice came.
  struct Told {
    std::string text;  // the first
    std::int64_t first = 0, count = 0;
  };

  void take_config(const nlohmann::json& config);
  void add(const LogRecord& record);
  void add_alert(const std::string& name, const LogRecord& record, std::size_t column);
  nlohmann::json table_json() const;
  void tell_config_changes(const std::vector<ConfigChange>& changes);
  nlohmann::json alerts_json() const;
  nlohmann::json now_json() const;
  nlohmann::json notices_json() const;
  nlohmann::json responses_json() const;
  void add_response(const LogRecord& record, const std::string& actuator, const Responsiveness& found);
  nlohmann::json loss_lines(const Layer& layer, std::size_t columns) const;
  std::size_t column_of(std::int64_t step);
  std::size_t expert_columns() const;
  void halve();
  void grow(std::vector<Row>& rows, std::size_t size);
  template <typename Visit>
  void for_each_row(Visit visit);
  nlohmann::json expert_map(const std::vector<Row>& rows, std::size_t columns, double scale,
                            bool log_ratio) const;

  std::string name_;
  LogHeader header_;
  std::optional<std::int64_t> shift_;
  RecordMetrics metrics_{true};
  std::vector<double> loads_;  // scratch space
  RunFigures figures_{std::nullopt};
  Advice advice_;
  std::int64_t records_ = 0;
  std::optional<std::int64_t> first_;
  std::int64_t last_ = 0, width_ = 1;
  std::size_t expert_rows_ = 0;  // over all layers, of loads, biases and losses
  std::size_t expert_each_ = 1;  // columns that a row of one expert keeps as one
  std::map<int, Layer> layers_;
  std::map<std::pair<int, std::string>, Answer> answers_;  // by layer (-1: the whole model) and actuator
  std::map<std::string, Track> tracks_;
  std::map<std::string, Row> series_;
  std::map<std::int64_t, double> validation_;
  std::map<std::string, Alert> alerts_;
  // By kind, layer and text; but invalid data name another value each time.
  std::map<std::tuple<std::string, int, std::string>, Told> notices_;
  nlohmann::json sections_;                     // of the configs' actuators; null without a config
  std::shared_ptr<const LoadTargets> targets_;  // of all layers, in force at the end
  std::vector<std::string> faults_;
  std::int64_t fault_count_ = 0;
};

}  // namespace moectl::cli
