// By how many decisions is the routing later than declared? Found from the changes of the errors.
//
// The idea. If the biases moved by Δb and the routing is l decisions later than the declared d, the errors change by -s Δb
// d + l decisions later. So for each l from 0 to 4: how much of the last change of the errors is left over after the moves
// made then are subtracted?
//
//   evidence_l = 0.9 evidence_l
//                - M/2 ln(1 + Σ_i ((e_i - e_i(t-1) + s_i Δb_i(t-d-l))² + κ² (s_i Δb_i(t-d-l))²) / (2 M R))
//
// The sum is over the M experts that are not far (under a tenth of the target, or twice it). R is not trusted here: with a
// fixed variance, a wrong slope would soon look like a wrong delay. So this is the logarithm of the likelihood of M changes
// whose variance is unknown. Another l is believed if its evidence is 10 above that of the present one and that of "moves
// have no effect at all", so that the wrong one is e^10 times less likely. The factor 0.9 forgets in ten decisions. Nothing is
// added unless one of the last five moves is above the noise: at rest the loop's own correlation would decide.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/lanes.h"
#include "moectl/state.h"
#include "policies/load_error.h"

namespace moectl::policies {

class Lateness {
 public:
  /// Steps beyond the declared delay that are looked for.
  static constexpr std::size_t kMost = 4;

  std::size_t steps() const { return static_cast<std::size_t>(steps_); }

  /// `errors`, `last`: of this decision and the one before, clipped to ±1 [N]. `slope`: [N]. `past(d)`: the biases of
  /// the declared delay and d more decisions ago, d up to kMost + 1 [N]. `noise`: R. `doubt_sq`: κ².
  template <class Past>
  void observe(std::span<const double> errors, std::span<const double> last, std::span<const double> slope,
               double noise, double doubt_sq, Past past) {
    const std::size_t n = errors.size();
    const auto tells = [&](std::size_t i, auto at) {
      const Double8 far = is_far(at.get(&errors[i])) + is_far(at.get(&last[i]));
      return at.keep(equal(far, splat(0)));
    };
    std::array<std::span<const double>, kMost + 2> biases;
    for (std::size_t late = 0; late < biases.size(); ++late) biases[late] = past(late);
    const auto move = [&](std::size_t late, std::size_t i, auto at) -> Double8 {
      const Double8 way = at.get(&biases[late][i]) - at.get(&biases[late + 1][i]);
      return within(at.get(&slope[i]) * way, splat(kMostEffect));
    };
    const auto [newest_sq, told] = sums_over<2>(n, [&](std::size_t i, auto at, Double8* sums) {
      const Double8 tell = tells(i, at), newest = move(0, i, at);
      sums[0] += tell * newest * newest;
      sums[1] += tell;
    });
    std::copy_backward(moved_.begin(), moved_.end() - 1, moved_.end());
    moved_[0] = newest_sq;
    for (double& evidence : evidence_) evidence *= kKept;
    const double largest = *std::max_element(moved_.begin(), moved_.end());
    if (!(told > 1 && largest > told * noise)) return;
    const auto left = sums_over<kMost + 2>(n, [&](std::size_t i, auto at, Double8* sums) {
      const Double8 tell = tells(i, at), change = at.get(&errors[i]) - at.get(&last[i]);
      for (std::size_t late = 0; late <= kMost; ++late) {
        const Double8 made = move(late, i, at), rest = change + made;
        sums[late] += tell * (rest * rest + doubt_sq * made * made);
      }
      sums[kMost + 1] += tell * change * change;  // no effect at all
    });
    for (std::size_t late = 0; late < left.size(); ++late)
      evidence_[late] -= told / 2 * std::log1p(left[late] / (2 * told * noise));
    const auto best = std::max_element(evidence_.begin(), evidence_.end() - 1);
    if (*best > std::max(evidence_[steps()], evidence_.back()) + kClear) steps_ = best - evidence_.begin();
  }

  void exchange(StateIo& io) {
    io.value("lateness.steps", steps_, {0, static_cast<std::int64_t>(kMost)});
    io.values("lateness.evidence", evidence_, {-1e10, 0});
    io.values("lateness.moved", moved_, {0, 1e120});
  }

 private:
  static constexpr double kKept = 0.9, kClear = 10;
  std::array<double, kMost + 2> evidence_{};  // the last entry: no effect at all
  std::array<double, kMost + 1> moved_{};     // Σ (s Δb)² of the last moves, the newest first
  std::int64_t steps_ = 0;
};

}  // namespace moectl::policies
