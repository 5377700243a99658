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
                {256, 32, 4, 8, 288}, {256, 32, 1, 1, 288}, {12, 12, 1, 1, 12}};
  for (const auto& s : shapes) {
    for (int trial = 0; trial < 20; ++trial) {
      const Loads loads = random_loads(random, s.experts, 0.1 * trial);
      const PlacementOptions options{
          .devices = s.devices, .nodes = s.nodes, .groups = s.groups, .slots = s.slots, .refine = false};
      EXPECT_EQ(plan_placement(loads, options).experts,
                peer::eplb(loads, s.slots, s.groups, s.nodes, s.devices))
          << s.experts << ' ' << trial;
    }
  }
}

// Slots whose expert is on their device already.
int repeats_in(const Placement& placement) {
  const auto room =
      static_cast<std::ptrdiff_t>(placement.experts.size()) / static_cast<std::ptrdiff_t>(placement.devices);
  int repeats = 0;
  for (auto from = placement.experts.begin(); from != placement.experts.end(); from += room)
    repeats += static_cast<int>(room) - static_cast<int>(std::set<int>(from, from + room).size());
  return repeats;
}

// Two devices, six slots, four experts: EPLB's rules put expert 1 on a device twice, and are more even than any plan without.
TEST(Placement, AnExpertIsTwiceOnADeviceOnlyWhereThatIsMoreEven) {
  const Loads loads{591, 637, 442, 184};
  PlacementOptions options{.devices = 2, .slots = 6};
  const Placement theirs{2, peer::eplb(loads, 6, 1, 1, 2)};
  EXPECT_NEAR(balancedness(theirs, loads), .994, 5e-4);
  const Placement plan = plan_placement(loads, options);
  EXPECT_GE(balancedness(plan, loads), balancedness(theirs, loads));
  EXPECT_EQ(repeats_in(plan), 1);
  options.repeats = false;
  const Placement apart = plan_placement(loads, options);
  EXPECT_EQ(repeats_in(apart), 0);
  // By hand: 591 and 637 have copies on both devices, 442 is on one of them.
  EXPECT_NEAR(balancedness(apart, loads), 927.0 / ((591 + 637) / 2.0 + 442), 1e-12);
}

// EPLB's rules put expert 1 on a device twice: without repeats they pack its copies apart, and nothing else changes.
TEST(Placement, WithoutRefinementCopiesAreApartToo) {
  PlacementOptions options{.devices = 2, .slots = 6, .refine = false, .repeats = false};
  // By hand: slots for 591, 637, 442 / 2, 184 and one more copy each of 637 and 591; the heaviest first, onto the lighter device.
  const Placement plan = plan_placement(Loads{591, 637, 442, 184}, options);
  EXPECT_EQ(repeats_in(plan), 0);
  std::mt19937 random(13);
  for (int trial = 0; trial < 200; ++trial) {
    const Loads loads = random_loads(random, 8, 0.02 * trial);
    for (const int slots : {8, 12, 16, 24, 32}) {
      for (const int nodes : {1, 2}) {
        if (slots / 4 > 8 / nodes) continue;
        options = {.devices = 4, .nodes = nodes, .slots = slots, .refine = false, .repeats = false};
        const Placement apart = plan_placement(loads, options);
        EXPECT_EQ(repeats_in(apart), 0) << slots << ' ' << nodes << ' ' << trial;
        options.repeats = true;
        const Placement theirs = plan_placement(loads, options);
        if (repeats_in(theirs) == 0) {
          EXPECT_EQ(apart.experts, theirs.experts) << slots << ' ' << trial;
        }
      }
    }
  }
}

