// Controllers on several ranks, over Gloo on the loopback interface: each rank a thread with its own
// connections.
#include "moectl/torch/process_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <vector>

#include "moectl/torch/batch_counts.h"
#include "moectl/torch/controller.h"
#include "moectl/torch/evaluation.h"
#include "moectl/torch/router.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::torch::Tensor;

constexpr int kLayers = 2, kExperts = 8, kTopK = 2;

ControllerConfig test_config(int lag = 0) {
  ControllerConfig config;
  config.lag = lag;
  config.model.layers = kLayers;
  config.model.experts = kExperts;
  config.model.top_k = kTopK;
  config.collect = {.gap = true, .sequences = true};
  config.expert_bias.policy = "adaptive_bias";
  config.expert_bias.limits.rate = 16;
  config.expert_bias.limits.center = true;
  return config;
}

using Group = c10::intrusive_ptr<c10d::ProcessGroupGloo>;

/// Runs `body(rank, group)` on every rank and waits for all. An exception of any rank fails the test.
void on_ranks(int ranks, const std::function<void(int, const Group&)>& body) {
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
        options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface("lo"));
        options->threads = 1;
        body(rank, c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, ranks, options));
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

/// The routing of one sequence of a recorded stream: who chose what depends on (step, sequence) alone.
struct Sequence {
  Tensor indices;     // [1, length, k]
  Tensor top_values;  // [1, length, k + 1]
};

Sequence recorded(int step, int layer, int sequence) {
  ::torch::Generator random =
      at::detail::createCPUGenerator(static_cast<std::uint64_t>((step * 7 + layer) * 64 + sequence));
  const std::int64_t length = 1 + (sequence * 5) % 11;
  // Experts differ in how wanted they are, and the wish drifts.
  const Tensor wish = ::torch::linspace(0, 1.5, kExperts).roll(step / 50);
  const auto [values, indices] = (::torch::randn({1, length, kExperts}, random) + wish).topk(kTopK + 1, -1);
  return {indices.narrow(-1, 0, kTopK).contiguous(), values.contiguous()};
}

constexpr int kSequences = 16;

/// Biases of all layers after each step, of one rank that records the sequences `mine`.
template <typename Mine>
std::vector<float> run_stream(TorchController& controller, int steps, Mine mine) {
  std::vector<float> biases;
  for (int step = 0; step < steps; ++step) {
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int sequence = 0; sequence < kSequences; ++sequence) {
        if (!mine(sequence)) continue;
        const Sequence one = recorded(step, layer, sequence);
        controller.record(layer, one.indices, {.top_values = one.top_values, .micro_batch = sequence});
      }
    }
    controller.step();
    for (int layer = 0; layer < kLayers; ++layer) {
      const float* bias = controller.bias(layer).data_ptr<float>();
      biases.insert(biases.end(), bias, bias + kExperts);
    }
  }
  return biases;
}

TEST(ProcessGroup, OneStreamSplitOverAnyNumberOfRanksGivesTheSameBits) {
  constexpr int kSteps = 300;
  TorchController alone(test_config());
  const std::vector<float> expected = run_stream(alone, kSteps, [](int) { return true; });
  EXPECT_GT(*std::max_element(expected.begin(), expected.end()), 0.1F) << "the biases have work to do";
  for (const int ranks : {2, 4, 8}) {
    on_ranks(ranks, [&](int rank, const Group& group) {
      TorchController controller(test_config());
      controller.controller().set_reduction(reduce_over(group));
      // Uneven shares: rank 0 has none at all, the last has what is left of the division among the others.
      const auto mine = [&](int sequence) { return 1 + sequence * sequence % (ranks - 1) == rank; };
      EXPECT_TRUE(run_stream(controller, kSteps, mine) == expected) << "rank " << rank << " of " << ranks;
    });
  }
}

TEST(ProcessGroup, ReplicatedSumsCountOnce) {
  TorchController alone(test_config());
  const std::vector<float> expected = run_stream(alone, 20, [](int) { return true; });
  on_ranks(3, [&](int, const Group& group) {
    TorchController controller(test_config());
    controller.controller().set_reduction(reduce_over(group, {.scope = ReductionScope::kReplicated}));
    EXPECT_TRUE(run_stream(controller, 20, [](int) { return true; }) == expected);
    EXPECT_EQ(controller.report().layers[0].stats->tokens(), alone.report().layers[0].stats->tokens());
  });
}

/// The message of the ReductionError that the next step ends in, or empty.
std::string step_error(TorchController& controller) {
  try {
    controller.step();
  } catch (const ReductionError& error) {
    return error.what();
  }
  return "";
}

