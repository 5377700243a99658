#include "log/json_line.h"

#include <charconv>

namespace moectl {
namespace {

using nlohmann::json;

// No record is nested deeper than a few levels.
constexpr int kDeepest = 16;
// Nor does it have more members in one object: beyond, looking for a key that comes twice would take too long.
constexpr std::uint32_t kMostMembers = 1024;

bool is_digit(const char* at, const char* end) {
  return at != end && *at >= '0' && *at <= '9';
}

}  // namespace

double JsonNode::as_double() const {
  if (kind_ == Kind::kUnsigned) return static_cast<double>(number_.u);
  if (kind_ == Kind::kNegative) return static_cast<double>(number_.i);
  return number_.d;
}

const JsonNode* JsonNode::find(std::string_view key) const {
  for (const JsonNode& member : *this) {
    if (member.key_ == key) return &member;
  }
  return nullptr;
}

std::string JsonNode::dump() const {
  const auto written = [](const json& value) {
    return value.dump(-1, ' ', false, json::error_handler_t::replace);
  };
  if (original_) return written(*original_);
  return written(kind_ == Kind::kString ? json(text_) : json::parse(text_));
}

void JsonLine::parse(std::string_view text) {
  nodes_.clear();
  if (parse_plain(text)) return;
  nodes_.assign(1, JsonNode());
  original_ = json::parse(text);
  nodes_.clear();
  convert(original_, {}, 0);
}

bool JsonLine::parse_plain(std::string_view text) {
  at_ = text.data();
  end_ = at_ + text.size();
  skip_space();
  if (!read_value(0)) return false;
  skip_space();
  return at_ == end_;
}

void JsonLine::skip_space() {
  while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r' || *at_ == '\n')) ++at_;
}

/// Appends the value that begins here, with all below it.
bool JsonLine::read_value(int depth) {
  if (at_ == end_ || depth > kDeepest) return false;
  const std::size_t index = nodes_.size();
  JsonNode& node = nodes_.emplace_back();
  const char* const start = at_;
  const auto is_word = [&](std::string_view word) {
    if (static_cast<std::size_t>(end_ - at_) < word.size() || std::string_view(at_, word.size()) != word)
      return false;
    at_ += word.size();
    return true;
  };
  switch (*at_) {
    case '{':
    case '[':
      node.kind_ = *at_ == '{' ? JsonNode::Kind::kObject : JsonNode::Kind::kArray;
      ++at_;
      if (!read_members(index, depth)) return false;
      break;
    case '"':
      node.kind_ = JsonNode::Kind::kString;
      return read_string(node.text_);
    case 'n':
      if (!is_word("null")) return false;
      break;
    case 't':
    case 'f':
      node.kind_ = JsonNode::Kind::kBoolean;
      if (!is_word("true") && !is_word("false")) return false;
      break;
    default:
      if (!read_number(node)) return false;
  }
  nodes_[index].text_ = {start, static_cast<std::size_t>(at_ - start)};
  return true;
}

bool JsonLine::read_number(JsonNode& node) {
  const char* const start = at_;
  const char* at = at_;
  const bool negative = *at == '-';
  if (negative) ++at;
  if (!is_digit(at, end_)) return false;
  if (*at == '0' && is_digit(at + 1, end_)) return false;
  while (is_digit(at, end_)) ++at;
  bool whole = true;
  if (at != end_ && *at == '.') {
    whole = false;
    if (!is_digit(++at, end_)) return false;
    while (is_digit(at, end_)) ++at;
  }
  if (at != end_ && (*at == 'e' || *at == 'E')) {
    whole = false;
    ++at;
    if (at != end_ && (*at == '+' || *at == '-')) ++at;
    if (!is_digit(at, end_)) return false;
    while (is_digit(at, end_)) ++at;
  }
  std::from_chars_result result{};
  if (!whole) {
    node.kind_ = JsonNode::Kind::kNumber;
    result = std::from_chars(start, at, node.number_.d);
  } else if (negative) {
    node.kind_ = JsonNode::Kind::kNegative;
    result = std::from_chars(start, at, node.number_.i);
  } else {
    node.kind_ = JsonNode::Kind::kUnsigned;
    result = std::from_chars(start, at, node.number_.u);
  }
  at_ = at;
  // What is too large or too small is for nlohmann's parser to judge.
  return result.ec == std::errc() && result.ptr == at;
}

/// Printable ASCII without escapes.
bool JsonLine::read_string(std::string_view& out) {
  const char* const start = ++at_;
  while (at_ != end_ && *at_ != '"') {
    const auto byte = static_cast<unsigned char>(*at_++);
    if (byte < ' ' || byte > '~' || byte == '\\') return false;
  }
  if (at_ == end_) return false;
  out = {start, static_cast<std::size_t>(at_ - start)};
  ++at_;
  return true;
}

/// The rest of the array or object `index`.
bool JsonLine::read_members(std::size_t index, int depth) {
  const bool object = nodes_[index].kind_ == JsonNode::Kind::kObject;
  const char close = object ? '}' : ']';
  std::uint32_t size = 0;
  std::uint64_t seen = 0;  // a bit for each hash of a key
  skip_space();
  if (at_ != end_ && *at_ == close) {
    ++at_;
    return true;
  }
  for (;; ++size) {
    std::string_view key;
    if (object) {
      if (size == kMostMembers) return false;
      skip_space();
      if (at_ == end_ || *at_ != '"' || !read_string(key)) return false;
      skip_space();
      if (at_ == end_ || *at_ != ':') return false;
      ++at_;
      const auto byte = [](char c) { return std::size_t{static_cast<unsigned char>(c)}; };
      const std::size_t hash = key.empty() ? 0 : key.size() * 7 + byte(key.front()) * 3 + byte(key.back());
      const std::uint64_t bit = std::uint64_t{1} << (hash & 63);
      if (seen & bit) {
        // Of a key that comes twice, the last counts.
        for (std::size_t i = index + 1; i < nodes_.size(); i += nodes_[i].span_) {
          if (nodes_[i].key_ == key) return false;
        }
      }
      seen |= bit;
    }
    skip_space();
    const std::size_t child = nodes_.size();
    if (!read_value(depth + 1)) return false;
    nodes_[child].key_ = key;
    skip_space();
    if (at_ == end_) return false;
    if (*at_ == close) break;
    if (*at_++ != ',') return false;
  }
  ++at_;
  nodes_[index].size_ = size + 1;
  nodes_[index].span_ = static_cast<std::uint32_t>(nodes_.size() - index);
  return true;
}

void JsonLine::convert(json& value, std::string_view key, int depth) {
  const std::size_t index = nodes_.size();
  JsonNode& node = nodes_.emplace_back();
  node.key_ = key;
  node.original_ = &value;
  using Kind = JsonNode::Kind;
  switch (value.type()) {
    case json::value_t::boolean:
      node.kind_ = Kind::kBoolean;
      break;
    case json::value_t::number_unsigned:
      node.kind_ = Kind::kUnsigned;
      node.number_.u = value.get<std::uint64_t>();
      break;
    case json::value_t::number_integer:
      node.kind_ = Kind::kNegative;
      node.number_.i = value.get<std::int64_t>();
      break;
    case json::value_t::number_float:
      node.kind_ = Kind::kNumber;
      node.number_.d = value.get<double>();
      break;
    case json::value_t::string:
      node.kind_ = Kind::kString;
      node.text_ = value.get_ref<const std::string&>();
      break;
    case json::value_t::array:
    case json::value_t::object:
      if (depth > kDeepest) {
        // Nothing that is read lies there, and a line can be nested deeper than a stack is: dump() must not go there
        // either.
        node.kind_ = Kind::kDeep;
        value = "...";
        break;
      }
      node.kind_ = value.is_array() ? Kind::kArray : Kind::kObject;
      node.size_ = static_cast<std::uint32_t>(value.size());
      if (value.is_array()) {
        for (json& element : value) convert(element, {}, depth + 1);
      } else {
        for (auto it = value.begin(); it != value.end(); ++it) convert(it.value(), it.key(), depth + 1);
      }
      nodes_[index].span_ = static_cast<std::uint32_t>(nodes_.size() - index);
      break;
    default:
      break;
  }
}

}  // namespace moectl
