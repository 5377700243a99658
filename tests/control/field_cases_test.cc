// What loops of others (FieldCases) and attacks (LooseEnds) have shown: the list is tests/field_cases.md. Each test asserts
// what the user should see.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <new>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "allocation_counter.h"
#include "moectl/controller.h"
#include "moectl/policy.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"
#include "ranks.h"
#include "simulated_loop.h"
#include "temp_dir.h"
#include "test_policy.h"
#include "test_sums.h"

namespace moectl {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Indices = std::vector<std::int64_t>;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

ControllerConfig config_of(const std::string& policy, int layers = 1, int experts = 4, int top_k = 1) {
  return config_of_biases(policy, layers, experts, top_k);
}

std::vector<double> bias_of(const Controller& controller, int layer = 0) {
  return {controller.bias(layer).begin(), controller.bias(layer).end()};
}

/// "kind@layer: text" of each notice.
std::vector<std::string> notices_of(const StepReport& report) {
  std::vector<std::string> all;
  for (const Notice& notice : report.notices) {
    all.push_back(std::string(name_of(notice.kind)) + '@' + std::to_string(notice.layer) + ": " +
                  std::string(notice.text));
  }
  return all;
}

LimitReport reasons_of(const StepReport& report, int layer = 0) {
  return report.layers[static_cast<std::size_t>(layer)].actuators[0].reasons;
}

// ---- A5: invalid data are explained, and falling back is no surprise. ----

TEST(FieldCases, A5_InvalidNamesFieldIndexAndValueInReportAndLog) {
  const TempDir dir;
  ControllerConfig config = config_of("adaptive_bias", 2, 64, 2);
  Controller controller(config);
  {
    RunLogWriter log(dir.path("run.jsonl"), controller.config());
    controller.set_log([&](const StepReport& report) { log.write(report); });
    Indices experts(40, 3);
    controller.record(0, {.experts = experts});
    experts[17] = 99;
    experts[30] = -1;
    controller.record(1, {.experts = experts});
    const StepReport& report = controller.step();
    EXPECT_TRUE(reasons_of(report, 1).has(Reason::kInvalid));
    EXPECT_THAT(notices_of(report), ElementsAre("invalid@1: experts[17] = 99: must be in [0, 64)"));
  }
  LogReader reader(dir.path("run.jsonl"));
  EXPECT_THAT(reader.next()->notices, IsEmpty());
  const auto record = reader.next();
  ASSERT_EQ(record->notices.size(), 1U);
  EXPECT_EQ(record->notices[0].kind, "invalid");
  EXPECT_EQ(record->notices[0].text, "experts[17] = 99: must be in [0, 64)");
  EXPECT_EQ(record->notices[0].step, 0);
}

TEST(FieldCases, A5_EveryInputNamesItsFirstOffence) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  ControllerConfig config = config_of("quantile_bias", 1, 3, 1);
  config.collect = {.gap = true,
                    .sequences = true,
                    .probabilities = true,
                    .gradients = true,
                    .losses = true,
                    .latencies = true};
  config.model.domains = {"code", "prose"};
  const Indices experts = {0, 1, 2}, ids = {4, 3, 5}, domains = {0, 1, 2};
  const std::vector<float> top = {3, 2, 3, nan, 3, 2}, good_top = {3, 2, 3, 2, 3, 2};
  const std::vector<float> scores = {3, 2, 0, 3, 2, 0, 3, inf, 0};
  const std::vector<float> probabilities = {1, 0, 0, 0, -0.5, 1, 1, 0, 0}, zero = {1, 0, 0, 0, 0, 0, 1, 0, 0};
  const std::vector<float> losses = {1, 2, nan};
  const std::vector<std::pair<std::function<void(Controller&)>, std::string>> cases = {
      {[&](Controller& c) { c.record(0, {.experts = experts, .sequence_ids = ids}); },
       "sequence_ids[1] = 3: must not be below the id before it"},
      {[&](Controller& c) { c.record(0, {.experts = experts, .domain_ids = domains}); },
       "domain_ids[2] = 2: must be in [0, 2)"},
      {[&](Controller& c) { c.record(0, {.experts = experts, .top_values = top}); },
       "top_values[3] = nan: must be finite, largest first, at most 2^24 apart"},
      {[&](Controller& c) {
         c.record(0, {.experts = experts, .top_values = good_top, .biased_scores = scores});
       },
       "biased_scores[7] = inf: must be a number below infinity"},
      {[&](Controller& c) { c.record(0, {.experts = experts, .probabilities = probabilities}); },
       "probabilities[4] = -0.5: must be finite and at least 0"},
      {[&](Controller& c) { c.record(0, {.experts = experts, .probabilities = zero}); },
       "probabilities[3] = 0: one of the token's must be above 0"},
      {[&](Controller& c) { c.record(0, {.experts = experts, .dropped = -2}); },
       "dropped = -2: must be at least 0"},
      {[&](Controller& c) {
         record_counts(c, 0, {4, -5, 2});
       },
       "counts[1] = -5: must be at least 0"},
      {[&](Controller& c) {
         c.record_with(0, [](RoutingStats& s) { s.add_grad_norms(std::vector<double>{1, 2, kNaN}); });
       },
       "grad_norms[2] = nan: must be from 0 to 2^24"},
      {[&](Controller& c) {
         c.record_with(0, [](RoutingStats& s) { s.add_latencies(std::vector<double>{1, -1, 1}); });
       },
       "latencies[1] = -1: must be from 0 to 2^24"},
      {[&](Controller& c) {
         c.record_with(0,
                       [&](RoutingStats& s) { s.add_token_losses({.experts = experts, .losses = losses}); });
       },
       "losses[2] = nan: must be a number of magnitude at most 2^24"},
  };
  for (const auto& [record, words] : cases) {
    Controller controller(config);
    record(controller);
    const StepReport& report = controller.step();
    EXPECT_TRUE(reasons_of(report).has(Reason::kInvalid)) << words;
    EXPECT_THAT(notices_of(report), ElementsAre("invalid@0: " + words));
  }
}

