// Layout, all integers little-endian:
//   "moectlst"  u32 version  u64 length of the body  u64 checksum of the body  body
// The body is a row of entries:
//   u32 length of the name  name  u8 type ('d' doubles, 'i' int64, 't' text)  u64 count of elements  elements

#include "moectl/state.h"

#include <bit>
#include <cstdint>
#include <limits>

namespace moectl {
namespace {

constexpr std::string_view kMagic = "moectlst";
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHeaderSize = 8 + 4 + 8 + 8;

template <class Integer>
void append(std::string& to, Integer value) {
  for (std::size_t i = 0; i < sizeof(Integer); ++i)
    to.push_back(static_cast<char>((value >> (8 * i)) & 0xff));
}

/// `bytes` must hold at least sizeof(Integer).
template <class Integer>
Integer read(std::string_view bytes) {
  Integer value = 0;
  for (std::size_t i = 0; i < sizeof(Integer); ++i) {
    value |= static_cast<Integer>(static_cast<Integer>(static_cast<unsigned char>(bytes[i])) << (8 * i));
  }
  return value;
}

/// Eight bytes a round of the finaliser of MurmurHash3, which spreads every bit of the input over all of the
/// output; the length, which the header holds, is checked apart.
std::uint64_t checksum(std::string_view bytes) {
  std::uint64_t hash = 0x9e3779b97f4a7c15;
  const auto take = [&hash](std::uint64_t word) {
    hash ^= word;
    hash = (hash ^ (hash >> 33)) * 0xff51afd7ed558ccd;
    hash = (hash ^ (hash >> 33)) * 0xc4ceb9fe1a85ec53;
    hash ^= hash >> 33;
  };
  while (bytes.size() >= 8) {
    take(read<std::uint64_t>(bytes));
    bytes.remove_prefix(8);
  }
  if (!bytes.empty()) {
    std::string last(bytes);
    last.resize(8, '\0');
    take(read<std::uint64_t>(last));
  }
  return hash;
}

std::string_view type_name(char type) {
  switch (type) {
    case 'd':
      return "numbers";
    case 'i':
      return "integers";
    case 't':
      return "text";
    default:
      return "an unknown type";
  }
}

[[noreturn]] void fail(std::string_view what, std::string_view expected, std::string_view found) {
  throw StateError("state: " + std::string(what) + ": expected " + std::string(expected) + ", found " +
                   std::string(found));
}

std::string quoted(std::string_view text) {
  constexpr std::size_t kLongest = 64;
  std::string out = "'";
  for (const char c : text.substr(0, kLongest)) out += c >= ' ' && c <= '~' ? c : '?';
  return out + (text.size() > kLongest ? "…'" : "'");
}

}  // namespace

void StateWriter::entry(std::string_view name, char type, std::size_t count) {
  append(body_, static_cast<std::uint32_t>(name.size()));
  body_.append(name);
  body_.push_back(type);
  append(body_, static_cast<std::uint64_t>(count));
}

void StateWriter::put(std::string_view name, std::span<const double> values) {
  entry(name, 'd', values.size());
  for (const double value : values) append(body_, std::bit_cast<std::uint64_t>(value));
}

void StateWriter::put(std::string_view name, std::span<const std::int64_t> values) {
  entry(name, 'i', values.size());
  for (const std::int64_t value : values) append(body_, static_cast<std::uint64_t>(value));
}

void StateWriter::put(std::string_view name, std::string_view text) {
  entry(name, 't', text.size());
  body_.append(text);
}

std::string StateWriter::finish() const {
  std::string out(kMagic);
  append(out, kVersion);
  append(out, static_cast<std::uint64_t>(body_.size()));
  append(out, checksum(body_));
  return out + body_;
}

StateReader::StateReader(std::string_view bytes) {
  if (bytes.size() < kHeaderSize) {
    fail("header", std::to_string(kHeaderSize) + " bytes", std::to_string(bytes.size()));
  }
  if (bytes.substr(0, kMagic.size()) != kMagic)
    fail("format", quoted(kMagic), quoted(bytes.substr(0, kMagic.size())));
  bytes.remove_prefix(kMagic.size());
  const auto version = read<std::uint32_t>(bytes);
  if (version != kVersion) fail("version", std::to_string(kVersion), std::to_string(version));
  bytes.remove_prefix(4);
  const auto length = read<std::uint64_t>(bytes);
  bytes.remove_prefix(8);
  const auto sum = read<std::uint64_t>(bytes);
  bytes.remove_prefix(8);
  if (bytes.size() != length) {
    fail("length", std::to_string(length) + " bytes",
         std::to_string(bytes.size()) + " (truncated or altered)");
  }
  if (const std::uint64_t found = checksum(bytes); found != sum) {
    fail("checksum", std::to_string(sum), std::to_string(found) + " (the file was altered)");
  }
  rest_ = bytes;
}

std::string_view StateReader::entry(std::string_view name, char type, std::size_t size, std::size_t* count) {
  const std::string wanted = quoted(name);
  if (rest_.empty()) fail(wanted, "an entry", "the end of the state");
  std::string_view rest = rest_;
  const auto take = [&](std::size_t bytes) {
    if (rest.size() < bytes) {
      fail(wanted, std::to_string(bytes) + " more bytes", std::to_string(rest.size()) + " (malformed)");
    }
    const std::string_view taken = rest.substr(0, bytes);
    rest.remove_prefix(bytes);
    return taken;
  };
  const std::string_view found_name = take(read<std::uint32_t>(take(4)));
  if (found_name != name) fail(wanted, "this entry", "entry " + quoted(found_name));
  const char found_type = take(1)[0];
  if (found_type != type) fail(wanted, type_name(type), type_name(found_type));
  const auto found_count = read<std::uint64_t>(take(8));
  if (found_count > rest.size() / size) {
    fail(wanted, "at most " + std::to_string(rest.size() / size) + " elements",
         std::to_string(found_count) + " (malformed)");
  }
  const std::string_view data = take(static_cast<std::size_t>(found_count) * size);
  if (*count != kAnyCount && *count != found_count) {
    fail(wanted, std::to_string(*count) + " elements", std::to_string(found_count));
  }
  *count = static_cast<std::size_t>(found_count);
  rest_ = rest;
  return data;
}

void StateReader::get(std::string_view name, std::span<double> values) {
  std::size_t count = values.size();
  std::string_view data = entry(name, 'd', 8, &count);
  for (double& value : values) {
    value = std::bit_cast<double>(read<std::uint64_t>(data));
    data.remove_prefix(8);
  }
}

void StateReader::get(std::string_view name, std::span<std::int64_t> values) {
  std::size_t count = values.size();
  std::string_view data = entry(name, 'i', 8, &count);
  for (std::int64_t& value : values) {
    value = static_cast<std::int64_t>(read<std::uint64_t>(data));
    data.remove_prefix(8);
  }
}

double StateReader::get_double(std::string_view name) {
  double value = 0;
  get(name, std::span<double>(&value, 1));
  return value;
}

std::int64_t StateReader::get_int(std::string_view name) {
  std::int64_t value = 0;
  get(name, std::span<std::int64_t>(&value, 1));
  return value;
}

std::string StateReader::get_text(std::string_view name) {
  std::size_t count = kAnyCount;
  return std::string(entry(name, 't', 1, &count));
}

void StateReader::finish() const {
  if (rest_.empty()) return;
  std::string_view found;
  if (rest_.size() >= 4) found = rest_.substr(4, read<std::uint32_t>(rest_));
  fail("end", "no further entry", "entry " + quoted(found));
}

}  // namespace moectl
