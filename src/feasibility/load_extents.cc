#include "feasibility/load_extents.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace moectl {
namespace {

// An extremal vector has few distinct loads: it is kept as blocks, largest load first, that cover all N experts.

struct Block {
  double experts;
  double load;
};
using Blocks = std::vector<Block>;
// How many loads can be at the cap.
int full_loads(const Room& s) {
  return std::min(s.experts, static_cast<int>(std::floor(1 / s.cap + 1e-9)));
}

double entropy_of(const Blocks& blocks) {
  double entropy = 0;
  for (const auto& [experts, load] : blocks) {
    if (load > 0) entropy -= experts * load * std::log(load);
  }
  return entropy;
}

// Σ_r (2r - N + 1) p_(r) / N with ascending ranks r; a block that covers ranks a … a+n-1 has Σ (2r - N + 1) =
// n(2a + n - N).
double gini_of(std::initializer_list<Block> blocks, double n) {
  double gini = 0, above = 0;
  for (const auto& [experts, load] : blocks) {
    const double first = n - above - experts;
    gini += experts * (2 * first + experts - n) * load;
    above += experts;
  }
  return gini / n;
}

double clip(double value, double low, double high) {
  return std::clamp(value, low, std::max(low, high));
}

// Of all vectors with this Σ p², the one of largest entropy and smallest Gini: one large load, the rest
// equal. A load above 1/k is fixed there, and the rest solved again.
Blocks one_large(const Room& s, double cv) {
  const double n = s.experts, cap = s.cap, squares = (1 + cv * cv) / n;
  for (int fixed = 0; fixed < full_loads(s); ++fixed) {
    const double left = n - fixed, sum = 1 - fixed * cap, sum_sq = squares - fixed * cap * cap;
    const double spread = std::max(0.0, sum_sq - sum * sum / left);
    const double large = left > 1 ? sum / left + std::sqrt(spread * (left - 1) / left) : sum;
    if (large > cap * (1 + 1e-12)) continue;
    const double rest = left > 1 ? std::max(0.0, (sum - large) / (left - 1)) : 0;
    return {{static_cast<double>(fixed), cap}, {1, large}, {left - 1, rest}};
  }
  // As many experts at the cap as fit; the rest of the load is below the cap, however it is spread.
  const double full = full_loads(s), left = n - full, sum = std::max(0.0, 1 - full * cap);
  if (left < 1) return {{full, 1 / full}};
  const double spread = std::max(0.0, squares - full * cap * cap - sum * sum / left);
  const double large = std::min(sum, sum / left + std::sqrt(spread * (left - 1) / left));
  return {{full, cap}, {1, large}, {left - 1, left > 1 ? (sum - large) / (left - 1) : 0}};
}

// Of all vectors with this Σ p², the one of smallest entropy and smallest maximum: K - 1 equal loads, one
// smaller, the rest zero. Never above 1/k.
Blocks few_equal(const Room& s, double cv) {
  const double n = s.experts, squares = (1 + cv * cv) / n;
  const double k = std::clamp(std::ceil(1 / squares - 1e-9), 1.0, n);
  if (k < 2) return {{1, 1}, {n - 1, 0}};
  const double a = (1 + std::sqrt(std::max(0.0, (k * squares - 1) / (k - 1)))) / k;
  return {{k - 1, a}, {1, std::max(0.0, 1 - (k - 1) * a)}, {n - k, 0}};
}

// Loads of at most `max`, as unequal as they can be: as many at `max` as fit, and what is left.
Blocks packed(const Room& s, double max) {
  const double full = full_loads({s.experts, max});
  const double rest = std::max(0.0, 1 - full * max);
  if (full >= s.experts) return {{full, 1.0 / s.experts}};
  return {{full, max}, {1, rest}, {s.experts - full - 1, 0}};
}

// The most of each that the room has: all of it packed.
double max_cv(const Room& s) {
  double squares = 0;
  for (const auto& [experts, load] : packed(s, s.cap)) squares += experts * load * load;
  return std::sqrt(std::max(0.0, squares * s.experts - 1));
}
double max_gini(const Room& s) {
  const Blocks most = packed(s, s.cap);
  return most.size() > 1 ? gini_of({most[0], most[1]}, s.experts) : 0;
}
int max_idle(const Room& s) {
  return s.experts - static_cast<int>(std::ceil(1 / s.cap - 1e-9));
}

/// The root of an increasing function.
template <class Function>
double bisect(double low, double high, const Function& function) {
  for (int i = 0; i < 100; ++i) {
    const double middle = low + (high - low) / 2;
    if (middle == low || middle == high) break;
    (function(middle) < 0 ? low : high) = middle;
  }
  return low + (high - low) / 2;
}

// Largest Gini for this Σ p²: it is linear in the ranked loads, so they are a ramp over the ranks, clipped to [0, 1/k].
double largest_gini(const Room& s, double cv) {
  const int n = s.experts;
  const double cap = s.cap, squares = (1 + cv * cv) / n;
  if (n == 1 || cv <= 0) return 0;
  const double width = n;
  const auto load = [&](double start, double slope, int rank) {
    return std::clamp(slope * (rank + 1 - start), 0.0, cap);
  };
  const auto start_of = [&](double slope) {  // where the ramp leaves zero; may lie before the first expert
    return bisect(-1 / slope - width, width, [&](double start) {
      double sum = 0;
      for (int r = 0; r < n; ++r) sum += load(start, slope, r);
      return 1 - sum;
    });
  };
  const auto sum_sq = [&](double slope) {
    const double start = start_of(slope);
    double sum = 0;
    for (int r = 0; r < n; ++r) sum += load(start, slope, r) * load(start, slope, r);
    return sum;
  };
  const double log_slope =
      bisect(-40, 10, [&](double log_slope) { return sum_sq(std::exp(log_slope)) - squares; });
  const double slope = std::exp(log_slope), start = start_of(slope);
  double gini = 0;
  for (int r = 0; r < n; ++r) gini += (2.0 * r - n + 1) * load(start, slope, r);
  return gini / n;
}

// Smallest Gini for this Σ p². Without the cap it is that of one large load. With it, Σ p² ≥ s is a
// constraint whose complement is convex, so the minimum lies on an edge of the ranked, capped loads: t
// experts at 1/k, two levels below, the rest zero. All edges are tried.
double smallest_gini(const Room& s, double cv) {
  const int n = s.experts;
  const double cap = s.cap, squares = (1 + cv * cv) / n, tolerance = 1e-12;
  if ((1 + cv * std::sqrt(n - 1.0)) / n <= cap) return cv * std::sqrt(n - 1.0) / n;
  double least = max_gini(s);
  for (int t = 0; t <= full_loads(s); ++t) {
    const double sum = 1 - t * cap, sum_sq = squares - t * cap * cap;
    if (sum < -tolerance || sum_sq < -tolerance) break;
    for (int j = t + 1; j <= n; ++j) {
      for (int m = j; m <= n; ++m) {
        const double first = j - t, second = m - j, both = first + second;
        const double spread = sum_sq - sum * sum / both;
        if (spread < -tolerance) continue;
        const double step = second > 0 ? std::sqrt(std::max(0.0, spread) / both) : 0;
        if (second == 0 && spread > 1e-9) continue;
        const double a = sum / both + step * (second > 0 ? std::sqrt(second / first) : 0);
        const double b = second > 0 ? sum / both - step * std::sqrt(first / second) : 0;
        if (a > cap + tolerance || b < -tolerance) continue;
        least = std::min(least, gini_of({{static_cast<double>(t), cap}, {first, a}, {second, b}}, n));
      }
    }
  }
  return least;
}

// Largest entropy for this Gini: loads exponential in their rank, clipped to 1/k.
double largest_entropy_at_gini(const Room& s, double gini) {
  const int n = s.experts;
  const double cap = s.cap;
  std::vector<double> p(static_cast<std::size_t>(n));
  const auto fill = [&](double rate) {
    const double scale = bisect(-50.0 * n - 100, 100, [&](double log_top) {
      double sum = 0;
      for (int r = 0; r < n; ++r) sum += std::min(cap, std::exp(log_top - rate * (n - 1 - r)));
      return sum - 1;
    });
    for (int r = 0; r < n; ++r)
      p[static_cast<std::size_t>(r)] = std::min(cap, std::exp(scale - rate * (n - 1 - r)));
  };
  const double log_rate = bisect(-40, 5, [&](double log_rate) {
    fill(std::exp(log_rate));
    double g = 0;
    for (int r = 0; r < n; ++r) g += (2.0 * r - n + 1) * p[static_cast<std::size_t>(r)] / n;
    return g - gini;
  });
  fill(std::exp(log_rate));
  double entropy = 0;
  for (const double load : p) entropy -= load > 0 ? load * std::log(load) : 0;
  return entropy;
}

// Smallest entropy for this Gini. Entropy is concave and Gini linear in the ranked loads, so the minimum is a vertex of
// the ranked loads of that Gini: t experts at 1/k, two levels below, the rest zero. All of them are tried.
double smallest_entropy_at_gini(const Room& s, double gini) {
  const int n = s.experts;
  const double cap = s.cap, tolerance = 1e-12;
  double least = std::numeric_limits<double>::infinity();
  // Σ over the ranks of experts a … b-1, counted from the largest, of (N - 1 - 2 rank).
  const auto weight = [n](double a, double b) { return (b - a) * (n - a - b); };
  const auto term = [](double experts, double load) {
    return load > 0 ? -experts * load * std::log(load) : 0.0;
  };
  for (int t = 0; t <= full_loads(s); ++t) {
    const double sum = 1 - t * cap, moment = gini * n - weight(0, t) * cap;
    for (int j = t + 1; j <= n; ++j) {
      const double first = j - t, first_weight = weight(t, j);
      const double alone = sum / first;  // one level only
      if (alone <= cap + tolerance && std::abs(first_weight * alone - moment) < 1e-9) {
        least = std::min(least, term(t, cap) + term(first, alone));
      }
      for (int m = j + 1; m <= n; ++m) {
        const double second = m - j, second_weight = weight(j, m);
        const double determinant = first * second_weight - second * first_weight;
        if (determinant == 0) continue;
        const double a = (sum * second_weight - second * moment) / determinant;
        const double b = (first * moment - sum * first_weight) / determinant;
        if (b < -tolerance || a < b - tolerance || a > cap + tolerance) continue;
        least = std::min(least, term(t, cap) + term(first, a) + term(second, b));
      }
    }
  }
  return least;
}

Extent kl_of(const Extent& entropy, const Room& s) {
  const double most = std::log(static_cast<double>(s.experts));
  return {std::max(0.0, most - entropy.max), std::max(0.0, most - entropy.min)};
}

Extent max_load_at(const Room& s, double cv) {
  const double n = s.experts;
  return {std::min(s.cap, few_equal(s, cv).front().load), std::min(s.cap, (1 + cv * std::sqrt(n - 1)) / n)};
}

int max_idle_at(const Room& s, double cv) {
  return std::min(max_idle(s), static_cast<int>(std::floor(s.experts * cv * cv / (1 + cv * cv) + 1e-9)));
}

Extent entropy_at_max(const Room& s, double max) {
  const double n = s.experts, rest = n > 1 ? (1 - max) / (n - 1) : 0;
  return {entropy_of(packed(s, max)), entropy_of({{1, max}, {n - 1, rest}})};
}

Extent gini_at_max(const Room& s, double max) {
  return {max - 1.0 / s.experts, max_gini({s.experts, max})};
}

Extent entropy_at(const Room& s, double gini) {
  if (gini < 1e-12) return {std::log(s.experts), std::log(s.experts)};
  if (gini > max_gini(s) - 1e-12) {
    const double least = entropy_of(packed(s, s.cap));
    return {least, least};
  }
  return {smallest_entropy_at_gini(s, gini), largest_entropy_at_gini(s, gini)};
}

}  // namespace