TEST(FieldCases, A5_TheLearnedBiasesStayThroughAnyNumberOfBadSteps) {
  for (const Fallback fallback : {Fallback::kHold, Fallback::kInitial}) {
    ControllerConfig config = config_of("sign_bias");
    if (fallback == Fallback::kInitial) config.safety.fallback = fallback;
    Controller controller(config);
    for (int i = 0; i < 20; ++i) {
      record_counts(controller, 0, {8, 4, 2, 2});
      controller.step();
    }
    const std::vector<double> learned = bias_of(controller);
    int raised = 0;
    for (int i = 0; i < 120; ++i) {
      record_counts(controller, 0, {-1, 0, 0, 0});
      for (const std::string& notice : notices_of(controller.step())) {
        if (notice.rfind("fallback@0", 0) != 0) continue;
        ++raised;
        EXPECT_EQ(i, 49);
        EXPECT_THAT(notice, HasSubstr("safety.fallback_after"));
      }
      EXPECT_EQ(reasons_of(controller.report()).has(Reason::kFallback),
                fallback == Fallback::kInitial && i >= 49);
    }
    EXPECT_EQ(raised, 1);
    if (fallback == Fallback::kHold) {
      EXPECT_THAT(bias_of(controller), ElementsAreArray(learned));
    } else {
      EXPECT_THAT(bias_of(controller), Each(0.0));
    }
  }
}

TEST(FieldCases, A5_FallbackIsAKeyOfTheConfig) {
  const std::string model = "version: 1\nmodel: {layers: 1, experts: 4, top_k: 1}\n";
  EXPECT_EQ(parse_config(model).safety.fallback, Fallback::kHold);
  EXPECT_EQ(parse_config(model + "safety: {fallback: initial}\n").safety.fallback, Fallback::kInitial);
  EXPECT_THROW(parse_config(model + "safety: {fallback: zero}\n"), ConfigError);
}

// ---- A6: records that cannot be what they say. ----

TEST(FieldCases, A6_TwoDifferentRecordsUnderOneMicroBatchAreAnErrorThatNamesBoth) {
  Controller controller(config_of("sign_bias", 4));
  const Indices first = {0, 1, 1, 2}, second = {0, 1, 1, 3}, swapped = {1, 0, 1, 2}, fewer = {0, 1, 1};
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0};
  controller.record(3, {.experts = first}, 7);
  controller.record(3, {.experts = first}, 7);  // recomputation
  for (const Indices& other : {second, swapped, fewer}) {
    try {
      controller.record(3, {.experts = other}, 7);
      ADD_FAILURE() << "taken for recomputation";
    } catch (const std::invalid_argument& error) {
      EXPECT_THAT(error.what(), HasSubstr("layer 3, micro_batch 7"));
    }
  }
  EXPECT_THROW(controller.record(3, {.experts = first, .mask = mask}, 7), std::invalid_argument);
  // Also where a checkpoint lies between the two.
  const std::string state = controller.save();
  Controller resumed(config_of("sign_bias", 4));
  resumed.load(state);
  resumed.record(3, {.experts = first}, 7);
  EXPECT_THROW(resumed.record(3, {.experts = second}, 7), std::invalid_argument);
  EXPECT_EQ(controller.step().layers[3].stats->tokens(), 4);
  EXPECT_EQ(resumed.step().layers[3].stats->tokens(), 4);
  controller.record(3, {.experts = second}, 7);  // the next step's
  EXPECT_EQ(controller.step().layers[3].stats->tokens(), 4);
}

TEST(FieldCases, A6_OneTensorOfAllLayersRecordedInEachIsNoticedOnce) {
  for (const bool whole : {true, false}) {
    Controller controller(config_of("sign_bias", 3, 8, 2));
    int said = 0;
    for (int step = 0; step < 30; ++step) {
      for (int layer = 0; layer < 3; ++layer) {
        Indices experts(3 * 32 * 2);
        for (std::size_t i = 0; i < experts.size(); ++i) {
          experts[i] = (static_cast<std::int64_t>(i * i) + step + (whole ? 0 : layer)) % 8;
        }
        controller.record(layer, {.experts = experts});
      }
      for (const std::string& notice : notices_of(controller.step())) {
        said += notice.rfind("config@-1", 0) == 0 && notice.find("[tokens, layers, k]") != std::string::npos;
      }
    }
    EXPECT_EQ(said, whole ? 1 : 0);
  }
}

// ---- A7: the config against what arrives. ----

