// Files of lines → one record after another: pieces, damage, what is missing, and what is still being written.
#include <algorithm>
#include <filesystem>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/input_limits.h"
#include "log/log_lines.h"
#include "log/log_record.h"
#include "moectl/run_log.h"

namespace moectl {
namespace {

using nlohmann::json;

/// Which (step, layer, tag) have been seen. Files come in the order of the steps, so one number a record is enough.
class Seen {
 public:
  /// Throws LogError on a layer whose experts or k change, and on more layers than a model has, with counts or without:
  /// whoever reads on takes memory for each.
  void add_layer(const LogLine& here, const LogRecord& record) {
    const RoutingStats& stats = record.stats;
    const std::string layer = "layer " + std::to_string(record.layer);
    const auto same = [&](const char* field, int now, int& before, const char* what) {
      if (before == 0) before = now;
      if (now != before) {
        here.fail(field, std::to_string(now) + what,
                  "must be " + std::to_string(before) + ", as in the lines of " + layer + " before");
      }
    };
    const auto entry = steps_.find({record.layer, record.tag});
    const bool is_new = entry == steps_.end(), first_counts = is_new || entry->second.experts == 0;
    // Records of the whole model are no layers, but take memory by their tags as well.
    std::int64_t& counted = record.layer < 0 ? models_ : layers_;
    const std::int64_t layers = counted + (is_new ? 1 : 0);
    const std::int64_t cells = cells_ + (first_counts ? stats.experts() : 0);
    if (layers > kMostLayers || cells > kMostLayersTimesExperts) {
      here.fail("layer",
                std::to_string(layers) + " layers and tags, " + std::to_string(cells) + " experts in all",
                "must be at most " + std::to_string(kMostLayers) + " and " +
                    std::to_string(kMostLayersTimesExperts));
    }
    counted = layers;
    cells_ = cells;
    Steps& steps = is_new ? steps_[{record.layer, record.tag}] : entry->second;
    if (stats.experts() == 0) return;
    same("counts", stats.experts(), steps.experts, " values");
    same("top_k", stats.top_k(), steps.top_k, "");
    // A later record may have more arrays than the first.
    const auto more =
        std::max<std::int64_t>(static_cast<std::int64_t>(stats.flat().size()) - steps.numbers, 0);
    if (more > kMostNumbers - numbers_) {
      here.fail("layer", std::to_string(numbers_ + more) + " numbers in the sums of all layers and tags",
                "must be at most " + std::to_string(kMostNumbers));
    }
    numbers_ += more;
    steps.numbers += more;
  }
  bool add(const LogRecord& record) {
    Steps& steps = steps_[{record.layer, record.tag}];
    if (steps.ordered.empty() || record.step > steps.ordered.back()) {
      steps.ordered.push_back(record.step);
      return true;
    }
    return !std::binary_search(steps.ordered.begin(), steps.ordered.end(), record.step) &&
           steps.late.insert(record.step).second;
  }

 private:
  struct Steps {
    std::vector<std::int64_t> ordered;
    std::set<std::int64_t> late;
    int experts = 0, top_k = 0;
    std::int64_t numbers = 0;
  };
  std::map<std::pair<int, std::string>, Steps> steps_;
  std::int64_t layers_ = 0, models_ = 0, cells_ = 0, numbers_ = 0;
};

/// Finds steps that are missing between others. The distance of steps is the smallest seen; before it has held
/// for a few steps nothing is said, since a trace may be sampled as its writer likes.
class Holes {
 public:
  /// The last step before a hole that ends at `step`, if there is one.
  std::optional<std::int64_t> add(std::int64_t step) {
    constexpr int kRegular = 8;
    if (!last_ || step <= *last_) {
      last_ = std::max(last_.value_or(step), step);
      return std::nullopt;
    }
    const std::int64_t distance = step - *last_, before = *last_;
    last_ = step;
    if (spacing_ > 0 && distance > spacing_) {
      if (regular_ >= kRegular) return before;
      regular_ = 0;
    } else {
      regular_ = distance == spacing_ ? regular_ + 1 : 1;
      spacing_ = distance;
    }
    return std::nullopt;
  }
  std::int64_t spacing() const { return spacing_; }

