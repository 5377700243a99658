// The layout is in docs/state-format.md.
#include "moectl/state.h"

#include <bit>
#include <cmath>

#include "base/format.h"
#include "base/printable.h"

namespace moectl {
namespace {

constexpr std::string_view kMagic = "moectlst";
constexpr std::uint32_t kVersion = 3;
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
    case 's':
      return "a section";
    default:
      return "an unknown type";
  }
}

std::string quoted(std::string_view text) {
  constexpr std::size_t kLongest = 64;
  std::string out = "'";
  for (const char c : text.substr(0, kLongest)) out += c >= ' ' && c <= '~' ? c : '?';
  return out + (text.size() > kLongest ? "…'" : "'");
}

std::string shown(double x) {
  return exact(x);
}
std::string shown(std::int64_t x) {
  return std::to_string(x);
}

std::string expected(const NumberRange& range) {
  return shown(range.least) + " to " + shown(range.most);
}
std::string expected(const IntegerRange& range) {
  return shown(range.least) + " to " + shown(range.most);
}

bool inside(double x, const NumberRange& range) {
  return (x >= range.least && x <= range.most) || (range.may_be_nan && std::isnan(x));
}
bool inside(std::int64_t x, const IntegerRange& range) {
  return x >= range.least && x <= range.most;
}

std::size_t size_of(char type) {
  return type == 'd' || type == 'i' ? 8 : 1;
}

}  // namespace

StateError::StateError(const std::string& what) : std::runtime_error(message_line(what)) {}

void StateIo::fail(std::string_view what, std::string_view expected, std::string_view found) const {
  throw StateError("state: " + path_ + std::string(what) + ": expected " + std::string(expected) +
                   ", found " + std::string(found));
}

// The elements of an entry.
template <class T, class Range>
void StateIo::take(std::string_view name, std::string_view data, std::span<T> values,
                   const Range& range) const {
  for (std::size_t i = 0; i < values.size(); ++i) {
    const T x = std::bit_cast<T>(read<std::uint64_t>(data.substr(8 * i)));
    if (!inside(x, range)) {
      std::string where = quoted(name);
      if (values.size() > 1) where.append("[").append(std::to_string(i)).append("]");
      fail(where, expected(range), shown(x));
    }
    values[i] = x;
  }
}

StateIo::StateIo(std::string_view bytes) : reads_(true) {
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

StateIo::Entry StateIo::take_entry(std::string_view& rest, std::string_view wanted) const {
  const auto take = [&](std::size_t bytes) {
    if (rest.size() < bytes) {
      fail(quoted(wanted), std::to_string(bytes) + " more bytes",
           std::to_string(rest.size()) + " (malformed)");
    }
    const std::string_view taken = rest.substr(0, bytes);
    rest.remove_prefix(bytes);
    return taken;
  };
  Entry entry{};
  entry.name = take(read<std::uint32_t>(take(4)));
  entry.type = take(1)[0];
  entry.count = read<std::uint64_t>(take(8));
  const std::size_t most = rest.size() / size_of(entry.type);
  if (entry.count > most) {
    fail(quoted(wanted), "at most " + std::to_string(most) + " elements",
         std::to_string(entry.count) + " (malformed)");
  }
  entry.data = take(static_cast<std::size_t>(entry.count) * size_of(entry.type));
  return entry;
}

std::string_view StateIo::next_entry(std::string_view name, char type, std::size_t count) {
  const std::string wanted = quoted(name);
  if (rest_.empty()) fail(wanted, "an entry", "the end of the state");
  std::string_view rest = rest_;
  const Entry entry = take_entry(rest, name);
  if (entry.name != name) fail(wanted, "this entry", "entry " + quoted(entry.name));
  if (entry.type != type) fail(wanted, type_name(type), type_name(entry.type));
  if (count != kAnyCount && count != entry.count) {
    fail(wanted, std::to_string(count) + " elements", std::to_string(entry.count));
  }
  rest_ = rest;
  return entry.data;
}

void StateIo::add_section(std::string_view name, std::string_view body) {
  begin_entry(name, 's', body.size());
  body_.append(body);
}

StateIo StateIo::next_section(std::string_view name) {
  return {next_entry(name, 's', kAnyCount), path_ + std::string(name) + ": "};
}

std::optional<StateIo> StateIo::find(std::string_view name) const {
  for (std::string_view rest = rest_; !rest.empty();) {
    const Entry entry = take_entry(rest, name);
    if (entry.name == name && entry.type == 's') return StateIo(entry.data, path_ + std::string(name) + ": ");
  }
  return std::nullopt;
}

std::vector<std::string> StateIo::names() const {
  std::vector<std::string> names;
  for (std::string_view rest = rest_; !rest.empty();) names.emplace_back(take_entry(rest, "entry").name);
  return names;
}

void StateIo::begin_entry(std::string_view name, char type, std::size_t count) {
  append(body_, static_cast<std::uint32_t>(name.size()));
  body_.append(name);
  body_.push_back(type);
  append(body_, static_cast<std::uint64_t>(count));
}

template <class T>
void StateIo::write(std::string_view name, char type, std::span<const T> x, T most) {
  begin_entry(name, type, x.size());
  for (const T value : x) append(body_, std::bit_cast<std::uint64_t>(value > most ? most : value));
}

void StateIo::value(std::string_view name, bool& x) {
  std::int64_t number = x ? 1 : 0;
  value(name, number, {0, 1});
  x = number != 0;
}

void StateIo::values(std::string_view name, std::span<double> x, NumberRange range) {
  if (!reads_) return write<double>(name, 'd', x, kAnyNumber.most);
  take(name, next_entry(name, 'd', x.size()), x, range);
}

void StateIo::values(std::string_view name, std::span<std::int64_t> x, IntegerRange range) {
  if (!reads_)
    return write<std::int64_t>(name, 'i', x, range.most == kMostCount ? kMostCount : kAnyInteger.most);
  take(name, next_entry(name, 'i', x.size()), x, range);
}

void StateIo::list(std::string_view name, std::vector<double>& x, NumberRange range) {
  if (!reads_) return write<double>(name, 'd', x, kAnyNumber.most);
  const std::string_view data = next_entry(name, 'd', kAnyCount);
  x.resize(data.size() / 8);
  take(name, data, std::span<double>(x), range);
}

void StateIo::list(std::string_view name, std::vector<std::int64_t>& x, IntegerRange range) {
  if (!reads_) return values(name, std::span(x), range);
  const std::string_view data = next_entry(name, 'i', kAnyCount);
  x.resize(data.size() / 8);
  take(name, data, std::span<std::int64_t>(x), range);
}

void StateIo::text(std::string_view name, std::string& x) {
  if (reads_) {
    x = next_entry(name, 't', kAnyCount);
    return;
  }
  begin_entry(name, 't', x.size());
  body_.append(x);
}

void StateIo::check(bool good, std::string_view name, std::string_view constraint) const {
  if (reads_ && !good)
    throw StateError("state: " + path_ + quoted(name) + ": must " + std::string(constraint));
}

std::string StateIo::bytes() const {
  std::string out(kMagic);
  append(out, kVersion);
  append(out, static_cast<std::uint64_t>(body_.size()));
  append(out, checksum(body_));
  return out + body_;
}

void StateIo::finish() const {
  if (rest_.empty()) return;
  std::string_view found;
  if (rest_.size() >= 4) found = rest_.substr(4, read<std::uint32_t>(rest_));
  fail("end", "no further entry", "entry " + quoted(found));
}

}  // namespace moectl
