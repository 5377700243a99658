#include "moectl/controller.h"
#include "ranks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "allocation_counter.h"
#include "test_policy.h"
#include "test_sums.h"

namespace moectl {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using Counts = std::vector<std::int64_t>;

ControllerConfig small_config(const std::string& policy = "sign_bias", int layers = 2, int experts = 4,
                              int top_k = 1) {
  return config_of_biases(policy, layers, experts, top_k);
}

void record_all(Controller& controller, const Counts& counts) {
  for (int l = 0; l < controller.config().model.layers; ++l) record_counts(controller, l, counts);
}

std::vector<double> to_vector(std::span<const double> values) {
  return {values.begin(), values.end()};
}

TEST(Controller, MovesTheBiasTowardsTheTarget) {
  Controller controller(small_config());
  record_counts(controller, 0, {8, 4, 2, 2});
  record_counts(controller, 1, {2, 2, 4, 8});
  const StepReport& report = controller.step();
  // e = (-, 0, +, +): Δ = 1e-3 · (-1, 0, 1, 1) less its mean.
  const double u = 1e-3, mean = 0.25e-3;
  EXPECT_THAT(to_vector(controller.bias(0)),
              ::testing::Pointwise(::testing::DoubleNear(1e-15),
                                   std::vector<double>{-u - mean, -mean, u - mean, u - mean}));
  EXPECT_EQ(report.step, 0);
  ASSERT_EQ(report.layers.size(), 2U);
  EXPECT_EQ(report.layers[1].metrics->max_load, 0.5);
  EXPECT_EQ(report.layers[1].stats->tokens(), 16);
  EXPECT_EQ(report.layers[0].actuators[0].proposed.size(), 4U);
  EXPECT_TRUE(report.layers[0].actuators[0].reasons.empty());
  EXPECT_EQ(controller.steps(), 1);
  EXPECT_EQ(controller.aux_loss_weight(0), 0);
  EXPECT_EQ(controller.temperature(1), 1);
}

TEST(Controller, MicroBatchesAddUpAndAStepStartsAnew) {
  Controller controller(small_config());
  record_counts(controller, 0, {1, 0, 0, 0});
  record_counts(controller, 0, {0, 3, 0, 0});
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 4);
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 0);
}

TEST(Controller, RecomputationOfAMicroBatchDoesNotCountTwice) {
  Controller controller(small_config());
  const Counts experts = {0, 1, 1, 2};
  for (const std::int64_t micro_batch : {0, 1, 0, 1, 1}) {
    controller.record(0, {.experts = experts}, micro_batch);
  }
  controller.record(1, {.experts = experts}, 0);  // another layer's
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 8);
  EXPECT_EQ(controller.report().layers[1].stats->tokens(), 4);
  controller.record(0, {.experts = experts}, 0);  // the next step's
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 4);
  for (int i = 0; i < 2; ++i) controller.record(0, {.experts = experts});
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 8);  // unnumbered: all count
}

TEST(Controller, MisuseThrowsAndNamesTheValue) {
  Controller controller(small_config());
  const Counts experts = {0};
  EXPECT_THROW(controller.record(2, {.experts = experts}), std::invalid_argument);
  EXPECT_THROW(controller.record(-1, {.experts = experts}), std::invalid_argument);
  EXPECT_THROW(controller.record(0, RoutingStats({.experts = 5, .top_k = 1, .needs = {}})),
               std::invalid_argument);
  EXPECT_THROW(controller.bias(7), std::invalid_argument);
  EXPECT_THROW(controller.freeze(2), std::invalid_argument);
  const Counts mixture = {1, 2};
  EXPECT_THROW(controller.step({.next_mixture = mixture}), std::invalid_argument);
  try {
    controller.bias(7);
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_THAT(error.what(), HasSubstr("layer: 7: must be in [0, 2)"));
  }
  EXPECT_THROW(Controller(small_config("no_such_policy")), ConfigError);
}

TEST(Controller, BadDataHoldsTheLayerAndNoOther) {
  Controller controller(small_config());
  record_all(controller, {4, 0, 0, 0});
  const Counts outside = {99};
  controller.record(0, {.experts = outside});
  const StepReport& report = controller.step({.loss = std::numeric_limits<double>::quiet_NaN()});
  EXPECT_TRUE(report.layers[0].actuators[0].reasons.has(Reason::kInvalid));
  EXPECT_TRUE(report.layers[0].actuators[0].proposed.empty());
  EXPECT_EQ(report.layers[0].stats->invalid_records(), 1);
  EXPECT_FALSE(report.layers[0].metrics->load_cv.has_value());
  EXPECT_FALSE(report.info.loss.has_value());
  EXPECT_THAT(controller.bias(0), Each(0.0));
  EXPECT_LT(controller.bias(1)[0], 0);
}

TEST(Controller, HoldsWithoutDataAndOnSkippedSteps) {
  Controller controller(small_config());
  EXPECT_TRUE(controller.step().layers[0].actuators[0].reasons.has(Reason::kNoData));
  record_all(controller, {4, 0, 0, 0});
  EXPECT_TRUE(controller.step({.skipped = true}).layers[0].actuators[0].reasons.has(Reason::kSkippedStep));
  EXPECT_THAT(controller.bias(0), Each(0.0));
}

TEST(Controller, AFrozenLayerStaysUntilUnfrozen) {
  Controller controller(small_config());
  controller.freeze(0);
  record_all(controller, {4, 0, 0, 0});
  EXPECT_TRUE(controller.step().layers[0].actuators[0].reasons.has(Reason::kFrozen));
  EXPECT_THAT(controller.bias(0), Each(0.0));
  EXPECT_LT(controller.bias(1)[0], 0);
  controller.freeze(0, false);
  record_all(controller, {4, 0, 0, 0});
  controller.step();
  EXPECT_LT(controller.bias(0)[0], 0);
}

