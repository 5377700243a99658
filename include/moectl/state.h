// Saved state: named, typed, exact values in one buffer. A different order, name or length, or an altered file, is an
// error that names the expected and the found entry.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

namespace moectl {

/// A saved state that cannot be loaded: truncated, altered, of another version or another configuration.
class StateError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class StateWriter {
 public:
  void put(std::string_view name, std::span<const double> values);
  void put(std::string_view name, std::span<const std::int64_t> values);
  void put(std::string_view name, std::string_view text);
  void put(std::string_view name, double value) { put(name, std::span<const double>(&value, 1)); }
  void put(std::string_view name, std::int64_t value) { put(name, std::span<const std::int64_t>(&value, 1)); }

  /// The state with its header (format, version) and checksum.
  std::string finish() const;

 private:
  void entry(std::string_view name, char type, std::size_t count);
  std::string body_;
};

class StateReader {
 public:
  /// Checks header and checksum. Throws StateError.
  explicit StateReader(std::string_view bytes);

  /// Each get reads the next entry and throws StateError if its name, type or length is not the one asked for.
  void get(std::string_view name, std::span<double> values);
  void get(std::string_view name, std::span<std::int64_t> values);
  double get_double(std::string_view name);
  std::int64_t get_int(std::string_view name);
  std::string get_text(std::string_view name);
  /// Throws StateError if entries are left.
  void finish() const;

 private:
  static constexpr std::size_t kAnyCount = static_cast<std::size_t>(-1);
  std::string_view entry(std::string_view name, char type, std::size_t size, std::size_t* count);
  std::string_view rest_;
};

}  // namespace moectl
