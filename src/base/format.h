// Numbers as text.
#pragma once

#include <charconv>
#include <string>

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

}  // namespace moectl
