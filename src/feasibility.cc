#include "moectl/feasibility.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <stdexcept>

#include "moectl/metrics.h"

namespace moectl {
namespace {

// ---- Extremal load vectors ----
//
// An extremal vector has few distinct loads: it is kept as blocks, largest load first, that cover all N
// experts.

struct Block {
  double experts;
  double load;
};
using Blocks = std::vector<Block>;

/// Where loads live: N of them, none above `cap`, which is 1/k or what a band leaves of it.
struct Room {
  int experts;
  double cap;
  /// How many loads can be at the cap.
  int full() const { return std::min(experts, static_cast<int>(std::floor(1 / cap + 1e-9))); }
};
Room room_of(const LoadSpace& s) {
  return {s.experts, 1.0 / s.top_k};
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
  for (int fixed = 0; fixed < s.full(); ++fixed) {
    const double left = n - fixed, sum = 1 - fixed * cap, sum_sq = squares - fixed * cap * cap;
    const double spread = std::max(0.0, sum_sq - sum * sum / left);
    const double large = left > 1 ? sum / left + std::sqrt(spread * (left - 1) / left) : sum;
    if (large > cap * (1 + 1e-12)) continue;
    const double rest = left > 1 ? std::max(0.0, (sum - large) / (left - 1)) : 0;
    return {{static_cast<double>(fixed), cap}, {1, large}, {left - 1, rest}};
  }
  // As many at the cap as fit; what is left is under it, whoever has it.
  const double full = s.full(), left = n - full, sum = std::max(0.0, 1 - full * cap);
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
  const double full = Room{s.experts, max}.full();
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

// Largest Gini for this Σ p²: it is linear in the ranked loads, so they are a ramp over the ranks, clipped to
// [0, 1/k].
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
  for (int t = 0; t <= s.full(); ++t) {
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

// Smallest entropy for this Gini. Entropy is concave and Gini linear in the ranked loads, so the minimum is a
// vertex of the ranked loads of that Gini: t experts at 1/k, two levels below, the rest zero. All of them are
// tried.
double smallest_entropy_at_gini(const Room& s, double gini) {
  const int n = s.experts;
  const double cap = s.cap, tolerance = 1e-12;
  double least = std::numeric_limits<double>::infinity();
  // Σ over the ranks of experts a … b-1, counted from the largest, of (N - 1 - 2 rank).
  const auto weight = [n](double a, double b) { return (b - a) * (n - a - b); };
  const auto term = [](double experts, double load) {
    return load > 0 ? -experts * load * std::log(load) : 0.0;
  };
  for (int t = 0; t <= s.full(); ++t) {
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

// ---- Axes ----

// All grow with imbalance, so that the extent of one at a given value of another grows with that value.
enum Axis : int { kCv, kMax, kGini, kIdle, kKl, kAxisCount };

// How a metric lies on its axis; entropies fall along it.
struct OnAxis {
  Axis axis;
  double (*to_axis)(double metric, const LoadSpace&);
  double (*from_axis)(double value, const LoadSpace&);
};

double same(double x, const LoadSpace&) {
  return x;
}
double log_n(const LoadSpace& s) {
  return std::log(static_cast<double>(s.experts));
}

std::optional<OnAxis> axis_of(std::string_view metric) {
  if (metric == "load_cv") return OnAxis{kCv, same, same};
  if (metric == "load_std") {
    return OnAxis{kCv, [](double x, const LoadSpace& s) { return x * s.experts / 100; },
                  [](double x, const LoadSpace& s) { return x * 100 / s.experts; }};
  }
  if (metric == "max_load") return OnAxis{kMax, same, same};
  if (metric == "max_to_mean") {
    return OnAxis{kMax, [](double x, const LoadSpace& s) { return x / s.experts; },
                  [](double x, const LoadSpace& s) { return x * s.experts; }};
  }
  if (metric == "max_vio") {
    return OnAxis{kMax, [](double x, const LoadSpace& s) { return (x + 1) / s.experts; },
                  [](double x, const LoadSpace& s) { return x * s.experts - 1; }};
  }
  if (metric == "gini") return OnAxis{kGini, same, same};
  if (metric == "dead_experts" || metric == "inactive_experts") return OnAxis{kIdle, same, same};
  if (metric == "inactive_fraction") {
    return OnAxis{kIdle, [](double x, const LoadSpace& s) { return x * s.experts; },
                  [](double x, const LoadSpace& s) { return x / s.experts; }};
  }
  if (metric == "kl_to_uniform") return OnAxis{kKl, same, same};
  if (metric == "entropy") {
    return OnAxis{kKl, [](double x, const LoadSpace& s) { return log_n(s) - x; },
                  [](double x, const LoadSpace& s) { return log_n(s) - x; }};
  }
  if (metric == "entropy_normalized") {
    return OnAxis{kKl, [](double x, const LoadSpace& s) { return (1 - x) * log_n(s); },
                  [](double x, const LoadSpace& s) { return s.experts > 1 ? 1 - x / log_n(s) : 1; }};
  }
  if (metric == "effective_experts") {
    return OnAxis{kKl, [](double x, const LoadSpace& s) { return log_n(s) - std::log(std::max(x, 1e-300)); },
                  [](double x, const LoadSpace& s) { return std::exp(log_n(s) - x); }};
  }
  return std::nullopt;
}

Extent whole(Axis axis, const Room& s) {
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
    case kAxisCount:
      break;
  }
  return {};
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

// What `y` can be at a given value of `x`, an axis before it in the enumeration.
Extent extent_at(Axis x, double value, Axis y, const Room& s) {
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

// ---- Words ----

std::string number(double value, int digits = 4) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::general, digits).ptr;
  return {text, end};
}

// The nearest number of `digits` digits that is not above (down) or not below the value.
double rounded(double value, bool down, int digits = 4) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double unit = std::pow(10.0, std::floor(std::log10(std::abs(value))) - (digits - 1));
  const double cut = value / unit;
  const double nearest = std::round(cut);
  const double whole = std::abs(cut - nearest) < 1e-6 ? nearest : down ? std::floor(cut) : std::ceil(cut);
  return whole * unit;
}

// A bound rounded to four digits must not claim more than was proved: 0.89196 as a lower bound reads 0.8919.
std::string bound(double value, bool is_lower) {
  return number(rounded(value, is_lower));
}

std::string show(const Band& band) {
  if (std::isinf(band.low)) return "≤ " + number(band.high);
  if (std::isinf(band.high)) return "≥ " + number(band.low);
  if (band.low == band.high) return "= " + number(band.low);
  return "in [" + number(band.low) + ", " + number(band.high) + "]";
}

std::string where(const LoadSpace& s) {
  return "at N = " + std::to_string(s.experts) + ", k = " + std::to_string(s.top_k);
}

/// One band, as given and along its axis.
struct Placed {
  std::string metric;
  Band given;
  OnAxis on;
  double low, high;  // along the axis
};

Placed place(const std::string& metric, const Band& band, const OnAxis& on, const LoadSpace& s) {
  const Extent all = whole(on.axis, room_of(s));
  const auto along = [&](double end) {
    if (std::isinf(end)) {
      // An open end reaches to the end of the axis on its side; entropies run the other way.
      const bool falls = on.to_axis(1, s) < on.to_axis(0.5, s);
      return (end > 0) != falls ? std::max(all.max, 1e300) : -1e300;
    }
    return on.to_axis(end, s);
  };
  const double a = along(band.low), b = along(band.high);
  Placed placed{metric, band, on, std::min(a, b), std::max(a, b)};
  if (on.axis == kIdle) {  // whole experts
    placed.low = std::ceil(placed.low - 1e-9);
    placed.high = std::floor(placed.high + 1e-9);
  }
  return placed;
}

bool falls(const Placed& p, const LoadSpace& s) {
  return p.on.to_axis(1, s) < p.on.to_axis(0.5, s);
}

// "entropy_normalized >= 0.8919": the metric's side of "axis value ≤ limit" or "≥ limit".
std::string side(const Placed& p, double limit, bool at_most, const LoadSpace& s) {
  const double value = p.on.from_axis(limit, s);
  const bool upper = at_most != falls(p, s);
  return p.metric + (upper ? " ≤ " : " ≥ ") + bound(value, !upper);
}

// The end of the given band that stands on this side of the axis.
std::string given_side(const Placed& p, bool high_end, const LoadSpace& s) {
  const bool upper = high_end != falls(p, s);
  return p.metric + (upper ? " ≤ " + number(p.given.high) : " ≥ " + number(p.given.low));
}

constexpr double kSlack = 1e-9;

// The nearest band to the given one: moved, with its width as far as possible, into what is feasible.
std::string nearest_band(const Placed& p, const Extent& feasible, const LoadSpace& s) {
  const double width = p.high < 1e299 && p.low > -1e299 ? p.high - p.low : feasible.max - feasible.min;
  const bool from_above = p.low > feasible.max;
  const double low = from_above ? std::max(feasible.min, feasible.max - width) : feasible.min;
  const double high = from_above ? feasible.max : std::min(feasible.max, feasible.min + width);
  const auto metric = [&](double x, double y) {
    const double a = p.on.from_axis(x, s), b = p.on.from_axis(y, s);
    return Extent{std::min(a, b), std::max(a, b)};
  };
  const Extent band = metric(low, high), possible = metric(feasible.min, feasible.max);
  // Rounded inwards, what is suggested can be. A band of next to no width becomes one value just inside the
  // edge it was moved to; where four digits leave nothing between the edges, more are given.
  const bool at_lower_edge = from_above == falls(p, s);
  for (int digits = 4; digits < 16; ++digits) {
    double from = rounded(band.min, false, digits), to = rounded(band.max, true, digits);
    if (from > to) from = to = at_lower_edge ? from : to;
    if (from < possible.min - kSlack / 100 || to > possible.max + kSlack / 100) continue;
    return p.metric + ": [" + number(from, digits) + ", " + number(to, digits) + "]";
  }
  const std::string only = number(at_lower_edge ? band.min : band.max, 17);
  return p.metric + ": [" + only + ", " + only + "]";
}

void judge_alone(const Placed& p, const LoadSpace& s, std::vector<Conflict>& conflicts) {
  const Extent all = whole(p.on.axis, room_of(s));
  if (p.low <= all.max + kSlack && p.high >= all.min - kSlack) return;
  const bool too_high = p.low > all.max;
  conflicts.push_back({{p.metric},
                       p.metric + " " + show(p.given) + " cannot be: " +
                           side(p, too_high ? all.max : all.min, too_high, s) + " " + where(s),
                       nearest_band(p, all, s)});
}

// Perfectly balanced routing of this many tokens still scatters.
void judge_against_floor(const Placed& p, const LoadSpace& s, std::vector<Conflict>& conflicts) {
  if (s.tokens <= 0 || (p.on.axis != kCv && p.on.axis != kMax)) return;
  const auto cv = noise_floor_cv(s.experts, s.top_k, static_cast<double>(s.tokens));
  if (!cv) return;
  double floor = *cv;
  if (p.on.axis == kMax) {
    const auto vio = max_vio_of_cv(s.experts, *cv);
    if (!vio) return;
    floor = (1 + *vio) / s.experts;
  }
  if (p.high >= floor - kSlack) return;
  conflicts.push_back({{p.metric},
                       p.metric + " " + show(p.given) +
                           " lies under the noise floor: perfectly balanced routing of " +
                           std::to_string(s.tokens) + " tokens still shows " + p.metric + " = " +
                           number(p.on.from_axis(floor, s)) + " " + where(s),
                       nearest_band(p, {floor, whole(p.on.axis, room_of(s)).max}, s)});
}

// Two bands on different axes, of loads that live in `room`; `given` is what makes it so.
std::optional<Conflict> conflict_of(const Placed& a, const Placed& b, const LoadSpace& s, const Room& room,
                                    const std::string& given) {
  const Placed& x = a.on.axis < b.on.axis ? a : b;
  const Placed& y = a.on.axis < b.on.axis ? b : a;
  const Extent at_low = extent_at(x.on.axis, x.low, y.on.axis, room),
               at_high = extent_at(x.on.axis, x.high, y.on.axis, room);
  const bool too_high = y.low > at_high.max + kSlack;  // y wants more imbalance than x admits
  const bool too_low = y.high < at_low.min - kSlack;
  if (!too_high && !too_low) return std::nullopt;
  return Conflict{{x.metric, y.metric},
                  given + given_side(x, too_high, s) + (given.empty() ? " forces " : " force ") +
                      side(y, too_high ? at_high.max : at_low.min, too_high, s) + " " + where(s) + "; " +
                      y.metric + " " + show(y.given) + " is wanted",
                  nearest_band(y, {at_low.min, at_high.max}, s)};
}

void judge_pair(const Placed& a, const Placed& b, const LoadSpace& s, std::vector<Conflict>& conflicts) {
  if (a.on.axis == b.on.axis) {
    if (a.low <= b.high + kSlack && b.low <= a.high + kSlack) return;
    const bool below = a.high < b.low;
    const Extent all = whole(a.on.axis, room_of(s));
    conflicts.push_back({{a.metric, b.metric},
                         given_side(a, below, s) + " is the same as " +
                             side(b, below ? a.high : a.low, below, s) + " " + where(s) + "; " + b.metric +
                             " " + show(b.given) + " is wanted",
                         nearest_band(b, {std::max(a.low, all.min), std::min(a.high, all.max)}, s)});
    return;
  }
  if (auto conflict = conflict_of(a, b, s, room_of(s), "")) conflicts.push_back(std::move(*conflict));
}

// Bands that agree in pairs may still not agree together. With the largest load under a band, all else lives
// in less room: there, pairs are decided exactly again. More is not decided.
void judge_together(const std::vector<Placed>& placed, const LoadSpace& s, std::vector<Conflict>& conflicts) {
  const Placed* cap = nullptr;
  for (const Placed& p : placed) {
    if (p.on.axis == kMax && (cap == nullptr || p.high < cap->high)) cap = &p;
  }
  if (cap == nullptr || !(cap->high < 1.0 / s.top_k)) return;
  const Room room{s.experts, std::max(cap->high, 1.0 / s.experts)};
  const std::string given = "provably infeasible together: " + given_side(*cap, true, s) + " and ";
  for (std::size_t i = 0; i < placed.size(); ++i) {
    for (std::size_t j = i + 1; j < placed.size(); ++j) {
      const Placed &a = placed[i], &b = placed[j];
      if (a.on.axis == b.on.axis || a.on.axis == kMax || b.on.axis == kMax) continue;
      if (auto conflict = conflict_of(a, b, s, room, given)) {
        conflict->metrics.insert(conflict->metrics.begin(), cap->metric);
        conflicts.push_back(std::move(*conflict));
      }
    }
  }
}

void check(const LoadSpace& s) {
  if (s.experts < 1)
    throw std::invalid_argument("experts: " + std::to_string(s.experts) + ": must be at least 1");
  if (s.top_k < 1 || s.top_k > s.experts) {
    throw std::invalid_argument("top_k: " + std::to_string(s.top_k) + ": must be 1 to experts (" +
                                std::to_string(s.experts) + ")");
  }
}

}  // namespace

Extent entropy_at_cv(const LoadSpace& s, double load_cv) {
  check(s);
  const double cv = clip(load_cv, 0, max_cv(room_of(s)));
  return {entropy_of(few_equal(room_of(s), cv)), entropy_of(one_large(room_of(s), cv))};
}

Extent max_load_at_cv(const LoadSpace& s, double load_cv) {
  check(s);
  return extent_at(kCv, load_cv, kMax, room_of(s));
}

Extent gini_at_cv(const LoadSpace& s, double load_cv) {
  check(s);
  return extent_at(kCv, load_cv, kGini, room_of(s));
}

int max_idle_at_cv(const LoadSpace& s, double load_cv) {
  check(s);
  return max_idle_at(room_of(s), clip(load_cv, 0, max_cv(room_of(s))));
}

Extent entropy_at_max_load(const LoadSpace& s, double max_load) {
  check(s);
  const Extent all = whole(kMax, room_of(s));
  return entropy_at_max(room_of(s), clip(max_load, all.min, all.max));
}

Extent gini_at_max_load(const LoadSpace& s, double max_load) {
  check(s);
  return extent_at(kMax, max_load, kGini, room_of(s));
}

Extent entropy_at_gini(const LoadSpace& s, double gini) {
  check(s);
  return entropy_at(room_of(s), clip(gini, 0, max_gini(room_of(s))));
}

Feasibility judge(const LoadSpace& space, const Bands& bands) {
  check(space);
  Feasibility found;
  std::vector<Placed> placed;
  for (const auto& [metric, band] : bands) {
    if (find_metric(metric) == nullptr) throw std::invalid_argument("bands: " + metric + ": unknown metric");
    if (!(band.low <= band.high)) {
      throw std::invalid_argument("bands." + metric + ": [" + number(band.low) + ", " + number(band.high) +
                                  "]: must be ascending");
    }
    const auto on = axis_of(metric);
    if (!on) {
      found.not_judged.push_back(metric);
      continue;
    }
    placed.push_back(place(metric, band, *on, space));
  }
  // A band that cannot hold by itself says nothing about the others.
  std::erase_if(placed, [&](const Placed& p) {
    const std::size_t before = found.conflicts.size();
    judge_alone(p, space, found.conflicts);
    judge_against_floor(p, space, found.conflicts);
    return found.conflicts.size() > before;
  });
  for (std::size_t i = 0; i < placed.size(); ++i) {
    for (std::size_t j = i + 1; j < placed.size(); ++j)
      judge_pair(placed[i], placed[j], space, found.conflicts);
  }
  std::array<bool, kAxisCount> used{};
  for (const Placed& p : placed) used[p.on.axis] = true;
  const bool many = std::count(used.begin(), used.end(), true) >= 3;
  if (found.conflicts.empty() && many) judge_together(placed, space, found.conflicts);
  found.undecided_together = many && found.conflicts.empty();
  return found;
}

}  // namespace moectl
