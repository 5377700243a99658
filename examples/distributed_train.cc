// The main job on several processes of this machine: data-parallel, over Gloo on the loopback interface.
//
//   distributed_train --workers 4 --policy policies/adaptive_bias.yaml
//
// Every worker takes its share of every batch; gradients are summed, and so are the counts that the
// controllers see. All controllers then decide the same bits: each step they check one another, and a worker
// that dies is an error on the others.

#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <vector>

#include "moectl/torch/process_group.h"
#include "trainer.h"

namespace {

using Group = c10::intrusive_ptr<c10d::ProcessGroupGloo>;

/// Workers find one another through a file.
Group join(const std::string& meeting_place, int rank, int ranks, std::chrono::milliseconds timeout) {
  auto options = c10d::ProcessGroupGloo::Options::create(timeout);
  options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForInterface("lo"));
  const auto store = c10::make_intrusive<c10d::FileStore>(meeting_place, ranks);
  return c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, ranks, options);
}

void work(const Arguments& arguments, const std::string& meeting_place, int rank, int ranks,
          double timeout_seconds) {
  const std::chrono::milliseconds timeout(static_cast<std::int64_t>(1e3 * timeout_seconds));
  const Group group = join(meeting_place, rank, ranks, timeout);
  Peers peers{.rank = rank, .ranks = ranks};
  peers.sum_counts = moectl::reduce_over(group, {.timeout = timeout});
  peers.sum = [group](torch::Tensor& tensor) {
    std::vector<torch::Tensor> tensors{tensor};
    group->allreduce(tensors, {})->wait();
  };
  Training training(arguments, peers);
  training.run();
  std::printf("worker %d: controller state %016zx\n", rank,
              std::hash<std::string>()(training.controller_state()));
}

/// Starts this program again as worker `rank`.
pid_t start_worker(std::vector<std::string> words, const std::string& meeting_place, int rank) {
  words.insert(words.end(), {"--rank", std::to_string(rank), "--meeting-place", meeting_place});
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    execv("/proc/self/exe", argv.data());
    _exit(127);
  }
  if (child < 0) throw std::runtime_error("cannot start a worker");
  return child;
}

}  // namespace

int main(int argc, char** argv) {
  restart_with_passive_threads(argv);
  Arguments arguments;
  arguments.threads = 1;
  int workers = 2, rank = 0;
  double timeout = 60;
  std::string meeting_place;
  CLI::App app("Trains the model of train_moe_lm on several processes of this machine.");
  arguments.declare(app);
  app.add_option("--workers", workers, "Processes")->check(CLI::Range(1, 64));
  app.add_option("--timeout", timeout, "Seconds after which a worker that does not answer is given up")
      ->check(CLI::PositiveNumber);
  app.add_option("--rank", rank, "Used between the processes")->group("");
  app.add_option("--meeting-place", meeting_place, "Used between the processes")->group("");
  try {
    app.parse(argc, argv);
    if (arguments.sequences < workers)
      throw CLI::ValidationError("--workers", "more workers than sequences in a batch");
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  set_up_threads(arguments.threads);
  const bool parent = meeting_place.empty();
  std::vector<pid_t> children;
  int code = 0;
  try {
    if (parent) {
      meeting_place =
          (std::filesystem::temp_directory_path() / ("moectl_workers_" + std::to_string(getpid()))).string();
      const std::vector<std::string> words(argv, argv + argc);
      for (int other = 1; other < workers; ++other)
        children.push_back(start_worker(words, meeting_place, other));
    }
    work(arguments, meeting_place, rank, workers, timeout);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "distributed_train: worker %d: %s\n", rank, error.what());
    code = 1;
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) code = 1;
  }
  if (parent) std::filesystem::remove(meeting_place);
  // A group that has lost a worker can hang in its own destruction.
  std::fflush(nullptr);
  _exit(code);
}
