// Records of parts of a step: `moectl import --by rank` and `--by micro-batch` keep them apart under tags.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "log/copies.h"
#include "moectl/run_log.h"

namespace moectl {

/// What a tag says of the part of the step that its record holds: "rank3", "rank3/mb0", "validation/rank3", "mb12/mtp0".
struct TagParts {
  bool rank = false, micro_batch = false;
  std::string number;   ///< Of the rank, as it is written.
  std::string rest;     ///< The tag of the whole record: what is left, "train" if nothing is.
  std::string of_rank;  ///< The tag without its micro-batch.
  bool any() const { return rank || micro_batch; }
};
TagParts parts_of(std::string_view tag);

/// The records of a log, with the parts of a step added up under the tag of the whole: what every reader takes that judges
/// whole steps. Ranks that are copies of each other (tensor parallelism: the same tokens) are taken once, as `RankCopies` decides
/// it: over the whole log, as `moectl import` does. It is read once, so steps are held until all pairs of ranks are told apart,
/// most often in their first step. Where the log has the whole record as well, its parts pass as they are.
class WholeRecords {
 public:
  /// `keep_ranks`: micro-batches are added up and ranks stay apart. `say` is told which ranks are copies.
  explicit WholeRecords(LogReader& reader, bool keep_ranks = false,
                        std::function<void(std::string_view)> say = {})
      : reader_(reader), keep_ranks_(keep_ranks), say_(std::move(say)) {}
  /// Throws LogError as the reader does, where the parts of a step have different experts or top-k, and where ranks hold the same
  /// counts of too few tokens to tell copies from chance.
  std::optional<LogRecord> next();

 private:
  using Rank = std::pair<std::size_t, std::string>;  // digits, number: ascending as numbers do
  /// What is held of a step: records that pass, then the parts by layer and tag, and by rank.
  struct Step {
    std::vector<LogRecord> passed;
    std::map<std::pair<int, std::string>, std::map<Rank, LogRecord>> parts;
  };
  void count_held(const LogRecord& record);
  void end_step();
  void see(std::int64_t number, const Step& step);
  void release();

  LogReader& reader_;
  bool keep_ranks_, end_ = false;
  std::function<void(std::string_view)> say_;
  std::set<std::string> whole_;   // tags that came without parts
  std::vector<LogRecord> parts_;  // of the step that is being read
  std::deque<Step> held_;
  std::int64_t held_numbers_ = 0;                   // of held_ and of parts_
  std::shared_ptr<const std::string> held_config_;  // the last that was counted
  std::deque<LogRecord> ready_;
  std::optional<LogRecord> upcoming_;
  RankCopies copies_{"leave out the records of one of them, or see each by `moectl metrics --by rank`"};
  std::map<Rank, std::size_t> places_;
  std::string said_;
};

}  // namespace moectl