 private:
  std::optional<std::int64_t> last_;
  std::int64_t spacing_ = 0;
  int regular_ = 0;
};

/// What happened to a file, as against what its writer should not have written.
class Damage : public LogError {
 public:
  using LogError::LogError;
};

/// "step 3", "steps 3 to 7".
std::string range_of(const std::string& word, std::int64_t from, std::int64_t to) {
  if (from >= to) return word + ' ' + std::to_string(from);
  return word + "s " + std::to_string(from) + " to " + std::to_string(to);
}

static_assert(LogLines::kPadding >= JsonParser::kPadding);

/// Pieces of one log differ in their number alone.
json without_number(const LogLine& header) {
  const std::string text = header.object.dump();
  header.require_values("line", text);
  json object = json::parse(text);
  object.erase("piece");
  return object;
}

}  // namespace

struct LogReader::File {
  /// What a config says of the records.
  struct Config {
    Config() = default;
    explicit Config(LogHeader of_line) : header(std::move(of_line)), groups(groups_of(header)) {}
    LogHeader header;
    LayerGroups groups;
  };

  File(const std::string& p, FaultPolicy policy, std::function<bool()> f)
      : path(p), fault_policy(policy), follow(std::move(f)) {
    open(path);
    read_first();
    find_pieces();
  }

  void open(const std::string& file) {
    // A finished piece does not grow.
    lines = std::make_unique<LogLines>(file, file == path ? follow : std::function<bool()>());
  }

  /// The next line that is not blank, as an object.
  bool next_object() {
    std::string_view text;
    try {
      do {
        if (!lines->next(text)) return false;
      } while (text.find_first_not_of(" \t\r") == std::string_view::npos);
      parsed.parse(text);
    } catch (const LogError& e) {
      throw Damage(e.what());
    } catch (const JsonError& e) {
      throw Damage(lines->name() + ':' + std::to_string(lines->number()) + ": line: not JSON: " + e.what() +
                   (lines->complete() ? "" : " (the file ends within this line)"));
    }
    if (!object().is_object()) {
      try {
        line().reject("line", object(), "must be a JSON object");
      } catch (const LogError& e) {
        throw Damage(e.what());
      }
    }
    return true;
  }
  const JsonValue& object() const { return parsed.value(); }
  bool is_header() const { return object().find("format").has_value(); }
  LogLine line() const { return {lines->name(), lines->number(), object()}; }

  void take_header(LogHeader of_file) { first = Config(std::move(of_file)); }

  /// The first line of the file: a header, or a record of a trace without one.
  void read_first() {
    try {
      if (!next_object()) return;
      if (!is_header()) {
        first_is_record = true;
        return;
      }
      take_header(read_header(line()));
    } catch (const LogError& e) {
      pass_over(e, true);
      if (!is_header()) return;
      // Of another version, what is named and formed as in this one is read.
      take_header(read_header(line(), true));
      other_version = true;
    }
    first_line = without_number(line());
  }

  /// Begins with the oldest piece that is left of a rotated log.
  void find_pieces() {
    if (first.header.piece <= 1 || path == "-") return;
    std::int64_t oldest = first.header.piece;
    while (oldest > 1 && std::filesystem::exists(piece_path(path, oldest - 1))) --oldest;
    if (oldest > 1 && fault_policy != FaultPolicy::kStrict) {
      note("missing: " + path + ": " + range_of("piece", 1, oldest - 1) + " of the log");
    }
    for (std::int64_t piece = oldest; piece < first.header.piece; ++piece)
      pending.push_back(piece_path(path, piece));
    if (pending.empty()) return;
    pending.push_back(path);
    first.header.piece = oldest - 1;
    next_piece();
  }