TEST(Controller, CadenceDecidesOnTheSumOfItsSteps) {
  ControllerConfig config = small_config();
  config.expert_bias.limits.cadence = 3;
  Controller controller(config);
  record_all(controller, {9, 0, 0, 0});  // alone it would push expert 0 down
  EXPECT_TRUE(controller.step().layers[0].actuators[0].reasons.has(Reason::kCadence));
  record_all(controller, {0, 16, 16, 16});
  controller.step();
  EXPECT_THAT(controller.bias(0), Each(0.0));
  record_all(controller, {3, 0, 0, 0});  // 12, 16, 16, 16: expert 0 lacks load
  EXPECT_TRUE(controller.step().layers[0].actuators[0].reasons.empty());
  EXPECT_GT(controller.bias(0)[0], 0);
  // The next window starts at zero: together with the last, expert 0 would still lack load.
  record_all(controller, {1, 0, 0, 0});
  for (int i = 0; i < 3; ++i) controller.step();
  EXPECT_NEAR(controller.bias(0)[0], 0, 1e-15);
}

TEST(Controller, AnInvalidStepIsLeftOutOfItsWindow) {
  ControllerConfig config = small_config();
  config.expert_bias.limits.cadence = 2;
  Controller controller(config);
  record_all(controller, {0, 100, 100, 100});
  record_counts(controller, 0, {-1, 0, 0, 0});  // poisons layer 0's step
  EXPECT_TRUE(controller.step().layers[0].actuators[0].reasons.has(Reason::kInvalid));
  record_all(controller, {4, 0, 0, 0});
  controller.step();
  EXPECT_LT(controller.bias(0)[0], 0);  // decided on {4,0,0,0} alone
  EXPECT_GT(controller.bias(1)[0], 0);  // decided on both
}

TEST(Controller, ShadowDecidesAndLogsButAppliesNothing) {
  ControllerConfig config = small_config();
  config.mode = Mode::kShadow;
  Controller controller(config);
  int logged = 0;
  controller.set_log([&](const StepReport&) { ++logged; });
  for (int i = 0; i < 3; ++i) {
    record_all(controller, {4, 0, 0, 0});
    controller.step();
  }
  EXPECT_THAT(controller.bias(0), Each(0.0));
  // What one step would do from what is in force: moves that were not made do not add up.
  EXPECT_NEAR(controller.report().layers[0].actuators[0].applied[0], -1.5e-3, 1e-15);
  EXPECT_TRUE(controller.report().layers[0].actuators[0].reasons.has(Reason::kShadow));
  EXPECT_EQ(logged, 3);
}

TEST(Controller, OffRecordsAndDecidesNothing) {
  ControllerConfig config = small_config();
  config.mode = Mode::kOff;
  config.aux_loss_weight.initial = 0.01;
  Controller controller(config);
  int logged = 0;
  controller.set_log([&](const StepReport&) { ++logged; });
  record_all(controller, {4, 0, 0, 0});
  const StepReport& report = controller.step({.loss = 2.5, .gradient_norm = 1e300});
  EXPECT_TRUE(report.layers.empty());
  EXPECT_EQ(report.info.loss, 2.5);
  EXPECT_EQ(report.info.gradient_norm, std::nullopt);  // no norm is as large
  EXPECT_THAT(controller.bias(0), Each(0.0));
  EXPECT_EQ(controller.aux_loss_weight(0), 0.01);
  EXPECT_EQ(logged, 0);
  EXPECT_EQ(controller.steps(), 1);
}

TEST(Controller, LogsEverySoManySteps) {
  ControllerConfig config = small_config();
  config.log.every = 3;
  Controller controller(config);
  std::vector<std::int64_t> logged;
  controller.set_log([&](const StepReport& report) { logged.push_back(report.step); });
  for (int i = 0; i < 8; ++i) controller.step();
  EXPECT_THAT(logged, ElementsAre(0, 3, 6));
}

// What happened in steps that are not logged stands in the next record, once.
TEST(Controller, NoticesWaitForTheNextRecordOfTheLog) {
  ControllerConfig config = small_config("sign_bias", 1);
  config.log.every = 3;
  Controller controller(config);
  std::vector<std::pair<std::int64_t, std::int64_t>> logged;  // step of the record, step of the notice
  controller.set_log([&](const StepReport& report) {
    for (const Notice& notice : report.notices) {
      if (notice.kind == NoticeKind::kInvalid) logged.emplace_back(report.step, notice.step);
    }
  });
  for (int step = 0; step < 9; ++step) {
    const bool bad = step == 1 || step == 3 || step == 5;
    record_counts(controller, 0, {bad ? -1 : 1, 1, 1, 1});
    controller.step();
  }
  EXPECT_THAT(logged, ElementsAre(std::pair(3, 1), std::pair(3, 3), std::pair(6, 5)));
}