TEST(ProcessGroup, ReplicatedSumsThatDifferAreAnError) {
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(test_config());
    controller.controller().set_reduction(reduce_over(group, {.scope = ReductionScope::kReplicated}));
    controller.record(0, recorded(0, 0, rank).indices);
    EXPECT_THAT(step_error(controller), HasSubstr("different sums"));
  });
}

TEST(ProcessGroup, RanksWithDifferentLayersOrConfigsFailInsteadOfBlocking) {
  on_ranks(2, [&](int rank, const Group& group) {
    ControllerConfig config = test_config();
    if (rank == 1) config.model.layers = kLayers + 1;  // another payload size
    TorchController controller(config);
    controller.controller().set_reduction(reduce_over(group));
    EXPECT_THAT(step_error(controller), HasSubstr("disagree"));
  });
}

TEST(ProcessGroup, ARankThatHasDivergedIsAnError) {
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(test_config());
    controller.controller().set_reduction(reduce_over(group));
    run_stream(controller, 5, [&](int sequence) { return sequence % 2 == rank; });
    if (rank == 1) {
      // One rank resumes from an older state than the other.
      TorchController other(test_config());
      controller.load(other.save());
      controller.controller().set_reduction(reduce_over(group));
    }
    if (rank == 0) controller.controller().set_reduction(reduce_over(group));
    EXPECT_THAT(step_error(controller), HasSubstr("diverged"));
  });
}

TEST(ProcessGroup, ALostRankIsAnErrorWithinTheTimeOutAndChangesNothing) {
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(test_config());
    controller.controller().set_reduction(reduce_over(group, {.timeout = std::chrono::milliseconds(1500)}));
    run_stream(controller, 5, [&](int sequence) { return sequence % 2 == rank; });
    if (rank == 1) return;  // gone, with its connections
    const Sequence one = recorded(5, 0, 0);
    controller.record(0, one.indices, {.top_values = one.top_values});
    const std::string before = controller.save();
    const Tensor bias = controller.bias(0).clone();
    const auto start = std::chrono::steady_clock::now();
    EXPECT_NE(step_error(controller), "");
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
    EXPECT_TRUE(controller.bias(0).equal(bias)) << "the last applied values stay in force";
    EXPECT_EQ(controller.save(), before) << "the step can be tried again";
  });
}

TEST(ProcessGroup, ASlowRankIsAnErrorWithinTheTimeOut) {
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(test_config());
    controller.controller().set_reduction(reduce_over(group, {.timeout = std::chrono::milliseconds(500)}));
    if (rank == 1) {
      std::this_thread::sleep_for(std::chrono::seconds(3));
      return;
    }
    const auto start = std::chrono::steady_clock::now();
    EXPECT_NE(step_error(controller), "");
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(2500));
  });
}

TEST(ProcessGroup, WithLagOneStreamSplitOverRanksGivesTheSameBits) {
  constexpr int kSteps = 100;
  TorchController alone(test_config(1));
  const std::vector<float> expected = run_stream(alone, kSteps, [](int) { return true; });
  EXPECT_GT(*std::max_element(expected.begin(), expected.end()), 0.1F) << "the biases have work to do";
  for (const int ranks : {2, 4}) {
    on_ranks(ranks, [&](int rank, const Group& group) {
      TorchController controller(test_config(1));
      controller.controller().set_reduction(reduce_over(group));
      const auto mine = [&](int sequence) { return sequence % ranks == rank; };
      EXPECT_TRUE(run_stream(controller, kSteps, mine) == expected) << "rank " << rank << " of " << ranks;
    });
  }
}

TEST(ProcessGroup, WithLagTheBiasesAreThoseWithoutOnAStreamShiftedByAStep) {
  constexpr int kSteps = 60;
  ControllerConfig late = test_config();
  late.model.delay = 1;  // what the lag declares by itself
  late.safety.responsiveness = false;
  late.expert_bias.options.set("form",
                               std::string("counts"));  // the width of near gaps is one step older with lag
  TorchController shifted(late);
  shifted.step();  // nothing has arrived yet
  std::vector<float> expected(kLayers * kExperts, 0.0F);
  const std::vector<float> rest = run_stream(shifted, kSteps - 1, [](int) { return true; });
  expected.insert(expected.end(), rest.begin(), rest.end());
  ControllerConfig lagging = test_config(1);
  lagging.safety.responsiveness = false;
  lagging.expert_bias.options = late.expert_bias.options;
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(lagging);
    controller.controller().set_reduction(reduce_over(group));
    EXPECT_TRUE(run_stream(controller, kSteps, [&](int sequence) { return sequence % 2 == rank; }) ==
                expected);
  });
}

