// How much do a filter's innovations resemble earlier ones? A filter that is tuned right leaves nothing alike.
//
// ρ_l is the correlation over the N experts between the innovations now and l decisions ago, a_l its average over decisions
// (weight 0.2). The loop swings if the lowest a_l of the lags that are looked at is below -0.8/√(N-1), clear of chance.
// "Distant" is the mean of a_5 … a_12: a trend that the filter misses leaves innovations alike for long.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/lanes.h"
#include "moectl/state.h"
#include "policies/load_error.h"

namespace moectl::policies {

class Whiteness {
 public:
  static constexpr std::size_t kLags = 12, kNear = 4;

  explicit Whiteness(std::size_t experts)
      : n_(experts), innovations_(kRows * experts), norms_(kRows), correlations_(kLags) {}

  /// The innovations of this decision, to be written before measure(), and of the last one [N].
  std::span<double> newest() { return row(0); }
  std::span<double> last() { return row(1); }

  /// Σ z² of the newest, whose effects are within ±kMostEffect.
  double measure() {
    const double square = dot(newest(), newest());
    norms_[slot(0)] = std::sqrt(square);
    return square;
  }
  /// After measure(): the correlations. `lags`: how many of them may tell of a swing.
  void compare(std::size_t lags) {
    nearest_ = lowest_ = distant_ = 0;
    std::array<double, kTogether> products{};
    for (std::size_t lag = 1; lag <= kLags && static_cast<std::int64_t>(lag) <= decisions_; ++lag) {
      const std::size_t place = (lag - 1) % kTogether;
      if (place == 0) products = products_from(lag);
      const double scale = norms_[slot(0)] * norms_[slot(lag)];
      const double r = scale > 0 ? std::clamp(products[place] / scale, -1.0, 1.0) : 0;
      double& average = correlations_[lag - 1];
      average += kEma * (r - average);
      if (lag <= lags) lowest_ = std::min(lowest_, average);
      if (lag == 1) nearest_ = r;
      if (lag > kNear) distant_ += average / (kLags - kNear);
    }
    swings_ = lowest_ < -kSignificance / std::sqrt(std::max(1.0, static_cast<double>(n_) - 1));
  }
  void next() { ++decisions_; }

  double nearest() const { return nearest_; }  ///< ρ_1
  double lowest() const { return lowest_; }
  double distant() const { return distant_; }
  bool swings() const { return swings_; }
  /// Before this one.
  std::int64_t decisions() const { return decisions_; }

  void exchange(StateIo& io) {
    io.value("whiteness.decisions", decisions_);
    io.values("whiteness.innovations", innovations_, {-kMostEffect, kMostEffect});
    io.values("whiteness.norms", norms_, {0, 1e100});
    io.values("whiteness.correlations", correlations_, {-1, 1});
  }

 private:
  static constexpr std::size_t kRows = kLags + 1;
  static constexpr std::size_t kTogether = 4;  // lags in one pass over the experts
  static_assert(kLags % kTogether == 0);
  static constexpr double kEma = 0.2, kSignificance = 0.8;

  // Of the newest with those of `lag` and the lags after it.
  std::array<double, kTogether> products_from(std::size_t lag) {
    const double* const now = newest().data();
    std::array<const double*, kTogether> then;
    for (std::size_t k = 0; k < kTogether; ++k) then[k] = row(lag + k).data();
    return sums_over<kTogether>(n_, [&](std::size_t i, auto at, Double8* sums) {
      const Double8 z = at.get(now + i);
      for (std::size_t k = 0; k < kTogether; ++k) sums[k] += z * at.get(then[k] + i);
    });
  }

  // Rings: of this decision, and of those `back` before it.
  std::size_t slot(std::size_t back) const {
    return (static_cast<std::size_t>(decisions_) + kRows - back) % kRows;
  }
  std::span<double> row(std::size_t back) { return std::span(innovations_).subspan(slot(back) * n_, n_); }

  std::size_t n_;
  std::vector<double> innovations_, norms_, correlations_;  // z [kRows × N], |z| [kRows], a_l [kLags]
  std::int64_t decisions_ = 0;
  double nearest_ = 0, lowest_ = 0, distant_ = 0;
  bool swings_ = false;
};

}  // namespace moectl::policies
