#include "moectl/placement.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

namespace moectl {
namespace {

using Index = std::size_t;
Index at(int i) {
  return static_cast<Index>(i);
}

[[noreturn]] void refuse(const char* name, int value, const std::string& constraint) {
  throw std::invalid_argument(std::string(name) + ": " + std::to_string(value) + ": must be " + constraint);
}

/// What makes a plan hierarchical, for the refusal of nodes that do not divide the groups.
std::string fitting_groups(int experts, const PlacementOptions& o) {
  std::string fitting;
  for (int groups = o.nodes; groups <= experts; groups += o.nodes) {
    if (experts % groups == 0) fitting += (fitting.empty() ? "" : ", ") + std::to_string(groups);
  }
  return "1 (a global plan) or divide the groups (" + std::to_string(o.groups) +
         "), so that all copies of an expert are on one node; " +
         (fitting.empty() ? "no number of groups fits " + std::to_string(experts) + " experts"
                          : "groups that fit " + std::to_string(experts) + " experts: " + fitting);
}

/// The options with their defaults filled in, checked.
PlacementOptions resolved(int experts, PlacementOptions o) {
  if (experts < 1) refuse("experts", experts, "at least 1");
  if (o.devices < 1) refuse("devices", o.devices, "at least 1");
  if (o.nodes < 1 || o.devices % o.nodes != 0)
    refuse("nodes", o.nodes, "at least 1 and divide the devices (" + std::to_string(o.devices) + ")");
  if (o.slots == 0) o.slots = (experts + o.devices - 1) / o.devices * o.devices;
  if (o.slots < experts || o.slots % o.devices != 0) {
    refuse("slots", o.slots,
           "at least the experts (" + std::to_string(experts) + ") and a multiple of the devices (" +
               std::to_string(o.devices) + ")");
  }
  if (o.groups == 0) o.groups = experts;
  if (o.groups < 1 || experts % o.groups != 0)
    refuse("groups", o.groups, "at least 1 and divide the experts (" + std::to_string(experts) + ")");
  if (o.groups % o.nodes != 0) refuse("nodes", o.nodes, fitting_groups(experts, o));
  if (o.nodes == 1) o.groups = 1;
  if (o.max_moves >= 0 && o.nodes > 1) {
    refuse("max_moves", o.max_moves,
           "left out where there are several nodes (" + std::to_string(o.nodes) +
               "): moves are limited in global plans alone");
  }
  if (!o.repeats && o.slots / o.devices > experts / o.nodes) {
    refuse("slots", o.slots,
           "at most " + std::to_string(o.devices * (experts / o.nodes)) +
               " where no device may hold an expert twice: " + std::to_string(o.devices) + " devices, " +
               std::to_string(experts / o.nodes) + " experts on a node");
  }
  return o;
}

using Devices = std::vector<std::vector<int>>;  // the items (copies) on each device

/// Fills packs of equal size, the heaviest item first, each into the lightest pack with room. Writes the items of pack p
/// in the order in which they came. `same`: items with one number, such as copies of one expert, avoid each other's pack. True if that
/// made a difference.
bool pack(std::span<const double> weights, int packs, std::span<const int> same, Devices& out) {
  const Index n = weights.size(), room = n / at(packs);
  out.assign(at(packs), {});
  if (room == 1 && same.empty()) {  // as EPLB: item i to pack i
    for (Index i = 0; i < n; ++i) out[i].push_back(static_cast<int>(i));
    return false;
  }
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](int a, int b) { return weights[at(a)] > weights[at(b)]; });
  std::vector<double> sums(at(packs), 0.0);
  bool avoided = false;
  for (const int item : order) {
    int best = -1, lightest = -1;
    for (int p = 0; p < packs; ++p) {
      const auto& items = out[at(p)];
      if (items.size() == room) continue;
      if (lightest < 0 || sums[at(p)] < sums[at(lightest)]) lightest = p;
      if (same.empty() || (best >= 0 && sums[at(p)] >= sums[at(best)])) continue;
      if (std::ranges::none_of(items, [&](int other) { return same[at(other)] == same[at(item)]; })) best = p;
    }
    if (best < 0) best = lightest;
    avoided = avoided || best != lightest;
    out[at(best)].push_back(item);
    sums[at(best)] += weights[at(item)];
  }
  return avoided;
}

