// Two doubles at a time. Vector extensions of the compiler rather than intrinsics, so that every platform
// computes the same operations in the same order and so the same bits.
#pragma once

#include <cstdint>

namespace moectl {

using Double2 = double __attribute__((vector_size(16)));
using Int2 = std::int64_t __attribute__((vector_size(16)));
using UInt2 = std::uint64_t __attribute__((vector_size(16)));

inline Double2 splat(double value) {
  return Double2{value, value};
}

/// Element by element; `a` where one of them is NaN.
inline Double2 larger(Double2 a, Double2 b) {
  return b > a ? b : a;
}
inline Double2 smaller(Double2 a, Double2 b) {
  return b < a ? b : a;
}

/// Exact for 0 ≤ value < 2^52.
inline Double2 to_double(Int2 value) {
  constexpr std::int64_t kTwo52 = 0x4330000000000000;
  return (Double2)(value | kTwo52) - 4503599627370496.0;
}

}  // namespace moectl
