#include "config/config_yaml.h"

#include <yaml-cpp/eventhandler.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <sstream>
#include <utility>

#include "base/utf8.h"
#include "control/config_check.h"

namespace moectl {
namespace {

Place place_of(const YAML::Mark& mark) {
  if (mark.is_null()) return {};
  return {mark.line + 1, mark.column + 1};
}

/// A value as a message shows it: one line, of bounded length.
std::string shown(const YAML::Node& node) {
  switch (node.Type()) {
    case YAML::NodeType::Map:
      return "{...}";
    case YAML::NodeType::Sequence:
      return "[...]";
    case YAML::NodeType::Scalar: {
      std::string text = node.Scalar().substr(0, 60);
      for (char& c : text) {
        if (static_cast<unsigned char>(c) < ' ') c = ' ';
      }
      if (node.Scalar().size() > text.size()) text += "...";
      return node.Tag() == "!" ? '"' + text + '"' : text;
    }
    default:
      return "(empty)";
  }
}

// yaml-cpp says "?" for what carries no tag and "!" for a quoted scalar. All else was written by hand (`!!int
// x`) and would mean what we do not implement.
bool has_explicit_tag(const YAML::Node& node) {
  return !node.Tag().empty() && node.Tag() != "?" && node.Tag() != "!";
}

bool is_plain(const YAML::Node& node) {
  return node.IsScalar() && node.Tag() != "!";
}

/// Each parse returns what is wrong, or nullptr. Not yaml-cpp's conversions: those read 010 as eight, take
/// the digits of a quoted string for a number and know nothing of ranges.
const char* parse(const YAML::Node& node, double& out) {
  static const char* const kWrong = "must be a number";
  if (!is_plain(node)) return kWrong;
  std::string_view text = node.Scalar();
  if (text.starts_with('+')) text.remove_prefix(1);
  if (text.empty() || text.starts_with('+')) return kWrong;
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::result_out_of_range) return "must be a number that a double can hold";
  if (error != std::errc() || end != text.data() + text.size()) {
    return text == ".inf" || text == "-.inf" || text == ".nan" ? "must be finite" : kWrong;
  }
  if (!std::isfinite(value)) return "must be finite";
  out = value;
  return nullptr;
}

const char* parse(const YAML::Node& node, std::int64_t& out) {
  static const char* const kWrong = "must be a whole number";
  if (!is_plain(node)) return kWrong;
  std::string_view text = node.Scalar();
  if (text.starts_with('+')) text.remove_prefix(1);
  const std::string_view digits = text.starts_with('-') ? text.substr(1) : text;
  if (digits.empty() ||
      !std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    return kWrong;
  }
  if (digits.size() > 1 && digits.front() == '0') {
    return "must be a decimal number without leading zeros (octal in some readers of YAML)";
  }
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size()
             ? nullptr
             : "must be a whole number of at most 63 bits";
}

const char* parse(const YAML::Node& node, int& out) {
  std::int64_t wide = 0;
  if (const char* wrong = parse(node, wide)) return wrong;
  if (wide < std::numeric_limits<int>::min() || wide > std::numeric_limits<int>::max()) {
    return "must be a whole number of at most 31 bits";
  }
  out = static_cast<int>(wide);
  return nullptr;
}

const char* parse(const YAML::Node& node, bool& out) {
  if (is_plain(node)) {
    // YAML 1.1's words, in its three spellings each; without its y and n, which are names of variables as
    // well.
    for (const char* word : {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"}) {
      if (node.Scalar() == word) return out = true, nullptr;
    }
    for (const char* word : {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"}) {
      if (node.Scalar() == word) return out = false, nullptr;
    }
  }
  return "must be true or false (also on, off, yes, no)";
}

const char* parse(const YAML::Node& node, std::string& out) {
  if (!node.IsScalar()) return "must be a word";
  if (node.Scalar().empty()) return "must not be empty";
  out = node.Scalar();
  return nullptr;
}

/// Hears a text once before it is loaded, and stops at a second document. Not LoadAll: before a bracket that
/// closes nothing, yaml-cpp 0.7 makes empty documents until memory is full.
class OneDocument : public YAML::EventHandler {
 public:
  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents_ > 1)
      throw YAML::ParserException(mark, "a second document or stray text follows the first");
  }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark&, const std::string&, YAML::anchor_t, const std::string&) override {}
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t,
                       YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {
  }
  void OnMapEnd() override {}

 private:
  int documents_ = 0;
};

}  // namespace

