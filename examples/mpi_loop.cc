// The loop of quickstart.cc on the ranks of an MPI job, without LibTorch: each rank records its own tokens, and all
// decide the same bits.
//
//   mpirun -n 4 mpi_loop [STEPS] [LAG]     by default 200 steps, each of which waits for its own sums (lag 0)
//
// Each step has 16 sequences, which are made from their number, so the job sees the same tokens on any number of ranks
// and prints the same hash of all its biases. Rank 0 has no tokens of its own unless it is alone, as a rank that serves
// another purpose may.
#include <mpi.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "moectl/controller.h"

namespace {

constexpr int kLayers = 2, kExperts = 8, kSequences = 16, kLength = 64;

/// Waits for the sums of the step.
moectl::Reduction blocking(MPI_Comm communicator) {
  return [=](std::span<std::int64_t> sums) {
    MPI_Allreduce(MPI_IN_PLACE, sums.data(), int(sums.size()), MPI_INT64_T, MPI_SUM, communicator);
  };
}

/// Starts to add them up, for `lag: 1`: the next step waits for them.
moectl::Reduction overlapping(MPI_Comm communicator) {
  return [=](std::span<std::int64_t> sums) {
    auto request = std::make_shared<MPI_Request>();
    MPI_Iallreduce(MPI_IN_PLACE, sums.data(), int(sums.size()), MPI_INT64_T, MPI_SUM, communicator,
                   request.get());
    return [request] { MPI_Wait(request.get(), MPI_STATUS_IGNORE); };
  };
}

/// The choices of one sequence under the biases in force. The made-up router prefers low indices.
std::vector<std::int64_t> route(int step, int layer, int sequence, std::span<const double> bias) {
  std::mt19937_64 random(static_cast<std::uint64_t>((step * kLayers + layer) * kSequences + sequence));
  std::normal_distribution<double> noise;
  std::vector<std::int64_t> chosen(kLength);
  for (std::int64_t& expert : chosen) {
    double best = -1e9;
    for (int i = 0; i < kExperts; ++i) {
      const double score = noise(random) - 0.2 * i + bias[static_cast<std::size_t>(i)];
      if (score > best) best = score, expert = i;
    }
  }
  return chosen;
}

void run(int rank, int ranks, int steps, int lag) {
  moectl::ControllerConfig config;
  config.lag = lag;
  config.model = {.layers = kLayers, .experts = kExperts, .top_k = 1};
  config.expert_bias.policy = "sign_bias";
  config.expert_bias.options.set("step", 0.01);
  config.expert_bias.limits.rate = 0.01;
  moectl::Controller controller(config);
  controller.set_reduction(lag == 0 ? blocking(MPI_COMM_WORLD) : overlapping(MPI_COMM_WORLD));

  std::string decisions;  // all biases after each step, byte by byte
  for (int step = 0; step < steps; ++step) {
    for (int layer = 0; layer < kLayers; ++layer) {
      for (int sequence = 0; sequence < kSequences; ++sequence) {
        if (ranks > 1 && 1 + sequence % (ranks - 1) != rank) continue;
        controller.record(layer, {.experts = route(step, layer, sequence, controller.bias(layer))});
      }
    }
    const moectl::StepReport& report = controller.step();
    for (int layer = 0; layer < kLayers; ++layer) {
      const std::span<const double> bias = controller.bias(layer);
      decisions.append(reinterpret_cast<const char*>(bias.data()), bias.size_bytes());
    }
    if (rank == 0 && step % 50 == 0)
      std::printf("step %3d  MaxVio %.3f\n", step, report.layers[0].metrics->max_vio.value_or(0));
  }
  std::printf("rank %d of %d: biases %016zx\n", rank, ranks, std::hash<std::string_view>()(decisions));
  // With lag 1 the last reduction is still under way: the controller's end waits for it, before MPI_Finalize.
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int rank = 0, ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  std::printf("rank %d: process %d\n", rank, static_cast<int>(getpid()));
  std::fflush(stdout);
  try {
    run(rank, ranks, argc > 1 ? std::atoi(argv[1]) : 200, argc > 2 ? std::atoi(argv[2]) : 0);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "mpi_loop: rank %d: %s\n", rank, error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);  // or the others would wait for this rank
  }
  MPI_Finalize();
}