  /// Opens the next piece, or the new file that took the place of the one that was followed.
  bool next_piece() {
    if (pending.empty()) {
      if (!lines->replaced()) return false;
      const std::int64_t read = first.header.piece;
      open(path);
      read_header_again();
      // It may have been rotated more than once since; the oldest pieces may be gone.
      std::int64_t oldest = first.header.piece;
      while (oldest - 1 > read && std::filesystem::exists(piece_path(path, oldest - 1))) --oldest;
      for (std::int64_t piece = oldest; piece < first.header.piece; ++piece)
        pending.push_back(piece_path(path, piece));
      if (pending.empty()) return true;
      pending.push_back(path);
      first.header.piece = read;
    }
    open(pending.front());
    pending.erase(pending.begin());
    read_header_again();
    return true;
  }

  /// The first line of a later piece, or of the run that took a followed one's place.
  void read_header_again() {
    try {
      if (!next_object()) return;
      if (!is_header()) {
        first_is_record = true;
        return;
      }
      const LogHeader next = read_header(line(), other_version);
      if (without_number(line()) == first_line && next.piece > first.header.piece) {
        first.header.piece = next.piece;
      } else {
        join();
      }
    } catch (const LogError& e) {
      pass_over(e, true);
    }
  }

  /// A header where a record should be, or a piece of something else.
  void join() {
    const std::string fault = lines->name() + ':' + std::to_string(lines->number()) +
                              ": format: " + object().find("format")->dump() +
                              ": must stand in the first line: two files were joined here";
    if (fault_policy == FaultPolicy::kStrict) throw Damage(fault);
    joined = true;
    if (follow) {
      // With `follow`, the caller wants the run that is being written now.
      take_header(read_header(line(), true));
      first_line = without_number(line());
      seen = Seen();
      layers.clear();
      changes.clear();
      changed.clear();
      config_bytes = 0;
      assumptions.rows.reset();
      holes = Holes();
      note("skipped: " + fault + "; a new run begins");
    } else if (without_number(line()) == first_line) {
      note("skipped: " + fault + "; the same run goes on, its repeated steps are skipped");
    } else {
      const std::int64_t from = lines->number();
      std::string_view text;
      while (lines->next(text)) continue;
      pending.clear();
      note("skipped: " + fault + "; another run begins, lines " + std::to_string(from) + " to " +
           std::to_string(lines->number()) + " are not of this one");
    }
  }

  /// Goes to the next line that is no header. False at the end.
  bool advance() {
    if (std::exchange(first_is_record, false)) return true;
    while (!next_object()) {
      if (!next_piece()) return false;
      if (std::exchange(first_is_record, false)) return true;
    }
    while (is_header()) {
      join();
      if (!next_object()) return false;
    }
    return true;
  }

  /// The next record, or nothing at the end.
  std::optional<LogRecord> read_next() {
    for (;;) {
      if (!advance()) return std::nullopt;
      if (!is_config_change(line(), first.header)) break;
      take_change(line());
    }
    const LogLine here = line();
    const Config& now = config_in_force();
    LogRecord record = read_record(here, now.header, now.groups, defaults, assumptions);
    record.config_json = now.header.config_json;
    if (record.layer >= 0 && first.header.layers && first.header.groups.empty() && !first.header.is_run)
      count_layer(here, record.layer);
    seen.add_layer(here, record);
    if (!seen.add(record)) {
      here.fail("step", std::to_string(record.step),
                "repeated for layer " + (record.layer < 0 ? "null" : std::to_string(record.layer)) +
                    ", tag " + record.tag);
    }
    if (fault_policy != FaultPolicy::kStrict && record.tag == "train") look_for_hole(record.step);
    return record;
  }

  void take_change(const LogLine& here) {
    ChangedConfig change = read_config_change(here);
    auto& config = change.header.config_json;
    // One that is read later takes the place of all that would come after it. Pieces of a log repeat the one that holds.
    bool known = false;
    const auto share = [&](const std::shared_ptr<const std::string>& other) {
      if (known || !other || *config != *other) return;
      config = other;
      known = true;
    };
    while (!changes.empty() && changes.back().step >= change.step) {
      share(changes.back().config_json);
      changes.pop_back();
    }
    changed.erase(changed.lower_bound(change.step), changed.end());
    const auto before = changes.empty() ? first.header.config_json : changes.back().config_json;
    share(before);
    if (!known) {
      config_bytes += config->size();
      if (config_bytes > kMostConfigs)
        here.fail("config", std::to_string(config_bytes) + " bytes of configs so far",
                  "must be at most " + std::to_string(kMostConfigs));
    }
    if (config != before) changes.push_back({change.step, config});
    changed.emplace(change.step, Config(std::move(change.header)));
  }

