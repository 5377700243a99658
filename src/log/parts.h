// Records of parts of a step: `moectl import --by rank` and `--by micro-batch` keep them apart under tags.
#pragma once

#include <deque>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moectl/run_log.h"

namespace moectl {

/// What a tag says of the part of the step that its record holds: "rank3", "rank3/mb0", "validation/rank3", "mb12/mtp0".
struct TagParts {
  bool rank = false, micro_batch = false;
  std::string rest;     ///< The tag of the whole record: what is left, "train" if nothing is.
  std::string of_rank;  ///< The tag without its micro-batch.
  bool any() const { return rank || micro_batch; }
};
TagParts parts_of(std::string_view tag);

/// The records of a log, with the parts of a step added up under the tag of the whole: what every reader takes that judges
/// whole steps. Parts are held until their step ends. Ranks that hold the same counts (tensor parallelism: the same tokens)
/// are taken once. Where the log has the whole record as well, its parts pass as they are.
class WholeRecords {
 public:
  /// `keep_ranks`: micro-batches are added up and ranks stay apart. `say` is told once that ranks are copies.
  explicit WholeRecords(LogReader& reader, bool keep_ranks = false,
                        std::function<void(std::string_view)> say = {})
      : reader_(reader), keep_ranks_(keep_ranks), say_(std::move(say)) {}
  /// Throws LogError as the reader does, and where the parts of a step have different experts or top-k.
  std::optional<LogRecord> next();

 private:
  void join();

  LogReader& reader_;
  bool keep_ranks_, end_ = false;
  std::function<void(std::string_view)> say_;
  std::set<std::string> whole_;  // tags that came without parts
  std::vector<LogRecord> parts_;
  std::deque<LogRecord> ready_;
  std::optional<LogRecord> held_;
};

}  // namespace moectl
