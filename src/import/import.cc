// From the files of a dump to a trace: files of a rank one after another, ranks side by side, each step written once.
#include "import/import.h"

#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <limits>
#include <tuple>

#include "base/format.h"
#include "base/part_file.h"
#include "base/printable.h"
#include "import/steps.h"
#include "moectl/tensorboard.h"

namespace moectl {
namespace {

namespace fs = std::filesystem;

struct Format {
  ImportFormat shown;
  OpenReader open;
  bool whole = false;  ///< Has a value for every expert: a layer with fewer columns has fewer experts.
  bool micro_batches = false;  ///< Tells the micro-batches, or forward passes, of a step.
};
const std::vector<Format>& formats() {
  static const std::vector<Format> kFormats = {
      {{"sglang", "CSV layer_id,expert_id,count of each rank, or the array logical_count as .npy"},
       open_sglang},
      {{"vllm", "routed_experts [tokens, layers, k] as .npy, .npz or JSON lines"}, open_vllm},
      {{"megatron", "router_trace_rankN.jsonl, JSON lines with top_indices, or with tpe"},
       open_megatron,
       false,
       true},
      {{"hf", "router_logits [layers, tokens, experts] as .npy"}, open_router_logits, true, true},
      {{"llama.cpp", "CSV layer,expert, a row for each choice"}, open_llama_cpp, false, true},
      {{"wandb", "CSV export with a column for each layer and expert"}, open_wandb, true},
      {{"tensorboard", "event file with a scalar for each layer and expert"}, open_tensorboard, true},
      {{"csv", "matrix, a row a step, a column an expert"}, open_matrix, true},
  };
  return kFormats;
}

/// The format that a file looks like, by its first bytes; empty if none.
std::string_view resembles(Bytes& file) {
  const std::string_view start = file.peek(4096);
  const auto holds = [&](std::string_view text) { return start.find(text) != start.npos; };
  if (start.starts_with("\x93NUMPY")) {
    if (holds("'<f") || holds("'>f")) return "hf";
    return holds("u1'") || holds("u2'") ? "vllm" : "sglang";
  }
  // torch.save writes a zip archive with the pickle data.pkl, and wrote a bare pickle before PyTorch 1.6.
  if (start.starts_with("PK\x03\x04")) return holds("/data.pkl") ? "torch" : "vllm";
  if (start.starts_with("\x80\x02\x8a\x0a")) return "torch";
  if (start.starts_with('{')) {
    if (holds("\"format\":\"moectl-")) return "moectl";
    if (holds("indices\"") || holds("\"tpe\"")) return "megatron";
    return holds("experts\"") ? "vllm" : "";
  }
  if (start.size() >= 12) {
    std::uint32_t crc = 0;
    for (std::size_t i = 12; i-- > 8;) crc = crc << 8 | static_cast<unsigned char>(start[i]);
    if (crc == masked_crc32c(start.data(), 8)) return "tensorboard";
  }
  std::string line(start.substr(0, start.find('\n')));
  std::ranges::transform(line, line.begin(),
                         [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const auto has = [&](std::string_view text) { return line.find(text) != line.npos; };
  if (has("layer_id,expert_id")) return "sglang";
  if (has("expert0") || has("expert_0") || (has("layer") && has("expert") && has("step"))) return "wandb";
  if (has("layer") && has("expert")) return has("count") ? "sglang" : "llama.cpp";
  // Numbers, with or without a line of names above them.
  const auto numbers = [](std::string_view text) {
    return text.find_first_of("0123456789") != text.npos && text.find_first_of(",;\t") != text.npos &&
           text.find_first_not_of("0123456789.,;\t -+e\r") == text.npos;
  };
  const std::string_view rest = start.substr(std::min(start.size(), line.size() + 1));
  return numbers(line) || numbers(rest.substr(0, rest.find('\n'))) ? "csv" : "";
}

/// The number behind `word` in the name of a file, such as the 3 of router_trace_rank3.jsonl.
std::optional<double> number_behind(const std::string& path, std::string_view word) {
  const std::string name = fs::path(path).filename().string();
  const std::size_t at = name.find(word);
  if (at == std::string::npos) return std::nullopt;
  double value = 0;
  const char* const from = name.data() + at + word.size();
  if (std::from_chars(from, name.data() + name.size(), value, std::chars_format::fixed).ec != std::errc())
    return std::nullopt;
  return value;
}

/// The files of one rank, as one sequence of ascending steps.
class RankFiles {
 public:
  RankFiles(const Format& format, const ImportOptions& options, ImportNotes& notes)
      : format_(format), options_(options), notes_(notes) {}
  void add(const std::string& path, std::string name) { files_.emplace_back(path, std::move(name)); }
  void sort_by_time() {
    std::ranges::stable_sort(
        files_, {}, [](const auto& file) { return number_behind(file.second, "timestamp").value_or(0); });
  }

  bool next(ImportedStep& step) {
    for (;;) {
      if (!reader_) {
        if (at_ == files_.size()) return false;
        open();
      }
      try {
        if (reader_->next(step)) break;
      } catch (const ImportError& e) {
        fail(e);
      }
      reader_.reset();
      bytes_.reset();
      ++at_;
    }
    if (first_) {
      // Each file may count from 0.
      offset_ = step.step <= last_ ? last_ + 1 - step.step : 0;
      first_ = false;
    }
    step.step += offset_;
    last_ = step.step;
    return true;
  }

 private:
  void open() {
    const auto& [path, name] = files_[at_];
    bytes_ = std::make_unique<Bytes>(path, name);
    nearest_ = resembles(*bytes_);
    if (nearest_ == "moectl")
      throw ImportError(bytes_->name() + ": this is a trace or run log of moectl already");
    if (nearest_ == "torch")
      throw ImportError(
          bytes_->name() + ": a file of torch.save, which only PyTorch reads: python3 -m moectl.convert " +
          fs::path(name).filename().string() +
          " --top-k K -o TRACE makes a trace of a dump of SGLang; save another one's array as .npy");
    // Rows of layer, expert and count would pass for a matrix.
    if (format_.shown.name == "csv" && (nearest_ == "sglang" || nearest_ == "llama.cpp"))
      fail(ImportError(bytes_->name() + ": expected a matrix of numbers"));
    // A row with a count is no single choice.
    if (format_.shown.name == "llama.cpp" && nearest_ == "sglang")
      fail(ImportError(bytes_->name() +
                       ": expected CSV with the columns layer,expert, a row for each choice"));
    try {
      reader_ = format_.open(*bytes_, options_, notes_);
    } catch (const ImportError& e) {
      fail(e);
    }
    first_ = true;
  }

  /// The error, with the format that the file looks like.
  [[noreturn]] void fail(const ImportError& e) const {
    if (nearest_.empty() || nearest_ == format_.shown.name) throw e;
    throw ImportError(std::string(e.what()) + "; nearest format: " + std::string(nearest_));
  }

  const Format& format_;
  const ImportOptions& options_;
  ImportNotes& notes_;
  std::string_view nearest_;
  std::vector<std::pair<std::string, std::string>> files_;  // path, name for messages
  std::size_t at_ = 0;
  std::unique_ptr<Bytes> bytes_;
  std::unique_ptr<StepReader> reader_;
  bool first_ = true;
  std::int64_t offset_ = 0, last_ = -1;
};

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
      throw ImportError(path + ": no room for a temporary copy; --experts makes it unnecessary");
  }
  ~Spool() {
    if (file) std::fclose(file);
  }
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(fileno(file)); }
  std::FILE* file;
};

/// Ranks side by side.
class Source {
 public:
  /// `files`: path and name for messages.
  Source(const Format& format, const std::vector<std::pair<std::string, std::string>>& files,
         const ImportOptions& options, ImportNotes& notes)
      : options_(options), notes_(notes) {
    std::map<int, RankFiles> ranks;
    for (const auto& [path, name] : files) {
      const double rank = number_behind(name, "rank").value_or(-1);
      ranks.try_emplace(static_cast<int>(std::min(rank, 1e9)), format, options, notes)
          .first->second.add(path, name);
    }
    for (auto& [rank, of_rank] : ranks) {
      of_rank.sort_by_time();
      lanes_.push_back({rank, std::move(of_rank), {}, true});
    }
    // Micro-batches of a single process have no rank.
    if (ranks.count(-1) && (options.by_rank || (options.by_micro_batch && ranks.size() > 1)))
      throw ImportError("--by: the names of the files must tell the rank, such as router_trace_rank0.jsonl");
    apart_ = options.by_rank || (options.by_micro_batch && !ranks.count(-1));
    for (Lane& lane : lanes_) lane.more = lane.files.next(lane.step);
  }

