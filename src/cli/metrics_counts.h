// Which records `moectl metrics` can measure.
#pragma once

#include <cstdint>
#include <string>

#include "cli/tool.h"

namespace moectl::cli {

/// Tells the records with counts from the others, and says why a trace has none that could be measured.
class Counted {
 public:
  explicit Counted(const std::string& trace) : file_(shown_path(trace)) {}
  /// Not the records of whole-model actuators, nor those of a log without arrays.
  bool has_counts(const LogRecord& record) {
    if (record.layer < 0) return false;
    const bool has = record.stats.experts() > 0;
    any_ = any_ || has;
    if (!has && first_without_ == 0) first_without_ = record.line;
    return has;
  }
  bool any() const { return any_; }
  [[noreturn]] void fail(const std::string& why) const {
    if (any_ || first_without_ == 0) throw InputError(file_ + ": " + why);
    throw InputError(
        file_ + ':' + std::to_string(first_without_) +
        ": counts: missing: required: this log was written with per_expert off, or the step was invalid");
  }

 private:
  std::string file_;
  bool any_ = false;
  std::int64_t first_without_ = 0;  // line
};

}  // namespace moectl::cli
