// Loads as people log them: counts as floats, shares, percent, or multiples of the mean.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "import/steps.h"

namespace moectl {

/// Turns the values of one layer into counts. What they are must fit all rows: the first of two readings finds it out.
class LoadValues {
 public:
  /// `whole`: the type of the values says that they are counts.
  LoadValues(const Bytes& file, const ImportOptions& options, ImportNotes& notes, bool whole = false);
  /// `values` [N], none negative. `place`: for messages. `tokens`: of this step, where the dump says it.
  ImportedLayer counts(std::span<const double> values, const std::string& place,
                       std::optional<std::int64_t> tokens = {});

 private:
  LoadKind narrow(std::span<const double> values, double sum, const std::string& place);
  LoadKind found() const;

  const ImportOptions& options_;
  ImportNotes& notes_;
  int top_k_;
  std::optional<LoadKind> told_;  // by the user, the type, or the first reading
};

}  // namespace moectl
