// One line of a trace or a run log → what it says, strictly: what is accepted can be replayed, what is not names its
// line and field.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "log/json.h"
#include "moectl/run_log.h"

namespace moectl {

/// A line with the place it stands in, for messages.
struct LogLine {
  const std::string& file;
  std::int64_t number;
  JsonValue object;

  /// Throws a LogError that names the line, the field and the value.
  [[noreturn]] void reject(const std::string& field, JsonValue value, const std::string& constraint) const;
  [[noreturn]] void fail(const std::string& field, const std::string& value,
                         const std::string& constraint) const;
  /// `words` name the field and the value.
  [[noreturn]] void refuse(std::string_view words) const;
  /// `text`: the JSON of a field that is held as a whole.
  void require_values(const std::string& field, std::string_view text) const;
};

/// Throws LogError. With `any_version`, of another version what is named and formed as in this one is read.
LogHeader read_header(const LogLine& line, bool any_version = false);

/// A config in the middle of a run.
struct ChangedConfig {
  std::int64_t step = 0;  ///< The first step that it holds for.
  LogHeader header;       ///< What the first line would say with it.
};

/// Whether the line is a config in the middle of a run log.
bool is_config_change(const LogLine& line, const LogHeader& header);
/// Throws LogError.
ChangedConfig read_config_change(const LogLine& line);

/// What the rows of `counts` are in a whole file.
struct CountRows {
  double whole = 0;   ///< What each sums to: 1 for shares of the load, 100 for percent; 0: they are counts.
  std::string place;  ///< The line that decided.
};

/// What was assumed where a file does not say it, each kind at its first line.
class Assumptions {
 public:
  void say(const LogLine& line, const std::string& field, const std::string& what);
  const std::vector<std::string>& said() const { return said_; }
  std::optional<CountRows> rows;  ///< Known from the first row that is not all zeros.

 private:
  std::set<std::string> fields_;
  std::vector<std::string> said_;
};

/// The number of each layer's group in the first line; empty if all layers are equal.
using LayerGroups = std::map<int, std::size_t>;
LayerGroups groups_of(const LogHeader& header);

/// Throws LogError. `groups`: groups_of(header); `defaults`: for what neither the first line nor the record says.
LogRecord read_record(const LogLine& line, const LogHeader& header, const LayerGroups& groups,
                      const LogDefaults& defaults, Assumptions& assumptions);

}  // namespace moectl
