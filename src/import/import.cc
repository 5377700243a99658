// From steps to a trace: what the whole dump shows first, then each step once.
#include "import/import.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <tuple>

#include "base/format.h"
#include "base/part_file.h"
#include "base/printable.h"
#include "import/formats.h"
#include "import/ranks.h"
#include "import/steps.h"
#include "moectl/run_log.h"

namespace moectl {
namespace {

namespace fs = std::filesystem;

/// A standard input or pipe that has to be read twice is kept in a file without a name.
struct Spool {
  explicit Spool(const std::string& path) : file(std::tmpfile()) {
    const int from = path == "-" ? dup(STDIN_FILENO) : -1;
    std::FILE* in = path == "-" ? fdopen(from, "rb") : std::fopen(path.c_str(), "rb");
    if (!file || !in) throw ImportError(path + ": cannot be opened: " + std::strerror(errno));
    char part[65536];
    std::size_t got = 0;
    bool good = true;
    while (good && (got = std::fread(part, 1, sizeof part, in)) > 0)
      good = std::fwrite(part, 1, got, file) == got;
    std::fclose(in);
    if (!good || std::fflush(file) != 0)
      throw ImportError(path + ": no room for a temporary copy: give a file instead");
  }
  ~Spool() {
    if (file) std::fclose(file);
  }
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(fileno(file)); }
  std::FILE* file;
};

/// Writes a trace. A file takes its name once it is whole.
class TraceWriter {
 public:
  explicit TraceWriter(const std::string& path) : path_(path) {
    const char* const mode = path.ends_with(".gz") ? "wb" : "wbT";
    errno = 0;
    if (path == "-") {
      file_ = gzdopen(dup(STDOUT_FILENO), mode);
    } else {
      const bool special = fs::exists(path) && !fs::is_regular_file(path);
      part_ = special ? path : path + ".part";
      const int descriptor = special ? open(path.c_str(), O_WRONLY | O_TRUNC | O_CLOEXEC) : open_part(part_);
      if (descriptor >= 0) file_ = gzdopen(descriptor, mode);
      if (descriptor >= 0 && !file_) {
        close(descriptor);
        if (is_part()) std::remove(part_.c_str());
      }
    }
    if (!file_) throw ImportError(path + ": cannot be written: " + std::strerror(errno ? errno : ENOMEM));
  }
  ~TraceWriter() {
    if (file_) gzclose(file_);
    if (is_part()) std::remove(part_.c_str());
  }
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  void line(const std::string& text) {
    if (gzwrite(file_, text.data(), static_cast<unsigned>(text.size())) <= 0) fail();
  }
  void finish() {
    const int code = gzclose(file_);
    file_ = nullptr;
    if (code != Z_OK) fail();
    if (!is_part()) return;
    std::error_code error;
    fs::rename(part_, path_, error);
    if (error) throw ImportError(path_ + ": cannot be written: " + error.message());
    part_ = path_;
  }

 private:
  [[noreturn]] void fail() const {
    throw ImportError(path_ + ": cannot be written: " + std::strerror(errno ? errno : EIO));
  }
  /// Whether what is written has another name than the file will have.
  bool is_part() const { return path_ != "-" && part_ != path_; }

