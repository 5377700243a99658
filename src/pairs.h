// Loops over arrays of doubles two at a time, for sums whose order the compiler may not change: the odd last
// element comes with a second one that reads as 0 and is not written.
#pragma once

#include <cstddef>
#include <cstring>

#include "fast_log.h"

namespace moectl {

inline double sum_of(Double2 v) {
  return v[0] + v[1];
}

/// How the elements at a place are read and written.
struct BothOfPair {
  static Double2 get(const double* from) {
    Double2 v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  static Double2 get(const std::int64_t* from) {
    return Double2{static_cast<double>(from[0]), static_cast<double>(from[1])};
  }
  static Double2 fill(double value) { return splat(value); }
  static void put(double* to, Double2 v) { std::memcpy(to, &v, sizeof v); }
};
struct FirstOfPair {
  static Double2 get(const double* from) { return Double2{*from, 0}; }
  static Double2 get(const std::int64_t* from) { return Double2{static_cast<double>(*from), 0}; }
  static Double2 fill(double value) { return Double2{value, 0}; }
  static void put(double* to, Double2 v) { *to = v[0]; }
};

/// Calls `body(i, at)` for i = 0, 2, 4, …, where `at` reads and writes the elements i and i + 1.
template <class Body>
void for_each_pair(std::size_t size, Body&& body) {
  std::size_t i = 0;
  for (; i + 2 <= size; i += 2) body(i, BothOfPair{});
  if (i < size) body(i, FirstOfPair{});
}

}  // namespace moectl
