// Faults in the closed loop: limits hold throughout, and balance returns after the fault.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/metrics.h"
#include "moectl/simulation.h"
#include "simulated_loop.h"

namespace moectl {
namespace {

// Drives one layer step by step; `fault` replaces what an untroubled step does.
class FaultyLoop {
 public:
  FaultyLoop() : FaultyLoop(config_for(SimulationOptions(), "adaptive_bias")) {}
  explicit FaultyLoop(const ControllerConfig& config)
      : config_(config), controller_(config_), router_(plant_for(controller_)) {
    last_.assign(controller_.bias(0).begin(), controller_.bias(0).end());
  }

  Controller& controller() { return controller_; }
  SimulatedRouter& router() { return router_; }
  const std::vector<double>& vio() const { return vio_; }

  RoutingBatch route() {
    const RoutingBatch batch =
        router_.route(controller_.bias(0), controller_.aux_loss_weight(0), controller_.temperature(0));
    std::vector<double> counts(16, 0.0);
    for (std::int64_t e : batch.experts) counts[static_cast<std::size_t>(e)] += 1;
    vio_.push_back(
        16 * *std::max_element(counts.begin(), counts.end()) / static_cast<double>(batch.experts.size()) - 1);
    return batch;
  }
  void good_step() {
    controller_.record(0, route());
    step();
  }
  // Steps the controller and checks the safety invariant.
  void step(const StepInfo& info = {}) {
    controller_.step(info);
    const Limits& limits = config_.expert_bias.limits;
    const auto bias = controller_.bias(0);
    for (std::size_t i = 0; i < bias.size(); ++i) {
      ASSERT_TRUE(std::isfinite(bias[i]));
      ASSERT_GE(bias[i], limits.min);
      ASSERT_LE(bias[i], limits.max);
      ASSERT_LE(std::abs(bias[i] - last_[i]), limits.rate * (1 + 1e-12));
    }
    last_.assign(bias.begin(), bias.end());
    const LimitReport& reasons = controller_.report().layers[0].actuators[0].reasons;
    limited_ += reasons.has(Reason::kRate) || reasons.has(Reason::kRange);
  }
  // Steps in which a limit cut a move short.
  int limited() const { return limited_; }
  void good_steps(int n) {
    for (int i = 0; i < n; ++i) good_step();
  }
  // Mean MaxVio of the last `n` batches over the noise floor of 2048 tokens.
  double ratio(std::size_t n) const {
    double sum = 0;
    for (std::size_t i = vio_.size() - n; i < vio_.size(); ++i) sum += vio_[i] / static_cast<double>(n);
    return sum / *max_vio_of_cv(16, *noise_floor_cv(16, 2, 2048));
  }

 private:
  ControllerConfig config_;
  Controller controller_;
  SimulatedRouter router_;
  std::vector<double> last_, vio_;
  int limited_ = 0;

  static SimulationOptions plant_for(const Controller& controller) {
    SimulationOptions plant;
    plant.biased_scores = controller.shape(0).needs.biased_scores();
    return plant;
  }
};

// adaptive_bias behind limits so wide that they do not act, where that makes a difference; all policies follow below.

TEST(LoopFaults, NaNScores) {
  FaultyLoop loop;
  loop.good_steps(100);
  for (int i = 0; i < 20; ++i) {
    RoutingBatch batch = loop.route();
    std::vector<float> broken(batch.top_values.begin(), batch.top_values.end());
    broken[static_cast<std::size_t>(3 * i + 1)] = std::numeric_limits<float>::quiet_NaN();
    batch.top_values = broken;
    const std::vector<double> before(loop.controller().bias(0).begin(), loop.controller().bias(0).end());
    loop.controller().record(0, batch);
    loop.step();
    EXPECT_TRUE(loop.controller().report().layers[0].actuators[0].reasons.has(Reason::kInvalid));
    EXPECT_THAT(loop.controller().bias(0), ::testing::ElementsAreArray(before));
  }
  loop.good_steps(60);
  EXPECT_LT(loop.ratio(30), 1.4);
}

TEST(LoopFaults, SkippedOptimizerSteps) {
  FaultyLoop loop;
  loop.good_steps(60);
  for (int i = 0; i < 60; ++i) {
    loop.controller().record(0, loop.route());
    StepInfo info;
    info.skipped = i % 2 == 0;
    loop.step(info);
    EXPECT_EQ(loop.controller().report().layers[0].actuators[0].reasons.has(Reason::kSkippedStep),
              i % 2 == 0);
  }
  loop.good_steps(40);
  EXPECT_LT(loop.ratio(30), 1.4);
}

// Statistics that are five steps old although the config says they are fresh.
TEST(LoopFaults, StaleStatistics) {
  FaultyLoop loop;
  loop.good_steps(100);
  std::deque<RoutingStats> queue;
  for (int i = 0; i < 200; ++i) {
    queue.emplace_back(loop.controller().shape(0)).add(loop.route());
    if (queue.size() > 5) {
      loop.controller().record(0, queue.front());
      queue.pop_front();
    }
    loop.step();
  }
  EXPECT_LT(loop.ratio(100), 12);  // not declared: it may swing, within its limits
  loop.good_steps(150);
  EXPECT_LT(loop.ratio(50), 1.4);
}

// The router ignores the biases for a while, as when the host forgot to copy them.
TEST(LoopFaults, ActuatorThatDoesNotAct) {
  FaultyLoop loop;
  loop.good_steps(60);
  const std::vector<double> stuck(loop.controller().bias(0).begin(), loop.controller().bias(0).end());
  for (int i = 0; i < 150; ++i) {
    loop.controller().record(0, loop.router().route(stuck));
    loop.step();
  }
  loop.good_steps(100);
  EXPECT_LT(loop.ratio(30), 1.4);
}

// Every bias policy, each with the gain that balances this plant, behind limits so narrow that they act.
struct FaultyPolicy {
  const char* policy;
  std::map<std::string, OptionValue> options;
};
void PrintTo(const FaultyPolicy& law, std::ostream* out) {
  *out << law.policy;
}

class EveryPolicyWithFaults : public ::testing::TestWithParam<FaultyPolicy> {
 protected:
  // Until the slowest is at rest.
  EveryPolicyWithFaults() : loop_(config()) { loop_.good_steps(400); }

