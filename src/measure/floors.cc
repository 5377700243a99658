#include "measure/floors.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numbers>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "moectl/metrics.h"

namespace moectl {
namespace {

// For N ≥ 2 experts whose loads have equal scatter.
Floors equal_floors(int experts, double unit_cv) {
  const double n = experts;
  const double z = normal_quantile((n - 0.375) / (n + 0.25));  // Blom's score of the largest of N
  return {unit_cv, z * std::sqrt(n / (n - 1)), (z * z - 1) / 6};
}

double unit_cv(int experts, int top_k) {
  return std::sqrt(std::max(0.0, static_cast<double>(experts) / top_k - 1));
}

double normal_below(double x) {
  return 0.5 * std::erfc(-x / std::numbers::sqrt2);
}

}  // namespace

// The integral of 1 - ΠΦ(x/σ_i) above zero less that of ΠΦ(x/σ_i) below, at midpoints in u of x = s sinh u, s the
// narrowest: they resolve it near zero, and the widest farther out. The product is smooth in u and falls off at both
// ends, so that midpoints converge faster than any power of their distance. Factors that are 1, and products that
// vanish, are not followed to their end: what is left are some hundred points at which it costs N error functions.
double expected_largest(std::span<const double> deviations) {
  constexpr double kStep = 0.03, kEnd = 9;             // Φ(-9) = 1e-19
  constexpr double kCertain = 8.3, kVanishes = 1e-18;  // 1 - Φ(8.3) = 5e-17
  constexpr double kNarrowest = 1e-6;                  // of the widest: contributes nothing of its own
  std::vector<double> sorted(deviations.begin(), deviations.end());
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const double widest = sorted.front();
  std::vector<std::pair<double, int>> different;  // and how many there are of each, widest first
  for (const double deviation : sorted) {
    const double d = std::max(deviation, kNarrowest * widest);
    if (different.empty() || different.back().first != d) different.emplace_back(d, 0);
    ++different.back().second;
  }
  const double scale = different.back().first, end = std::asinh(kEnd * widest / scale);
  const auto product = [&](double x) {
    double below = 1;
    for (const auto& [d, number] : different) {
      if (x > kCertain * d || below < kVanishes) break;
      const double one = normal_below(x / d);
      below *= number == 1 ? one : std::pow(one, number);
    }
    return below;
  };
  double sum = 0, u = kStep / 2;
  while (u < end) {
    const double x = scale * std::sinh(u);
    sum += (1 - product(x) - product(-x)) * scale * std::cosh(u);
    u += kStep;
  }
  return sum * kStep;
}

// A token chooses expert i with probability k w_i: of T tokens, its load scatters by √((1/(k w_i) - 1)/T) of its
// target. An expert with target 0 has no scatter.
Floors floors_of(const LoadTargets& targets, int top_k) {
  const int wanted = targets.wanted();
  if (wanted < 2) return {};
  if (targets.equal()) return equal_floors(wanted, unit_cv(wanted, top_k));
  std::vector<double> deviations;
  double squares = 0;
  for (const double w : targets.shares()) {
    if (!(w > 0)) continue;
    const double square = std::max(0.0, 1 / (top_k * w) - 1);
    squares += square;
    deviations.push_back(std::sqrt(square));
  }
  Floors floors = equal_floors(wanted, std::sqrt(squares / wanted));
  if (floors.unit_cv > 0) {
    const double n = wanted;
    floors.linear = expected_largest(deviations) / floors.unit_cv * std::sqrt(n / (n - 1));
  }
  return floors;
}

std::optional<double> noise_floor_cv(int experts, int top_k, double tokens) {
  if (!(tokens > 0) || experts < 1 || top_k < 1) return std::nullopt;
  return std::sqrt(std::max(0.0, static_cast<double>(experts) / top_k - 1) / tokens);
}

std::optional<double> noise_floor_cv(const LoadTargets& targets, int top_k, double tokens) {
  if (targets.equal()) return noise_floor_cv(targets.experts(), top_k, tokens);
  if (!(tokens > 0) || top_k < 1) return std::nullopt;
  return floors_of(targets, top_k).unit_cv / std::sqrt(tokens);
}

std::optional<double> max_vio_of_cv(int experts, double cv) {
  if (experts < 2 || !(cv >= 0)) return std::nullopt;
  return equal_floors(experts, 0).max_vio(cv);
}

std::optional<double> noise_floor_max_vio(const LoadTargets& targets, int top_k, double tokens) {
  const auto cv = noise_floor_cv(targets, top_k, tokens);
  if (!cv || targets.experts() < 2) return std::nullopt;
  return floors_of(targets, top_k).max_vio(*cv);
}

double normal_quantile(double p) {
  if (!(p > 0 && p < 1))
    throw std::invalid_argument("p: " + std::to_string(p) + ": must be above 0 and below 1");
  if (p == 0.5) return 0;
  if (p > 0.5) return -normal_quantile(1 - p);  // 1 - p is exact here
  // Abramowitz & Stegun 26.2.23, error below 4.5e-4, then Halley's method on Φ(x) = erfc(-x/√2)/2, which
  // cubes the error: twice is enough.
  const double t = std::sqrt(-2 * std::log(p));
  double x =
      (2.515517 + t * (0.802853 + t * 0.010328)) / (1 + t * (1.432788 + t * (0.189269 + t * 0.001308))) - t;
  for (int i = 0; i < 2; ++i) {
    const double error = 0.5 * std::erfc(-x / std::numbers::sqrt2) - p;
    const double u = error * std::sqrt(2 * std::numbers::pi) * std::exp(x * x / 2);
    x -= u / (1 + x * u / 2);
  }
  return x;
}

}  // namespace moectl
