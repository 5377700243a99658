// The fields of one line of a log, by name and type; what is wrong is a LogError that names file, line, field and constraint.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "log/log_record.h"

namespace moectl {

// Above 2^53 a reader of JSON that uses doubles no longer gives the integer that was written.
inline constexpr std::int64_t kLargestInteger = std::int64_t{1} << 53;
// A fixed-point sum holds up to 2^39; beyond it the file holds nothing that this library wrote.
inline constexpr double kLargestSum = 5.4e11;

/// Reads fields by name and type.
class LineReader : public LogLine {
 public:
  explicit LineReader(const LogLine& line) : LogLine(line) {}

  std::optional<JsonValue> find(std::string_view field) const { return object.find(field); }
  JsonValue need(const char* field) const {
    const auto value = find(field);
    if (!value) fail(field, "missing", "required");
    return *value;
  }

  /// Also one that is written with a fraction of 0, as programs do that count in floating point.
  std::int64_t integer(const std::string& field, JsonValue value, std::int64_t least = 0,
                       std::int64_t most = kLargestInteger) const {
    const double real = value.is_number() ? value.as_double() : 0.5;
    if (real != std::floor(real)) reject(field, value, "must be a whole number");
    const std::int64_t whole = value.is_integer() && !value.is_large()
                                   ? value.as_integer()
                                   : static_cast<std::int64_t>(std::clamp(real, -0x1p62, 0x1p62));
    if (whole > most) {
      reject(field, value,
             most == kLargestInteger ? "must be at most 2^53" : "must be at most " + std::to_string(most));
    }
    if (whole < least) reject(field, value, "must be at least " + std::to_string(least));
    return whole;
  }
  double real(const std::string& field, JsonValue value) const {
    if (!value.is_number()) reject(field, value, "must be a number");
    return value.as_double();
  }
  std::string text(const std::string& field, JsonValue value) const {
    if (!value.is_string() || value.text().empty()) reject(field, value, "must be a word in quotes");
    return std::string(value.text());
  }
  /// Checks that the value is an array of one element an expert.
  void check_array(const std::string& field, JsonValue value, std::size_t experts) const {
    if (!value.is_array()) reject(field, value, "must be an array");
    if (value.size() != experts) {
      fail(field, std::to_string(value.size()) + " values",
           "must have " + std::to_string(experts) + ", one for each expert");
    }
  }
  void integers(const std::string& field, JsonValue value, std::span<std::int64_t> out) const {
    check_array(field, value, out.size());
    std::size_t i = 0;
    for (const JsonValue element : value.elements()) {
      // Names of elements cost more than the elements: only those at fault get one.
      const std::int64_t read = element.is_integer() && !element.is_large() ? element.as_integer() : -1;
      out[i] = read >= 0 && read <= kLargestInteger ? read : integer(at(field, i), element);
      ++i;
    }
  }
  /// Sums in fixed point.
  std::int64_t fixed(const std::string& field, JsonValue value) const {
    const double sum = real(field, value);
    if (!(sum >= 0)) reject(field, value, "must be at least 0");
    if (!(sum <= kLargestSum)) reject(field, value, "must be at most 5.4e11");
    return std::llrint(sum / kFixedUnit);
  }
  void fixed(const std::string& field, JsonValue value, std::span<std::int64_t> out) const {
    check_array(field, value, out.size());
    std::size_t i = 0;
    for (const JsonValue element : value.elements()) {
      const double sum = element.is_number() ? element.as_double() : -1;
      out[i] = sum >= 0 && sum <= kLargestSum ? std::llrint(sum / kFixedUnit) : fixed(at(field, i), element);
      ++i;
    }
  }
  /// All of a group of fields, or none.
  bool has_all(std::initializer_list<const char*> fields) const {
    const char* present = nullptr;
    for (const char* field : fields) present = find(field) ? field : present;
    if (!present) return false;
    for (const char* field : fields) {
      if (!find(field)) fail(field, "missing", std::string("required with ") + present);
    }
    return true;
  }

  static std::string at(const std::string& field, std::size_t i) {
    return field + '[' + std::to_string(i) + ']';
  }
};

/// The domains of a record, by name.
using Domains = std::vector<std::pair<std::string_view, JsonValue>>;
Domains domains_of(JsonValue object);

/// The sums of a record, from its `counts`, or from its `load` where it has nothing else (`only_load`).
RoutingStats read_stats(const LineReader& line, const LogGroup& header,
                        std::optional<std::int64_t> given_tokens, JsonValue counts, bool only_load,
                        const LogDefaults& defaults, Assumptions& assumptions);

}  // namespace moectl
