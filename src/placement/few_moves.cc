#include "placement/few_moves.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "placement/layout.h"

namespace moectl::placing {
namespace {

/// The free slots of single_placement get an expert that their device lacks: again and again the expert and the device that leave
/// the smallest largest load. Each is a move.
void fill_free_slots(std::span<const double> loads, const PlacementOptions& o, Placement& plan) {
  const Index n = loads.size(), devices = at(o.devices), room = plan.experts.size() / devices,
              own = n / devices;
  if (n % devices != 0 || room == own) return;
  std::vector<int> copies(n, 1);
  std::vector<bool> held(n * devices, false);
  for (Index e = 0; e < n; ++e) held[e * devices + e / own] = true;
  std::vector<Index> used(devices, own);
  std::vector<double> sums(devices, 0.0);
  for (Index e = 0; e < n; ++e) sums[e / own] += loads[e];
  // Load of device d after expert e gets a copy on device `to`.
  const auto after = [&](Index d, Index e, Index to) {
    const double before = loads[e] / copies[e], each = loads[e] / (copies[e] + 1);
    return sums[d] + (d == to ? each : held[e * devices + d] ? each - before : 0);
  };
  for (Index filled = n; filled < plan.experts.size(); ++filled) {
    double best = HUGE_VAL;
    Index best_e = 0, best_to = 0;
    for (Index to = 0; to < devices; ++to) {
      for (Index e = 0; used[to] < room && e < n; ++e) {
        if (held[e * devices + to]) continue;
        // The largest load, and a little of the squares, as below.
        double largest = 0, squares = 0;
        for (Index d = 0; d < devices; ++d) {
          const double load = after(d, e, to);
          largest = std::max(largest, load);
          squares += load * load;
        }
        const double cost = largest + 1e-3 * std::sqrt(squares);
        if (cost >= best) continue;
        best = cost;
        best_e = e;
        best_to = to;
      }
    }
    std::vector<double> now(devices);
    for (Index d = 0; d < devices; ++d) now[d] = after(d, best_e, best_to);
    sums = std::move(now);
    ++copies[best_e];
    held[best_e * devices + best_to] = true;
    plan.experts[best_to * room + used[best_to]++] = static_cast<int>(best_e);
  }
}

}  // namespace

Placement plan_few_moves(std::span<const double> loads, const PlacementOptions& o) {
  Placement plan = single_placement(static_cast<int>(loads.size()), o);
  const Placement start = plan;
  const Index room = plan.experts.size() / at(o.devices);
  if (!o.repeats) {
    fill_free_slots(loads, o, plan);
  } else if (loads.size() % at(o.devices) == 0) {
    // Free slots hold the lightest expert of their device: a heavy one may get copies elsewhere, and should share among few.
    for (Index d = 0; d < at(o.devices); ++d) {
      const auto own = plan.experts.begin() + static_cast<std::ptrdiff_t>(d * room);
      const auto free = own + static_cast<std::ptrdiff_t>(loads.size() / at(o.devices));
      const int lightest =
          *std::min_element(own, free, [&](int a, int b) { return loads[at(a)] < loads[at(b)]; });
      std::fill(free, own + static_cast<std::ptrdiff_t>(room), lightest);
    }
  }
  std::vector<int> copies(loads.size(), 0);
  for (const int e : plan.experts) ++copies[at(e)];
  const auto device_of = [&](Index slot) { return slot / room; };
  const auto holds = [&](Index device, int expert) {
    const auto from = plan.experts.begin() + static_cast<std::ptrdiff_t>(device * room);
    return std::find(from, from + static_cast<std::ptrdiff_t>(room), expert) !=
           from + static_cast<std::ptrdiff_t>(room);
  };
  // The largest load, and a little of the squares: where two devices carry the largest load, a move may help one first.
  const auto cost = [&] {
    double largest = 0, squares = 0;
    for (const double load : device_loads(plan, loads)) {
      largest = std::max(largest, load);
      squares += load * load;
    }
    return largest + 1e-3 * std::sqrt(squares);
  };
  const auto largest_now = [&] { return std::ranges::max(device_loads(plan, loads)); };
  double now = cost(), largest = largest_now();
  for (;;) {
    const auto sums = device_loads(plan, loads);
    const auto h = static_cast<Index>(std::ranges::max_element(sums) - sums.begin());
    double best = now * (1 - 1e-9);
    Placement best_plan;
    const auto keep = [&] {
      const double value = cost();
      if (value >= best || largest_now() > largest || moves_between(start, plan) > o.max_moves) return;
      best = value;
      best_plan = plan;
    };
    for (Index a = h * room; a < (h + 1) * room; ++a) {
      const int hot = plan.experts[a];
      for (Index b = 0; b < plan.experts.size(); ++b) {
        const int other = plan.experts[b];
        if (device_of(b) == h || holds(device_of(b), hot)) continue;
        if (loads[at(other)] / copies[at(other)] < loads[at(hot)] / copies[at(hot)] && !holds(h, other)) {
          std::swap(plan.experts[a], plan.experts[b]);
          keep();
          std::swap(plan.experts[a], plan.experts[b]);
        }
        if (copies[at(other)] > 1) {
          plan.experts[b] = hot;
          keep();
          plan.experts[b] = other;
        }
      }
    }
    if (best_plan.experts.empty()) return plan;
    plan = best_plan;
    now = best;
    largest = largest_now();
    std::ranges::fill(copies, 0);
    for (const int e : plan.experts) ++copies[at(e)];
  }
}

}  // namespace moectl::placing
