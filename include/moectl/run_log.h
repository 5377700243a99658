// Traces (what a router did) and run logs (that, and what the controller did about it): JSON lines, plain or
// gzip.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/stats.h"

namespace moectl {

/// Input that is not a trace or a run log. `what()` reads "file:line: field: value: constraint".
class LogError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What an actuator's entry in a run log says.
struct LoggedActuator {
  std::vector<double> proposed, applied;  ///< Empty if not logged; NaN where a proposal was not a number.
  std::optional<double> min, max;         ///< Of `applied`; all that a log without per-expert arrays has.
  std::vector<std::string> reasons;
};

/// One line of a trace or a run log.
struct LogRecord {
  std::int64_t line = 0;
  std::int64_t step = 0;
  int layer = -1;  ///< -1 for the record of `scope: model` actuators.
  std::string tag = "train";
  RoutingStats
      stats;  ///< Its needs are those of the fields present; without experts where a run log has no counts.
  std::vector<std::string> domains;  ///< Names of the stats' domains, sorted.
  std::optional<double> loss;
  std::map<std::string, std::int64_t> next_mixture;
  std::shared_ptr<const LoadTargets> targets;  ///< Of the header; null: equal ones.
  // Run logs only.
  std::int64_t tokens = 0;
  std::map<std::string, double> metrics;  ///< Those that were present.
  std::string health;
  std::vector<std::string> alerts;
  std::map<std::string, LoggedActuator> actuators;
};

/// The first line of a file, as far as it is given.
struct LogHeader {
  bool is_run = false;
  std::optional<int> layers, experts, top_k;
  std::optional<std::int64_t> shift;             ///< The step at which the host says the data changed.
  std::string config_json;                       ///< Run logs: the config object, else empty.
  std::shared_ptr<const LoadTargets> targets{};  ///< Run logs with unequal targets: of the config, else null.
  std::int64_t piece = 0;  ///< The piece being read of a log that is rotated, from 1; else 0.
};

/// Damage is what happens to a file: a torn or unreadable line, records missing between others, a second
/// run joined on, another version. A wrong record is whole and cannot be true: counts that sum above
/// tokens · top_k, say.
enum class Reading {
  kStrict,   ///< The first fault is a LogError.
  kRepair,   ///< Damage is passed over and told in faults(); a wrong record is a LogError.
  kSalvage,  ///< Wrong records are passed over as well.
};

/// Name of a finished piece of the rotated log at `path`: "run.jsonl.000003".
std::string piece_path(const std::string& path, std::int64_t piece);

/// Reads one record after another. `-` is standard input; gzip is recognised by its content. Of a rotated log
/// the pieces that are still there are read first, oldest first, as one log.
///
/// A second header in a file means that two runs were joined. If both say the same the second is read on (a
/// run that was resumed: its repeated steps are passed over), otherwise what follows is another run and is
/// passed over.
class LogReader {
 public:
  /// Throws LogError if the file cannot be opened or its header is wrong.
  /// With `follow`, next() waits at the end of a file for what will be appended to it, and calls `follow`
  /// before each wait: false means that nothing more will be written, and ends the file. Standard input ends
  /// when its writer does. A new run under the same name is followed in its turn.
  explicit LogReader(const std::string& path, Reading reading = Reading::kStrict,
                     std::function<bool()> follow = {});
  ~LogReader();
  const LogHeader& header() const;
  /// The next record, or nothing at the end. Throws LogError with the line on anything that is not a record:
  /// counts that sum above tokens · top_k, a repeated (step, layer, tag), a negative or non-integer count.
  std::optional<LogRecord> next();
  /// What was passed over or is missing so far: the first 20 messages, each whole ("passed over: run.jsonl:7:
  /// line: not JSON"), and how many there were in all.
  const std::vector<std::string>& faults() const;
  std::int64_t fault_count() const;

 private:
  struct File;
  std::unique_ptr<File> file_;
};

/// Writes a run log: pass `[&](const StepReport& r) { writer.write(r); }` to Controller::set_log. Does not
/// allocate in the steady state. A file that cannot be written is reported once on standard error and never
/// stops training.
///
/// With `log.rotate_mb` a step that would not fit begins a new piece: the full one becomes piece_path(path, n),
/// n = 1, 2, …, and `path` starts again with a header that carries the next number. Sizes are those before
/// compression, so that the same run is cut at the same steps wherever it is written. At any moment `path` is a
/// log with a header.
class RunLogWriter {
 public:
  /// `-` is standard output; a name that ends in `.gz` is compressed. With `append`, a log that exists is
  /// continued: what it holds from the first step written on (the run was resumed from before its end) and a
  /// torn last line are cut off, and no second header is written. `shift`: the step at which the data will
  /// change, if the host knows.
  RunLogWriter(const std::string& path, const ControllerConfig& config, bool append = false,
               std::optional<std::int64_t> shift = std::nullopt);
  ~RunLogWriter();
  void write(const StepReport& report, std::string_view tag = "train");
  void flush();
  /// False once something could not be written; nothing is written from then on.
  bool ok() const;

 private:
  struct File;
  std::unique_ptr<File> file_;
};

}  // namespace moectl
