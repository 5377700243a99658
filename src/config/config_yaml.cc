#include "config/config_yaml.h"

#include <yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <new>
#include <sstream>
#include <utility>

#include "base/input_limits.h"
#include "base/printable.h"
#include "base/utf8.h"
#include "control/config_check.h"

namespace moectl {
namespace {

using Kind = YamlNode::Kind;

Place place_of(const yaml_mark_t& mark) {
  return {static_cast<int>(mark.line) + 1, static_cast<int>(mark.column) + 1};
}

/// Of a byte of the text. Columns count characters, as libyaml's do.
Place place_of(std::string_view text, std::size_t byte) {
  const std::string_view before = text.substr(0, byte);
  const std::size_t line = before.rfind('\n') + 1;  // 0 in the first
  const auto starts = [](char c) { return (c & 0xc0) != 0x80; };
  return {static_cast<int>(std::count(before.begin(), before.end(), '\n')) + 1,
          static_cast<int>(
              std::count_if(before.begin() + static_cast<std::ptrdiff_t>(line), before.end(), starts)) +
              1};
}

/// A value as a message shows it: one line, of bounded length.
std::string shown(const YamlNode& node) {
  if (node.kind == Kind::kMap) return "{...}";
  if (node.kind == Kind::kList) return "[...]";
  if (node.kind == Kind::kNull) return "(empty)";
  const std::string text = shown_briefly(node.text);
  return node.quoted ? '"' + text + '"' : text;
}

bool is_plain(const YamlNode& node) {
  return node.kind == Kind::kScalar && !node.quoted;
}

/// Each parse returns what is wrong, or nullptr. 010 is not eight, and the digits of a quoted string are
/// no number.
const char* parse(const YamlNode& node, double& out) {
  static const char* const kWrong = "must be a number";
  if (!is_plain(node)) return kWrong;
  std::string_view text = node.text;
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

const char* parse(const YamlNode& node, std::int64_t& out) {
  static const char* const kWrong = "must be a whole number";
  if (!is_plain(node)) return kWrong;
  std::string_view text = node.text;
  if (text.starts_with('+')) text.remove_prefix(1);
  const std::string_view digits = text.starts_with('-') ? text.substr(1) : text;
  if (digits.empty() ||
      !std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; })) {
    double real = 0;
    return parse(node, real) == nullptr && real == std::floor(real)
               ? "must be a whole number in digits alone, without point or exponent"
               : kWrong;
  }
  if (digits.size() > 1 && digits.front() == '0') {
    return "must be a decimal number without leading zeros (octal in some readers of YAML)";
  }
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), out);
  return error == std::errc() && end == text.data() + text.size()
             ? nullptr
             : "must be a whole number of at most 63 bits";
}

const char* parse(const YamlNode& node, int& out) {
  std::int64_t wide = 0;
  if (const char* wrong = parse(node, wide)) return wrong;
  if (wide < std::numeric_limits<int>::min() || wide > std::numeric_limits<int>::max()) {
    return "must be a whole number of at most 31 bits";
  }
  out = static_cast<int>(wide);
  return nullptr;
}

const char* parse(const YamlNode& node, bool& out) {
  // Quoted words as well: JSON has no others, and no key takes both a switch and a word.
  if (node.kind == Kind::kScalar) {
    // YAML 1.1's words, in its three spellings each; without its y and n, which are names of variables as
    // well.
    for (const char* word : {"true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON"}) {
      if (node.text == word) return out = true, nullptr;
    }
    for (const char* word : {"false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF"}) {
      if (node.text == word) return out = false, nullptr;
    }
  }
  return "must be true or false (also on, off, yes, no)";
}

const char* parse(const YamlNode& node, std::string& out) {
  if (node.kind != Kind::kScalar) return "must be a word";
  if (node.text.empty()) return "must not be empty";
  out = node.text;
  return nullptr;
}

