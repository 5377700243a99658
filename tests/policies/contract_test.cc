// What every registered policy owes, on every actuator it serves, with its default options and in the forms that run
// other code.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "allocation_counter.h"
#include "policies/policy_rig.h"
#include "test_paths.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::random_stats;
using moectl::testing::RigOptions;

constexpr int kTokens = 256;
constexpr int kSteps = 60;

struct Case {
  std::string policy;
  Actuator actuator;
  std::string form = {};  // "" = as it comes
  std::map<std::string, OptionValue> options = {};
};

std::vector<Case> cases_of(bool biases_only) {
  std::vector<Case> cases;
  for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
    for (const Actuator actuator : policy->actuators) {
      if (!biases_only || actuator == Actuator::kExpertBias) cases.push_back({policy->name, actuator});
    }
  }
  const Actuator bias = Actuator::kExpertBias;
  cases.push_back({"adaptive_bias", bias, "counts", {{"form", std::string("counts")}}});
  cases.push_back({"adaptive_bias", bias, "rescue", {{"rescue", true}}});
  cases.push_back({"adaptive_bias", bias, "feedforward", {{"feedforward", std::string("tags")}}});
  cases.push_back({"proportional_bias", bias, "none", {{"normalise", std::string("none")}}});
  cases.push_back({"proportional_bias", bias, "rms", {{"normalise", std::string("rms")}}});
  cases.push_back({"quantile_bias", bias, "k3", {{"form", std::string("k3")}, {"gain", 1.0}}});
  cases.push_back({"quantile_bias", bias, "local_mean", {{"form", std::string("local_mean")}}});
  cases.push_back({"sign_bias", bias, "uncentred", {{"zero_mean_move", false}}});
  if (!biases_only) {
    cases.push_back({"multiplicative", Actuator::kAuxLossWeight, "averaged", {{"ema", 0.2}}});
  }
  return cases;
}

class Contract : public ::testing::TestWithParam<Case> {
 protected:
  PolicyRig rig(int domains = 2) const {
    return PolicyRig(
        GetParam().policy,
        RigOptions{.actuator = GetParam().actuator, .domains = domains, .options = GetParam().options});
  }
  static StepInfo info(int step) {
    static const std::vector<std::int64_t> mixtures[] = {{128, 128}, {256, 0}, {64, 192}};
    return {.loss = 3.0 - 0.01 * step, .next_mixture = mixtures[step % 3]};
  }
};

class BiasContract : public Contract {};

TEST_P(Contract, ProposalsAreFiniteAndBounded) {
  PolicyRig rig = this->rig();
  for (int step = 0; step < kSteps; ++step) {
    const std::vector<double> before = rig.value;
    rig.step(random_stats(rig.shape(), kTokens, static_cast<std::uint64_t>(step / 10)), info(step));
    for (std::size_t i = 0; i < before.size(); ++i) {
      ASSERT_TRUE(std::isfinite(rig.value[i]));
      if (is_multiplicative(GetParam().actuator)) {
        ASSERT_GT(rig.value[i], 0);
        ASSERT_LE(std::abs(std::log(rig.value[i] / before[i])), 5);
      } else {
        ASSERT_LE(std::abs(rig.value[i] - before[i]), 2);  // scores lie in [0, 1]
      }
    }
  }
}

TEST_P(Contract, SurvivesExtremeWindows) {
  PolicyRig rig = this->rig();
  std::vector<std::int64_t> one(16, 0), huge(16, std::int64_t{1} << 40), nothing(16, 0);
  one[3] = 2;
  std::vector<std::int64_t> pile(16, 0);
  pile[0] = pile[1] = 4096;
  for (int step = 0; step < 40; ++step) {
    for (const auto& counts : {one, huge, pile}) {
      rig.step(moectl::testing::stats_of(rig.shape(), counts));
      for (const double v : rig.value) ASSERT_TRUE(std::isfinite(v));
    }
  }
}

