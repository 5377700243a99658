// Does the token entropy answer the router's temperature?
#include "control/scalar_response.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "altered_state.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/simulation.h"
#include "simulation/simulation_options.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;

constexpr auto kTemperature = static_cast<std::size_t>(Actuator::kRouterTemperature);

ControllerConfig config_of(const SimulationOptions& model, double target) {
  ControllerConfig config;
  config.model = simulated::model_of(model);
  config.router_temperature.policy = "entropy_temperature";
  config.router_temperature.options.set("target", target);
  return config;
}

// One layer, and what the router makes of the temperature.
class Loop {
 public:
  using Use = std::function<double(double)>;
  static double as_told(double temperature) { return temperature; }
  static double ignored(double) { return 1; }
  static double inverted(double temperature) { return 1 / temperature; }

  explicit Loop(SimulationOptions model, double target = 0.9)
      : router(with_probabilities(model)), controller(config_of(model, target)) {}

  static SimulationOptions with_probabilities(SimulationOptions model) {
    model.probabilities = true;
    return model;
  }
  void run(int steps, const Use& use) {
    for (int i = 0; i < steps; ++i) {
      controller.record(0, router.route(controller.bias(0), 0, use(controller.temperature(0))));
      take(controller.step());
    }
  }
  void take(const StepReport& report) {
    for (const Notice& notice : report.notices) notices += std::string(notice.text) + '\n';
    const ActuatorReport& now = report.layers[0].actuators[kTemperature];
    last = now.responsiveness;
    reasons = now.reasons;
    held += last.state == Response::kUnresponsive ? 1 : 0;
    probing += last.state == Response::kProbing ? 1 : 0;
    if (last.state == Response::kUnresponsive && noticed < 0) noticed = report.step;
    if (last.state == Response::kAnswers && answered < 0) answered = report.step;
    entropy = *report.layers[0].metrics->token_entropy;
    farthest = std::max(farthest, std::abs(std::log(controller.temperature(0))));
  }

  SimulatedRouter router;
  Controller controller;
  std::string notices;
  Responsiveness last;
  LimitReport reasons;
  int held = 0, probing = 0;
  std::int64_t noticed = -1, answered = -1;
  double entropy = 0, farthest = 0;
};

TEST(ScalarResponse, ATemperatureThatTheRouterIgnoresIsHeldUntilItAnswers) {
  for (const SimulatedGate gate : {SimulatedGate::kSoftmax, SimulatedGate::kSigmoid}) {
    Loop loop({.gate = gate, .seed = 51001});
    // Noticed after 56 to 200 decisions in eight such loops.
    loop.run(250, Loop::ignored);
    EXPECT_EQ(loop.last.state, Response::kUnresponsive);
    EXPECT_TRUE(loop.reasons.has(Reason::kUnresponsive));
    EXPECT_GE(loop.noticed, 0);
    EXPECT_THAT(loop.notices, HasSubstr("router_temperature: the token entropy does not answer"));
    EXPECT_NEAR(std::log(loop.controller.temperature(0)), 0, 0.11);  // where it began, and a test move
    loop.run(300, Loop::ignored);
    EXPECT_EQ(loop.last.state, Response::kUnresponsive);
    loop.answered = -1;
    loop.run(100, Loop::as_told);
    EXPECT_EQ(loop.last.state, Response::kAnswers);
    EXPECT_THAT(loop.notices, HasSubstr("the token entropy answers again"));
  }
}

TEST(ScalarResponse, AnInvertedTemperatureIsToldFromSilenceAndDoesNotRunAway) {
  Loop loop({.seed = 51002});
  loop.run(250, Loop::inverted);
  EXPECT_EQ(loop.last.state, Response::kUnresponsive);
  EXPECT_LT(*loop.last.gain + 3 * *loop.last.error, 0);
  EXPECT_THAT(loop.notices, HasSubstr("falls where the temperature rises"));
  EXPECT_LT(loop.farthest, 0.4);
}

using Shape = std::pair<int, int>;  // experts, top_k

// A test for each router: with sanitizers all of them in one take half an hour.
class HealthyTemperatures : public ::testing::TestWithParam<std::tuple<SimulatedGate, Shape>> {};

TEST_P(HealthyTemperatures, AreNotHeldAndArriveWhereTheyShould) {
  const auto [gate, shape] = GetParam();
  const auto [experts, top_k] = shape;
  std::uint64_t seed = (gate == SimulatedGate::kSoftmax ? 51100 : 51118) + (experts == 8    ? 0
                                                                            : experts == 16 ? 6
                                                                                            : 12);
  int steps = 0, probing = 0;
  for (const double target : {0.5, 0.8, 0.95}) {
    for (const std::int64_t sequence : {0, 128}) {
      Loop loop({.experts = experts,
                 .top_k = top_k,
                 .tokens = 1024,
                 .gate = gate,
                 .seed = ++seed,
                 .scenario = Scenario::kShift,
                 .event_step = 150,
                 .sequence_length = sequence},
                target);
      loop.run(300, Loop::as_told);
      EXPECT_EQ(loop.held, 0) << target << ' ' << sequence << ' ' << loop.notices;
      EXPECT_GE(loop.answered, 0) << target << ' ' << sequence;
      steps += 300;
      probing += loop.probing;
    }
  }
  EXPECT_LT(probing, steps / 10);
}

