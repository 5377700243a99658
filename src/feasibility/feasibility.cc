#include "moectl/feasibility.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <stdexcept>

#include "base/format.h"
#include "feasibility/load_extents.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

// How a metric lies on its axis; entropies fall along it.
struct OnAxis {
  LoadAxis axis;
  double (*to_axis)(double metric, const LoadSpace&);
  double (*from_axis)(double value, const LoadSpace&);
};

double same(double x, const LoadSpace&) {
  return x;
}
double log_n(const LoadSpace& s) {
  return std::log(static_cast<double>(s.experts));
}

std::optional<OnAxis> axis_of(std::string_view metric, const LoadTargets& targets) {
  if (!targets.equal()) {
    if (metric == "load_cv") return OnAxis{kRelativeCv, same, same};
    if (metric == "max_vio") return OnAxis{kMaxVio, same, same};
    if (metric == "max_to_mean") {
      return OnAxis{kMaxVio, [](double x, const LoadSpace&) { return x - 1; },
                    [](double x, const LoadSpace&) { return x + 1; }};
    }
    if (metric == "dead_experts") return OnAxis{kDead, same, same};
  }
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

// ---- Words ----

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
  return brief(rounded(value, is_lower));
}

std::string show(const Band& band) {
  if (std::isinf(band.low)) return "≤ " + brief(band.high);
  if (std::isinf(band.high)) return "≥ " + brief(band.low);
  if (band.low == band.high) return "= " + brief(band.low);
  return "in [" + brief(band.low) + ", " + brief(band.high) + "]";
}

std::string where(const LoadSpace& s) {
  return "at N = " + std::to_string(s.experts) + ", k = " + std::to_string(s.top_k);
}

Extent whole_of(LoadAxis axis, const LoadSpace& s) {
  if (!is_relative(axis)) return whole(axis, room_of(s));
  return whole_relative(axis, s, LoadTargets(s.experts, s.targets));
}

/// One band, as given and along its axis.
struct Placed {
  std::string metric;
  Band given;
  OnAxis on;
  double low, high;  // along the axis
};

Placed place(const std::string& metric, const Band& band, const OnAxis& on, const LoadSpace& s) {
  const Extent all = whole_of(on.axis, s);
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
  if (on.axis == kIdle || on.axis == kDead) {  // whole experts
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
  return p.metric + (upper ? " ≤ " + brief(p.given.high) : " ≥ " + brief(p.given.low));
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
    return p.metric + ": [" + brief(from, digits) + ", " + brief(to, digits) + "]";
  }
  const std::string only = brief(at_lower_edge ? band.min : band.max, 17);
  return p.metric + ": [" + only + ", " + only + "]";
}

// The least imbalance that perfectly balanced routing of this many tokens still shows: of a CV and a largest load what
// it is on average; of Gini and the entropies the least that they can be at that CV. Absent if nothing is known of it.
std::optional<double> floor_of(LoadAxis axis, const LoadSpace& s) {
  if (s.tokens <= 0 || axis == kIdle) return std::nullopt;
  const auto cv = noise_floor_cv(s.experts, s.top_k, static_cast<double>(s.tokens));
  if (!cv || axis == kCv) return cv;
  if (axis != kMax) return extent_at(kCv, *cv, axis, room_of(s)).min;
  const auto vio = max_vio_of_cv(s.experts, *cv);
  return vio ? std::optional((1 + *vio) / s.experts) : std::nullopt;
}

// The same with unequal targets, of which loads as such cannot be more even than those wanted.
std::optional<double> floor_on_targets(LoadAxis axis, const LoadSpace& s, const LoadTargets& targets) {
  const auto tokens = static_cast<double>(s.tokens);
  if (axis == kRelativeCv) return noise_floor_cv(targets, s.top_k, tokens);
  if (axis == kMaxVio) return noise_floor_max_vio(targets, s.top_k, tokens);
  if (axis == kDead) return std::nullopt;
  const Metrics wanted =
      metrics_on_target({s.experts, s.top_k, {}}, {.targets = {s.targets.begin(), s.targets.end()}});
  switch (axis) {
    case kCv: {
      // A load scatters by w (1/k - w)/T, and its mean square adds to that of the targets.
      const double n = s.experts, cv = *wanted.load_std * n / 100, squares = (1 + cv * cv) / n;
      const double noise = s.tokens > 0 ? n * (1.0 / s.top_k - squares) / tokens : 0;
      return std::sqrt(cv * cv + std::max(0.0, noise));
    }
    case kMax:
      return wanted.max_load;
    case kGini:
      return wanted.gini;
    case kIdle:
      return wanted.inactive_experts;
    default:
      return wanted.kl_to_uniform;
  }
}