  bool next(ImportedStep& step) {
    std::int64_t first = std::numeric_limits<std::int64_t>::max();
    for (const Lane& lane : lanes_) first = lane.more ? std::min(first, lane.step.step) : first;
    if (first == std::numeric_limits<std::int64_t>::max()) return false;
    step.step = first;
    step.layers.clear();
    std::vector<Lane*> here;
    for (Lane& lane : lanes_) {
      if (lane.more && lane.step.step == first) here.push_back(&lane);
    }
    // Ranks of tensor parallelism see the same tokens: their sum would count each of them several times.
    const bool copies = !apart_ && here.size() > 1 && std::ranges::all_of(here, [&](const Lane* lane) {
      return lane->step.layers == here[0]->step.layers;
    });
    if (copies) {
      notes_.say("the ranks hold the same counts: taken once, as copies of the same tokens");
    } else if (here.size() > 1 && !apart_) {
      notes_.say("the counts of the ranks are added up; --by rank keeps them apart");
    }
    for (Lane* lane : here) {
      if (!copies || lane == here[0]) {
        const std::string rank = apart_ ? "rank" + std::to_string(lane->rank) : "";
        for (auto& [key, layer] : lane->step.layers) {
          const std::string joint = rank.empty() || key.second.empty() ? "" : "/";
          const auto [it, is_new] = step.layers.try_emplace({key.first, rank + joint + key.second}, layer);
          if (!is_new) it->second += layer;
        }
      }
      lane->more = lane->files.next(lane->step);
    }
    return true;
  }

