#include "base/printable.h"

#include <cstdint>
#include <cstdio>

#include "base/input_limits.h"
#include "base/utf8.h"

namespace moectl {
namespace {

/// Of a character whose bytes are UTF-8.
std::uint32_t code_of(std::string_view bytes) {
  if (bytes.size() == 1) return static_cast<unsigned char>(bytes[0]);
  std::uint32_t code = static_cast<unsigned char>(bytes[0]) & (0xffU >> (bytes.size() + 1));
  for (const char c : bytes.substr(1)) code = code << 6 | (static_cast<unsigned char>(c) & 0x3f);
  return code;
}

/// Control characters (Cc of Unicode), marks of direction (Bidi_Control) and separators of lines.
bool steers(std::uint32_t code) {
  return code < 0x20 || (code >= 0x7f && code <= 0x9f) || code == 0x61c || code == 0x200e || code == 0x200f ||
         (code >= 0x2028 && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069);
}

}  // namespace

void append_printable(std::string& out, std::string_view text, bool keep_lines) {
  while (!text.empty()) {
    const std::size_t size = utf8_character(text);
    if (size == 0) {
      out += '?';
      text.remove_prefix(1);
      continue;
    }
    const std::uint32_t code = code_of(text.substr(0, size));
    if (!steers(code) || (keep_lines && (code == '\n' || code == '\t'))) {
      out.append(text.substr(0, size));
    } else {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", static_cast<unsigned>(code));
      out += escape;
    }
    text.remove_prefix(size);
  }
}

std::string printable(std::string_view text, bool keep_lines) {
  std::string out;
  out.reserve(text.size());
  append_printable(out, text, keep_lines);
  return out;
}

namespace {

std::string cut(std::string_view text, std::size_t most) {
  std::string out = printable(text.substr(0, most + 4));  // escapes are longer than what they stand for
  if (text.size() <= most && out.size() <= most) return out;
  std::size_t end = std::min(most, out.size());
  while (end > 0 && end < out.size() && (out[end] & 0xc0) == 0x80) --end;  // between characters
  return out.substr(0, end) + "...";
}

}  // namespace

std::string shown_briefly(std::string_view text) {
  return cut(text, kLongestShown);
}

std::string message_line(std::string_view text) {
  return cut(text, kLongestWord);
}

}  // namespace moectl
