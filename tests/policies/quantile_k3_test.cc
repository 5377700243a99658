// `quantile_bias` with `form: k3` against a second implementation, written from the published rule: for every token the
// (k+1)-th largest biased score less the unbiased scores, sorted, and the rule of the histogram applied to the sorted
// values. All inputs are multiples of 2^-12, so that both see the same numbers to the bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "allocation_counter.h"
#include "moectl/figures.h"
#include "moectl/simulation.h"
#include "policies/policy_rig.h"
#include "simulated_loop.h"

namespace moectl {
namespace {

using moectl::testing::PolicyRig;
using moectl::testing::random_stats;
using moectl::testing::RigOptions;

const std::map<std::string, OptionValue> kK3 = {{"form", std::string("k3")}, {"gain", 1.0}};

struct Batch {
  std::size_t experts, top_k, tokens;
  std::vector<double> scores;  // unbiased [tokens × experts]
};

Batch random_batch(std::size_t experts, std::size_t top_k, std::size_t tokens, std::uint64_t seed) {
  Batch batch{experts, top_k, tokens, {}};
  std::mt19937_64 random(seed);
  for (std::size_t i = 0; i < tokens * experts; ++i)
    batch.scores.push_back(std::ldexp(static_cast<double>(random() % 4097), -12));
  return batch;
}

std::vector<double> random_biases(std::size_t experts, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<double> biases;
  for (std::size_t i = 0; i < experts; ++i)
    biases.push_back(std::ldexp(static_cast<double>(random() % 8192) - 4096, -12));
  return biases;
}

RoutingStats routed(const StatsShape& shape, const Batch& batch, const std::vector<double>& bias) {
  std::vector<std::int64_t> experts;
  std::vector<float> top, biased;
  for (std::size_t t = 0; t < batch.tokens; ++t) {
    std::vector<std::pair<double, std::size_t>> order;
    for (std::size_t i = 0; i < batch.experts; ++i) {
      const double v = batch.scores[t * batch.experts + i] + bias[i];
      biased.push_back(static_cast<float>(v));
      order.emplace_back(-v, i);
    }
    std::sort(order.begin(), order.end());
    for (std::size_t j = 0; j < batch.top_k; ++j)
      experts.push_back(static_cast<std::int64_t>(order[j].second));
    for (std::size_t j = 0; j <= batch.top_k; ++j) top.push_back(static_cast<float>(-order[j].first));
  }
  RoutingStats stats(shape);
  stats.set_routed_under(bias);
  EXPECT_TRUE(stats.add({.experts = experts, .top_values = top, .biased_scores = biased}));
  return stats;
}

std::vector<double> published(const Batch& batch, const std::vector<double>& bias,
                              const std::vector<double>& targets) {
  const double low = *std::min_element(bias.begin(), bias.end()) - 1;
  const double range = *std::max_element(bias.begin(), bias.end()) + 1 - low;
  std::vector<double> cutoffs;
  for (std::size_t t = 0; t < batch.tokens; ++t) {
    std::vector<double> biased;
    for (std::size_t i = 0; i < batch.experts; ++i)
      biased.push_back(batch.scores[t * batch.experts + i] + bias[i]);
    std::sort(biased.begin(), biased.end(), std::greater<>());
    cutoffs.push_back(biased[batch.top_k]);
  }
  std::vector<double> next;
  for (std::size_t i = 0; i < batch.experts; ++i) {
    std::vector<double> bins;  // of all tokens, in rising order
    for (std::size_t t = 0; t < batch.tokens; ++t) {
      const double required = cutoffs[t] - batch.scores[t * batch.experts + i];
      bins.push_back(std::clamp(std::floor((required - low) / range * 1000), 0.0, 999.0));
    }
    std::sort(bins.begin(), bins.end());
    const double wanted = targets[i] * static_cast<double>(batch.tokens * batch.top_k);
    const double bin = bins[static_cast<std::size_t>(std::ceil(wanted)) - 1];
    const auto [first, last] = std::equal_range(bins.begin(), bins.end(), bin);
    const double part =
        (wanted - static_cast<double>(first - bins.begin())) / static_cast<double>(last - first);
    next.push_back(low + (bin + part) * (range / 1000));
  }
  return next;
}

// Differences between experts, because the mean is taken out of one and not of the other.
TEST(QuantileK3, AgreesWithASecondImplementation) {
  struct Shape {
    int experts, top_k;
    std::size_t tokens;
  };
  for (const auto& [experts, top_k, tokens] : {Shape{8, 2, 64}, Shape{16, 2, 1000}, Shape{7, 3, 101}}) {
    const auto n = static_cast<std::size_t>(experts);
    for (std::uint64_t seed = 1; seed <= 10; ++seed) {
      PolicyRig rig("quantile_bias", RigOptions{.experts = experts, .top_k = top_k, .options = kK3});
      const Batch batch = random_batch(n, static_cast<std::size_t>(top_k), tokens, seed);
      rig.value = random_biases(n, 100 + seed);
      const std::vector<double> wanted = published(batch, rig.value, rig.targets);
      const std::vector<double> got = rig.step(routed(rig.shape(), batch, rig.value));
      double mean = 0;
      for (const double b : wanted) mean += b / static_cast<double>(n);
      // The mean alone is a sum, whose order is not part of the rule.
      for (std::size_t i = 0; i < n; ++i)
        ASSERT_NEAR(got[i], wanted[i] - mean, 1e-15) << experts << ' ' << seed;
    }
  }
}

// Eight tokens, two experts, one each. Token t's score for expert 1 is 0, for expert 0 t/8 - 1/4: with biases of 0 the
// cutoff is the smaller of the two, and expert 0 requires min(s, 0) - s = -max(s, 0): -5/8 … 0, and 0 three times. The
// fourth smallest is -2/8. Range [-1, 1], bins of .002: it fills bin ⌊.75 · 500⌋ = 375, and its upper edge is taken.
// Expert 1 requires min(s, 0): -2/8, -1/8, then 0 six times; four are reached by two of the six in bin 500.
TEST(QuantileK3, StepByHand) {
  Batch batch{2, 1, 8, {}};
  for (int t = 0; t < 8; ++t) batch.scores.insert(batch.scores.end(), {t / 8.0 - 0.25, 0.0});
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1, .options = kK3});
  rig.step(routed(rig.shape(), batch, {0, 0}));
  const double first = -1 + 376 * 0.002, second = -1 + (500 + 2 / 6.0) * 0.002;
  EXPECT_NEAR(rig.value[0], (first - second) / 2, 1e-15);
  EXPECT_NEAR(rig.value[1], (second - first) / 2, 1e-15);
}