INSTANTIATE_TEST_SUITE_P(ScalarResponse, HealthyTemperatures,
                         ::testing::Combine(::testing::Values(SimulatedGate::kSoftmax,
                                                              SimulatedGate::kSigmoid),
                                            ::testing::Values(Shape{8, 1}, Shape{16, 2}, Shape{64, 6})));

// The error of the verdict, on a plant of one line: H = 2 + gain · 2 min(H, ln N - H) · ln T + noise, whose noise is white,
// red or alternating. What the policy wants wanders about. At most one false hold in 1e5 healthy steps is promised.
TEST(ScalarResponse, NoFalseHoldInAMillionHealthySteps) {
  struct Case {
    double gain, noise, correlation;
    std::size_t late;
  };
  std::uint64_t random = 1;
  const auto normal = [&random] {
    double sum = -6;
    for (int i = 0; i < 12; ++i) {
      random = random * 6364136223846793005U + 1442695040888963407U;
      sum += static_cast<double>(random >> 11) / 9007199254740992.0;
    }
    return sum;
  };
  const auto held_steps = [&](const Case& plant, int steps) {
    const Limits limits = default_limits(Actuator::kRouterTemperature);
    const double largest = std::log(16.0), middle = 2, assumed = 2 * (largest - middle);
    ScalarResponse check(limits, 0, 1);
    double temperature = 1, noise = 0, wish = 0;
    std::vector<double> told(5, 0.0);
    int held = 0;
    for (int i = 0; i < steps; ++i) {
      told.insert(told.begin(), std::log(temperature));
      told.pop_back();
      noise = plant.correlation * noise + std::sqrt(1 - plant.correlation * plant.correlation) * normal();
      check.observe(middle + assumed * (plant.gain * told[plant.late] + plant.noise * noise), largest,
                    temperature);
      wish = 0.99 * (wish + 0.02 * normal());
      LimitReport why;
      const double wanted = check.adjusts() ? check.adjust(why) : std::exp(wish);
      const double move = std::clamp(std::log(wanted / temperature), -limits.rate, limits.rate);
      temperature = std::clamp(temperature * std::exp(move), limits.min, limits.max);
      check.on_applied({}, temperature);
      held += check.holds() ? 1 : 0;
    }
    return held;
  };
  for (const Case& plant : {Case{1, 0.01, 0, 0}, Case{0.15, 0.01, 0, 0}, Case{0.3, 0.05, 0.9, 0},
                            Case{0.3, 0.05, -0.5, 0}, Case{0.3, 0.02, 0, 4}}) {
    EXPECT_EQ(held_steps(plant, 200000), 0)
        << plant.gain << ' ' << plant.noise << ' ' << plant.correlation << ' ' << plant.late;
  }
  EXPECT_GT(held_steps({0, 0.01, 0, 0}, 1000), 700);
  EXPECT_GT(held_steps({-1, 0.05, 0, 0}, 1000), 800);
}

// An answer that comes late counts, and is reported as late; within the declared delay it is not late.
TEST(ScalarResponse, AnAnswerMayComeLate) {
  for (const int delay : {0, 3}) {
    SimulationOptions model{.seed = 51003, .delay = delay};
    Loop loop(model);
    std::vector<double> told(4, 1.0);
    for (int i = 0; i < 120; ++i) {
      told.insert(told.begin(), loop.controller.temperature(0));
      loop.run(1, [&](double) { return told[3]; });
    }
    EXPECT_EQ(loop.held, 0);
    EXPECT_EQ(loop.last.state, Response::kAnswers);
    EXPECT_EQ(loop.last.late, 3 - delay);
  }
}

TEST(ScalarResponse, WithoutMovesNothingIsKnown) {
  Loop loop({.seed = 51004}, 0.9);
  ControllerConfig config = loop.controller.config();
  config.router_temperature.options.set("error_tolerance", 1.0);
  loop.controller = Controller(config);
  loop.run(60, Loop::ignored);
  EXPECT_EQ(loop.last.state, Response::kUnknown);
  EXPECT_FALSE(loop.last.gain.has_value());
  config.router_temperature = ControllerConfig{}.router_temperature;
  loop.controller = Controller(config);
  loop.run(5, Loop::ignored);
  EXPECT_EQ(loop.last.state, Response::kNotApplicable);
}

