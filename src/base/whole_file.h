// An input that is held as a whole.
#pragma once

#include <algorithm>
#include <cstddef>
#include <istream>
#include <string>
#include <string_view>

namespace moectl {

/// All of it, or its first `most` + 1 bytes, so that a longer one is told from it.
inline std::string read_up_to(std::istream& in, std::size_t most) {
  std::string text;
  for (char part[65536]; text.size() <= most; text.append(part, static_cast<std::size_t>(in.gcount()))) {
    in.read(part, static_cast<std::streamsize>(std::min(sizeof part, most + 1 - text.size())));
    if (in.gcount() == 0) break;
  }
  return text;
}

/// Whether brackets outside of strings of a JSON text nest deeper than `levels`: to be asked before a parser that recurses
/// sees it.
inline bool nests_deeper(std::string_view json, std::size_t levels) {
  std::size_t depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < json.size(); ++i) {
    const char c = json[i];
    if (in_string) {
      i += c == '\\' ? 1 : 0;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > levels) return true;
    } else if ((c == ']' || c == '}') && depth > 0) {
      --depth;
    }
  }
  return false;
}

}  // namespace moectl
