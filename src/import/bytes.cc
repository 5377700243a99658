#include "import/bytes.h"

#include <algorithm>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <optional>
#include <utility>

#include "base/input_limits.h"
#include "import/import.h"

namespace moectl {
namespace {

constexpr std::int64_t kMostValues = std::int64_t{1} << 48;

/// Exactly `size` bytes.
void read_all(ByteStream& stream, char* to, std::size_t size, const std::string& name) {
  while (size > 0) {
    const std::size_t got = stream.read(to, size);
    if (got == 0) throw ImportError(name + ": ends too early");
    to += got;
    size -= got;
  }
}

template <typename T>
T little_endian(const char* bytes) {
  T value = 0;
  for (std::size_t i = sizeof(T); i-- > 0;)
    value = static_cast<T>(value << 8 | static_cast<unsigned char>(bytes[i]));
  return value;
}

/// IEEE half precision.
double half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const double size = exponent == 0    ? std::ldexp(mantissa, -24)
                      : exponent == 31 ? (mantissa ? std::nan("") : HUGE_VAL)
                                       : std::ldexp(1024 + mantissa, exponent - 25);
  return bits >> 15 ? -size : size;
}

/// What stands behind 'key': in the header of a .npy file, a literal of Python.
std::string_view entry_of(std::string_view header, std::string_view key) {
  const std::size_t at = header.find(key);
  if (at == std::string_view::npos) return {};
  header.remove_prefix(at + key.size());
  const std::size_t start = header.find_first_not_of("': ");
  return start == std::string_view::npos ? std::string_view() : header.substr(start);
}

}  // namespace

Bytes::Bytes(const std::string& path, std::string name)
    : name_(!name.empty() ? std::move(name)
            : path == "-" ? "<stdin>"
                          : path),
      file_(path) {
  if (!file_.fault().empty()) throw ImportError(name_ + ": cannot be opened: " + file_.fault());
}

bool Bytes::fill() {
  const std::span<char> room = buffer_.room();
  if (room.empty()) {
    throw ImportError(name_ + ':' + std::to_string(line_ + 1) + ": line: longer than " +
                      std::to_string(kLongestLine) + " bytes");
  }
  const std::size_t got = file_.read(room.data(), room.size());
  if (!file_.fault().empty()) throw ImportError(name_ + ": " + file_.fault());
  if (got == 0 && file_.torn()) throw ImportError(name_ + ": gzip: unexpected end of file");
  buffer_.added(got);
  return got > 0;
}

std::size_t Bytes::read(char* to, std::size_t size) {
  if (buffer_.held().empty() && !fill()) return 0;
  const std::string_view held = buffer_.held().substr(0, size);
  std::memcpy(to, held.data(), held.size());
  buffer_.take(held.size());
  return held.size();
}

std::string_view Bytes::peek(std::size_t size) {
  while (buffer_.held().size() < std::min(size, kLongestNpyHeader) && fill()) {
  }
  return buffer_.held().substr(0, size);
}

