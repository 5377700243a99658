#include "moectl/load_targets.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "base/format.h"

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
  for (std::size_t i = 0; i < shares.size(); ++i) {
    if (!(shares[i] >= 0 && shares[i] <= 1)) {
      throw std::invalid_argument("targets[" + std::to_string(i) + "]: " + exact(shares[i]) +
                                  ": must be 0 to 1");
    }
    sum += shares[i];
  }
  if (!(std::abs(sum - 1) <= 1e-6))
    throw std::invalid_argument("targets: sum " + exact(sum) + ": must sum to 1 within 1e-6");
  if (std::all_of(shares.begin(), shares.end(), [&](double w) { return w == shares[0]; })) return;
  shares_.assign(shares.begin(), shares.end());
  wanted_ =
      static_cast<int>(std::count_if(shares.begin(), shares.end(), [](double share) { return share > 0; }));
}

}  // namespace moectl
