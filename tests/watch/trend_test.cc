#include "watch/trend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <numeric>
#include <random>

#include "allocation_counter.h"

namespace moectl {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
using Values = std::vector<double>;

TEST(Trend, SlopeByHand) {
  EXPECT_EQ(*slope(Values{1, 3, 5, 7}), 2);
  EXPECT_EQ(*slope(Values{1, kNone, 5, 7}), 2);
  EXPECT_NEAR(*slope(Values{0, 1, 0}), 0, 1e-15);
  EXPECT_NEAR(*slope(Values{0, 0, 3}), 1.5, 1e-15);
  EXPECT_FALSE(slope(Values{1}));
  EXPECT_FALSE(slope(Values{kNone, 1, kNone}));
  EXPECT_FALSE(slope(Values{}));
}

TEST(Trend, AlternationIsAnticorrelated) {
  const Values alternating = {1, -1, 1, -1, 1, -1, 1, -1};
  EXPECT_LT(*autocorrelation(alternating), -0.8);
  EXPECT_EQ(*sign_flips(alternating), 1);
  Values with_trend = alternating;  // the regression line takes the trend out
  for (std::size_t i = 0; i < with_trend.size(); ++i) with_trend[i] += 100 * static_cast<double>(i);
  EXPECT_NEAR(*autocorrelation(with_trend), *autocorrelation(alternating), 1e-9);
  EXPECT_FALSE(autocorrelation(Values{1, 2, 3, 4, 5}));  // nothing but a line
  EXPECT_FALSE(sign_flips(Values{2, 2, 2, 2}));
  EXPECT_FALSE(autocorrelation(Values{1, 5, 2}));
}

TEST(Trend, AutocorrelationByHand) {
  // Deviations from the flat regression line of (1, -1, -1, 1): themselves. (-1 + 1 - 1) / 4.
  EXPECT_NEAR(*autocorrelation(Values{1, -1, -1, 1}), -0.25, 1e-15);
  EXPECT_NEAR(*sign_flips(Values{1, -1, -1, 1}), 2.0 / 3, 1e-15);
}

TEST(Trend, NoiseFlipsHalfTheTime) {
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  Values values(4000);
  for (double& v : values) v = normal(random);
  EXPECT_NEAR(*sign_flips(values), 0.5, 0.03);
  EXPECT_NEAR(*autocorrelation(values), 0, 0.05);
}

TEST(Trend, CorrelationAndRegressionByHand) {
  EXPECT_NEAR(*correlation(Values{1, 2, 3}, Values{2, 4, 6}), 1, 1e-15);
  EXPECT_NEAR(*correlation(Values{1, 2, 3}, Values{3, 1, -1}), -1, 1e-15);
  EXPECT_NEAR(*correlation(Values{1, 2, 3, 4}, Values{1, -1, -1, 1}), 0, 1e-15);
  EXPECT_NEAR(*correlation(Values{1, kNone, 2, 3}, Values{2, 99, 4, 6}), 1, 1e-15);
  EXPECT_FALSE(correlation(Values{1, 1, 1}, Values{1, 2, 3}));
  EXPECT_FALSE(correlation(Values(50, 0.1), Values{1, 2, 3}));  // 0.1 summed is not 50 times 0.1
  EXPECT_EQ(*slope(Values(50, 0.1)), 0);
  EXPECT_FALSE(correlation(Values{1, 2}, Values{1, 2}));
  EXPECT_NEAR(*regression(Values{1, 2, 3}, Values{5, 7, 9}).slope, 2, 1e-15);
  EXPECT_NEAR(*regression(Values{1, 2, 3}, Values{5, 7, 9}).correlation, 1, 1e-15);
  EXPECT_FALSE(regression(Values{1, 1}, Values{5, 7}).slope);
  EXPECT_FALSE(regression(Values{1, 2}, Values{5, 7}).correlation);
}

TEST(History, KeepsTheLastValuesInOrder) {
  for (const std::size_t window : {1U, 2U, 5U}) {
    History history(window);
    for (int i = 0; i < 37; ++i) {
      history.push(i);
      const auto size = std::min<std::size_t>(window, static_cast<std::size_t>(i) + 1);
      ASSERT_EQ(history.values().size(), size);
      for (std::size_t j = 0; j < size; ++j) {
        ASSERT_EQ(history.values()[j], i - static_cast<int>(size) + 1 + static_cast<int>(j));
      }
    }
  }
}

// ---- Loads ----

class Loads {
 public:
  Loads(int experts, int window)
      : trend_(experts, window, 0.1), smoothed_(static_cast<std::size_t>(experts)) {}
  const Metrics& step(const Values& load) {
    metrics_ = Metrics{};
    trend_.observe(load, smoothed_, metrics_);
    const double weight = first_ ? 1 : 0.1;
    first_ = false;
    for (std::size_t i = 0; i < load.size(); ++i) smoothed_[i] += weight * (load[i] - smoothed_[i]);
    return metrics_;
  }
  const LoadTrend& trend() const { return trend_; }