std::vector<std::string> config_notices(Controller& controller, const std::vector<Indices>& counts,
                                        int steps = 40) {
  std::vector<std::string> all;
  for (int step = 0; step < steps; ++step) {
    for (std::size_t layer = 0; layer < counts.size(); ++layer) {
      if (!counts[layer].empty()) record_counts(controller, static_cast<int>(layer), counts[layer]);
    }
    for (const std::string& notice : notices_of(controller.step())) all.push_back(notice);
  }
  return all;
}

TEST(FieldCases, A7_TokensPerStepThatDoNotArriveAreSaidOnce) {
  ControllerConfig config = config_of("sign_bias");
  config.model.tokens_per_step = 100000;
  Controller controller(config);
  EXPECT_THAT(config_notices(controller, {{16, 16, 20, 12}}),
              ElementsAre(::testing::AllOf(HasSubstr("config@-1"), HasSubstr("tokens_per_step is 100000"),
                                           HasSubstr("64 tokens"))));
  config.model.tokens_per_step = 64;
  Controller right(config);
  EXPECT_THAT(config_notices(right, {{16, 16, 20, 12}}), IsEmpty());
}

TEST(FieldCases, A7_LayersAndExpertsThatAreNotThereAreSaidOnce) {
  Controller layers(config_of("sign_bias", 3));
  EXPECT_THAT(config_notices(layers, {{16, 16, 20, 12}, {16, 20, 16, 12}, {}}),
              ElementsAre(::testing::AllOf(HasSubstr("layer 2"), HasSubstr("model.layers is 3"))));
  Controller experts(config_of("fixed", 2, 8));
  const Indices four = {160, 160, 200, 120, 0, 0, 0, 0}, five = {160, 120, 100, 120, 40, 0, 0, 0};
  EXPECT_THAT(config_notices(experts, {four, five}),
              ElementsAre(::testing::AllOf(HasSubstr("expert from 5 on"), HasSubstr("model.experts is 8"))));
}

TEST(FieldCases, A7_SequencesThatNothingCollectsAreSaidOnce) {
  for (const bool collected : {false, true}) {
    ControllerConfig config = config_of("fixed");
    config.collect.sequences = collected;
    Controller controller(config);
    std::vector<std::string> all;
    for (int step = 0; step < 20; ++step) {
      const Indices experts = {0, 1, 2, 3, 0, 1, 2, 3};
      controller.record(0, {.experts = experts, .sequence_length = 4});
      for (const std::string& notice : notices_of(controller.step())) all.push_back(notice);
    }
    if (collected) {
      EXPECT_THAT(all, IsEmpty());
    } else {
      EXPECT_THAT(all, ElementsAre(HasSubstr("collect: {sequences: true}")));
    }
  }
}

// The scores of a token are what its largest values hold beyond the biases.
TEST(FieldCases, A7_ScoresThatAreNoProbabilitiesAreSaidOnce) {
  struct Case {
    ScoreSpace space;
    float largest;  // of the values
    double bias;    // of the expert that has it
    bool said;
  };
  for (const Case& c :
       {Case{ScoreSpace::kProbability, 0.9F, 0, false}, Case{ScoreSpace::kProbability, 1.004F, 0, false},
        Case{ScoreSpace::kProbability, 2.5F, 0, true}, Case{ScoreSpace::kLogit, 2.5F, 0, false},
        Case{ScoreSpace::kProbability, 1.3F, 0.5, false}, Case{ScoreSpace::kProbability, 1.3F, -0.5, true},
        Case{ScoreSpace::kProbability, 0.2F, 0.5, true}}) {
    SCOPED_TRACE(c.largest);
    ControllerConfig config = config_of("fixed", 1, 4, 1);
    config.model.score_space = c.space;
    Controller controller(config);
    controller.adopt(0, std::vector<double>{c.bias, 0, 0, -c.bias});
    std::vector<std::string> all;
    for (int step = 0; step < 5; ++step) {
      const Indices experts = {0, 1, 2, 3, 1, 2, 3, 0};
      std::vector<float> values(16);
      for (std::size_t t = 0; t < 8; ++t) {
        const double bias = controller.bias(0)[static_cast<std::size_t>(experts[t])];
        values[2 * t] = experts[t] == 0 ? c.largest : static_cast<float>(0.8 + bias);
        values[2 * t + 1] = values[2 * t] - 0.1F;
      }
      controller.record(0, {.experts = experts, .top_values = values});
      for (const std::string& notice : notices_of(controller.step())) all.push_back(notice);
    }
    if (c.said) {
      EXPECT_THAT(all, ElementsAre(::testing::AllOf(HasSubstr("config@0"), HasSubstr("score_space: logit"))));
    } else {
      EXPECT_THAT(all, IsEmpty());
    }
  }
}

// A chosen expert that was masked, a token that does not count, an empty slot: their values say nothing.
TEST(FieldCases, A7_ValuesOfWhatWasNotChosenAreNotLookedAt) {
  Controller controller(config_of("fixed", 1, 4, 2));
  const Indices experts = {0, 1, 2, 3, 1, -1, 0, 2};
  const std::vector<std::uint8_t> mask = {1, 0, 1, 1};
  const std::vector<float> values = {.9F, -1e9F, -1e9F, 7, 6, 5, .9F, -7, -8, .9F, .8F, .7F};
  controller.record(0, {.experts = experts, .mask = mask, .top_values = values});
  EXPECT_THAT(notices_of(controller.step()), IsEmpty());
}