bool holds(const std::vector<int>& items, int of, std::span<const int> expert) {
  return std::ranges::any_of(items, [&](int other) { return expert[at(other)] == of; });
}

/// The last copies may have found no other room: exchanges a second copy on a device for the closest load elsewhere. False if
/// some device still has two copies.
bool separate(std::span<const double> weights, Devices& devices, std::span<const int> expert) {
  bool apart = true;
  for (auto& items : devices) {
    for (Index a = 1; a < items.size(); ++a) {
      const int same = expert[at(items[a])];
      if (std::none_of(items.begin(), items.begin() + static_cast<std::ptrdiff_t>(a),
                       [&](int other) { return expert[at(other)] == same; })) {
        continue;
      }
      int* best = nullptr;
      double least = HUGE_VAL;
      for (auto& others : devices) {
        if (&others == &items || holds(others, same, expert)) continue;
        for (int& other : others) {
          const double change = std::abs(weights[at(other)] - weights[at(items[a])]);
          if (change >= least || holds(items, expert[at(other)], expert)) continue;
          least = change;
          best = &other;
        }
      }
      if (best) std::swap(items[a], *best);
      apart = apart && best;
    }
  }
  return apart;
}

/// Deals the copies in turn, those of one expert one after the other: on different devices, however tight the room.
void deal(std::span<const double> weights, Devices& devices, std::span<const int> expert) {
  std::vector<int> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::sort(order, [&](int a, int b) {
    return std::tuple(-weights[at(a)], expert[at(a)], a) < std::tuple(-weights[at(b)], expert[at(b)], b);
  });
  for (auto& items : devices) items.clear();
  for (Index i = 0; i < order.size(); ++i) devices[i % devices.size()].push_back(order[i]);
}

/// Exchanges copies between the device with the largest load and others while that lowers its load, at most kRounds times.
/// `repeats`: a device may get a second copy of an expert.
void exchange(std::span<const double> weights, Devices& devices, std::span<const int> expert, bool repeats) {
  constexpr int kRounds = 12;
  std::vector<double> sums(devices.size(), 0.0);
  for (Index d = 0; d < devices.size(); ++d) {
    for (const int item : devices[d]) sums[d] += weights[at(item)];
  }
  for (int round = 0; round < kRounds; ++round) {
    const auto h = static_cast<Index>(std::ranges::max_element(sums) - sums.begin());
    double best = sums[h] * (1 - 1e-9);
    Index best_a = 0, best_b = 0, best_d = h;
    for (Index d = 0; d < devices.size(); ++d) {
      if (sums[d] >= best) continue;
      for (Index a = 0; a < devices[h].size(); ++a) {
        const double wa = weights[at(devices[h][a])];
        for (Index b = 0; b < devices[d].size(); ++b) {
          const double less = wa - weights[at(devices[d][b])];
          const double larger = std::max(sums[h] - less, sums[d] + less);
          if (larger >= best) continue;
          if (!repeats && (holds(devices[d], expert[at(devices[h][a])], expert) ||
                           holds(devices[h], expert[at(devices[d][b])], expert))) {
            continue;
          }
          best = larger;
          best_a = a;
          best_b = b;
          best_d = d;
        }
      }
    }
    if (best_d == h) return;
    const double less = weights[at(devices[h][best_a])] - weights[at(devices[best_d][best_b])];
    std::swap(devices[h][best_a], devices[best_d][best_b]);
    sums[h] -= less;
    sums[best_d] += less;
  }
}

/// Exchanges copies while that lowers the sum over rows of the largest device load. `rows`: of item i in row r, at i · R + r.
class SampleExchange {
 public:
  SampleExchange(std::vector<double> rows, Index samples, Devices& devices, std::span<const int> expert,
                 bool repeats)
      : rows_(std::move(rows)),
        samples_(samples),
        devices_(devices),
        expert_(expert),
        repeats_(repeats),
        loads_(devices.size() * samples, 0.0) {
    for (Index d = 0; d < devices.size(); ++d) {
      for (const int item : devices[d]) add(d, item, 1);
    }
  }

  /// Sum over rows of the largest device load.
  double largest() const {
    double sum = 0;
    for (Index r = 0; r < samples_; ++r) {
      double most = 0;
      for (Index d = 0; d < devices_.size(); ++d) most = std::max(most, loads_[d * samples_ + r]);
      sum += most;
    }
    return sum;
  }

