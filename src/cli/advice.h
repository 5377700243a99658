// What should be changed, from what a run log says: one sentence for each cause that was found.
#pragma once

#include <deque>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "moectl/metrics.h"
#include "moectl/run_log.h"

namespace moectl::cli {

/// Takes in the training records of one run, in order.
class Advice {
 public:
  /// The config from here on, with the section of each actuator that says what moves it (types as the reader checks them).
  void take_config(nlohmann::json config);
  void add(const LogRecord& record, const Metrics& metrics);
  /// `now`: as ReportRun::now_json() gives it. `dead`: dead experts at the end of the run.
  std::vector<std::string> sentences(const nlohmann::json& now, double dead) const;

 private:
  struct Actuator {
    std::int64_t decisions = 0;                   // records that are not between two decisions
    std::map<std::string, std::int64_t> reasons;  // of those
    std::deque<bool> clipped;                     // by its range, of the last of those
    double first = 0, applied = 0;                // the first and the last largest value
  };
  // Of the metric of a set-point; excess_cv signed, in squares.
  struct SetPoint {
    std::deque<std::pair<double, double>> last;  // records: the value and its weight, the tokens
    double sum = 0, weights = 0, mean = 0;       // of those
    std::optional<double> highest;               // that the mean was
  };
  std::string policy_of(const std::string& actuator) const;
  void say_dead(double dead, std::vector<std::string>& says) const;
  void say_actuator(const std::string& name, const Actuator& actuator, bool imbalanced,
                    std::vector<std::string>& says) const;
  std::optional<std::string> out_of_reach(const std::string& name, const Actuator& actuator) const;

  nlohmann::json config_ = nlohmann::json::object();
  std::map<std::string, Actuator> actuators_;
  std::map<std::string, SetPoint> set_points_;
};

}  // namespace moectl::cli
