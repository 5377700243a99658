// What `moectl watch` shows of a step: one line, or a block of lines that is drawn over the one before.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "export/step_sample.h"
#include "moectl/run_log.h"

namespace moectl::cli {

/// What is known of the step that is being read.
struct WatchedStep {
  explicit WatchedStep(std::int64_t step) : mean(step), number(step) {}
  /// One actuator over all layers.
  struct Track {
    double min = 0, max = 0;
    bool any = false;
    std::map<std::string, int> reasons;
  };
  void add(const LogRecord& record, const Metrics& metrics);

  LayerMean mean;
  std::int64_t number;
  std::map<int, LogRecord> layers;
  std::map<int, Metrics> metrics;
  std::map<std::string, Track> tracks;
  std::vector<std::string> notices;  ///< "layer 3: what was found"
};

std::string plain_line(const WatchedStep& step);

/// The lines of a view of at most `rows` lines of `columns` characters: the whole model, each layer's load by
/// expert, the last decisions, the newest notice (or none).
std::vector<std::string> view_of(const WatchedStep& step, const std::string& title, const std::string& notice,
                                 std::int64_t faults, std::size_t rows, std::size_t columns);

/// The terminal at standard output. A view is drawn where the one before stood, below what was printed earlier.
class Screen {
 public:
  struct Size {
    std::size_t rows, columns;
  };
  static Size size();
  /// Draws, or leaves the view for draw_pending() if the last one was drawn less than 50 ms ago.
  void show(std::vector<std::string> lines);
  void draw_pending();

 private:
  std::vector<std::string> pending_;
  std::size_t drawn_lines_ = 0;
  std::chrono::steady_clock::time_point drawn_{};
};

}  // namespace moectl::cli
