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

/// Which ranks hold the same tokens, as those of tensor parallelism do: their sum would count each token several times.
/// Ranks are copies if they hold the same counts in every step that both have, and if their tokens are so many that chance
/// does not make that. With R ranks, L layers and N experts: R² bits and R · L · N numbers.
class RankCopies {
 public:
  explicit RankCopies(std::vector<int> ranks);
  /// One step: for each rank what it holds, or null. Throws if ranks differ that were copies so far.
  void see(const std::vector<const ImportedStep*>& steps);
  /// After the last step. Throws if the tokens are too few to tell.
  void decide(ImportNotes& notes);
  /// The first of the copies of a rank, which may be the rank itself. Both are places in the list of ranks.
  std::size_t first_of(std::size_t rank) const { return first_[rank]; }

 private:
  struct Choices {
    double orders = 0;  // Σ over steps of log(T! / Π c_i!)
    std::vector<std::int64_t> counts;
  };
  double chance(std::size_t rank) const;
  bool told(std::size_t rank);
  std::int64_t choices(std::size_t rank) const;

  std::vector<int> ranks_;
  std::vector<std::vector<bool>> met_, differ_;  // of two ranks, the later one first
  std::vector<std::map<std::pair<int, std::string>, Choices>> layers_;
  std::vector<bool> told_;
  std::vector<std::size_t> first_;
};

/// The steps of all files. The first of two readings finds out which ranks are copies.
class Source {
 public:
  Source(const Format& format, const InputFiles& files, const ImportOptions& options, ImportNotes& notes);
  /// `copies`: of a reading that ended; null = not known, all ranks are added up.
  bool next(ImportedStep& step, const RankCopies* copies = nullptr);
  /// Whether ranks are added up, and so must not be copies.
  bool adds_ranks() const { return lanes_.size() > 1 && !apart_; }
  std::vector<int> ranks() const;
  /// What each rank holds of the step that `next` is about to give; null = nothing.
  std::vector<const ImportedStep*> upcoming() const;

 private:
  struct Lane {
    int rank;
    RankFiles files;
    ImportedStep step;
    bool more;
  };
  void check_times() const;

  ImportNotes& notes_;
  std::vector<Lane> lanes_;
  bool apart_ = false;  // ranks
  bool lack_said_ = false;
};

}  // namespace moectl
