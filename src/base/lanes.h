// Arrays of doubles, eight at a time, as arrays of Eigen. Only what every processor computes to the same bits is used:
// + - × ÷ √, comparison and choice, element by element. Eigen's products, sums, logarithms and exponentials are not
// used: their order and their fused multiply-adds depend on the processor. A sum over the eight lanes has one order,
// which is written here.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

// The core may be compiled for wider registers than the program around it, and Eigen's alignment and its inline
// functions depend on the registers. The linker would take one form of such a function for both. So Eigen has a name of
// its own here, one for each width of the registers.
#if defined(__AVX512F__)
#define MOECTL_LANES lanes_512
#define MOECTL_EIGEN moectl_eigen_512
#elif defined(__AVX__)
#define MOECTL_LANES lanes_256
#define MOECTL_EIGEN moectl_eigen_256
#else
#define MOECTL_LANES lanes_128
#define MOECTL_EIGEN moectl_eigen_128
#endif
#ifdef EIGEN_CORE_H
#error "base/lanes.h: must come before Eigen's headers, which it includes under a private name"
#endif
// What Eigen asks the compiler to inline, GCC leaves as calls in long loops for the narrower registers: a step would take
// three times as long there.
#define EIGEN_STRONG_INLINE __attribute__((always_inline)) inline
// Exact square roots: with AVX-512, Eigen 3.4 otherwise approximates them, and four in ten differ in the last bit.
#define EIGEN_FAST_MATH 0
#define EIGEN_MPL2_ONLY
#define Eigen MOECTL_EIGEN
#pragma GCC diagnostic push
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from GCC 12's own header of AVX-512
#endif
#include <Eigen/Core>
#pragma GCC diagnostic pop
#undef Eigen

namespace moectl {
inline namespace MOECTL_LANES {

namespace eigen = ::MOECTL_EIGEN;

using Double8 = eigen::Array<double, 8, 1>;
using Int8 = eigen::Array<std::int64_t, 8, 1>;

/// An element-wise operation that Eigen 3.4 does not do in registers. `Op::of` is written once for a number and for a
/// register of numbers: the compiler's vectors take the same operators.
template <class Op>
struct InRegisters {
  template <class... V>
  auto operator()(const V&... v) const {
    return Op::of(v...);
  }
  template <class... V>
  auto packetOp(const V&... v) const {
    return Op::of(v...);
  }
};

struct Larger {
  template <class V>
  static V of(const V& a, const V& b) {
    return b > a ? b : a;
  }
};
struct Smaller {
  template <class V>
  static V of(const V& a, const V& b) {
    return b < a ? b : a;
  }
};
struct Equal {
  template <class V>
  static V of(const V& a, const V& b) {
    return a == b ? V{} + 1.0 : V{};
  }
};
struct Less {
  template <class V>
  static V of(const V& a, const V& b) {
    return a < b ? V{} + 1.0 : V{};
  }
};
struct Select {
  template <class V>
  static V of(const V& condition, const V& yes, const V& no) {
    return condition > V{} ? yes : no;
  }
};

}  // namespace MOECTL_LANES
}  // namespace moectl

template <class Op>
struct MOECTL_EIGEN::internal::functor_traits<moectl::InRegisters<Op>> {
  enum { Cost = 2, PacketAccess = packet_traits<double>::Vectorizable };
};