  void run() {
    constexpr int kMost = 400;  // each exchange lowers the sum; this bounds the time
    for (int n = 0; n < kMost && improve(); ++n) {
    }
  }

 private:
  const double* row(int item) const { return rows_.data() + at(item) * samples_; }
  void add(Index device, int item, double sign) {
    for (Index r = 0; r < samples_; ++r) loads_[device * samples_ + r] += sign * row(item)[r];
  }

  /// The best exchange of one of the three devices that are the most loaded one most heavily.
  bool improve() {
    const Index d_count = devices_.size();
    std::vector<double> blame(d_count, 0.0);
    double now = 0;
    for (Index r = 0; r < samples_; ++r) {
      Index most = 0;
      for (Index d = 1; d < d_count; ++d)
        most = loads_[d * samples_ + r] > loads_[most * samples_ + r] ? d : most;
      blame[most] += loads_[most * samples_ + r];
      now += loads_[most * samples_ + r];
    }
    std::vector<Index> order(d_count);
    std::iota(order.begin(), order.end(), Index{0});
    std::ranges::stable_sort(order, [&](Index a, Index b) { return blame[a] > blame[b]; });
    for (Index k = 0; k < std::min<Index>(3, d_count); ++k) {
      if (improve(order[k], now)) return true;
    }
    return false;
  }

  bool improve(Index h, double now) {
    double best = now * (1 - 1e-6);
    Index best_a = 0, best_b = 0, best_d = h;
    std::vector<double> others(samples_);
    for (Index d = 0; d < devices_.size(); ++d) {
      if (d == h) continue;
      for (Index r = 0; r < samples_; ++r) {
        double largest = 0;
        for (Index e = 0; e < devices_.size(); ++e) {
          if (e != h && e != d) largest = std::max(largest, loads_[e * samples_ + r]);
        }
        others[r] = largest;
      }
      const double *of_h = loads_.data() + h * samples_, *of_d = loads_.data() + d * samples_;
      for (Index a = 0; a < devices_[h].size(); ++a) {
        if (!repeats_ && holds(devices_[d], expert_[at(devices_[h][a])], expert_)) continue;
        const double* from = row(devices_[h][a]);
        for (Index b = 0; b < devices_[d].size(); ++b) {
          if (!repeats_ && holds(devices_[h], expert_[at(devices_[d][b])], expert_)) continue;
          const double* to = row(devices_[d][b]);
          double sum = 0;
          for (Index r = 0; r < samples_ && sum < best; ++r) {
            const double less = from[r] - to[r];
            sum += std::max(others[r], std::max(of_h[r] - less, of_d[r] + less));
          }
          if (sum >= best) continue;
          best = sum;
          best_a = a;
          best_b = b;
          best_d = d;
        }
      }
    }
    if (best_d == h) return false;
    int &one = devices_[h][best_a], &other = devices_[best_d][best_b];
    add(h, one, -1);
    add(h, other, 1);
    add(best_d, other, -1);
    add(best_d, one, 1);
    std::swap(one, other);
    return true;
  }

  std::vector<double> rows_;
  Index samples_;
  Devices& devices_;
  std::span<const int> expert_;
  bool repeats_;
  std::vector<double> loads_;  // [devices × samples]
};

/// Copies of the experts of a node, and the devices on which they are.
struct Layout {
  std::vector<int> expert_of_copy;
  std::vector<double> weights;  // load of each copy
  Devices devices;

  double largest() const {
    double most = 0;
    for (const auto& items : devices) {
      double sum = 0;
      for (const int item : items) sum += weights[at(item)];
      most = std::max(most, sum);
    }
    return most;
  }
};

/// Fills the slots: one more copy at a time goes to the expert with the largest load per copy, of equal ones to the first. No expert
/// gets more than `most`. True if that limit changed the result.
bool replicate(std::span<const double> loads, Index slots, int most, Layout& layout) {
  bool limited = false;
  std::vector<int> copies(loads.size(), 1);
  layout.expert_of_copy.resize(loads.size());
  std::iota(layout.expert_of_copy.begin(), layout.expert_of_copy.end(), 0);
  std::vector<std::pair<double, int>> heap;
  for (Index i = 0; i < loads.size(); ++i) heap.emplace_back(loads[i], -static_cast<int>(i));
  std::ranges::make_heap(heap);
  while (layout.expert_of_copy.size() < slots) {
    std::ranges::pop_heap(heap);
    const int i = -heap.back().second;
    if (copies[at(i)] == most) {
      limited = true;
      heap.pop_back();
      continue;
    }
    ++copies[at(i)];
    layout.expert_of_copy.push_back(i);
    heap.back().first = loads[at(i)] / copies[at(i)];
    std::ranges::push_heap(heap);
  }
  layout.weights.clear();
  for (const int i : layout.expert_of_copy) layout.weights.push_back(loads[at(i)] / copies[at(i)]);
  return limited;
}

