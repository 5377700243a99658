// What comes from elsewhere: biases of another trainer, a state of another config, layers of another split, layers that
// differ. By the ids of tests/field_cases.md.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "moectl/bias_file.h"
#include "moectl/controller.h"
#include "moectl/simulation.h"
#include "temp_dir.h"
#include "test_policy.h"

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::Field;
using ::testing::HasSubstr;
using Biases = std::vector<double>;
using Fate = KeptPart::Fate;

Biases bias_of(const Controller& controller, int layer) {
  return {controller.bias(layer).begin(), controller.bias(layer).end()};
}

SimulationOptions plant_of(int layers = 1, int experts = 16, int top_k = 2) {
  SimulationOptions plant;
  plant.layers = layers;
  plant.experts = experts;
  plant.top_k = top_k;
  plant.score_space = ScoreSpace::kLogit;
  return plant;
}

ControllerConfig config_of(const std::string& policy, const SimulationOptions& plant) {
  ControllerConfig config;
  config.model.layers = plant.layers;
  config.model.experts = plant.experts;
  config.model.top_k = plant.top_k;
  config.model.score_space = plant.score_space;
  config.expert_bias.policy = policy;
  if (policy == "sign_bias") config.expert_bias.options.set("step", 1e-2);
  return config;
}

/// Trained routers, one a layer, which any controller can go on with.
class Model {
 public:
  explicit Model(const SimulationOptions& plant) {
    for (int l = 0; l < plant.layers; ++l) routers_.emplace_back(plant, l);
  }
  /// `steps` steps of these layers under the controller; the excess of MaxVio over its noise floor in each.
  std::vector<double> train(Controller& controller, int steps, const std::vector<int>& layers) {
    std::vector<double> ratios;
    for (int step = 0; step < steps; ++step) {
      for (const int layer : layers) {
        controller.record(layer, routers_[static_cast<std::size_t>(layer)].route(controller.bias(layer)));
      }
      double sum = 0;
      for (const LayerReport& layer : controller.step().layers) {
        sum += *layer.metrics->max_vio / *layer.metrics->noise_floor_max_vio;
      }
      ratios.push_back(sum / static_cast<double>(layers.size()));
    }
    return ratios;
  }

 private:
  std::vector<SimulatedRouter> routers_;
};

double mean_of(const std::vector<double>& values, std::size_t from, std::size_t to) {
  return std::accumulate(values.begin() + static_cast<std::ptrdiff_t>(from),
                         values.begin() + static_cast<std::ptrdiff_t>(to), 0.0) /
         static_cast<double>(to - from);
}

/// The standard error of the mean.
double error_of(const std::vector<double>& values, std::size_t from, std::size_t to) {
  const double mean = mean_of(values, from, to);
  double squares = 0;
  for (std::size_t i = from; i < to; ++i) squares += (values[i] - mean) * (values[i] - mean);
  const auto n = static_cast<double>(to - from);
  return std::sqrt(squares / (n - 1) / n);
}

// ---- B1: biases come in. ----

TEST(FieldCases, B1_AdoptedBiasesAreInForceAtOnceAndThePolicyGoesOnFromThem) {
  for (const std::uint64_t seed : {9101u, 9102u, 9103u, 9104u, 9105u}) {
    SimulationOptions plant = plant_of();
    plant.seed = seed;
    Model model(plant);
    Controller sign(config_of("sign_bias", plant));
    const std::vector<double> before = model.train(sign, 400, {0});

    Controller adaptive(config_of("adaptive_bias", plant));
    adaptive.adopt(0, bias_of(sign, 0));
    EXPECT_EQ(bias_of(adaptive, 0), bias_of(sign, 0));
    const std::vector<double> after = model.train(adaptive, 30, {0});
    EXPECT_LE(mean_of(after, 0, 10),
              mean_of(before, 390, 400) + 2 * std::hypot(error_of(before, 390, 400), error_of(after, 0, 10)))
        << "seed " << seed;
  }
}

TEST(FieldCases, B1_WithoutAdoptionTheSameSwitchLosesTheBalance) {
  Model model(plant_of());
  Controller sign(config_of("sign_bias", plant_of()));
  const double before = model.train(sign, 400, {0}).back();
  Controller adaptive(config_of("adaptive_bias", plant_of()));
  EXPECT_GT(model.train(adaptive, 1, {0}).front(), 3 * before);
}

