// JSON into a buffer that keeps its memory.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/printable.h"

namespace moectl {

class JsonWriter {
 public:
  void raw(std::string_view text) { text_.append(text); }
  void raw(char c) { text_.push_back(c); }
  void value(std::int64_t v) {
    char digits[24];
    text_.append(digits, std::to_chars(digits, digits + sizeof digits, v).ptr);
  }
  /// The shortest form that reads back exactly; JSON has no word for what is not a number.
  void value(double v) {
    if (!std::isfinite(v)) return raw("null");
    char digits[32];
    text_.append(digits, std::to_chars(digits, digits + sizeof digits, v).ptr);
  }
  void value(std::string_view v) {
    raw('"');
    while (!v.empty()) {
      const std::size_t plain = std::min(v.find_first_of("\"\\"), v.size());
      append_printable(text_, v.substr(0, plain));
      v.remove_prefix(plain);
      if (v.empty()) break;
      raw('\\');
      raw(v.front());
      v.remove_prefix(1);
    }
    raw('"');
  }
  /// A key, after a comma unless it is the first of its object.
  void key(std::string_view name) {
    if (!text_.ends_with('{')) raw(',');
    value(name);
    raw(':');
  }
  template <typename T>
  void field(std::string_view name, T v) {
    key(name);
    value(v);
  }
  template <typename T, typename Map>
  void array(std::span<const T> values, Map map) {
    raw('[');
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (i) raw(',');
      value(map(values[i]));
    }
    raw(']');
  }
  template <typename T>
  void array(std::span<const T> values) {
    array(values, [](T v) { return v; });
  }
  std::string& text() { return text_; }

 private:
  std::string text_;
};

}  // namespace moectl
