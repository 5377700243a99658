// Random numbers of the simulated router: hashes of counters, with the same bits on every platform.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace moectl::simulated {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose output passes as random on a counter.
inline std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}
inline std::uint64_t hash(std::uint64_t key, std::uint64_t index) {
  return mix(key + (index + 1) * 0x9e3779b97f4a7c15ULL);
}

// Standard normal to the eye (sum of 12 uniforms, tails end at ±6): only integer and IEEE basic operations,
// so that no platform's logarithm or cosine can change a bit.
inline double normal(std::uint64_t key, std::uint64_t index) {
  std::int64_t sum = 0;
  for (std::uint64_t part = 0; part < 3; ++part) {
    const std::uint64_t bits = hash(key, 3 * index + part);
    sum += static_cast<std::int64_t>(bits & 0xffff) + static_cast<std::int64_t>((bits >> 16) & 0xffff) +
           static_cast<std::int64_t>((bits >> 32) & 0xffff) + static_cast<std::int64_t>(bits >> 48);
  }
  return (static_cast<double>(sum) - 12 * 32767.5) / 65536.0;
}

// exp for float, relative error below 1e-6 (Cephes' polynomial): vectorises, and gives the same bits everywhere.
inline float quick_exp(float x) {
  x = x < -87.0F ? -87.0F : x;
  x = x > 88.0F ? 88.0F : x;
  const float shifted = x * 1.44269504F + 12582912.0F;  // the rounded multiple of ln 2 in the low bits
  const std::int32_t exponent = std::bit_cast<std::int32_t>(shifted) - 0x4B400000;
  const float n = shifted - 12582912.0F;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  return p * std::bit_cast<float>((exponent + 127) * (1 << 23));
}

// Draws from a fixed discrete distribution with one 32-bit number (Walker's alias method).
class AliasTable {
 public:
  explicit AliasTable(std::span<const double> weights) : keep_(weights.size()), other_(weights.size()) {
    const std::size_t n = weights.size();
    double total = 0;
    for (double w : weights) total += w;
    std::vector<double> scaled(n);
    std::vector<std::size_t> small, large;
    for (std::size_t i = 0; i < n; ++i) {
      scaled[i] = weights[i] * static_cast<double>(n) / total;
      (scaled[i] < 1 ? small : large).push_back(i);
      keep_[i] = 65536;
      other_[i] = static_cast<std::uint16_t>(i);
    }
    while (!small.empty() && !large.empty()) {
      const std::size_t low = small.back(), high = large.back();
      small.pop_back();
      keep_[low] = static_cast<std::uint32_t>(scaled[low] * 65536);
      other_[low] = static_cast<std::uint16_t>(high);
      scaled[high] -= 1 - scaled[low];
      if (scaled[high] < 1) {
        large.pop_back();
        small.push_back(high);
      }
    }
  }
  std::size_t draw(std::uint32_t bits) const {
    const std::size_t i = (static_cast<std::uint64_t>(bits >> 16) * keep_.size()) >> 16;
    return (bits & 0xffff) < keep_[i] ? i : other_[i];
  }

 private:
  std::vector<std::uint32_t> keep_;
  std::vector<std::uint16_t> other_;
};

}  // namespace moectl::simulated
