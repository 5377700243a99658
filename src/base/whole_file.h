// An input that is held as a whole.
#pragma once

#include <algorithm>
#include <cstddef>
#include <istream>
#include <string>

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

}  // namespace moectl
