// The peer of plan_placement(): DeepSeek's EPLB by its rules (github.com/deepseek-ai/EPLB, eplb.py), written anew and plainly.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

namespace moectl::peer {

/// Items by falling weight, each into the lightest pack that has room. Returns the items of each pack.
inline std::vector<std::vector<int>> balanced_packing(const std::vector<double>& weights, int packs) {
  const auto n = weights.size();
  const std::size_t room = n / static_cast<std::size_t>(packs);
  std::vector<std::vector<int>> items(static_cast<std::size_t>(packs));
  if (room == 1) {
    for (std::size_t i = 0; i < n; ++i) items[i].push_back(static_cast<int>(i));
    return items;
  }
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return weights[static_cast<std::size_t>(a)] > weights[static_cast<std::size_t>(b)];
  });
  std::vector<double> sums(static_cast<std::size_t>(packs), 0.0);
  for (const int item : order) {
    std::size_t best = items.size();
    for (std::size_t p = 0; p < items.size(); ++p) {
      if (items[p].size() < room && (best == items.size() || sums[p] < sums[best])) best = p;
    }
    items[best].push_back(item);
    sums[best] += weights[static_cast<std::size_t>(item)];
  }
  return items;
}

/// phy2log of one layer.
inline std::vector<int> eplb(const std::vector<double>& weights, int slots, int groups, int nodes,
                             int devices) {
  if (groups % nodes != 0) groups = nodes = 1;  // the global policy
  const auto experts = static_cast<int>(weights.size());
  const int group_size = experts / groups;
  std::vector<double> of_group(static_cast<std::size_t>(groups), 0.0);
  for (int e = 0; e < experts; ++e)
    of_group[static_cast<std::size_t>(e / group_size)] += weights[static_cast<std::size_t>(e)];
  std::vector<int> phy2log;
  for (const auto& node : balanced_packing(of_group, nodes)) {
    std::vector<int> log;
    for (const int g : node) {
      for (int e = 0; e < group_size; ++e) log.push_back(g * group_size + e);
    }
    std::vector<double> load;
    for (const int e : log) load.push_back(weights[static_cast<std::size_t>(e)]);
    std::vector<int> copies(log.size(), 1), of_copy(log.size());
    std::iota(of_copy.begin(), of_copy.end(), 0);
    while (static_cast<int>(of_copy.size()) < slots / nodes) {
      std::size_t most = 0;
      for (std::size_t i = 1; i < load.size(); ++i) {
        if (load[i] / copies[i] > load[most] / copies[most]) most = i;
      }
      of_copy.push_back(static_cast<int>(most));
      ++copies[most];
    }
    std::vector<double> of_slot;
    for (const int i : of_copy)
      of_slot.push_back(load[static_cast<std::size_t>(i)] / copies[static_cast<std::size_t>(i)]);
    for (const auto& device : balanced_packing(of_slot, devices / nodes)) {
      for (const int slot : device)
        phy2log.push_back(log[static_cast<std::size_t>(of_copy[static_cast<std::size_t>(slot)])]);
    }
  }
  return phy2log;
}

}  // namespace moectl::peer
