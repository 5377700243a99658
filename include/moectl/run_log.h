// Traces (the routing of each step) and run logs (routing, and the controller's actions): JSON lines, plain or gzip.
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

/// Input that is not a trace or a run log. `what()` reads "file:line: field: value: constraint", one line that a
/// terminal can show.
class LogError : public std::runtime_error {
 public:
  explicit LogError(const std::string& what);
};

/// An actuator's entry in a run log.
struct LoggedActuator {
  std::vector<double> proposed, applied;  ///< Empty if not logged; NaN where a proposal was not a number.
  std::vector<double> deployed;  ///< Of biases, without what serves the next batch alone; empty = as applied.
  std::optional<double> min, max;  ///< Of `applied`; the only values in a log without per-expert arrays.
  std::vector<std::string> reasons;
  Responsiveness responsiveness;  ///< Of a temperature; not applicable if there is none.
};

/// A notice of a run log.
struct LoggedNotice {
  std::string kind, text;
  std::int64_t step = 0;  ///< When it was found: the record's step, or one before it that was not logged.
};

/// One line of a trace or a run log.
struct LogRecord {
  std::int64_t line = 0;
  std::int64_t step = 0;
  int layer = -1;  ///< -1 for the record of `scope: model` actuators.
  std::string tag = "train";
  /// The needs follow from the fields that are present. Zero experts if a run log has no counts.
  RoutingStats stats;
  std::vector<std::string> domains;  ///< Names of the stats' domains, sorted.
  std::optional<double> loss;
  std::map<std::string, std::int64_t> next_mixture;
  std::shared_ptr<const LoadTargets> targets;      ///< Of the config in force; null = equal.
  std::shared_ptr<const std::string> config_json;  ///< Of the config in force; null if there is none.
  // Run logs only.
  std::int64_t tokens = 0;
  std::map<std::string, double> metrics;  ///< The metrics that were present.
  std::string health;
  std::vector<std::string> alerts;
  std::vector<LoggedNotice> notices;
  Responsiveness responsiveness;  ///< Not applicable if the record has none.
  std::map<std::string, LoggedActuator> actuators;
};

/// Equal layers of a file whose layers differ.
struct LogGroup {
  std::vector<int> layers;  ///< Their ids.
  std::optional<int> experts, top_k;
  std::shared_ptr<const LoadTargets> targets{};  ///< Null = equal.
};

/// A config that took the place of the one before it in the middle of a run.
struct ConfigChange {
  std::int64_t step = 0;                           ///< The first step that it holds for.
  std::shared_ptr<const std::string> config_json;  ///< All of it.
};

/// The first line of a file.
struct LogHeader {
  bool is_run = false;
  std::optional<int> layers, experts, top_k;
  std::vector<LogGroup>
      groups{};  ///< Empty if all layers are equal; else experts, top_k and targets are theirs.
  std::optional<std::int64_t> shift;  ///< The step at which the data changed, if the training loop says so.
  std::shared_ptr<const std::string> config_json;  ///< The config object of a run log, else null.
  std::shared_ptr<const LoadTargets> targets{};    ///< Of a run log with unequal targets, else null.
  std::int64_t piece = 0;  ///< The piece of a rotated log that is being read, from 1; else 0.
};

/// What stands for what a trace does not say.
struct LogDefaults {
  std::optional<int> top_k;
  std::optional<std::int64_t> tokens;  ///< Of a step, where a trace has load shares instead of counts.
};

/// How a reader treats faults. Damage happens to a file: a torn or unreadable line, missing records, a second run
/// appended, another version. A wrong record is complete but cannot be true, such as counts that sum above tokens ·
/// top_k.
enum class FaultPolicy {
  kStrict,   ///< The first fault is a LogError.
  kRepair,   ///< Damage is skipped and listed in faults(); a wrong record is a LogError.
  kSalvage,  ///< Wrong records are also skipped and listed.
};

/// Name of a finished piece of the rotated log at `path`: "run.jsonl.000003".
std::string piece_path(const std::string& path, std::int64_t piece);

/// Reads one record after another. A config in the middle of a log (`{"step":…,"config":{…}}`) is no record: it
/// holds for the records from its step on, and is listed in config_changes(). `-` is standard input; gzip is recognised
/// by its content. The remaining pieces of a rotated log are read first, oldest first, as one log.
///
/// A second header in a file means that two runs were joined. If both headers are equal, the run was resumed: reading
/// goes on and repeated steps are skipped. Otherwise the second run is skipped.
class LogReader {
 public:
  /// Throws LogError if the file cannot be opened or its header is wrong. With `follow`, next() waits at the end of a
  /// file for further lines, and calls `follow` before each wait: false means that nothing more will be written, and
  /// ends the file. Standard input ends when its writer does. A new run under the same name is followed as well.
  explicit LogReader(const std::string& path, FaultPolicy fault_policy = FaultPolicy::kStrict,
                     std::function<bool()> follow = {});
  ~LogReader();
  const LogHeader& header() const;
  /// The next record, or nothing at the end. Throws LogError with the line on anything that is not a record:
  /// counts that sum above tokens · top_k, a repeated (step, layer, tag), a negative count or one that is not whole.
  std::optional<LogRecord> next();
  /// The changes of the config that were read so far.
  const std::vector<ConfigChange>& config_changes() const;
  /// Takes these where the file says nothing, and lists that among the assumptions.
  void set_defaults(const LogDefaults& defaults);
  /// What was assumed so far, each kind once: "assumed: t.jsonl:2: tokens: missing: the sum of counts / top_k".
  const std::vector<std::string>& assumptions() const;
  /// The faults so far: the first 20 complete messages ("skipped: run.jsonl:7: line: not JSON"), and the number of
  /// all faults.
  const std::vector<std::string>& faults() const;
  std::int64_t fault_count() const;

 private:
  struct File;
  std::unique_ptr<File> file_;
};

/// Writes a run log: pass `[&](const StepReport& r) { writer.write(r); }` to Controller::set_log. Does not allocate in
/// the steady state. A file that cannot be written is reported once on standard error and never stops training.
///
/// With `log.rotate_mb`, a step that would not fit starts a new piece: the full piece is renamed to piece_path(path,
/// n), n = 1, 2, …, and `path` starts again with a header that carries the next number. Sizes are measured before
/// compression, so the same run is cut at the same steps everywhere. At any moment, `path` is a log with a header.
class RunLogWriter {
 public:
  /// `-` is standard output; a name that ends in `.gz` is compressed. With `append`, an existing log is continued: a
  /// torn last line and all records from the first newly written step on are removed (the run was resumed from before
  /// its end), and no second header is written. `shift`: the step at which the data will change, if known.
  RunLogWriter(const std::string& path, const ControllerConfig& config, bool append = false,
               std::optional<std::int64_t> shift = std::nullopt);
  /// For other places than files: `out` receives whole lines, the header now and those of each step at once. What it
  /// throws passes through.
  RunLogWriter(std::function<void(std::string_view)> out, const ControllerConfig& config);
  ~RunLogWriter();
  void write(const StepReport& report, std::string_view tag = "train");
  void flush();
  /// False after a write failed; nothing is written after that.
  bool ok() const;

 private:
  struct File;
  std::unique_ptr<File> file_;
};

}  // namespace moectl
