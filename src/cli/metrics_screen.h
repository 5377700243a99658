// What `moectl metrics` shows on a terminal: one screen that says whether a trace is balanced.
#pragma once

#include <functional>
#include <string>

#include "cli/metrics_counts.h"
#include "moectl/metrics.h"

namespace moectl::cli {

/// Rows of the screen, of 80 columns, and rows whose experts are named: with what stands around them, 36 lines.
inline constexpr std::size_t kScreenRows = 16, kScreenNames = 4;

struct ScreenOptions {
  bool sum = false;  ///< The counts of all steps as one window, instead of the mean over steps.
  std::string
      by;  ///< tag, domain or rank: a row for each; empty = tag train alone, or all records if it has none.
  bool all = false;  ///< Every row; else the worst kScreenRows, and how to see the rest.
  bool json = false;
};

/// `options_of`: how a record is measured; it throws on a record that does not fit the config.
int print_screen(LogReader& reader, Counted& counted,
                 const std::function<MetricsOptions(const LogRecord&)>& options_of,
                 const ScreenOptions& options);

}  // namespace moectl::cli