TEST(ProcessGroup, WithLagReplicatedSumsCountOnceAndMustAgree) {
  TorchController alone(test_config(1));
  const std::vector<float> expected = run_stream(alone, 20, [](int) { return true; });
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(test_config(1));
    controller.controller().set_reduction(reduce_over(group, {.scope = ReductionScope::kReplicated}));
    EXPECT_TRUE(run_stream(controller, 20, [](int) { return true; }) == expected);
    controller.record(0, recorded(0, 0, rank).indices);
    EXPECT_EQ(step_error(controller), "") << "the sums that differ have only left";
    EXPECT_THAT(step_error(controller), HasSubstr("different sums"));
  });
}

TEST(ProcessGroup, WithLagALostRankIsAnErrorAtTheNextStepAndChangesNothing) {
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(test_config(1));
    controller.controller().set_reduction(reduce_over(group, {.timeout = std::chrono::milliseconds(1500)}));
    run_stream(controller, 5, [&](int sequence) { return sequence % 2 == rank; });
    if (rank == 1) return;  // gone, with its connections
    const auto start = std::chrono::steady_clock::now();
    std::string error;
    // The sums of the last common step have arrived; those that leave now never will.
    for (int tries = 0; error.empty() && tries < 2; ++tries) {
      controller.record(0, recorded(5 + tries, 0, 0).indices);
      error = step_error(controller);
    }
    EXPECT_NE(error, "");
    const std::string before = controller.save();
    const Tensor bias = controller.bias(0).clone();
    EXPECT_NE(step_error(controller), "");
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
    EXPECT_TRUE(controller.bias(0).equal(bias)) << "the last applied values stay in force";
    EXPECT_EQ(controller.save(), before) << "the step can be tried again";
    // Alone it goes on, with the sums that were under way.
    controller.controller().set_reduction(nullptr);
    EXPECT_GT(controller.step().layers[0].stats->tokens(), 0);
  });
}

TEST(ProcessGroup, WithLagASlowRankIsAnErrorWithinTheTimeOut) {
  on_ranks(2, [&](int rank, const Group& group) {
    TorchController controller(test_config(1));
    controller.controller().set_reduction(reduce_over(group, {.timeout = std::chrono::milliseconds(500)}));
    controller.step();
    if (rank == 1) {
      std::this_thread::sleep_for(std::chrono::seconds(3));
      return;
    }
    controller.step();
    const auto start = std::chrono::steady_clock::now();
    EXPECT_NE(step_error(controller), "");
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(2500));
  });
}

/// A collective over one rank that says when it was started and waited for.
struct SpyWork : c10d::Work {
  explicit SpyWork(std::vector<std::string>& log_in) : log(log_in) { finish(); }
  bool wait(std::chrono::milliseconds) override {
    log.push_back("wait");
    return true;
  }
  std::vector<std::string>& log;
};

TEST(ProcessGroup, WithLagTheCollectiveIsStartedByOneStepAndWaitedForByTheNext) {
  std::vector<std::string> log;
  const StartAllReduce start = [&](std::vector<at::Tensor>&, const c10d::AllreduceOptions&) {
    log.push_back("start");
    return c10::intrusive_ptr<c10d::Work>(c10::make_intrusive<SpyWork>(log));
  };
  for (const int lag : {0, 1}) {
    log.clear();
    TorchController controller(test_config(lag));
    controller.controller().set_reduction(reduce_with(start, 1));
    controller.step();
    for (int step = 0; step < 2; ++step) {
      log.push_back("forward and backward");
      controller.step();
    }
    const std::vector<std::string> check = {"start", "wait"};
    std::vector<std::string> expected = check;
    if (lag == 0) {
      expected.insert(expected.end(), {"start", "wait", "forward and backward", "start", "wait",
                                       "forward and backward", "start", "wait"});
    } else {
      expected.insert(expected.end(), {"start", "forward and backward", "wait", "start",
                                       "forward and backward", "wait", "start"});
    }
    EXPECT_EQ(log, expected) << "lag " << lag;
  }
}

TEST(ProcessGroup, WithLagACallableMayReturnAWait) {
  TorchController controller(test_config(1)), blocking(test_config(1)), alone(test_config(1));
  const auto all = [](int) { return true; };
  int waits = 0;
  controller.controller().set_reduction([&](std::span<std::int64_t>) {  // as with MPI_Iallreduce
    return [&] { ++waits; };
  });
  blocking.controller().set_reduction([](std::span<std::int64_t>) {});  // as with MPI_Allreduce
  const std::vector<float> expected = run_stream(alone, 5, all);
  EXPECT_EQ(run_stream(controller, 5, all), expected);
  EXPECT_EQ(run_stream(blocking, 5, all), expected);
  EXPECT_EQ(waits, 1 + 4) << "the check at the start, and all but the last, which is on its way";
}

