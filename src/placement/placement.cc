#include "moectl/placement.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

#include "placement/eplb.h"
#include "placement/few_moves.h"
#include "placement/refine.h"

namespace moectl {
namespace {

using namespace placing;  // NOLINT(google-build-using-namespace): its parts are put together here

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
  if (o.max_moves >= 0) {
    // Free slots have to be filled, each by a move.
    if (const int free = o.slots - n; !o.repeats && n % o.devices == 0 && o.max_moves < free) {
      refuse("max_moves", o.max_moves,
             "at least " + std::to_string(free) +
                 ", the slots beyond one copy of each expert, where no device may hold an expert twice");
    }
    return plan_few_moves(loads, o);
  }
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

}  // namespace moectl