TEST_P(Contract, SameWindowsSameBits) {
  PolicyRig a = rig(), b = rig();
  for (int step = 0; step < kSteps; ++step) {
    const RoutingStats stats = random_stats(a.shape(), kTokens, static_cast<std::uint64_t>(step));
    ASSERT_EQ(a.step(stats, info(step)), b.step(stats, info(step)));
  }
}

// Renaming the experts renames the proposal and changes nothing else.
TEST_P(Contract, ExpertsAreTreatedAlike) {
  PolicyRig a = rig(), b = rig();
  const std::size_t n = 16;
  std::vector<std::size_t> to(n);
  std::iota(to.begin(), to.end(), std::size_t{0});
  std::mt19937_64 random(5);
  std::shuffle(to.begin(), to.end(), random);
  for (int step = 0; step < kSteps; ++step) {
    const RoutingStats stats = random_stats(a.shape(), kTokens, static_cast<std::uint64_t>(step / 5));
    RoutingStats renamed = stats;
    for (int array = 0; array < RoutingStats::kArrayCount; ++array) {
      const auto which = static_cast<RoutingStats::Array>(array);
      const auto from = stats.array(which);
      const auto out = renamed.mutable_array(which);
      if (from.size() % n != 0) continue;
      const bool rows_of_experts = moectl::testing::expert_major(which);
      const std::size_t width = from.size() / n;
      for (std::size_t i = 0; i < from.size(); ++i) {
        if (rows_of_experts) {  // [N × width]
          out[to[i / width] * width + i % width] = from[i];
        } else {  // [width × N]
          out[i / n * n + to[i % n]] = from[i];
        }
      }
    }
    a.step(stats, info(step));
    b.step(renamed, info(step));
    if (is_multiplicative(GetParam().actuator)) {
      ASSERT_NEAR(a.value[0], b.value[0], 1e-9 * a.value[0]);
      continue;
    }
    for (std::size_t i = 0; i < n; ++i) ASSERT_NEAR(a.value[i], b.value[to[i]], 1e-9) << step;
  }
}

TEST_P(BiasContract, ACommonShiftOfTheBiasesChangesNothing) {
  PolicyRig a = rig(), b = rig();
  constexpr double kShift = 0.75;
  for (double& v : b.value) v += kShift;
  const auto centred = [](std::vector<double> v) {
    const double mean = std::accumulate(v.begin(), v.end(), 0.0) / static_cast<double>(v.size());
    for (double& x : v) x -= mean;
    return v;
  };
  for (int step = 0; step < kSteps; ++step) {
    const RoutingStats stats = random_stats(a.shape(), kTokens, static_cast<std::uint64_t>(step / 5));
    const std::vector<double> x = centred(a.propose(stats, info(step)));
    const std::vector<double> y = centred(b.propose(stats, info(step)));
    for (std::size_t i = 0; i < x.size(); ++i) ASSERT_NEAR(x[i], y[i], 1e-9) << step;
    std::vector<double> shifted = x;
    for (double& v : shifted) v += kShift;
    a.settle(x);
    b.settle(shifted);
  }
}

TEST_P(Contract, SavedAndLoadedItContinuesWithTheSameBits) {
  for (const int at : {0, 1, 7, 33}) {
    PolicyRig a = rig(), b = rig();
    for (int step = 0; step < at; ++step) {
      LimitReport why;
      if (step + 1 == at) why.add(Reason::kRate);
      a.step(random_stats(a.shape(), kTokens, static_cast<std::uint64_t>(step)), info(step), why);
    }
    b.load(a.save());
    b.value = a.value;
    b.now = a.now;
    ASSERT_EQ(a.save(), b.save());
    for (int step = at; step < at + 40; ++step) {
      const RoutingStats stats = random_stats(a.shape(), kTokens, static_cast<std::uint64_t>(step));
      ASSERT_EQ(a.step(stats, info(step)), b.step(stats, info(step))) << at << " " << step;
    }
    ASSERT_EQ(a.save(), b.save());
  }
}

