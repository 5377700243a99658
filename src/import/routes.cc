// Dumps of the experts that each token chose: vLLM, Megatron-LM, llama.cpp.
#include <algorithm>
#include <array>
#include <charconv>
#include <map>
#include <memory>
#include <optional>
#include <set>

#include "import/steps.h"
#include "import/table.h"
#include "log/json.h"

namespace moectl {
namespace {

static_assert(JsonParser::kPadding <= 64);

/// The first expert that a token holds twice, or -1.
std::int64_t twice(std::span<const std::int64_t> experts) {
  for (std::size_t i = 0; i < experts.size(); ++i) {
    if (experts[i] >= 0 && std::ranges::find(experts.first(i), experts[i]) != experts.first(i).end())
      return experts[i];
  }
  return -1;
}

ImportError chosen_twice(const std::string& place, std::int64_t expert) {
  return ImportError(place + ": expert " + std::to_string(expert) +
                     " stands twice in one token: a router chooses k different experts, counts are none");
}

/// Tokens of each layer of a file: those that were routed, and those whose slots all hold one number.
struct SlotsOfLayer {
  std::int64_t routed = 0, filled = 0;
};

/// The choices of one sequence, layer by layer, in the order [tokens, layers, k].
class Sequence {
 public:
  Sequence(ImportedStep& step, std::int64_t layers, int top_k, bool pairs, const std::string& place)
      : step_(step), top_k_(top_k), pairs_(pairs), place_(place) {
    layers_.resize(static_cast<std::size_t>(layers));
  }
  /// One token of one layer; -1 = a slot that was not routed.
  void add(std::size_t layer, std::span<const std::int64_t> experts, const std::string& place) {
    Layer& of = layers_[layer];
    bool routed = false;
    // vLLM gives dense layers a row as well, and tokens that it did not capture, filled with one number; a router never
    // chooses an expert twice.
    const bool same = experts.size() > 1 && experts[0] >= 0 &&
                      std::ranges::all_of(experts, [&](auto e) { return e == experts[0]; });
    if (const std::int64_t expert = same ? -1 : twice(experts); expert >= 0)
      throw chosen_twice(place + ": layer " + std::to_string(layer), expert);
    for (const std::int64_t expert : experts) {
      if (expert < -1 || expert >= kMostExperts)
        throw ImportError(place + ": expert " + std::to_string(expert) + ": must be from 0 to " +
                          std::to_string(kMostExperts - 1) + ", or -1 for a slot that was not routed");
      if (expert < 0 || same) continue;
      if (static_cast<std::size_t>(expert) >= of.counts.size()) {
        cells_ += expert + 1 - static_cast<std::int64_t>(of.counts.size());
        check_cells(cells_, place);
        of.counts.resize(static_cast<std::size_t>(expert) + 1);
      }
      ++of.counts[static_cast<std::size_t>(expert)];
      routed = true;
    }
    if (pairs_ && routed) of.pairs.add(experts, held_, place);
    of.tokens += routed;
    of.filled += same;
  }
  /// Adds what the slots of each layer hold to `slots`.
  void close(std::vector<SlotsOfLayer>& slots) {
    slots.resize(std::max(slots.size(), layers_.size()));
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      slots[l].routed += layers_[l].tokens;
      slots[l].filled += layers_[l].filled;
      if (layers_[l].tokens == 0) continue;
      ImportedLayer& layer = step_.layers[{static_cast<int>(l), ""}];
      layer.top_k = top_k_;
      layer.add_sequence(layers_[l].counts, layers_[l].tokens);
      layer.pairs += layers_[l].pairs;
    }
    // A sequence has limits of its own: together they have the step's.
    std::int64_t cells = 0, pairs = 0;
    for (const auto& [key, layer] : step_.layers) {
      cells += static_cast<std::int64_t>(layer.counts.size());
      pairs += layer.pairs.size();
    }
    check_cells(cells, place_);
    PairCounts::check(pairs, place_);
  }