/// The samples of one expert over their mean, 1 where it has none.
void append_shares(std::span<const double> samples, Index experts, Index e, std::vector<double>& shares) {
  double sum = 0;
  for (Index i = e; i < samples.size(); i += experts) sum += samples[i];
  const auto rows = static_cast<double>(samples.size() / experts);
  for (Index i = e; i < samples.size(); i += experts) shares.push_back(sum > 0 ? samples[i] * rows / sum : 1);
}

/// Steps 2 and 3 for one node. `shares`: by expert, the samples over their mean [N × rows].
Layout plan_node(std::span<const double> loads, std::span<const double> shares, const PlacementOptions& o) {
  const int devices = o.devices / o.nodes, slots = o.slots / o.nodes;
  Layout eplb;
  if (!o.refine || devices == 1) {
    replicate(loads, at(slots), slots, eplb);
    pack(eplb.weights, devices, {}, eplb.devices);
    return eplb;
  }
  const Index rows = shares.size() / loads.size();
  const auto exchange_samples = [&](Layout& layout, bool repeats) {
    std::vector<double> of_items;
    of_items.reserve(layout.weights.size() * rows);
    for (Index item = 0; item < layout.weights.size(); ++item) {
      for (const double share : shares.subspan(at(layout.expert_of_copy[item]) * rows, rows))
        of_items.push_back(layout.weights[item] * share);
    }
    return SampleExchange(std::move(of_items), rows, layout.devices, layout.expert_of_copy, repeats);
  };
  // Every copy on another device.
  Layout apart;
  const bool fits = at(slots / devices) <= loads.size();
  const bool limited = replicate(loads, at(slots), fits ? devices : slots, apart);
  const bool avoided = pack(apart.weights, devices, apart.expert_of_copy, apart.devices);
  if (!separate(apart.weights, apart.devices, apart.expert_of_copy) && fits)
    deal(apart.weights, apart.devices, apart.expert_of_copy);
  exchange(apart.weights, apart.devices, apart.expert_of_copy, false);
  double value = apart.largest();
  if (rows > 0) {
    SampleExchange search = exchange_samples(apart, false);
    search.run();
    value = search.largest();
  }
  // EPLB's rules, where they are more even. Without samples they are not, if they led to the same packs: exchanges only help.
  if (!o.repeats || (rows == 0 && !limited && !avoided)) return apart;
  if (limited) {
    replicate(loads, at(slots), slots, eplb);
  } else {
    eplb.expert_of_copy = apart.expert_of_copy;
    eplb.weights = apart.weights;
  }
  pack(eplb.weights, devices, {}, eplb.devices);
  if (rows > 0) {
    SampleExchange search = exchange_samples(eplb, true);
    if (search.largest() >= value * (1 - 1e-9)) return apart;
    search.run();
  } else {
    if (eplb.largest() >= value * (1 - 1e-9)) return apart;
    exchange(eplb.weights, eplb.devices, eplb.expert_of_copy, true);
  }
  return eplb;
}

/// The free slots of single_placement get an expert that their device lacks: again and again the expert and the device that leave
/// the smallest largest load. Each is a move.
void fill_free_slots(std::span<const double> loads, const PlacementOptions& o, Placement& plan) {
  const Index n = loads.size(), devices = at(o.devices), room = plan.experts.size() / devices,
              own = n / devices;
  if (n % devices != 0 || room == own) return;
  if (const int free = o.slots - static_cast<int>(n); o.max_moves < free) {
    refuse("max_moves", o.max_moves,
           "at least " + std::to_string(free) +
               ", the slots beyond one copy of each expert, where no device may hold an expert twice");
  }
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

/// From the placement of single copies, the best single move or exchange again and again, as long as moves are left.
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

}  // namespace

