// Scalars by layer and expert: W&B exports with a column for each, TensorBoard event files with a tag for each.
#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <set>

#include "base/format.h"
#include "base/input_limits.h"
#include "import/loads.h"
#include "import/steps.h"
#include "import/table.h"
#include "moectl/tensorboard.h"

namespace moectl {
namespace {

/// "moe-expert/tokens_layer3_expert12" → metric "moe-expert/tokens_layer_expert", layer 3, expert 12.
struct ScalarKey {
  std::string metric;
  int layer = 0, expert = -1;
};

/// The number behind the last `word` in the text that has one, perhaps after an s and a separator; the number is cut out.
std::optional<int> take_number(std::string& text, std::string_view word, int most) {
  for (std::size_t at = text.rfind(word); at != std::string::npos;
       at = at == 0 ? std::string::npos : text.rfind(word, at - 1)) {
    std::size_t from = at + word.size();
    if (from < text.size() && text[from] == 's') ++from;
    while (from < text.size() && std::strchr("_.-/: ", text[from])) ++from;
    std::size_t to = from;
    int number = 0;
    while (to < text.size() && std::isdigit(static_cast<unsigned char>(text[to])) && number <= most)
      number = number * 10 + (text[to++] - '0');
    if (to == from || number > most) continue;
    text.erase(from, to - from);
    return number;
  }
  return std::nullopt;
}

std::optional<ScalarKey> key_of(std::string_view name) {
  ScalarKey key;
  key.metric = name;
  std::ranges::transform(key.metric, key.metric.begin(),
                         [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  auto expert = take_number(key.metric, "expert", kMostExperts - 1);
  if (!expert) {
    // "…_e12": the last thing in the name.
    const std::size_t at = key.metric.rfind("_e");
    if (at == std::string::npos || key.metric.find_first_not_of("0123456789", at + 2) != std::string::npos)
      return std::nullopt;
    expert = take_number(key.metric, "_e", kMostExperts - 1);
  }
  if (!expert) return std::nullopt;
  key.expert = *expert;
  key.layer = take_number(key.metric, "layer", kMostLayers - 1).value_or(0);
  return key;
}

/// The values of a step, as they come in.
class Grid {
 public:
  Grid(const Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : name_(file.name()), values_(file, options, notes) {}
  /// A layer that has a value in a step has one for each of its experts: those that were expected or set before.
  void expect(int layer, int expert) {
    std::size_t& experts = experts_[layer];
    const std::size_t more = std::max(experts, static_cast<std::size_t>(expert) + 1) - experts;
    check_cells(cells_ += static_cast<std::int64_t>(more), name_);
    experts += more;
  }
  void set(int layer, int expert, double value, std::int64_t step) {
    expect(layer, expert);
    auto& row = rows_[layer];
    if (static_cast<std::size_t>(expert) >= row.size())
      row.resize(static_cast<std::size_t>(expert) + 1, std::nan(""));
    double& known = row[static_cast<std::size_t>(expert)];
    if (!std::isnan(known) && known != value)
      throw ImportError(name_ + ": step " + std::to_string(step) + ", layer " + std::to_string(layer) +
                        ", expert " + std::to_string(expert) + " stands twice, as " + exact(known) +
                        " and as " + exact(value) + ": expected one value");
    known = value;
  }
  bool empty() const { return rows_.empty(); }
  void clear() { rows_.clear(); }
  /// Whether no expert lacks its value.
  bool whole() const {
    return std::ranges::all_of(rows_, [&](const auto& entry) {
      return entry.second.size() == experts_.at(entry.first) &&
             std::ranges::none_of(entry.second, [](double v) { return std::isnan(v); });
    });
  }
  void take(ImportedStep& step) {
    step.layers.clear();
    for (auto& [layer, row] : rows_) {
      const std::string place =
          name_ + ": step " + std::to_string(step.step) + ", layer " + std::to_string(layer);
      row.resize(experts_[layer], std::nan(""));
      for (std::size_t i = 0; i < row.size(); ++i) {
        if (!(row[i] >= 0))
          throw ImportError(place + ", expert " + std::to_string(i) + ": expected a number of at least 0: " +
                            (std::isnan(row[i]) ? "missing" : "negative"));
      }
      step.layers[{layer, ""}] = values_.counts(row, place);
    }
    rows_.clear();
  }

 private:
  std::string name_;
  LoadValues values_;
  std::map<int, std::vector<double>> rows_;
  std::map<int, std::size_t> experts_;
  std::int64_t cells_ = 0;  // the sum of experts_
};

/// One metric only may be read: values of two would be taken for each other.
class OneMetric {
 public:
  explicit OneMetric(const ImportOptions& options) : wanted_(options.metric) {}
  bool wants(std::string_view name) const { return wanted_.empty() || name.find(wanted_) != name.npos; }
  void add(const ScalarKey& key, const std::string& file) {
    metrics_.insert(key.metric);
    if (metrics_.size() == 1) return;
    std::string all;
    for (const std::string& metric : metrics_) all += (all.empty() ? "" : ", ") + metric;
    throw ImportError(file + ": several metrics have a value by expert (" + all +
                      "): choose one with --metric, a part of its name");
  }

 private:
  std::string wanted_;
  std::set<std::string> metrics_;
};

// ---- W&B: "Export as CSV" of a panel, or run.history() of its API as CSV. ----

class WandbReader : public StepReader {
 public:
  WandbReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file), grid_(file, options, notes) {
    std::string_view line;
    file.line(line);
    split(file, line, ',', fields_);
    OneMetric metric(options);
    columns_.resize(fields_.size());
    std::map<std::pair<int, int>, std::size_t> known;  // columns by layer and expert
    for (std::size_t i = 0; i < fields_.size(); ++i) {
      const std::string& name = fields_[i];
      if (name == "Step" || name == "_step" || name == "step" || name == "trainer/global_step") {
        column_of(fields_, name, file);  // one alone has the name
        if (!step_column_ || name != "trainer/global_step") step_column_ = i;
      }
      // A panel's export has the range of smoothed points beside each column.
      if (name.ends_with("__MIN") || name.ends_with("__MAX") || !metric.wants(name)) continue;
      if (!(columns_[i] = key_of(name))) continue;
      metric.add(*columns_[i], file.name());
      const auto [before, fresh] = known.try_emplace({columns_[i]->layer, columns_[i]->expert}, i);
      if (!fresh)
        throw ImportError(file.place() + ": columns " + std::to_string(before->second + 1) + " and " +
                          std::to_string(i + 1) + ": " + fields_[before->second] + " and " + name +
                          " are both of layer " + std::to_string(columns_[i]->layer) + ", expert " +
                          std::to_string(columns_[i]->expert) + ": expected one of them");
      grid_.expect(columns_[i]->layer, columns_[i]->expert);
    }
    if (known.empty()) {
      throw OtherFormat(file.name() +
                        ": expected CSV with a column for each layer and expert, such as "
                        "moe-expert/tokens_layer0_expert3: found " +
                        start_of(line));
    }
  }

  bool numbered() const override { return step_column_.has_value(); }

  bool next(ImportedStep& step) override {
    std::string_view line;
    while (file_.line(line)) {
      if (line.empty()) continue;
      split(file_, line, ',', fields_);
      if (fields_.size() != columns_.size())
        throw ImportError(file_.place() + ": " + std::to_string(fields_.size()) + " columns: expected " +
                          std::to_string(columns_.size()));
      const std::int64_t row = rows_++;
      step.step = row;
      if (step_column_) {
        const auto value = number_of(fields_[*step_column_]);
        if (!value)
          throw ImportError(file_.place() + ": step: \"" + fields_[*step_column_] +
                            "\": expected a whole number");
        step.step = whole_of(*value, file_.place() + ": step");
      }
      for (std::size_t i = 0; i < columns_.size(); ++i) {
        if (!columns_[i] || fields_[i].empty() || fields_[i] == "NaN" || fields_[i] == "nan") continue;
        const auto value = number_of(fields_[i]);
        if (!value)
          throw ImportError(file_.place() + ": column " + std::to_string(i + 1) + ": \"" + fields_[i] +
                            "\": expected a number");
        grid_.set(columns_[i]->layer, columns_[i]->expert, *value, step.step);
      }
      if (grid_.empty()) continue;  // a row of other metrics
      if (step.step <= last_)
        throw ImportError(file_.place() + ": step " + std::to_string(step.step) + ": steps must ascend");
      last_ = step.step;
      grid_.take(step);
      return true;
    }
    return false;
  }

 private:
  Bytes& file_;
  Grid grid_;
  std::vector<std::string> fields_;
  std::vector<std::optional<ScalarKey>> columns_;
  std::optional<std::size_t> step_column_;
  std::int64_t rows_ = 0, last_ = -1;
};

// ---- TensorBoard: TFRecords of Event messages (tensorflow/core/util/event.proto, framework/summary.proto and
// tensor.proto). ----

/// The fields of a protobuf message.
class Message {
 public:
  Message(std::string_view bytes, const std::string& place) : left_(bytes), place_(place) {}
  bool next() {
    if (left_.empty()) return false;
    const std::uint64_t key = varint();
    field = static_cast<int>(key >> 3);
    switch (key & 7) {
      case 0:
        number = varint();
        break;
      case 1:
        bytes = take(8);
        break;
      case 2:
        bytes = take(varint());
        break;
      case 5:
        bytes = take(4);
        break;
      default:
        throw ImportError(place_ + ": damaged event");
    }
    return true;
  }
  int field = 0;
  std::uint64_t number = 0;
  std::string_view bytes;

 private:
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (left_.empty()) break;
      const auto byte = static_cast<unsigned char>(left_.front());
      left_.remove_prefix(1);
      value |= static_cast<std::uint64_t>(byte & 127) << shift;
      if (byte < 128) return value;
    }
    throw ImportError(place_ + ": damaged event");
  }
  std::string_view take(std::uint64_t size) {
    if (size > left_.size()) throw ImportError(place_ + ": damaged event");
    const std::string_view part = left_.substr(0, size);
    left_.remove_prefix(size);
    return part;
  }
  std::string_view left_;
  const std::string& place_;
};

template <typename T>
T from_bytes(std::string_view bytes) {
  T value = 0;
  for (std::size_t i = std::min(sizeof(T), bytes.size()); i-- > 0;)
    value = static_cast<T>(value << 8 | static_cast<unsigned char>(bytes[i]));
  return value;
}

class TensorBoardReader : public StepReader {
 public:
  TensorBoardReader(Bytes& file, const ImportOptions& options, ImportNotes& notes)
      : file_(file), notes_(notes), grid_(file, options, notes), metric_(options) {
    const std::string_view start = file.peek(12);
    if (start.size() < 12 || from_bytes<std::uint32_t>(start.substr(8)) != masked_crc32c(start.data(), 8))
      throw OtherFormat(file.name() +
                        ": expected a TensorBoard event file: its first record has no valid length");
  }

