// The published red flags, one by one: each acts past its threshold, from its step on, and on nothing less.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "policies/policy_rig.h"

namespace moectl {
namespace {

using Value = Metrics::Value Metrics::*;

// A router that no rule has anything against.
Metrics quiet() {
  Metrics m;
  m.entropy_normalized = 0.9;
  m.kl_to_uniform = 0.3;
  m.load_cv = 0.5;
  m.max_load = 0.15;
  m.dead_experts = 0;
  m.drop_rate = 0;
  return m;
}

// What `rules` makes of an actuator at 1 that saw these metrics once.
double factor(Actuator actuator, std::int64_t step, const Metrics& metrics, bool specialize = false,
              const Metrics* worst = nullptr) {
  PolicyOptions options;
  for (const OptionSpec& spec : PolicyRegistry::builtin().find("rules")->options) {
    options.set(spec.name, spec.default_value);
  }
  options.set("confirm", std::int64_t{1});
  options.set("specialize", specialize);
  const PolicyContext context{
      .actuator = actuator, .experts = 16, .top_k = 2, .initial = 1, .min = 0, .max = 100};
  const auto policy = PolicyRegistry::builtin().find("rules")->make(context, options);
  const StatsShape shape{.experts = 16, .top_k = 2, .needs = {}};
  const RoutingStats stats(shape);
  const LayerMonitor monitor(shape, MonitorOptions{});
  const std::vector<double> targets(16, 1.0 / 16);
  std::vector<double> value = {1};
  policy->propose({.step = step,
                   .layer = worst == nullptr ? 0 : -1,
                   .stats = stats,
                   .metrics = metrics,
                   .worst = worst == nullptr ? metrics : *worst,
                   .monitor = monitor,
                   .targets = targets,
                   .info = {}},
                  value);
  return value[0];
}

struct Flag {
  const char* name;
  Value metric;
  double calm, alarm;  // on either side of the threshold
  std::int64_t from;
  double weight, temperature;
};
void PrintTo(const Flag& flag, std::ostream* out) {
  *out << flag.name;
}

class Rule : public ::testing::TestWithParam<Flag> {};

TEST_P(Rule, ActsPastItsThresholdFromItsStepOn) {
  const Flag& flag = GetParam();
  Metrics metrics = quiet();
  for (const Actuator actuator : {Actuator::kAuxLossWeight, Actuator::kRouterTemperature}) {
    const double wanted = actuator == Actuator::kAuxLossWeight ? flag.weight : flag.temperature;
    metrics.*flag.metric = flag.calm;
    EXPECT_DOUBLE_EQ(factor(actuator, 100000, metrics), 1);
    metrics.*flag.metric = flag.alarm;
    EXPECT_DOUBLE_EQ(factor(actuator, flag.from, metrics), wanted);
    if (flag.from > 0) {
      EXPECT_DOUBLE_EQ(factor(actuator, flag.from - 1, metrics), 1);
    }
    metrics.*flag.metric = std::nullopt;  // not known is no alarm
    EXPECT_DOUBLE_EQ(factor(actuator, 100000, metrics), 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Published, Rule,
                         ::testing::Values(Flag{"Entropy", &Metrics::entropy_normalized, 0.5, 0.499, 0, 2,
                                                1.1},
                                           Flag{"Kl", &Metrics::kl_to_uniform, 2, 2.001, 0, 2, 1.1},
                                           Flag{"CvCollapse", &Metrics::load_cv, 0.8, 1.501, 0, 2, 1.1},
                                           Flag{"MaxLoad", &Metrics::max_load, 0.35, 0.351, 0, 2, 1.1},
                                           Flag{"Dead", &Metrics::dead_experts, 4, 5, 0, 2, 1.1},
                                           Flag{"CvImbalance", &Metrics::load_cv, 0.8, 1.001, 0, 2, 1},
                                           Flag{"Drops", &Metrics::drop_rate, 0.05, 0.051, 1000, 1.5, 1},
                                           Flag{"CvLate", &Metrics::load_cv, 0.8, 0.801, 5000, 1.5, 1}),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(Rules, TooEvenTakesAllThreeSignsTheStepAndTheOption) {
  Metrics even = quiet();
  even.entropy_normalized = 0.951;
  even.kl_to_uniform = 0.149;
  even.load_cv = 0.199;
  const auto weight = [&](std::int64_t step, bool specialize = true) {
    return factor(Actuator::kAuxLossWeight, step, even, specialize);
  };
  EXPECT_DOUBLE_EQ(weight(2000), 0.5);
  EXPECT_DOUBLE_EQ(weight(1999), 1);
  EXPECT_DOUBLE_EQ(weight(2000, false), 1);
  EXPECT_DOUBLE_EQ(factor(Actuator::kRouterTemperature, 2000, even, true), 1);
  for (const auto& [metric, value] : {std::pair<Value, double>{&Metrics::entropy_normalized, 0.95},
                                      {&Metrics::kl_to_uniform, 0.15},
                                      {&Metrics::load_cv, 0.2}}) {
    const auto before = even.*metric;
    even.*metric = value;
    EXPECT_DOUBLE_EQ(weight(2000), 1);
    even.*metric = before;
  }
}

TEST(Rules, ByDefaultTheWorstLayerDecidesForTheModel) {
  Metrics worst = quiet();
  worst.entropy_normalized = 0.4;
  EXPECT_DOUBLE_EQ(factor(Actuator::kAuxLossWeight, 0, quiet(), false, &worst), 2);
}

}  // namespace
}  // namespace moectl
