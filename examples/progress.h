// A progress bar with a live line on a terminal; a plain line now and then elsewhere.
#pragma once

#include <cstdint>
#include <string>

class Progress {
 public:
  Progress(std::string name, std::int64_t steps);
  ~Progress();
  /// Shows the state after `step` (1…steps). `line` is what follows the bar.
  void show(std::int64_t step, const std::string& line);
  /// Prints a line above the bar.
  void note(const std::string& line);

 private:
  std::string name_;
  std::int64_t steps_;
  bool terminal_;
  bool bar_shown_ = false;
};