Room room_of(const LoadSpace& s) {
  return {s.experts, 1.0 / s.top_k};
}

Extent whole(LoadAxis axis, const Room& s) {
  const double n = s.experts;
  switch (axis) {
    case kCv:
      return {0, max_cv(s)};
    case kMax:
      return {1 / n, s.cap};
    case kGini:
      return {0, max_gini(s)};
    case kIdle:
      return {0, static_cast<double>(max_idle(s))};
    case kKl:
      return {0, std::max(0.0, std::log(n) - entropy_of(packed(s, s.cap)))};
    default:
      break;
  }
  return {};
}

// All are largest with the whole load on k experts, a k-th on each.
Extent whole_relative(LoadAxis axis, const LoadSpace& space, const LoadTargets& targets) {
  const int unwanted = space.experts - targets.wanted();
  if (axis == kDead) return {0, static_cast<double>(targets.wanted() - std::max(0, space.top_k - unwanted))};
  double largest = 0;
  std::vector<double> more;  // what a k-th of the load adds to the sum of squares of an expert that has none
  for (std::size_t i = 0; i < static_cast<std::size_t>(space.experts); ++i) {
    const double over = targets.relative(i, 1.0 / space.top_k, 1) - 1;
    largest = std::max(largest, over);
    more.push_back(over * over - (targets.is_wanted(i) ? 1 : 0));
  }
  if (axis == kMaxVio) return {0, largest};
  std::sort(more.begin(), more.end(), std::greater<>());
  double squares = targets.wanted();
  for (std::size_t i = 0; i < static_cast<std::size_t>(space.top_k); ++i) squares += more[i];
  return {0, std::sqrt(std::max(0.0, squares) / targets.wanted())};
}