 private:
  struct Layer {
    std::vector<std::int64_t> counts;
    std::int64_t tokens = 0, filled = 0;
    PairCounts pairs;
  };
  ImportedStep& step_;
  int top_k_;
  bool pairs_;
  std::string place_;                  // of its first array
  std::int64_t cells_ = 0, held_ = 0;  // layers × experts; pairs
  std::vector<Layer> layers_;
};

/// The first array of a file. All are [tokens, layers, k] of one model, which has one k and one number of layers.
struct FirstArray {
  std::int64_t layers = 0;
  int top_k = 0;
  std::string place;  // empty = there was none yet
};

/// A sequence whose arrays come one after another: those of a prompt and of what was generated from it.
class Request {
 public:
  Request(ImportedStep& step, bool pairs, FirstArray& first) : step_(step), pairs_(pairs), first_(first) {}
  /// The choices of layers, [layers, k]; those of an array must be as many as in the first one.
  Sequence& sequence(std::int64_t layers, int top_k, const std::string& place) {
    if (first_.place.empty()) first_ = {layers, top_k, place};
    if (layers != first_.layers || top_k != first_.top_k)
      throw ImportError(place + ": [tokens, " + std::to_string(layers) + ", " + std::to_string(top_k) +
                        "]: expected [tokens, " + std::to_string(first_.layers) + ", " +
                        std::to_string(first_.top_k) + "], as in " + first_.place);
    if (!sequence_) sequence_ = std::make_unique<Sequence>(step_, layers, top_k, pairs_, place);
    return *sequence_;
  }
  void close(std::vector<SlotsOfLayer>& slots) {
    if (sequence_) sequence_->close(slots);
    sequence_.reset();
  }

 private:
  ImportedStep& step_;
  bool pairs_;
  FirstArray& first_;
  std::unique_ptr<Sequence> sequence_;
};

/// Adds an array [tokens, layers, k] to a request; returns its tokens.
std::int64_t add_array(NpyReader& array, const std::string& place, Request& request) {
  const auto& shape = array.shape();
  if (shape.size() != 3 || array.is_float() || shape[1] > kMostLayers || shape[2] < 1 || shape[2] > 1024) {
    throw OtherFormat(
        place +
        ": expected an array [tokens, layers, k] of whole numbers, the experts of each token: found " +
        array.description());
  }
  Sequence& sequence = request.sequence(shape[1], static_cast<int>(shape[2]), place);
  std::vector<std::int64_t> experts(static_cast<std::size_t>(shape[2]));
  for (std::int64_t t = 0; t < shape[0]; ++t) {
    for (std::int64_t l = 0; l < shape[1]; ++l) {
      array.read(experts);
      sequence.add(static_cast<std::size_t>(l), experts, place);
    }
  }
  return shape[0];
}

// ---- vLLM: docs/features/routed_experts.md of vllm-project/vllm, pull request 28284. A response has the experts of all tokens
// but the last in each choice; in 0.21 those of the prompt come apart, as prompt_routed_experts of the whole response. ----

class VllmReader : public StepReader {
 public:
  VllmReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file), options_(options), notes_(notes) {
    const std::string_view start = file.peek(6);
    kind_ = start.starts_with("\x93NUMPY") ? Kind::kArray
            : start.starts_with("PK")      ? Kind::kArchive
                                           : Kind::kLines;
    if (kind_ == Kind::kArchive) archive_ = std::make_unique<NpzReader>(file);
  }

  bool next(ImportedStep& step) override {
    step.step = step_;
    step.layers.clear();
    std::int64_t tokens = 0;
    while (tokens < options_.tokens_per_step) {
      const std::int64_t more = add_request(step);
      if (more < 0) break;
      tokens += more;
    }
    ++step_;
    if (tokens == 0) say_what_is_left_out();
    return tokens > 0;
  }

 private:
  enum class Kind { kArray, kArchive, kLines };

  void say_what_is_left_out() {
    std::string dense, unrouted;
    std::int64_t tokens = 0;
    for (std::size_t l = 0; l < slots_.size(); ++l) {
      if (slots_[l].filled == 0) continue;
      std::string& list = slots_[l].routed == 0 ? dense : unrouted;
      if (!list.empty()) list += ' ';
      list += std::to_string(l);
      if (slots_[l].routed > 0) tokens += slots_[l].filled;
    }
    if (!dense.empty())
      notes_.say(file_.name() + ": layer " + dense +
                 " holds one number k times for every token: taken for a dense layer, left out");
    if (!unrouted.empty())
      notes_.say(file_.name() + ": layer " + unrouted + ": " + std::to_string(tokens) +
                 " tokens hold one number k times: taken for tokens without routes, left out");
  }

