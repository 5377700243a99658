// The files of ranks: those of one rank one after another, ranks side by side.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "import/formats.h"
#include "import/steps.h"
#include "log/copies.h"

namespace moectl {

/// Path, and name for messages.
using InputFiles = std::vector<std::pair<std::string, std::string>>;

/// The rank in the name of a file, as in router_trace_rank3.jsonl or dump_rank_3.npy; -1 = none. Throws if there are two.
int rank_of(const std::string& path);

/// The files of one rank, as one sequence of ascending steps.
class RankFiles {
 public:
  RankFiles(const Format& format, const ImportOptions& options, ImportNotes& notes)
      : format_(format), options_(options), notes_(notes) {}
  void add(const std::string& path, std::string name) { files_.emplace_back(path, std::move(name)); }
  /// Orders the files by the time stamps in their names.
  void sort_by_time();
  const InputFiles& files() const { return files_; }

  bool next(ImportedStep& step);

 private:
  void open();
  void close();
  void find_starts();
  bool read(ImportedStep& step);
  [[noreturn]] void fail(const OtherFormat& e) const;

  const Format& format_;
  const ImportOptions& options_;
  ImportNotes& notes_;
  std::string_view nearest_;
  InputFiles files_;
  std::size_t at_ = 0;
  std::vector<std::int64_t> ends_;  // of each file: where a later one starts
  std::unique_ptr<Bytes> bytes_;
  std::unique_ptr<StepReader> reader_;
  bool first_ = true;
  std::int64_t offset_ = 0, last_ = -1;
};

/// The steps of all files. The first of two readings finds out which ranks are copies.
class Source {
 public:
  Source(const Format& format, const InputFiles& files, const ImportOptions& options, ImportNotes& notes);
  /// `copies`: of a reading that ended; null = not known, all ranks are added up.
  bool next(ImportedStep& step, const RankCopies* copies = nullptr);
  /// Whether ranks are added up, and so must not be copies.
  bool adds_ranks() const { return lanes_.size() > 1 && !apart_; }
  /// The ranks, none of which has been seen.
  RankCopies copies() const;
  /// Shows `copies` what each rank holds of the step that `next` is about to give.
  void show(RankCopies& copies) const;

 private:
  struct Lane {
    int rank;
    RankFiles files;
    ImportedStep step;
    bool more;
  };
  void check_times() const;
  /// What each rank holds of the next step; null = nothing.
  std::vector<const ImportedStep*> upcoming() const;

  ImportNotes& notes_;
  std::vector<Lane> lanes_;
  bool apart_ = false;  // ranks
  bool lack_said_ = false;
};

}  // namespace moectl