  bool numbered() const override { return true; }

  bool next(ImportedStep& step) override {
    while (read_event()) {
      if (values_.empty()) continue;
      const bool new_step = !grid_.empty() && event_step_ != step_;
      if (new_step) {
        step.step = step_;
        grid_.take(step);
        taken_ = true;
      }
      if (event_step_ < step_)
        throw ImportError(file_.name() + ": step " + std::to_string(event_step_) + " after step " +
                          std::to_string(step_) + ": steps must ascend");
      step_ = event_step_;
      for (const auto& [key, value] : values_) grid_.set(key.layer, key.expert, value, step_);
      if (new_step) return true;
    }
    if (!any_)
      throw ImportError(
          file_.name() +
          ": expected scalars by layer and expert, such as moe/tokens_layer0_expert3: there is no such tag");
    // The events of a step come one after another, and a run that still writes, or was killed, may end among them.
    if (taken_ && !grid_.whole()) {
      notes_.say(file_.name() + ": ends within step " + std::to_string(step_) +
                 ", in which experts have no value yet: the step is left out");
      grid_.clear();
    }
    if (grid_.empty()) return false;
    step.step = step_;
    grid_.take(step);
    return true;
  }

 private:
  bool read_event() {
    values_.clear();
    char head[12];
    if (!fill(head, sizeof head)) return false;
    const auto length = from_bytes<std::uint64_t>({head, 8});
    const std::string here = file_.name() + ": event " + std::to_string(events_);
    if (from_bytes<std::uint32_t>({head + 8, 4}) != masked_crc32c(head, 8))
      throw ImportError(here + ": damaged length");
    if (length > kLongestEvent)
      throw ImportError(here + ": " + std::to_string(length) + " bytes: must be at most " +
                        std::to_string(kLongestEvent));
    record_.resize(length + 4);
    // A file that is still written, or whose run was killed, may end within an event.
    if (!fill(record_.data(), record_.size())) return false;
    if (from_bytes<std::uint32_t>(std::string_view(record_).substr(length)) !=
        masked_crc32c(record_.data(), length))
      throw ImportError(file_.name() + ": event " + std::to_string(events_) + ": wrong checksum");
    const std::string place = file_.name() + ": event " + std::to_string(events_++);
    event_step_ = 0;
    for (Message event(std::string_view(record_).substr(0, length), place); event.next();) {
      if (event.field == 2) event_step_ = static_cast<std::int64_t>(event.number);
      if (event.field != 5) continue;
      for (Message summary(event.bytes, place); summary.next();) {
        if (summary.field == 1) read_value(summary.bytes, place);
      }
    }
    if (event_step_ < 0 || event_step_ > kLargestWhole)
      throw ImportError(place + ": step: expected a number from 0 to 2^53");
    return true;
  }