// Where a sample of choices shows what is wrong with the wiring, that is said, and not that the scores may be logits.
TEST(FieldCases, A7_WhatTheWiringExplainsIsNotSaidOfTheScores) {
  for (const bool added : {true, false}) {
    Controller controller(config_of("fixed", 1, 4, 1));
    controller.adopt(0, std::vector<double>{2, 0, 0, -2});
    std::string all;
    for (int step = 0; step < 5; ++step) {
      std::vector<float> scores = {.1F, .2F, .3F, .4F}, biased = scores;
      const Indices chosen = {added ? 0 : 3};
      for (std::size_t i = 0; i < 4 && added; ++i) biased[i] += static_cast<float>(controller.bias(0)[i]);
      const std::vector<float> largest = {added ? 2.1F : .4F, .3F};
      controller.record(0, {.experts = chosen, .top_values = largest});
      controller.check_choices(0, {.experts = chosen, .biased_scores = biased, .scores = scores});
      for (const std::string& notice : notices_of(controller.step())) all += notice + '\n';
    }
    EXPECT_THAT(all, ::testing::Not(HasSubstr("config@")));
    EXPECT_EQ(all.find("does not add the bias") == std::string::npos, added) << all;
  }
}

// ---- Policies, callbacks and plug-ins that throw. ----

enum class Fault { kNone, kPropose, kTold, kNumber, kNull };

/// A policy that raises expert 0, and throws where and when `fault` says.
struct Nudge : Policy {
  Nudge(const Fault* fault, int layer) : fault(fault), layer(layer) {}
  void propose(const LayerView&, std::span<double> value) override {
    value[0] += 0.1;
    if (layer != 0) return;
    if (*fault == Fault::kPropose) throw std::runtime_error("no memory for \xff my matrix");
    if (*fault == Fault::kNumber) throw 7;
  }
  void on_applied(std::span<const double>, const LimitReport&) override {
    if (layer == 0 && *fault == Fault::kTold) throw std::runtime_error("told too much");
  }
  const Fault* fault;
  int layer;
};

PolicyRegistry registry_of(const Fault* fault) {
  return registry_with(
      "nudge", Actuator::kExpertBias,
      [fault](const PolicyContext& context, const PolicyOptions&) -> std::unique_ptr<Policy> {
        if (*fault == Fault::kNull) return nullptr;
        return std::make_unique<Nudge>(fault, context.layer);
      });
}

ControllerConfig nudge_config(int layers = 2) {
  ControllerConfig config = config_of("nudge", layers);
  config.expert_bias.limits.center = false;
  return config;
}

TEST(LooseEnds, APolicyThatThrowsIsHeldAndTheStepIsComplete) {
  for (const Fault kind : {Fault::kPropose, Fault::kNumber}) {
    Fault fault = Fault::kNone;
    const PolicyRegistry registry = registry_of(&fault);
    Controller controller(nudge_config(), registry);
    const auto step = [&] {
      for (int layer = 0; layer < 2; ++layer) record_counts(controller, layer, {16, 16, 20, 12});
      return notices_of(controller.step());
    };
    step();
    fault = kind;
    const std::vector<std::string> notices = step();
    ASSERT_EQ(notices.size(), 1U);
    EXPECT_THAT(notices[0], HasSubstr("policy_failed@0: expert_bias: policy nudge threw: "));
    EXPECT_THAT(notices[0],
                HasSubstr(kind == Fault::kNumber ? "not a std::exception" : "no memory for ? my matrix"));
    EXPECT_TRUE(reasons_of(controller.report(), 0).has(Reason::kPolicyFailed));
    EXPECT_TRUE(reasons_of(controller.report(), 0).held());
    EXPECT_TRUE(reasons_of(controller.report(), 1).empty());
    EXPECT_EQ(controller.bias(0)[0], 0.1);
    EXPECT_EQ(controller.bias(1)[0], 0.2);  // all else is committed
    EXPECT_EQ(controller.steps(), 2);
    EXPECT_EQ(controller.report().layers[0].stats->tokens(), 64);
    EXPECT_THAT(step(), IsEmpty());  // said once
    fault = Fault::kNone;
    step();
    EXPECT_EQ(controller.bias(0)[0], 0.2);
    EXPECT_EQ(controller.bias(1)[0], 0.4);
  }
}

// What the policy owes is owed after loading a state as well.
TEST(LooseEnds, APolicyThatThrowsWhenItIsToldIsHeldAtTheNextDecision) {
  for (const std::string_view loaded : {"no", "everything", "what fits", "by layer"}) {
    Fault fault = Fault::kNone;
    const PolicyRegistry registry = registry_of(&fault);
    Controller controller(nudge_config(), registry);
    const auto step = [&] {
      for (int layer = 0; layer < 2; ++layer) record_counts(controller, layer, {16, 16, 20, 12});
      return notices_of(controller.step());
    };
    fault = Fault::kTold;
    EXPECT_THAT(step(), ElementsAre(HasSubstr("told too much")));
    EXPECT_EQ(controller.bias(0)[0], 0.1);
    EXPECT_EQ(controller.bias(1)[0], 0.1);
    fault = Fault::kNone;
    if (loaded == "everything") controller.load(controller.save());
    if (loaded == "what fits") controller.load(controller.save(), Keep::what_fits);
    if (loaded == "by layer") controller.load_layer(0, controller.save_layer(0));
    step();
    EXPECT_TRUE(reasons_of(controller.report(), 0).has(Reason::kPolicyFailed)) << loaded;
    EXPECT_EQ(controller.bias(0)[0], 0.1) << loaded;
    EXPECT_EQ(controller.bias(1)[0], 0.2);
    step();
    EXPECT_EQ(controller.bias(0)[0], 0.2);
  }
}

