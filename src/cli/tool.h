// The command-line tool: one file a subcommand, each of which adds itself to the parser and leaves what to run.
#pragma once

#include <CLI/CLI.hpp>

#include <charconv>
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
#include "moectl/config.h"
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

/// Throws if an output is one of the inputs, by a link or as standard input too: it would be emptied before it is read. What is no
/// file, as `-`, a pipe or a device, passes. Before anything is opened for writing.
void keep_inputs(const std::string& option, const std::string& output,
                 const std::vector<std::string>& inputs);
/// The files that a config names.
std::vector<std::string> files_of(const ControllerConfig& config);
/// Says on standard error that MOECTL_HOLD holds everything: figures and records are those of a controller that does nothing.
void say_if_held();

/// What an option takes: a whole number from `least` to `most`; a number of at least 0; one above 0; one from `least` to `most`. NaN
/// and infinity are none of them.
CLI::Validator whole_number(std::int64_t least, std::int64_t most = std::numeric_limits<std::int64_t>::max());
CLI::Validator number_from_zero();
CLI::Validator positive_number();
CLI::Validator number_between(double least, double most);

/// The name of an input in messages.
inline std::string shown_path(const std::string& path) {
  return path == "-" ? "<stdin>" : path;
}

/// The same in a line of its own making: a line break in a name would make a second one.
inline std::string said_path(const std::string& path) {
  return printable(shown_path(path));
}

/// JSON as text, to print. The name of a file or an argument may hold bytes that are not UTF-8.
template <class Json>
std::string json_text(const Json& value, int indent = -1) {
  return value.dump(indent, ' ', false, Json::error_handler_t::replace);
}

/// The number with so many significant digits; one that has no such neighbour within a double's range stays as it is.
inline double rounded_to(double value, int digits) {
  const std::string text = moectl::brief(value, digits);
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

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