// A policy that keeps what it saw, to look at the views.
struct Seen {
  std::vector<double> mean_load, worst_load, worst_entropy, least_load;
  Metrics mean, worst;
  std::vector<int> layers;
  std::vector<std::int64_t> next_mixture;
};
PolicyRegistry spying(Seen& seen) {
  class Spy final : public Policy {
   public:
    explicit Spy(Seen& seen) : seen_(seen) {}
    void propose(const LayerView& view, std::span<double> value) override {
      seen_.mean_load.push_back(view.metrics.max_load.value_or(-1));
      seen_.worst_load.push_back(view.worst.max_load.value_or(-1));
      seen_.worst_entropy.push_back(view.worst.entropy_normalized.value_or(-1));
      seen_.least_load.push_back(view.worst.min_load.value_or(-1));
      seen_.mean = view.metrics;
      seen_.worst = view.worst;
      seen_.layers.push_back(view.layer);
      seen_.next_mixture.assign(view.info.next_mixture.begin(), view.info.next_mixture.end());
      value[0] *= 2;
    }

   private:
    Seen& seen_;
  };
  return registry_with("spy", Actuator::kAuxLossWeight, [&seen](const PolicyContext&, const PolicyOptions&) {
    return std::make_unique<Spy>(seen);
  });
}

ControllerConfig spy_config() {
  ControllerConfig config = small_config("fixed");
  config.aux_loss_weight.policy = "spy";
  config.aux_loss_weight.initial = 0.01;
  config.aux_loss_weight.scope = Scope::kModel;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 0.1, .rate = 1};
  config.model.domains = {"code", "prose"};
  return config;
}

TEST(Controller, ModelScopeSeesMeanAndWorstAndMovesAllLayers) {
  Seen seen;
  const PolicyRegistry registry = spying(seen);
  Controller controller(spy_config(), registry);
  record_counts(controller, 0, {4, 0, 0, 0});
  record_counts(controller, 1, {1, 1, 1, 1});
  const StepReport& report = controller.step();
  EXPECT_THAT(seen.mean_load, ElementsAre(0.625));
  EXPECT_THAT(seen.worst_load, ElementsAre(1.0));
  // The layer that has collapsed, not the even one, whose entropy and least load are larger.
  EXPECT_THAT(seen.worst_entropy, ElementsAre(0.0));
  EXPECT_THAT(seen.least_load, ElementsAre(0.0));
  // What no layer knows is known of none, not zero.
  EXPECT_EQ(seen.mean.token_entropy, std::nullopt);
  EXPECT_EQ(seen.worst.token_entropy, std::nullopt);
  EXPECT_THAT(seen.layers, ElementsAre(-1));
  EXPECT_DOUBLE_EQ(controller.aux_loss_weight(0), 0.02);
  EXPECT_EQ(controller.aux_loss_weight(1), controller.aux_loss_weight(0));
  EXPECT_TRUE(report.layers[0].actuators[1].applied.empty());
  ASSERT_EQ(report.model[1].applied.size(), 1U);
  EXPECT_TRUE(report.model[0].applied.empty());
}

// Of every metric that tells of balance, whichever way it points.
TEST(Controller, TheWorstOfTheLayersIsTheUnevenOne) {
  for (const int uneven : {0, 1}) {
    Seen seen;
    const PolicyRegistry registry = spying(seen);
    Controller controller(spy_config(), registry);
    record_counts(controller, uneven, {13, 2, 1, 0});
    record_counts(controller, 1 - uneven, {5, 4, 4, 3});
    const StepReport& report = controller.step();
    const Metrics& of_uneven = *report.layers[static_cast<std::size_t>(uneven)].metrics;
    const Metrics& of_even = *report.layers[static_cast<std::size_t>(1 - uneven)].metrics;
    for (const char* name : {"entropy", "entropy_normalized", "effective_experts", "min_load",
                             "minority_share", "balancedness", "max_load", "max_vio", "load_cv", "gini"}) {
      const Metrics::Value Metrics::*value = nullptr;
      for (const MetricField& field : metric_fields()) {
        if (field.name == name) value = field.value;
      }
      ASSERT_TRUE(value) << name;
      ASSERT_TRUE(of_uneven.*value) << name;
      EXPECT_NE(of_uneven.*value, of_even.*value) << name;
      EXPECT_EQ(seen.worst.*value, of_uneven.*value) << name;
    }
  }
}

// A layer without tokens, the first one or another, leaves the decision to those that have some; also over a window.
TEST(Controller, OneLayersTokensAreEnoughForTheModelsActuators) {
  for (const int with_tokens : {0, 1}) {
    for (const int cadence : {1, 2}) {
      Seen seen;
      const PolicyRegistry registry = spying(seen);
      ControllerConfig config = spy_config();
      config.aux_loss_weight.limits.cadence = cadence;
      Controller controller(config, registry);
      for (int step = 0; step < cadence; ++step) {
        record_counts(controller, with_tokens, {3, 1, 0, 0});
        controller.step();
      }
      EXPECT_TRUE(controller.report().model[1].reasons.empty()) << with_tokens << ' ' << cadence;
      EXPECT_THAT(seen.mean_load, ElementsAre(0.75));
      EXPECT_THAT(seen.worst_load, ElementsAre(0.75));
    }
  }
}

TEST(Controller, APolicyOfALayerKnowsWhichOneItIs) {
  Seen seen;
  const PolicyRegistry registry = spying(seen);
  ControllerConfig config = spy_config();
  config.aux_loss_weight.scope = Scope::kLayer;
  Controller controller(config, registry);
  record_all(controller, {4, 0, 0, 0});
  controller.step();
  EXPECT_THAT(seen.layers, ElementsAre(0, 1));
}

TEST(Controller, OneLayersBadDataHoldsTheModelsActuators) {
  Seen seen;
  const PolicyRegistry registry = spying(seen);
  Controller controller(spy_config(), registry);
  record_counts(controller, 0, {4, 0, 0, 0});
  record_counts(controller, 1, {-4, 0, 0, 0});
  EXPECT_TRUE(controller.step().model[1].reasons.has(Reason::kInvalid));
  EXPECT_EQ(controller.aux_loss_weight(0), 0.01);
  controller.freeze(0);
  record_all(controller, {1, 1, 1, 1});
  EXPECT_TRUE(controller.step().model[1].reasons.empty());  // one layer is not frozen
  controller.freeze(1);
  record_all(controller, {1, 1, 1, 1});
  EXPECT_TRUE(controller.step().model[1].reasons.has(Reason::kFrozen));
}

