// The rules of DeepSeek's EPLB (github.com/deepseek-ai/EPLB, eplb.py): the heaviest first, each where the load is least.
#pragma once

#include <span>

#include "placement/layout.h"

namespace moectl::placing {

/// Fills packs of equal size, the heaviest item first, each into the lightest pack with room. Writes the items of pack p
/// in the order in which they came. `same`: items with one number, such as copies of one expert, avoid each other's pack. True if that
/// made a difference.
bool pack(std::span<const double> weights, int packs, std::span<const int> same, Devices& out);

/// Fills the slots: one more copy at a time goes to the expert with the largest load per copy, of equal ones to the first. No expert
/// gets more than `most`. True if that limit changed the result.
bool replicate(std::span<const double> loads, Index slots, int most, Layout& layout);

}  // namespace moectl::placing
