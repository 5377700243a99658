#include "moectl/placement.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <stdexcept>

#include "eplb_peer.h"

namespace moectl {
namespace {

using Loads = std::vector<double>;

// The example of EPLB's README: 2 layers of 12 experts in 4 groups, 16 slots on 8 devices of 2 nodes.
TEST(Placement, EplbsReadmeExample) {
  const PlacementOptions options{.devices = 8, .nodes = 2, .groups = 4, .slots = 16, .refine = false};
  EXPECT_EQ(plan_placement(Loads{90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86}, options).experts,
            (std::vector<int>{5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1}));
  EXPECT_EQ(plan_placement(Loads{20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27}, options).experts,
            (std::vector<int>{7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1}));
}

Loads random_loads(std::mt19937& random, int experts, double spread) {
  std::normal_distribution<double> normal;
  Loads loads(static_cast<std::size_t>(experts));
  for (double& load : loads) load = std::exp(spread * normal(random));
  return loads;
}

TEST(Placement, WithoutRefinementItIsThePeer) {
  std::mt19937 random(1);
  const struct {
    int experts, devices, nodes, groups, slots;
  } shapes[] = {{16, 4, 1, 1, 20},    {64, 8, 2, 8, 64},    {64, 8, 2, 8, 80},
                {256, 32, 4, 8, 288}, {256, 32, 4, 6, 288}, {12, 12, 1, 1, 12}};
  for (const auto& s : shapes) {
    for (int trial = 0; trial < 20; ++trial) {
      const Loads loads = random_loads(random, s.experts, 0.1 * trial);
      const int groups = s.experts % s.groups == 0 ? s.groups : 1;
      const PlacementOptions options{
          .devices = s.devices, .nodes = s.nodes, .groups = groups, .slots = s.slots, .refine = false};
      EXPECT_EQ(plan_placement(loads, options).experts,
                peer::eplb(loads, s.slots, groups, s.nodes, s.devices))
          << s.experts << ' ' << trial;
    }
  }
}

TEST(Placement, RefinementIsNeverLessEvenAndKeepsEveryExpert) {
  std::mt19937 random(2);
  double gain = 0;
  for (int trial = 0; trial < 60; ++trial) {
    const Loads loads = random_loads(random, 64, 0.02 * trial);
    PlacementOptions options{.devices = 8, .nodes = trial % 2 ? 2 : 1, .groups = 8, .slots = 72};
    const Placement refined = plan_placement(loads, options);
    options.refine = false;
    const Placement plain = plan_placement(loads, options);
    EXPECT_EQ(std::set<int>(refined.experts.begin(), refined.experts.end()).size(), 64U);
    ASSERT_EQ(refined.experts.size(), 72U);
    EXPECT_GT(balancedness(refined, loads), balancedness(plain, loads) - 0.02);
    gain += balancedness(refined, loads) - balancedness(plain, loads);
    // Copies of one expert sit on different devices, unless there are more copies than devices on the node.
    const int node_devices = 8 / options.nodes;
    bool possible = true;
    for (int e = 0; e < 64; ++e)
      possible = possible && std::count(refined.experts.begin(), refined.experts.end(), e) <= node_devices;
    for (std::size_t d = 0; possible && d < 8; ++d) {
      const auto from = refined.experts.begin() + static_cast<std::ptrdiff_t>(9 * d);
      EXPECT_EQ(std::set<int>(from, from + 9).size(), 9U) << trial;
    }
    // An expert and its copies stay on one node.
    if (options.nodes == 2) {
      const std::set<int> first(refined.experts.begin(), refined.experts.begin() + 36);
      for (std::size_t s = 36; s < 72; ++s) EXPECT_EQ(first.count(refined.experts[s]), 0U);
    }
  }
  EXPECT_GT(gain, 0);
}

TEST(Placement, LoadsAndBalancednessByHand) {
  const Placement placement{2, {0, 1, 0, 2}};
  const Loads loads{4, 1, 3};
  EXPECT_EQ(device_loads(placement, loads), (Loads{3, 5}));
  EXPECT_DOUBLE_EQ(balancedness(placement, loads), 4.0 / 5);
  EXPECT_EQ(balancedness(placement, Loads{0, 0, 0}), 1);
  EXPECT_EQ(linear_placement(3, {.devices = 2, .slots = 4}).experts, (std::vector<int>{0, 1, 2, 0}));
  EXPECT_EQ(moves_between(placement, {2, {0, 2, 0, 2}}), 1);
  EXPECT_EQ(moves_between(placement, {2, {1, 0, 2, 0}}), 0);
}

TEST(Placement, SingleCopiesWithFreeSlots) {
  const PlacementOptions options{.devices = 2, .slots = 6};
  const Placement single = single_placement(4, options);
  EXPECT_EQ(single.experts, (std::vector<int>{0, 1, 0, 2, 3, 2}));
  const Loads loads{4, 1, 3, 2};
  EXPECT_EQ(device_loads(single, loads), (Loads{5, 5}));
  EXPECT_EQ(moves_between(single, {2, {0, 1, 1, 3, 2, 2}}), 0) << "a device loads no expert that it has";
  EXPECT_EQ(moves_between(single, {2, {0, 1, 3, 3, 2, 2}}), 1);
  EXPECT_EQ(single_placement(3, {.devices = 2, .slots = 4}).experts, (std::vector<int>{0, 1, 2, 0}));
}

TEST(Placement, RenamedDevicesNeedFewMoves) {
  const Placement now = linear_placement(8, {.devices = 4});  // 01 23 45 67
  const Placement plan{4, {6, 7, 4, 1, 2, 3, 0, 5}};
  EXPECT_EQ(moves_between(now, plan), 8);
  const Placement renamed = renamed_for(plan, now, 1);
  EXPECT_EQ(moves_between(now, renamed), 2);
  const Loads loads{1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT_DOUBLE_EQ(balancedness(plan, loads), balancedness(renamed, loads));
}

TEST(Placement, FewMovesHelpAndStayWithinTheLimit) {
  std::mt19937 random(3);
  for (int trial = 0; trial < 10; ++trial) {
    const Loads loads = random_loads(random, 32, 0.8);
    PlacementOptions options{.devices = 4, .slots = 36};
    const Placement now = single_placement(32, options);
    double last = 0;
    for (const int most : {0, 2, 4, 8, 32}) {
      options.max_moves = most;
      const Placement plan = plan_placement(loads, options);
      EXPECT_LE(moves_between(now, plan), most);
      EXPECT_EQ(std::set<int>(plan.experts.begin(), plan.experts.end()).size(), 32U);
      // Renamed devices are summed in another order.
      EXPECT_GE(balancedness(plan, loads), balancedness(now, loads) - 1e-12) << trial << ' ' << most;
      last = balancedness(plan, loads);
    }
    EXPECT_GT(last, balancedness(now, loads) + 0.05);
  }
}

TEST(Placement, ForecastShrinksNoiseAndKeepsSignal) {
  std::mt19937 random(4);
  std::normal_distribution<double> normal;
  const int n = 32;
  const auto history = [&](double signal, double noise) {
    Loads level(n), rows;
    for (double& l : level) l = 1 + signal * normal(random);
    for (int r = 0; r < 16; ++r) {
      for (const double l : level) rows.push_back(std::max(0.0, l + noise * normal(random)));
    }
    return rows;
  };
  const auto spread = [&](const Loads& shares) {
    double square = 0;
    for (const double s : shares) square += (s * n - 1) * (s * n - 1);
    return std::sqrt(square / n);
  };
  EXPECT_GT(spread(forecast_loads(history(0.2, 0.02), n)), 0.12);
  // The mean of 16 rows of pure noise of 0.2 scatters by 0.05; most of it goes.
  double sum = 0;
  for (int trial = 0; trial < 20; ++trial) sum += spread(forecast_loads(history(0, 0.2), n));
  EXPECT_LT(sum / 20, 0.025);
  // What has just changed counts more than what was.
  Loads rows;
  for (int r = 0; r < 32; ++r) {
    for (int i = 0; i < 4; ++i) rows.push_back(r < 20 ? (i == 0 ? 5 : 1) : (i == 3 ? 5 : 1));
  }
  const Loads forecast = forecast_loads(rows, 4);
  EXPECT_GT(forecast[3], 2 * forecast[0]);
  EXPECT_NEAR(forecast[0] + forecast[1] + forecast[2] + forecast[3], 1, 1e-12);
}

// Experts 0 and 1 are heavy in the same steps, 2 and 3 in the others: by their means all four are alike.
TEST(Placement, SamplesTakeExpertsApartThatAreHeavyTogether) {
  Loads samples;
  for (int r = 0; r < 16; ++r) {
    for (int e = 0; e < 4; ++e) samples.push_back((e < 2) == (r % 2 == 0) ? 3 : 1);
  }
  const PlacementOptions options{.devices = 2};
  const Placement plan = plan_placement(Loads{2, 2, 2, 2}, options, samples);
  EXPECT_EQ(balancedness(plan, Loads{3, 3, 1, 1}), 1);
  EXPECT_EQ(balancedness(plan, Loads{1, 1, 3, 3}), 1);
  // On random samples: as even or more than without them, by the mean over those samples.
  std::mt19937 random(7);
  for (int trial = 0; trial < 10; ++trial) {
    Loads rows, mean(24, 0.0);
    const Loads level = random_loads(random, 24, 0.5);
    for (int r = 0; r < 40; ++r) {
      const Loads noise = random_loads(random, 24, 0.4);
      for (std::size_t i = 0; i < 24; ++i) {
        rows.push_back(level[i] * noise[i]);
        mean[i] += rows.back() / 40;
      }
    }
    const PlacementOptions wide{.devices = 4, .slots = 28};
    const auto largest = [&](const Placement& placement) {
      double sum = 0;
      for (std::size_t r = 0; r < 40; ++r) {
        const auto loads = device_loads(placement, std::span(rows).subspan(24 * r, 24));
        sum += *std::max_element(loads.begin(), loads.end());
      }
      return sum;
    };
    EXPECT_LE(largest(plan_placement(mean, wide, rows)), largest(plan_placement(mean, wide)) * (1 + 1e-9))
        << trial;
  }
  EXPECT_THROW(plan_placement(Loads{1, 1}, options, Loads{1, 2, 3}), std::invalid_argument);
}

TEST(Placement, OptionsThatDoNotFitAreNamed) {
  const Loads loads(16, 1.0);
  const auto refusal = [&](const PlacementOptions& options) -> std::string {
    try {
      plan_placement(loads, options);
    } catch (const std::invalid_argument& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_THAT(refusal({.devices = 0}), testing::HasSubstr("devices"));
  EXPECT_THAT(refusal({.devices = 4, .nodes = 3}), testing::HasSubstr("nodes"));
  EXPECT_THAT(refusal({.devices = 4, .slots = 18}), testing::HasSubstr("slots"));
  EXPECT_THAT(refusal({.devices = 4, .slots = 12}), testing::HasSubstr("slots"));
  EXPECT_THAT(refusal({.devices = 4, .nodes = 2, .groups = 3}), testing::HasSubstr("groups"));
  EXPECT_THAT(refusal({.devices = 4, .nodes = 2, .max_moves = 3}), testing::HasSubstr("max_moves"));
  EXPECT_THROW(plan_placement(Loads{1, -1}, {.devices = 2}), std::invalid_argument);
  EXPECT_THROW(forecast_loads(Loads{1, 2, 3}, 2), std::invalid_argument);
}

}  // namespace
}  // namespace moectl
