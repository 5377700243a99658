// Arrays of doubles, four at a time. Vector extensions of the compiler rather than intrinsics: every platform
// computes the same operations in the same order, and so the same bits, whatever its registers hold. Sums
// over experts are taken in lanes because the compiler may not change their order by itself.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace moectl {

// Each form under a name of its own, so that files compiled for different processors can be linked together.
#ifdef __AVX2__
inline namespace lanes_in_one_register {

using Double4 = double __attribute__((vector_size(32)));
using Int4 = std::int64_t __attribute__((vector_size(32)));
using UInt4 = std::uint64_t __attribute__((vector_size(32)));

inline Double4 lanes(double a, double b, double c, double d) {
  return Double4{a, b, c, d};
}
inline Int4 lanes(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  return Int4{a, b, c, d};
}
inline Double4 convert(Int4 v) {
  return __builtin_convertvector(v, Double4);
}
inline Double4 select(Int4 condition, Double4 yes, Double4 no) {
  return condition ? yes : no;
}
template <class Bits>
Double4 bits_as_double(Bits bits) {
  return (Double4)bits;
}
inline UInt4 bits_of(Double4 v) {
  return (UInt4)v;
}
#else
inline namespace lanes_in_two_registers {

// Registers of two: left to itself, the compiler takes four apart one by one.
template <class Pair, class Element>
struct Halves {
  Pair low, high;
  Element operator[](int i) const { return i < 2 ? low[i] : high[i - 2]; }
  Halves& operator+=(Halves b) { return *this = *this + b; }
  Halves& operator-=(Halves b) { return *this = *this - b; }
  Halves operator-() const { return {-low, -high}; }
  friend Halves operator+(Halves a, Halves b) { return {a.low + b.low, a.high + b.high}; }
  friend Halves operator-(Halves a, Halves b) { return {a.low - b.low, a.high - b.high}; }
  friend Halves operator*(Halves a, Halves b) { return {a.low * b.low, a.high * b.high}; }
  friend Halves operator/(Halves a, Halves b) { return {a.low / b.low, a.high / b.high}; }
  friend Halves operator+(Halves a, Element b) { return {a.low + b, a.high + b}; }
  friend Halves operator-(Halves a, Element b) { return {a.low - b, a.high - b}; }
  friend Halves operator*(Halves a, Element b) { return {a.low * b, a.high * b}; }
  friend Halves operator*(Element a, Halves b) { return {a * b.low, a * b.high}; }
  friend Halves operator/(Halves a, Element b) { return {a.low / b, a.high / b}; }
  friend Halves operator&(Halves a, Element b) { return {a.low & b, a.high & b}; }
  friend Halves operator|(Halves a, Element b) { return {a.low | b, a.high | b}; }
  friend Halves operator>>(Halves a, int by) { return {a.low >> by, a.high >> by}; }
};
using Double2 = double __attribute__((vector_size(16)));
using Int2 = std::int64_t __attribute__((vector_size(16)));
using UInt2 = std::uint64_t __attribute__((vector_size(16)));
using Double4 = Halves<Double2, double>;
using Int4 = Halves<Int2, std::int64_t>;
using UInt4 = Halves<UInt2, std::uint64_t>;

inline Int4 operator==(Double4 a, double b) {
  return {a.low == b, a.high == b};
}
inline Int4 operator==(Double4 a, Double4 b) {
  return {a.low == b.low, a.high == b.high};
}
inline Int4 operator<(Double4 a, double b) {
  return {a.low < b, a.high < b};
}
inline Int4 operator<(Double4 a, Double4 b) {
  return {a.low < b.low, a.high < b.high};
}
inline Int4 operator>(Double4 a, double b) {
  return {a.low > b, a.high > b};
}
inline Int4 operator>(Double4 a, Double4 b) {
  return {a.low > b.low, a.high > b.high};
}
inline Double4 lanes(double a, double b, double c, double d) {
  return {Double2{a, b}, Double2{c, d}};
}
inline Int4 lanes(std::int64_t a, std::int64_t b, std::int64_t c, std::int64_t d) {
  return {Int2{a, b}, Int2{c, d}};
}
inline Double4 convert(Int4 v) {
  return {__builtin_convertvector(v.low, Double2), __builtin_convertvector(v.high, Double2)};
}
inline Double4 select(Int4 condition, Double4 yes, Double4 no) {
  return {condition.low ? yes.low : no.low, condition.high ? yes.high : no.high};
}
template <class Bits>
Double4 bits_as_double(Bits bits) {
  return {(Double2)bits.low, (Double2)bits.high};
}
inline UInt4 bits_of(Double4 v) {
  return {(UInt2)v.low, (UInt2)v.high};
}
#endif

inline Double4 splat(double value) {
  return lanes(value, value, value, value);
}

/// Element by element; `a` where one of them is NaN.
inline Double4 larger(Double4 a, Double4 b) {
  return select(b > a, b, a);
}
inline Double4 smaller(Double4 a, Double4 b) {
  return select(b < a, b, a);
}

inline Double4 fast_sqrt(Double4 x) {
  return lanes(__builtin_sqrt(x[0]), __builtin_sqrt(x[1]), __builtin_sqrt(x[2]), __builtin_sqrt(x[3]));
}

/// Exact for 0 ≤ value < 2^52.
inline Double4 to_double(Int4 value) {
  constexpr std::int64_t kTwo52 = 0x4330000000000000;
  return bits_as_double(value | kTwo52) - 4503599627370496.0;
}

inline double sum_of(Double4 v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}
inline std::int64_t sum_of(Int4 v) {
  return (v[0] + v[2]) + (v[1] + v[3]);
}
inline double largest_of(Double4 v) {
  const double a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
  return a > b ? a : b;
}

/// How the four elements at a place are read and written.
struct AllFour {
  static Double4 get(const double* from) {
    Double4 v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static Int4 get_int(const std::int64_t* from) {
    Int4 v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static Double4 get(const std::int64_t* from) { return convert(get_int(from)); }
  static void put(double* to, Double4 v) { std::memcpy(to, &v, sizeof v); }
  /// Zero where there is no element.
  static Double4 keep(Double4 v) { return v; }
  static Int4 keep_int(Int4 v) { return v; }
};

/// At the end of an array, where there are fewer: those beyond read as 0 and are not written.
struct FirstFew {
  std::size_t count;  // 1 to 3
  Double4 get(const double* from) const {
    Double4 v{};
    std::memcpy(&v, from, count * sizeof *from);
    return v;
  }
  Int4 get_int(const std::int64_t* from) const {
    Int4 v{};
    std::memcpy(&v, from, count * sizeof *from);
    return v;
  }
  Double4 get(const std::int64_t* from) const { return convert(get_int(from)); }
  void put(double* to, Double4 v) const { std::memcpy(to, &v, count * sizeof *to); }
  Double4 keep(Double4 v) const { return lanes(v[0], count > 1 ? v[1] : 0.0, count > 2 ? v[2] : 0.0, 0.0); }
  Int4 keep_int(Int4 v) const { return lanes(v[0], count > 1 ? v[1] : 0, count > 2 ? v[2] : 0, std::int64_t{0}); }
};

/// Calls `body(i, at)` for i = 0, 4, 8, …, where `at` reads and writes the elements from i on.
template <class Body>
void for_each_four(std::size_t size, Body&& body) {
  std::size_t i = 0;
  for (; i + 4 <= size; i += 4) body(i, AllFour{});
  if (i < size) body(i, FirstFew{size - i});
}

/// Σ term(i, at) over an array of this size, in eight lanes, so that one addition need not wait for the last.
template <class Term>
double sum_over(std::size_t size, Term term) {
  Double4 a{}, b{};
  std::size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    a += term(i, AllFour{});
    b += term(i + 4, AllFour{});
  }
  if (i + 4 <= size) {
    a += term(i, AllFour{});
    i += 4;
  }
  if (i < size) b += term(i, FirstFew{size - i});
  return ((a[0] + a[2]) + (b[0] + b[2])) + ((a[1] + a[3]) + (b[1] + b[3]));
}

inline double sum_of(std::span<const double> v) {
  return sum_over(v.size(), [&](std::size_t i, auto at) { return at.get(&v[i]); });
}

/// Both must have the same length.
inline double dot(std::span<const double> a, std::span<const double> b) {
  return sum_over(a.size(), [&](std::size_t i, auto at) { return at.get(&a[i]) * at.get(&b[i]); });
}

}  // inline namespace
}  // namespace moectl
