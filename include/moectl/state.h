// Saved state: named, typed, exact values in one buffer. One exchange() of a class writes its values or reads them
// back. Reading in another order, under another name, with another length, a value out of its range or an altered
// file is an error that says what was expected and what was found. docs/state-format.md has the layout.
//
//   void Counter::exchange(StateIo& io) {
//     io.value("counter.steps", steps_);
//     io.values("counter.mean", mean_);
//   }
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace moectl {

/// A saved state that cannot be loaded: truncated, altered, of another version or another configuration.
/// what() is one line that a terminal can show.
class StateError : public std::runtime_error {
 public:
  explicit StateError(const std::string& what);
};

/// What a value that is read must be.
struct IntegerRange {
  std::int64_t least, most;
};
struct NumberRange {
  double least, most;
  bool may_be_nan = false;
};

/// Writes a state or reads one. Every call takes one entry. What was read is checked, what is written is not; but a count beyond
/// kMostCount, which only an altered state can lead to, is written as kMostCount, so that it can be read. A section
/// is an entry that holds entries of its own, and can be found by its name.
class StateIo {
 public:
  /// The largest count: further steps can be added to it without an overflow.
  static constexpr std::int64_t kMostCount = std::int64_t{1} << 60;
  static constexpr IntegerRange kCount{0, kMostCount};
  static constexpr IntegerRange kAnyInteger{std::numeric_limits<std::int64_t>::min(),
                                            std::numeric_limits<std::int64_t>::max()};
  /// Beyond what any run has: sums and squares of such numbers are numbers still.
  static constexpr NumberRange kFinite{-1e100, 1e100};
  static constexpr NumberRange kNotNegative{0, 1e100};
  static constexpr NumberRange kAnyNumber{-std::numeric_limits<double>::infinity(),
                                          std::numeric_limits<double>::infinity(), true};

  /// Writes.
  StateIo() = default;
  /// Reads `bytes`, which must outlive this object. Checks header and checksum. Throws StateError.
  explicit StateIo(std::string_view bytes);

  bool reads() const { return reads_; }

  // Each reading call throws StateError if the next entry has another name, type or length, or a value out of range.

  void value(std::string_view name, double& x, NumberRange range = kFinite) { values(name, {&x, 1}, range); }
  void value(std::string_view name, std::int64_t& x, IntegerRange range = kCount) {
    values(name, {&x, 1}, range);
  }
  void value(std::string_view name, bool& x);
  /// An enumeration from 0 to `last`.
  template <class Enum>
  void choice(std::string_view name, Enum& x, Enum last) {
    auto index = static_cast<std::int64_t>(x);
    value(name, index, {0, static_cast<std::int64_t>(last)});
    x = static_cast<Enum>(index);
  }
  void values(std::string_view name, std::span<double> x, NumberRange range = kFinite);
  void values(std::string_view name, std::span<std::int64_t> x, IntegerRange range = kCount);
  /// As many values as there are: for what the config does not bound. All other entries keep the length of a state
  /// constant.
  void list(std::string_view name, std::vector<double>& x, NumberRange range = kFinite);
  void list(std::string_view name, std::vector<std::int64_t>& x, IntegerRange range = kCount);
  void text(std::string_view name, std::string& x);

  /// A section, which `body(StateIo&)` writes or reads.
  template <class Body>
  void section(std::string_view name, Body&& body) {
    if (!reads_) {
      StateIo inner;
      body(inner);
      add_section(name, inner.body_);
      return;
    }
    StateIo inner = next_section(name);
    body(inner);
    inner.finish();
  }
  /// While reading: the section of this name, wherever it stands among the entries that are left, which stay as they are.
  std::optional<StateIo> find(std::string_view name) const;
  /// While reading: reads the section of this name with `body(StateIo&)`. Returns what is wrong, or nothing; what `body`
  /// read into is then to be made anew.
  template <class Body>
  std::string tried(std::string_view name, Body&& body) const {
    std::optional<StateIo> inner = find(name);
    if (!inner) return "not in the state";
    try {
      body(*inner);
      inner->finish();
    } catch (const StateError& error) {
      return error.what();
    }
    return "";
  }
  /// While reading: the names of the entries that are left.
  std::vector<std::string> names() const;

  /// For what ranges cannot say. While reading, throws StateError unless `good`: "state: 'NAME': must CONSTRAINT".
  void check(bool good, std::string_view name, std::string_view constraint) const;

  /// After writing: the state with its header (format, version) and checksum.
  std::string bytes() const;
  /// After reading: throws StateError if entries are left.
  void finish() const;

 private:
  static constexpr std::size_t kAnyCount = static_cast<std::size_t>(-1);
  struct Entry {
    std::string_view name, data;
    char type;
    std::uint64_t count;
  };
  StateIo(std::string_view body, std::string path) : reads_(true), rest_(body), path_(std::move(path)) {}
  void begin_entry(std::string_view name, char type, std::size_t count);
  void add_section(std::string_view name, std::string_view body);
  StateIo next_section(std::string_view name);
  Entry take_entry(std::string_view& rest, std::string_view wanted) const;
  [[noreturn]] void fail(std::string_view what, std::string_view expected, std::string_view found) const;
  template <class T, class Range>
  void take(std::string_view name, std::string_view data, std::span<T> values, const Range& range) const;
  std::string_view next_entry(std::string_view name, char type, std::size_t count);
  template <class T>
  void write(std::string_view name, char type, std::span<const T> x, T most);

  bool reads_ = false;
  std::string body_;       // what was written
  std::string_view rest_;  // what is left to read
  std::string path_;       // of the section that is read, for messages
};

}  // namespace moectl
