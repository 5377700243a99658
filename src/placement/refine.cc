#include "placement/refine.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <utility>

#include "placement/eplb.h"

namespace moectl::placing {
namespace {

bool holds(const std::vector<int>& items, int of, std::span<const int> expert) {
  return std::ranges::any_of(items, [&](int other) { return expert[at(other)] == of; });
}

/// Of each copy on a device: whether `others` have one of its expert. `none`: it is not asked.
std::vector<char> held_too(const std::vector<int>& items, const std::vector<int>& others,
                           std::span<const int> expert, bool none) {
  std::vector<char> found(items.size(), 0);
  if (none) return found;
  std::vector<int> there(others.size());
  std::ranges::transform(others, there.begin(), [&](int other) { return expert[at(other)]; });
  std::ranges::sort(there);
  std::ranges::transform(items, found.begin(), [&](int item) {
    return static_cast<char>(std::ranges::binary_search(there, expert[at(item)]));
  });
  return found;
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
      const std::vector<char> a_held = held_too(devices[h], devices[d], expert, repeats),
                              b_held = held_too(devices[d], devices[h], expert, repeats);
      for (Index a = 0; a < devices[h].size(); ++a) {
        const double wa = weights[at(devices[h][a])];
        for (Index b = 0; b < devices[d].size(); ++b) {
          const double less = wa - weights[at(devices[d][b])];
          const double larger = std::max(sums[h] - less, sums[d] + less);
          if (larger >= best || a_held[a] || b_held[b]) continue;
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
      const std::vector<char> a_held = held_too(devices_[h], devices_[d], expert_, repeats_),
                              b_held = held_too(devices_[d], devices_[h], expert_, repeats_);
      for (Index a = 0; a < devices_[h].size(); ++a) {
        if (a_held[a]) continue;
        const double* from = row(devices_[h][a]);
        for (Index b = 0; b < devices_[d].size(); ++b) {
          if (b_held[b]) continue;
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

}  // namespace

void append_shares(std::span<const double> samples, Index experts, Index e, std::vector<double>& shares) {
  double sum = 0;
  for (Index i = e; i < samples.size(); i += experts) sum += samples[i];
  const Index whole_rows = samples.size() / experts;
  const auto rows = static_cast<double>(whole_rows);
  for (Index i = e; i < samples.size(); i += experts) shares.push_back(sum > 0 ? samples[i] * rows / sum : 1);
}

Layout plan_node(std::span<const double> loads, std::span<const double> shares, const PlacementOptions& o) {
  const int devices = o.devices / o.nodes, slots = o.slots / o.nodes;
  Layout eplb;
  if ((!o.refine && o.repeats) || devices == 1) {
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
  if (!o.refine) return apart;
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

}  // namespace moectl::placing
