#include "moectl/load_targets.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace moectl {

LoadTargets::LoadTargets(int experts, std::span<const double> shares) : experts_(experts), wanted_(experts) {
  if (experts < 1)
    throw std::invalid_argument("experts: " + std::to_string(experts) + ": must be at least 1");
  if (shares.empty()) return;
  if (shares.size() != static_cast<std::size_t>(experts)) {
    throw std::invalid_argument("targets: " + std::to_string(shares.size()) +
                                " shares: must be one for each of " + std::to_string(experts) + " experts");
  }
  double sum = 0;
  for (const double share : shares) {
    if (!(share >= 0 && share <= 1))
      throw std::invalid_argument("targets: " + std::to_string(share) + ": must be 0 to 1");
    sum += share;
  }
  if (!(std::abs(sum - 1) <= 1e-6))
    throw std::invalid_argument("targets: sum " + std::to_string(sum) + ": must sum to 1 within 1e-6");
  if (std::all_of(shares.begin(), shares.end(), [&](double w) { return w == shares[0]; })) return;
  shares_.assign(shares.begin(), shares.end());
  wanted_ =
      static_cast<int>(std::count_if(shares.begin(), shares.end(), [](double share) { return share > 0; }));
}

}  // namespace moectl