namespace moectl {
inline namespace MOECTL_LANES {

inline Double8 splat(double value) {
  return Double8::Constant(value);
}

/// Element by element; `a` where one of them is NaN.
inline Double8 larger(const Double8& a, const Double8& b) {
  return a.binaryExpr(b, InRegisters<Larger>());
}
inline Double8 smaller(const Double8& a, const Double8& b) {
  return a.binaryExpr(b, InRegisters<Smaller>());
}

/// 1 where it is so, else 0: a sum of them counts.
inline Double8 equal(const Double8& a, const Double8& b) {
  return a.binaryExpr(b, InRegisters<Equal>());
}
inline Double8 less(const Double8& a, const Double8& b) {
  return a.binaryExpr(b, InRegisters<Less>());
}

/// `yes` where the condition is above 0, else `no`.
inline Double8 select(const Double8& condition, const Double8& yes, const Double8& no) {
  return eigen::CwiseTernaryOp<InRegisters<Select>, const Double8, const Double8, const Double8>(condition,
                                                                                                 yes, no);
}

inline double sum_of(const Double8& v) {
  return ((v[0] + v[2]) + (v[4] + v[6])) + ((v[1] + v[3]) + (v[5] + v[7]));
}
inline double largest_of(const Double8& v) {
  double most = v[0];
  for (int i = 1; i < 8; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

/// How the eight elements at a place are read and written.
struct AllEight {
  static Double8 get(const double* from) { return eigen::Map<const Double8>(from); }
  static Int8 get_int(const std::int64_t* from) { return eigen::Map<const Int8>(from); }
  static Double8 get(const std::int64_t* from) { return get_int(from).cast<double>(); }
  static void put(double* to, const Double8& v) { eigen::Map<Double8>{to} = v; }
  /// Zero where there is no element.
  static Double8 keep(const Double8& v) { return v; }
};

/// At the end of an array, where there are fewer: those beyond read as 0 and are not written.
struct FirstFew {
  std::size_t count;  // 1 to 7
  Double8 get(const double* from) const {
    Double8 v = Double8::Zero();
    std::memcpy(v.data(), from, count * sizeof *from);
    return v;
  }
  Int8 get_int(const std::int64_t* from) const {
    Int8 v = Int8::Zero();
    std::memcpy(v.data(), from, count * sizeof *from);
    return v;
  }
  Double8 get(const std::int64_t* from) const { return get_int(from).cast<double>(); }
  void put(double* to, const Double8& v) const { std::memcpy(to, v.data(), count * sizeof *to); }
  Double8 keep(const Double8& v) const {
    static constexpr double kLane[] = {0, 1, 2, 3, 4, 5, 6, 7};
    return select(less(AllEight::get(kLane), splat(static_cast<double>(count))), v, splat(0));
  }
};

/// Calls `body(i, at)` for i = 0, 8, 16, …, where `at` reads and writes the elements from i on.
template <class Body>
void for_each_eight(std::size_t size, Body&& body) {
  std::size_t i = 0;
  for (; i + 8 <= size; i += 8) body(i, AllEight{});
  if (i < size) body(i, FirstFew{size - i});
}

/// Σ term(i, at) over an array of this size.
template <class Term>
double sum_over(std::size_t size, Term term) {
  Double8 sum = splat(0);
  std::size_t i = 0;  // a loop of its own: in for_each_eight the sum would go through memory
  for (; i + 8 <= size; i += 8) sum += term(i, AllEight{});
  if (i < size) sum += term(i, FirstFew{size - i});
  return sum_of(sum);
}

inline double sum_of(std::span<const double> v) {
  return sum_over(v.size(), [&](std::size_t i, auto at) { return at.get(&v[i]); });
}

/// x - x is zero for finite x and NaN otherwise; NaN survives the sum.
inline bool all_finite(std::span<const double> v) {
  return sum_over(v.size(),
                  [&](std::size_t i, auto at) -> Double8 { return at.get(&v[i]) - at.get(&v[i]); }) == 0;
}

/// Both must have the same length and be finite.
inline bool all_equal(std::span<const double> a, std::span<const double> b) {
  Double8 most = splat(0);
  for_each_eight(a.size(), [&](std::size_t i, auto at) {
    const Double8 difference = at.get(&a[i]) - at.get(&b[i]);
    most = larger(most, larger(difference, -difference));
  });
  return largest_of(most) == 0;
}

/// Several sums over an array of this size in one pass: `add(i, at, sums)` adds to each. Each has the bits of a pass of its
/// own, and none waits for another.
template <std::size_t Count, class Add>
std::array<double, Count> sums_over(std::size_t size, Add add) {
  Double8 sums[Count];
  for (Double8& sum : sums) sum = splat(0);
  std::size_t i = 0;
  for (; i + 8 <= size; i += 8) add(i, AllEight{}, sums);
  if (i < size) add(i, FirstFew{size - i}, sums);
  std::array<double, Count> out;
  for (std::size_t k = 0; k < Count; ++k) out[k] = sum_of(sums[k]);
  return out;
}

/// Both must have the same length.
inline double dot(std::span<const double> a, std::span<const double> b) {
  return sum_over(a.size(), [&](std::size_t i, auto at) -> Double8 { return at.get(&a[i]) * at.get(&b[i]); });
}

}  // namespace MOECTL_LANES
}  // namespace moectl
