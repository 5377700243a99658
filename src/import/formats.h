// The formats, and what tells them apart.
#pragma once

#include <string_view>
#include <vector>

#include "import/steps.h"

namespace moectl {

struct Format {
  ImportFormat shown;
  OpenReader open;
  bool micro_batches = false;  ///< Tells the micro-batches, or forward passes, of a step.
  bool loads = false;          ///< Numbers by expert, whose kind shows when all rows were read.
  /// Layers without experts hold expert 0; with k = 1 the whole dump has to show that they hold no other.
  bool zeros_for_dense = false;
};
const std::vector<Format>& formats();

/// The format that a file looks like, by its first bytes: also "moectl" or "torch"; empty if none.
std::string_view resembles(Bytes& file);

}  // namespace moectl
