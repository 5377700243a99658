// adaptive_bias with its defaults, over experts, top-k, tokens and score spaces, held against its bounds run by run.
#pragma once

#include <cstdint>
#include <set>

#include "law_runs.h"

namespace moectl::bench {

struct Grid {
  Seeds seeds;
  std::set<std::int64_t> experts, tokens;  ///< What it is narrowed to; empty = all.
};

/// Prints each plant's medians, and each bound with the runs that missed it.
void grid(const Grid& which);

}  // namespace moectl::bench