Placement linear_placement(int experts, const PlacementOptions& options) {
  const PlacementOptions o = resolved(experts, options);
  Placement placement{o.devices, std::vector<int>(at(o.slots))};
  for (int s = 0; s < o.slots; ++s) placement.experts[at(s)] = s % experts;
  return placement;
}

Placement single_placement(int experts, const PlacementOptions& options) {
  const PlacementOptions o = resolved(experts, options);
  if (experts % o.devices != 0) return linear_placement(experts, options);
  const int room = o.slots / o.devices, own = experts / o.devices;
  Placement placement{o.devices, {}};
  for (int d = 0; d < o.devices; ++d) {
    for (int s = 0; s < room; ++s) placement.experts.push_back(d * own + s % own);
  }
  return placement;
}

Placement plan_placement(std::span<const double> loads, const PlacementOptions& options,
                         std::span<const double> samples) {
  const auto n = static_cast<int>(loads.size());
  const PlacementOptions o = resolved(n, options);
  if (samples.size() % loads.size() != 0)
    throw std::invalid_argument("samples: must hold rows of one load for each expert");
  for (const double load : loads) {
    if (!(load >= 0 && std::isfinite(load)))
      throw std::invalid_argument("loads: must be finite and at least 0");
  }
  if (o.max_moves >= 0) return plan_few_moves(loads, o);
  // 1. Groups to nodes.
  const int group_size = n / o.groups;
  std::vector<double> group_loads(at(o.groups), 0.0), node_loads;
  for (int e = 0; e < n; ++e) group_loads[at(e / group_size)] += loads[at(e)];
  Devices groups_of_node;
  pack(group_loads, o.nodes, {}, groups_of_node);
  Placement placement{o.devices, {}};
  placement.experts.reserve(at(o.slots));
  std::vector<int> local;
  for (const auto& groups : groups_of_node) {
    local.clear();
    node_loads.clear();
    for (const int g : groups) {
      for (int e = g * group_size; e < (g + 1) * group_size; ++e) {
        local.push_back(e);
        node_loads.push_back(loads[at(e)]);
      }
    }
    std::vector<double> shares;
    for (const int e : local) append_shares(samples, loads.size(), at(e), shares);
    const Layout layout = plan_node(node_loads, shares, o);
    for (const auto& items : layout.devices) {
      for (const int item : items) placement.experts.push_back(local[at(layout.expert_of_copy[at(item)])]);
    }
  }
  return placement;
}

int moves_between(const Placement& from, const Placement& to) {
  const Index room = to.experts.size() / at(to.devices), room_before = from.experts.size() / at(from.devices);
  int moves = 0;
  for (int d = 0; d < to.devices; ++d) {
    std::vector<int> before;
    if (d < from.devices) {
      const auto start = from.experts.begin() + static_cast<std::ptrdiff_t>(at(d) * room_before);
      before.assign(start, start + static_cast<std::ptrdiff_t>(room_before));
    }
    for (Index s = at(d) * room; s < (at(d) + 1) * room; ++s) {
      if (std::ranges::find(before, to.experts[s]) != before.end()) continue;
      before.push_back(to.experts[s]);
      ++moves;
    }
  }
  return moves;
}

Placement renamed_for(const Placement& plan, const Placement& current, int nodes) {
  if (nodes < 1 || plan.devices % nodes != 0 || plan.devices != current.devices ||
      plan.experts.size() != current.experts.size())
    throw std::invalid_argument("renamed_for: the placements must have the same devices and slots");
  const Index room = plan.experts.size() / at(plan.devices), per_node = at(plan.devices / nodes),
              devices = at(plan.devices);
  // What device b of the plan has in common with device a of today.
  std::vector<int> common(devices * devices, 0);
  for (Index a = 0; a < devices; ++a) {
    for (Index b = 0; b < devices; ++b) {
      for (Index s = 0; s < room; ++s) {
        const auto from = current.experts.begin() + static_cast<std::ptrdiff_t>(a * room);
        common[a * devices + b] += static_cast<int>(
            std::count(from, from + static_cast<std::ptrdiff_t>(room), plan.experts[b * room + s]) > 0);
      }
    }
  }
  /// Pairs rows and columns, those with the most in common first.
  const auto match = [](Index n, auto value) {
    std::vector<std::pair<int, std::pair<Index, Index>>> pairs;
    for (Index a = 0; a < n; ++a) {
      for (Index b = 0; b < n; ++b) pairs.push_back({-value(a, b), {a, b}});
    }
    std::ranges::sort(pairs);
    std::vector<Index> of(n, n);
    std::vector<bool> taken(n, false);
    for (const auto& [negative, pair] : pairs) {
      if (of[pair.first] != n || taken[pair.second]) continue;
      of[pair.first] = pair.second;
      taken[pair.second] = true;
    }
    return of;
  };
  const auto node_value = [&](Index a, Index b) {
    int sum = 0;
    for (Index i = 0; i < per_node; ++i) {
      for (Index j = 0; j < per_node; ++j) sum += common[(a * per_node + i) * devices + b * per_node + j];
    }
    return sum;
  };
  const auto node_of = match(at(nodes), node_value);
  Placement renamed{plan.devices, {}};
  for (Index a = 0; a < at(nodes); ++a) {
    const Index b = node_of[a];
    const auto device_of = match(
        per_node, [&](Index i, Index j) { return common[(a * per_node + i) * devices + b * per_node + j]; });
    for (const Index j : device_of) {
      const auto from = plan.experts.begin() + static_cast<std::ptrdiff_t>((b * per_node + j) * room);
      renamed.experts.insert(renamed.experts.end(), from, from + static_cast<std::ptrdiff_t>(room));
    }
  }
  return renamed;
}