 private:
  struct Lane {
    int rank;
    RankFiles files;
    ImportedStep step;
    bool more;
  };
  const ImportOptions& options_;
  ImportNotes& notes_;
  std::vector<Lane> lanes_;
  bool apart_ = false;  // ranks
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
      if (descriptor >= 0 && !file_) close(descriptor);
    }
    if (!file_) throw ImportError(path + ": cannot be written: " + std::strerror(errno ? errno : ENOMEM));
  }
  ~TraceWriter() {
    if (!file_) return;
    gzclose(file_);
    if (part_ != path_ && path_ != "-") std::remove(part_.c_str());
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
    if (path_ != "-" && part_ != path_) fs::rename(part_, path_);
  }

 private:
  [[noreturn]] void fail() const {
    throw ImportError(path_ + ": cannot be written: " + std::strerror(errno ? errno : EIO));
  }
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
    throw ImportError("k differs between the files: " + std::to_string(top_k) + " and " +
                      std::to_string(other.top_k));
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
  ImportNotes notes;
  std::vector<std::pair<std::string, std::string>> inputs;
  std::vector<std::unique_ptr<Spool>> spools;
  for (const std::string& file : files) {
    const bool once = file == "-" || !fs::is_regular_file(file);
    if (once && options.experts == 0 && (file == "-" || fs::exists(file)) && !fs::is_directory(file)) {
      spools.push_back(std::make_unique<Spool>(file));
      inputs.emplace_back(spools.back()->path(), file == "-" ? "<stdin>" : file);
    } else {
      inputs.emplace_back(file, file == "-" ? "<stdin>" : file);
    }
  }
  // Every record has an element for every expert, and who the last one is shows at the end only: a first reading finds it.
  auto experts = static_cast<std::size_t>(options.experts);
  std::map<int, std::size_t> of_layer;  // where layers have numbers of their own
  ImportedStep step;
  if (experts == 0) {
    for (Source source(*format, inputs, options, notes); source.next(step);) {
      for (const auto& [key, layer] : step.layers) {
        std::size_t& most = of_layer[key.first];
        most = std::max(most, layer.counts.size());
        experts = std::max(experts, most);
      }
    }
    const bool equal =
        std::ranges::all_of(of_layer, [&](const auto& entry) { return entry.second == experts; });
    if (!format->whole || equal) of_layer.clear();
    if (experts > 0 && !format->whole)
      notes.say(std::to_string(experts) +
                " experts: the largest number + 1; --experts if the model has more");
    if (!of_layer.empty()) notes.say("layers have different numbers of experts");
  }
  ImportReport report;
  report.experts = static_cast<int>(experts);
  TraceWriter writer(output);
  const std::string common =
      of_layer.empty() ? ",\"experts\":" + std::to_string(std::max<std::size_t>(experts, 1)) : "";
  writer.line("{\"format\":\"moectl-trace\",\"version\":1" + common + ",\"source\":\"" + std::string(name) +
              "\"}\n");
  struct Pairs {
    PairCounts both;
    std::vector<std::int64_t> counts;
    std::int64_t tokens = 0;
  };
  std::map<int, Pairs> pairs;
  for (Source source(*format, inputs, options, notes); source.next(step);) {
    ++report.steps;
    for (const auto& [key, layer] : step.layers) {
      if (options.pairs > 0 && key.second.find("mtp") == std::string::npos) {
        Pairs& of = pairs[key.first];
        of.both += layer.pairs;
        of.tokens = added(of.tokens, layer.tokens.value_or(0));
        of.counts.resize(std::max(of.counts.size(), layer.counts.size()));
        for (std::size_t i = 0; i < layer.counts.size(); ++i)
          of.counts[i] = added(of.counts[i], layer.counts[i]);
      }
      if (layer.counts.size() > experts)
        throw ImportError("--experts: " + std::to_string(experts) + ": the files hold expert " +
                          std::to_string(layer.counts.size() - 1));
      const std::string tag = key.second.empty()       ? options.tag
                              : options.tag == "train" ? key.second
                                                       : options.tag + '/' + key.second;
      writer.line(
          record_of(step.step, key.first, tag, layer, of_layer.empty() ? experts : of_layer[key.first]));
      ++report.records;
    }
  }
  if (report.records == 0)
    throw ImportError((files.empty() ? std::string("no file") : files[0]) + ": expected " +
                      std::string(format->shown.expects) + ": found no counts");
  for (const auto& [layer, of] : pairs) {
    std::vector<ExpertPair> all;
    of.both.each([&, layer = layer, &of = of](int a, int b, std::int64_t both) {
      const auto count = [&](int e) { return static_cast<double>(of.counts[static_cast<std::size_t>(e)]); };
      all.push_back({layer, a, b, both,
                     static_cast<double>(both) * static_cast<double>(of.tokens) / (count(a) * count(b))});
    });
    std::ranges::sort(all, [](const ExpertPair& x, const ExpertPair& y) {
      return std::tuple(-x.lift, -x.tokens, x.first, x.second) <
             std::tuple(-y.lift, -y.tokens, y.first, y.second);
    });
    all.resize(std::min(all.size(), static_cast<std::size_t>(options.pairs)));
    report.pairs.insert(report.pairs.end(), all.begin(), all.end());
  }
  if (options.pairs > 0 && report.pairs.empty())
    notes.say("--pairs: the files do not say which experts a token chose together");
  writer.finish();
  report.notes = notes.all();
  return report;
}

}  // namespace moectl