/// What libyaml hears, one event after another.
class Events {
 public:
  explicit Events(std::string_view text) {
    if (!yaml_parser_initialize(&parser_)) throw std::bad_alloc();
    yaml_parser_set_input_string(&parser_, reinterpret_cast<const unsigned char*>(text.data()), text.size());
  }
  ~Events() {
    yaml_event_delete(&event_);
    yaml_parser_delete(&parser_);
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;

  /// The next one, valid until the next call; null at what is not YAML.
  const yaml_event_t* next() {
    yaml_event_delete(&event_);
    if (yaml_parser_parse(&parser_, &event_)) return &event_;
    if (parser_.error == YAML_MEMORY_ERROR) throw std::bad_alloc();
    return nullptr;
  }
  const yaml_parser_t& parser() const { return parser_; }

 private:
  yaml_parser_t parser_{};
  yaml_event_t event_{};
};

std::string words(const yaml_char_t* text) {
  return text ? reinterpret_cast<const char*>(text) : "";
}

bool is_null(std::string_view text) {
  return text.empty() || text == "~" || text == "null" || text == "Null" || text == "NULL";
}

}  // namespace

YamlFile::YamlFile(std::string_view text, std::string name) : name_(std::move(name)) {
  if (text.size() > kLargestConfig) {
    throw error(Place{}, {"file", std::to_string(text.size()) + " bytes",
                          "must be at most " + std::to_string(kLargestConfig)});
  }
  if (const std::size_t bad = find_not_utf8(text); bad != std::string_view::npos) {
    constexpr char kDigits[] = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(text[bad]);
    throw error(
        place_of(text, bad),
        {"encoding", std::string("byte 0x") + kDigits[byte >> 4] + kDigits[byte & 15], "must be UTF-8"});
  }
  // libyaml compares each %TAG with all before it: a large file of them would take hours.
  for (std::size_t at = text.find("%TAG"); at != std::string_view::npos; at = text.find("%TAG", at + 1)) {
    if (at == 0 || text[at - 1] == '\n' || text[at - 1] == '\r')
      throw error(place_of(text, at), {"syntax", "%TAG", "must not be there: a config has no tags"});
  }
  root_ = &nodes_.emplace_back();
  read(text);
  if (root_->kind == Kind::kNull) throw error(Place{}, {"file", "(empty)", "must be a map of keys"});
  if (root_->kind != Kind::kMap || !root_->tag.empty()) {
    throw error(root_->place, {"file", shown(*root_), "must be a map of keys"});
  }
}