 private:
  LoadTrend trend_;
  Values smoothed_;
  Metrics metrics_;
  bool first_ = true;
};

Values noisy(std::size_t n, double width, std::mt19937_64& random, const Values& base = {}) {
  std::normal_distribution<double> normal;
  Values p(n);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) {
    p[i] = std::max(0.0, (base.empty() ? 1.0 : base[i]) * (1 + width * normal(random)));
    sum += p[i];
  }
  for (double& x : p) x /= sum;
  return p;
}

TEST(LoadTrend, VarianceAndPathByHand) {
  Loads loads(2, 50);
  const Values a = {.5, .5}, b = {1, 0};
  EXPECT_EQ(*loads.step(a).routing_variance, 0);
  EXPECT_FALSE(loads.step(a).path_efficiency);  // nothing has moved
  const double quarter = std::numbers::pi / 2;  // distance between a and b
  Metrics m = loads.step(b);
  // Variance of {.5, .5, 1} is 1/18, the same for the other expert.
  EXPECT_NEAR(*m.routing_variance, 1.0 / 18, 1e-15);
  EXPECT_NEAR(*m.path_efficiency, 1, 1e-15);
  m = loads.step(a);  // there and back
  EXPECT_NEAR(*m.path_efficiency, 0, 1e-12);
  m = loads.step(b);
  EXPECT_NEAR(*m.path_efficiency, quarter / (3 * quarter), 1e-12);
}

TEST(LoadTrend, WindowsSlideByHalves) {
  // Variance over the last 10 … 20 steps agrees with the straightforward one over the same steps.
  std::mt19937_64 random(9);
  Loads loads(4, 20);
  std::vector<Values> all;
  for (int t = 0; t < 75; ++t) {
    all.push_back(noisy(4, 0.2, random));
    const Metrics m = loads.step(all.back());
    const std::size_t begin = t < 20 ? 0 : static_cast<std::size_t>(t / 10 * 10 - 10);
    double variance = 0, path = 0;
    for (std::size_t i = 0; i < 4; ++i) {
      double mean = 0, squares = 0;
      const auto n = static_cast<double>(all.size() - begin);
      for (std::size_t s = begin; s < all.size(); ++s) mean += all[s][i] / n;
      for (std::size_t s = begin; s < all.size(); ++s) squares += (all[s][i] - mean) * (all[s][i] - mean) / n;
      variance += squares / 4;
    }
    for (std::size_t s = begin + 1; s < all.size(); ++s) path += fisher_distance(all[s - 1], all[s]);
    ASSERT_NEAR(*m.routing_variance, variance, 1e-15) << t;
    if (path > 0) {
      ASSERT_NEAR(*m.path_efficiency, fisher_distance(all[begin], all.back()) / path, 1e-12) << t;
    }
  }
}

TEST(LoadTrend, NoiseHasNoSwing) {
  for (const std::size_t n : {16U, 64U}) {
    std::mt19937_64 random(n);
    Loads loads(static_cast<int>(n), 50);
    double largest = 0, flips = 0;
    for (int t = 0; t < 2000; ++t) {
      const Metrics m = loads.step(noisy(n, 0.1, random));
      if (t < 50) continue;
      largest = std::max(largest, *m.swing);
      flips += *m.oscillation / 1950;
    }
    EXPECT_LT(largest, 0.35) << n;
    EXPECT_NEAR(flips, 0.5, 0.05);
  }
}

// Oscillations of every period from 2 to 16 swing; the width comes out as the CV of the deviations.
TEST(LoadTrend, OscillationsSwing) {
  for (int period = 2; period <= 16; ++period) {
    std::mt19937_64 random(static_cast<std::uint64_t>(period));
    Loads loads(16, 50);
    Metrics m;
    for (int t = 0; t < 200; ++t) {
      Values base(16);
      for (std::size_t i = 0; i < 16; ++i) {
        base[i] = 1 + 0.5 * std::cos(2 * std::numbers::pi * t / period + (i % 2 == 0 ? 0 : std::numbers::pi));
      }
      m = loads.step(noisy(16, 0.05, random, base));
    }
    EXPECT_GT(*m.swing, 0.5) << period;
    EXPECT_GT(loads.trend().deviation_cv(), 0.2) << period;
    if (period == 2) {
      EXPECT_LT(*m.load_autocorrelation, -0.8);
      EXPECT_GT(*m.oscillation, 0.9);
    }
  }
}