  /// The tokens of the next request, -1 at the end.
  std::int64_t add_request(ImportedStep& step) {
    if (kind_ == Kind::kArray) {
      if (file_.peek(1).empty()) return -1;  // arrays may stand one after another in a stream
      NpyReader array(file_, file_.name());
      return add_whole(array, file_.name(), step);
    }
    if (kind_ == Kind::kArchive) {
      std::string name;
      ByteStream* const entry = archive_->next(name);
      if (!entry) return -1;
      if (name == "logical_count.npy")
        throw OtherFormat(
            file_.name() + ": " + name +
            ": expected an array [tokens, layers, k] of the experts of each token: this one holds counts");
      NpyReader array(*entry, file_.name() + ": " + name);
      return add_whole(array, file_.name() + ": " + name, step);
    }
    std::string_view line;
    do {
      if (!file_.line(line)) return -1;
    } while (line.find_first_not_of(" \t") == std::string_view::npos);
    try {
      parser_.parse(line);
    } catch (const JsonError& e) {
      throw OtherFormat(file_.place() +
                        ": expected a JSON object with routed_experts: not JSON: " + e.what());
    }
    std::int64_t tokens = 0;
    // The prompt is routed once; the choices generated from it go on from there, the first in the same sequence.
    Request request(step, options_.pairs, first_);
    bool found = add_field(parser_.value(), "prompt_routed_experts", request, tokens);
    found = add_field(parser_.value(), "routed_experts", request, tokens) || found;
    if (const auto choices = parser_.value().find("choices"); choices && choices->is_array()) {
      for (const JsonValue choice : choices->elements()) {
        found = add_field(choice, "routed_experts", request, tokens) || found;
        request.close(slots_);
      }
    }
    request.close(slots_);
    if (!found)
      throw OtherFormat(file_.place() +
                        ": expected routed_experts, as [tokens, layers, k] or base64 of a .npy array: not "
                        "there (null without "
                        "--enable-return-routed-experts)");
    return tokens;
  }

  std::int64_t add_whole(NpyReader& array, const std::string& place, ImportedStep& step) {
    Request request(step, options_.pairs, first_);
    const std::int64_t tokens = add_array(array, place, request);
    request.close(slots_);
    return tokens;
  }

  bool add_field(JsonValue object, const char* name, Request& request, std::int64_t& tokens) {
    const auto field = object.find(name);
    if (!field || field->is_null()) return false;
    const std::string place = file_.place() + ": " + name;
    if (field->is_string()) {
      const std::string bytes = decode_base64(field->text(), place);
      MemoryStream stream(bytes);
      NpyReader array(stream, place);
      tokens += add_array(array, place, request);
      return true;
    }
    const auto wrong = [&] { return ImportError(place + ": expected whole numbers as [tokens, layers, k]"); };
    if (!field->is_array()) throw wrong();
    Sequence* sequence = nullptr;
    std::size_t layers = 0, top_k = 0;
    std::vector<std::int64_t> experts;
    for (const JsonValue token : field->elements()) {
      if (!token.is_array() || (sequence && token.size() != layers) || token.size() > kMostLayers)
        throw wrong();
      std::size_t l = 0;
      for (const JsonValue choice : token.elements()) {
        if (!choice.is_array()) throw wrong();
        experts.clear();
        for (const JsonValue expert : choice.elements()) {
          if (!expert.is_integer() || expert.is_large()) throw wrong();
          experts.push_back(expert.as_integer());
        }
        if (!sequence) {
          layers = token.size();
          top_k = experts.size();
          if (top_k < 1 || top_k > 1024) throw wrong();
          sequence = &request.sequence(static_cast<std::int64_t>(layers), static_cast<int>(top_k), place);
        }
        if (experts.size() != top_k) throw wrong();
        sequence->add(l++, experts, place);
      }
      ++tokens;
    }
    return true;
  }