void YamlFile::read(std::string_view text) {
  const auto wrong = [&](Place place, std::string why) {
    return error(place, {"syntax", "not YAML", std::move(why)});
  };
  Events events(text);
  std::map<std::string, const YamlNode*> anchors;
  struct Open {
    YamlNode* node;
    std::size_t before;  // nodes of the file before it
  };
  std::vector<Open> open;  // the lists and maps around what comes next
  std::size_t nodes = 0;   // so far; an alias is as many as what it stands for
  const auto put = [&](const YamlNode& node, Place place, std::size_t more) {
    if (more > kMostNodes - nodes) {
      throw error(place, {"file", "more than " + std::to_string(kMostNodes) + " values, lists and maps",
                          "must be at most that many, each as often as aliases repeat it"});
    }
    nodes += more;
    open.empty() ? void(root_ = &node) : open.back().node->items.push_back(&node);
  };
  const auto begin = [&](YamlNode& node) {
    node.nodes = 0;
    open.push_back({&node, nodes - 1});
  };
  const auto add = [&](const yaml_event_t& event, Kind kind, const yaml_char_t* anchor,
                       const yaml_char_t* tag) -> YamlNode& {
    YamlNode& node = nodes_.emplace_back();
    node.kind = kind;
    node.place = place_of(event.start_mark);
    node.tag = words(tag);
    if (anchor) anchors[words(anchor)] = &node;
    if (open.size() >= kMostLevels) {
      throw wrong(node.place,
                  "nested too deeply: must be at most " + std::to_string(kMostLevels) + " levels");
    }
    put(node, node.place, 1);
    return node;
  };
  for (int documents = 0;;) {
    const yaml_event_t* event = events.next();
    if (!event) {
      const yaml_parser_t& parser = events.parser();
      const std::string within = parser.context ? std::string(" (") + parser.context + ')' : "";
      throw wrong(parser.error == YAML_READER_ERROR ? place_of(text, parser.problem_offset)
                                                    : place_of(parser.problem_mark),
                  parser.problem + within);
    }
    switch (event->type) {
      case YAML_DOCUMENT_START_EVENT:
        if (++documents > 1) throw wrong(place_of(event->start_mark), "a second document follows the first");
        break;
      case YAML_SCALAR_EVENT: {
        const auto& scalar = event->data.scalar;
        if (scalar.length > kLongestWord) {
          throw wrong(place_of(event->start_mark), "a word of " + std::to_string(scalar.length) +
                                                       " bytes: must be at most " +
                                                       std::to_string(kLongestWord));
        }
        YamlNode& node = add(*event, Kind::kScalar, scalar.anchor, scalar.tag);
        node.text.assign(reinterpret_cast<const char*>(scalar.value), scalar.length);
        node.quoted = scalar.style != YAML_PLAIN_SCALAR_STYLE;
        if (is_plain(node) && is_null(node.text)) node.kind = Kind::kNull;
        break;
      }
      case YAML_SEQUENCE_START_EVENT:
        begin(add(*event, Kind::kList, event->data.sequence_start.anchor, event->data.sequence_start.tag));
        break;
      case YAML_MAPPING_START_EVENT:
        begin(add(*event, Kind::kMap, event->data.mapping_start.anchor, event->data.mapping_start.tag));
        break;
      case YAML_SEQUENCE_END_EVENT:
      case YAML_MAPPING_END_EVENT:
        open.back().node->nodes = nodes - open.back().before;
        open.pop_back();
        break;
      case YAML_ALIAS_EVENT: {
        const auto anchor = anchors.find(words(event->data.alias.anchor));
        if (anchor == anchors.end())
          throw wrong(place_of(event->start_mark), "no anchor of this name stands before it");
        if (anchor->second->nodes == 0)
          throw wrong(place_of(event->start_mark), "an alias within what it stands for");
        put(*anchor->second, place_of(event->start_mark), anchor->second->nodes);
        break;
      }
      case YAML_STREAM_END_EVENT:
        return;
      default:
        break;
    }
  }
}

YamlMap YamlFile::root() {
  return {*this, "", *root_, root_->place};
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
    if (cut == std::string::npos) return error(root_->place, problem);
    path.resize(cut);
  }
}

