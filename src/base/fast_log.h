// Natural logarithms eight at a time, for the metrics' inner loops: about a third of the cost of std::log, with
// an error of at most a few units in the last place, and the same bits whatever the C library.
#pragma once

#include <bit>
#include <cstdint>

#include "base/lanes.h"

namespace moectl {
inline namespace MOECTL_LANES {

/// The bits of a number, or of a register of numbers, as whole numbers. As a vector even for one number.
template <class V>
struct BitsOf {
  using Type __attribute__((vector_size(sizeof(V)))) = std::uint64_t;
};
template <class V>
auto bits_of(const V& v) {
  return std::bit_cast<typename BitsOf<V>::Type>(v);
}

constexpr std::uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd;  // the bits of √½
constexpr std::uint64_t kTwo52Bits = 0x4330000000000000;
constexpr double kTwo52 = 4503599627370496.0;

/// e of x = m 2^e with m in [√½, √2), plus 2^52 + 1024: biased to be positive and taken as the mantissa of a double,
/// for SSE2 has neither an arithmetic shift nor a conversion of 64-bit integers.
struct BiasedExponent {
  template <class V>
  static V of(const V& x) {
    return std::bit_cast<V>(((bits_of(x) - kSqrtHalf + (std::uint64_t{1024} << 52)) >> 52) | kTwo52Bits);
  }
};
/// m of x = m 2^e.
struct Mantissa {
  template <class V>
  static V of(const V& x) {
    return std::bit_cast<V>(((bits_of(x) - kSqrtHalf) & 0x000fffffffffffff) + kSqrtHalf);
  }
};
/// A whole number below 2^52, given as its bits, plus 2^52.
struct PlusTwo52 {
  template <class V>
  static V of(const V& x) {
    return std::bit_cast<V>(bits_of(x) | kTwo52Bits);
  }
};

/// Exact for 0 ≤ value < 2^52.
inline Double8 to_double(const Int8& value) {
  Double8 bits;
  std::memcpy(bits.data(), value.data(), sizeof bits);
  return bits.unaryExpr(InRegisters<PlusTwo52>()) - kTwo52;
}

/// ln of positive, finite, normal numbers. With x = m 2^e and m in [√½, √2), ln m = 2 artanh(s), s = (m-1)/(m+1),
/// |s| ≤ 0.1716, where a polynomial of degree 6 in s² gives (artanh(s)/s - 1)/s² so that ln m is off by less than 2e-18
/// of itself. Exactly 0 at 1.
inline Double8 fast_log(const Double8& x) {
  const Double8 e = x.unaryExpr(InRegisters<BiasedExponent>()) - (kTwo52 + 1024.0);
  const Double8 m = x.unaryExpr(InRegisters<Mantissa>());
  const Double8 s = (m - 1.0) / (m + 1.0);
  const Double8 z = s * s;
  // Minimax on [0, 0.1716²], from Remez's algorithm in forty digits.
  Double8 p = splat(0x1.2f055e8d2177ap-3);
  p = p * z + 0x1.39a1bb32e3bcdp-3;
  p = p * z + 0x1.74663ee3c3c9cp-3;
  p = p * z + 0x1.c71c520973241p-3;
  p = p * z + 0x1.24924941f10acp-2;
  p = p * z + 0x1.999999997fdb9p-2;
  p = p * z + 0x1.5555555555592p-1;
  constexpr double kLn2High = 0x1.62e42fefa3800p-1;  // e · high is exact
  constexpr double kLn2Low = 0x1.ef35793c76730p-45;
  return e * kLn2High + (2.0 * s + (s * z * p + e * kLn2Low));
}

}  // namespace MOECTL_LANES
}  // namespace moectl
