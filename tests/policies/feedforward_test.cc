// The feed-forward's own equation, by hand.
#include "policies/feedforward.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace moectl::policies {
namespace {

using ::testing::DoubleEq;
using ::testing::DoubleNear;
using ::testing::ElementsAre;

// Tokens of two domains, each choosing one of two experts.
struct Tokens {
  int domain, expert, count;
};
RoutingStats window(const std::vector<Tokens>& parts) {
  std::vector<std::int64_t> experts, domains;
  for (const Tokens& part : parts) {
    experts.insert(experts.end(), static_cast<std::size_t>(part.count), part.expert);
    domains.insert(domains.end(), static_cast<std::size_t>(part.count), part.domain);
  }
  StatsShape shape{.experts = 2, .top_k = 1, .needs = {}};
  shape.needs.domains = 2;
  RoutingStats stats(shape);
  EXPECT_TRUE(stats.add({.experts = experts, .domain_ids = domains}));
  return stats;
}

const std::vector<double> kTargets = {0.5, 0.5};

// What it adds to biases of zero.
std::array<double, 2> planned(Feedforward& feedforward, const std::vector<std::int64_t>& mixture,
                              double unit = 1) {
  std::array<double, 2> bias{};
  feedforward.plan(mixture, unit, bias);
  return bias;
}

TEST(Feedforward, LearnsEachDomainsEffectAndPlansForTheChange) {
  Feedforward feedforward(2, 2);
  EXPECT_THAT(planned(feedforward, {1, 3}),
              ElementsAre(0, 0));  // the first mixture is the mean: nothing to expect
  feedforward.commit();
  // Domain 0: 512 tokens, e = (-1, 1), weight .1. Domain 1: 256 tokens, e = (.5, -.5), weight .05.
  const RoutingStats seen = window({{0, 0, 512}, {1, 0, 64}, {1, 1, 192}});
  feedforward.learn(seen, kTargets);
  // ε = (-.1, .1) and (.025, -.025); w - w̄ = (.5, -.5); twice ê = .5 (-.1) - .5 (.025).
  EXPECT_THAT(planned(feedforward, {3, 1}, 2), ElementsAre(DoubleEq(-0.125), DoubleEq(0.125)));
  // Only what is committed is in force.
  EXPECT_THAT(feedforward.in_force(), ElementsAre(0, 0));
  feedforward.commit();
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleEq(-0.125), DoubleEq(0.125)));
  // The same errors in spite of ê: ε_0 += .1 (-1 - .0625 + .1), ε_1 += .05 (.5 - .0625 - .025).
  feedforward.learn(seen, kTargets);
  // w̄ has gone .02 of the way, to (.26, .74): ê = .24 (-.19625) - .24 (.045625).
  EXPECT_THAT(planned(feedforward, {1, 1}), ElementsAre(DoubleEq(-0.05805), DoubleEq(0.05805)));
}

TEST(Feedforward, TokensOfAnExpertWithTargetZeroAreExcess) {
  Feedforward feedforward(2, 2);
  planned(feedforward, {1, 3});
  feedforward.commit();
  feedforward.learn(window({{0, 0, 256}, {0, 1, 256}}), std::vector<double>{1, 0});
  // e = (.5, -1), weight .1, w - w̄ = .5: ê = (.025, -.05), of which the mean goes out.
  EXPECT_THAT(planned(feedforward, {3, 1}), ElementsAre(DoubleEq(0.0375), DoubleEq(-0.0375)));
}

TEST(Feedforward, ADomainThatIsAbsentKeepsItsEffectAndAnUnknownMixturePlansNothing) {
  Feedforward feedforward(2, 2);
  planned(feedforward, {1, 1});
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);
  EXPECT_THAT(planned(feedforward, {}), ElementsAre(0, 0));
  EXPECT_THAT(planned(feedforward, {0, 0}), ElementsAre(0, 0));
  feedforward.learn(window({{1, 0, 256}, {1, 1, 256}}), kTargets);
  // ε_0 is still (-.1, .1); ε_1 has lost a tenth of (.1, -.1).
  EXPECT_THAT(planned(feedforward, {1, 0}), ElementsAre(DoubleEq(0.5 * -0.1 - 0.5 * 0.09), DoubleEq(0.095)));
}

