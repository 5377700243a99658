// Whether the router chooses by its layer's bias, judged on a few tokens: each cause by its name.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "moectl/controller.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;

constexpr int kExperts = 8, kTopK = 2, kTokens = 64;

// A router of two layers that prefers low experts; `bias_of(layer)` is what it adds.
class Plant {
 public:
  explicit Plant(bool in_bfloat16 = false) : in_bfloat16_(in_bfloat16), controller_(config()) {}

  static ControllerConfig config() {
    ControllerConfig config;
    config.model = {.layers = 2, .experts = kExperts, .top_k = kTopK};
    config.expert_bias.policy = "sign_bias";
    config.expert_bias.options.set("step", 0.01);
    return config;
  }
  Controller& controller() { return controller_; }

  // The text of the notices of `steps` steps.
  std::vector<std::string> run(int steps, const std::function<std::vector<double>(int layer)>& bias_of,
                               bool with_scores = true, bool replayed = false, bool grouped = false) {
    std::vector<std::string> notices;
    for (int step = 0; step < steps; ++step) {
      for (int layer = 0; layer < 2; ++layer) route(layer, bias_of(layer), with_scores, replayed, grouped);
      for (const Notice& notice : controller_.step().notices) {
        if (notice.kind != NoticeKind::kWiring) continue;
        notices.push_back("layer " + std::to_string(notice.layer) + ": " + std::string(notice.text));
      }
    }
    return notices;
  }
  std::vector<double> in_force(int layer, double factor = 1) const {
    std::vector<double> bias(controller_.bias(layer).begin(), controller_.bias(layer).end());
    for (double& b : bias) b *= factor;
    return bias;
  }

 private:
  float rounded(double x) const {
    const auto narrow = static_cast<float>(x);
    if (!in_bfloat16_) return narrow;
    const float unit = std::ldexp(1.0F, std::ilogb(narrow) - 7);
    return std::nearbyint(narrow / unit) * unit;
  }
  void route(int layer, const std::vector<double>& bias, bool with_scores, bool replayed, bool grouped) {
    std::uniform_real_distribution<double> uniform(0, 0.3);
    std::vector<float> scores, biased;
    std::vector<std::int64_t> chosen;
    for (int t = 0; t < kTokens; ++t) {
      std::vector<float> row;
      for (int i = 0; i < kExperts; ++i) {
        const int rank = (i + 3 * layer) % kExperts;  // the layers prefer different experts
        scores.push_back(rounded(0.3 + 0.04 * rank + uniform(random_)));
        row.push_back(rounded(static_cast<double>(scores.back()) + bias[static_cast<std::size_t>(i)]));
      }
      if (grouped) std::fill_n(row.begin() + (t % 2) * 4, 4, -std::numeric_limits<float>::infinity());
      biased.insert(biased.end(), row.begin(), row.end());
      std::vector<std::int64_t> order(kExperts);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
        return row[static_cast<std::size_t>(a)] > row[static_cast<std::size_t>(b)];
      });
      for (int j = 0; j < kTopK; ++j)
        chosen.push_back(replayed ? (t + j) % kExperts : order[static_cast<std::size_t>(j)]);
    }
    controller_.record(layer, {.experts = chosen});
    const std::size_t n = 4 * kExperts;
    controller_.check_choices(layer,
                              {.experts = std::span(chosen).first(4 * kTopK),
                               .biased_scores = std::span(biased).first(n),
                               .scores = with_scores ? std::span(scores).first(n) : std::span<float>()});
  }

  bool in_bfloat16_;
  Controller controller_;
  std::mt19937 random_{1};
};

TEST(FieldCases, A1_ARouterThatAddsTheBiasIsNeverBlamed) {
  for (const bool in_bfloat16 : {false, true}) {
    for (const bool grouped : {false, true}) {
      Plant plant(in_bfloat16);
      EXPECT_TRUE(plant
                      .run(
                          200, [&](int l) { return plant.in_force(l); }, true, false, grouped)
                      .empty())
          << in_bfloat16 << grouped;
      EXPECT_GT(*std::max_element(plant.controller().bias(0).begin(), plant.controller().bias(0).end()),
                0.02);
    }
  }
}

TEST(FieldCases, A1_ACommonShiftOfTheBiasIsNoFault) {
  Plant plant;
  const auto shifted = [&](int layer) {
    std::vector<double> bias = plant.in_force(layer);
    for (double& b : bias) b += 3;
    return bias;
  };
  EXPECT_TRUE(plant.run(50, shifted).empty());
}

