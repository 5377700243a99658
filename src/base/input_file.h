// A file to read, plain or gzip, or standard input.
#pragma once

#include <zlib.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moectl {

/// Gzip is known by its first two bytes; members that follow one another are read as one text, and what stands behind the
/// last one is skipped, as gzip does. zlib's own gzread is not used: from version 1.3.2 it takes a file that was torn
/// within a member for a whole one.
class InputFile {
 public:
  /// `-` is standard input. Where the file cannot be opened, fault() says why.
  explicit InputFile(const std::string& path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  /// Up to `size` bytes, as soon as there are some; 0 at the end, at which it may be asked again of a file that grows, and
  /// at a fault.
  std::size_t read(char* to, std::size_t size);
  /// Why nothing more can be read; empty if nothing is wrong.
  const std::string& fault() const { return fault_; }
  /// The end that read() came to lies within a gzip member.
  bool torn() const { return in_member_; }
  /// Bytes of the file itself that were read.
  std::int64_t offset() const { return offset_; }
  int descriptor() const { return descriptor_; }

 private:
  std::size_t pull(char* to, std::size_t size);
  bool pull_two();
  std::size_t inflate_some(char* to, std::size_t size);

  int descriptor_ = -1;
  std::string fault_;
  bool known_ = false;  // whether it is gzip
  bool gzip_ = false, in_member_ = false, ended_ = false;
  z_stream zip_{};
  std::vector<char> packed_;  // what zip_ has not taken yet: avail_in bytes from next_in
  std::int64_t offset_ = 0, inflated_ = 0;
};

}  // namespace moectl
