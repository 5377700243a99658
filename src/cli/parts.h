// Records of parts of a step: `moectl import --by rank` and `--by micro-batch` keep them apart under tags.
#pragma once

#include <deque>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/run_log.h"

namespace moectl::cli {

/// What a tag says of the part of the step that its record holds: "rank3", "rank3/mb0", "validation/rank3", "mb12/mtp0".
struct TagParts {
  bool rank = false, micro_batch = false;
  std::string rest;     ///< The tag of the whole record: what is left, "train" if nothing is.
  std::string of_rank;  ///< The tag without its micro-batch.
  bool any() const { return rank || micro_batch; }
};
TagParts parts_of(std::string_view tag);

/// The records of a log, with the parts of a step added up under the tag of the whole. Parts are held until their step ends.
/// Ranks that hold the same counts (tensor parallelism: the same tokens) are taken once, and that is said on standard error.
/// Where the log has the whole record as well, its parts pass as they are.
class WholeRecords {
 public:
  /// `keep_ranks`: micro-batches are added up and ranks stay apart.
  explicit WholeRecords(LogReader& reader, bool keep_ranks = false)
      : reader_(reader), keep_ranks_(keep_ranks) {}
  std::optional<LogRecord> next();

 private:
  void join();

  LogReader& reader_;
  bool keep_ranks_, end_ = false, said_ = false;
  std::set<std::string> whole_;  // tags that came without parts
  std::vector<LogRecord> parts_;
  std::deque<LogRecord> ready_;
  std::optional<LogRecord> held_;
};

}  // namespace moectl::cli
