// lag: 1: sums travel while the model computes and are decided on a step later.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "moectl/controller.h"

namespace moectl {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kLayers = 3, kExperts = 8, kTopK = 2;

ControllerConfig lag_config(int lag) {
  ControllerConfig config;
  config.lag = lag;
  config.model.layers = kLayers;
  config.model.experts = kExperts;
  config.model.top_k = kTopK;
  config.expert_bias.policy = "adaptive_bias";
  config.expert_bias.limits = {.min = -16, .max = 16, .rate = 1, .center = true};
  config.aux_loss_weight.policy = "pi";
  config.aux_loss_weight.initial = 0.01;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 0.1, .rate = 0.1, .cadence = 5};
  return config;
}

/// Counts of one share of a recorded stream: they depend on (step, layer, share) alone.
std::vector<std::int64_t> recorded(int step, int layer, int share) {
  std::mt19937_64 random(static_cast<std::uint64_t>((step * kLayers + layer) * 64 + share));
  std::vector<std::int64_t> counts(kExperts);
  for (int i = 0; i < kExperts; ++i) {
    counts[static_cast<std::size_t>(i)] = static_cast<std::int64_t>(random() % 60) + 10 * i;
  }
  // Sums of k a token.
  counts[0] += std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) % kTopK;
  return counts;
}

void record(Controller& controller, int step, int share) {
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::vector<std::int64_t> counts = recorded(step, layer, share);
    const std::int64_t total = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
    controller.record_with(layer, [&](RoutingStats& sums) { sums.add_counts(counts, total / kTopK); });
  }
}

/// All that is in force.
std::vector<double> in_force(const Controller& controller) {
  std::vector<double> all;
  for (int layer = 0; layer < kLayers; ++layer) {
    const auto bias = controller.bias(layer);
    all.insert(all.end(), bias.begin(), bias.end());
    all.push_back(controller.aux_loss_weight(layer));
  }
  return all;
}

/// An all-reduce between threads that is started and waited for apart. A round is complete once every rank
/// has started it.
class Wire {
 public:
  explicit Wire(int ranks) : ranks_(ranks) {}

  Reduction of(int rank) {
    return [this, rank](std::span<std::int64_t> payload) {
      const std::size_t round = started_[static_cast<std::size_t>(rank)]++;
      {
        const std::lock_guard lock(mutex_);
        if (cut_) throw std::runtime_error("the wire is cut");
        if (rounds_.size() <= round) rounds_.resize(round + 1);
        Round& at = rounds_[round];
        at.sum.resize(payload.size(), 0);
        for (std::size_t i = 0; i < payload.size(); ++i) at.sum[i] += payload[i];
        ++at.arrived;
        changed_.notify_all();
      }
      return [this, round, payload] {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return cut_ || rounds_[round].arrived == ranks_; });
        if (rounds_[round].arrived < ranks_) throw std::runtime_error("the wire is cut");
        std::copy(rounds_[round].sum.begin(), rounds_[round].sum.end(), payload.begin());
      };
    };
  }
  void cut(bool is = true) {
    const std::lock_guard lock(mutex_);
    cut_ = is;
    changed_.notify_all();
  }
  /// Rounds that at least one rank has started.
  std::size_t rounds() {
    const std::lock_guard lock(mutex_);
    return rounds_.size();
  }

 private:
  struct Round {
    std::vector<std::int64_t> sum;
    int arrived = 0;
  };
  int ranks_;
  bool cut_ = false;
  std::vector<std::size_t> started_ = std::vector<std::size_t>(64);
  std::vector<Round> rounds_;
  std::mutex mutex_;
  std::condition_variable changed_;
};

