// The feed-forward's own equation, by hand.
#include "policies/feedforward.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <string>
#include <vector>

#include "moectl/config.h"

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

using Pair = std::array<double, 2>;
constexpr Pair kOnes = {1, 1};

// What it adds to biases of zero.
Pair planned(Feedforward& feedforward, const std::vector<std::int64_t>& mixture, Pair slope = kOnes) {
  Pair bias{};
  feedforward.plan(mixture, slope, bias);
  return bias;
}
void commit(Feedforward& feedforward) {
  feedforward.commit({}, /*cut=*/false);
}

TEST(Feedforward, LearnsEachDomainsEffectAndPlansForTheChange) {
  Feedforward feedforward(2, 2);
  EXPECT_THAT(planned(feedforward, {1, 3}),
              ElementsAre(0, 0));  // the first mixture is the mean: nothing to expect
  commit(feedforward);
  // Domain 0: 512 tokens, e = (-1, 1), weight .1. Domain 1: 256 tokens, e = (.5, -.5), weight .05.
  const RoutingStats seen = window({{0, 0, 512}, {1, 0, 64}, {1, 1, 192}});
  feedforward.learn(seen, kTargets);
  // ε = (-.1, .1) and (.025, -.025); w - w̄ = (.5, -.5); twice ê = .5 (-.1) - .5 (.025).
  EXPECT_THAT(planned(feedforward, {3, 1}, {0.5, 0.5}), ElementsAre(DoubleEq(-0.125), DoubleEq(0.125)));
  // Only what is committed is in force.
  EXPECT_THAT(feedforward.in_force(), ElementsAre(0, 0));
  commit(feedforward);
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleEq(-0.125), DoubleEq(0.125)));
  // The same errors in spite of ê: ε_0 += .1 (-1 - .0625 + .1), ε_1 += .05 (.5 - .0625 - .025).
  feedforward.learn(seen, kTargets);
  // w̄ has gone .02 of the way, to (.26, .74): ê = .24 (-.19625) - .24 (.045625).
  EXPECT_THAT(planned(feedforward, {1, 1}), ElementsAre(DoubleEq(-0.05805), DoubleEq(0.05805)));
}

TEST(Feedforward, TokensOfAnExpertWithTargetZeroAreExcess) {
  Feedforward feedforward(2, 2);
  planned(feedforward, {1, 3});
  commit(feedforward);
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
  commit(feedforward);
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);  // ε = (-.1, .1) and (.1, -.1)
  planned(feedforward, {1, 0});                                     // ê = (-.1, .1)
  commit(feedforward);
  planned(feedforward, {0, 1});  // w̄ = (.51, .49): ê = (.102, -.102), and nothing comes of it
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleEq(-0.1), DoubleEq(0.1)));
  // The batch was routed with (-.1, .1) still in force: ε_1 += .1 (1 - .1 - .1).
  feedforward.learn(window({{1, 1, 512}}), kTargets);
  // w̄ = (.4998, .5002): ê = .4998 (.1 + .08 + .1) for a mixture of the second domain alone.
  EXPECT_THAT(planned(feedforward, {0, 1}),
              ElementsAre(DoubleNear(0.4998 * 0.28, 1e-15), DoubleNear(-0.4998 * 0.28, 1e-15)));
}

// An expert whose load rises fast needs a small bias for the same change.
TEST(Feedforward, EachExpertIsMovedByItsOwnSlope) {
  Feedforward feedforward(2, 2);
  planned(feedforward, {1, 1});
  commit(feedforward);
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);  // ε = (-.1, .1) and (.1, -.1)
  // ê = (-.1, .1): by the slopes (-.02, .1), less their mean.
  EXPECT_THAT(planned(feedforward, {1, 0}, {5, 1}),
              ElementsAre(DoubleNear(-0.06, 1e-15), DoubleNear(0.06, 1e-15)));
}

// What a hold or a limit keeps from happening is known to be left over.
TEST(Feedforward, AHoldOrALimitLeavesTheEffectOfTheMixture) {
  Feedforward feedforward(2, 2);
  planned(feedforward, {1, 1});
  commit(feedforward);
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);
  planned(feedforward, {1, 0});  // ê = (-.1, .1)
  EXPECT_DOUBLE_EQ(feedforward.left_over(1), 0.1);
  Feedforward cut = feedforward;
  commit(feedforward);
  EXPECT_EQ(feedforward.left_over(1), 0);
  cut.commit(Pair{-0.01, 0.01}, /*cut=*/true);
  EXPECT_DOUBLE_EQ(cut.left_over(1), 0.09);
}

// A rate limit lets a tenth of the way through at a time. The policy's own b comes out as it went in, and what could
// not be done of ê is not learnt as if it had been.
TEST(Feedforward, ALimitCutsTheFeedforwardBeforeTheBiases) {
  Feedforward feedforward(2, 2);
  const std::vector<std::int64_t> even = {1, 1}, one = {1, 0};
  std::array<double, 2> bias{};
  feedforward.plan(even, kOnes, bias);
  commit(feedforward);
  feedforward.learn(window({{0, 0, 512}, {1, 1, 512}}), kTargets);  // ε = (-.1, .1) and (.1, -.1)
  bias = {0.3, -0.3};
  feedforward.plan(one, kOnes, bias);  // ê = (-.1, .1)
  EXPECT_THAT(bias, ElementsAre(DoubleEq(0.2), DoubleEq(-0.2)));
  feedforward.commit(Pair{0.29, -0.29}, /*cut=*/true);
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleNear(-0.01, 1e-15), DoubleNear(0.01, 1e-15)));
  // The next window shows e_0 = (-1, 1): ε_0 += .1 (-1 - .01 + .1), not .1 (-1 - .1 + .1). w̄ is (.51, .49).
  feedforward.learn(window({{0, 0, 512}}), kTargets);
  bias = {0.3, -0.3};
  feedforward.plan(one, kOnes, bias);
  const double effect = -0.1 + 0.1 * (-1 - 0.01 + 0.1);
  const double share = 0.55;  // (1 + .01/.1)/2: a tenth came in time
  const double next = share * 0.49 * (effect - 0.1);
  EXPECT_THAT(bias, ElementsAre(DoubleEq(0.3 + next), DoubleEq(-0.3 - next)));
  // Centring moves both by the same after the limit: it belongs to neither part.
  feedforward.plan(one, kOnes, bias = {0.3, -0.3});
  feedforward.commit(Pair{0.28 + 7, -0.28 + 7}, /*cut=*/true);
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleNear(-0.02, 1e-14), DoubleNear(0.02, 1e-14)));
  // Never outside what was and what was planned, whatever came of it.
  feedforward.plan(one, kOnes, bias = {0.3, -0.3});
  feedforward.commit(Pair{5.0, -5.0}, /*cut=*/true);
  EXPECT_THAT(feedforward.in_force(), ElementsAre(DoubleNear(-0.02, 1e-14), DoubleNear(0.02, 1e-14)));
}

// Counts tell no slope at once, without which nothing is known of what a mixture needs.
TEST(Feedforward, IsNotForCountsOnly) {
  const auto config = [](const std::string& options) {
    return "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2, domains: [a, b]}\n"
           "expert_bias: {policy: adaptive_bias, options: {feedforward: tags, " +
           options + "}}\n";
  };
  EXPECT_NO_THROW(parse_config(config("form: gap")));
  EXPECT_THAT(
      [&] { parse_config(config("form: counts")); },
      ::testing::ThrowsMessage<ConfigError>(::testing::HasSubstr("feedforward: tags: needs the gap")));
}

}  // namespace
}  // namespace moectl::policies
