// Dumps that other systems write → a trace that every command reads (docs/import.md).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace moectl {

/// Input that is not of the format it was said to be. `what()` reads "file: what was expected: what was found".
class ImportError : public std::runtime_error {
 public:
  explicit ImportError(const std::string& what);
};

/// Input of another format, or of none: the message then names the format that the input looks like.
class OtherFormat : public ImportError {
 public:
  using ImportError::ImportError;
};

struct ImportOptions {
  int top_k = 0;                        ///< k, where the dump does not say it; 0 = not given.
  int experts = 0;                      ///< N; 0 = the values of a layer, or the largest expert id + 1.
  std::int64_t tokens = 0;              ///< Tokens of a step, where the dump holds shares; 0 = not given.
  std::int64_t tokens_per_step = 1024;  ///< Of dumps that know tokens or requests and no steps.
  std::int64_t sequence_length = 0;     ///< Tokens of one sequence in router logits; 0 = not known.
  std::string metric;                   ///< Part of the name of the wanted columns; empty = all.
  std::string values =
      "auto";  ///< What columns hold: counts, share, percent, ratio; auto = what fits all rows.
  std::string scores = "softmax";  ///< Of router logits: softmax or sigmoid.
  std::string mask;                ///< File of the attention mask of router logits; empty = none.
  std::string tag = "train";
  bool pairs = false;    ///< The trace has the tokens that chose both of two experts.
  bool by_rank = false;  ///< Ranks apart, under the tags rank0, rank1, …; else summed.
  /// Micro-batches apart as well, under rank0/mb0, rank0/mb1, …, or mb0, mb1, … where no rank is known.
  bool by_micro_batch = false;
};

struct ImportFormat {
  std::string_view name;
  std::string_view expects;  ///< What a file of this format holds, in a few words.
};
const std::vector<ImportFormat>& import_formats();

struct ImportReport {
  std::int64_t steps = 0, records = 0;
  int experts = 0;
  std::vector<std::string> notes;  ///< What was assumed or left out, each said once.
};

/// Reads `files` of the format named and writes a trace to `output`; `-` is standard input or output, a name that ends
/// in `.gz` is compressed. A file that exists is replaced once the trace is whole. Throws ImportError.
ImportReport import_trace(std::string_view format, const std::vector<std::string>& files,
                          const std::string& output, const ImportOptions& options);

}  // namespace moectl
