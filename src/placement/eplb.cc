#include "placement/eplb.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace moectl::placing {

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

}  // namespace moectl::placing