  /// The config that holds for the record of this line.
  const Config& config_in_force() const {
    const auto step = object().find("step");
    if (changed.empty() || !step || !step->is_number()) return first;
    const auto next =
        changed.upper_bound(static_cast<std::int64_t>(std::clamp(step->as_double(), -1.0, 0x1p53)));
    return next == changed.begin() ? first : std::prev(next)->second;
  }

  /// A trace names its layers as it likes, and has as many as its first line says.
  void count_layer(const LogLine& here, int layer) {
    if (layers.count(layer) > 0) return;
    if (std::ssize(layers) == *first.header.layers) {
      here.fail(
          "layer", std::to_string(layer),
          "must be one of " + std::to_string(*first.header.layers) + ", as many as the first line says");
    }
    layers.insert(layer);
  }

  void look_for_hole(std::int64_t step) {
    const auto before = holes.add(step);
    if (!before) return;
    note("missing: " + lines->name() + ':' + std::to_string(lines->number()) + ": " +
         range_of("step", *before + holes.spacing(), step - holes.spacing()));
  }

  /// Rethrows a fault that the policy does not skip, else notes it.
  void pass_over(const LogError& fault, bool damage) {
    if (fault_policy == FaultPolicy::kStrict || (fault_policy == FaultPolicy::kRepair && !damage))
      throw LogError(fault);
    note(std::string("skipped: ") + fault.what());
  }

  void note(std::string message) {
    constexpr std::size_t kKept = 20;
    if (faults.size() < kKept) faults.push_back(std::move(message));
    ++fault_count;
  }

  std::string path;
  FaultPolicy fault_policy;
  std::function<bool()> follow;
  std::unique_ptr<LogLines> lines;
  std::vector<std::string> pending;  // pieces still to be read
  JsonParser parsed;
  json first_line;
  Config first;  // of the first line
  LogDefaults defaults;
  Assumptions assumptions;
  std::set<int> layers;
  bool first_is_record = false;
  bool other_version = false, joined = false;
  std::vector<ConfigChange> changes;
  std::size_t config_bytes = 0;
  std::map<std::int64_t, Config> changed;  // by the first step that they hold for
  Seen seen;
  Holes holes;
  std::vector<std::string> faults;
  std::int64_t fault_count = 0;
};

LogReader::LogReader(const std::string& path, FaultPolicy fault_policy, std::function<bool()> follow)
    : file_(std::make_unique<File>(path, fault_policy, std::move(follow))) {}
LogReader::~LogReader() = default;
const LogHeader& LogReader::header() const {
  return file_->first.header;
}
const std::vector<ConfigChange>& LogReader::config_changes() const {
  return file_->changes;
}
void LogReader::set_defaults(const LogDefaults& defaults) {
  file_->defaults = defaults;
}
const std::vector<std::string>& LogReader::assumptions() const {
  return file_->assumptions.said();
}
const std::vector<std::string>& LogReader::faults() const {
  return file_->faults;
}
std::int64_t LogReader::fault_count() const {
  return file_->fault_count;
}

std::optional<LogRecord> LogReader::next() {
  File& file = *file_;
  for (;;) {
    try {
      return file.read_next();
    } catch (const Damage& e) {
      file.pass_over(e, true);
    } catch (const LogError& e) {
      // After a join steps repeat, and another version may form its records otherwise.
      file.pass_over(e, file.joined || file.other_version);
    }
    // A damaged gzip file cannot be read on; a damaged line was left behind.
    if (file.lines->broken() && !file.next_piece()) return std::nullopt;
  }
}

}  // namespace moectl
