#include "moectl/margins.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace moectl {
namespace {

constexpr std::size_t kHalf = kMarginBins / 2;
// The exponent and first mantissa bit of a float number its half octaves; the first bin ends at 1.5 · 2^-20.
constexpr int kShift = 22;
constexpr std::uint32_t kSmallest = (127 - 20) << 1;

}  // namespace

std::size_t margin_bin(float margin) {
  const std::uint32_t half_octave = std::bit_cast<std::uint32_t>(std::fabs(margin)) >> kShift;
  const std::size_t distance =
      std::min<std::size_t>(half_octave > kSmallest ? half_octave - kSmallest : 0, kHalf - 1);
  return margin < 0 ? kHalf - 1 - distance : kHalf + distance;
}

double margin_edge(std::size_t distance) {
  if (distance == 0) return 0;
  return std::ldexp(distance % 2 == 1 ? 1.5 : 1.0, static_cast<int>(distance / 2) - 20);
}

double margin_quantile(std::span<const std::int64_t, kMarginBins> bins, double wanted) {
  double selected = 0;
  for (std::size_t j = 0; j < kHalf; ++j) selected += static_cast<double>(bins[j]);
  const bool up = wanted > selected;
  const double needed = std::abs(wanted - selected);
  if (!(needed > 0)) return 0;
  double passed = 0;
  for (std::size_t distance = 0; distance < kHalf; ++distance) {
    const auto count = static_cast<double>(bins[up ? kHalf + distance : kHalf - 1 - distance]);
    if (passed + count >= needed) {
      const double near = margin_edge(distance), far = margin_edge(distance + 1);
      const double x = near + (needed - passed) / count * (far - near);
      return up ? x : -x;
    }
    passed += count;
  }
  return up ? margin_edge(kHalf) : -margin_edge(kHalf);
}

RequiredRange required_range(std::span<const double> biases) {
  const auto [least, most] = std::minmax_element(biases.begin(), biases.end());
  return {.low = *least - 1, .width = *most + 1 - (*least - 1)};
}

std::size_t required_bin(const RequiredRange& range, double required) {
  constexpr auto kBins = static_cast<double>(kRequiredBins);
  const double place = std::floor((required - range.low) / range.width * kBins);
  return static_cast<std::size_t>(std::clamp(place, 0.0, kBins - 1));
}

double required_bias(const RequiredRange& range, std::span<const std::int64_t, kRequiredWords> words,
                     double wanted) {
  constexpr std::int64_t kLow = 0xffffffff;
  double before = 0;
  for (std::size_t bin = 0;; ++bin) {
    const std::int64_t word = words[bin / 2];
    const auto count = static_cast<double>(bin % 2 == 0 ? word & kLow : word >> 32);
    if (before + count < wanted && bin + 1 < kRequiredBins) {
      before += count;
      continue;
    }
    const double part = count > 0 ? std::min((wanted - before) / count, 1.0) : 0;
    return range.low + (static_cast<double>(bin) + part) * (range.width / static_cast<double>(kRequiredBins));
  }
}

}  // namespace moectl