// What a batch requires does not depend on the biases in force now.
TEST(QuantileK3, CountsFromTheBiasesAtRouting) {
  PolicyRig rig("quantile_bias", RigOptions{.experts = 8, .top_k = 2, .delay = 1, .options = kK3});
  const Batch batch = random_batch(8, 2, 256, 5);
  const std::vector<double> zero(8, 0.0);
  const std::vector<double> first = rig.step(routed(rig.shape(), batch, zero));
  EXPECT_EQ(rig.step(routed(rig.shape(), batch, zero)), first);
}

// ---- The whole loop ----

// The published law on batches of its own, without the limits of a controller.
struct Published {
  explicit Published(std::size_t experts) : targets(experts, 1 / static_cast<double>(experts)) {}

  std::vector<double> next(const Batch& batch, const std::vector<double>& bias) const {
    std::vector<double> wanted = published(batch, bias, targets);
    double mean = 0;
    for (const double b : wanted) mean += b;
    for (double& b : wanted) b -= mean / static_cast<double>(wanted.size());
    return wanted;
  }
  std::vector<double> targets;
};

struct Recorded {
  std::vector<std::int64_t> experts;
  std::vector<float> top, biased;
  std::size_t n, k;

  Recorded(const Batch& batch, const std::vector<double>& bias, std::size_t from, std::size_t to)
      : n(batch.experts), k(batch.top_k) {
    for (std::size_t t = from; t < to; ++t) {
      std::vector<std::pair<double, std::size_t>> order;
      for (std::size_t i = 0; i < n; ++i) {
        const float v = static_cast<float>(batch.scores[t * n + i] + bias[i]);
        biased.push_back(v);
        order.emplace_back(-static_cast<double>(v), i);
      }
      std::sort(order.begin(), order.end());
      for (std::size_t j = 0; j < k; ++j) experts.push_back(static_cast<std::int64_t>(order[j].second));
      for (std::size_t j = 0; j <= k; ++j) top.push_back(static_cast<float>(-order[j].first));
    }
  }
  RoutingBatch batch() const { return {.experts = experts, .top_values = top, .biased_scores = biased}; }
};