TEST(ProcessGroup, AnyCallableWillDo) {
  TorchController controller(test_config()), alone(test_config());
  int calls = 0;
  controller.controller().set_reduction([&](std::span<std::int64_t>) { ++calls; });
  const auto all = [](int) { return true; };
  EXPECT_EQ(run_stream(controller, 3, all), run_stream(alone, 3, all));
  EXPECT_EQ(calls, 3 + 1) << "one collective a step, and one at the start";
}

// Qwen, 2501.11873: with f of the global batch, the mean over ranks of the gradients is that of one process with all tokens.
TEST(ProcessGroup, TheBalanceLossOfTheGlobalBatchIsThatOfOneProcess) {
  constexpr int kRanks = 2;
  ::torch::manual_seed(7);
  TopKRouter whole(TopKRouterOptions(6, kExperts, kTopK).gate(Gate::kSoftmax));
  whole->to(::torch::kDouble);
  // The ranks' tokens differ in kind: each prefers experts of its own.
  const Tensor tokens = ::torch::randn({kRanks, 40, 6}, ::torch::kDouble) +
                        ::torch::randn({kRanks, 1, 6}, ::torch::kDouble) * 2;
  const Tensor alone = whole->forward(tokens.reshape({-1, 6})).balance_loss;
  alone.backward();
  Tensor sum = ::torch::zeros_like(whole->weight), own = sum.clone();
  double loss = 0;
  std::mutex mutex;
  on_ranks(kRanks, [&](int rank, const Group& group) {
    TopKRouter router(TopKRouterOptions(6, kExperts, kTopK).gate(Gate::kSoftmax));
    router->to(::torch::kDouble);
    {
      const ::torch::NoGradGuard no_grad;
      router->weight.copy_(whole->weight);
    }
    BatchCounts counts(sum_over(group));
    const Tensor part =
        router->forward(tokens[rank], {.counts_over_batch = counts.of(0)}).balance_loss / kRanks;
    const Tensor gradient = ::torch::autograd::grad({part}, {router->weight})[0];
    const Tensor local = router->forward(tokens[rank]).balance_loss / kRanks;
    const std::lock_guard lock(mutex);
    sum += gradient;
    own += ::torch::autograd::grad({local}, {router->weight})[0];
    loss += part.item<double>();
  });
  EXPECT_NEAR(loss, alone.item<double>(), 1e-12);
  EXPECT_LT((sum - whole->weight.grad()).abs().max().item<double>(), 1e-12);
  EXPECT_GT((own - whole->weight.grad()).abs().max().item<double>(), 1e-3) << "each micro-batch by itself";
}

TEST(ProcessGroup, AnEvaluationOverRanksIsThatOfOneProcess) {
  const Controller controller(test_config());
  EvaluationMeter alone(controller);
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int s = 0; s < kSequences; ++s) {
      const Sequence one = recorded(3, layer, s);
      alone.record(layer, one.indices, {.top_values = one.top_values});
    }
  }
  const StepReport& expected = alone.report(0);
  constexpr int kRanks = 3;
  on_ranks(kRanks, [&](int rank, const Group& group) {
    EvaluationMeter meter(controller);
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int s = 0; s < kSequences; ++s) {
        if (s % kRanks != rank || rank == 2) continue;  // the last rank has no data
        const Sequence one = recorded(3, layer, s);
        meter.record(layer, one.indices, {.top_values = one.top_values});
      }
      for (int s = 2; s < kSequences && rank == 0; s += kRanks) {
        const Sequence one = recorded(3, layer, s);
        meter.record(layer, one.indices, {.top_values = one.top_values});
      }
    }
    meter.sum_over_ranks(reduce_over(group));
    const StepReport& report = meter.report(0);
    for (std::size_t l = 0; l < kLayers; ++l) {
      const auto sums = report.layers[l].stats->flat(), whole = expected.layers[l].stats->flat();
      EXPECT_TRUE(std::equal(sums.begin(), sums.end(), whole.begin(), whole.end()));
      EXPECT_EQ(report.layers[l].metrics->max_vio, expected.layers[l].metrics->max_vio);
      EXPECT_EQ(report.layers[l].metrics->sampling_floor_cv, expected.layers[l].metrics->sampling_floor_cv);
    }
  });
}

}  // namespace
}  // namespace moectl