TEST(LooseEnds, AFactoryThatReturnsNothingIsAnErrorThatNamesThePolicy) {
  Fault fault = Fault::kNull;
  const PolicyRegistry registry = registry_of(&fault);
  try {
    Controller controller(nudge_config(), registry);
    FAIL();
  } catch (const std::exception& error) {
    EXPECT_THAT(error.what(), HasSubstr("nudge: made no policy"));
  }
}

TEST(LooseEnds, ALogCallbackThatThrowsIsReportedOnceAndTheStepIsComplete) {
  Controller controller(config_of("sign_bias"));
  int calls = 0;
  controller.set_log([&](const StepReport&) {
    if (++calls % 2 == 1) throw std::runtime_error("disk is gone");
    throw 7;
  });
  for (int i = 0; i < 3; ++i) {
    record_counts(controller, 0, {8, 4, 2, 2});
    const std::vector<std::string> notices = notices_of(controller.step());
    if (i == 0) {
      EXPECT_THAT(notices, ElementsAre(HasSubstr("log@-1: the log callback threw: disk is gone")));
    } else {
      EXPECT_THAT(notices, IsEmpty());
    }
    EXPECT_EQ(controller.steps(), i + 1);
  }
  EXPECT_EQ(calls, 3);
  EXPECT_LT(controller.bias(0)[0], 0);
}

TEST(LooseEnds, AFailureOnOneRankTravelsAndAllRanksHoldTheSameValues) {
  for (const int lag : {0, 1}) {
    for (const Fault kind : {Fault::kPropose, Fault::kTold}) {
      constexpr int kRanks = 3, kFails = 10;
      Ranks ranks(kRanks);
      std::vector<std::vector<std::vector<double>>> in_force(kRanks);  // [rank][step]
      std::vector<std::vector<std::string>> notices(kRanks);
      std::vector<int> held(kRanks, 0);
      std::vector<std::thread> threads;
      for (int rank = 0; rank < kRanks; ++rank) {
        threads.emplace_back([&, rank] {
          const auto r = static_cast<std::size_t>(rank);
          Fault fault = Fault::kNone;
          const PolicyRegistry registry = registry_of(&fault);
          ControllerConfig config = nudge_config();
          config.lag = lag;
          Controller controller(config, registry);
          controller.set_reduction(ranks.reduction());
          for (int step = 0; step < 20; ++step) {
            for (int layer = 0; layer < 2; ++layer) record_counts(controller, layer, {16, 16, 20, 12});
            fault = rank == 1 && step == kFails ? kind : Fault::kNone;
            for (const std::string& notice : notices_of(controller.step())) notices[r].push_back(notice);
            in_force[r].push_back(bias_of(controller));
            held[r] += reasons_of(controller.report(), 1).has(Reason::kPolicyFailed);
          }
        });
      }
      for (std::thread& thread : threads) thread.join();
      const std::vector<double> before = in_force[0][kFails - 1];
      for (std::size_t r = 0; r < kRanks; ++r) {
        ASSERT_EQ(in_force[r].size(), 20U) << "lag " << lag << ", rank " << r;
        for (std::size_t step = kFails + 1 + static_cast<std::size_t>(lag); step < 20; ++step) {
          EXPECT_EQ(in_force[r][step], before) << "lag " << lag << ", rank " << r << ", step " << step;
        }
        EXPECT_EQ(held[r], 20 - kFails - 1 - lag);
        EXPECT_THAT(notices[r],
                    ::testing::Contains(HasSubstr("policy_failed@-1: a policy failed on some of the")));
      }
      EXPECT_THAT(notices[1],
                  ::testing::Contains(HasSubstr("policy_failed@0: expert_bias: policy nudge threw")));
    }
  }
}

