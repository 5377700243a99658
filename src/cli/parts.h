// Records of parts of a step, for the commands that judge whole steps.
#pragma once

#include <iostream>

#include "log/parts.h"

namespace moectl::cli {

/// The records of whole steps; what was taken of their parts is said on standard error.
inline WholeRecords whole_records(LogReader& reader, bool keep_ranks = false) {
  return WholeRecords(reader, keep_ranks, [](std::string_view text) { std::cerr << text << '\n'; });
}

}  // namespace moectl::cli
