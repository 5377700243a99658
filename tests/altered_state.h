// A saved state whose numbers were altered and whose checksum was made to fit again: what only the checks of the
// classes that read it can find.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace moectl::testing {

/// `body` behind a header that fits it, of state version `version`.
inline std::string with_state_header(const std::string& body, std::uint32_t version = 3) {
  const auto word = [](const std::string& bytes, std::size_t at) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < 8 && at + i < bytes.size(); ++i) {
      value |= std::uint64_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
    }
    return value;
  };
  const auto bytes_of = [](std::uint64_t value, int size) {
    std::string bytes;
    for (int i = 0; i < size; ++i) bytes.push_back(static_cast<char>((value >> (8 * i)) & 0xff));
    return bytes;
  };
  std::uint64_t hash = 0x9e3779b97f4a7c15;
  for (std::size_t at = 0; at < body.size(); at += 8) {
    hash ^= word(body, at);
    hash = (hash ^ (hash >> 33)) * 0xff51afd7ed558ccd;
    hash = (hash ^ (hash >> 33)) * 0xc4ceb9fe1a85ec53;
    hash ^= hash >> 33;
  }
  return "moectlst" + bytes_of(version, 4) + bytes_of(body.size(), 8) + bytes_of(hash, 8) + body;
}

inline std::string state_body(const std::string& state) {
  return state.substr(28);
}

struct StateEntry {
  std::string name;
  char type;
  std::size_t at, count;  // of its elements: offset in the body, and how many
};

/// The entries of a saved state, in order; those of a section after it.
inline std::vector<StateEntry> state_entries(const std::string& state) {
  const std::string body = state_body(state);
  std::vector<StateEntry> entries;
  for (std::size_t at = 0; at < body.size();) {
    std::uint32_t length = 0;
    std::memcpy(&length, &body[at], 4);
    StateEntry entry{body.substr(at + 4, length), body[at + 4 + length], at + 4 + length + 9, 0};
    std::memcpy(&entry.count, &body[at + 4 + length + 1], 8);
    at = entry.at + (entry.type == 's' ? 0 : entry.count * (entry.type == 't' ? 1 : 8));
    entries.push_back(entry);
  }
  return entries;
}

/// The first entry in which two states differ, with its sections; "" = none.
inline std::string first_difference(const std::string& a, const std::string& b) {
  const std::vector<StateEntry> of_a = state_entries(a), of_b = state_entries(b);
  const std::string body_a = state_body(a), body_b = state_body(b);
  std::string section;
  for (std::size_t i = 0; i < std::min(of_a.size(), of_b.size()); ++i) {
    const StateEntry &x = of_a[i], &y = of_b[i];
    if (x.type == 's') section = x.name + ": ";
    const std::size_t bytes = x.type == 's' ? 0 : x.count * (x.type == 't' ? 1 : 8);
    if (x.name != y.name || x.type != y.type || x.count != y.count ||
        body_a.compare(x.at, bytes, body_b, y.at, bytes) != 0)
      return section + x.name;
  }
  return of_a.size() == of_b.size() ? "" : "their length";
}

/// The state with another number in one place.
template <class Number>
std::string with_number(const std::string& state, const StateEntry& entry, std::size_t element,
                        Number number) {
  static_assert(sizeof number == 8);
  std::string body = state_body(state);
  std::memcpy(&body[entry.at + 8 * element], &number, 8);
  return with_state_header(body);
}

/// The same, of the first entry of this name.
template <class Number>
std::string with_number(const std::string& state, std::string_view name, std::size_t element, Number number) {
  const std::vector<StateEntry> entries = state_entries(state);
  const auto found =
      std::find_if(entries.begin(), entries.end(), [&](const StateEntry& e) { return e.name == name; });
  if (found == entries.end() || element >= found->count)
    throw std::logic_error("no such number in the state");
  return with_number(state, *found, element, number);
}

}  // namespace moectl::testing
