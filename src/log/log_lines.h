// Lines of a file, plain or gzip, or of standard input.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/input_file.h"
#include "base/line_buffer.h"

namespace moectl {

class LogLines {
 public:
  static constexpr std::size_t kPadding = LineBuffer::kPadding;

  /// `-` is standard input. Throws LogError if the file cannot be opened. With `follow`, the end of a file
  /// that is still being written is waited at until another file stands under its name, it was cut short, or
  /// `follow`, which is called before each wait, says false; standard input ends when its writer does.
  explicit LogLines(const std::string& path, std::function<bool()> follow = {});

  /// The next line without its end; false at the end of the file. The view holds until the next call, and kPadding bytes
  /// after it can be read, as simdjson wants. Throws LogError on a damaged gzip file and on lines longer than any record
  /// can be.
  bool next(std::string_view& line);
  /// Number of the line that next() returned last, from 1.
  std::int64_t number() const { return number_; }
  /// False if the line that next() returned last was cut off before its end: only the last one can be.
  bool complete() const { return complete_; }
  /// Bytes (uncompressed) up to the end of that line.
  std::int64_t offset() const { return offset_; }
  /// True once next() has thrown at the end of a gzip file that was cut off, as a writer that was killed leaves it.
  bool torn() const { return torn_; }
  /// True once next() has thrown: there is nothing more to read.
  bool broken() const { return broken_; }
  const std::string& name() const { return name_; }
  /// True once a followed file ended because it was replaced or cut short: it may be opened again.
  bool replaced() const { return replaced_; }

 private:
  bool fill();
  std::size_t read_some(char* to, std::size_t size);
  bool was_replaced() const;

  std::string name_;
  std::function<bool()> follow_;
  InputFile file_;
  LineBuffer buffer_;
  std::int64_t number_ = 0, offset_ = 0;
  bool complete_ = true;
  bool broken_ = false;
  bool torn_ = false;
  bool replaced_ = false;
  bool finished_ = false;  // follow_ said that nothing more will be written
};

}  // namespace moectl
