// Loads as people log them: counts as floats, shares, percent, or multiples of the mean.
#pragma once

#include <span>
#include <string>

#include "import/steps.h"

namespace moectl {

/// Turns the values of one layer into counts. What they are is found in the first row with data and holds from then on.
class LoadValues {
 public:
  LoadValues(const Bytes& file, const ImportOptions& options, ImportNotes& notes);
  /// `values` [N], none negative. `place`: for messages.
  ImportedLayer counts(std::span<const double> values, const std::string& place);

 private:
  enum class Kind { kAuto, kCounts, kShare, kPercent, kRatio };
  Kind kind_of(std::span<const double> values, double sum, const std::string& place) const;

  const ImportOptions& options_;
  ImportNotes& notes_;
  int top_k_;
  Kind kind_;
};

}  // namespace moectl
