// Dumps of counts: SGLang's expert distribution, and a plain matrix.
#include <algorithm>
#include <optional>

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
    if (!file.line(line) || line != "layer_id,expert_id,count") {
      throw ImportError(file.name() +
                        ": expected CSV with the columns layer_id,expert_id,count, or a .npy array "
                        "logical_count: found \"" +
                        std::string(line.substr(0, 60)) + '"');
    }
  }

  bool next(ImportedStep& step) override {
    if (done_) return false;
    done_ = true;
    step.step = 0;
    step.layers.clear();
    std::vector<std::string> fields;
    for (std::string_view line; file_.line(line);) {
      if (line.empty()) continue;
      split(line, ',', fields);
      std::int64_t values[3];
      const char* const names[] = {"layer_id", "expert_id", "count"};
      const std::int64_t most[] = {kMostLayers - 1, kMostExperts - 1, kLargestWhole};
      if (fields.size() != 3) throw ImportError(file_.place() + ": expected layer_id,expert_id,count");
      for (std::size_t i = 0; i < 3; ++i) {
        const std::string place = file_.place() + ": " + names[i];
        const auto value = number_of(fields[i]);
        if (!value) throw ImportError(place + ": \"" + fields[i] + "\": expected a whole number");
        values[i] = whole_of(*value, place, most[i]);
      }
      ImportedLayer& layer = step.layers[{static_cast<int>(values[0]), ""}];
      layer.top_k = top_k_;
      const auto expert = static_cast<std::size_t>(values[1]);
      if (expert >= layer.counts.size()) layer.counts.resize(expert + 1);
      layer.counts[expert] = added(layer.counts[expert], values[2]);
    }
    return true;
  }

 private:
  Bytes& file_;
  int top_k_;
  bool done_ = false;
};

class LogicalCountReader : public StepReader {
 public:
  LogicalCountReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file), array_(file, file.name()), values_(file, options, notes), notes_(notes) {
    const auto& shape = array_.shape();
    if ((shape.size() != 2 && shape.size() != 3) || shape[shape.size() - 1] > kMostExperts ||
        shape[shape.size() - 1] < 2 || shape[shape.size() - 2] > kMostLayers) {
      throw ImportError(
          file.name() +
          ": expected an array logical_count [steps, layers, experts] or [layers, experts]: found " +
          array_.description());
    }
    steps_ = shape.size() == 3 ? shape[0] : 1;
    layers_ = shape[shape.size() - 2];
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
        if (!(value >= 0)) throw ImportError(place + ": expected no negative count");
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
  Bytes& file_;
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
    split(line, separator_, fields_);
    const bool header =
        !std::ranges::all_of(fields_, [](const std::string& f) { return number_of(f).has_value(); });
    for (std::size_t i = 0; header && i < fields_.size(); ++i) {
      const std::string& name = fields_[i];
      if (name == "step" || name == "_step" || name == "Step" || name == "iteration")
        step_column_ = i;
      else if (name == "layer" || name == "layer_id")
        layer_column_ = i;
      else if (name == "tokens")
        tokens_column_ = i;
    }
    columns_ = fields_.size();
    const std::size_t named =
        step_column_.has_value() + layer_column_.has_value() + tokens_column_.has_value();
    if (columns_ < named + 2 || columns_ > kMostExperts + named) throw wrong();
    if (header) advance();
  }

  bool next(ImportedStep& step) override {
    if (!more_) return false;
    step.layers.clear();
    step.step = cell(step_column_, "step").value_or(rows_);
    do {
      const auto layer = static_cast<int>(cell(layer_column_, "layer", kMostLayers - 1).value_or(0));
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
      ImportedLayer counts = values_.counts(row_, file_.place());
      if (const auto tokens = cell(tokens_column_, "tokens")) counts.tokens = *tokens;
      step.layers[{layer, ""}] = std::move(counts);
      ++rows_;
      advance();
    } while (more_ && step_column_ && cell(step_column_, "step") == step.step);
    if (more_ && step_column_ && *cell(step_column_, "step") < step.step)
      throw ImportError(file_.place() + ": steps must ascend");
    return true;
  }

 private:
  ImportError wrong() const {
    return ImportError(
        file_.name() +
        ": expected a matrix of numbers, a row a step and a column an expert, perhaps with a first line that "
        "names columns step, layer and tokens: found " +
        (fields_.empty() ? "nothing" : '"' + join(fields_).substr(0, 60) + '"'));
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
  std::int64_t rows_ = 0;
  bool more_ = true;
};

}  // namespace

std::unique_ptr<StepReader> open_sglang(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  if (file.peek(6).starts_with("\x93NUMPY"))
    return std::make_unique<LogicalCountReader>(file, options, notes);
  return std::make_unique<SglangCsvReader>(file, options);
}
std::unique_ptr<StepReader> open_matrix(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  return std::make_unique<MatrixReader>(file, options, notes);
}

}  // namespace moectl