Extent extent_at(LoadAxis x, double value, LoadAxis y, const Room& s) {
  const double n = s.experts;
  const Extent all = whole(x, s);
  value = clip(value, all.min, all.max);
  if (x == kCv) {
    switch (y) {
      case kMax:
        return max_load_at(s, value);
      case kGini:
        return {smallest_gini(s, value), largest_gini(s, value)};
      case kIdle:
        return {0, static_cast<double>(max_idle_at(s, value))};
      default:
        return kl_of({entropy_of(few_equal(s, value)), entropy_of(one_large(s, value))}, s);
    }
  }
  if (x == kMax) {
    if (y == kGini) return gini_at_max(s, value);
    if (y == kIdle) return {0, n - std::ceil(1 / value - 1e-9)};
    return kl_of(entropy_at_max(s, value), s);
  }
  if (x == kGini) {
    // d idle: Gini ≥ d/N.
    if (y == kIdle) return {0, std::min<double>(max_idle(s), std::floor(value * n + 1e-9))};
    return kl_of(entropy_at(s, value), s);
  }
  return {std::log(n / (n - std::floor(value))), whole(kKl, s).max};  // at most uniform over those not idle
}

void check_space(const LoadSpace& s) {
  if (s.experts < 1)
    throw std::invalid_argument("experts: " + std::to_string(s.experts) + ": must be at least 1");
  if (s.top_k < 1 || s.top_k > s.experts) {
    throw std::invalid_argument("top_k: " + std::to_string(s.top_k) + ": must be 1 to experts (" +
                                std::to_string(s.experts) + ")");
  }
}