YamlMap::YamlMap(YamlFile& file, std::string path, const YamlNode& node, Place place)
    : file_(file), path_(std::move(path)), place_(place) {
  for (std::size_t i = 0; i + 1 < node.items.size(); i += 2) {
    const YamlNode &name = *node.items[i], &value = *node.items[i + 1];
    const Place at = name.place;
    if (name.kind != Kind::kScalar || !name.tag.empty()) {
      throw file_.error(at, {path_to(shown(name)), shown(value), "keys must be plain words"});
    }
    const std::string& key = name.text;
    if (!value.tag.empty()) throw file_.error(at, {path_to(key), value.tag, "must carry no tag"});
    // An empty value's own mark is where the parser noticed, somewhere below.
    Entry entry{at, value.kind == Kind::kNull ? at : value.place, &value};
    file_.places_[path_to(key)] = entry.place;
    if (const auto it = entries_.find(key); it != entries_.end()) {
      throw file_.error(at, {path_to(key), shown(value),
                             "given twice, first in line " + std::to_string(it->second.key_place.line)});
    }
    order_.push_back(key);
    entries_.emplace(key, entry);
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
  return it != entries_.end() && it->second.value->kind == Kind::kList;
}

bool YamlMap::is_word(std::string_view key) const {
  const auto it = entries_.find(key);
  if (it == entries_.end() || it->second.value->kind != Kind::kScalar) return false;
  const std::string& text = it->second.value->text;
  if (text.empty()) return false;
  // What looks like a number is a wrong one, and no name of a file. The names are those of JSON writers.
  if (text == "NaN" || text == "nan" || text == "Infinity" || text == "inf") return false;
  return std::string_view("+-.0123456789").find(text.front()) == std::string_view::npos ||
         text.find('/') != std::string::npos;
}

ConfigError YamlMap::error(std::string_view key, std::string value, std::string constraint) const {
  return file_.error({path_to(key), std::move(value), std::move(constraint)});
}

template <typename T>
bool YamlMap::read_scalar(std::string_view key, T& out) {
  const Entry* entry = find(key);
  if (!entry) return false;
  if (const char* wrong = parse(*entry->value, out)) throw error(key, shown(*entry->value), wrong);
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
  const YamlNode& list = *entry->value;
  if (list.kind != Kind::kList) throw error(key, shown(list), "must be a list");
  std::vector<T> values(list.items.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::string path = path_to(key) + '[' + std::to_string(i) + ']';
    const YamlNode& item = *list.items[i];
    file_.places_[path] = item.place;
    const char* wrong = !item.tag.empty() ? "must carry no tag" : parse(item, values[i]);
    if (wrong) throw file_.error({path, shown(item), wrong});
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

YamlMap* YamlMap::inner(std::string path, const YamlNode& node, Place place) {
  std::unique_ptr<YamlMap>& map = inner_[path];
  if (!map) map.reset(new YamlMap(file_, std::move(path), node, place));
  return map.get();
}

YamlMap* YamlMap::map(std::string_view key) {
  const Entry* entry = find(key);
  if (!entry) return nullptr;
  if (entry->value->kind != Kind::kMap)
    throw error(key, shown(*entry->value), "must be a map of keys, {} if there are none");
  return inner(path_to(key), *entry->value, entry->place);
}

std::vector<YamlMap*> YamlMap::maps(std::string_view key) {
  const Entry* entry = find(key);
  if (!entry) return {};
  const YamlNode& list = *entry->value;
  if (list.kind != Kind::kList) throw error(key, shown(list), "must be a list of maps");
  std::vector<YamlMap*> maps;
  for (std::size_t i = 0; i < list.items.size(); ++i) {
    const std::string path = path_to(key) + '[' + std::to_string(i) + ']';
    const YamlNode& item = *list.items[i];
    file_.places_[path] = item.place;
    if (item.kind != Kind::kMap || !item.tag.empty()) {
      throw file_.error({path, shown(item), "must be a map of keys"});
    }
    maps.push_back(inner(path, item, item.place));
  }
  return maps;
}

YamlMap* YamlMap::map_or_switch(std::string_view key, bool& out) {
  const Entry* entry = find(key);
  if (!entry) return nullptr;
  if (entry->value->kind == Kind::kMap) {
    out = true;
    return map(key);
  }
  if (parse(*entry->value, out))
    throw error(key, shown(*entry->value), "must be off, on, or a map of its options");
  return nullptr;
}

void YamlMap::finish() const {
  for (const std::string& key : order_) {
    if (std::find(asked_.begin(), asked_.end(), key) != asked_.end()) continue;
    const Entry& entry = entries_.find(key)->second;
    const std::string near = did_you_mean(key, asked_);
    const std::string known = asked_.empty() ? "; none is known here" : "; known are " + listed(asked_);
    throw file_.error(entry.key_place,
                      {path_to(key), shown(*entry.value), "unknown key" + (near.empty() ? known : near)});
  }
  for (const auto& [path, map] : inner_) map->finish();
  for (const std::string& key : required_) {
    if (!has(key)) throw file_.error(place_, {path_to(key), "missing", "required"});
  }
}

}  // namespace moectl