TEST_P(Contract, DoesNotAllocateOnceWarm) {
  PolicyRig rig = this->rig();
  std::vector<RoutingStats> windows;
  for (std::uint64_t seed = 0; seed < 20; ++seed) windows.push_back(random_stats(rig.shape(), kTokens, seed));
  int now = 0;
  for (const RoutingStats& stats : windows) rig.step(stats, info(now++));
  EXPECT_EQ(moectl::testing::allocations_of([&] {
              for (const RoutingStats& stats : windows) rig.step(stats, info(now++));
            }),
            0);
}

TEST_P(BiasContract, NonUniformTargetsAreLeftAloneOnceReached) {
  if (GetParam().form == "local_mean") GTEST_SKIP() << "a config with unequal targets is refused";
  std::vector<double> targets(16, 0.5 / 15);
  targets[4] = 0.5;
  PolicyRig rig(
      GetParam().policy,
      RigOptions{
          .actuator = GetParam().actuator, .domains = 2, .options = GetParam().options, .targets = targets});
  std::vector<std::int64_t> counts(16, 100);
  counts[4] = 1500;
  const std::vector<double> wanted = rig.propose(moectl::testing::stats_of(rig.shape(), counts));
  for (const double w : wanted) EXPECT_NEAR(w, wanted[0], 1e-12);
  // And an expert with too little for its target is raised above the others.
  counts[4] = 1000;
  for (int step = 0; step < 5; ++step) rig.step(moectl::testing::stats_of(rig.shape(), counts));
  if (GetParam().policy == "fixed") return;
  EXPECT_EQ(std::max_element(rig.value.begin(), rig.value.end()) - rig.value.begin(), 4);
}

std::string name_of_case(const ::testing::TestParamInfo<Case>& info) {
  const std::string name = info.param.policy + "_" + std::string(name_of(info.param.actuator));
  return info.param.form.empty() ? name : name + "_" + info.param.form;
}
INSTANTIATE_TEST_SUITE_P(EveryPolicy, Contract, ::testing::ValuesIn(cases_of(false)), name_of_case);
INSTANTIATE_TEST_SUITE_P(EveryPolicy, BiasContract, ::testing::ValuesIn(cases_of(true)), name_of_case);

TEST(Registry, RejectsInvalidDescriptions) {
  PolicyRegistry registry;
  register_builtin_policies(registry);
  const auto description = [](const std::string& name) {
    PolicyDescription d = *PolicyRegistry::builtin().find("fixed");
    d.name = name;
    return d;
  };
  EXPECT_THROW(registry.add(description("fixed")), std::invalid_argument);
  EXPECT_THROW(registry.add(description("")), std::invalid_argument);
  PolicyDescription d = description("a");
  d.make = nullptr;
  EXPECT_THROW(registry.add(d), std::invalid_argument);
  d = description("a");
  d.actuators.clear();
  EXPECT_THROW(registry.add(d), std::invalid_argument);
  d = description("a");
  d.options = {{.name = "x", .default_value = 1.0}, {.name = "x", .default_value = 2.0}};
  EXPECT_THROW(registry.add(d), std::invalid_argument);
  d.options = {{.name = "x", .default_value = 2.0, .max = 1}};
  EXPECT_THROW(registry.add(d), std::invalid_argument);
  d.options = {{.name = "x", .default_value = std::string("c"), .choices = {"a", "b"}}};
  EXPECT_THROW(registry.add(d), std::invalid_argument);
  EXPECT_EQ(registry.find("a"), nullptr);
  registry.add(description("a"));
  EXPECT_EQ(registry.all().front()->name, "a");
}

TEST(Registry, EveryPolicyIsDocumentedAndHasAReadyConfig) {
  for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
    EXPECT_FALSE(policy->summary.empty()) << policy->name;
    for (const OptionSpec& option : policy->options) EXPECT_FALSE(option.description.empty()) << option.name;
    const std::string path = std::string(MOECTL_SOURCE_DIR) + "/policies/" + policy->name + ".yaml";
    const ControllerConfig config = load_config(path);
    const bool used = std::any_of(std::begin(kActuators), std::end(kActuators),
                                  [&](Actuator a) { return config.actuator(a).policy == policy->name; });
    EXPECT_TRUE(used) << path;
    Controller controller(config);
  }
}

}  // namespace
}  // namespace moectl