void expect_said(const std::vector<std::string>& notices, const std::string& first,
                 const std::string& second) {
  ASSERT_EQ(notices.size(), 2U);
  EXPECT_THAT(notices[0], HasSubstr(first));
  EXPECT_THAT(notices[1], HasSubstr(second));
}

TEST(FieldCases, A1_ABiasThatIsNotAddedIsNamed) {
  for (const bool in_bfloat16 : {false, true}) {
    Plant plant(in_bfloat16);
    expect_said(plant.run(20, [](int) { return std::vector<double>(kExperts); }),
                "layer 0: the router does not add the bias", "layer 1: the router does not add the bias");
  }
}

TEST(FieldCases, A1_AWrongSignIsNamed) {
  Plant plant;
  expect_said(plant.run(20, [&](int l) { return plant.in_force(l, -1); }),
              "layer 0: the router subtracts the bias", "layer 1: the router subtracts the bias");
}

TEST(FieldCases, A1_AnotherLayersBiasIsNamed) {
  Plant plant;
  expect_said(plant.run(8, [&](int l) { return plant.in_force(1 - l); }),
              "layer 0: the router adds the bias of layer 1", "layer 1: the router adds the bias of layer 0");
}

TEST(FieldCases, A1_AStaleCopyOfTheBiasIsNamed) {
  Plant plant;
  plant.run(5, [&](int l) { return plant.in_force(l); });
  const std::vector<double> copy[] = {plant.in_force(0, 0.4), plant.in_force(1, 0.4)};
  expect_said(plant.run(8, [&](int l) { return copy[l]; }), "something else than the bias in force",
              "something else than the bias in force");
}

TEST(FieldCases, A1_ReplayedRoutesAreNamed) {
  for (const bool with_scores : {false, true}) {
    Plant plant;
    expect_said(plant.run(
                    20, [&](int l) { return plant.in_force(l); }, with_scores, true),
                "replayed or masked routes", "replayed or masked routes");
  }
}

TEST(FieldCases, A1_AFaultThatWasMendedIsForgotten) {
  Plant plant;
  const auto none = [](int) { return std::vector<double>(kExperts); };
  EXPECT_EQ(plant.run(10, none).size(), 2U);
  EXPECT_TRUE(plant.run(10, [&](int l) { return plant.in_force(l); }).empty());
  EXPECT_EQ(plant.run(10, none).size(), 2U);
}

// Named at the third step; from then on the biases stand where they began, but for test moves just large enough to be seen
// in the scores, which show whether the fault was mended.
TEST(FieldCases, A1_ALayerWhoseRouterUsesAnotherBiasIsHeldUntilItIsMended) {
  using Use = std::function<std::vector<double>(Plant&, int)>;
  const Use wrong[] = {[](Plant& plant, int l) { return plant.in_force(1 - l); },
                       [](Plant& plant, int l) { return plant.in_force(l, -1); },
                       [](Plant&, int) { return std::vector<double>(kExperts); }};
  for (const Use& use : wrong) {
    Plant plant;
    EXPECT_EQ(plant.run(6, [&](int l) { return use(plant, l); }).size(), 2U);
    const std::vector<double> start(kExperts);
    double largest = 0;
    for (int step = 0; step < 60; ++step) {
      plant.run(1, [&](int l) { return use(plant, l); });
      for (const LayerReport& layer : plant.controller().report().layers) {
        const bool probes = layer.actuators[0].reasons.has(Reason::kProbe);
        for (const double bias : plant.in_force(layer.layer)) largest = std::max(largest, std::abs(bias));
        EXPECT_TRUE(probes || plant.in_force(layer.layer) == start) << step;
        ASSERT_TRUE(layer.actuators[0].reasons.has(Reason::kUnresponsive)) << step;
      }
    }
    EXPECT_GT(largest, 0.005);
    EXPECT_LT(largest, 0.07);  // 6 % of the mean load, at the slope that is assumed here
    for (const LayerReport& layer : plant.controller().report().layers) {
      EXPECT_TRUE(layer.actuators[0].reasons.has(Reason::kUnresponsive));
      EXPECT_EQ(layer.responsiveness.state, Response::kUnresponsive);
    }
    // The first probe after it is mended says so.
    plant.run(20, [&](int l) { return plant.in_force(l); });
    EXPECT_NE(plant.in_force(0), start);
    EXPECT_FALSE(plant.controller().report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive));
  }
}

