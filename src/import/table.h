// Lines of CSV.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/input_limits.h"
#include "import/bytes.h"
#include "import/import.h"

namespace moectl {

/// The fields of a line of `file` (RFC 4180: quotes may stand around a field and twice inside it), without blanks around
/// them.
inline void split(const Bytes& file, std::string_view line, char separator,
                  std::vector<std::string>& fields) {
  std::size_t n = 0;
  const auto field = [&]() -> std::string& {
    if (n == kMostColumns)
      throw ImportError(file.place() + ": must have at most " + std::to_string(kMostColumns) + " columns");
    if (n == fields.size()) fields.emplace_back();
    fields[n].clear();
    return fields[n++];
  };
  std::string* text = &field();
  bool quoted = false;
  for (std::size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (c == '"' && quoted && i + 1 < line.size() && line[i + 1] == '"') {
      text->push_back(line[++i]);
    } else if (c == '"') {
      quoted = !quoted;
    } else if (c == separator && !quoted) {
      text = &field();
    } else {
      text->push_back(c);
    }
  }
  fields.resize(n);
  for (std::string& f : fields) {
    f.erase(f.find_last_not_of(" \t") + 1);
    f.erase(0, f.find_first_not_of(" \t"));
  }
}

/// The fields of the next line that is not empty; false at the end.
inline bool next_row(Bytes& file, char separator, std::vector<std::string>& fields) {
  std::string_view line;
  do {
    if (!file.line(line)) return false;
  } while (line.empty());
  split(file, line, separator, fields);
  return true;
}

inline std::string join(const std::vector<std::string>& fields) {
  std::string text;
  for (const std::string& field : fields) text += (text.empty() ? "" : ",") + field;
  return text;
}

/// Where the column of that name stands, or nothing. Of two with one name nobody knows which is meant.
inline std::optional<std::size_t> column_of(const std::vector<std::string>& names, std::string_view name,
                                            const Bytes& file) {
  const auto at = std::ranges::find(names, name);
  if (at == names.end()) return std::nullopt;
  const auto other = std::find(at + 1, names.end(), name);
  if (other != names.end())
    throw ImportError(file.place() + ": columns " + std::to_string(at - names.begin() + 1) + " and " +
                      std::to_string(other - names.begin() + 1) + ": " + std::string(name) +
                      " stands twice: expected one of them");
  return static_cast<std::size_t>(at - names.begin());
}

/// The start of a file as a message shows it.
inline std::string start_of(std::string_view text) {
  if (text.empty()) return "nothing";
  text = text.substr(0, 60);
  const auto control = [](unsigned char c) { return c < 0x20 && c != '\t'; };
  if (std::any_of(text.begin(), text.end(), control)) return "bytes that are no text";
  return '"' + std::string(text) + '"';
}

/// A finite number, or nothing.
inline std::optional<double> number_of(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

}  // namespace moectl
