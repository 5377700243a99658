// Bytes of a fuzzer as choices. After their end every choice is the first one, so that short inputs are small cases.
#pragma once

#include <bit>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "fuzz/targets.h"

namespace moectl::fuzz {

class Choices {
 public:
  explicit Choices(Bytes bytes) : rest_(bytes) {}

  bool done() const { return rest_.empty(); }
  std::uint8_t byte() {
    if (rest_.empty()) return 0;
    const std::uint8_t first = rest_.front();
    rest_ = rest_.subspan(1);
    return first;
  }
  bool flag() { return (byte() & 1) != 0; }
  /// From 0 to `end` - 1.
  std::size_t below(std::size_t end) { return byte() % end; }
  int between(int least, int most) {
    return least + static_cast<int>(below(static_cast<std::size_t>(most - least + 1)));
  }
  std::uint64_t word() {
    std::uint64_t all = 0;
    for (int i = 0; i < 8; ++i) all = all << 8 | byte();
    return all;
  }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(values.size())];
  }
  /// Ordinary ones, extreme ones, and any.
  double number() {
    switch (below(8)) {
      case 0:
        return static_cast<double>(byte()) / 64;
      case 1:
        return -static_cast<double>(byte()) / 64;
      case 2:
        return one_of({0.0, -0.0, 1.7e308, -1.7e308, 5e-324, 1e9, -1e9, 0x1p62});
      case 3:
        return std::bit_cast<double>(std::uint64_t{0x7ff0000000000000} |
                                     (byte() * (std::uint64_t{1} << 50)));  // ∞, NaN
      case 4:
        return std::bit_cast<double>(word());
      default:
        return static_cast<double>(byte()) / 256;
    }
  }
  std::int64_t integer() {
    switch (below(4)) {
      case 0:
        return byte();
      case 1:
        return -static_cast<std::int64_t>(byte());
      case 2:
        return one_of<std::int64_t>({INT64_MAX, INT64_MIN, std::int64_t{1} << 62, -(std::int64_t{1} << 62),
                                     std::int64_t{1} << 53, std::int64_t{1} << 31, std::int64_t{1} << 60});
      default:
        return static_cast<std::int64_t>(word());
    }
  }
  Bytes rest() const { return rest_; }

 private:
  Bytes rest_;
};

inline std::string text_of(Bytes bytes) {
  return {bytes.begin(), bytes.end()};
}

}  // namespace moectl::fuzz
