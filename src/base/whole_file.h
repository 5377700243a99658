// An input that is held as a whole.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ios>
#include <istream>
#include <optional>
#include <string>
#include <string_view>

namespace moectl {

/// Bytes between the place in an input and its end; 0 where that is not known, as of a pipe.
inline std::size_t bytes_left(std::istream& in) {
  const std::istream::pos_type at = in.tellg();
  std::streamoff left = 0;
  if (at != std::istream::pos_type(-1) && in.seekg(0, std::ios::end)) left = in.tellg() - at;
  in.clear();
  if (at != std::istream::pos_type(-1)) in.seekg(at);
  return static_cast<std::size_t>(std::max<std::streamoff>(left, 0));
}

/// All of it, or nothing where it is longer than `most` bytes: memory for a file that is too long is not taken.
inline std::optional<std::string> read_up_to(std::istream& in, std::size_t most) {
  std::string text;
  char part[65536];
  for (bool asked = false; in.read(part, sizeof part), in.gcount() > 0; asked = true) {
    text.append(part, static_cast<std::size_t>(in.gcount()));
    // Not before something was read: a directory, which cannot be, may claim any length.
    if (text.size() > most || (!asked && bytes_left(in) > most - text.size())) return std::nullopt;
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

/// At least as many as the values of a JSON text: each ends with a comma or a bracket, and takes several times its text.
inline std::int64_t values_in(std::string_view json) {
  return std::ranges::count_if(json, [](char c) { return c == ',' || c == ']' || c == '}'; });
}

}  // namespace moectl
