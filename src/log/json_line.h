// One line of JSON, for readers of long logs: a line is parsed into memory that the next one uses again. What is
// accepted, and what it means, is what nlohmann's parser says: anything but the plain case is left to it.
#pragma once

#include <nlohmann/json.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace moectl {

/// A value of the line that was parsed last. The members of an object and the elements of an array follow it in memory,
/// each with all of its own.
class JsonNode {
 public:
  enum class Kind : std::uint8_t {
    kNull,
    kBoolean,
    kUnsigned,
    kNegative,
    kNumber,
    kString,
    kArray,
    kObject,
    kDeep
  };

  bool is_null() const { return kind_ == Kind::kNull; }
  bool is_string() const { return kind_ == Kind::kString; }
  bool is_array() const { return kind_ == Kind::kArray; }
  bool is_object() const { return kind_ == Kind::kObject; }
  /// Written without a fraction or an exponent, and within 64 bits.
  bool is_integer() const { return kind_ == Kind::kUnsigned || kind_ == Kind::kNegative; }
  bool is_number() const { return is_integer() || kind_ == Kind::kNumber; }
  bool is_unsigned() const { return kind_ == Kind::kUnsigned; }

  std::uint64_t as_unsigned() const { return number_.u; }
  std::int64_t as_integer() const { return number_.i; }
  double as_double() const;
  std::string_view text() const { return text_; }

  /// The name of a member of an object.
  std::string_view key() const { return key_; }
  /// Of an array or an object.
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  /// Null if there is none.
  const JsonNode* find(std::string_view key) const;
  /// As JSON, with the members of objects in order; what lies too deep to be looked into as "...".
  std::string dump() const;

  class Iterator {
   public:
    explicit Iterator(const JsonNode* at) : at_(at) {}
    const JsonNode& operator*() const { return *at_; }
    Iterator& operator++() {
      at_ += at_->span_;
      return *this;
    }
    bool operator==(const Iterator&) const = default;

   private:
    const JsonNode* at_;
  };
  Iterator begin() const { return Iterator(this + 1); }
  Iterator end() const { return Iterator(this + span_); }

 private:
  friend class JsonLine;

  union {
    std::uint64_t u;
    std::int64_t i;
    double d;
  } number_{};
  std::string_view key_, text_;               // of strings their text, else the JSON
  const nlohmann::json* original_ = nullptr;  // where nlohmann's parser made it
  std::uint32_t size_ = 0, span_ = 1;         // children; nodes with all below
  Kind kind_ = Kind::kNull;
};

class JsonLine {
 public:
  /// Throws nlohmann::json::exception if the text is not JSON; the value then is null. The text must live as long as the value is used.
  void parse(std::string_view text);
  const JsonNode& value() const { return nodes_.front(); }

 private:
  bool parse_plain(std::string_view text);
  bool read_value(int depth);
  bool read_number(JsonNode& node);
  bool read_string(std::string_view& out);
  bool read_members(std::size_t at, int depth);
  void skip_space();
  void convert(nlohmann::json& value, std::string_view key, int depth);

  std::vector<JsonNode> nodes_ = std::vector<JsonNode>(1);
  nlohmann::json original_;
  const char *at_ = nullptr, *end_ = nullptr;
};

}  // namespace moectl