TEST(Feedforward, CancelsAtMostTheWholeLoad) {
  Feedforward feedforward(2, 2);
  const std::vector<double> skewed = {0.01, 0.99};  // e_0 of an expert with all tokens: -99
  planned(feedforward, {1, 1});
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), skewed);
  // ê is clipped to (-1, …); ε = .1 (-99, 1) and .1 (1, -1/99), the mean goes out.
  const double up = 0.5 * 0.1 + 0.5 * 0.1 / 99;
  EXPECT_THAT(planned(feedforward, {1, 0}), ElementsAre(DoubleEq((-1 - up) / 2), DoubleEq((1 + up) / 2)));
}

// A decision that is held leaves the last one's biases in force, and with them what they cancel.
TEST(Feedforward, AHeldDecisionIsNotUsedForLearning) {
  Feedforward feedforward(2, 2);
  planned(feedforward, {1, 1});
  feedforward.commit();
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);  // ε = (-.1, .1) and (.1, -.1)
  planned(feedforward, {1, 0});                                     // ê = (-.1, .1)
  feedforward.commit();
  planned(feedforward, {0, 1});  // w̄ = (.51, .49): ê = (.102, -.102), and nothing comes of it
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleEq(-0.1), DoubleEq(0.1)));
  // The batch was routed with (-.1, .1) still in force: ε_1 += .1 (1 - .1 - .1).
  feedforward.learn(window({{1, 1, 512}}), kTargets);
  // w̄ = (.4998, .5002): ê = .4998 (.1 + .08 + .1) for a mixture of the second domain alone.
  EXPECT_THAT(planned(feedforward, {0, 1}),
              ElementsAre(DoubleNear(0.4998 * 0.28, 1e-15), DoubleNear(-0.4998 * 0.28, 1e-15)));
}

// Without a unit nothing is added, so there is nothing to take out again.
TEST(Feedforward, WithoutAUnitItExpectsNothing) {
  Feedforward feedforward(2, 2);
  planned(feedforward, {1, 1}, 0);
  feedforward.commit();
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);  // ε = (-.1, .1) and (.1, -.1)
  EXPECT_THAT(planned(feedforward, {1, 0}, 0), ElementsAre(0, 0));
  feedforward.commit();
  feedforward.learn(window({{0, 0, 512}}), kTargets);  // ε_0 += .1 (-1 + .1); w̄ = (.51, .49)
  EXPECT_THAT(planned(feedforward, {1, 0}),
              ElementsAre(DoubleNear(-0.49 * 0.29, 1e-15), DoubleNear(0.49 * 0.29, 1e-15)));
}

// A rate limit lets a tenth of the way through at a time. The policy's own b comes out as it went in, and what could
// not be done of ê is not learnt as if it had been.
TEST(Feedforward, ALimitCutsTheFeedforwardBeforeTheBiases) {
  Feedforward feedforward(2, 2);
  const std::vector<std::int64_t> even = {1, 1}, one = {1, 0};
  std::array<double, 2> bias{};
  feedforward.plan(even, 1, bias);
  feedforward.commit();
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);  // ε = (-.1, .1) and (.1, -.1)
  bias = {0.3, -0.3};
  feedforward.plan(one, 1, bias);  // ê = (-.1, .1)
  EXPECT_THAT(bias, ElementsAre(DoubleEq(0.2), DoubleEq(-0.2)));
  feedforward.commit_cut(std::array{0.29, -0.29});
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleNear(-0.01, 1e-15), DoubleNear(0.01, 1e-15)));
  // The next window shows e_0 = (-1, 1): ε_0 += .1 (-1 - .01 + .1), not .1 (-1 - .1 + .1). w̄ is (.51, .49).
  feedforward.learn(window({{0, 0, 512}}), kTargets);
  bias = {0.3, -0.3};
  feedforward.plan(one, 1, bias);
  const double effect = -0.1 + 0.1 * (-1 - 0.01 + 0.1);
  const double next = 0.49 * (effect - 0.1);
  EXPECT_THAT(bias, ElementsAre(DoubleEq(0.3 + next), DoubleEq(-0.3 - next)));
  // Centring moves both by the same after the limit: it belongs to neither part.
  feedforward.plan(one, 1, bias = {0.3, -0.3});
  feedforward.commit_cut(std::array{0.28 + 7, -0.28 + 7});
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleNear(-0.02, 1e-14), DoubleNear(0.02, 1e-14)));
  // Never outside what was and what was planned, whatever came of it.
  feedforward.plan(one, 1, bias = {0.3, -0.3});
  feedforward.commit_cut(std::array{5.0, -5.0});
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleNear(-0.02, 1e-14), DoubleNear(0.02, 1e-14)));
}

}  // namespace
}  // namespace moectl::policies