// The mean of adopted biases leaves at the first decision. Where that decision is taken back, all ranks must still hold the
// same, and the differences that were adopted.
TEST(LooseEnds, AFailureAmongTheFirstDecisionsAfterAdoptingKeepsWhatWasAdopted) {
  for (const int lag : {0, 1}) {
    for (const int fails : {lag, lag + 1, lag + 2}) {  // with lag, the first step decides nothing
      SCOPED_TRACE("lag " + std::to_string(lag) + ", fails at " + std::to_string(fails));
      constexpr int kRanks = 2;
      Ranks ranks(kRanks);
      std::vector<std::vector<std::vector<double>>> in_force(kRanks);  // [rank][step]
      std::vector<std::thread> threads;
      for (int rank = 0; rank < kRanks; ++rank) {
        threads.emplace_back([&, rank] {
          const auto r = static_cast<std::size_t>(rank);
          Fault fault = Fault::kNone;
          const PolicyRegistry registry = registry_of(&fault);
          ControllerConfig config = nudge_config();
          config.lag = lag;
          config.expert_bias.limits.center = true;
          config.expert_bias.limits.rate = 0.25;
          Controller controller(config, registry);
          controller.set_reduction(ranks.reduction());
          for (int layer = 0; layer < 2; ++layer)
            controller.adopt(layer, std::vector<double>{3, 3.5, 4, 5.5});
          in_force[r].push_back(bias_of(controller));
          for (int step = 0; step < 10; ++step) {
            for (int layer = 0; layer < 2; ++layer) record_counts(controller, layer, {16, 16, 20, 12});
            fault = rank == 1 && step == fails ? Fault::kPropose : Fault::kNone;
            controller.step();
            in_force[r].push_back(bias_of(controller));
          }
          // Once all have loaded one state, the mean leaves at the next decision, whatever the rate.
          if (rank != 0) return;
          config.lag = 0;
          Controller next(config, registry);
          next.load(controller.save(), Keep::what_fits);
          EXPECT_EQ(bias_of(next), in_force[0].back());
          for (int layer = 0; layer < 2; ++layer) record_counts(next, layer, {16, 16, 20, 12});
          next.step();
          const std::vector<double> now = bias_of(next), before = in_force[0].back();
          EXPECT_NEAR(now[0] + now[1] + now[2] + now[3], 0, 1e-12);
          EXPECT_NEAR(now[3] - now[1], before[3] - before[1], 1e-12);
        });
      }
      for (std::thread& thread : threads) thread.join();
      for (std::size_t step = static_cast<std::size_t>(fails + 2 + lag); step < in_force[0].size(); ++step) {
        EXPECT_EQ(in_force[0][step], in_force[1][step]) << step;
        const std::vector<double>& now = in_force[0][step];
        const std::vector<double>& before = in_force[0][static_cast<std::size_t>(fails)];
        for (std::size_t i = 0; i < now.size(); ++i)
          EXPECT_NEAR(now[i] - now[0], before[i] - before[0], 1e-12) << step << ' ' << i;
      }
    }
  }
}

