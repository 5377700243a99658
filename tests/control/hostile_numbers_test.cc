// Numbers at the ends of their types: in configs, in what a step reports, in what a collective returns.
#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "moectl/controller.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
const std::string kModel = "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\n";

void record(Controller& controller) {
  controller.record(0, [](RoutingStats& sums) { sums.add_counts(std::vector<std::int64_t>{8, 4, 2, 2}, 8); });
}

// Steps are added to steps: none may be so many that a sum turns negative, which once meant no cooldown at all.
TEST(HostileNumbers, NoKeyOfStepsReachesAnOverflow) {
  for (const std::string key :
       {"safety: {rollback: {cooldown: N}}", "safety: {rollback: {within: N}}", "safety: {fallback_after: N}",
        "expert_bias: {limits: {cooldown: N}}", "expert_bias: {limits: {cadence: N}}",
        "expert_bias: {limits: {warmup: N}}", "guard: {dwell: N}", "guard: {cooldown: N}",
        "guard: {patience: N}", "health: {alerts: [{metric: max_vio, above: 1, after: N}]}",
        "health: {phases: [{name: a, until: N}, {name: b}]}", "log: {every: N}",
        "log: {rotate_mb: 1, keep: N}"}) {
    std::string text = kModel + key + '\n';
    const std::size_t at = text.find('N', kModel.size());
    text.replace(at, 1, std::to_string(kMost));
    EXPECT_THAT([&] { parse_config(text); }, ThrowsMessage<ConfigError>(HasSubstr(": must be at most 1e12")))
        << key;
  }
}

TEST(HostileNumbers, TheLongestCooldownIsOne) {
  Controller controller(parse_config(kModel +
                                     "expert_bias: {policy: sign_bias, limits: {rate: 0.1}}\n"
                                     "safety: {rollback: {cooldown: 1000000000000, loss_jump: 0.5}}\n"));
  for (int step = 0; step < 40; ++step) {
    record(controller);
    controller.step({.loss = step == 20 ? 9.0 : 2.0});
    const LimitReport& why = controller.report().layers[0].actuators[0].reasons;
    EXPECT_EQ(why.has(Reason::kRollback), step == 20) << step;
    EXPECT_EQ(why.has(Reason::kCooldown), step > 20) << step;
  }
}

// A loss that no average can hold counts as absent: averages stay numbers, which a state can carry.
TEST(HostileNumbers, LossesAtTheEndsOfADoubleMakeAStateThatLoads) {
  const ControllerConfig config =
      parse_config(kModel + "expert_bias: {policy: adaptive_bias}\nsafety: {rollback: {}}\nhealth: {}\n");
  Controller controller(config);
  for (const double loss : {2.0, -1.7e308, 1.7e308, -1.7e308, 1.7e308, 2.0}) {
    record(controller);
    controller.step({.loss = loss, .gradient_norm = -loss});
  }
  Controller other(config);
  EXPECT_NO_THROW(other.load(controller.save()));
  EXPECT_EQ(other.save(), controller.save());
}

// A collective that returns nonsense: the layer holds, and the notice says why.
TEST(HostileNumbers, CountsAboveTheChoicesOfAllTokensAreInvalid) {
  for (const int lag : {0, 1}) {
    for (const std::int64_t wrong : {kMost, std::int64_t{1} << 61, std::int64_t{17}}) {
      Controller controller(
          parse_config(kModel + "lag: " + std::to_string(lag) + "\nexpert_bias: {policy: sign_bias}\n"));
      bool broken = false;
      controller.set_reduction([&](std::span<std::int64_t> payload) {
        // The counts stand where four numbers are those that were recorded.
        for (std::size_t i = 0; broken && i + 3 < payload.size(); ++i) {
          if (payload[i] == 8 && payload[i + 1] == 4 && payload[i + 2] == 2 && payload[i + 3] == 2)
            payload[i] = wrong;
        }
      });
      record(controller);
      controller.step();
      broken = true;
      record(controller);
      controller.step();
      broken = false;
      if (lag == 1) {
        record(controller);
        controller.step();
      }
      const StepReport& report = controller.report();
      EXPECT_TRUE(report.layers[0].actuators[0].reasons.has(Reason::kInvalid)) << wrong << ' ' << lag;
      ASSERT_EQ(report.notices.size(), 1U);
      EXPECT_THAT(std::string(report.notices[0].text), HasSubstr("counts: ")) << wrong;
    }
  }
}

TEST(HostileNumbers, ASumOverMoreRanksThanThereAreIsAnError) {
  for (const std::int64_t ranks : {std::int64_t{0}, std::int64_t{-1}, kMost, (std::int64_t{1} << 20) + 1}) {
    Controller controller(parse_config(kModel + "expert_bias: {policy: sign_bias}\n"));
    int calls = 0;
    std::vector<std::int64_t> before;
    controller.set_reduction([&](std::span<std::int64_t> payload) {
      if (++calls == 1) return;  // the comparison of configs
      for (std::size_t i = payload.size() - 16; i < payload.size(); ++i) {
        if (payload[i] == 1) {  // the first word behind the sums: this rank
          payload[i] = ranks;
          return;
        }
      }
    });
    record(controller);
    EXPECT_THROW(controller.step(), ReductionError) << ranks;
  }
}

}  // namespace
}  // namespace moectl
