// Loops over arrays four at a time: every length, and the ends that are no whole four.
#include "base/lanes.h"

#include <gtest/gtest.h>

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

TEST(Lanes, SumsEveryElementOnce) {
  for (std::size_t n = 0; n <= 33; ++n) {
    const std::vector<double> v = ramp(n);
    const double count = static_cast<double>(n);
    EXPECT_EQ(sum_of(v), count * (count + 1) / 2) << n;
    EXPECT_EQ(dot(v, v), count * (count + 1) * (2 * count + 1) / 6) << n;
  }
}

TEST(Lanes, WritesEveryElementAndNoneBeyond) {
  for (std::size_t n = 0; n <= 13; ++n) {
    const std::vector<double> from = ramp(n);
    std::vector<double> to(n + 4, -1.0);
    for_each_four(n, [&](std::size_t i, auto at) { at.put(&to[i], at.get(&from[i]) * 2.0); });
    for (std::size_t i = 0; i < n; ++i) EXPECT_EQ(to[i], 2 * from[i]) << n;
    for (std::size_t i = n; i < to.size(); ++i) EXPECT_EQ(to[i], -1) << n;
  }
}

TEST(Lanes, CountsOnlyWhereThereAreElements) {
  for (std::size_t n = 0; n <= 13; ++n) {
    const std::vector<std::int64_t> zeros(n, 0);
    Int4 found{};
    for_each_four(n, [&](std::size_t i, auto at) { found -= at.keep_int(at.get(&zeros[i]) == 0.0); });
    EXPECT_EQ(sum_of(found), static_cast<std::int64_t>(n));
  }
}

TEST(Lanes, ComparesElementByElement) {
  const Double4 a = lanes(1.0, -2.0, 3.0, 0.0), b = lanes(0.0, 5.0, 3.0, -0.5);
  const Double4 high = larger(a, b), low = smaller(a, b), chosen = select(a < b, splat(7), a);
  const double highs[] = {1, 5, 3, 0}, lows[] = {0, -2, 3, -0.5}, choices[] = {1, 7, 3, 0};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(high[i], highs[i]);
    EXPECT_EQ(low[i], lows[i]);
    EXPECT_EQ(chosen[i], choices[i]);
  }
  EXPECT_EQ(largest_of(b), 5);
  EXPECT_TRUE(std::isnan(larger(splat(NAN), splat(1))[0]));
}

TEST(Lanes, LogarithmIsThatOfTheStandardLibrary) {
  EXPECT_EQ(fast_log(splat(1))[0], 0);
  for (double x = 1e-300; x < 1e300; x *= 1.7) {
    EXPECT_NEAR(fast_log(lanes(1.0, x, 2.0, x))[3], std::log(x), 4e-16 * std::max(1.0, std::abs(std::log(x))))
        << x;
  }
}

}  // namespace
}  // namespace moectl