// From biases that were there before: only what a step changes lets tokens choose others.
TEST(Controller, ChurnIsThatOfTheMoveOfTheStep) {
  for (const std::string policy : {"fixed", "sign_bias"}) {
    ControllerConfig config = small_config(policy, 1);
    config.metrics.details = true;
    config.collect.gap = true;
    Controller controller(config);
    controller.adopt(0, std::vector<double>{0.25, -0.25, 0.125, -0.125});
    const Counts experts = {0, 1, 2, 3, 0, 0, 0, 1};
    // The first four gaps are near, one of each expert's; the others are far.
    std::vector<float> top(16, 0.5F);
    for (std::size_t t = 0; t < 8; ++t) top[2 * t] += t < 4 ? 0.03125F : 0.5F;
    std::vector<std::pair<double, double>> scratch;
    for (int step = 0; step < 4; ++step) {
      std::vector<double> move = to_vector(controller.bias(0));
      controller.record(0, {.experts = experts, .top_values = top});
      const LayerReport& layer = controller.step().layers[0];
      for (std::size_t i = 0; i < 4; ++i) move[i] = controller.bias(0)[i] - move[i];
      const std::optional<double> expected = estimate_churn(*layer.stats, move, scratch);
      EXPECT_EQ(layer.metrics->churn, expected) << policy << ' ' << step;
      if (step == 0) continue;  // no gap was known to be near
      ASSERT_TRUE(expected) << policy << ' ' << step;
      EXPECT_EQ(*expected > 0, policy == "sign_bias") << step;
    }
  }
}

// Nothing of ours allocates once the sums over ranks have arrived: so nothing can fail for want of memory between the
// collective and the end of the step.
TEST(Controller, NothingAllocatesAfterTheReductionNotEvenInTheFirstStep) {
  ControllerConfig config = small_config("sign_bias", 4, 16, 2);
  config.aux_loss_weight.policy = "pi";
  config.aux_loss_weight.initial = 0.01;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 0.1, .rate = 0.1};
  config.guard.enabled = true;
  config.model.tokens_per_step = 1000000;  // notices, too, have their room
  Controller controller(config);
  std::int64_t at_reduction = 0;
  controller.set_reduction([&](std::span<std::int64_t>) { at_reduction = testing::allocations(); });
  const Counts counts = {64, 0, 10, 10, 20, 20, 4, 128, 16, 16, 16, 16, 16, 16, 16, 16};
  for (int step = 0; step < 30; ++step) {
    for (int layer = 0; layer < 4; ++layer) record_counts(controller, layer, counts);
    if (step % 7 == 3) record_counts(controller, 1, {-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
    controller.step();
    EXPECT_EQ(testing::allocations(), at_reduction) << step;
  }
}

// ---- Several ranks: threads that meet in an all-reduce. ----

template <class Work>
void on_ranks(int size, const Work& work) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) threads.emplace_back([&work, rank] { work(rank); });
  for (std::thread& thread : threads) thread.join();
}

TEST(ControllerRanks, DecideOnTheSumAndAgreeToTheBit) {
  constexpr int kRanks = 4;
  Ranks ranks(kRanks);
  ControllerConfig config = small_config("adaptive_bias");
  config.model.domains = {"a", "b"};
  std::vector<std::vector<double>> biases(kRanks);
  std::vector<std::optional<double>> losses(kRanks);
  std::vector<std::int64_t> mixtures(kRanks);
  on_ranks(kRanks, [&](int rank) {
    Controller controller(config);
    controller.set_reduction(ranks.reduction());
    std::mt19937_64 random(static_cast<std::uint64_t>(rank));
    const auto at = static_cast<std::size_t>(rank);
    for (int step = 0; step < 20; ++step) {
      for (int l = 0; l < 2; ++l) {
        Counts counts(4);
        for (auto& c : counts) c = static_cast<std::int64_t>(random() % 100);
        record_counts(controller, l, counts);
      }
      const Counts mixture = {rank, 1};
      losses[at] = controller.step({.loss = 1.0 + rank, .next_mixture = mixture}).info.loss;
      mixtures[at] = controller.report().info.next_mixture[0];
    }
    biases[at] = to_vector(controller.bias(1));
  });
  // The same sums in one process.
  Controller alone(config);
  std::vector<std::mt19937_64> random;
  for (std::uint64_t rank = 0; rank < kRanks; ++rank) random.emplace_back(rank);
  for (int step = 0; step < 20; ++step) {
    for (auto& generator : random) {
      for (int l = 0; l < 2; ++l) {
        Counts counts(4);
        for (auto& c : counts) c = static_cast<std::int64_t>(generator() % 100);
        record_counts(alone, l, counts);
      }
    }
    alone.step();
  }
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    EXPECT_EQ(biases[rank], to_vector(alone.bias(1)));
    EXPECT_EQ(losses[rank], 2.5);
    EXPECT_EQ(mixtures[rank], 0 + 1 + 2 + 3);
  }
}

TEST(ControllerRanks, OneRanksSkippedStepHoldsAll) {
  Ranks ranks(2);
  on_ranks(2, [&](int rank) {
    Controller controller(small_config());
    controller.set_reduction(ranks.reduction());
    record_all(controller, {4, 0, 0, 0});
    EXPECT_TRUE(
        controller.step({.skipped = rank == 1}).layers[0].actuators[0].reasons.has(Reason::kSkippedStep));
  });
}