bool Bytes::line(std::string_view& text) {
  bool complete = true;
  if (!buffer_.line(text, complete, [this] { return fill(); })) return false;
  ++line_;
  if (text.ends_with('\r')) text.remove_suffix(1);
  if (line_ == 1 && text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  return true;
}

std::size_t MemoryStream::read(char* to, std::size_t size) {
  const std::size_t got = std::min(size, bytes_.size());
  std::memcpy(to, bytes_.data(), got);
  bytes_.remove_prefix(got);
  return got;
}

// ---- .npy ----

NpyReader::NpyReader(ByteStream& stream, std::string name) : stream_(stream), name_(std::move(name)) {
  char start[12];
  read_all(stream_, start, 8, name_);
  if (std::string_view(start, 6) != "\x93NUMPY") throw OtherFormat(name_ + ": not a .npy array");
  const std::size_t width = start[6] == 1 ? 2 : 4;
  read_all(stream_, start, width, name_);
  const std::size_t length =
      width == 2 ? little_endian<std::uint16_t>(start) : little_endian<std::uint32_t>(start);
  if (length > kLongestNpyHeader)
    throw ImportError(name_ + ": .npy header: " + std::to_string(length) + " bytes: must be at most " +
                      std::to_string(kLongestNpyHeader));
  std::string header(length, ' ');
  read_all(stream_, header.data(), length, name_);
  const std::string_view type = entry_of(header, "descr");
  if (type.size() < 3 || std::string_view("iufb").find(type[1]) == std::string_view::npos)
    throw ImportError(name_ + ": .npy array of " + std::string(type.substr(0, type.find('\''))) +
                      ": must hold whole numbers or floats");
  kind_ = type[1];
  size_ = static_cast<std::size_t>(type[2] - '0');
  if ((kind_ == 'f' && size_ == 1) || (size_ != 1 && size_ != 2 && size_ != 4 && size_ != 8))
    throw ImportError(name_ + ": .npy array of " + std::string(type.substr(0, 3)) +
                      ": must have 1, 2, 4 or 8 bytes a value");
  swapped_ = type[0] == '>';
  const std::string_view shape = entry_of(header, "shape");
  const std::string_view numbers = shape.substr(0, shape.find(')'));
  left_ = 1;
  bool none =
      false;  // an extent of 0: the others say nothing of the file's length, and yet how often readers turn
  for (std::size_t i = 0; i < numbers.size();) {
    std::int64_t extent = 0;
    const auto [end, error] = std::from_chars(numbers.data() + i, numbers.data() + numbers.size(), extent);
    if (error != std::errc()) {
      ++i;
      continue;
    }
    i = static_cast<std::size_t>(end - numbers.data());
    const std::int64_t factor = std::max<std::int64_t>(extent, 1);
    if (extent < 0 || shape_.size() == 8 || left_ > kMostValues / factor)
      throw ImportError(name_ + ": .npy shape: " + std::string(numbers.substr(0, 80)) +
                        "): must have at most 8 extents and 2^48 values");
    shape_.push_back(extent);
    left_ *= factor;
    none |= extent == 0;
  }
  if (none && left_ > kMostLayersTimesExperts)
    throw ImportError(name_ + ": .npy shape: " + description() +
                      ": holds no values: extents beside a 0 must make at most " +
                      std::to_string(kMostLayersTimesExperts));
  if (none) left_ = 0;
  if (entry_of(header, "fortran_order").starts_with("True") && shape_.size() > 1)
    throw ImportError(name_ + ": .npy array in Fortran order: save numpy.ascontiguousarray(array)");
}

std::string NpyReader::description() const {
  std::string text = "[";
  for (const std::int64_t extent : shape_) text += (text.size() > 1 ? ", " : "") + std::to_string(extent);
  const char* const kind = kind_ == 'f' ? "float" : kind_ == 'u' ? "uint" : kind_ == 'b' ? "bool" : "int";
  return text + "] of " + kind + (kind_ == 'b' ? "" : std::to_string(8 * size_));
}

template <typename Out>
void NpyReader::read_as(std::span<Out> out) {
  constexpr std::size_t kChunk = 8192;  // values
  if (static_cast<std::int64_t>(out.size()) > left_) throw ImportError(name_ + ": ends too early");
  left_ -= static_cast<std::int64_t>(out.size());
  for (std::size_t done = 0; done < out.size();) {
    const std::size_t n = std::min(kChunk, out.size() - done);
    raw_.resize(n * size_);
    read_all(stream_, raw_.data(), raw_.size(), name_);
    for (std::size_t i = 0; i < n; ++i) {
      char* at = raw_.data() + i * size_;
      if (swapped_) std::reverse(at, at + size_);
      const auto bits = size_ == 1   ? little_endian<std::uint8_t>(at)
                        : size_ == 2 ? little_endian<std::uint16_t>(at)
                        : size_ == 4 ? little_endian<std::uint32_t>(at)
                                     : little_endian<std::uint64_t>(at);
      if (kind_ == 'f') {
        const double value = size_ == 2 ? half(static_cast<std::uint16_t>(bits))
                             : size_ == 4
                                 ? static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(bits)))
                                 : std::bit_cast<double>(bits);
        out[done + i] = static_cast<Out>(value);
      } else if (kind_ == 'i') {
        const int unused = static_cast<int>(64 - 8 * size_);
        out[done + i] = static_cast<Out>(static_cast<std::int64_t>(bits << unused) >> unused);
      } else {
        out[done + i] = static_cast<Out>(bits);
      }
    }
    done += n;
  }
}

void NpyReader::read(std::span<double> out) {
  read_as(out);
}
void NpyReader::read(std::span<std::int64_t> out) {
  read_as(out);
}

// ---- .npz: APPNOTE.TXT of PKWARE, local file headers, stored or deflated. ----

class NpzReader::Entry : public ByteStream {
 public:
  Entry(Bytes& file, bool deflated, std::uint64_t packed)
      : file_(file), packed_(packed), whole_(packed), deflated_(deflated) {
    if (deflated_ && inflateInit2(&inflater_, -MAX_WBITS) != Z_OK) throw std::bad_alloc();
  }
  ~Entry() override {
    if (deflated_) inflateEnd(&inflater_);
  }
  Entry(const Entry&) = delete;
  Entry& operator=(const Entry&) = delete;