ControllerConfig loop_config(const std::map<std::string, OptionValue>& options, int lag, int delay = 0) {
  ControllerConfig config;
  config.model = {.layers = 2, .experts = 8, .top_k = 2, .tokens_per_step = 128};
  config.model.delay = delay;
  config.lag = lag;
  config.expert_bias.policy = "quantile_bias";
  for (const auto& [name, value] : options) config.expert_bias.options.set(name, value);
  config.expert_bias.limits.rate = 32;
  config.expert_bias.limits.center = false;
  config.safety.responsiveness = false;
  return config;
}

std::vector<double> bias_of(const Controller& controller, int layer) {
  const auto bias = controller.bias(layer);
  return {bias.begin(), bias.end()};
}

// Ranks in threads, with a reduction that adds up all shares.
class Ranks {
 public:
  Ranks(const ControllerConfig& config, std::size_t count) : all_(static_cast<std::ptrdiff_t>(count)) {
    for (std::size_t r = 0; r < count; ++r) {
      ranks_.push_back(std::make_unique<Controller>(config));
      ranks_.back()->set_reduction([this](std::span<std::int64_t> share) {
        {
          const std::lock_guard lock(mutex_);
          sum_.resize(share.size(), 0);
          for (std::size_t i = 0; i < share.size(); ++i) sum_[i] += share[i];
        }
        all_.arrive_and_wait();
        std::copy(sum_.begin(), sum_.end(), share.begin());
        all_.arrive_and_wait();
        if (const std::lock_guard lock(mutex_); !sum_.empty()) sum_.clear();
        all_.arrive_and_wait();
      });
    }
  }
  Controller& operator[](std::size_t r) { return *ranks_[r]; }
  std::size_t size() const { return ranks_.size(); }
  template <class Body>
  void each(Body&& body) {
    std::vector<std::thread> threads;
    for (std::size_t r = 0; r < size(); ++r) threads.emplace_back([&, r] { body(*ranks_[r], r); });
    for (std::thread& thread : threads) thread.join();
  }

 private:
  std::vector<std::unique_ptr<Controller>> ranks_;
  std::barrier<> all_;
  std::mutex mutex_;
  std::vector<std::int64_t> sum_;
};

const std::map<std::string, OptionValue> kLocal = {{"form", std::string("local_mean")}, {"gain", 0.5}};
constexpr std::size_t kShare = 32, kPieces = 4;

Batch batch_at(int step, int layer) {
  return random_batch(8, 2, kShare * kPieces, static_cast<std::uint64_t>(100 * step + layer));
}

// Two and four ranks decide what one process decides, to the bit, with a step of lag or without, and with steps on which
// nothing was recorded.
TEST(QuantileK3, RanksDecideAsOneProcess) {
  for (const auto& options : {kK3, kLocal}) {
    for (const int lag : {0, 1}) {
      for (const std::size_t count : {std::size_t{2}, kPieces}) {
        const ControllerConfig config = loop_config(options, lag);
        Controller alone(config);
        Ranks ranks(config, count);
        for (int step = 0; step < 8; ++step) {
          for (int layer = 0; layer < 2 && step != 4; ++layer) {
            const Batch batch = batch_at(step, layer);
            const std::vector<double> bias = bias_of(alone, layer);
            for (std::size_t piece = 0; piece < kPieces; ++piece) {
              const Recorded record(batch, bias, piece * kShare, (piece + 1) * kShare);
              alone.record(layer, record.batch());
              ranks[piece % count].record(layer, record.batch());
            }
          }
          alone.step();
          ranks.each([](Controller& rank, std::size_t) { rank.step(); });
          for (std::size_t r = 0; r < count; ++r) {
            for (int layer = 0; layer < 2; ++layer)
              ASSERT_EQ(bias_of(ranks[r], layer), bias_of(alone, layer)) << step << " lag " << lag;
          }
        }
        EXPECT_NE(alone.bias(0)[0], 0);
      }
    }
  }
}