  Bytes& file_;
  const ImportOptions& options_;
  ImportNotes& notes_;
  Kind kind_;
  std::unique_ptr<NpzReader> archive_;
  JsonParser parser_;
  std::vector<SlotsOfLayer> slots_;
  FirstArray first_;
  std::int64_t step_ = 0;
};

// ---- Megatron-LM: RouterTracer of megatron/core/transformer/moe/router_trace.py (pull request 5220), and the counts of
// ActivationLogger, megatron/training/activation_logging.py. ----

class MegatronReader : public StepReader {
 public:
  MegatronReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file), options_(options), notes_(notes) {
    advance();
    if (!more_)
      throw OtherFormat(file_.name() + ": expected JSON lines with top_indices or tpe: the file is empty");
  }

  bool numbered() const override { return true; }

  bool next(ImportedStep& step) override {
    if (!more_) return false;
    step.layers.clear();
    cells_ = held_ = 0;
    micro_batches_.clear();
    step.step = step_;
    while (more_ && step_ == step.step) {
      add(step);
      advance();
    }
    if (more_ && step_ < step.step) {
      throw ImportError(
          file_.place() + ": step " + std::to_string(step_) + " after step " + std::to_string(step.step) +
          ": steps must ascend. Where another part begins at this line, a rank or the run once it was "
          "resumed, split the file before it: head -n " +
          std::to_string(file_.line_number() - 1) + ", tail -n +" + std::to_string(file_.line_number()) +
          "; ranks have rankN in their names, and of a resumed run the later file counts");
    }
    return true;
  }

 private:
  ImportError wrong(const std::string& what) const { return ImportError(file_.place() + ": " + what); }

  std::int64_t whole(const char* field, std::int64_t most, std::optional<std::int64_t> otherwise = {}) const {
    const auto value = parser_.value().find(field);
    if (!value && otherwise) return *otherwise;
    if (!value || !value->is_integer() || value->is_large() || value->as_integer() < 0 ||
        value->as_integer() > most)
      throw wrong(std::string(field) + ": expected a whole number from 0 to " + std::to_string(most));
    return value->as_integer();
  }

  void advance() {
    std::string_view line;
    do {
      more_ = file_.line(line);
    } while (more_ && line.find_first_not_of(" \t") == std::string_view::npos);
    if (!more_) return;
    try {
      parser_.parse(line);
    } catch (const JsonError& e) {
      throw OtherFormat(file_.place() +
                        ": expected JSON lines with top_indices or tpe: not JSON: " + e.what());
    }
    const JsonValue object = parser_.value();
    if (!object.find("top_indices") && !object.find("tpe"))
      throw OtherFormat(file_.place() +
                        ": expected top_indices (a router trace) or tpe (tokens per expert): found " +
                        object.dump().substr(0, 60));
    step_ = object.find("step") ? whole("step", kLargestWhole) : whole("iter", kLargestWhole);
  }

  void add(ImportedStep& step) {
    const JsonValue object = parser_.value();
    std::string tag;
    // Layers of multi-token prediction are numbered from 0 again.
    if (const auto block = object.find("block"); block && block->is_string() && block->text() == "mtp")
      tag = "mtp" + std::to_string(whole("mtp_idx", 1000, 0));
    const auto id = static_cast<int>(whole("layer", kMostLayers - 1));
    const auto indices = object.find("top_indices");
    if (!indices) return add_counts(*object.find("tpe"), step, id, tag);
    // A record of a layer that has one already in this step is of the next micro-batch.
    const int micro_batch = options_.by_micro_batch ? micro_batches_[{id, tag}]++ : 0;
    if (!indices->is_array()) throw wrong("top_indices: expected [tokens, k]");
    const auto tokens = static_cast<std::int64_t>(indices->size());
    if (const std::int64_t said = whole("num_tokens", kLargestWhole, tokens); said != tokens)
      throw wrong("num_tokens: " + std::to_string(said) + ": expected " + std::to_string(tokens) +
                  ", as many as top_indices has");
    const std::int64_t said_k = whole("topk", kLargestWhole, -1);
    if (tokens == 0) return;  // no tokens of this micro-batch: there is no k either
    ImportedLayer& layer = step.layers[{id, part_tag(micro_batch, tag)}];
    layer.tokens = layer.tokens.value_or(0);
    for (const JsonValue token : indices->elements()) {
      if (!token.is_array() || token.size() < 1 || token.size() > 1024)
        throw wrong("top_indices: expected [tokens, k]");
      const auto k = static_cast<int>(token.size());
      if (said_k >= 0 && said_k != k)
        throw wrong("topk: " + std::to_string(said_k) + ": expected " + std::to_string(k) +
                    ", the experts of a token in top_indices");
      if (layer.top_k != 0 && layer.top_k != k)
        throw wrong("top_indices: " + std::to_string(k) + " experts: expected " +
                    std::to_string(layer.top_k));
      layer.top_k = k;
      bool routed = false;
      chosen_.clear();
      for (const JsonValue expert : token.elements()) {
        if (!expert.is_integer() || expert.is_large() || expert.as_integer() < -1 ||
            expert.as_integer() >= kMostExperts)
          throw wrong("top_indices: " + expert.dump() + ": expected an expert from 0 to " +
                      std::to_string(kMostExperts - 1));
        if (expert.as_integer() < 0) continue;
        layer.choose(expert.as_integer(), cells_, file_.place());
        chosen_.push_back(expert.as_integer());
        routed = true;
      }
      if (const std::int64_t expert_twice = twice(chosen_); expert_twice >= 0)
        throw chosen_twice(file_.place() + ": top_indices", expert_twice);
      if (options_.pairs) layer.pairs.add(chosen_, held_, file_.place());
      *layer.tokens += routed;
    }
  }

  /// The tag of a micro-batch's layer: "mb2", "mb2/mtp0", or `tag` alone where micro-batches are added up.
  std::string part_tag(int micro_batch, const std::string& tag) const {
    if (!options_.by_micro_batch) return tag;
    return "mb" + std::to_string(micro_batch) + (tag.empty() ? "" : "/" + tag);
  }

  void add_counts(JsonValue tpe, ImportedStep& step, int id, const std::string& tag) {
    notes_.say("tpe holds the experts that live on the rank: right for a rank that has them all");
    if (!tpe.is_array()) throw wrong("tpe: expected [micro-batches, experts]");
    for (const JsonValue counts : tpe.elements()) {
      if (!counts.is_array() || counts.size() == 0 || counts.size() > kMostExperts)
        throw wrong("tpe: expected [micro-batches, experts]");
      const int micro_batch = options_.by_micro_batch ? micro_batches_[{id, tag}]++ : 0;
      ImportedLayer& layer = step.layers[{id, part_tag(micro_batch, tag)}];
      layer.top_k = needed_top_k(file_, options_);
      if (!layer.counts.empty() && layer.counts.size() != counts.size())
        throw wrong("tpe: " + std::to_string(counts.size()) + " experts: expected " +
                    std::to_string(layer.counts.size()) + ", as in the micro-batch before");
      layer.every_expert = true;
      if (layer.counts.size() < counts.size()) {
        check_cells(cells_ += static_cast<std::int64_t>(counts.size() - layer.counts.size()), file_.place());
        layer.counts.resize(counts.size());
      }
      std::size_t i = 0;
      for (const JsonValue count : counts.elements()) {
        if (!count.is_number()) throw wrong("tpe: expected whole numbers");
        layer.counts[i] = added(layer.counts[i], whole_of(count.as_double(), file_.place() + ": tpe"));
        ++i;
      }
    }
  }

  Bytes& file_;
  const ImportOptions& options_;
  ImportNotes& notes_;
  JsonParser parser_;
  std::vector<std::int64_t> chosen_;                          // by one token
  std::int64_t cells_ = 0, held_ = 0;                         // layers × experts and pairs of this step
  std::map<std::pair<int, std::string>, int> micro_batches_;  // of this step, by layer
  std::int64_t step_ = 0;
  bool more_ = false;
};

