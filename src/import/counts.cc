// Dumps of counts: SGLang's expert distribution, and a plain matrix.
#include <algorithm>
#include <cctype>
#include <charconv>
#include <map>
#include <optional>

#include "base/format.h"

#include "import/loads.h"
#include "import/steps.h"
#include "import/table.h"

namespace moectl {
namespace {

// ---- SGLang: one CSV a rank (layer_id,expert_id,count), or the array logical_count of the recorder's .pt files:
// python/sglang/srt/eplb/expert_distribution.py of sgl-project/sglang. ----

class SglangCsvReader : public StepReader {
 public:
  SglangCsvReader(Bytes& file, const ImportOptions& options)
      : file_(file), top_k_(needed_top_k(file, options)) {
    std::string_view line;
    file.line(line);
    std::vector<std::string> names;
    split(file, line, ',', names);
    for (std::size_t i = 0; i < kColumns; ++i) {
      const auto at = column_of(names, kNames[i], file);
      if (!at) {
        throw OtherFormat(
            file.name() +
            ": expected CSV with the columns layer_id,expert_id,count, or an array logical_count as "
            ".npy or .npz: found " +
            start_of(line));
      }
      columns_[i] = *at;
    }
  }

  bool next(ImportedStep& step) override {
    if (done_) return false;
    done_ = true;
    step.step = 0;
    step.layers.clear();
    std::int64_t cells = 0;
    std::map<std::int64_t, std::vector<bool>> seen;  // experts of each layer
    for (std::vector<std::string> fields; next_row(file_, ',', fields);) {
      std::int64_t values[kColumns];
      const std::int64_t most[] = {kMostLayers - 1, kMostExperts - 1, kLargestWhole};
      for (std::size_t i = 0; i < kColumns; ++i) {
        const std::string place = file_.place() + ": " + kNames[i];
        if (columns_[i] >= fields.size()) throw ImportError(place + ": missing");
        const auto value = number_of(fields[columns_[i]]);
        if (!value) throw ImportError(place + ": \"" + fields[columns_[i]] + "\": expected a whole number");
        values[i] = whole_of(*value, place, most[i]);
      }
      ImportedLayer& layer = step.layers[{static_cast<int>(values[0]), ""}];
      layer.top_k = top_k_;
      layer.choose(values[1], cells, file_.place(), values[2]);
      std::vector<bool>& experts = seen[values[0]];
      experts.resize(layer.counts.size());
      const auto expert = static_cast<std::size_t>(values[1]);
      if (experts[expert])
        throw ImportError(file_.place() + ": layer " + std::to_string(values[0]) + ", expert " +
                          std::to_string(values[1]) + " stands twice: expected one count");
      experts[expert] = true;
    }
    return true;
  }

 private:
  static constexpr std::size_t kColumns = 3;
  static constexpr const char* kNames[kColumns] = {"layer_id", "expert_id", "count"};

  Bytes& file_;
  int top_k_;
  std::size_t columns_[kColumns] = {};
  bool done_ = false;
};

class LogicalCountReader : public StepReader {
 public:
  /// `archive`: a .npz file, whose entry logical_count is read.
  LogicalCountReader(Bytes& file, bool archive, const ImportOptions& options, ImportNotes& notes)
      : file_(file),
        archive_(archive ? std::make_unique<NpzReader>(file) : nullptr),
        array_(entry(), file.name()),
        values_(file, options, notes, !array_.is_float()),
        notes_(notes) {
    const auto& shape = array_.shape();
    if ((shape.size() != 2 && shape.size() != 3) || shape[shape.size() - 1] > kMostExperts ||
        shape[shape.size() - 1] < 2 || shape[shape.size() - 2] > kMostLayers || shape[shape.size() - 2] < 1) {
      throw OtherFormat(
          file.name() +
          ": expected an array logical_count [steps, layers, experts] or [layers, experts]: found " +
          array_.description());
    }
    steps_ = shape.size() == 3 ? shape[0] : 1;
    layers_ = shape[shape.size() - 2];
    check_cells(layers_ * shape.back(), file.name());
    row_.resize(static_cast<std::size_t>(shape.back()));
  }

