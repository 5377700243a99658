// Streams of bytes, plain or gzip, file or pipe; lines and .npy arrays in them. Nothing is held beyond a buffer.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/input_file.h"
#include "base/line_buffer.h"

namespace moectl {

class ByteStream {
 public:
  virtual ~ByteStream() = default;
  /// Up to `size` bytes; 0 at the end.
  virtual std::size_t read(char* to, std::size_t size) = 0;
};

/// A file, `-` for standard input; gzip by its content. Throws ImportError.
class Bytes : public ByteStream {
 public:
  explicit Bytes(const std::string& path, std::string name = "");

  std::size_t read(char* to, std::size_t size) override;
  /// The next bytes, at most 64 KiB, without taking them; fewer at the end.
  std::string_view peek(std::size_t size);
  /// The next line without its end; false at the end. The view holds until the next call, and 64 bytes after it can be
  /// read. A line longer than 32 MiB is an error.
  bool line(std::string_view& text);
  std::int64_t line_number() const { return line_; }
  const std::string& name() const { return name_; }
  /// "file:line"
  std::string place() const { return name_ + ':' + std::to_string(line_); }

 private:
  bool fill();

  std::string name_;
  InputFile file_;
  LineBuffer buffer_;
  std::int64_t line_ = 0;
};

/// Bytes in memory.
class MemoryStream : public ByteStream {
 public:
  explicit MemoryStream(std::string_view bytes) : bytes_(bytes) {}
  std::size_t read(char* to, std::size_t size) override;

 private:
  std::string_view bytes_;
};

/// An array of numpy's .npy format, value by value (numpy.lib.format, versions 1 to 3).
class NpyReader {
 public:
  /// Reads the header. Throws ImportError if this is no array of numbers in C order.
  NpyReader(ByteStream& stream, std::string name);
  const std::vector<std::int64_t>& shape() const { return shape_; }
  bool is_float() const { return kind_ == 'f'; }
  /// "[3, 2, 8] of uint8", for messages.
  std::string description() const;
  /// The next values, in order.
  void read(std::span<double> out);
  void read(std::span<std::int64_t> out);

 private:
  template <typename Out>
  void read_as(std::span<Out> out);

  ByteStream& stream_;
  std::string name_;
  std::vector<std::int64_t> shape_;
  std::int64_t left_ = 0;
  char kind_ = 'i';
  std::size_t size_ = 8;
  bool swapped_ = false;
  std::vector<char> raw_;
};

/// The entries of a .npz file (a zip archive), one after another.
class NpzReader {
 public:
  explicit NpzReader(Bytes& file);
  ~NpzReader();
  /// The next entry, valid until the next call; null at the end.
  ByteStream* next(std::string& name);

 private:
  class Entry;
  Bytes& file_;
  std::unique_ptr<Entry> entry_;
};

/// Bytes of base64 text; throws ImportError with `place`.
std::string decode_base64(std::string_view text, const std::string& place);

}  // namespace moectl