// The loop follows the published law, whatever the lateness: a batch is binned about the biases of its own step, also
// where the step before decided nothing.
TEST(QuantileK3, LateBatchesAreBinnedAboutTheirOwnBiases) {
  for (const auto& [lag, delay] : {std::pair{0, 0}, {1, 0}, {0, 1}, {1, 2}}) {
    const Published law(8);
    Controller controller(loop_config(kK3, lag, delay));
    std::vector<std::vector<double>> in_force;  // at each step
    std::vector<std::optional<Batch>> routed;
    int moves = 0;
    for (int step = 0; step < 14; ++step) {
      in_force.push_back(bias_of(controller, 0));
      // What is recorded now was routed `delay` steps ago.
      const auto then = [&, &delay = delay](int at) {
        return in_force[static_cast<std::size_t>(std::max(0, at - delay))];
      };
      routed.emplace_back();
      if (step % 5 != 3) {
        routed.back() = batch_at(step, 0);
        controller.record(0, Recorded(*routed.back(), then(step), 0, routed.back()->tokens).batch());
      }
      controller.step();
      const int seen = step - lag;
      const std::vector<double> now = bias_of(controller, 0);
      if (seen < 0 || !routed[static_cast<std::size_t>(seen)]) {
        EXPECT_EQ(now, in_force.back());
        continue;
      }
      ++moves;
      const std::vector<double> wanted = law.next(*routed[static_cast<std::size_t>(seen)], then(seen));
      // A bin's width is .002; the scores come as floats.
      for (std::size_t i = 0; i < 8; ++i)
        ASSERT_NEAR(now[i], wanted[i], 2e-4) << step << " lag " << lag << " delay " << delay;
    }
    EXPECT_GT(moves, 8);
  }
}

TEST(QuantileK3, AStateTakenInMidFlightGoesOnToTheBit) {
  for (const auto& options : {kK3, kLocal}) {
    const ControllerConfig config = loop_config(options, 1, 1);
    Controller a(config), b(config);
    for (int step = 0; step < 10; ++step) {
      const auto record = [&](Controller& controller, std::size_t from, std::size_t to) {
        for (int layer = 0; layer < 2; ++layer)
          controller.record(layer,
                            Recorded(batch_at(step, layer), bias_of(controller, layer), from, to).batch());
      };
      record(a, 0, kShare);
      if (step == 6) {
        b.load(a.save());
        EXPECT_EQ(a.save(), b.save());
      }
      record(a, kShare, 2 * kShare);
      a.step();
      if (step < 6) continue;
      if (step > 6) record(b, 0, kShare);
      record(b, kShare, 2 * kShare);
      b.step();
      ASSERT_EQ(bias_of(b, 1), bias_of(a, 1)) << step;
    }
    EXPECT_NE(a.bias(0)[0], 0);
  }
}

// Biases that the host changes between two records of a step: their bins do not join, so the step is held.
TEST(QuantileK3, BiasesAdoptedWithinAStepHoldIt) {
  Controller controller(loop_config(kK3, 0));
  const std::vector<double> zero(8, 0.0), other = {0.25, -0.25, 0, 0, 0, 0, 0, 0};
  controller.record(0, Recorded(batch_at(0, 0), zero, 0, kShare).batch());
  controller.adopt(0, other);
  controller.record(0, Recorded(batch_at(0, 0), other, kShare, 2 * kShare).batch());
  EXPECT_TRUE(controller.step().layers[0].actuators[0].reasons.has(Reason::kMissingInput));
  EXPECT_EQ(bias_of(controller, 0), other);
  controller.record(0, Recorded(batch_at(1, 0), other, 0, kShare).batch());
  EXPECT_FALSE(controller.step().layers[0].actuators[0].reasons.has(Reason::kMissingInput));
  EXPECT_NE(bias_of(controller, 0), other);
}

// ---- local_mean ----

TEST(QuantileLocalMean, RefusesUnequalTargets) {
  ControllerConfig config = loop_config(kLocal, 0);
  config.model.targets = {0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1};
  try {
    Controller controller(config);
    FAIL();
  } catch (const ConfigError& error) {
    EXPECT_NE(std::string(error.what()).find("model.targets: unequal: must be equal with form: local_mean"),
              std::string::npos)
        << error.what();
  }
}