std::vector<double> device_loads(const Placement& placement, std::span<const double> loads) {
  std::vector<int> copies(loads.size(), 0);
  for (const int expert : placement.experts) ++copies[at(expert)];
  std::vector<double> sums(at(placement.devices), 0.0);
  const Index room = placement.experts.size() / sums.size();
  for (Index s = 0; s < placement.experts.size(); ++s) {
    const Index expert = at(placement.experts[s]);
    sums[s / room] += loads[expert] / copies[expert];
  }
  return sums;
}

double balancedness(const Placement& placement, std::span<const double> loads) {
  const auto sums = device_loads(placement, loads);
  const double largest = *std::ranges::max_element(sums);
  return largest > 0
             ? std::accumulate(sums.begin(), sums.end(), 0.0) / static_cast<double>(sums.size()) / largest
             : 1;
}

std::vector<double> forecast_loads(std::span<const double> history, int experts) {
  constexpr double kClearly = 0.9;
  if (experts < 1 || history.size() % at(experts) != 0)
    throw std::invalid_argument("history: must hold rows of one load for each expert");
  const Index n = at(experts), rows = history.size() / n;
  // Mean share over rows [from, to).
  const auto shares = [&](Index from, Index to) {
    std::vector<double> mean(n, 0.0);
    for (Index r = from; r < to; ++r) {
      for (Index i = 0; i < n; ++i) mean[i] += history[r * n + i];
    }
    const double sum = std::accumulate(mean.begin(), mean.end(), 0.0);
    for (double& m : mean) m = sum > 0 ? m / sum : 0;
    return mean;
  };
  if (rows < 4) return shares(0, rows);
  // Each window is tried from several points of the past, on all that came after: plans are used for long.
  const double even = 1.0 / static_cast<double>(n);
  const Index origins[] = {rows / 2, rows * 5 / 8, rows * 3 / 4, rows * 7 / 8};
  double least = HUGE_VAL, shrink = 1;
  Index window = rows;
  for (Index w = rows; w >= 2; w /= 2) {
    double cross = 0, square = 0, later_square = 0;
    for (const Index origin : origins) {
      const std::vector<double> earlier = shares(origin - std::min(w, origin), origin);
      const std::vector<double> later = shares(origin, rows);
      for (Index i = 0; i < n; ++i) {
        const double x = earlier[i] - even, y = later[i] - even;
        cross += x * y;
        square += x * x;
        later_square += y * y;
      }
    }
    const double slope = square > 0 ? std::clamp(cross / square, 0.0, 1.0) : 0;
    const double error = later_square - 2 * slope * cross + slope * slope * square;
    // A shorter window has to be clearly better: the one that is best by chance is not.
    if (error < least * (w == rows ? 1 : kClearly)) {
      least = error;
      shrink = slope;
      window = w;
    }
  }
  std::vector<double> forecast = shares(rows - window, rows);
  // A little is kept, so that the order of the loads decides between plans that are otherwise equal.
  for (double& f : forecast) f = even + std::max(shrink, 1e-3) * (f - even);
  return forecast;
}

}  // namespace moectl