TEST(ControllerRanks, OneRanksHoldHoldsAllAndIsNamed) {
  Ranks ranks(2);
  on_ranks(2, [&](int rank) {
    Controller controller(small_config());
    controller.set_reduction(ranks.reduction());
    std::string notices;
    const auto step = [&] {
      record_all(controller, {4, 0, 0, 0});
      for (const Notice& notice : controller.step().notices) {
        if (notice.kind == NoticeKind::kHold) notices += std::string(notice.text) + '\n';
      }
    };
    step();
    const std::vector<double> before = to_vector(controller.bias(0));
    controller.hold(rank == 1);
    for (int i = 0; i < 3; ++i) step();
    EXPECT_EQ(to_vector(controller.bias(0)), before);
    EXPECT_TRUE(controller.report().layers[0].actuators[0].reasons.has(Reason::kHostHold));
    EXPECT_EQ(notices,
              "1 of 2 ranks are held by hold() or by MOECTL_HOLD in their environment: all ranks hold\n");
    controller.hold(false);
    step();
    EXPECT_NE(to_vector(controller.bias(0)), before);
  });
}

// Only one rank's router has the fault, and only that rank can see it.
TEST(ControllerRanks, OneRanksWrongWiringHoldsThatLayerOnAll) {
  Ranks ranks(2);
  on_ranks(2, [&](int rank) {
    Controller controller(small_config("sign_bias"));
    controller.set_reduction(ranks.reduction());
    const std::vector<std::int64_t> chosen = {0, 1};
    const std::vector<float> scores = {0.4F, 0.3F, 0.1F, 0};
    for (int i = 0; i < 12; ++i) {
      record_all(controller, {8, 4, 2, 2});
      if (rank == 1) {
        controller.check_choices(
            0, {.experts = std::span(chosen).first(static_cast<std::size_t>(controller.config().model.top_k)),
                .biased_scores = scores,
                .scores = scores});
      }
      controller.step();
    }
    const auto& layers = controller.report().layers;
    EXPECT_TRUE(layers[0].actuators[0].reasons.has(Reason::kUnresponsive)) << rank;
    EXPECT_FALSE(layers[1].actuators[0].reasons.has(Reason::kUnresponsive)) << rank;
  });
}

// Each step another rank leaves the bias out: no rank sees it three times, and all hold and say so.
TEST(ControllerRanks, AFaultThatGoesRoundIsHeldAndToldOnAll) {
  constexpr int kRanks = 4;
  Ranks ranks(kRanks);
  on_ranks(kRanks, [&](int rank) {
    Controller controller(small_config("sign_bias"));
    controller.set_reduction(ranks.reduction());
    const std::vector<std::int64_t> chosen = {0, 1};
    const std::vector<float> scores = {0.4F, 0.3F, 0.1F, 0};
    std::string said;
    for (int i = 0; i < 9; ++i) {
      record_all(controller, {8, 4, 2, 2});
      if (i > 0 && i % kRanks == rank) {
        controller.check_choices(
            0, {.experts = std::span(chosen).first(static_cast<std::size_t>(controller.config().model.top_k)),
                .biased_scores = scores,
                .scores = scores});
      }
      for (const Notice& notice : controller.step().notices) said += std::string(notice.text) + '\n';
    }
    EXPECT_TRUE(controller.report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive)) << rank;
    EXPECT_THAT(said, HasSubstr("use another bias than this layer's, on this rank or on others")) << rank;
  });
}

TEST(ControllerRanks, OneRanksBadLossMakesItUnknownToAll) {
  Ranks ranks(2);
  on_ranks(2, [&](int rank) {
    Controller controller(small_config());
    controller.set_reduction(ranks.reduction());
    EXPECT_FALSE(controller.step({.loss = rank == 1 ? std::nan("") : 2.0}).info.loss.has_value());
  });
}

TEST(ControllerRanks, ADivergedRankIsAnErrorOnEveryRank) {
  Ranks ranks(2);
  on_ranks(2, [&](int rank) {
    Controller controller(small_config());
    controller.set_reduction(ranks.reduction());
    record_all(controller, {4, 0, 0, 0});
    controller.step();
    if (rank == 1) {  // one more step than the others, on its own
      controller.set_reduction(nullptr);
      controller.step();
      controller.set_reduction(ranks.reduction());
    } else {
      controller.set_reduction(ranks.reduction());
    }
    const std::vector<double> before = to_vector(controller.bias(0));
    const std::int64_t steps = controller.steps();
    record_all(controller, {0, 4, 0, 0});
    try {
      controller.step();
      ADD_FAILURE();
    } catch (const ReductionError& error) {
      EXPECT_THAT(error.what(), HasSubstr("different values"));
    }
    EXPECT_EQ(to_vector(controller.bias(0)), before);
    EXPECT_EQ(controller.steps(), steps);
  });
}

TEST(ControllerRanks, AnotherConfigIsAnErrorBeforeTheFirstSum) {
  Ranks ranks(2);
  on_ranks(2, [&](int rank) {
    ControllerConfig config = small_config();
    if (rank == 1) config.expert_bias.limits.rate = 0.5;
    Controller controller(config);
    controller.set_reduction(ranks.reduction());
    EXPECT_THROW(controller.step(), ReductionError);
  });
  Ranks sizes(2);
  on_ranks(2, [&](int rank) {
    Controller controller(small_config("sign_bias", rank == 1 ? 3 : 2));
    controller.set_reduction(sizes.reduction());
    EXPECT_THROW(controller.step(), ReductionError);
  });
}