TEST(ScalarResponse, IsNotApplicableWhereNothingIsApplied) {
  for (const std::string how : {"shadow", "frozen", "hold", "off"}) {
    SCOPED_TRACE(how);
    Loop loop({.seed = 51005});
    ControllerConfig config = loop.controller.config();
    if (how == "shadow") config.mode = Mode::kShadow;
    if (how == "off") config.safety.responsiveness = false;
    loop.controller = Controller(config);
    if (how == "frozen") loop.controller.freeze(0);
    if (how == "hold") loop.controller.hold();
    loop.run(60, Loop::ignored);
    EXPECT_EQ(loop.last.state, Response::kNotApplicable);
    EXPECT_EQ(loop.probing + loop.held, 0);
  }
}

TEST(ScalarResponse, ATemperatureOfTheWholeModelIsJudgedOnTheMeanOverLayers) {
  const SimulationOptions model{.layers = 2, .seed = 51006, .probabilities = true};
  for (const bool listens : {true, false}) {
    ControllerConfig config = config_of(model, 0.9);
    config.router_temperature.scope = Scope::kModel;
    Controller controller(config);
    SimulatedRouter a(model, 0), b(model, 1);
    Response last = Response::kUnknown;
    for (int i = 0; i < 120; ++i) {
      const double temperature = listens ? controller.temperature(0) : 1;
      controller.record(0, a.route(controller.bias(0), 0, temperature));
      controller.record(1, b.route(controller.bias(1), 0, temperature));
      last = controller.step().model[kTemperature].responsiveness.state;
    }
    EXPECT_EQ(last, listens ? Response::kAnswers : Response::kUnresponsive);
  }
}

// With a cadence a decision sees a window.
TEST(ScalarResponse, IsJudgedByDecisions) {
  for (const bool listens : {true, false}) {
    Loop loop({.tokens = 512, .seed = 51007});
    ControllerConfig config = loop.controller.config();
    config.router_temperature.limits.cadence = 4;
    loop.controller = Controller(config);
    loop.run(4 * 100, listens ? Loop::as_told : Loop::ignored);
    EXPECT_EQ(loop.held > 0, !listens);
    EXPECT_EQ(loop.last.state, listens ? Response::kAnswers : Response::kUnresponsive);
  }
}

TEST(ScalarResponse, ContinuesFromASavedStateToTheBit) {
  for (const int before : {15, 60}) {
    Loop loop({.seed = 51008});
    loop.run(before, Loop::ignored);
    const std::string state = loop.controller.save();
    SimulatedRouter router = loop.router;
    loop.run(60, Loop::ignored);
    Loop other({.seed = 51008});
    other.controller.load(state);
    other.router = router;
    other.run(60, Loop::ignored);
    EXPECT_EQ(other.controller.save(), loop.controller.save());
  }
}

TEST(ScalarResponse, AHostileStateIsRefusedOrTheRunGoesOn) {
  for (const Response wanted : {Response::kProbing, Response::kUnresponsive}) {
    Loop loop({.experts = 8, .top_k = 1, .tokens = 256, .seed = 51009});
    for (int i = 0; i < 300 && loop.last.state != wanted; ++i) loop.run(1, Loop::ignored);
    ASSERT_EQ(loop.last.state, wanted);
    loop.run(3, Loop::ignored);
    const std::string state = loop.controller.save();
    const auto go_on = [&](const std::string& altered) {
      Controller other(loop.controller.config());
      try {
        other.load(altered);
      } catch (const StateError&) {
        return;
      }
      SimulatedRouter router = loop.router;
      for (int i = 0; i < 16; ++i) {
        other.record(0, router.route(other.bias(0), 0, other.temperature(0)));
        other.step();
        ASSERT_TRUE(std::isfinite(other.temperature(0)));
        ASSERT_GT(other.temperature(0), 0);
      }
      Controller again(loop.controller.config());
      EXPECT_NO_THROW(again.load(other.save()));
    };
    int entries = 0;
    for (const testing::StateEntry& entry : testing::state_entries(state)) {
      if (entry.name.rfind("scalar_response", 0) != 0 || entry.count == 0) continue;
      ++entries;
      SCOPED_TRACE(entry.name);
      if (entry.type == 'i') {
        for (const std::int64_t x : {std::int64_t{0}, std::int64_t{1}, std::int64_t{7}, std::int64_t{1} << 40,
                                     std::numeric_limits<std::int64_t>::max()})
          go_on(testing::with_number(state, entry, 0, x));
      } else if (entry.type == 'd') {
        for (const double x : {0.0, -1.0, 1e-308, 1e99, 1e308, HUGE_VAL})
          go_on(testing::with_number(state, entry, entry.count / 2, x));
      }
    }
    EXPECT_GT(entries, 20);
  }
}

}  // namespace
}  // namespace moectl
