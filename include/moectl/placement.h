// Placement: which device holds a copy of which expert, so that devices of a serving cluster carry equal loads.
//
// A device has slots; a slot holds one copy of one expert; the load of an expert is shared evenly by its copies. A plan is
// made from past loads and used on later ones, so what counts is its balance on loads that it has not seen. The rules of
// the plan are those of DeepSeek's EPLB (github.com/deepseek-ai/EPLB, eplb.py):
//   1. groups of experts are packed onto nodes, the heaviest first, each onto the lightest node with room;
//   2. on each node, one more copy at a time goes to the expert with the largest load per copy, until the slots are full;
//   3. the copies are packed onto the node's devices, the heaviest first, each onto the lightest device with room.
// With one node the plan is global: groups mean nothing. `refine` adds what EPLB lacks: copies of one expert go to different
// devices, and copies are exchanged between the most loaded device and others while that lowers the largest load.
#pragma once

#include <span>
#include <vector>

namespace moectl {

struct PlacementOptions {
  int devices = 1;  ///< ≥ 1.
  int nodes = 1;    ///< Must divide devices and groups.
  int groups = 0;   ///< Groups of neighbouring experts that stay on one node; 0 = every expert for itself.
  /// Of all devices; a multiple of devices, at least the experts; 0 = the smallest such number.
  int slots = 0;
  /// false: EPLB's rules alone, with copies of one expert apart where `repeats` is false.
  bool refine = true;
  /// May a device hold two copies of one expert? They serve no other device, but where there are few slots, and as EPLB does it, they can
  /// make loads more even. false: no, for engines that keep one copy; a device then has no more slots than its node has experts.
  bool repeats = true;
  /// Experts that may be loaded onto devices that lack them; -1 = any number. Needs nodes = 1.
  int max_moves = -1;
  friend bool operator==(const PlacementOptions&, const PlacementOptions&) = default;
};

/// The placement of one layer.
struct Placement {
  int devices = 1;
  /// The expert in each slot [slots]; device d has the slots from d · slots/devices on. Others call it phy2log.
  std::vector<int> experts;
  friend bool operator==(const Placement&, const Placement&) = default;
};

/// Slot s holds expert s mod N: what engines start with. Throws std::invalid_argument on options that do not fit.
Placement linear_placement(int experts, const PlacementOptions& options);
/// One copy of each expert, in order, where the devices divide the experts: what a plan has to beat. Slots beyond that are free:
/// each holds another copy of an expert that its device has, which changes no load. Else linear_placement. Throws likewise.
Placement single_placement(int experts, const PlacementOptions& options);
/// The plan for these loads [N], finite and ≥ 0, in any unit. `samples`, if given, are rows of N loads of single steps: then
/// copies are exchanged while that lowers the mean over the samples of the largest device load, so that experts which are
/// heavy in the same steps come apart. Each expert's samples are scaled to its load. Copies of one expert are on different devices,
/// unless a device has more slots than its node has experts, or EPLB's rules would give a plan that is more even on the loads (or
/// samples): no plan with repeats is less even than theirs. With `max_moves` ≥ 0 the plan starts from single_placement, and its largest device load
/// is never above that one's while free slots may stay free (`repeats`). Throws std::invalid_argument.
Placement plan_placement(std::span<const double> loads, const PlacementOptions& options,
                         std::span<const double> samples = {});
/// The same plan with its devices (and nodes) renamed, so that few copies have to move from `current`.
Placement renamed_for(const Placement& plan, const Placement& current, int nodes);
/// Experts that devices hold under `to` and not under `from`: another copy on the same device is no move.
int moves_between(const Placement& from, const Placement& to);

/// Load of each device [devices].
std::vector<double> device_loads(const Placement& placement, std::span<const double> loads);
/// Mean over largest device load, in (0, 1]; 1 = even. 1 without any load. Called balancedness by vLLM and SGLang.
double balancedness(const Placement& placement, std::span<const double> loads);

/// What the loads will be, from their history: `history` holds rows of N loads, oldest first, each a part of the past.
/// The mean of the last rows, as many of them as would have predicted the last quarter of the history best, shrunk
/// towards the mean over experts by as much as that prediction was too extreme: noise is no reason to move an expert. With
/// fewer than 4 rows it is their mean. Sums to 1, or is 0 without any load.
std::vector<double> forecast_loads(std::span<const double> history, int experts);

}  // namespace moectl