TEST(Lag, DecidesOnTheStreamOneStepLaterAndOtherwiseOnTheSameBits) {
  ControllerConfig late = lag_config(0), lag = lag_config(1);
  late.model.delay = 1;                                            // what the lag declares by itself
  late.safety.responsiveness = lag.safety.responsiveness = false;  // the stream does not answer
  Controller lagging(lag), shifted(late);
  shifted.set_reduction([](std::span<std::int64_t>) {});  // as with lag, a loss is rounded to its fixed point
  const auto info = [](int step) {
    return StepInfo{.loss = 3 - 0.01 * step, .gradient_norm = 1.0 + step % 3, .skipped = step % 17 == 4};
  };
  for (int step = 0; step < 120; ++step) {
    record(lagging, step, 0);
    lagging.step(info(step));
    if (step > 0) {
      record(shifted, step - 1, 0);
      shifted.step(info(step - 1));
    } else {
      shifted.step();
    }
    ASSERT_EQ(in_force(lagging), in_force(shifted)) << step;
    ASSERT_EQ(lagging.report().info.loss, shifted.report().info.loss) << step;
    ASSERT_EQ(lagging.report().info.skipped, shifted.report().info.skipped) << step;
  }
  EXPECT_GT(lagging.bias(0)[0], 0.01) << "the biases have work to do";
}

TEST(Lag, TheFirstStepHoldsForLackOfData) {
  Controller controller(lag_config(1));
  record(controller, 0, 0);
  const StepReport& report = controller.step({.loss = 2.0});
  EXPECT_EQ(report.layers[0].stats->tokens(), 0);
  EXPECT_TRUE(report.layers[0].actuators[0].reasons.has(Reason::kNoData));
  EXPECT_FALSE(report.info.loss.has_value());
  EXPECT_THAT(controller.bias(0), Each(0.0));
  controller.step();
  EXPECT_EQ(controller.report().info.loss, 2.0);
  EXPECT_GT(controller.report().layers[0].stats->tokens(), 0);
}

TEST(Lag, PoliciesAreToldOfTheDelay) {
  ControllerConfig config = lag_config(1);
  config.model.delay = 2;
  EXPECT_EQ(config.delay(), 3);
  int told = -1;
  class Still : public Policy {
    void propose(const LayerView&, std::span<double>) override {}
  };
  PolicyRegistry registry;
  register_builtin_policies(registry);
  registry.add({.name = "still",
                .summary = "Stays where it is.",
                .actuators = {Actuator::kExpertBias},
                .options = {},
                .make =
                    [&told](const PolicyContext& context, const PolicyOptions&) {
                      told = context.delay;
                      return std::make_unique<Still>();
                    },
                .check = {}});
  config.expert_bias.policy = "still";
  Controller controller(config, registry);
  EXPECT_EQ(told, 3);
  // What cannot work with late routing says so.
  ControllerConfig tags = lag_config(1);
  tags.model.domains = {"a", "b"};
  tags.expert_bias.options.set("feedforward", std::string("tags"));
  EXPECT_THROW(Controller{tags}, ConfigError);
}

// One decision would serve several batches, of which it knows the first one's mixture alone.
TEST(Lag, FeedforwardIsForBatchesThatAreDecidedOnOneByOne) {
  ControllerConfig tags = lag_config(0);
  tags.model.domains = {"a", "b"};
  tags.expert_bias.options.set("feedforward", std::string("tags"));
  EXPECT_NO_THROW(Controller{tags});
  tags.expert_bias.limits.cadence = 2;
  try {
    Controller{tags};
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("limits.cadence: 1"));
  }
}

TEST(Lag, MustBeZeroOrOne) {
  try {
    Controller controller(lag_config(2));
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("lag: 2: must be 0 or 1"));
  }
}

TEST(Lag, StepReturnsBeforeOtherRanksStartTheReduction) {
  Wire wire(2);
  Controller first(lag_config(1)), second(lag_config(1));
  std::thread other([&] {
    second.set_reduction(wire.of(1));
    second.step();  // the check of the configs waits for both
  });
  first.set_reduction(wire.of(0));
  record(first, 0, 0);
  first.step();
  other.join();
  record(first, 1, 0);
  std::thread last([&] { second.step(); });
  first.step();  // the sums of step 0 are there; those of step 1 have left, but the other rank may not have
                 // yet
  last.join();
  EXPECT_EQ(wire.rounds(), 3U);
  EXPECT_EQ(first.report().layers[0].stats->tokens() * kTopK, [] {
    const auto counts = recorded(0, 0, 0);
    return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  }());
}