// Each rank says the key, and its own value of it.
TEST(ControllerRanks, TheKeyThatDiffersIsNamed) {
  struct Case {
    const char* first;
    const char* second;
    void (*change)(ControllerConfig&);
  };
  const Case cases[] = {
      {"\"metrics.capacity_factor: 1.25\"", "\"metrics.capacity_factor: 1.5\"",
       [](ControllerConfig& c) { c.metrics.capacity_factor = 1.5; }},
      {"\"metrics.cold_fraction: 0.1\"", "\"metrics.cold_fraction: 0.2\"",
       [](ControllerConfig& c) { c.metrics.cold_fraction = 0.2; }},
      {"\"model.tokens_per_step: 0\"", "\"model.tokens_per_step: 8\"",
       [](ControllerConfig& c) { c.model.tokens_per_step = 8; }},
      {"\"metrics.placement[2]: 1\"", "\"metrics.placement[2]: 0\"",
       [](ControllerConfig& c) { c.metrics.placement[2] = 0; }},
      {"\"health.bands.gini: [0, 1]\"", "\"health.bands.gini: [0, 0.5]\"",
       [](ControllerConfig& c) { c.monitor.health.bands["gini"].high = 0.5; }},
      {"\"expert_bias.options.step: 0.001\"", "\"expert_bias.options.step: 0.002\"",
       [](ControllerConfig& c) { c.expert_bias.options.set("step", 0.002); }},
  };
  for (const Case& one : cases) {
    Ranks ranks(2);
    on_ranks(2, [&](int rank) {
      ControllerConfig config = small_config();
      config.metrics.placement = {0, 0, 1, 1};
      config.monitor.health.bands["gini"] = {0, 1};
      if (rank == 1) one.change(config);
      Controller controller(config);
      controller.set_reduction(ranks.reduction());
      try {
        controller.step();
        ADD_FAILURE() << one.first;
      } catch (const ReductionError& error) {
        EXPECT_THAT(error.what(), HasSubstr(rank == 0 ? one.first : one.second));
      }
    });
  }
}

// What one rank logs is its own business.
TEST(ControllerRanks, LogsMayDiffer) {
  Ranks ranks(2);
  on_ranks(2, [&](int rank) {
    ControllerConfig config = small_config();
    config.log.every = 1 + rank;
    Controller controller(config);
    controller.set_reduction(ranks.reduction());
    EXPECT_NO_THROW(controller.step());
  });
}

TEST(ControllerRanks, AFailedReductionChangesNothingAndCanBeTriedAgain) {
  Ranks ranks(1);
  Controller controller(small_config());
  controller.set_reduction(ranks.reduction());
  record_all(controller, {4, 0, 0, 0});
  controller.step();
  const std::string before = controller.save();
  record_all(controller, {4, 0, 0, 0});
  const std::string recorded = controller.save();
  ranks.failing = true;
  EXPECT_THROW(controller.step(), ReductionError);
  EXPECT_EQ(controller.save(), recorded);
  EXPECT_NE(controller.save(), before);
  ranks.failing = false;
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 4);
}

TEST(Controller, RecordIsThreadSafeAndExact) {
  Controller controller(small_config("adaptive_bias", 3, 8, 2));
  constexpr int kThreads = 8, kBatches = 50;
  on_ranks(kThreads, [&](int thread) {
    std::mt19937_64 random(static_cast<std::uint64_t>(thread));
    for (int batch = 0; batch < kBatches; ++batch) {
      Counts experts(64);
      std::vector<float> top(96);
      for (std::size_t t = 0; t < 32; ++t) {
        experts[2 * t] = static_cast<std::int64_t>(random() % 8);
        experts[2 * t + 1] = (experts[2 * t] + 1) % 8;
        for (std::size_t j = 0; j < 3; ++j) top[3 * t + j] = 1.0F - 0.1F * static_cast<float>(j);
      }
      for (int l = 0; l < 3; ++l) {
        // Every micro-batch twice, as recomputation does.
        for (int i = 0; i < 2; ++i) {
          controller.record(l, {.experts = experts, .top_values = top}, thread * kBatches + batch);
        }
      }
    }
  });
  const StepReport& report = controller.step();
  for (const LayerReport& layer : report.layers) {
    EXPECT_EQ(layer.stats->tokens(), kThreads * kBatches * 32);
    EXPECT_EQ(layer.stats->assignments(), kThreads * kBatches * 64);
    EXPECT_EQ(layer.stats->flat()[0], report.layers[0].stats->flat()[0]);
    EXPECT_TRUE(std::equal(layer.stats->flat().begin(), layer.stats->flat().end(),
                           report.layers[0].stats->flat().begin()));
  }
}

// ---- State. ----

ControllerConfig rich_config() {
  ControllerConfig config = small_config("adaptive_bias", 3, 8, 2);
  config.aux_loss_weight.policy = "pi";
  config.aux_loss_weight.initial = 0.01;
  config.aux_loss_weight.scope = Scope::kModel;
  config.aux_loss_weight.limits = {.min = 1e-4, .max = 0.1, .rate = 0.1, .deadband = 1e-3, .cadence = 4};
  config.safety.rollback.emplace();
  config.safety.oscillation.emplace();
  return config;
}

void hostile_record(Controller& controller, std::mt19937_64& random) {
  for (int l = 0; l < controller.config().model.layers; ++l) {
    if (random() % 12 == 0) continue;
    Counts counts(static_cast<std::size_t>(controller.config().model.experts));
    for (auto& c : counts) c = static_cast<std::int64_t>(random() % 50);
    if (random() % 12 == 0) counts[0] = -5;
    record_counts(controller, l, counts);
  }
}

