#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "moectl/placement.h"
#include "placement/layout.h"

namespace moectl {

using placing::at, placing::Index;

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