  void read_value(std::string_view bytes, const std::string& place) {
    std::string_view tag;
    std::optional<double> number;
    for (Message value(bytes, place); value.next();) {
      if (value.field == 1) tag = value.bytes;
      if (value.field == 2) number = std::bit_cast<float>(from_bytes<std::uint32_t>(value.bytes));
      if (value.field != 8) continue;
      // TensorFlow 2 writes scalars as tensors: type 1 is float, 2 double; content, or a list of one number.
      std::uint64_t type = 0;
      for (Message tensor(value.bytes, place); tensor.next();) {
        if (tensor.field == 1) type = tensor.number;
        if ((tensor.field == 4 && type == 1 && tensor.bytes.size() == 4) ||
            (tensor.field == 5 && tensor.bytes.size() == 4))
          number = std::bit_cast<float>(from_bytes<std::uint32_t>(tensor.bytes));
        if ((tensor.field == 4 && type == 2 && tensor.bytes.size() == 8) ||
            (tensor.field == 6 && tensor.bytes.size() == 8))
          number = std::bit_cast<double>(from_bytes<std::uint64_t>(tensor.bytes));
      }
    }
    if (!number || !metric_.wants(tag)) return;
    const auto key = key_of(tag);
    if (!key) return;
    metric_.add(*key, file_.name());
    any_ = true;
    values_.emplace_back(*key, *number);
  }

  bool fill(char* to, std::size_t size) {
    while (size > 0) {
      const std::size_t got = file_.read(to, size);
      if (got == 0) return false;
      to += got;
      size -= got;
    }
    return true;
  }

  Bytes& file_;
  ImportNotes& notes_;
  Grid grid_;
  OneMetric metric_;
  std::string record_;
  std::vector<std::pair<ScalarKey, double>> values_;  // of the last event
  std::int64_t step_ = 0, event_step_ = 0, events_ = 0;
  bool any_ = false, taken_ = false;  // a value was found; a step was handed on
};

}  // namespace

std::unique_ptr<StepReader> open_wandb(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  return std::make_unique<WandbReader>(file, options, notes);
}
std::unique_ptr<StepReader> open_tensorboard(Bytes& file, const ImportOptions& options, ImportNotes& notes) {
  return std::make_unique<TensorBoardReader>(file, options, notes);
}

}  // namespace moectl