TEST(FieldCases, B1_AdoptionRefusesWhatTheLimitsForbidAndNamesIt) {
  ControllerConfig config = config_of("adaptive_bias", plant_of(1, 4, 1));
  config.expert_bias.limits = {.min = -1, .max = 1, .rate = 1};
  Controller controller(config);
  const auto what_of = [&](const Biases& biases, int layer = 0) -> std::string {
    try {
      controller.adopt(layer, biases);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(what_of({0, 0, 1.5, 0}),
              AllOf(HasSubstr("expert_bias[2]"), HasSubstr("1.5"), HasSubstr("limits.max")));
  EXPECT_THAT(what_of({0, 0, std::nan(""), 0}), HasSubstr("expert_bias[2]"));
  EXPECT_THAT(what_of({0, 0}), HasSubstr("2 values: must be 4"));
  EXPECT_THAT(what_of({0, 0, 0, 0}, 7), HasSubstr("layer: 7"));
  EXPECT_EQ(bias_of(controller, 0), Biases(4, 0.0));
}

TEST(FieldCases, B1_TheNextDecisionTakesACommonShiftOutWhateverTheRate) {
  ControllerConfig config = config_of("fixed", plant_of(1, 4, 1));
  config.expert_bias.limits = {.min = -16, .max = 16, .rate = 0.01, .center = true};
  Controller controller(config);
  controller.adopt(0, Biases{7, 8, 9, 12});
  EXPECT_EQ(bias_of(controller, 0), (Biases{7, 8, 9, 12}));
  controller.record_with(0, [](RoutingStats& sums) {
    sums.add_counts(std::vector<std::int64_t>{10, 10, 10, 10}, 40);
  });
  controller.step();
  EXPECT_EQ(bias_of(controller, 0), (Biases{-2, -1, 0, 3}));
}

TEST(FieldCases, B1_ScalarsAreAdopted) {
  ControllerConfig config = config_of("fixed", plant_of());
  Controller controller(config);
  controller.adopt_temperature(0, 0.7);
  EXPECT_EQ(controller.temperature(0), 0.7);
}

TEST(FieldCases, B1_InitialIsAListOrAFile) {
  const std::string model = "version: 1\nmodel: {layers: 2, experts: 4, top_k: 1}\n";
  const Controller list(
      parse_config(model + "expert_bias: {policy: sign_bias, initial: [0.1, -0.1, 0, 0.25]}"));
  EXPECT_EQ(bias_of(list, 1), (Biases{0.1, -0.1, 0, 0.25}));

  const TempDir dir;
  const LayerBiases biases = {{0, {0.5, 0, 0, 0}}, {1, {0, 0.1, -1.0 / 3, 0}}};
  dir.write("b.json", biases_json(biases));
  const std::string path = dir.write("c.yaml", model + "expert_bias: {policy: sign_bias, initial: b.json}\n");
  const Controller from_file(load_config(path));
  EXPECT_EQ(bias_of(from_file, 0), biases.at(0));
  EXPECT_EQ(bias_of(from_file, 1), biases.at(1));
}

TEST(FieldCases, B1_AWrongListOrFileIsNamed) {
  const auto what_of = [](const std::string& initial) -> std::string {
    try {
      const Controller controller(
          parse_config("version: 1\nmodel: {layers: 2, experts: 4, top_k: 1}\n"
                       "expert_bias: {policy: sign_bias, initial: " +
                       initial + "}"));
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(what_of("[1, 2]"), AllOf(HasSubstr("expert_bias.initial: 2"), HasSubstr("4 experts")));
  EXPECT_THAT(what_of("[0, 0, 0, 17]"), AllOf(HasSubstr("expert_bias.initial[3]: 17"), HasSubstr("limits")));
  EXPECT_THAT(what_of("/nowhere/b.json"), AllOf(HasSubstr("/nowhere/b.json"), HasSubstr("cannot be opened")));
  EXPECT_THAT(what_of("0.1.2"), HasSubstr("must be a number"));
}

// ---- B2: a state of another config. ----

const KeptPart* find(const std::vector<KeptPart>& parts, int layer, const std::string& key) {
  const auto at = std::find_if(parts.begin(), parts.end(),
                               [&](const KeptPart& part) { return part.layer == layer && part.key == key; });
  return at == parts.end() ? nullptr : &*at;
}

/// A state after some training under `config`, and the biases in force.
struct Trained {
  std::string state;
  std::vector<Biases> biases;
};
Trained trained(const ControllerConfig& config, const SimulationOptions& plant, int steps = 60) {
  Controller controller(config);
  simulate(controller, plant, steps);
  Trained result{controller.save(), {}};
  for (const int layer : controller.layers()) result.biases.push_back(bias_of(controller, layer));
  return result;
}

TEST(FieldCases, B2_AppliedValuesSurviveEveryChangeOfTheConfig) {
  const SimulationOptions plant = plant_of(2);
  const ControllerConfig base = config_of("adaptive_bias", plant);
  const Trained saved = trained(base, plant);
  const std::map<std::string, std::function<void(ControllerConfig&)>> changes = {
      {"another policy", [](ControllerConfig& c) { c.expert_bias.policy = "proportional_bias"; }},
      {"an option", [](ControllerConfig& c) { c.expert_bias.options.set("form", std::string("counts")); }},
      {"the guard", [](ControllerConfig& c) { c.guard.enabled = true; }},
      {"lag", [](ControllerConfig& c) { c.lag = 1; }},
      {"ema", [](ControllerConfig& c) { c.monitor.ema = 0.5; }},
      {"the trend window", [](ControllerConfig& c) { c.monitor.trend_window = 17; }},
      {"a sum", [](ControllerConfig& c) { c.collect.sequences = true; }},
      {"bands",
       [](ControllerConfig& c) {
         c.monitor.health.bands["load_cv"] = {0, 1};
       }},
      {"cadence", [](ControllerConfig& c) { c.expert_bias.limits.cadence = 4; }},
      {"responsiveness", [](ControllerConfig& c) { c.safety.responsiveness = false; }},
      {"a weight that moves", [](ControllerConfig& c) {
         c.aux_loss_weight.policy = "pi";
         c.aux_loss_weight.initial = 1e-2;
         c.aux_loss_weight.limits = default_limits(Actuator::kAuxLossWeight, 1e-2);
       }}};
  for (const auto& [name, change] : changes) {
    ControllerConfig config = base;
    change(config);
    Controller controller(config);
    EXPECT_THROW(controller.load(saved.state), StateError) << name;
    const std::vector<KeptPart> parts = controller.load(saved.state, Keep::what_fits);
    EXPECT_EQ(controller.steps(), 60) << name;
    for (int layer : {0, 1}) {
      EXPECT_EQ(bias_of(controller, layer), saved.biases[static_cast<std::size_t>(layer)]) << name;
      ASSERT_NE(find(parts, layer, "expert_bias"), nullptr) << name;
      EXPECT_EQ(find(parts, layer, "expert_bias")->fate, Fate::kKept) << name;
    }
    simulate(controller, plant, 3);
  }
}

TEST(FieldCases, B2_AStateOfTheSameConfigKeepsAllAndGoesOnToTheBit) {
  SimulationOptions plant = plant_of(2);
  for (const int lag : {0, 1}) {
    ControllerConfig config = config_of("adaptive_bias", plant);
    config.guard.enabled = true;
    config.lag = lag;
    const Trained saved = trained(config, plant);
    Controller strict(config), fitting(config);
    strict.load(saved.state);
    for (const KeptPart& part : fitting.load(saved.state, Keep::what_fits)) {
      EXPECT_EQ(part.fate, Fate::kKept) << part.layer << ' ' << part.key << ": " << part.why;
    }
    EXPECT_TRUE(strict.save() == fitting.save());
    simulate(strict, plant, 20);
    simulate(fitting, plant, 20);
    EXPECT_TRUE(strict.save() == fitting.save());
  }
}

TEST(FieldCases, B2_WhatCannotBeKeptIsNamedInTheWordsOfTheConfig) {
  const SimulationOptions plant = plant_of(1);
  const ControllerConfig base = config_of("adaptive_bias", plant);
  const Trained saved = trained(base, plant);
  const auto part_after = [&](const std::function<void(ControllerConfig&)>& change, const std::string& key) {
    ControllerConfig config = base;
    change(config);
    Controller controller(config);
    const std::vector<KeptPart> parts = controller.load(saved.state, Keep::what_fits);
    const KeptPart* part = find(parts, 0, key);
    return part ? std::string(name_of(part->fate)) + ": " + part->why : "";
  };
  EXPECT_EQ(part_after([](ControllerConfig& c) { c.expert_bias.policy = "sign_bias"; }, "expert_bias.policy"),
            "dropped: adaptive_bias, now sign_bias: starts without memory");
  EXPECT_EQ(part_after([](ControllerConfig& c) { c.expert_bias.options.set("form", std::string("gap")); },
                       "expert_bias.policy"),
            "adapted: expert_bias.options.form: auto, now gap");
  EXPECT_EQ(part_after([](ControllerConfig& c) { c.monitor.trend_window = 17; }, "health"),
            "dropped: metrics.trend_window: 50, now 17");
  EXPECT_THAT(
      part_after([](ControllerConfig& c) { c.expert_bias.limits = {.min = -0.01, .max = 0.01, .rate = 1}; },
                 "expert_bias"),
      AllOf(HasSubstr("adapted"), HasSubstr("cut to limits.min, limits.max (-0.01 to 0.01)")));
}

TEST(FieldCases, B2_ALayerMoreOrLess) {
  const SimulationOptions plant = plant_of(2);
  const Trained saved = trained(config_of("adaptive_bias", plant), plant);
  Controller more(config_of("adaptive_bias", plant_of(3)));
  const auto parts = more.load(saved.state, Keep::what_fits);
  EXPECT_EQ(bias_of(more, 1), saved.biases[1]);
  ASSERT_NE(find(parts, 2, "layer"), nullptr);
  EXPECT_THAT(find(parts, 2, "layer")->why, HasSubstr("not in the state"));
  Controller fewer(config_of("adaptive_bias", plant_of(1)));
  const auto left = fewer.load(saved.state, Keep::what_fits);
  EXPECT_EQ(bias_of(fewer, 0), saved.biases[0]);
  EXPECT_THAT(find(left, 1, "layer")->why, HasSubstr("no such layer"));
}

TEST(FieldCases, B2_OtherExpertsCannotBeKept) {
  const SimulationOptions plant = plant_of(1);
  const Trained saved = trained(config_of("adaptive_bias", plant), plant);
  Controller other(config_of("adaptive_bias", plant_of(1, 8)));
  const auto parts = other.load(saved.state, Keep::what_fits);
  EXPECT_EQ(find(parts, 0, "expert_bias")->why, "16 values, now 8");
  EXPECT_EQ(bias_of(other, 0), Biases(8, 0.0));
}

TEST(FieldCases, B2_AnotherPipelineSplitLoadsByLayerIds) {
  SimulationOptions plant = plant_of(4);
  for (const int lag : {0, 1}) {
    ControllerConfig config = config_of("adaptive_bias", plant);
    config.guard.enabled = true;
    config.lag = lag;
    Controller whole(config);
    Model model(plant);
    model.train(whole, 50, {0, 1, 2, 3});
    Model twin = model;

    std::vector<Controller> stages;
    for (const int first : {0, 2}) {
      ControllerConfig stage = config;
      stage.model.layers = 0;
      stage.layers.resize(1);
      stage.layers[0].first = first;
      stage.layers[0].count = 2;
      stages.emplace_back(stage);
      for (const int layer : {first, first + 1}) stages.back().load_layer(layer, whole.save_layer(layer));
      EXPECT_EQ(stages.back().steps(), 50);
    }
    model.train(whole, 20, {0, 1, 2, 3});
    twin.train(stages[0], 20, {0, 1});
    twin.train(stages[1], 20, {2, 3});
    for (const int layer : {0, 1, 2, 3}) {
      EXPECT_EQ(bias_of(stages[static_cast<std::size_t>(layer / 2)], layer), bias_of(whole, layer))
          << lag << ' ' << layer;
    }
  }
}

TEST(FieldCases, B2_AStateOfALayerIsStrictUnlessToldOtherwise) {
  const SimulationOptions plant = plant_of(2);
  Controller from(config_of("adaptive_bias", plant)), to(config_of("sign_bias", plant));
  simulate(from, plant, 30);
  const std::string before = to.save();
  EXPECT_THROW(to.load_layer(0, from.save_layer(0)), StateError);
  EXPECT_THROW(to.load_layer(1, from.save_layer(0)), StateError);
  EXPECT_TRUE(to.save() == before);
  to.load_layer(0, from.save_layer(0), Keep::what_fits);
  EXPECT_EQ(bias_of(to, 0), bias_of(from, 0));
}

TEST(FieldCases, B2_WhatTheConfigFreezesIsFrozenWhateverTheStateSays) {
  const SimulationOptions plant = plant_of(2);
  ControllerConfig config = config_of("adaptive_bias", plant);
  const Trained saved = trained(config, plant);
  config.layers.resize(1);
  config.layers[0].ids = {0, 1};
  config.layers[0].frozen = true;
  Controller frozen(config);
  frozen.load(saved.state, Keep::what_fits);
  simulate(frozen, plant, 5);
  EXPECT_EQ(bias_of(frozen, 0), saved.biases[0]);

  config.timeline.resize(2);
  config.timeline[0].from = 40;  // before the state
  config.timeline[0].thaw = {1};
  config.timeline[1].from = 63;
  config.timeline[1].thaw = {0};
  Controller thawed(config);
  thawed.load(saved.state, Keep::what_fits);
  simulate(thawed, plant, 2);
  EXPECT_EQ(bias_of(thawed, 0), saved.biases[0]);
  EXPECT_NE(bias_of(thawed, 1), saved.biases[1]);
  simulate(thawed, plant, 5);
  EXPECT_NE(bias_of(thawed, 0), saved.biases[0]);
}

TEST(FieldCases, B2_WhatTheConfigNoLongerFreezesIsThawedAndTheHostsWordStays) {
  const SimulationOptions plant = plant_of(2);
  ControllerConfig config = config_of("adaptive_bias", plant);
  config.layers.resize(1);
  config.layers[0].ids = {0, 1};
  config.layers[0].frozen = true;
  const Trained saved = trained(config, plant);
  config.layers[0].frozen = false;
  Controller thawed(config);
  thawed.load(saved.state, Keep::what_fits);
  simulate(thawed, plant, 5);
  EXPECT_NE(bias_of(thawed, 0), saved.biases[0]);

  Controller by_hand(config);
  by_hand.freeze(1);
  Controller after(config_of("sign_bias", plant));
  std::vector<std::string> said;
  for (const KeptPart& part : after.load(by_hand.save(), Keep::what_fits)) {
    if (part.key == "frozen") said.push_back(std::to_string(part.layer) + ": " + part.why);
  }
  EXPECT_EQ(said, std::vector<std::string>{"1: freeze() of the host holds the layer"});
  simulate(after, plant, 5);
  EXPECT_NE(bias_of(after, 0), Biases(16));
  EXPECT_EQ(bias_of(after, 1), Biases(16));
}

TEST(FieldCases, B3_AStateHasOneLengthForAConfig) {
  const SimulationOptions plant = plant_of(2);
  for (const int lag : {0, 1}) {
    ControllerConfig config = config_of("adaptive_bias", plant);
    config.guard.enabled = true;
    config.monitor.trends = true;
    config.lag = lag;
    Controller controller(config);
    const std::size_t length = controller.save().size(), of_layer = controller.save_layer(1).size();
    Model model(plant);
    for (int i = 0; i < 20; ++i) {
      model.train(controller, 1 + 3 * i, {0, 1});
      ASSERT_EQ(controller.save().size(), length) << "lag " << lag << ", step " << controller.steps();
      ASSERT_EQ(controller.save_layer(1).size(), of_layer);
    }
  }
}

// ---- B5: changes in the middle of a run. ----

TEST(FieldCases, B5_ATimelineChangesThePolicyWithoutAJump) {
  const SimulationOptions plant = plant_of(2);
  ControllerConfig config = config_of("sign_bias", plant);
  config.timeline.resize(2);
  config.timeline[0].from = 30;
  config.timeline[0].expert_bias = config_of("adaptive_bias", plant).expert_bias;
  config.timeline[1].from = 40;
  config.timeline[1].freeze = {1};
  Controller controller(config);
  std::vector<std::string> said;
  Biases at_30, at_40, frozen_at_40;
  simulate(controller, plant, 60, [&](const StepReport& report) {
    for (const Notice& notice : report.notices) {
      if (notice.kind == NoticeKind::kConfig) said.emplace_back(notice.text);
    }
    const auto applied = [&](std::size_t l) {
      const auto values = report.layers[l].actuators[0].applied;
      return Biases(values.begin(), values.end());
    };
    if (report.step == 29) at_30 = applied(0);
    if (report.step == 30) {
      double farthest = 0;
      for (std::size_t i = 0; i < at_30.size(); ++i)
        farthest = std::max(farthest, std::abs(applied(0)[i] - at_30[i]));
      EXPECT_LE(farthest, 1) << "from what was in force, within one rate";
      EXPECT_GT(farthest, 1.1e-2) << "and no longer by the sign's step";
    }
    if (report.step == 39) frozen_at_40 = applied(1);
    if (report.step == 59) {
      EXPECT_EQ(applied(1), frozen_at_40);
      EXPECT_NE(applied(0), at_30);
    }
  });
  EXPECT_THAT(said, ElementsAre(HasSubstr("from step 30"), HasSubstr("from step 40")));
}

TEST(FieldCases, B5_ATimelineIsResumedToTheBit) {
  const SimulationOptions plant = plant_of(1);
  for (const int lag : {0, 1}) {
    ControllerConfig config = config_of("sign_bias", plant);
    config.lag = lag;
    config.timeline.resize(1);
    config.timeline[0].from = 30;
    config.timeline[0].expert_bias = config_of("quantile_bias", plant).expert_bias;
    for (const int stop : {10, 30, 31, 45}) {
      Controller whole(config), resumed(config);
      Model model(plant);
      model.train(whole, stop, {0});
      Model twin = model;
      resumed.load(whole.save());
      EXPECT_TRUE(resumed.save() == whole.save());
      model.train(whole, 30, {0});
      twin.train(resumed, 30, {0});
      EXPECT_TRUE(whole.save() == resumed.save()) << "lag " << lag << ", stopped at " << stop;
    }
  }
}

// A freeze of the timeline is no freeze() of the host, whenever the state was saved and whatever is kept of it.
TEST(FieldCases, B5_AFreezeOfTheTimelineHoldsAfterLoading) {
  const SimulationOptions plant = plant_of(2);
  ControllerConfig config = config_of("sign_bias", plant);
  config.timeline.resize(1);
  config.timeline[0].from = 40;
  config.timeline[0].freeze = {1};
  for (const int stop : {40, 50}) {
    Controller saved(config);
    simulate(saved, plant, stop);
    const Biases frozen = bias_of(saved, 1), moving = bias_of(saved, 0);
    for (const Keep keep : {Keep::everything, Keep::what_fits}) {
      Controller whole(config), by_layer(config);
      whole.load(saved.save(), keep);
      for (const int layer : {0, 1}) by_layer.load_layer(layer, saved.save_layer(layer), keep);
      for (Controller* controller : {&whole, &by_layer}) {
        simulate(*controller, plant, 5);
        EXPECT_EQ(bias_of(*controller, 1), frozen)
            << "saved at " << stop << (keep == Keep::everything ? ", everything" : ", what fits")
            << (controller == &whole ? "" : ", by layer");
        EXPECT_NE(bias_of(*controller, 0), moving);
      }
    }
  }
}

// What the host asks before a step is what the step then does.
TEST(FieldCases, B5_ThePlanOfALayerIsWhatTheNextStepDoes) {
  const SimulationOptions plant = plant_of(3);
  ControllerConfig config = config_of("sign_bias", plant);
  config.timeline.resize(3);
  config.timeline[0].from = 4;
  config.timeline[0].freeze = {1};
  config.timeline[1].from = 8;
  config.timeline[1].thaw = {1};
  config.timeline[1].expert_bias.emplace(config.expert_bias).policy = "fixed";
  config.timeline[1].expert_bias->options = {};
  config.timeline[2].from = 12;
  config.timeline[2].expert_bias = config.expert_bias;
  config.timeline[2].freeze = {2};
  Controller controller(config);
  controller.freeze(0);
  Model model(plant);
  for (int step = 0; step < 16; ++step) {
    if (step == 6) controller.freeze(0, false);
    if (step == 10) {
      const std::string state = controller.save();
      Controller(config).load(state);
      controller.load(state);
    }
    std::vector<Biases> before;
    std::vector<LayerPlan> plans;
    for (const int layer : {0, 1, 2}) {
      before.push_back(bias_of(controller, layer));
      plans.push_back(controller.plan(layer));
      EXPECT_TRUE(plans.back().ever_moves);
    }
    model.train(controller, 1, {0, 1, 2});
    for (const std::size_t layer : {0U, 1U, 2U}) {
      const LayerPlan& plan = plans[layer];
      EXPECT_EQ(plan.decided, step < 8 || step >= 12) << step;
      EXPECT_EQ(plan.frozen, controller.report().layers[layer].actuators[0].reasons.has(Reason::kFrozen))
          << step << ", layer " << layer;
      double farthest = 0;  // what centring rounds is no move
      const Biases now = bias_of(controller, static_cast<int>(layer));
      for (std::size_t i = 0; i < now.size(); ++i)
        farthest = std::max(farthest, std::abs(now[i] - before[layer][i]));
      EXPECT_EQ(farthest > 1e-12, plan.decided && !plan.frozen) << step << ", layer " << layer;
    }
  }
  config.mode = Mode::kShadow;
  EXPECT_FALSE(Controller(config).plan(0).ever_moves);
  config.mode = Mode::kActive;
  config.timeline[0].from = 1;
  config.expert_bias.policy = "fixed";
  config.expert_bias.options = {};
  EXPECT_TRUE(Controller(config).plan(1).ever_moves) << "from step 12 on";
  config.timeline.resize(1);
  EXPECT_FALSE(Controller(config).plan(1).ever_moves);
  EXPECT_THROW(Controller(config).plan(3), std::invalid_argument);
}

// An entry that holds from the next step on takes place after loading, over what the host had said before it.
TEST(FieldCases, B5_AStateSavedJustBeforeAnEntryGoesOnAsTheRunThatWasNot) {
  const SimulationOptions plant = plant_of(2);
  ControllerConfig config = config_of("sign_bias", plant);
  config.layers.resize(1);
  config.layers[0].ids = {0, 1};
  for (const bool freezes : {false, true}) {
    config.layers[0].frozen = freezes;
    config.timeline.resize(1);
    config.timeline[0] = TimelineEntry();
    config.timeline[0].from = 5;
    (freezes ? config.timeline[0].freeze : config.timeline[0].thaw) = {0, 1};
    Controller whole(config);
    whole.freeze(1, !freezes);
    simulate(whole, plant, 5);
    const std::string state = whole.save();
    for (const Keep keep : {Keep::everything, Keep::what_fits}) {
      Controller resumed(config), by_layer(config);
      resumed.load(state, keep);
      for (const int layer : {0, 1}) by_layer.load_layer(layer, whole.save_layer(layer), keep);
      for (Controller* controller : {&resumed, &by_layer}) {
        simulate(*controller, plant, 1);
        EXPECT_EQ(controller->report().layers[1].actuators[0].reasons.has(Reason::kFrozen), freezes)
            << (keep == Keep::everything ? "everything" : "what fits")
            << (controller == &resumed ? "" : ", by layer");
      }
    }
  }
}

// A state knows what the host had frozen; what the host froze before it loads the state does not count.
TEST(FieldCases, B5_ALayersStateSaysWhetherTheHostFroze) {
  const SimulationOptions plant = plant_of(2);
  const ControllerConfig config = config_of("sign_bias", plant);
  Controller saved(config);
  saved.freeze(0);
  for (const Keep keep : {Keep::everything, Keep::what_fits}) {
    Controller controller(config);
    controller.freeze(1);
    for (const int layer : {0, 1}) controller.load_layer(layer, saved.save_layer(layer), keep);
    EXPECT_TRUE(controller.plan(0).frozen);
    EXPECT_FALSE(controller.plan(1).frozen);
  }
}

TEST(FieldCases, B1_ANewControllerInMidTrainingGoesOnFromTheTrainingsStep) {
  const SimulationOptions plant = plant_of(2);
  ControllerConfig config = config_of("sign_bias", plant);
  config.timeline.resize(1);
  config.timeline[0].from = 400;
  config.timeline[0].freeze = {1};
  config.expert_bias.limits.warmup = 50;  // long over
  Controller controller(config);
  controller.begin_at(399);
  EXPECT_EQ(controller.steps(), 399);
  std::vector<std::int64_t> steps;
  Biases first;
  simulate(controller, plant, 3, [&](const StepReport& report) {
    steps.push_back(report.step);
    if (steps.size() == 1) {
      EXPECT_NE(Biases(controller.bias(1).begin(), controller.bias(1).end()), Biases(16, 0.0))
          << "no warm-up";
      first.assign(controller.bias(1).begin(), controller.bias(1).end());
    }
  });
  EXPECT_THAT(steps, ElementsAre(399, 400, 401));
  EXPECT_EQ(Biases(controller.bias(1).begin(), controller.bias(1).end()), first) << "frozen from step 400";
  EXPECT_THROW(controller.begin_at(500), std::invalid_argument);
  EXPECT_THROW(Controller(config).begin_at(-1), std::invalid_argument);
}

TEST(FieldCases, B5_AGainScheduleMakesMovesSmallerUntilNoneIsLeft) {
  const SimulationOptions plant = plant_of(1);
  ControllerConfig config = config_of("sign_bias", plant);
  config.expert_bias.options.set("zero_mean_move", false);
  config.expert_bias.gain_schedule =
      GainSchedule{.shape = GainSchedule::Shape::kLinear, .from = 10, .until = 20};
  Controller controller(config);
  Biases before(16, 0.0);
  simulate(controller, plant, 25, [&](const StepReport& report) {
    const double wanted = 1e-2 * std::clamp((20.0 - static_cast<double>(report.step)) / 10, 0.0, 1.0);
    double most = -1, least = 1;  // the moves of too cold and too hot experts lie two steps apart
    for (std::size_t i = 0; i < 16; ++i) {
      const double move = report.layers[0].actuators[0].applied[i] - before[i];
      most = std::max(most, move);
      least = std::min(least, move);
      before[i] = report.layers[0].actuators[0].applied[i];
    }
    EXPECT_NEAR(most - least, 2 * wanted, 1e-12) << report.step;
  });
}

// ---- B6: what to deploy. ----

/// Batches whose mixtures differ, so that feed-forward has something to do.
SimulationOptions mixed_plant() {
  SimulationOptions plant = plant_of();
  plant.scenario = Scenario::kNoise;
  plant.mixture_spread = 1;
  return plant;
}

TEST(FieldCases, B6_TheDeployedBiasHasNoFeedForward) {
  const SimulationOptions plant = mixed_plant();
  ControllerConfig config = config_of("adaptive_bias", plant);
  config.model.domains = {"a", "b", "c", "d"};
  config.safety.responsiveness = false;
  Controller without(config);
  simulate(without, plant, 80);
  EXPECT_EQ(without.deployment_bias(0), bias_of(without, 0));

  config.expert_bias.options.set("feedforward", std::string("tags"));
  Controller with(config);
  simulate(with, plant, 80);
  const Biases deployed = with.deployment_bias(0), in_force = bias_of(with, 0);
  EXPECT_NEAR(std::accumulate(deployed.begin(), deployed.end(), 0.0), 0, 1e-12);
  EXPECT_NE(deployed, in_force);
  const ActuatorReport& report = with.report().layers[0].actuators[static_cast<int>(Actuator::kExpertBias)];
  EXPECT_EQ(Biases(report.deployed.begin(), report.deployed.end()), deployed);
  EXPECT_TRUE(without.report().layers[0].actuators[0].deployed.empty());
  Controller resumed(config);
  resumed.load(with.save());
  EXPECT_EQ(resumed.deployment_bias(0), deployed);
}

TEST(FieldCases, B6_InShadowWhatIsInForceIsWhatIsDeployed) {
  const SimulationOptions plant = mixed_plant();
  ControllerConfig config = config_of("adaptive_bias", plant);
  config.model.domains = {"a", "b", "c", "d"};
  config.mode = Mode::kShadow;
  config.expert_bias.options.set("feedforward", std::string("tags"));
  Controller controller(config);
  simulate(controller, plant, 80);
  const Biases none(bias_of(controller, 0).size());
  EXPECT_EQ(controller.deployment_bias(0), none);
  // The log says so, too: what would be applied was never in force.
  const ActuatorReport& report =
      controller.report().layers[0].actuators[static_cast<int>(Actuator::kExpertBias)];
  EXPECT_EQ(Biases(report.deployed.begin(), report.deployed.end()), none);
  EXPECT_NE(Biases(report.applied.begin(), report.applied.end()), none);
}

class LeavesNothing : public Policy {
 public:
  explicit LeavesNothing(bool throws) : throws_(throws) {}
  void propose(const LayerView&, std::span<double> value) override { value[0] += 0.01; }
  void leave_for_deployment(std::span<double> biases) const override {
    if (throws_) throw std::runtime_error("not now");
    biases[1] = std::nan("");
  }

 private:
  bool throws_;
};

TEST(FieldCases, B6_APolicyThatFailsToLeaveForDeploymentHasNoSayInIt) {
  for (const bool throws : {false, true}) {
    const PolicyRegistry registry =
        registry_with("nudge", Actuator::kExpertBias, [throws](const PolicyContext&, const PolicyOptions&) {
          return std::make_unique<LeavesNothing>(throws);
        });
    ControllerConfig config = config_of("fixed", plant_of());
    config.expert_bias.policy = "nudge";
    Controller controller(config, registry), again(config, registry);
    simulate(controller, plant_of(), 5);
    EXPECT_EQ(controller.deployment_bias(0), bias_of(controller, 0));
    again.load(controller.save());
    EXPECT_EQ(again.deployment_bias(0), bias_of(controller, 0));
  }
}

// ---- C1: layers that differ. ----

const char* const kGroups = R"(version: 1
model: {score_space: logit}
layers:
  - {first: 1, count: 2, experts: 16, top_k: 2, expert_bias: {policy: adaptive_bias}}
  - {ids: [4, 7], experts: 64, top_k: 6, expert_bias: {policy: sign_bias, options: {step: 0.01}}}
  - {ids: [9], experts: 8, top_k: 1, frozen: true}
)";

TEST(FieldCases, C1_LayersOfDifferentExpertsAndPoliciesInOneController) {
  Controller controller(parse_config(kGroups));
  EXPECT_THAT(controller.layers(), ElementsAre(1, 2, 4, 7, 9));
  EXPECT_EQ(controller.bias(2).size(), 16u);
  EXPECT_EQ(controller.bias(7).size(), 64u);
  EXPECT_EQ(controller.bias(9).size(), 8u);
  EXPECT_THROW(controller.bias(0), std::invalid_argument);
  EXPECT_THROW(controller.bias(3), std::invalid_argument);
  SimulationOptions plant;
  plant.score_space = ScoreSpace::kLogit;
  std::map<int, double> last;
  simulate(controller, plant, 120, [&](const StepReport& report) {
    for (const LayerReport& layer : report.layers) {
      last[layer.layer] = *layer.metrics->max_vio / *layer.metrics->noise_floor_max_vio;
    }
  });
  EXPECT_LT(last[1], 1.6);
  EXPECT_LT(last[2], 1.6);
  EXPECT_LT(last[4], 2.5);
  EXPECT_GT(last[9], 2.5) << "frozen";
}

TEST(FieldCases, C1_EachLayerDecidesAsInAControllerOfItsOwn) {
  Controller groups(parse_config(kGroups));
  Controller alone(
      parse_config("version: 1\nmodel: {score_space: logit}\n"
                   "layers: [{ids: [7], experts: 64, top_k: 6, "
                   "expert_bias: {policy: sign_bias, options: {step: 0.01}}}]"));
  SimulationOptions plant = plant_of(1, 64, 6);
  SimulatedRouter router(plant), twin(plant);
  for (int step = 0; step < 20; ++step) {
    groups.record(7, router.route(groups.bias(7)));
    alone.record(7, twin.route(alone.bias(7)));
    groups.step();
    alone.step();
  }
  EXPECT_EQ(bias_of(groups, 7), bias_of(alone, 7));
}

TEST(FieldCases, C1_OneReductionServesAllGroupsAndAStateResumes) {
  const ControllerConfig config = parse_config(kGroups);
  Controller one(config), two(config);
  int collectives = 0;
  two.set_reduction([&](std::span<std::int64_t>) { ++collectives; });
  SimulationOptions plant;
  plant.score_space = ScoreSpace::kLogit;
  simulate(one, plant, 15);
  simulate(two, plant, 15);
  EXPECT_LE(collectives, 16) << "one a step, and one that compares the configs";
  EXPECT_TRUE(one.save() == two.save());
  Controller resumed(config);
  resumed.load(one.save());
  EXPECT_TRUE(resumed.save() == one.save());
}

TEST(FieldCases, C1_GroupsRoundTripThroughYamlAndJson) {
  const ControllerConfig config = parse_config(kGroups);
  EXPECT_EQ(to_yaml(parse_config(to_yaml(config))), to_yaml(config));
  EXPECT_EQ(to_json(parse_config(to_json(config))), to_json(config));
}

TEST(FieldCases, C1_WrongGroupsAreNamed) {
  const auto what_of = [](const std::string& layers) -> std::string {
    try {
      parse_config("version: 1\nmodel: {}\nlayers: " + layers);
    } catch (const ConfigError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(what_of("[{count: 2, top_k: 1}]"), HasSubstr("layers[0].experts: missing"));
  EXPECT_THAT(what_of("[{experts: 4, top_k: 1}]"), HasSubstr("layers[0].count: missing"));
  EXPECT_THAT(what_of("[{count: 2, experts: 4, top_k: 1}, {ids: [1], experts: 4, top_k: 1}]"),
              AllOf(HasSubstr("layers[1].ids[0]: 1"), HasSubstr("given twice")));
  EXPECT_THAT(what_of("[{count: 2, experts: 4, top_k: 5}]"), HasSubstr("layers[0].top_k: 5"));
  // A list of the model that no group takes.
  EXPECT_THAT(
      [] {
        parse_config("version: 1\nmodel: {top_k: 1, targets: [0.5, 0.5]}\nlayers: [{count: 2, experts: 4}]");
      },
      ::testing::ThrowsMessage<ConfigError>(
          HasSubstr("model.targets: 2 values: must be left out: every group of layers has experts")));
  EXPECT_THAT(what_of("[{count: 2, experts: 4, top_k: 1}]\nmetrics: {placement: [0, 1]}"),
              HasSubstr("metrics.placement: 2 values: must be left out: every group of layers has experts"));
  EXPECT_THAT(
      what_of("[{count: 2, experts: 4, top_k: 1, expert_bias: {policy: sign_bias, options: {step: -1}}}]"),
      HasSubstr("layers[0].expert_bias.options.step: -1"));
  EXPECT_THAT(
      what_of(
          "[{count: 2, experts: 4, top_k: 1, aux_loss_weight: {policy: pi, initial: 0.01, scope: model}}]"),
      HasSubstr("layers[0].aux_loss_weight.scope: model"));
  EXPECT_THAT(what_of("[{count: 2, expertz: 4}]"),
              AllOf(HasSubstr("layers[0].expertz"), HasSubstr("experts")));
}

TEST(FieldCases, C1_AnActuatorOfTheModelSeesAllGroups) {
  Controller controller(parse_config(std::string(kGroups) +
                                     "aux_loss_weight: {policy: pi, scope: model, initial: 0.01, "
                                     "options: {metric: load_cv, target: 0.2}}\n"));
  SimulationOptions plant;
  plant.score_space = ScoreSpace::kLogit;
  simulate(controller, plant, 40);
  EXPECT_EQ(controller.aux_loss_weight(1), controller.aux_loss_weight(7));
  EXPECT_NE(controller.aux_loss_weight(1), 0.01);
  EXPECT_THROW(controller.aux_loss_weight(3), std::invalid_argument);
}

}  // namespace
}  // namespace moectl