StepInfo hostile_info(std::mt19937_64& random) {
  return {.loss = random() % 10 == 0 ? 1e9 : 3.0 + 0.01 * static_cast<double>(random() % 100),
          .skipped = random() % 15 == 0};
}

TEST(ControllerState, SavedAtAnyStepItContinuesWithTheSameBits) {
  std::mt19937_64 pick(11);
  for (int trial = 0; trial < 12; ++trial) {
    const std::uint64_t seed = pick();
    const auto at = static_cast<int>(pick() % 60);
    std::mt19937_64 random(seed);
    Controller first(rich_config());
    for (int step = 0; step < at; ++step) {
      hostile_record(first, random);
      first.step(hostile_info(random));
      if (step == at / 2) first.freeze(1);
    }
    hostile_record(first, random);  // recorded, not stepped: part of the state
    const Counts experts = {0, 1, 2, 3};
    first.record(0, {.experts = experts}, 5);
    const std::string state = first.save();
    Controller second(rich_config());
    second.load(state);
    EXPECT_EQ(second.save(), state);
    second.record(0, {.experts = experts}, 5);  // already in the saved sums
    EXPECT_EQ(second.save(), state);
    std::mt19937_64 other = random;
    for (int step = 0; step < 40; ++step) {
      first.step(hostile_info(random));
      second.step(hostile_info(other));
      hostile_record(first, random);
      hostile_record(second, other);
      ASSERT_EQ(first.save(), second.save()) << trial << " " << step;
    }
    EXPECT_EQ(first.steps(), second.steps());
  }
}

TEST(ControllerState, ABadStateLeavesTheRunningOneAlone) {
  Controller controller(small_config());
  record_all(controller, {4, 0, 0, 0});
  controller.step();
  record_all(controller, {0, 4, 0, 0});
  const std::string good = controller.save();
  Controller other(small_config("sign_bias", 2, 8));
  try {
    controller.load(other.save());
    FAIL();
  } catch (const StateError& error) {
    EXPECT_THAT(error.what(), HasSubstr("model.experts: 8"));
    EXPECT_THAT(error.what(), HasSubstr("model.experts: 4"));
  }
  for (const std::size_t cut : {std::size_t{0}, std::size_t{5}, good.size() / 2, good.size() - 1}) {
    EXPECT_THROW(controller.load(std::string_view(good).substr(0, cut)), StateError) << cut;
  }
  for (std::size_t at = 0; at < good.size(); at += 7) {
    std::string altered = good;
    altered[at] = static_cast<char>(altered[at] ^ 0x10);
    EXPECT_THROW(controller.load(altered), StateError) << at;
  }
  EXPECT_EQ(controller.save(), good);
}

TEST(ControllerState, LimitsAndModeMayChangeBetweenRuns) {
  Controller wide(small_config());
  for (int i = 0; i < 100; ++i) {
    record_all(wide, {4, 0, 0, 0});
    wide.step();
  }
  ASSERT_LT(wide.bias(0)[0], -0.05);
  ControllerConfig config = small_config();
  config.expert_bias.limits.min = -0.05;
  config.expert_bias.limits.max = 0.05;
  Controller narrow(config);
  narrow.load(wide.save());
  record_all(narrow, {4, 0, 0, 0});
  narrow.step();
  for (const double b : narrow.bias(0)) {
    EXPECT_GE(b, -0.05);
    EXPECT_LE(b, 0.05);
  }
}

TEST(ControllerState, KeepsReductionAndLogAcrossALoad) {
  Ranks ranks(1);
  Controller controller(small_config());
  int logged = 0, reduced = 0;
  controller.set_log([&](const StepReport&) { ++logged; });
  controller.set_reduction([&](std::span<std::int64_t>) { ++reduced; });
  controller.step();
  controller.load(controller.save());
  controller.step();
  EXPECT_EQ(logged, 2);
  EXPECT_EQ(reduced, 3);  // one handshake, two steps
}

// ---- The invariant, through the whole loop. ----