// ---- llama.cpp: examples/moe-trace (pull request 28544): a row "layer,expert" for each choice, layer by layer within a
// forward pass. ----

class LlamaCppReader : public StepReader {
 public:
  LlamaCppReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file), options_(options), notes_(notes), top_k_(needed_top_k(file, options)) {
    advance();
    if (!more_) throw wrong();
    const auto layer = column_of(fields_, "layer", file), expert = column_of(fields_, "expert", file);
    if (layer && expert) {
      layer_ = *layer;
      expert_ = *expert;
      advance();
    } else if (fields_.size() != 2 || !number_of(fields_[0]) || !number_of(fields_[1])) {
      throw wrong();
    }
  }

  bool next(ImportedStep& step) override {
    step.step = step_++;
    step.layers.clear();
    std::int64_t last_layer = -1;
    std::int64_t chosen = 0;  // in the first layer
    std::int64_t first_layer = -1;
    std::int64_t cells = 0, pass = 0, rows = 0;  // rows of this layer in this pass
    for (; more_; advance()) {
      const std::int64_t layer = whole(layer_, kMostLayers - 1), expert = whole(expert_, kMostExperts - 1);
      if (first_layer < 0) first_layer = layer;
      if (layer != last_layer) {
        check_rows(last_layer, rows);
        rows = 0;
        // A lower layer: the next forward pass.
        if (layer < last_layer && chosen >= options_.tokens_per_step * top_k_) return true;
        pass += layer < last_layer;
      }
      if (rows++ % top_k_ == 0) token_.clear();
      if (!repeated_ && std::ranges::find(token_, expert) != token_.end())
        repeated_ = chosen_twice(file_.place() + ": layer " + std::to_string(layer), expert);
      token_.push_back(expert);
      last_layer = layer;
      chosen += layer == first_layer;
      ImportedLayer& of =
          step.layers[{static_cast<int>(layer), options_.by_micro_batch ? "mb" + std::to_string(pass) : ""}];
      of.top_k = top_k_;
      of.choose(expert, cells, file_.place());
    }
    if (rows % top_k_ != 0)
      notes_.say("the last rows end within a token: the file is cut off, or --top-k is wrong");
    if (repeated_) throw ImportError(*repeated_);
    return !step.layers.empty();
  }

 private:
  /// Each token of a pass has k rows in each layer: with another k the tokens would be counted wrong.
  void check_rows(std::int64_t layer, std::int64_t rows) const {
    if (rows % top_k_ != 0)
      throw ImportError(file_.place() + ": layer " + std::to_string(layer) + " has " + std::to_string(rows) +
                        " rows in this pass: expected a multiple of --top-k " + std::to_string(top_k_));
    // Only now: under a wrong k rows of two tokens look like one.
    if (repeated_) throw ImportError(*repeated_);
  }
  OtherFormat wrong() const {
    return OtherFormat(file_.name() +
                       ": expected CSV with the columns layer,expert, a row for each choice: found " +
                       start_of(join(fields_)));
  }
  void advance() { more_ = next_row(file_, ',', fields_); }
  std::int64_t whole(std::size_t column, std::int64_t most) const {
    const std::string place = file_.place() + (column == layer_ ? ": layer" : ": expert");
    if (column >= fields_.size() || !number_of(fields_[column]))
      throw ImportError(place + ": expected a whole number");
    return whole_of(*number_of(fields_[column]), place, most);
  }

  Bytes& file_;
  const ImportOptions& options_;
  ImportNotes& notes_;
  int top_k_;
  std::vector<std::string> fields_;
  std::size_t layer_ = 0, expert_ = 1;
  std::vector<std::int64_t> token_;      // the experts of the token that is read
  std::optional<ImportError> repeated_;  // of a token with an expert twice
  bool more_ = false;
  std::int64_t step_ = 0;
};

}  // namespace

std::unique_ptr<StepReader> open_vllm(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  return std::make_unique<VllmReader>(file, options, notes);
}
std::unique_ptr<StepReader> open_megatron(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  return std::make_unique<MegatronReader>(file, options, notes);
}
std::unique_ptr<StepReader> open_llama_cpp(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  return std::make_unique<LlamaCppReader>(file, options, notes);
}

}  // namespace moectl