  static ControllerConfig config() {
    ControllerConfig config = config_for(SimulationOptions(), GetParam().policy, GetParam().options);
    config.expert_bias.limits = {.min = -0.6, .max = 0.6, .rate = 0.004};
    return config;
  }
  void expect_balance_returns() {
    loop_.good_steps(60);
    EXPECT_LT(loop_.ratio(30), 1.4);
  }

  FaultyLoop loop_;
};

// What every policy reads is the choices; of scores that it does not ask for none is looked at.
TEST_P(EveryPolicyWithFaults, BrokenBatchesMoveNothing) {
  const std::vector<double> before(loop_.controller().bias(0).begin(), loop_.controller().bias(0).end());
  for (int i = 0; i < 30; ++i) {
    RoutingBatch batch = loop_.route();
    std::vector<std::int64_t> choices(batch.experts.begin(), batch.experts.end());
    std::vector<float> values(batch.top_values.begin(), batch.top_values.end());
    choices[static_cast<std::size_t>(i)] = i % 2 == 0 ? 16 : -2;
    values[static_cast<std::size_t>(3 * i + 1)] = std::numeric_limits<float>::quiet_NaN();
    batch.experts = choices;
    batch.top_values = values;
    loop_.controller().record(0, batch);
    loop_.step();
    EXPECT_TRUE(loop_.controller().report().layers[0].actuators[0].reasons.has(Reason::kInvalid));
  }
  EXPECT_THAT(loop_.controller().bias(0), ::testing::ElementsAreArray(before));
  expect_balance_returns();
}

TEST_P(EveryPolicyWithFaults, MissingSteps) {
  for (int i = 0; i < 90; ++i) {
    const RoutingBatch batch = loop_.route();
    if (i % 3 == 0) loop_.controller().record(0, batch);
    loop_.step();
    EXPECT_EQ(loop_.controller().report().layers[0].actuators[0].reasons.has(Reason::kNoData), i % 3 != 0);
  }
  EXPECT_LT(loop_.ratio(60), 1.4);  // two steps in three are blind, and the loop still holds
  expect_balance_returns();
}

TEST_P(EveryPolicyWithFaults, StaleStatistics) {
  std::deque<RoutingStats> queue;
  for (int i = 0; i < 100; ++i) {
    queue.emplace_back(loop_.controller().shape(0)).add(loop_.route());
    if (queue.size() > 5) {
      loop_.controller().record(0, queue.front());
      queue.pop_front();
    }
    loop_.step();
  }
  loop_.good_steps(30);  // a layer that is held asks again within so many
  expect_balance_returns();
}

TEST_P(EveryPolicyWithFaults, BatchesTenTimesAsLarge) {
  loop_.router().set_tokens(20480);
  loop_.good_steps(50);
  EXPECT_LT(loop_.ratio(20), 0.5);  // the noise floor falls to .32, and the loop goes below the old one
  loop_.router().set_tokens(2048);
  expect_balance_returns();
}

TEST_P(EveryPolicyWithFaults, FrozenLayer) {
  loop_.controller().freeze(0);
  const std::vector<double> before(loop_.controller().bias(0).begin(), loop_.controller().bias(0).end());
  loop_.good_steps(200);
  EXPECT_THAT(loop_.controller().bias(0), ::testing::ElementsAreArray(before));
  EXPECT_GT(loop_.ratio(30), 1.6);  // the router went on without it
  loop_.controller().freeze(0, false);
  expect_balance_returns();
}

// Nothing answers, so every policy goes on until a limit stops it, and must find back from there.
TEST_P(EveryPolicyWithFaults, ActuatorThatDoesNotActEndsAtALimit) {
  const std::vector<double> none(16, 0.0);
  for (int i = 0; i < 400; ++i) {
    loop_.controller().record(0, loop_.router().route(none));
    loop_.step();
  }
  EXPECT_GT(loop_.limited(), 0);
  loop_.good_steps(400);
  expect_balance_returns();
}

const std::vector<FaultyPolicy> kLaws = {{"sign_bias", {}},
                                         {"proportional_bias", {}},
                                         {"tanh_momentum_bias", {{"step", 5e-3}}},
                                         {"quantile_bias", {}},
                                         {"quantile_bias", {{"form", std::string("k3")}, {"gain", 1.0}}},
                                         {"quantile_bias", {{"form", std::string("local_mean")}}},
                                         {"adaptive_bias", {}},
                                         {"adaptive_bias", {{"form", std::string("counts")}}}};
INSTANTIATE_TEST_SUITE_P(Laws, EveryPolicyWithFaults, ::testing::ValuesIn(kLaws), [](const auto& info) {
  const auto form = info.param.options.find("form");
  return info.param.policy +
         (form == info.param.options.end() ? "" : "_" + std::get<std::string>(form->second));
});

TEST(LoopFaults, CoversEveryPolicy) {
  std::set<std::string> tried;
  for (const FaultyPolicy& law : kLaws) tried.insert(law.policy);
  EXPECT_EQ(tried, bias_policies());
}

}  // namespace
}  // namespace moectl