  bool next(ImportedStep& step) override {
    if (step_ == steps_) return false;
    step.step = step_++;
    step.layers.clear();
    for (std::int64_t l = 0; l < layers_; ++l) {
      array_.read(row_);
      const std::string place =
          file_.name() + ": [" + std::to_string(step.step) + ", " + std::to_string(l) + "]";
      for (const double value : row_) {
        if (!(value >= 0))
          throw ImportError(place + ": " + exact(value) + ": expected a number of at least 0");
      }
      if (std::ranges::all_of(row_, [](double v) { return v == 0; })) {
        notes_.say("layers without any count are left out (dense layers have none)");
        continue;
      }
      step.layers[{static_cast<int>(l), ""}] = values_.counts(row_, place);
    }
    return true;
  }

 private:
  ByteStream& entry() {
    if (!archive_) return file_;
    for (std::string name; ByteStream* const stream = archive_->next(name);) {
      if (name == "logical_count.npy") return *stream;
    }
    throw OtherFormat(file_.name() + ": expected an array logical_count: there is none in this archive");
  }

  Bytes& file_;
  std::unique_ptr<NpzReader> archive_;
  NpyReader array_;
  LoadValues values_;
  ImportNotes& notes_;
  std::int64_t steps_ = 0, layers_ = 0, step_ = 0;
  std::vector<double> row_;
};

// ---- A matrix: a row a step (and layer), a column an expert. ----

class MatrixReader : public StepReader {
 public:
  MatrixReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file), values_(file, options, notes) {
    std::string_view line;
    if (!file.line(line)) throw wrong();
    separator_ = line.find(';') != line.npos ? ';' : line.find('\t') != line.npos ? '\t' : ',';
    split(file, line, separator_, fields_);
    const bool header =
        !std::ranges::all_of(fields_, [](const std::string& f) { return number_of(f).has_value(); });
    columns_ = fields_.size();
    if (header) read_names();
    const std::size_t named =
        step_column_.has_value() + layer_column_.has_value() + tokens_column_.has_value();
    if (columns_ < named + 2 || columns_ > kMostExperts + named) throw wrong();
    if (header) advance();
  }

  bool numbered() const override { return step_column_.has_value(); }

  bool next(ImportedStep& step) override {
    if (!more_) return false;
    step.layers.clear();
    step.step = cell(step_column_, "step").value_or(steps_);
    ++steps_;
    int layer = layer_of_row();
    do {
      row_.clear();
      for (std::size_t i = 0; i < columns_; ++i) {
        if (i == step_column_ || i == layer_column_ || i == tokens_column_) continue;
        const auto value = number_of(fields_[i]);
        if (!value || *value < 0)
          throw ImportError(file_.place() + ": column " + std::to_string(i + 1) + ": \"" + fields_[i] +
                            "\": expected a number of at least 0");
        row_.push_back(*value);
      }
      if (step.layers.count({layer, ""}))
        throw ImportError(file_.place() + ": step " + std::to_string(step.step) + ", layer " +
                          std::to_string(layer) + " stands twice");
      step.layers[{layer, ""}] =
          values_.counts(row_, file_.place(), cell(tokens_column_, "tokens", kMostTokensOfStep));
      advance();
      if (more_) layer = layer_of_row();
      // Without step numbers a step ends where a layer comes again.
    } while (more_ &&
             (step_column_ ? cell(step_column_, "step") == step.step : step.layers.count({layer, ""}) == 0));
    if (more_ && step_column_ && *cell(step_column_, "step") < step.step)
      throw ImportError(file_.place() + ": steps must ascend");
    return true;
  }

 private:
  static constexpr std::int64_t kMostTokensOfStep = std::int64_t{1} << 40;