// The bias is left out in every second step, or in two of five: still named and held, and let go five good steps later.
TEST(ChoiceCheck, AFaultOfSomeStepsIsNamedAndHeld) {
  for (const int period : {2, 5}) {
    Plant plant;
    std::vector<std::string> notices;
    const auto run = [&](int steps, bool mended) {
      for (int step = 0; step < steps; ++step) {
        const bool wrong = !mended && step % period < (period == 2 ? 1 : 2);
        const auto more =
            plant.run(1, [&](int l) { return wrong ? std::vector<double>(kExperts) : plant.in_force(l); });
        notices.insert(notices.end(), more.begin(), more.end());
      }
    };
    const auto held = [&] {
      return plant.controller().report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive);
    };
    run(20, false);
    expect_said(notices, "layer 0: the router does not add the bias",
                "layer 1: the router does not add the bias");
    EXPECT_TRUE(held()) << period;
    run(12, true);
    EXPECT_FALSE(held()) << period;
  }
}

// One of two micro-batches leaves the bias out: no hold without a word.
TEST(ChoiceCheck, AFaultOfSomeMicroBatchesIsNamedAndHeld) {
  Controller controller(Plant::config());
  const std::vector<std::int64_t> low = {0, 1}, all = {0, 1, 0, 2, 0, 3};
  std::string said;
  for (int step = 0; step < 10; ++step) {
    const std::vector<double> bias(controller.bias(0).begin(), controller.bias(0).end());
    std::vector<float> scores(kExperts), biased(kExperts);
    for (std::size_t i = 0; i < kExperts; ++i) {
      scores[i] = i < 2 ? 0.9F : 0.1F;  // chosen with the bias or without it
      biased[i] = scores[i] + static_cast<float>(bias[i]);
    }
    for (int l = 0; l < 2; ++l) controller.record(l, {.experts = all});
    for (const std::span<const float> used : {std::span<const float>(scores), std::span<const float>(biased)})
      controller.check_choices(0, {.experts = low, .biased_scores = used, .scores = scores});
    for (const Notice& notice : controller.step().notices) said += std::string(notice.text) + '\n';
  }
  EXPECT_TRUE(controller.report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive));
  EXPECT_THAT(said, HasSubstr("the router does not add the bias"));
}

// The bias is left out in one step and subtracted in the next: one fault, which is told.
TEST(ChoiceCheck, AFaultThatChangesItsFaceIsTold) {
  Plant plant;
  std::vector<std::string> notices;
  for (int step = 0; step < 12; ++step) {
    const auto more = plant.run(1, [&](int l) { return plant.in_force(l, step % 2 == 0 ? 0 : -1); });
    notices.insert(notices.end(), more.begin(), more.end());
  }
  EXPECT_EQ(notices.size(), 2U);  // a layer each
  EXPECT_TRUE(plant.controller().report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive));
}

// A run that is resumed from a state in the middle of such a hold does what the run that went on does.
TEST(ChoiceCheck, AHoldGoesOnAfterLoading) {
  Plant plant;
  plant.run(4, [](int) { return std::vector<double>(kExperts); });
  Controller other(Plant::config());
  other.load(plant.controller().save());
  const std::vector<std::int64_t> chosen = {0, 1, 0, 2, 0, 3};
  for (int step = 0; step < 30; ++step) {
    for (Controller* each : {&plant.controller(), &other}) {
      for (int l = 0; l < 2; ++l) each->record(l, {.experts = chosen});
      each->step();
      const bool held = each->report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive);
      EXPECT_EQ(held, step < 24) << step;
    }
    ASSERT_EQ(other.save(), plant.controller().save()) << step;
  }
}

// The samples stop to come, as where the router no longer records its scores.
TEST(ChoiceCheck, AFaultThatIsNotHeardOfAgainHoldsNothing) {
  Plant plant;
  plant.run(10, [](int) { return std::vector<double>(kExperts); });
  ASSERT_TRUE(plant.controller().report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive));
  const std::vector<std::int64_t> chosen = {0, 1, 0, 2, 0, 3};
  for (int step = 0; step < 26; ++step) {
    for (int l = 0; l < 2; ++l) plant.controller().record(l, {.experts = chosen});
    plant.controller().step();
  }
  EXPECT_FALSE(plant.controller().report().layers[0].actuators[0].reasons.has(Reason::kUnresponsive));
}

TEST(ChoiceCheck, SizesThatDoNotFitAreRefused) {
  Plant plant;
  const std::vector<std::int64_t> chosen(2 * kTopK);
  const std::vector<float> scores(kExperts);
  EXPECT_THROW(plant.controller().check_choices(0, {.experts = chosen, .biased_scores = scores}),
               std::invalid_argument);
  EXPECT_THROW(plant.controller().check_choices(2, {}), std::invalid_argument);
}

}  // namespace
}  // namespace moectl