// A band that no load lies in, or that lies under the floor.
void judge_alone(const Placed& p, const LoadSpace& s, std::vector<Conflict>& conflicts) {
  const Extent all = whole_of(p.on.axis, s);
  const LoadTargets targets(s.experts, s.targets);
  const std::optional<double> floor =
      targets.equal() ? floor_of(p.on.axis, s) : floor_on_targets(p.on.axis, s, targets);
  const Extent reachable = {std::max(all.min, floor.value_or(all.min)), all.max};
  const bool too_high = p.low > all.max + kSlack, too_low = p.high < all.min - kSlack;
  const auto add = [&](const std::string& why) {
    conflicts.push_back(
        {{p.metric}, p.metric + " " + show(p.given) + why + " " + where(s), nearest_band(p, reachable, s)});
  };
  if (too_high || too_low) {
    add(" cannot be: " + side(p, too_high ? all.max : all.min, too_high, s));
  } else if (floor && p.high < *floor - kSlack) {
    const bool by_targets = !targets.equal() && !is_relative(p.on.axis);
    const bool mean = p.on.axis == kCv || p.on.axis == kRelativeCv || p.on.axis == kMaxVio ||
                      (p.on.axis == kMax && !by_targets);
    add((by_targets
             ? " is more even than model.targets: a load on its targets" +
                   (s.tokens > 0 ? ", of " + std::to_string(s.tokens) + " tokens," : std::string()) + " has "
             : " lies under the noise floor: perfectly balanced routing of " + std::to_string(s.tokens) +
                   " tokens still shows ") +
        (mean ? p.metric + " = " + brief(p.on.from_axis(*floor, s)) : side(p, *floor, false, s)));
  }
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
    const Extent all = whole_of(a.on.axis, s);
    conflicts.push_back({{a.metric, b.metric},
                         given_side(a, below, s) + " is the same as " +
                             side(b, below ? a.high : a.low, below, s) + " " + where(s) + "; " + b.metric +
                             " " + show(b.given) + " is wanted",
                         nearest_band(b, {std::max(a.low, all.min), std::min(a.high, all.max)}, s)});
    return;
  }
  if (is_relative(a.on.axis) || is_relative(b.on.axis)) return;  // of these no relation is known
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
      if (is_relative(a.on.axis) || is_relative(b.on.axis)) continue;
      if (auto conflict = conflict_of(a, b, s, room, given)) {
        conflict->metrics.insert(conflict->metrics.begin(), cap->metric);
        conflicts.push_back(std::move(*conflict));
      }
    }
  }
}

}  // namespace

Feasibility judge(const LoadSpace& space, const Bands& bands) {
  check_space(space);
  const LoadTargets targets(space.experts, space.targets);
  Feasibility found;
  std::vector<Placed> placed;
  for (const auto& [metric, band] : bands) {
    if (find_metric(metric) == nullptr) throw std::invalid_argument("bands: " + metric + ": unknown metric");
    if (!(band.low <= band.high)) {
      throw std::invalid_argument("bands." + metric + ": [" + brief(band.low) + ", " + brief(band.high) +
                                  "]: must be ascending");
    }
    const auto on = axis_of(metric, targets);
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
    return found.conflicts.size() > before;
  });
  for (std::size_t i = 0; i < placed.size(); ++i) {
    for (std::size_t j = i + 1; j < placed.size(); ++j)
      judge_pair(placed[i], placed[j], space, found.conflicts);
  }
  const auto on_other_axis = [&](const Placed& p) {
    return std::any_of(placed.begin(), placed.end(), [&](const Placed& q) { return q.on.axis != p.on.axis; });
  };
  for (const Placed& p : placed) {
    if (is_relative(p.on.axis) && on_other_axis(p)) found.judged_alone.push_back(p.metric);
  }
  std::array<bool, kLoadAxisCount> used{};
  for (const Placed& p : placed) used[static_cast<std::size_t>(p.on.axis)] = !is_relative(p.on.axis);
  const bool many = std::count(used.begin(), used.end(), true) >= 3;
  if (found.conflicts.empty() && many) judge_together(placed, space, found.conflicts);
  found.undecided_together = many && found.conflicts.empty();
  return found;
}

}  // namespace moectl