Extent entropy_at_cv(const LoadSpace& s, double load_cv) {
  check_space(s);
  const double cv = clip(load_cv, 0, max_cv(room_of(s)));
  return {entropy_of(few_equal(room_of(s), cv)), entropy_of(one_large(room_of(s), cv))};
}

Extent max_load_at_cv(const LoadSpace& s, double load_cv) {
  check_space(s);
  return extent_at(kCv, load_cv, kMax, room_of(s));
}

Extent gini_at_cv(const LoadSpace& s, double load_cv) {
  check_space(s);
  return extent_at(kCv, load_cv, kGini, room_of(s));
}

int max_idle_at_cv(const LoadSpace& s, double load_cv) {
  check_space(s);
  return max_idle_at(room_of(s), clip(load_cv, 0, max_cv(room_of(s))));
}

Extent entropy_at_max_load(const LoadSpace& s, double max_load) {
  check_space(s);
  const Extent all = whole(kMax, room_of(s));
  return entropy_at_max(room_of(s), clip(max_load, all.min, all.max));
}

Extent gini_at_max_load(const LoadSpace& s, double max_load) {
  check_space(s);
  return extent_at(kMax, max_load, kGini, room_of(s));
}

Extent entropy_at_gini(const LoadSpace& s, double gini) {
  check_space(s);
  return entropy_at(room_of(s), clip(gini, 0, max_gini(room_of(s))));
}

}  // namespace moectl
