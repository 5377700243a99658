// The command-line tool: one file a subcommand, each of which adds itself to the parser and leaves what to run.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/format.h"
#include "base/printable.h"
#include "moectl/policy.h"
#include "moectl/run_log.h"

namespace moectl::cli {

/// What every subcommand shares.
struct Tool {
  PolicyRegistry registry;   ///< The built-in policies, and those of plugins.
  std::function<int()> run;  ///< Set by the subcommand that was named; returns the exit code.
};

/// Input that is wrong in a way that only the tool can see. Exit code 1, like ConfigError and LogError.
class InputError : public std::runtime_error {
 public:
  explicit InputError(const std::string& what) : std::runtime_error(message_line(what)) {}
};

/// A line of a trace, for the help of commands that read one.
inline const std::string kTraceLine = R"({"step":0,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3]})";

void add_biases(CLI::App& app, Tool& tool);
void add_capacity(CLI::App& app, Tool& tool);
void add_check(CLI::App& app, Tool& tool);
void add_compare(CLI::App& app, Tool& tool);
void add_import(CLI::App& app, Tool& tool);
void add_metrics(CLI::App& app, Tool& tool);
void add_placement(CLI::App& app, Tool& tool);
void add_policies(CLI::App& app, Tool& tool);
void add_replay(CLI::App& app, Tool& tool);
void add_report(CLI::App& app, Tool& tool);
void add_simulate(CLI::App& app, Tool& tool);
void add_tensorboard(CLI::App& app, Tool& tool);
void add_watch(CLI::App& app, Tool& tool);

/// The trace or run log that a command reads.
void add_trace(CLI::App& command, std::string& path);
/// The choice of an output format, the first being the default.
CLI::Option* add_format(CLI::App& command, std::string& format, std::vector<std::string> formats);

/// What an option takes: a whole number from `least` to `most`; a number of at least 0; one above 0.
CLI::Validator whole_number(std::int64_t least, std::int64_t most = std::numeric_limits<std::int64_t>::max());
CLI::Validator number_from_zero();
CLI::Validator positive_number();

/// What a config says of a trace that does not say it.
LogDefaults defaults_of(const ModelConfig& model);
/// Says on standard error what a reader assumed, skipped or missed.
void say_faults(const LogReader& log, const std::string& path);
/// The option --salvage of a command that reads logs.
void add_salvage(CLI::App& command, FaultPolicy& fault_policy);

/// A table of text with aligned columns: the first to the left, the others to the right.
class Table {
 public:
  explicit Table(std::vector<std::string> header) { add(std::move(header)); }
  /// Text of others in a cell stays one cell of one line.
  void add(std::vector<std::string> row) {
    for (std::string& cell : row) cell = printable(cell);
    rows_.push_back(std::move(row));
  }
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

/// A number for people: counts in full, others to four significant digits; "-" if absent.
std::string brief(const std::optional<double>& value);

}  // namespace moectl::cli