  std::string path_, part_;
  gzFile file_ = nullptr;
};

template <typename T>
void append(std::string& text, const char* name, const std::vector<T>& values, std::size_t n) {
  text += std::string(",\"") + name + "\":[";
  for (std::size_t i = 0; i < n; ++i) {
    if (i) text += ',';
    const T value = i < values.size() ? values[i] : T{};
    if constexpr (std::is_integral_v<T>) {
      text += std::to_string(value);
    } else {
      text += exact(value);
    }
  }
  text += ']';
}

bool too_many_pairs(std::size_t experts) {
  return experts * (experts - 1) / 2 > static_cast<std::size_t>(kMostNumbers) / 2;
}

std::string record_of(std::int64_t step, int layer_id, const std::string& tag, const ImportedLayer& layer,
                      std::size_t experts) {
  std::int64_t assignments = 0;
  // No sum of the dump is beyond what a reader of JSON can hold, and so none overflows.
  for (const std::int64_t count : layer.counts)
    assignments = std::min(assignments + std::min(count, kLargestWhole), kLargestWhole + 1);
  const std::int64_t tokens = layer.tokens.value_or((assignments + layer.top_k - 1) / layer.top_k);
  const std::string place = "step " + std::to_string(step) + ", layer " + std::to_string(layer_id);
  if (static_cast<std::size_t>(layer.top_k) > experts)
    throw ImportError("--top-k: " + std::to_string(layer.top_k) +
                      ": must be at most the number of experts (" + std::to_string(experts) + ")");
  if (tokens > kLargestWhole || assignments > kLargestWhole || assignments > tokens * layer.top_k)
    throw ImportError(place + ": " + std::to_string(assignments) + " assignments: more than " +
                      std::to_string(tokens) + " tokens with k = " + std::to_string(layer.top_k) + " make");
  std::string text = "{\"step\":" + std::to_string(step) + ",\"layer\":" + std::to_string(layer_id) +
                     ",\"tokens\":" + std::to_string(tokens) + ",\"top_k\":" + std::to_string(layer.top_k);
  if (tag != "train") text += ",\"tag\":\"" + tag + '"';
  append(text, "counts", layer.counts, experts);
  const auto fits = [](const std::vector<std::int64_t>& values) {
    return std::ranges::all_of(values, [](std::int64_t v) { return v <= kLargestWhole; });
  };
  if (layer.has_sequences && layer.sequences > 0 && fits(layer.sequence_sq) && fits(layer.sequence_cross) &&
      layer.sequence_len_sq <= kLargestWhole) {
    text += ",\"sequences\":" + std::to_string(layer.sequences) +
            ",\"sequence_len_sq\":" + std::to_string(layer.sequence_len_sq);
    append(text, "sequence_sq", layer.sequence_sq, experts);
    append(text, "sequence_cross", layer.sequence_cross, experts);
  }
  if (layer.gap_sum) text += ",\"gap_sum\":" + exact(*layer.gap_sum);
  if (layer.has_probabilities) {
    append(text, "prob_sum", layer.prob_sum, experts);
    append(text, "sqrt_prob_sum", layer.sqrt_prob_sum, experts);
    text += ",\"token_entropy_sum\":" + exact(layer.token_entropy_sum);
  }
  if (layer.has_pairs() && !too_many_pairs(experts)) text += ",\"pairs\":" + layer.pairs.text(experts);
  return text + "}\n";
}

template <typename T>
void add_to(std::vector<T>& sums, const std::vector<T>& more) {
  if (sums.size() < more.size()) sums.resize(more.size());
  for (std::size_t i = 0; i < more.size(); ++i) {
    if constexpr (std::is_integral_v<T>) {
      sums[i] = added(sums[i], more[i]);
    } else {
      sums[i] += more[i];
    }
  }
}

/// What the whole dump shows, and no part of it.
struct Survey {
  std::size_t experts = 0;             ///< Of the widest layer.
  std::map<int, std::size_t> own;      ///< Experts of each layer, if they differ.
  std::set<int> dense;                 ///< Layers without experts.
  std::optional<RankCopies> copies{};  ///< If ranks are added up.
};

std::string listed(const std::set<int>& numbers) {
  std::string text;
  for (const int number : numbers) {
    if (!text.empty()) text += ' ';
    text += std::to_string(number);
  }
  return text;
}

/// Says which ranks are copies. Throws if their tokens are too few to tell.
void say_copies(const RankCopies& copies, ImportNotes& notes) {
  try {
    copies.decide();
  } catch (const LogError& e) {
    throw ImportError(e.what());
  }
  const std::string note = copies.note();
  if (!note.empty()) notes.say(note);
  if (copies.several())
    notes.say(std::string("the counts of the ranks are added up") + (note.empty() ? "" : ", copies once") +
              "; --by rank keeps them apart");
}

Survey first_reading(const Format& format, const InputFiles& inputs, const ImportOptions& options,
                     ImportNotes& notes) {
  struct Layer {
    std::size_t experts = 0;
    bool whole = true;  // the dump has a value for every expert
    int top_k = 0;
  };
  std::map<int, Layer> layers;
  Survey found;
  ImportedStep step;
  notes.first_reading = true;
  Source source(format, inputs, options, notes);
  if (source.adds_ranks()) found.copies = source.copies();
  for (;;) {
    if (found.copies) source.show(*found.copies);
    if (!source.next(step)) break;
    for (const auto& [key, values] : step.layers) {
      Layer& layer = layers[key.first];
      layer.experts = std::max(layer.experts, values.counts.size());
      layer.whole = layer.whole && values.every_expert;
      layer.top_k = std::max(layer.top_k, values.top_k);
    }
  }
  notes.first_reading = false;
  if (found.copies) say_copies(*found.copies, notes);
  bool whole = true;
  for (const auto& [id, layer] : layers) {
    found.experts = std::max(found.experts, layer.experts);
    whole = whole && layer.whole;
    if (format.zeros_for_dense && layer.top_k == 1 && layer.experts == 1) found.dense.insert(id);
  }
  if (!layers.empty() && found.dense.size() == layers.size())
    throw ImportError(
        inputs[0].second +
        ": every token has expert 0 in every layer: dense layers, or routes that were not captured");
  if (!found.dense.empty())
    notes.say("every token has expert 0 in layers " + listed(found.dense) +
              ": taken for dense layers, left out (a router that chooses one expert alone looks the same)");
  if (options.experts) return found;
  for (const auto& [id, layer] : layers) {
    if (layer.experts != found.experts && layer.whole) found.own[id] = layer.experts;
  }
  if (!found.own.empty()) {
    notes.say("layers have different numbers of experts");
    for (const auto& [id, layer] : layers) found.own.emplace(id, found.experts);
  }
  if (found.experts > 0 && !whole)
    notes.say(std::to_string(found.experts) +
              " experts: the largest number + 1; --experts if the model has more");
  return found;
}

}  // namespace