  std::size_t read(char* to, std::size_t size) override {
    if (!deflated_) return take(to, size);
    inflater_.next_out = reinterpret_cast<Bytef*>(to);
    inflater_.avail_out = static_cast<uInt>(std::min<std::size_t>(size, 1U << 30));
    const uInt wanted = inflater_.avail_out;
    while (inflater_.avail_out == wanted) {
      if (inflater_.avail_in == 0) {
        inflater_.next_in = reinterpret_cast<Bytef*>(input_);
        inflater_.avail_in = static_cast<uInt>(take(input_, sizeof input_));
      }
      const int code = inflate(&inflater_, Z_NO_FLUSH);
      if (code == Z_STREAM_END) break;
      if (code != Z_OK) throw ImportError(file_.name() + ": zip: damaged data");
    }
    const std::size_t got = wanted - inflater_.avail_out;
    inflated_ += static_cast<std::int64_t>(got);
    const auto taken = static_cast<std::int64_t>(whole_ - packed_);
    if (inflates_too_far(inflated_, taken)) {
      throw ImportError(file_.name() + ": zip: " + std::to_string(inflated_) + " bytes from " +
                        std::to_string(taken) + ": must be at most " + std::to_string(kMostInflation) +
                        " times its size beyond the first " + std::to_string(kFreelyInflated));
    }
    return got;
  }
  /// Passes over what was not read.
  void skip() {
    while (packed_ > 0 && take(input_, sizeof input_) > 0) {
    }
  }

 private:
  std::size_t take(char* to, std::size_t size) {
    const std::size_t got = file_.read(to, static_cast<std::size_t>(std::min<std::uint64_t>(size, packed_)));
    if (got == 0 && packed_ > 0) throw ImportError(file_.name() + ": zip: ends too early");
    packed_ -= got;
    return got;
  }

  Bytes& file_;
  std::uint64_t packed_, whole_;
  std::int64_t inflated_ = 0;
  bool deflated_;
  z_stream inflater_{};
  char input_[16384] = {};
};

NpzReader::NpzReader(Bytes& file) : file_(file) {}
NpzReader::~NpzReader() = default;

ByteStream* NpzReader::next(std::string& name) {
  if (entry_) entry_->skip();
  entry_.reset();
  char header[30];
  if (!file_.peek(4).starts_with("PK\x03\x04")) return nullptr;
  read_all(file_, header, sizeof header, file_.name());
  const auto flags = little_endian<std::uint16_t>(header + 6),
             method = little_endian<std::uint16_t>(header + 8);
  std::uint64_t packed = little_endian<std::uint32_t>(header + 18);
  name.assign(little_endian<std::uint16_t>(header + 26), ' ');
  std::string extra(little_endian<std::uint16_t>(header + 28), ' ');
  read_all(file_, name.data(), name.size(), file_.name());
  read_all(file_, extra.data(), extra.size(), file_.name());
  if (flags & 8 || flags & 1 || (method != 0 && method != 8))
    throw ImportError(file_.name() + ": zip: " + name +
                      ": must be written by numpy.savez or savez_compressed to a file");
  if (packed == 0xffffffff) {
    // The 64-bit sizes: first the whole, then the packed one.
    for (std::size_t at = 0; at + 4 <= extra.size();) {
      const auto id = little_endian<std::uint16_t>(extra.data() + at),
                 size = little_endian<std::uint16_t>(extra.data() + at + 2);
      if (id == 1 && size >= 16 && at + 20 <= extra.size())
        packed = little_endian<std::uint64_t>(extra.data() + at + 12);
      at += 4U + size;
    }
  }
  entry_ = std::make_unique<Entry>(file_, method == 8, packed);
  return entry_.get();
}

std::string decode_base64(std::string_view text, const std::string& place) {
  const auto digit = [](char c) -> int {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
  };
  std::string bytes;
  bytes.reserve(text.size() / 4 * 3);
  unsigned held = 0;
  int bits = 0;
  for (const char c : text) {
    if (c == '=') break;
    const int value = digit(c);
    if (value < 0) throw ImportError(place + ": not base64");
    held = (held << 6 | static_cast<unsigned>(value)) & 0xffff;
    if ((bits += 6) >= 8) bytes.push_back(static_cast<char>(held >> (bits -= 8)));
  }
  return bytes;
}

}  // namespace moectl