TEST(Lag, RanksAgreeToTheBitWithOneThatHasAllTheShares) {
  constexpr int kSteps = 60, kRanks = 4;
  Controller alone(lag_config(1));
  std::vector<std::vector<double>> expected;
  for (int step = 0; step < kSteps; ++step) {
    for (int share = 0; share < kRanks; ++share) record(alone, step, share);
    alone.step({.loss = 1.0});
    expected.push_back(in_force(alone));
  }
  Wire wire(kRanks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      Controller controller(lag_config(1));
      controller.set_reduction(wire.of(rank));
      for (int step = 0; step < kSteps; ++step) {
        record(controller, step, rank);
        controller.step({.loss = 1.0});
        ASSERT_EQ(in_force(controller), expected[static_cast<std::size_t>(step)]) << rank << " " << step;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Lag, SavedAtAnyStepItContinuesWithTheSameBits) {
  constexpr int kSteps = 24;
  Controller straight(lag_config(1));
  std::vector<std::string> states;
  for (int step = 0; step < kSteps; ++step) {
    record(straight, step, 0);
    straight.step({.loss = 2.0 + step});
    if (step % 5 == 3) states.push_back(straight.save());
  }
  const std::string end = straight.save();
  for (std::size_t i = 0; i < states.size(); ++i) {
    Controller resumed(lag_config(1));
    resumed.load(states[i]);
    EXPECT_EQ(resumed.save(), states[i]);
    for (int step = static_cast<int>(5 * i) + 4; step < kSteps; ++step) {
      record(resumed, step, 0);
      resumed.step({.loss = 2.0 + step});
    }
    EXPECT_EQ(in_force(resumed), in_force(straight));
    EXPECT_EQ(resumed.save(), end);
  }
}

TEST(Lag, SavingWaitsForThePendingReductionAndStoresItsSums) {
  Wire wire(2);
  Controller first(lag_config(1)), second(lag_config(1));
  first.set_reduction(wire.of(0));
  second.set_reduction(wire.of(1));
  std::string saved, theirs;
  std::thread other([&] {
    record(second, 0, 1);
    second.step();
    theirs = second.save();
  });
  record(first, 0, 0);
  first.step();
  saved = first.save();
  other.join();
  EXPECT_EQ(saved, theirs) << "the sums over both ranks, not each one's share";
  // Any number of ranks can go on from it: nothing is left to be sent.
  Controller resumed(lag_config(1)), whole(lag_config(1));
  resumed.load(saved);
  resumed.step();
  for (int share = 0; share < 2; ++share) record(whole, 0, share);
  whole.step();
  whole.step();
  EXPECT_EQ(in_force(resumed), in_force(whole));
}

TEST(Lag, AFailedReductionChangesNothingAndIsRepeated) {
  Wire wire(1), second_wire(1);
  Controller controller(lag_config(1)), undisturbed(lag_config(1));
  controller.set_reduction(wire.of(0));
  std::optional<Wire> broken(std::in_place, 2);  // the other rank never comes
  for (int step = 0; step < 6; ++step) {
    for (Controller* it : {&controller, &undisturbed}) {
      record(*it, step, 0);
      if (it == &controller && step == 4) {
        // The sums of step 3 arrive, those of step 4 leave on a wire that loses them.
        const Reduction lost = broken->of(0);
        int calls = 0;
        it->set_reduction([&, lost, calls](std::span<std::int64_t> payload) mutable -> Reduction::Wait {
          if (++calls == 1) {  // the check of the configs
            return {};
          }
          return lost.start(payload);
        });
      }
      if (it == &controller && step == 5) {
        broken->cut();
        const std::vector<double> before = in_force(controller);
        const std::string state = controller.save();
        EXPECT_THROW(controller.step(), ReductionError);
        EXPECT_THROW(controller.step(), ReductionError);
        EXPECT_EQ(in_force(controller), before) << "the last applied values stay in force";
        EXPECT_EQ(controller.save(), state);
        EXPECT_EQ(controller.steps(), 5);
        controller.set_reduction(second_wire.of(0));
      }
      it->step();
    }
    ASSERT_EQ(in_force(controller), in_force(undisturbed)) << step;
  }
}

TEST(Lag, AReductionThatCannotStartChangesNothing) {
  Controller controller(lag_config(1)), undisturbed(lag_config(1));
  bool down = false;
  controller.set_reduction([&](std::span<std::int64_t>) {
    if (down) throw std::runtime_error("link down");
  });
  for (int step = 0; step < 10; ++step) {
    record(controller, step, 0);
    record(undisturbed, step, 0);
    down = step % 3 == 1;
    if (down) {
      const std::string before = controller.save();
      EXPECT_THROW(controller.step(), ReductionError);
      EXPECT_EQ(controller.save(), before);
      // Saved between the sums' arrival and the next step, it goes on just so.
      const std::string state = controller.save();
      controller.load(state);
      down = false;
    }
    controller.step();
    undisturbed.step();
    ASSERT_EQ(in_force(controller), in_force(undisturbed)) << step;
  }
}

TEST(Lag, ADivergedRankIsAnErrorOneStepLater) {
  Wire wire(2), second_wire(2);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      Controller controller(lag_config(1));
      controller.set_reduction(wire.of(rank));
      for (int step = 0; step < 5; ++step) {
        record(controller, step, rank);
        controller.step();
      }
      if (rank == 1) controller.load(Controller(lag_config(1)).save());
      controller.set_reduction(second_wire.of(rank));
      try {
        // Rank 0 takes the sums of step 4 and sends its own; rank 1, at its first step, has nothing to take.
        controller.step();
        controller.step();
        ADD_FAILURE();
      } catch (const ReductionError& error) {
        EXPECT_THAT(error.what(), HasSubstr("different values"));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Lag, DestructionWaitsForThePendingReduction) {
  bool waited = false;
  {
    Controller controller(lag_config(1));
    controller.set_reduction([&](std::span<std::int64_t>) -> Reduction::Wait {
      waited = false;
      return [&] {
        waited = true;
        throw std::runtime_error("nobody wants to know");
      };
    });
    EXPECT_THROW(controller.step(), ReductionError) << "the check of the configs waits";
    waited = false;
    controller.set_reduction([&, calls = 0](std::span<std::int64_t>) mutable -> Reduction::Wait {
      if (++calls == 1) return {};
      return [&] { waited = true; };
    });
    controller.step();
    EXPECT_FALSE(waited);
  }
  EXPECT_TRUE(waited);
}

TEST(Lag, AnExchangeAddsItsSumsAlsoWhenTheyAreSentAgain) {
  Controller controller(lag_config(1)), host(lag_config(1));
  bool lose = false;
  controller.set_exchange([&](std::span<std::int64_t> payload, std::span<std::int64_t> own,
                              const Reduction& reduction) -> Reduction::Wait {
    EXPECT_FALSE(static_cast<bool>(reduction));
    // One more token for experts 0 and 1 in the first layer.
    return [&lose, payload, own] {
      for (const std::span<std::int64_t> sums : {payload, own}) {
        sums[RoutingStats::kTokens] += 1;
        sums[RoutingStats::kChoicesSq] += 4;
        sums[RoutingStats::kScalarCount] += 1;
        sums[RoutingStats::kScalarCount + 1] += 1;
      }
      if (lose) throw std::runtime_error("lost");
    };
  });
  const std::vector<std::int64_t> elsewhere = {1, 1, 0, 0, 0, 0, 0, 0};
  for (int step = 0; step < 6; ++step) {
    record(controller, step, 0);
    record(host, step, 0);
    host.record_with(0, [&](RoutingStats& sums) { sums.add_counts(elsewhere, 1); });
    lose = step == 3;
    if (lose) {
      EXPECT_THROW(controller.step(), ReductionError);
    }
    lose = false;
    controller.step();
    host.step();
    ASSERT_EQ(in_force(controller), in_force(host)) << step;
    const auto sums = controller.report().layers[0].stats->flat(),
               theirs = host.report().layers[0].stats->flat();
    ASSERT_TRUE(std::equal(sums.begin(), sums.end(), theirs.begin())) << step;
  }
}

}  // namespace
}  // namespace moectl
