// Bytes that were read and not taken yet, and the lines in them.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

#include "base/input_limits.h"

namespace moectl {

class LineBuffer {
 public:
  static constexpr std::size_t kFirst = std::size_t{1} << 18;
  /// So many bytes behind what it hands out can be read, as simdjson wants.
  static constexpr std::size_t kPadding = 64;

  /// What was read; the view holds until the next call of room().
  std::string_view held() const { return {bytes_.data() + begin_, end_ - begin_}; }
  void take(std::size_t size) { begin_ += size; }
  /// Where more can be read to; empty if a line without an end is as long as a line may be.
  std::span<char> room() {
    if (begin_ > 0) {
      std::memmove(bytes_.data(), bytes_.data() + begin_, end_ - begin_);
      end_ -= begin_;
      begin_ = 0;
    }
    if (end_ == bytes_.size() - kPadding) {
      if (end_ >= kLongestLine) return {};
      bytes_.resize(end_ * 2 + kPadding);
    }
    return std::span(bytes_).subspan(end_, bytes_.size() - kPadding - end_);
  }
  void added(std::size_t size) { end_ += size; }

  /// The next line without its end, or what stands behind the last one; false if there is nothing more. `fill` reads more,
  /// and returns false at the end.
  template <class Fill>
  bool line(std::string_view& text, bool& complete, Fill&& fill) {
    for (std::size_t searched = 0;;) {
      const std::size_t at = held().find('\n', searched);
      const bool whole = at != std::string_view::npos;
      if (!whole) {
        searched = held().size();
        if (fill()) continue;
        if (held().empty()) return false;
      }
      text = held().substr(0, at);
      take(text.size() + (whole ? 1 : 0));
      complete = whole;
      return true;
    }
  }

 private:
  std::vector<char> bytes_ = std::vector<char>(kFirst + kPadding);
  std::size_t begin_ = 0, end_ = 0;
};

}  // namespace moectl