YamlFile::YamlFile(std::string_view text, std::string name) : name_(std::move(name)) {
  if (const std::size_t bad = find_not_utf8(text); bad != std::string_view::npos) {
    // Columns count characters, as yaml-cpp's do.
    const std::string_view before = text.substr(0, bad);
    const std::size_t line = before.rfind('\n') + 1;  // 0 in the first
    const auto starts = [](char c) { return (c & 0xc0) != 0x80; };
    const Place place{static_cast<int>(std::count(before.begin(), before.end(), '\n')) + 1,
                      static_cast<int>(std::count_if(before.begin() + static_cast<std::ptrdiff_t>(line),
                                                     before.end(), starts)) +
                          1};
    constexpr char kDigits[] = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(text[bad]);
    throw error(place, {"encoding", std::string("byte 0x") + kDigits[byte >> 4] + kDigits[byte & 15],
                        "must be UTF-8"});
  }
  try {
    std::istringstream stream{std::string(text)};
    YAML::Parser parser(stream);
    OneDocument listener;
    while (parser.HandleNextDocument(listener)) {
    }
    root_ = YAML::Load(std::string(text));
  } catch (const YAML::Exception& e) {
    throw error(place_of(e.mark), {"syntax", "not YAML", e.msg});
  } catch (const std::exception& e) {
    throw error(Place{}, {"syntax", "not YAML", e.what()});
  }
  if (root_.IsNull()) throw error(Place{}, {"file", "(empty)", "must be a map of keys"});
  if (!root_.IsMap() || has_explicit_tag(root_)) {
    throw error(place_of(root_.Mark()), {"file", shown(root_), "must be a map of keys"});
  }
}

YamlMap YamlFile::root() {
  return {*this, "", root_, place_of(root_.Mark())};
}

ConfigError YamlFile::error(Place place, const ConfigProblem& problem) const {
  std::ostringstream text;
  text << name_ << ':' << place.line << ':' << place.column << ": " << problem.key << ": " << problem.value
       << ": " << problem.constraint;
  return ConfigError(text.str());
}

ConfigError YamlFile::error(const ConfigProblem& problem) const {
  for (std::string path = problem.key;;) {
    if (const auto it = places_.find(path); it != places_.end()) return error(it->second, problem);
    const std::size_t cut = path.find_last_of(".[");
    if (cut == std::string::npos) return error(place_of(root_.Mark()), problem);
    path.resize(cut);
  }
}

YamlMap::YamlMap(YamlFile& file, std::string path, const YAML::Node& node, Place place)
    : file_(file), path_(std::move(path)), place_(place) {
  for (const auto& item : node) {
    const Place at = place_of(item.first.Mark());
    if (!item.first.IsScalar() || has_explicit_tag(item.first)) {
      throw file_.error(at, {path_to(shown(item.first)), shown(item.second), "keys must be plain words"});
    }
    const std::string& key = item.first.Scalar();
    if (has_explicit_tag(item.second)) {
      throw file_.error(at, {path_to(key), item.second.Tag(), "must carry no tag"});
    }
    // An empty value's own mark is where the parser noticed, somewhere below.
    Entry entry{at, item.second.IsNull() ? at : place_of(item.second.Mark()), item.second};
    file_.places_[path_to(key)] = entry.place;
    if (const auto it = entries_.find(key); it != entries_.end()) {
      throw file_.error(at, {path_to(key), shown(item.second),
                             "given twice, first in line " + std::to_string(it->second.key_place.line)});
    }
    order_.push_back(key);
    entries_.emplace(key, std::move(entry));
  }
}

std::string YamlMap::path_to(std::string_view key) const {
  return path_.empty() ? std::string(key) : path_ + '.' + std::string(key);
}

const YamlMap::Entry* YamlMap::find(std::string_view key) {
  if (std::find(asked_.begin(), asked_.end(), key) == asked_.end()) asked_.emplace_back(key);
  const auto it = entries_.find(key);
  return it == entries_.end() ? nullptr : &it->second;
}

bool YamlMap::has(std::string_view key) const {
  return entries_.find(key) != entries_.end();
}

bool YamlMap::is_list(std::string_view key) const {
  const auto it = entries_.find(key);
  return it != entries_.end() && it->second.value.IsSequence();
}

bool YamlMap::is_word(std::string_view key) const {
  const auto it = entries_.find(key);
  if (it == entries_.end() || !it->second.value.IsScalar() || it->second.value.Scalar().empty()) return false;
  // What looks like a number is a wrong one, and no name of a file.
  const char first = it->second.value.Scalar().front();
  return std::string_view("+-.0123456789").find(first) == std::string_view::npos ||
         it->second.value.Scalar().find('/') != std::string::npos;
}