ImportError::ImportError(const std::string& what) : std::runtime_error(message_line(what)) {}

void ImportedLayer::add_sequence(const std::vector<std::int64_t>& of_sequence, std::int64_t sequence_tokens) {
  has_sequences = has_sequences || !tokens || *tokens == 0;
  tokens = tokens.value_or(0) + sequence_tokens;
  std::int64_t length = 0;
  for (const std::int64_t count : of_sequence) length += count;
  ++sequences;
  if (length > kMostChoices)
    throw ImportError("a sequence of " + std::to_string(length) + " choices: must be at most " +
                      std::to_string(kMostChoices));
  sequence_len_sq = added(sequence_len_sq, length * length);
  add_to(counts, of_sequence);
  sequence_sq.resize(counts.size());
  sequence_cross.resize(counts.size());
  for (std::size_t i = 0; i < of_sequence.size(); ++i) {
    sequence_sq[i] = added(sequence_sq[i], of_sequence[i] * of_sequence[i]);
    sequence_cross[i] = added(sequence_cross[i], length * of_sequence[i]);
  }
}

ImportedLayer& ImportedLayer::operator+=(const ImportedLayer& other) {
  if (top_k != other.top_k)
    throw ImportError("k = " + std::to_string(other.top_k) + ": expected " + std::to_string(top_k) +
                      ", as in the ranks before it");
  if (every_expert && other.every_expert && counts.size() != other.counts.size())
    throw ImportError(std::to_string(other.counts.size()) + " experts: expected " +
                      std::to_string(counts.size()) + ", as in the ranks before it");
  every_expert = every_expert && other.every_expert;
  add_to(counts, other.counts);
  tokens = tokens && other.tokens ? std::optional(added(*tokens, *other.tokens)) : std::nullopt;
  has_sequences = has_sequences && other.has_sequences;
  has_probabilities = has_probabilities && other.has_probabilities;
  sequences = added(sequences, other.sequences);
  sequence_len_sq = added(sequence_len_sq, other.sequence_len_sq);
  add_to(sequence_sq, other.sequence_sq);
  add_to(sequence_cross, other.sequence_cross);
  add_to(prob_sum, other.prob_sum);
  add_to(sqrt_prob_sum, other.sqrt_prob_sum);
  token_entropy_sum += other.token_entropy_sum;
  pairs += other.pairs;
  gap_sum = gap_sum && other.gap_sum ? std::optional(*gap_sum + *other.gap_sum) : std::nullopt;
  return *this;
}

std::string PairCounts::text(std::size_t experts) const {
  std::vector<std::pair<std::uint64_t, std::int64_t>> sorted(both_.begin(), both_.end());
  std::ranges::sort(sorted);
  std::string out = "[";
  auto pair = sorted.begin();
  for (std::uint64_t i = 0; i < experts; ++i) {
    out += i ? ",[" : "[";
    std::uint64_t next = 0;  // the expert whose count comes next; 0 = none was written
    for (; pair != sorted.end() && pair->first >> 32 == i; ++pair) {
      const std::uint64_t other = pair->first & 0xffffffff;
      if (next == 0) out += std::to_string(next = other);
      for (; next < other; ++next) out += ",0";
      out += ',' + std::to_string(pair->second);
      ++next;
    }
    out += ']';
  }
  return out + ']';
}

void ImportNotes::say(const std::string& text) {
  constexpr std::size_t kMost = 20;
  if (notes_.size() < kMost && std::ranges::find(notes_, text) == notes_.end()) notes_.push_back(text);
}

int needed_top_k(const Bytes& file, const ImportOptions& options) {
  if (options.top_k > 0) return options.top_k;
  throw ImportError(file.name() + ": holds no k: --top-k must give the experts that each token selects");
}

