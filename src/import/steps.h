// What a reader of a dump hands on: one step after another, each layer with its sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/input_limits.h"
#include "import/bytes.h"
#include "import/import.h"

namespace moectl {

constexpr std::int64_t kLargestWhole = std::int64_t{1} << 53;

/// Choices of one sequence: their square is a number that can be added up.
constexpr std::int64_t kMostChoices = std::int64_t{1} << 31;

/// The sum of two that are not negative; the largest number where that is too large.
inline std::int64_t added(std::int64_t a, std::int64_t b) {
  std::int64_t sum = 0;
  return __builtin_add_overflow(a, b, &sum) ? std::numeric_limits<std::int64_t>::max() : sum;
}

/// How many tokens chose both of two experts. Where a token's experts are known and ImportOptions::pairs asks for it.
class PairCounts {
 public:
  /// The experts of one token; -1 = a slot that was not routed. One that stands twice makes no pair with itself. `held`:
  /// the pairs of all layers of the step so far.
  void add(std::span<const std::int64_t> experts, std::int64_t& held, const std::string& place) {
    const std::size_t before = both_.size();
    bool routed = false;
    for (std::size_t i = 0; i < experts.size(); ++i) {
      routed |= experts[i] >= 0;
      for (std::size_t j = 0; j < i; ++j) {
        if (experts[i] >= 0 && experts[j] >= 0 && experts[i] != experts[j])
          ++both_[key(experts[i], experts[j])];
      }
    }
    tokens_ += routed ? 1 : 0;
    check(held += static_cast<std::int64_t>(both_.size() - before), place);
  }
  /// Pairs of one step have a limit. A token adds half a million of them at most.
  static void check(std::int64_t held, const std::string& place) {
    if (held > kMostPairs)
      throw ImportError(place + ": --pairs: " + std::to_string(held) +
                        " pairs of experts in one step: must be at most " + std::to_string(kMostPairs));
  }
  /// Pairs with at least one token.
  std::int64_t size() const { return static_cast<std::int64_t>(both_.size()); }
  PairCounts& operator+=(const PairCounts& other) {
    for (const auto& [pair, tokens] : other.both_) both_[pair] += tokens;
    tokens_ += other.tokens_;
    return *this;
  }
  /// Of how many tokens the experts were known.
  std::int64_t tokens() const { return tokens_; }
  /// The pairs of each of `experts` with those behind it, as docs/formats.md has them.
  std::string text(std::size_t experts) const;

 private:
  static std::uint64_t key(std::int64_t a, std::int64_t b) {
    return static_cast<std::uint64_t>(std::min(a, b)) << 32 | static_cast<std::uint64_t>(std::max(a, b));
  }
  std::unordered_map<std::uint64_t, std::int64_t> both_;
  std::int64_t tokens_ = 0;
};

/// Layers × experts of one step have a limit, which is checked before memory is taken for them.
inline void check_cells(std::int64_t cells, const std::string& place) {
  if (cells > kMostLayersTimesExperts)
    throw ImportError(place + ": " + std::to_string(cells) +
                      " layers x experts in one step: must be at most " +
                      std::to_string(kMostLayersTimesExperts));
}

/// The sums of one layer in one step. Arrays grow with the largest expert that was seen.
struct ImportedLayer {
  int top_k = 0;
  std::optional<std::int64_t> tokens;  ///< Absent where the dump holds counts alone: then assignments / k.
  std::vector<std::int64_t> counts;
  bool every_expert =
      false;  ///< The dump has a value for each expert: `counts` is as long as the layer is wide.
  // The groups S and P of docs/formats.md; absent unless all tokens are in them.
  bool has_sequences = false, has_probabilities = false;
  std::int64_t sequences = 0, sequence_len_sq = 0;
  std::vector<std::int64_t> sequence_sq, sequence_cross;
  std::vector<double> prob_sum, sqrt_prob_sum;
  double token_entropy_sum = 0;
  std::optional<double> gap_sum;
  PairCounts pairs;

  /// Whether the experts of every token are known.
  bool has_pairs() const { return tokens && pairs.tokens() > 0 && pairs.tokens() == *tokens; }
  /// Counts `times` choices of an expert; grows the arrays. `cells`: layers × experts of the step so far.
  void choose(std::int64_t expert, std::int64_t& cells, const std::string& place, std::int64_t times = 1) {
    const auto at = static_cast<std::size_t>(expert);
    if (at >= counts.size()) {
      cells += expert + 1 - static_cast<std::int64_t>(counts.size());
      check_cells(cells, place);
      counts.resize(at + 1);
    }
    counts[at] = added(counts[at], times);
  }
  /// Takes the counts of one whole sequence and its tokens.
  void add_sequence(const std::vector<std::int64_t>& of_sequence, std::int64_t sequence_tokens);
  ImportedLayer& operator+=(const ImportedLayer& other);
};

/// Layers by id and tag; the empty tag is that of the whole trace.
struct ImportedStep {
  std::int64_t step = 0;
  std::map<std::pair<int, std::string>, ImportedLayer> layers;
};

/// What the numbers of a dump may be, a bit each.
enum LoadKind : unsigned { kCounts = 1, kShares = 2, kPercent = 4, kMultiples = 8, kAnyLoad = 15 };

/// What the readings of the files found out: messages, each said once, and what the numbers are.
class ImportNotes {
 public:
  void say(const std::string& text);
  const std::vector<std::string>& all() const { return notes_; }

  bool first_reading = false;      ///< The first of two: a row may still show what the rows before it are.
  unsigned load_kinds = kAnyLoad;  ///< What fits every row that was read.

 private:
  std::vector<std::string> notes_;
};

/// Reads one file.
class StepReader {
 public:
  virtual ~StepReader() = default;
  /// The next step, or false at the end. Steps ascend.
  virtual bool next(ImportedStep& step) = 0;
  /// Whether steps have the numbers that the run gave them; else they are counted from 0 in each file.
  virtual bool numbered() const { return false; }
};

using OpenReader = std::unique_ptr<StepReader> (*)(Bytes& file, const ImportOptions& options,
                                                   ImportNotes& notes);

std::unique_ptr<StepReader> open_sglang(Bytes& file, const ImportOptions& options, ImportNotes& notes);
std::unique_ptr<StepReader> open_vllm(Bytes& file, const ImportOptions& options, ImportNotes& notes);
std::unique_ptr<StepReader> open_megatron(Bytes& file, const ImportOptions& options, ImportNotes& notes);
std::unique_ptr<StepReader> open_router_logits(Bytes& file, const ImportOptions& options, ImportNotes& notes);
std::unique_ptr<StepReader> open_llama_cpp(Bytes& file, const ImportOptions& options, ImportNotes& notes);
std::unique_ptr<StepReader> open_wandb(Bytes& file, const ImportOptions& options, ImportNotes& notes);
std::unique_ptr<StepReader> open_tensorboard(Bytes& file, const ImportOptions& options, ImportNotes& notes);
std::unique_ptr<StepReader> open_matrix(Bytes& file, const ImportOptions& options, ImportNotes& notes);

/// k of a dump that does not say it. Throws if it was not given.
int needed_top_k(const Bytes& file, const ImportOptions& options);
/// `text` as a whole number in [0, most], also "16384.0"; throws with its place, "file:line: column".
std::int64_t whole_of(double value, const std::string& place, std::int64_t most = kLargestWhole);

}  // namespace moectl
