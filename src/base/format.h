// Numbers as text.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>

namespace moectl {

/// The shortest text that reads back exactly.
inline std::string exact(double value) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

/// For people: rounded to so many significant digits.
inline std::string brief(double value, int digits = 4) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, value, std::chars_format::general, digits).ptr};
}

/// For tables and pictures: with so many decimal places.
inline std::string fixed(double value, int places) {
  char text[512];  // the largest double has 309 digits before its point
  return {text, std::to_chars(text, text + sizeof text, value, std::chars_format::fixed, places).ptr};
}

/// The same without allocation.
class Number {
 public:
  /// For notices: with two places.
  explicit Number(double value) {
    end_ =
        std::to_chars(text_, text_ + sizeof text_, std::clamp(value, -1e6, 1e6), std::chars_format::fixed, 2)
            .ptr;
  }
  explicit Number(std::int64_t value) { end_ = std::to_chars(text_, text_ + sizeof text_, value).ptr; }
  Number(double value, int digits) {
    end_ = std::to_chars(text_, text_ + sizeof text_, value, std::chars_format::general, digits).ptr;
  }
  Number(const Number&) = delete;
  Number& operator=(const Number&) = delete;
  std::string_view text() const { return {text_, end_}; }

 private:
  char text_[32];
  const char* end_;
};

}  // namespace moectl