// Loads of all kinds, on few and many devices, global and hierarchical. Whatever the rules of EPLB give is a plan that this planner
// has tried. Without repeats every device holds different experts, however tight the room.
TEST(Placement, NeverLessEvenThanEplb) {
  std::mt19937 random(11);
  const auto one_of = [&](std::initializer_list<int> values) {
    return values.begin()[random() % values.size()];
  };
  int twice = 0, better = 0, trials = 0;
  for (int trial = 0; trial < 3000; ++trial) {
    const int experts = trial % 25 == 0 ? one_of({128, 256}) : one_of({4, 6, 8, 12, 16, 32, 64});
    const int devices = experts >= 128 ? one_of({16, 32}) : one_of({2, 3, 4, 8});
    int nodes = one_of({1, 1, 2, 4}), groups = experts;
    if (devices % nodes != 0 || experts % nodes != 0) nodes = 1;
    if (nodes > 1 && experts % (2 * nodes) == 0 && trial % 2 == 0) groups = 2 * nodes;
    const int slots = ((experts + devices - 1) / devices + one_of({0, 1, 2, 5})) * devices;
    Loads loads = random_loads(random, experts, 0.1 * one_of({0, 1, 3, 8, 15, 25}));
    if (trial % 3 == 0) {
      for (double& load : loads) load = std::floor(10 * load);  // with ties, and experts without any load
    }
    PlacementOptions options{.devices = devices, .nodes = nodes, .groups = groups, .slots = slots};
    const auto tag = [&] {
      return testing::Message() << "trial " << trial << ": " << experts << " experts, " << devices
                                << " devices, " << nodes << " nodes, " << groups << " groups, " << slots;
    };
    const Placement theirs{devices, peer::eplb(loads, slots, nodes == 1 ? 1 : groups, nodes, devices)};
    const Loads of_theirs = device_loads(theirs, loads);
    const double bound = std::ranges::max(of_theirs) * (1 + 1e-9);
    for (const int rows : {0, 3}) {  // samples of the same loads tell the same
      Loads samples;
      for (int r = 0; r < rows; ++r) samples.insert(samples.end(), loads.begin(), loads.end());
      const Placement plan = plan_placement(loads, options, samples);
      ASSERT_EQ(plan.experts.size(), static_cast<std::size_t>(slots));
      EXPECT_EQ(std::set<int>(plan.experts.begin(), plan.experts.end()).size(),
                static_cast<std::size_t>(experts));
      const Loads of_plan = device_loads(plan, loads);
      EXPECT_LE(std::ranges::max(of_plan), bound) << tag();
      ++trials;
      better += std::ranges::max(of_plan) < std::ranges::max(of_theirs) * (1 - 1e-9);
      // All copies of an expert are on one node.
      std::vector<int> node_of(static_cast<std::size_t>(experts), -1);
      for (int s = 0; s < slots; ++s) {
        int& node = node_of[static_cast<std::size_t>(plan.experts[static_cast<std::size_t>(s)])];
        if (node < 0) node = s / (slots / nodes);
        EXPECT_EQ(node, s / (slots / nodes)) << tag();
      }
    }
    options.repeats = false;
    if (slots / devices > experts / nodes) {
      EXPECT_THROW(plan_placement(loads, options), std::invalid_argument) << tag();
      continue;
    }
    const Placement apart = plan_placement(loads, options);
    EXPECT_EQ(repeats_in(apart), 0) << tag();
    EXPECT_EQ(std::set<int>(apart.experts.begin(), apart.experts.end()).size(),
              static_cast<std::size_t>(experts));
    // On one node, a plan repeats where EPLB's rules are more even than the plan without repeats.
    options.repeats = true;
    if (nodes == 1 && repeats_in(plan_placement(loads, options)) > 0) {
      ++twice;
      const Loads of_apart = device_loads(apart, loads);
      EXPECT_GT(std::ranges::max(of_apart), std::ranges::max(of_theirs) * (1 - 1e-9)) << tag();
    }
  }
  EXPECT_GT(better, trials / 3);
  EXPECT_GT(twice, 10);
}