  /// Which columns are no experts. Those of experts stand in the order of experts: their numbers, if they have them, show it.
  void read_names() {
    std::int64_t next = 0;  // expert
    std::size_t numbers = 0, experts = 0;
    std::string unnumbered;
    for (std::size_t i = 0; i < columns_; ++i) {
      std::string name = fields_[i];
      std::ranges::transform(name, name.begin(),
                             [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
      if (name == "step" || name == "_step" || name == "iteration" || name == "iter" ||
          name == "global_step") {
        column_is(step_column_, i);
      } else if (name == "layer" || name == "layer_id" || name == "layer_idx") {
        column_is(layer_column_, i);
      } else if (name == "tokens" || name == "num_tokens") {
        column_is(tokens_column_, i);
      } else {
        ++experts;
        const std::size_t digits = name.find_last_not_of("0123456789") + 1;
        std::int64_t number = 0;
        if (std::from_chars(name.data() + digits, name.data() + name.size(), number).ec != std::errc()) {
          unnumbered = fields_[i];
          continue;
        }
        ++numbers;
        if (number >= kMostExperts)
          throw OtherFormat(file_.place() + ": column " + std::to_string(i + 1) + ": " + fields_[i] +
                            ": expected an expert from 0 to " + std::to_string(kMostExperts - 1));
        if (number != next)
          throw OtherFormat(file_.place() + ": column " + std::to_string(i + 1) + ": " + fields_[i] +
                            ": expected expert " + std::to_string(next) +
                            ": the columns of experts must stand in their order from 0, and all be there");
        ++next;
      }
    }
    if (numbers > 0 && numbers < experts)
      throw OtherFormat(file_.place() + ": column " + unnumbered +
                        ": expected the number of an expert at its end, or step, layer or tokens");
  }
  int layer_of_row() const {
    return static_cast<int>(cell(layer_column_, "layer", kMostLayers - 1).value_or(0));
  }
  void column_is(std::optional<std::size_t>& column, std::size_t i) const {
    if (column)
      throw OtherFormat(file_.place() + ": columns " + fields_[*column] + " and " + fields_[i] +
                        ": expected one of them");
    column = i;
  }
  OtherFormat wrong() const {
    return OtherFormat(
        file_.name() +
        ": expected a matrix of numbers, a row a step and a column an expert, perhaps with a first line that "
        "names columns step, layer and tokens: found " +
        start_of(join(fields_)));
  }
  void advance() {
    more_ = next_row(file_, separator_, fields_);
    if (!more_) return;
    if (fields_.size() != columns_)
      throw ImportError(file_.place() + ": " + std::to_string(fields_.size()) + " columns: expected " +
                        std::to_string(columns_));
  }
  std::optional<std::int64_t> cell(std::optional<std::size_t> column, const char* name,
                                   std::int64_t most = kLargestWhole) const {
    if (!column) return std::nullopt;
    const auto value = number_of(fields_[*column]);
    const std::string place = file_.place() + ": " + name;
    if (!value) throw ImportError(place + ": \"" + fields_[*column] + "\": expected a whole number");
    return whole_of(*value, place, most);
  }

  Bytes& file_;
  LoadValues values_;
  char separator_ = ',';
  std::vector<std::string> fields_;
  std::size_t columns_ = 0;
  std::optional<std::size_t> step_column_, layer_column_, tokens_column_;
  std::vector<double> row_;
  std::int64_t steps_ = 0;
  bool more_ = true;
};

}  // namespace

std::unique_ptr<StepReader> open_sglang(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  const std::string_view start = file.peek(6);
  if (start.starts_with("\x93NUMPY") || start.starts_with("PK"))
    return std::make_unique<LogicalCountReader>(file, start.starts_with("PK"), options, notes);
  return std::make_unique<SglangCsvReader>(file, options);
}
std::unique_ptr<StepReader> open_matrix(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  return std::make_unique<MatrixReader>(file, options, notes);
}

}  // namespace moectl