std::int64_t whole_of(double value, const std::string& place, std::int64_t most) {
  if (value != std::floor(value) || value < 0 || value > static_cast<double>(most))
    throw ImportError(place + ": " + exact(value) + ": expected a whole number from 0 to " +
                      std::to_string(most));
  return static_cast<std::int64_t>(value);
}

const std::vector<ImportFormat>& import_formats() {
  static const std::vector<ImportFormat> kShown = [] {
    std::vector<ImportFormat> shown;
    for (const Format& format : formats()) shown.push_back(format.shown);
    return shown;
  }();
  return kShown;
}

ImportReport import_trace(std::string_view name, const std::vector<std::string>& files,
                          const std::string& output, const ImportOptions& options) {
  const auto format = std::ranges::find(formats(), name, [](const Format& f) { return f.shown.name; });
  if (format == formats().end()) throw ImportError("format: " + std::string(name) + ": unknown");
  if (options.by_micro_batch && !format->micro_batches) {
    std::string names;
    for (const Format& f : formats()) {
      if (f.micro_batches) names += (names.empty() ? "" : ", ") + std::string(f.shown.name);
    }
    throw ImportError("--by micro-batch: a dump of " + std::string(name) +
                      " does not tell micro-batches; those of " + names + " do");
  }
  const bool twice = options.experts == 0 || files.size() > 1 || format->loads || format->zeros_for_dense;
  ImportNotes notes;
  InputFiles inputs;
  std::vector<std::unique_ptr<Spool>> spools;
  for (const std::string& file : files) {
    const bool once = file == "-" || !fs::is_regular_file(file);
    if (once && twice && (file == "-" || fs::exists(file)) && !fs::is_directory(file)) {
      spools.push_back(std::make_unique<Spool>(file));
      inputs.emplace_back(spools.back()->path(), file == "-" ? "<stdin>" : file);
    } else {
      inputs.emplace_back(file, file == "-" ? "<stdin>" : file);
    }
  }
  const Survey found = twice ? first_reading(*format, inputs, options, notes) : Survey{};
  const std::size_t experts = options.experts ? static_cast<std::size_t>(options.experts) : found.experts;
  ImportReport report;
  report.experts = static_cast<int>(experts);
  TraceWriter writer(output);
  const std::string common =
      found.own.empty() ? ",\"experts\":" + std::to_string(std::max<std::size_t>(experts, 1)) : "";
  writer.line("{\"format\":\"moectl-trace\",\"version\":1" + common + ",\"source\":\"" + std::string(name) +
              "\"}\n");
  bool paired = false;
  ImportedStep step;
  const RankCopies* const copies = found.copies ? &*found.copies : nullptr;
  for (Source source(*format, inputs, options, notes); source.next(step, copies);) {
    std::erase_if(step.layers, [&](const auto& entry) { return found.dense.count(entry.first.first); });
    report.steps += !step.layers.empty();
    for (const auto& [key, layer] : step.layers) {
      paired |= layer.has_pairs();
      if (layer.counts.size() > experts)
        throw ImportError("--experts: " + std::to_string(experts) + ": the files hold expert " +
                          std::to_string(layer.counts.size() - 1));
      const auto own = found.own.find(key.first);
      const std::size_t width = own == found.own.end() ? experts : own->second;
      if (options.top_k > 0 && layer.top_k != options.top_k)
        throw ImportError("--top-k: " + std::to_string(options.top_k) + ": step " +
                          std::to_string(step.step) + ", layer " + std::to_string(key.first) +
                          " has k = " + std::to_string(layer.top_k) + " in the files: leave it out");
      // No 0 stands for a value that the dump does not have.
      if (layer.every_expert && layer.counts.size() != width)
        throw ImportError("step " + std::to_string(step.step) + ", layer " + std::to_string(key.first) +
                          ": values of " + std::to_string(layer.counts.size()) + " experts: expected " +
                          std::to_string(width) +
                          (options.experts ? ", as --experts says" : ", as in other steps"));
      const std::string tag = key.second.empty()       ? options.tag
                              : options.tag == "train" ? key.second
                                                       : options.tag + '/' + key.second;
      writer.line(record_of(step.step, key.first, tag, layer, width));
      ++report.records;
    }
  }
  if (report.records == 0)
    throw ImportError((files.empty() ? std::string("no file") : files[0]) + ": expected " +
                      std::string(format->shown.expects) + ": found no counts");
  if (paired && too_many_pairs(experts))
    notes.say("--pairs: left out: two of " + std::to_string(experts) +
              " experts are more pairs than a record may hold");
  if (options.pairs && !paired)
    notes.say("--pairs: the files do not say which experts a token chose together");
  writer.finish();
  report.notes = notes.all();
  return report;
}

}  // namespace moectl
