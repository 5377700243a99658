// Sums over experts in eight lanes: the order is fixed, so the bits are the same everywhere, and the
// additions need not wait for each other.
#pragma once

#include <cstddef>
#include <span>

#include "double2.h"

namespace moectl::policies {

/// Σ term(i, i+1) over pairs of n experts; the last one of an odd number is handed over alone, as term(i, i).
template <class Term>
double sum_pairs(std::size_t n, Term term) {
  Double2 a{}, b{}, c{}, d{};
  std::size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    a += term(i, i + 1);
    b += term(i + 2, i + 3);
    c += term(i + 4, i + 5);
    d += term(i + 6, i + 7);
  }
  for (; i + 2 <= n; i += 2) a += term(i, i + 1);
  const Double2 all = (a + b) + (c + d);
  return (all[0] + all[1]) + (i < n ? term(i, i)[0] : 0.0);
}

inline double sum_of(std::span<const double> v) {
  return sum_pairs(v.size(), [&](std::size_t i, std::size_t j) { return Double2{v[i], v[j]}; });
}

/// Both must have the same length.
inline double dot(std::span<const double> a, std::span<const double> b) {
  return sum_pairs(a.size(), [&](std::size_t i, std::size_t j) {
    return Double2{a[i], a[j]} * Double2{b[i], b[j]};
  });
}

}  // namespace moectl::policies
