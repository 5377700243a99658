#include "log/json.h"

#include <algorithm>

#include "base/input_limits.h"

namespace moectl {
namespace {

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

/// Whole numbers of 19 digits or more with ".0" behind them. A double of 2^64 or more may be written with all its
/// digits and no exponent; simdjson takes such a number only as a fraction.
void widen(std::string_view text, std::string& out) {
  out.clear();
  bool in_string = false;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t start = at;
    if (in_string || !is_digit(text[at])) {
      if (text[at] == '"') in_string = !in_string;
      at += in_string && text[at] == '\\' ? 2 : 1;
      out.append(text.substr(start, at - start));
      continue;
    }
    while (at < text.size() && is_digit(text[at])) ++at;
    out.append(text.substr(start, at - start));
    const char before = start > 0 ? text[start - 1] : ' ', after = at < text.size() ? text[at] : ' ';
    const bool whole = std::string_view(".eE+").find(before) == std::string_view::npos &&
                       std::string_view(".eE").find(after) == std::string_view::npos &&
                       !(before == '-' && start > 1 && (text[start - 2] | ' ') == 'e');
    if (whole && at - start >= 19) out.append(".0");
  }
}

}  // namespace

JsonParser::JsonParser() {
  if (parser_.allocate(std::size_t{1} << 16, kMostLevels)) throw std::bad_alloc();
}

void JsonParser::parse(std::string_view text) {
  value_ = JsonValue();
  // What a text editor may put in front.
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  simdjson::dom::element root;
  const simdjson::error_code first = parser_.parse(text.data(), text.size(), false).get(root);
  simdjson::error_code error = first;
  if (first && first != simdjson::DEPTH_ERROR && first != simdjson::UTF8_ERROR) {
    widen(text, widened_);
    if (widened_.size() > text.size()) error = parser_.parse(widened_).get(root);
  }
  if (error == simdjson::DEPTH_ERROR)
    throw JsonError("nested deeper than " + std::to_string(kMostLevels) + " levels");
  if (error) throw JsonError(simdjson::error_message(error));
  refuse_repeated_keys(JsonValue(root));
  value_ = root;
}

void JsonParser::refuse_repeated_keys(JsonValue value) {
  if (value.is_object()) {
    refuse_repeated_keys(value.members());
  } else if (value.is_array()) {
    for (const JsonValue element : value.elements()) refuse_repeated_keys(element);
  }
}

void JsonParser::refuse_repeated_keys(simdjson::dom::object object) {
  keys_.clear();
  for (const auto member : object) {
    if (member.key.size() > kLongestWord) {
      throw JsonError("a key of " + std::to_string(member.key.size()) + " bytes: must be at most " +
                      std::to_string(kLongestWord));
    }
    keys_.push_back(member.key);
  }
  const auto refuse = [](std::string_view key) {
    throw JsonError("key \"" + std::string(key) + "\" stands twice in one object");
  };
  constexpr std::size_t kSlots = 256;
  if (keys_.size() <= kSlots / 2) {
    // A table of hashes, open: the number of a key, from 1.
    std::array<std::uint8_t, kSlots> slots{};
    for (std::size_t k = 0; k < keys_.size(); ++k) {
      const std::string_view key = keys_[k];
      std::size_t slot = key.size() * 7;
      for (const char c : key) slot = slot * 31 + static_cast<unsigned char>(c);
      for (slot %= kSlots; slots[slot] != 0; slot = (slot + 1) % kSlots) {
        if (keys_[slots[slot] - 1U] == key) refuse(key);
      }
      slots[slot] = static_cast<std::uint8_t>(k + 1);
    }
  } else {
    std::ranges::sort(keys_);
    const auto found = std::ranges::adjacent_find(keys_);
    if (found != keys_.end()) refuse(*found);
  }
  for (const auto member : object) refuse_repeated_keys(JsonValue(member.value));
}

}  // namespace moectl
