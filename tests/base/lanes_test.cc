// Loops over arrays eight at a time: every length, and the ends that are no whole eight.
#include "base/lanes.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "base/fast_log.h"

namespace moectl {
namespace {

// 1, 2, 3, …: sums of them are exact in any order.
std::vector<double> ramp(std::size_t size) {
  std::vector<double> values(size);
  std::iota(values.begin(), values.end(), 1.0);
  return values;
}

Double8 eight(double a, double b, double c, double d, double e, double f, double g, double h) {
  const double values[] = {a, b, c, d, e, f, g, h};
  return AllEight::get(values);
}

TEST(Lanes, SumsEveryElementOnce) {
  for (std::size_t n = 0; n <= 33; ++n) {
    const std::vector<double> v = ramp(n);
    const double count = static_cast<double>(n);
    EXPECT_EQ(sum_of(v), count * (count + 1) / 2) << n;
    EXPECT_EQ(dot(v, v), count * (count + 1) * (2 * count + 1) / 6) << n;
  }
}

// In any other order a huge number takes up the 1.
TEST(Lanes, SumsInTheWrittenOrder) {
  EXPECT_EQ(sum_of(eight(1, 1, 0, 0, 1e16, 1e16, -1e16, -1e16)), 2);
}

TEST(Lanes, WritesEveryElementAndNoneBeyond) {
  for (std::size_t n = 0; n <= 25; ++n) {
    const std::vector<double> from = ramp(n);
    std::vector<double> to(n + 8, -1.0);
    for_each_eight(n, [&](std::size_t i, auto at) { at.put(&to[i], at.get(&from[i]) * 2.0); });
    for (std::size_t i = 0; i < n; ++i) EXPECT_EQ(to[i], 2 * from[i]) << n;
    for (std::size_t i = n; i < to.size(); ++i) EXPECT_EQ(to[i], -1) << n;
  }
}

TEST(Lanes, CountsOnlyWhereThereAreElements) {
  for (std::size_t n = 0; n <= 25; ++n) {
    const std::vector<std::int64_t> zeros(n, 0);
    Double8 found = splat(0);
    for_each_eight(n, [&](std::size_t i, auto at) { found += at.keep(equal(at.get(&zeros[i]), splat(0))); });
    EXPECT_EQ(sum_of(found), static_cast<double>(n));
  }
}

TEST(Lanes, KeepsNothingOfWhatIsBeyondTheEnd) {
  const double none[] = {0};
  const Double8 kept = FirstFew{1}.keep(1.0 / FirstFew{1}.get(none) - 1.0 / FirstFew{1}.get(none));
  EXPECT_TRUE(std::isnan(kept[0]));
  for (int i = 1; i < 8; ++i) EXPECT_EQ(kept[i], 0);
}

TEST(Lanes, ComparesElementByElement) {
  const Double8 a = eight(1, -2, 3, 0, NAN, 1, -0.0, 7), b = eight(0, 5, 3, -0.5, 1, NAN, 0, 7);
  const Double8 high = larger(a, b), low = smaller(a, b), below = less(a, b), same = equal(a, b);
  const Double8 chosen = select(below, splat(9), a);
  const double highs[] = {1, 5, 3, 0, NAN, 1, -0.0, 7}, lows[] = {0, -2, 3, -0.5, NAN, 1, -0.0, 7};
  const double choices[] = {1, 9, 3, 0, NAN, 1, -0.0, 7};
  const auto bits = [](double value) { return std::bit_cast<std::uint64_t>(value); };
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(bits(high[i]), bits(highs[i])) << i;
    EXPECT_EQ(bits(low[i]), bits(lows[i])) << i;
    EXPECT_EQ(bits(chosen[i]), bits(choices[i])) << i;
    EXPECT_EQ(below[i], a[i] < b[i] ? 1 : 0) << i;
    EXPECT_EQ(same[i], a[i] == b[i] ? 1 : 0) << i;
  }
  EXPECT_EQ(largest_of(eight(0, 5, 3, -0.5, 1, 2, 8, 7)), 8);
}

TEST(Lanes, WholeNumbersBecomeDoubles) {
  const std::int64_t values[] = {0, 1, 255, 256, 65537, 4294967296, 4503599627370495, 12};
  const Double8 small = to_double(AllEight::get_int(values)), any = AllEight::get(values);
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(small[i], static_cast<double>(values[i]));
    EXPECT_EQ(any[i], static_cast<double>(values[i]));
  }
}

TEST(Lanes, LogarithmIsThatOfTheStandardLibrary) {
  EXPECT_EQ(fast_log(splat(1))[0], 0);
  for (double x = 1e-300; x < 1e300; x *= 1.7) {
    EXPECT_NEAR(fast_log(eight(1, 1, 1, 2, 2, 2, x, 2))[6], std::log(x),
                4e-16 * std::max(1.0, std::abs(std::log(x))))
        << x;
  }
}

// The bits themselves, recorded once: no compiler, no processor and no release of Eigen may change them.
TEST(Lanes, SameBitsEverywhere) {
  std::uint64_t random = 88172645463325252ULL, hash = 14695981039346656037ULL;
  const auto fold = [&](double value) {
    hash = (hash ^ std::bit_cast<std::uint64_t>(value)) * 1099511628211ULL;
  };
  for (std::size_t n = 1; n <= 67; ++n) {
    std::vector<double> a(n), b(n), to(n);
    for (std::size_t i = 0; i < n; ++i) {
      random = random * 6364136223846793005ULL + 1442695040888963407ULL;
      a[i] = static_cast<double>(random >> 20) / 1024;
      b[i] = 1.0 / static_cast<double>((random >> 32) + 1);
    }
    for_each_eight(n, [&](std::size_t i, auto at) {
      const Double8 x = at.get(&a[i]) + 1.0, y = at.get(&b[i]) + 1e-300;
      at.put(&to[i], select(less(y, x / 3.0), fast_log(x) * y - fast_log(y), x.sqrt() / y));
    });
    for (const double value : to) fold(value);
    fold(sum_of(to));
    fold(dot(a, b));
  }
  EXPECT_EQ(hash, 3774303467974306497U);
}

}  // namespace
}  // namespace moectl