ConfigError YamlMap::error(std::string_view key, std::string value, std::string constraint) const {
  return file_.error({path_to(key), std::move(value), std::move(constraint)});
}

template <typename T>
bool YamlMap::read_scalar(std::string_view key, T& out) {
  const Entry* entry = find(key);
  if (!entry) return false;
  if (const char* wrong = parse(entry->value, out)) throw error(key, shown(entry->value), wrong);
  return true;
}

bool YamlMap::read(std::string_view key, bool& out) {
  return read_scalar(key, out);
}
bool YamlMap::read(std::string_view key, int& out) {
  return read_scalar(key, out);
}
bool YamlMap::read(std::string_view key, std::int64_t& out) {
  return read_scalar(key, out);
}
bool YamlMap::read(std::string_view key, double& out) {
  return read_scalar(key, out);
}
bool YamlMap::read(std::string_view key, std::string& out) {
  return read_scalar(key, out);
}

template <typename T>
bool YamlMap::read_list(std::string_view key, std::vector<T>& out) {
  const Entry* entry = find(key);
  if (!entry) return false;
  const YAML::Node& list = entry->value;
  if (!list.IsSequence()) throw error(key, shown(list), "must be a list");
  std::vector<T> values(list.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::string path = path_to(key) + '[' + std::to_string(i) + ']';
    file_.places_[path] = place_of(list[i].Mark());
    const char* wrong = has_explicit_tag(list[i]) ? "must carry no tag" : parse(list[i], values[i]);
    if (wrong) throw file_.error({path, shown(list[i]), wrong});
  }
  out = std::move(values);
  return true;
}

bool YamlMap::read(std::string_view key, std::vector<int>& out) {
  return read_list(key, out);
}
bool YamlMap::read(std::string_view key, std::vector<double>& out) {
  return read_list(key, out);
}
bool YamlMap::read(std::string_view key, std::vector<std::string>& out) {
  return read_list(key, out);
}

YamlMap* YamlMap::inner(std::string path, const YAML::Node& node, Place place) {
  std::unique_ptr<YamlMap>& map = inner_[path];
  if (!map) map.reset(new YamlMap(file_, std::move(path), node, place));
  return map.get();
}

YamlMap* YamlMap::map(std::string_view key) {
  const Entry* entry = find(key);
  if (!entry) return nullptr;
  if (!entry->value.IsMap())
    throw error(key, shown(entry->value), "must be a map of keys, {} if there are none");
  return inner(path_to(key), entry->value, entry->place);
}

std::vector<YamlMap*> YamlMap::maps(std::string_view key) {
  const Entry* entry = find(key);
  if (!entry) return {};
  const YAML::Node& list = entry->value;
  if (!list.IsSequence()) throw error(key, shown(list), "must be a list of maps");
  std::vector<YamlMap*> maps;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const std::string path = path_to(key) + '[' + std::to_string(i) + ']';
    const Place place = place_of(list[i].Mark());
    file_.places_[path] = place;
    if (!list[i].IsMap() || has_explicit_tag(list[i])) {
      throw file_.error({path, shown(list[i]), "must be a map of keys"});
    }
    maps.push_back(inner(path, list[i], place));
  }
  return maps;
}

YamlMap* YamlMap::map_or_switch(std::string_view key, bool& out) {
  const Entry* entry = find(key);
  if (!entry) return nullptr;
  if (entry->value.IsMap()) {
    out = true;
    return map(key);
  }
  if (parse(entry->value, out))
    throw error(key, shown(entry->value), "must be off, on, or a map of its options");
  return nullptr;
}

void YamlMap::finish() const {
  for (const std::string& key : order_) {
    if (std::find(asked_.begin(), asked_.end(), key) != asked_.end()) continue;
    const Entry& entry = entries_.find(key)->second;
    const std::string near = did_you_mean(key, asked_);
    const std::string known = asked_.empty() ? "; none is known here" : "; known are " + listed(asked_);
    throw file_.error(entry.key_place,
                      {path_to(key), shown(entry.value), "unknown key" + (near.empty() ? known : near)});
  }
  for (const auto& [path, map] : inner_) map->finish();
  for (const std::string& key : required_) {
    if (!has(key)) throw file_.error(place_, {path_to(key), "missing", "required"});
  }
}

}  // namespace moectl