TEST(LooseEnds, AFailureOnEveryRankIsHeldForThatStepAlone) {
  constexpr int kRanks = 2;
  Ranks ranks(kRanks);
  std::vector<double> last(kRanks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    threads.emplace_back([&, rank] {
      Fault fault = Fault::kNone;
      const PolicyRegistry registry = registry_of(&fault);
      ControllerConfig config = nudge_config();
      config.safety.responsiveness = false;  // the loads below stay the same whatever the biases are
      Controller controller(config, registry);
      controller.set_reduction(ranks.reduction());
      for (int step = 0; step < 10; ++step) {
        for (int layer = 0; layer < 2; ++layer) record_counts(controller, layer, {16, 16, 20, 12});
        fault = step == 4 ? Fault::kPropose : Fault::kNone;
        controller.step();
      }
      last[static_cast<std::size_t>(rank)] = controller.bias(0)[0];
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(last, Each(::testing::DoubleNear(0.9, 1e-12)));
}

TEST(LooseEnds, AReductionThatThrowsAnythingLeavesAllSums) {
  for (const int lag : {0, 1}) {
    ControllerConfig config = config_of("sign_bias");
    config.lag = lag;
    Controller controller(config);
    bool broken = false;
    controller.set_reduction([&](std::span<std::int64_t>) {
      if (broken) throw 7;
    });
    controller.step();
    record_counts(controller, 0, {8, 4, 2, 2});
    broken = true;
    EXPECT_THROW(controller.step(), ReductionError);
    broken = false;
    EXPECT_EQ(controller.steps(), 1);
    controller.step();
    if (lag == 1) controller.step();
    EXPECT_EQ(controller.report().layers[0].stats->tokens(), 16);
  }
}

// ---- Recording is all or nothing. ----

TEST(LooseEnds, ARecordThatThrowsHasAddedNothingAndCountsOnceOnRetry) {
  Controller controller(config_of("sign_bias"));
  const Indices counts = {8, 4, 2, 2};
  const auto add = [&](bool fails) {
    controller.record_with(
        0,
        [&](RoutingStats& sums) {
          sums.add_counts(counts, 16);
          if (fails) throw std::bad_alloc();
          sums.add_counts(counts, 16);
        },
        3);
  };
  EXPECT_THROW(add(true), std::bad_alloc);
  add(false);
  add(false);  // recomputation
  EXPECT_EQ(controller.step().layers[0].stats->tokens(), 32);
}

TEST(LooseEnds, AMicroBatchIsCountedOnceWhateverAllocationFails) {
  const Indices experts = {0, 1, 1, 2};
  int failures = 0;
  for (int micro_batches = 0; micro_batches < 40; ++micro_batches) {
    for (int nth = 1; nth <= 3; ++nth) {
      Controller controller(config_of("sign_bias"));
      for (int m = 0; m < micro_batches; ++m) controller.record(0, {.experts = experts}, m);
      try {
        const ::moectl::testing::FailingAllocation failing(nth);
        controller.record(0, {.experts = experts}, micro_batches);
      } catch (const std::bad_alloc&) {
        ++failures;
        controller.record(0, {.experts = experts}, micro_batches);
      }
      EXPECT_EQ(controller.step().layers[0].stats->tokens(), 4 * (micro_batches + 1));
    }
  }
  EXPECT_GT(failures, 5);
}

// ---- lag: 1 with quantiles. ----

TEST(LooseEnds, QuantilesWithLagSaveAndLoad) {
  const std::map<std::string, OptionValue> histogram, k3 = {{"form", std::string("k3")}, {"gain", 1.0}},
                                                      local = {{"form", std::string("local_mean")}};
  for (const auto& [lag, cadence, options] :
       {std::tuple{0, 4, histogram}, {1, 4, histogram}, {1, 1, k3}, {1, 4, local}}) {
    SimulationOptions plant;
    plant.biased_scores = true;
    ControllerConfig own = config_for(plant, "quantile_bias", options);
    own.lag = lag;
    own.expert_bias.limits.cadence = cadence;
    Controller controller(own);
    SimulatedRouter router(plant);
    for (int step = 0; step < 20; ++step) {
      controller.record(0, router.route(controller.bias(0)));
      if (step % 3 == 0) controller.record(0, RoutingStats(controller.shape(0)));
      controller.step();
      Controller resumed(own);
      EXPECT_NO_THROW(resumed.load(controller.save())) << "lag " << lag << ", " << step;
    }
    EXPECT_THAT(bias_of(controller), ::testing::Contains(::testing::Gt(0.0)));
  }
}

// ---- Overflow. ----

std::vector<float> all_equal(std::size_t tokens, double value) {
  return std::vector<float>(tokens, static_cast<float>(value));
}

TEST(LooseEnds, AnOverflowedWindowIsDroppedAndTheNextOneDecides) {
  ControllerConfig config = config_of("sign_bias");
  config.collect.losses = true;
  config.expert_bias.limits.cadence = 16;
  Controller controller(config);
  const Indices experts(8192, 0);
  std::vector<bool> invalid;
  for (int step = 0; step < 64; ++step) {
    controller.record(0, {.experts = experts});
    // 8192 times 6e6 fits; sixteen steps of it do not.
    const std::vector<float> losses = all_equal(experts.size(), step < 16 ? 6e6 : 3);
    controller.record_with(
        0, [&](RoutingStats& s) { s.add_token_losses({.experts = experts, .losses = losses}); });
    controller.step();
    if (step % 16 == 15) invalid.push_back(reasons_of(controller.report()).has(Reason::kInvalid));
    if (step == 20) {  // through a checkpoint
      Controller resumed(config);
      resumed.load(controller.save());
      controller = std::move(resumed);
    }
  }
  EXPECT_THAT(invalid, ElementsAre(true, false, false, false));
  EXPECT_LT(controller.bias(0)[0], 0);
}

TEST(LooseEnds, SumsOfEitherSignNeverWrapUnnoticed) {
  for (const double loss : {1.6e7, -1.6e7}) {
    for (const std::size_t tokens : {std::size_t{40000}, std::size_t{70000}, std::size_t{131072}}) {
      for (const int records : {1, 3, 8}) {
        RoutingStats sums({4, 1, {.losses = true, .domains = 0}});
        const Indices experts(tokens, 2);
        const std::vector<float> losses = all_equal(tokens, loss);
        const bool fits = std::abs(loss) * static_cast<double>(tokens) * records < std::ldexp(1.0, 38);
        ASSERT_FALSE(fits);
        for (int r = 0; r < records; ++r) sums.add_token_losses({.experts = experts, .losses = losses});
        EXPECT_FALSE(sums.valid()) << loss << ' ' << tokens << ' ' << records;
        EXPECT_THAT(std::string(sums.offence().words()), HasSubstr("beyond its range"));
      }
    }
  }
}

TEST(LooseEnds, SumsOfGapsNeverWrapUnnoticed) {
  RoutingStats sums({4, 1, {.gap = true}});
  // 2^16 tokens of 2^48 units: 2^64, which is 0 again.
  const Indices experts(65536, 0);
  std::vector<float> top;
  for (std::size_t t = 0; t < experts.size(); ++t) top.insert(top.end(), {16777216.0F, 0.0F});
  EXPECT_FALSE(sums.add({.experts = experts, .top_values = top}));
  EXPECT_FALSE(sums.valid());
}

TEST(LooseEnds, WindowsRememberThatASumWasBeyondItsRange) {
  RoutingStats window({4, 1, {.losses = true}});
  RoutingStats step({4, 1, {.losses = true}});
  step.add_counts(Indices{4, 0, 0, 0}, 4);
  step.mutable_array(RoutingStats::kExpertLossSum)[0] = (std::int64_t{1} << 62) - 1;
  for (int i = 0; i < 4; ++i) window += step;  // 2^64 - 4 wraps to -4
  EXPECT_EQ(window.array(RoutingStats::kExpertLossSum)[0], -4);
  EXPECT_FALSE(window.valid());
}

TEST(LooseEnds, SumsOverRanksNeverWrapUnnoticed) {
  for (const int ranks : {2, 3, 4, 8}) {
    for (const int lag : {0, 1}) {
      ControllerConfig config = config_of("sign_bias");
      config.collect.losses = true;
      config.lag = lag;
      Controller controller(config);
      controller.set_reduction([&](std::span<std::int64_t> payload) {
        for (std::int64_t& word : payload) {
          word =
              static_cast<std::int64_t>(static_cast<std::uint64_t>(word) * static_cast<std::uint64_t>(ranks));
        }
      });
      const auto step = [&](std::int64_t loss) -> const StepReport& {
        controller.record_with(0, [&](RoutingStats& sums) {
          sums.add_counts(Indices{8, 4, 2, 2}, 16);
          sums.mutable_array(RoutingStats::kExpertLossSum)[0] = loss;
        });
        controller.step();
        return lag == 0 ? controller.report() : controller.step();
      };
      EXPECT_TRUE(reasons_of(step(1 << 20)).empty());
      EXPECT_TRUE(reasons_of(step((std::int64_t{1} << 62) - 1)).has(Reason::kInvalid)) << ranks << ' ' << lag;
      EXPECT_TRUE(reasons_of(step(-(std::int64_t{1} << 61) - (std::int64_t{1} << 40))).has(Reason::kInvalid))
          << ranks << ' ' << lag;
    }
  }
}

// ---- Bytes that are not UTF-8. ----

TEST(LooseEnds, AConfigThatIsNotUtf8IsRefusedWithItsPlace) {
  const std::string before =
      "version: 1\nmodel: {layers: 1, experts: 4, top_k: 1, domains: [\"caf\xc3\xa9\", ";
  EXPECT_EQ(parse_config(before + "b]}\n").model.domains[0], "caf\xc3\xa9");
  for (const std::string& bad :
       {std::string("\xff"), std::string("\xc3("), std::string("\xe2\x82"), std::string("\xed\xa0\x80"),
        std::string("\xc0\xaf"), std::string("\xf5\x80\x80\x80")}) {
    try {
      parse_config(before + '"' + bad + "\"]}\n");
      ADD_FAILURE() << "taken for UTF-8";
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr("config:2:61: encoding: byte 0x"));
      EXPECT_THAT(error.what(), HasSubstr("must be UTF-8"));
    }
  }
  ControllerConfig config = config_of("sign_bias");
  config.model.domains = {"code", "pro\xffse"};
  EXPECT_THROW(Controller{config}, ConfigError);
}

// ---- Finite for every input whatsoever. ----

TEST(LooseEnds, LimitsBeyondWhatArithmeticHoldsAreRefused) {
  for (const double huge : {1e308, 1e100, 1e10}) {
    ControllerConfig config = config_of("adaptive_bias");
    config.guard.enabled = true;
    config.expert_bias.limits.rate = huge;
    EXPECT_THROW(Controller{config}, ConfigError) << huge;
    config = config_of("adaptive_bias");
    config.expert_bias.limits.min = -huge;
    EXPECT_THROW(Controller{config}, ConfigError) << huge;
    config = config_of("adaptive_bias");
    config.router_temperature.limits.rate = huge;
    EXPECT_THROW(Controller{config}, ConfigError) << huge;
    config = config_of("adaptive_bias");
    config.router_temperature.limits.min = 1 / huge;
    EXPECT_THROW(Controller{config}, ConfigError) << huge;
  }
}

TEST(LooseEnds, ExtremeProposalsInExtremeRangesKeepTheMeanAtZero) {
  std::uint64_t random = 1;
  const auto uniform = [&] {
    random = random * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<double>(random >> 11) * 0x1p-53;
  };
  struct Wild : Policy {
    explicit Wild(std::vector<double>* to) : to(to) {}
    void propose(const LayerView&, std::span<double> value) override {
      std::copy(to->begin(), to->end(), value.begin());
    }
    std::vector<double>* to;
  };
  std::vector<double> wild(64);
  PolicyRegistry registry;
  register_builtin_policies(registry);
  registry.add(
      {.name = "wild",
       .summary = "",
       .actuators = {Actuator::kExpertBias},
       .options = {},
       .make = [&](const PolicyContext&, const PolicyOptions&) { return std::make_unique<Wild>(&wild); },
       .check = {}});
  for (const double range : {1.0, 1e3, 1e6, 1e9}) {
    for (const double rate : {1e-6, 1e-2, 1.0, 1e9}) {
      ControllerConfig config = config_of("wild", 1, 64);
      config.expert_bias.limits = {.min = -range, .max = range, .rate = rate, .center = true};
      Controller controller(config, registry);
      for (int step = 0; step < 200; ++step) {
        const double scale = std::pow(10.0, 308 * uniform()), shift = step % 3 == 0 ? scale : 0;
        for (double& w : wild)
          w = shift + (step % 2 == 0 ? scale : std::min(scale, 1e3 * range)) * (2 * uniform() - 1);
        record_counts(controller, 0, Indices(64, 4));
        controller.step();
        double sum = 0, largest = 0;
        for (const double b : controller.bias(0)) {
          ASSERT_TRUE(std::isfinite(b) && std::abs(b) <= range);
          sum += b;
          largest = std::max(largest, std::abs(b));
        }
        ASSERT_LE(std::abs(sum / 64), 1e-12 * largest + 1e-15 * rate) << range << ' ' << rate << ' ' << step;
      }
    }
  }
}

}  // namespace
}  // namespace moectl