TEST(ControllerProperty, AppliedValuesObeyTheLimitsForAnyInput) {
  std::mt19937_64 random(20260102);
  const auto chance = [&](double p) { return std::bernoulli_distribution(p)(random); };
  const std::vector<double> hostile = {std::nan(""), INFINITY, -INFINITY, 1e308, -1.0, 0.0};
  std::int64_t moves = 0, rejected = 0;
  for (int trial = 0; trial < 300; ++trial) {
    ControllerConfig config;
    config.model.layers = 1 + static_cast<int>(random() % 3);
    config.model.experts = 1 + static_cast<int>(random() % 12);
    config.model.top_k = 1 + static_cast<int>(random() % static_cast<std::uint64_t>(config.model.experts));
    config.model.score_space = chance(0.5) ? ScoreSpace::kLogit : ScoreSpace::kProbability;
    config.model.delay = chance(0.3) ? 3 : 0;
    for (const Actuator which : kActuators) {
      ActuatorConfig& actuator = config.actuator(which);
      std::vector<std::string> fitting;
      for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
        for (const Actuator served : policy->actuators) {
          if (served == which) fitting.push_back(policy->name);
        }
      }
      actuator.policy = fitting[random() % fitting.size()];
      actuator.limits = default_limits(which);
      if (is_multiplicative(which)) actuator.initial = which == Actuator::kAuxLossWeight ? 0.01 : 1.0;
      actuator.limits.rate = std::pow(10.0, std::uniform_real_distribution<double>(-4, 1)(random));
      actuator.limits.center = which == Actuator::kExpertBias && chance(0.5);
      actuator.limits.cadence = chance(0.3) ? 3 : 1;
      actuator.scope = is_multiplicative(which) && chance(0.5) ? Scope::kModel : Scope::kLayer;
    }
    if (chance(0.3)) config.safety.rollback.emplace();
    if (chance(0.3)) config.safety.oscillation.emplace();
    config.safety.fallback_after = chance(0.5) ? 3 : 0;
    if (chance(0.5)) config.safety.fallback = Fallback::kInitial;
    std::optional<Controller> made;
    try {
      made.emplace(config);
    } catch (const ConfigError&) {  // a policy that does not fit this model says so
      ++rejected;
      continue;
    }
    Controller& controller = *made;
    const auto n = static_cast<std::size_t>(config.model.experts);
    const auto k = static_cast<std::size_t>(config.model.top_k);
    const auto layers = static_cast<std::size_t>(config.model.layers);
    std::vector<std::vector<double>> before(layers, std::vector<double>(n, 0.0));
    std::vector<double> aux(layers, 0.01), temperature(layers, 1.0);
    for (int step = 0; step < 30; ++step) {
      for (int l = 0; l < config.model.layers; ++l) {
        const std::size_t tokens = random() % 20;
        Counts experts(tokens * k);
        const bool pile = chance(0.2);
        for (std::size_t i = 0; i < experts.size(); ++i) {
          experts[i] =
              pile ? static_cast<std::int64_t>(i % k) : static_cast<std::int64_t>((i % k + random()) % n);
        }
        if (!experts.empty() && chance(0.05)) experts[0] = chance(0.5) ? -1 : std::int64_t{1} << 60;
        RoutingBatch batch{.experts = experts};
        std::vector<float> top(tokens * (k + 1));
        if (k < n && chance(0.8)) {
          for (std::size_t i = 0; i < top.size(); ++i) top[i] = 1.0F - static_cast<float>(i % (k + 1));
          if (!top.empty() && chance(0.05)) top[0] = static_cast<float>(hostile[random() % hostile.size()]);
          batch.top_values = top;
        }
        if (chance(0.3)) batch.dropped = static_cast<std::int64_t>(random() % 5) - 1;
        controller.record(l, batch);
        if (chance(0.1)) {
          Counts huge(n, std::int64_t{1} << 40);
          if (chance(0.3)) huge[0] = -7;
          controller.record_with(l,
                                 [&](RoutingStats& sums) { sums.add_counts(huge, std::int64_t{1} << 40); });
        }
        if (chance(0.05)) controller.freeze(l, chance(0.5));
      }
      StepInfo info{.loss = chance(0.2) ? hostile[random() % hostile.size()] : 3.0, .skipped = chance(0.1)};
      const StepReport& report = controller.step(info);
      const auto excepted = [](const LimitReport& why) {
        return why.has(Reason::kRollback) || why.has(Reason::kFallback);
      };
      for (int l = 0; l < config.model.layers; ++l) {
        const auto at = static_cast<std::size_t>(l);
        const LimitReport why = report.layers[at].actuators[0].reasons;
        const Limits& limits = config.expert_bias.limits;
        for (std::size_t i = 0; i < n; ++i) {
          const double now = controller.bias(l)[i];
          ASSERT_TRUE(std::isfinite(now));
          ASSERT_GE(now, limits.min);
          ASSERT_LE(now, limits.max);
          if (!excepted(why)) {
            ASSERT_LE(std::abs(now - before[at][i]), limits.rate + 1e-12);
          }
          moves += now != before[at][i];
          before[at][i] = now;
        }
        const auto check = [&](Actuator which, double now, double& last) {
          const Limits& own = config.actuator(which).limits;
          const auto index = static_cast<std::size_t>(which);
          const LimitReport reasons = config.actuator(which).scope == Scope::kModel
                                          ? report.model[index].reasons
                                          : report.layers[at].actuators[index].reasons;
          ASSERT_TRUE(now >= own.min && now <= own.max) << now;
          if (!excepted(reasons)) {
            ASSERT_LE(std::abs(std::log(now / last)), own.rate + 1e-12);
          }
          last = now;
        };
        check(Actuator::kAuxLossWeight, controller.aux_loss_weight(l), aux[at]);
        check(Actuator::kRouterTemperature, controller.temperature(l), temperature[at]);
      }
    }
  }
  EXPECT_GT(moves, 10000);
  EXPECT_LT(rejected, 200);
}

TEST(Controller, AStepDoesNotAllocateOnceWarm) {
  Controller controller(rich_config());
  const std::vector<float> top(48 * 3, 0.5F);
  Counts experts(96);
  for (std::size_t i = 0; i < experts.size(); ++i) experts[i] = static_cast<std::int64_t>(i * i % 7);
  const auto one = [&](int step) {
    for (int l = 0; l < 3; ++l) {
      for (int micro = 0; micro < 4; ++micro)
        controller.record(l, {.experts = experts, .top_values = top}, micro);
    }
    controller.step({.loss = 3.0 + 0.001 * step});
  };
  for (int step = 0; step < 20; ++step) one(step);
  EXPECT_EQ(moectl::testing::allocations_of([&] {
              for (int step = 0; step < 50; ++step) one(step);
            }),
            0);
}

TEST(ControllerRanks, AReducedStepDoesNotAllocateOnceWarm) {
  Controller controller(rich_config());
  controller.set_reduction([](std::span<std::int64_t>) {});
  record_all(controller, {8, 1, 1, 1, 1, 1, 1, 2});
  controller.step();
  EXPECT_EQ(moectl::testing::allocations_of([&] {
              for (int step = 0; step < 20; ++step) controller.step({.loss = 3.0});
            }),
            0);
}

}  // namespace
}  // namespace moectl