// Megatron-Core's rule in plain words: β = -b; of the scores less the (k+1)-th largest of s - β, in each micro-batch the
// (Tk/N + 1)-th largest of a column; the mean over micro-batches, and so much of the old β as the EMA says.
TEST(QuantileLocalMean, AgreesWithASecondImplementation) {
  constexpr std::size_t kExperts = 8, kTopK = 2, kTokens = 64;
  for (const double ema : {0.0, 0.875}) {
    PolicyRig rig("quantile_bias",
                  RigOptions{.experts = kExperts,
                             .top_k = kTopK,
                             .score_space = ScoreSpace::kLogit,
                             .options = {{"form", std::string("local_mean")}, {"gain", 1 - ema}}});
    std::vector<double> beta(kExperts, 0.0);
    for (std::uint64_t step = 0; step < 5; ++step) {
      RoutingStats sums(rig.shape());
      std::vector<double> mean(kExperts, 0.0);
      for (std::uint64_t micro = 0; micro < 4; ++micro) {
        const Batch batch = random_batch(kExperts, kTopK, kTokens, 10 * step + micro);
        // Biases of few digits, so that no score is rounded.
        std::vector<double> bias;
        for (const double b : beta) bias.push_back(-std::round(b * 4096) / 4096);
        sums += routed(rig.shape(), batch, bias);
        std::vector<double> alpha;
        for (std::size_t t = 0; t < kTokens; ++t) {
          std::vector<double> row;
          for (std::size_t i = 0; i < kExperts; ++i) row.push_back(batch.scores[t * kExperts + i] + bias[i]);
          std::sort(row.begin(), row.end(), std::greater<>());
          alpha.push_back(row[kTopK]);
        }
        for (std::size_t i = 0; i < kExperts; ++i) {
          std::vector<double> column;
          for (std::size_t t = 0; t < kTokens; ++t)
            column.push_back(batch.scores[t * kExperts + i] - alpha[t]);
          std::sort(column.begin(), column.end(), std::greater<>());
          mean[i] += column[kTokens * kTopK / kExperts] / 4;
        }
      }
      double sum = 0;
      for (std::size_t i = 0; i < kExperts; ++i) sum += beta[i] = ema * beta[i] + (1 - ema) * mean[i];
      for (double& b : beta) b -= sum / kExperts;
      rig.step(sums);
      for (std::size_t i = 0; i < kExperts; ++i) ASSERT_NEAR(rig.value[i], -beta[i], 1e-15) << step;
    }
  }
}

TEST(QuantileK3, HoldsWithoutMargins) {
  PolicyRig rig("quantile_bias", RigOptions{.experts = 2, .top_k = 1, .options = kK3});
  RoutingStats stats(rig.shape());
  stats.add_counts(std::vector<std::int64_t>{30, 10}, 40);
  rig.value = {0.5, -0.25};
  rig.step(stats);
  EXPECT_EQ(rig.value, (std::vector<double>{0.5, -0.25}));
}

TEST(QuantileK3, IsSavedAndDoesNotAllocate) {
  const RigOptions options{.delay = 2, .options = kK3};
  PolicyRig a("quantile_bias", options), b("quantile_bias", options);
  std::vector<RoutingStats> windows;
  for (std::uint64_t seed = 0; seed < 10; ++seed) windows.push_back(random_stats(a.shape(), 256, seed));
  for (const RoutingStats& stats : windows) a.step(stats);
  b.load(a.save());
  b.value = a.value;
  b.now = a.now;
  EXPECT_EQ(moectl::testing::allocations_of([&] {
              for (const RoutingStats& stats : windows) a.step(stats);
            }),
            0);
  for (const RoutingStats& stats : windows) b.step(stats);
  EXPECT_EQ(a.value, b.value);
}

TEST(QuantileK3, SettlesInFewStepsAndKeepsTheNoiseOfOneBatch) {
  SimulationOptions plant;
  ControllerConfig config = config_for(plant, "quantile_bias", kK3, 16, 32);
  config.safety.responsiveness = false;
  Controller controller(config);
  std::vector<StepFigures> steps;
  simulate(controller, plant, 200, [&](const StepReport& report) { steps.push_back(figures_of(report)); });
  const Figures figures = compute_figures(steps);
  EXPECT_GT(*figures.max_vio_over_floor, 1.1);
  EXPECT_LT(*figures.max_vio_over_floor, 1.6);
  double first = 0;
  for (std::size_t step = 4; step < 14; ++step)
    first += *steps[step].max_vio / *steps[step].floor_max_vio / 10;
  EXPECT_LT(first, 1.7);
}

std::string refusal(const RigOptions& options) {
  try {
    PolicyRig rig("quantile_bias", options);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

TEST(QuantileK3, RefusesWhatItsBinsCannotHold) {
  EXPECT_EQ(refusal({.score_space = ScoreSpace::kLogit, .options = kK3}),
            "quantile_bias: form: k3: bins scores within [0, 1], and logits are not (model.score_space: "
            "probability, or form: histogram)");
  ControllerConfig config = loop_config(kK3, 0);
  config.expert_bias.limits.cadence = 2;
  EXPECT_THROW(Controller{config}, ConfigError);
  config.expert_bias.limits.cadence = 1;
  config.model.tokens_per_step = kMostRequiredTokens;
  EXPECT_NO_THROW(Controller{config});
  ++config.model.tokens_per_step;
  EXPECT_THROW(Controller{config}, ConfigError);
  EXPECT_EQ(refusal({.options = {{"form", std::string("k3")}}}),
            "quantile_bias: gain: must be 1 with form: k3, which replaces the bias");
}

}  // namespace
}  // namespace moectl
