// A line of JSON, parsed by simdjson, and its values.
#pragma once

#include <simdjson.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace moectl {

/// A value of the line that was parsed last.
class JsonValue {
 public:
  using Type = simdjson::dom::element_type;

  JsonValue() = default;
  JsonValue(simdjson::dom::element element)
      : element_(element), type_(element.type()) {}  // NOLINT: a value of simdjson is one

  bool is_null() const { return type_ == Type::NULL_VALUE; }
  bool is_string() const { return type_ == Type::STRING; }
  bool is_array() const { return type_ == Type::ARRAY; }
  bool is_object() const { return type_ == Type::OBJECT; }
  /// Written without a fraction or an exponent, and within 64 bits.
  bool is_integer() const { return type_ == Type::INT64 || is_large(); }
  /// A whole number from 2^63 on.
  bool is_large() const { return type_ == Type::UINT64; }
  bool is_number() const { return is_integer() || type_ == Type::DOUBLE; }

  std::int64_t as_integer() const { return element_.get_int64().value_unsafe(); }
  double as_double() const { return element_.get_double().value_unsafe(); }
  std::string_view text() const { return element_.get_string().value_unsafe(); }

  /// Of an array or an object.
  std::size_t size() const { return is_array() ? elements().size() : members().size(); }
  simdjson::dom::array elements() const { return element_.get_array().value_unsafe(); }
  simdjson::dom::object members() const { return element_.get_object().value_unsafe(); }
  std::optional<JsonValue> find(std::string_view key) const {
    if (!is_object()) return std::nullopt;
    for (const auto member : members()) {
      if (member.key == key) return member.value;
    }
    return std::nullopt;
  }
  std::string dump() const { return simdjson::minify(element_); }

 private:
  simdjson::dom::element element_;
  Type type_ = Type::NULL_VALUE;
};

/// A line that is not JSON, with the reason.
class JsonError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Parses one line after another into memory that the next one uses again.
class JsonParser {
 public:
  JsonParser();
  /// Throws JsonError. kPadding bytes after the text must be readable.
  void parse(std::string_view text);
  static constexpr std::size_t kPadding = simdjson::SIMDJSON_PADDING;
  const JsonValue& value() const { return value_; }

 private:
  void refuse_repeated_keys(JsonValue value);
  void refuse_repeated_keys(simdjson::dom::object object);

  simdjson::dom::parser parser_;
  std::string widened_;
  std::vector<std::string_view> keys_;
  JsonValue value_;
};

}  // namespace moectl