// Loads that scatter by chance: what was planned on the first steps is as even as EPLB's plan on later ones, or more, by the mean.
TEST(Placement, OnLaterStepsAsEvenAsEplb) {
  std::mt19937 random(12);
  const struct { int experts, devices, slots; } shapes[] = {{4, 2, 6}, {6, 4, 12}, {8, 2, 12}, {32, 8, 48}};
  for (const auto& s : shapes) {
    const auto n = static_cast<std::size_t>(s.experts);
    double gain = 0;
    for (int trace = 0; trace < 40; ++trace) {
      const Loads level = random_loads(random, s.experts, 0.8);
      Loads history, mean(n, 0.0);
      const auto step = [&] {
        Loads loads;
        for (const double l : level)
          loads.push_back(static_cast<double>(std::poisson_distribution<int>(500 * l)(random)));
        return loads;
      };
      for (int r = 0; r < 16; ++r) {
        const Loads loads = step();
        history.insert(history.end(), loads.begin(), loads.end());
        for (std::size_t i = 0; i < n; ++i) mean[i] += loads[i];
      }
      const PlacementOptions options{.devices = s.devices, .slots = s.slots};
      const Placement plan = plan_placement(forecast_loads(history, s.experts), options, history);
      const Placement theirs{s.devices, peer::eplb(mean, s.slots, 1, 1, s.devices)};
      for (int r = 0; r < 16; ++r) {
        const Loads later = step();
        gain += balancedness(plan, later) - balancedness(theirs, later);
      }
    }
    EXPECT_GT(gain, 0) << s.experts;
  }
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

// A free slot holds a repeat until an expert moves there. Without repeats every free slot needs a move.
TEST(Placement, FewMovesWithoutRepeats) {
  std::mt19937 random(13);
  double gain = 0;
  for (int trial = 0; trial < 40; ++trial) {
    const int experts = trial % 2 ? 32 : 30, devices = 4, free = trial % 2 ? 4 : 0;
    const Loads loads = random_loads(random, experts, 0.02 * trial);
    PlacementOptions options{.devices = devices, .slots = 36, .repeats = false};
    const Placement now = single_placement(experts, options);
    for (const int more : {0, 1, 4, 12}) {
      options.max_moves = free + more;
      const Placement plan = plan_placement(loads, options);
      EXPECT_EQ(repeats_in(plan), 0) << trial << ' ' << more;
      EXPECT_LE(moves_between(now, plan), options.max_moves);
      EXPECT_EQ(std::set<int>(plan.experts.begin(), plan.experts.end()).size(),
                static_cast<std::size_t>(experts));
      gain += balancedness(plan, loads) - balancedness(now, loads);
    }
    if (free == 0) continue;
    options.max_moves = free - 1;
    EXPECT_THROW(plan_placement(loads, options), std::invalid_argument);
  }
  EXPECT_GT(gain, 0);
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
  EXPECT_THAT(
      refusal({.devices = 4, .nodes = 2, .max_moves = 3}),
      testing::AllOf(testing::HasSubstr("max_moves: 3: must be left out where there are several nodes (2)"),
                     testing::Not(testing::HasSubstr("-1"))));
  // A plan that is asked to be hierarchical is never silently global.
  EXPECT_THAT(
      refusal({.devices = 8, .nodes = 8, .groups = 4}),
      testing::AllOf(testing::HasSubstr("nodes: 8: must be 1 (a global plan) or divide the groups (4)"),
                     testing::HasSubstr("groups that fit 16 experts: 8, 16")));
  EXPECT_THAT(refusal({.devices = 6, .nodes = 3}), testing::HasSubstr("no number of groups fits 16 experts"));
  EXPECT_THAT(refusal({.devices = 4, .slots = 68, .repeats = false}),
              testing::HasSubstr("slots: 68: must be at most 64 where no device may hold an expert twice"));
  EXPECT_THAT(refusal({.devices = 4, .slots = 24, .repeats = false, .max_moves = 3}),
              testing::HasSubstr("max_moves: 3: must be at least 8"));
  EXPECT_THROW(plan_placement(Loads{1, -1}, {.devices = 2}), std::invalid_argument);
  EXPECT_THROW(forecast_loads(Loads{1, 2, 3}, 2), std::invalid_argument);
}

}  // namespace
}  // namespace moectl