// Whatever its shape, what repeats swings: here each expert has one high step in `period`.
TEST(LoadTrend, PulsesSwing) {
  for (int period = 2; period <= 6; ++period) {
    std::mt19937_64 random(static_cast<std::uint64_t>(period));
    Loads loads(30, 50);
    Metrics m;
    for (int t = 0; t < 200; ++t) {
      Values base(30);
      for (int i = 0; i < 30; ++i) base[static_cast<std::size_t>(i)] = (t + i) % period == 0 ? 2 : 1;
      m = loads.step(noisy(30, 0.05, random, base));
    }
    EXPECT_GT(*m.swing, 0.8) << period;
  }
}

// A drift is no swing, however steady: neither a ramp nor a random walk.
TEST(LoadTrend, DriftsDoNotSwing) {
  for (const bool walk : {false, true}) {
    std::mt19937_64 random(21);
    std::normal_distribution<double> normal;
    Loads loads(16, 50);
    Values base(16, 10.0);
    for (int t = 0; t < 1000; ++t) {
      for (std::size_t i = 0; i < 16; ++i) {
        base[i] = std::max(1.0, base[i] + (walk ? 0.2 * normal(random) : 0.005 * static_cast<double>(i)));
      }
      const Metrics m = loads.step(noisy(16, 0.01, random, base));
      if (t >= 50) {
        ASSERT_LT(*m.swing, 0.35) << walk << " " << t;
      }
    }
  }
}

TEST(LoadTrend, AShiftIsSeenAndNoiseIsNot) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    std::mt19937_64 random(seed);
    Loads loads(16, 50);
    double before = 0, after = 0;
    for (int t = 0; t < 400; ++t) {
      Values base(16, 1.0);
      if (t >= 300) base[3] = 2;
      const Metrics m = loads.step(noisy(16, 0.2, random, base));
      if (t >= 300 && t < 350) after = std::max(after, m.shift.value_or(0));
      if (t < 300) before = std::max(before, m.shift.value_or(0));
    }
    EXPECT_LT(before, 1) << seed;
    EXPECT_GT(after, 1) << seed;
  }
}

TEST(LoadTrend, ContinuesBitForBitAfterLoading) {
  std::mt19937_64 random(5);
  LoadTrend a(5, 12, 0.1), b(5, 12, 0.1);
  const Values smoothed(5, 0.2);
  Metrics m;
  for (int t = 0; t < 31; ++t) a.observe(noisy(5, 0.3, random), smoothed, m);
  StateIo out;
  a.exchange(out);
  const std::string bytes = out.bytes();
  StateIo in(bytes);
  b.exchange(in);
  in.finish();
  for (int t = 0; t < 40; ++t) {
    const Values load = noisy(5, 0.3, random);
    Metrics of_a, of_b;
    a.observe(load, smoothed, of_a);
    b.observe(load, smoothed, of_b);
    for (const MetricField& field : metric_fields())
      ASSERT_EQ(of_a.*(field.value), of_b.*(field.value)) << field.name;
  }
}

TEST(LoadTrend, ObservingAllocatesNothing) {
  LoadTrend trend(16, 20, 0.1);
  const Values load(16, 1.0 / 16);
  Metrics m;
  EXPECT_EQ(testing::allocations_of([&] {
              for (int t = 0; t < 50; ++t) trend.observe(load, load, m);
            }),
            0);
}

// Deviations of .06, -.06 and 0 of targets .75, .25 and 0: relative .08 and -.24, over the two that are wanted.
TEST(LoadTrend, DeviationsAreRelativeToUnequalTargets) {
  const Values targets = {0.75, 0.25, 0};
  LoadTrend trend(LoadTargets(3, targets), 20, 0.1), equal(3, 20, 0.1);
  Metrics m;
  for (LoadTrend* one : {&trend, &equal}) {
    one->observe(targets, targets, m);  // the first step has no deviation
    one->observe(Values{0.81, 0.19, 0}, targets, m);
  }
  EXPECT_NEAR(trend.deviation_cv(), std::sqrt(0.1 * (0.08 * 0.08 + 0.24 * 0.24) / 2), 1e-12);
  EXPECT_NEAR(equal.deviation_cv(), std::sqrt(0.1 * 3 * 2 * 0.06 * 0.06), 1e-12);
}

}  // namespace
}  // namespace moectl
