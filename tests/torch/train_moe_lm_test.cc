// The training example as a user runs it: on text files of one's own, stopped and resumed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

struct Outcome {
  int code;
  std::string output;
};

class TrainMoeLm : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string name = ::testing::UnitTest::GetInstance()->current_test_info()->name();
    folder_ = fs::temp_directory_path() / ("moectl_train_" + name + "_" + std::to_string(getpid()));
    fs::create_directories(folder_);
    // Two languages: words over different letters.
    write("first.txt", words("abcdefgh", 1));
    write("second.txt", words("qrstuvwxyz{}", 2));
    write_policy(0);
  }
  void write_policy(int lag) const {
    write("policy.yaml", "version: 1\nlag: " + std::to_string(lag) +
                             "\n"
                             "model: {layers: 2, experts: 8, top_k: 2}\n"
                             "expert_bias:\n  policy: adaptive_bias\n  limits: {rate: 16, center: true}\n");
  }
  void TearDown() override { fs::remove_all(folder_); }

  static std::string words(const std::string& letters, unsigned seed) {
    std::mt19937 random(seed);
    std::string text;
    while (text.size() < 30'000) {
      for (auto length = 2 + random() % 6; length > 0; --length) text += letters[random() % letters.size()];
      text += ' ';
    }
    return text;
  }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  void write(const std::string& name, const std::string& text) const { std::ofstream(path(name)) << text; }
  std::string read(const std::string& name) const {
    std::ifstream in(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }

  std::string command(const std::string& arguments, const std::string& program = MOECTL_TRAINER) const {
    return program + " --threads 1 --text " + path("first.txt") + " " + path("second.txt") + " --policy " +
           path("policy.yaml") + " --batch 4 --length 32 --validate-every 20 " + arguments;
  }
  Outcome run(const std::string& arguments, const std::string& program = MOECTL_TRAINER) const {
    FILE* pipe = popen((command(arguments, program) + " 2>&1").c_str(), "r");
    std::string output;
    std::array<char, 4096> chunk;
    while (const std::size_t size = std::fread(chunk.data(), 1, chunk.size(), pipe))
      output.append(chunk.data(), size);
    const int status = pclose(pipe);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
  }
  /// Starts the trainer without waiting for it.
  pid_t start(const std::string& arguments, const std::string& program = MOECTL_TRAINER) const {
    const std::string line = "exec " + command(arguments, program) + " >/dev/null 2>" + path("errors.txt");
    const char* const words[] = {"sh", "-c", line.c_str(), nullptr};
    pid_t child = -1;
    EXPECT_EQ(posix_spawn(&child, "/bin/sh", nullptr, nullptr, const_cast<char* const*>(words), environ), 0);
    return child;
  }
  static std::string final_loss(const std::string& output) {
    const std::size_t start = output.find("final loss ");
    return start == std::string::npos ? output : output.substr(start, output.find('\n', start) - start);
  }

  void workers_apply_the_same_bits();
  void a_killed_worker_is_an_error_on_the_others();

  fs::path folder_;
};

TEST_F(TrainMoeLm, AResumedRunContinuesBitForBit) {
  const Outcome straight = run("--steps 60 --log " + path("straight.jsonl"));
  ASSERT_EQ(straight.code, 0) << straight.output;
  const std::string checkpoint = " --checkpoint " + path("run.pt") + " --log " + path("resumed.jsonl");
  const Outcome begun = run("--steps 60 --until 30" + checkpoint);
  ASSERT_EQ(begun.code, 0) << begun.output;
  // Lines written after the checkpoint, as by a run that was killed later, come again and must not stand
  // twice.
  std::ofstream(path("resumed.jsonl"), std::ios::app) << "{\"step\":30,\"layer\":0,\"unfini";
  const Outcome resumed = run("--steps 60 --resume " + path("run.pt") + checkpoint);
  ASSERT_EQ(resumed.code, 0) << resumed.output;

  EXPECT_THAT(final_loss(straight.output), HasSubstr("final loss "));
  EXPECT_EQ(final_loss(resumed.output), final_loss(straight.output));
  EXPECT_NE(final_loss(begun.output), final_loss(straight.output));
  const std::string log = read("straight.jsonl");
  EXPECT_GT(log.size(), 10'000U);
  EXPECT_TRUE(read("resumed.jsonl") == log) << "the run logs differ";
}

TEST_F(TrainMoeLm, WithLagAResumedRunContinuesBitForBit) {
  write_policy(1);
  const Outcome straight = run("--steps 30 --log " + path("straight.jsonl"));
  ASSERT_EQ(straight.code, 0) << straight.output;
  const std::string checkpoint = " --checkpoint " + path("run.pt") + " --log " + path("resumed.jsonl");
  const Outcome begun = run("--steps 30 --until 14" + checkpoint);
  ASSERT_EQ(begun.code, 0) << begun.output;
  const Outcome resumed = run("--steps 30 --resume " + path("run.pt") + checkpoint);
  ASSERT_EQ(resumed.code, 0) << resumed.output;
  EXPECT_THAT(final_loss(straight.output), HasSubstr("final loss "));
  EXPECT_EQ(final_loss(resumed.output), final_loss(straight.output));
  EXPECT_TRUE(read("resumed.jsonl") == read("straight.jsonl")) << "the run logs differ";
}

TEST_F(TrainMoeLm, OfAnotherSizeInHalfPrecisionARunIsResumedBitForBit) {
  const std::string size = "--device cpu --width 32 --heads 2 --expert-hidden 48 --steps 20 ";
  const Outcome straight = run(size + "--bf16"), full = run(size);
  ASSERT_EQ(straight.code, 0) << straight.output;
  ASSERT_EQ(full.code, 0) << full.output;
  EXPECT_NE(final_loss(full.output), final_loss(straight.output)) << "the products were not rounded";
  ASSERT_EQ(run(size + "--bf16 --until 9 --checkpoint " + path("run.pt")).code, 0);
  const Outcome resumed = run(size + "--bf16 --resume " + path("run.pt"));
  ASSERT_EQ(resumed.code, 0) << resumed.output;
  EXPECT_THAT(final_loss(straight.output), HasSubstr("final loss "));
  EXPECT_EQ(final_loss(resumed.output), final_loss(straight.output));
}

TEST_F(TrainMoeLm, UnderAnotherPolicyTheRunGoesOnFromTheBiasesInForceHoweverItsLayersAreDivided) {
  write("policy.yaml",
        "version: 1\nmodel: {layers: 2, experts: 8, top_k: 2}\n"
        "expert_bias: {policy: sign_bias, options: {step: 0.01}}\n");
  ASSERT_EQ(run("--steps 40 --until 30 --log " + path("a.jsonl") + " --checkpoint " + path("run.pt")).code,
            0);
  fs::copy_file(path("a.jsonl"), path("b.jsonl"));
  write_policy(0);
  const std::string resume = "--steps 40 --resume " + path("run.pt");
  const Outcome strict = run(resume);
  EXPECT_EQ(strict.code, 1);
  EXPECT_THAT(strict.output, HasSubstr("expert_bias"));
  const std::string what_fits = resume + " --resume-controller what-fits --log ";
  const Outcome one = run(what_fits + path("a.jsonl")),
                two = run(what_fits + path("b.jsonl") + " --stages 2");
  ASSERT_EQ(one.code, 0) << one.output;
  ASSERT_EQ(two.code, 0) << two.output;
  EXPECT_THAT(one.output, HasSubstr("expert_bias.policy: dropped: sign_bias, now adaptive_bias"));
  EXPECT_EQ(final_loss(two.output), final_loss(one.output));
  EXPECT_TRUE(read("a.jsonl") == read("b.jsonl")) << "the run logs differ";

  const Outcome anew = run(resume + " --resume-controller none --log " + path("b.jsonl"));
  ASSERT_EQ(anew.code, 0) << anew.output;
  const std::string log = read("b.jsonl");
  const std::size_t before = log.find("\"step\":29,"), after = log.rfind("\"step\":30,");
  EXPECT_NE(before, std::string::npos) << "the steps before the checkpoint are lost";
  EXPECT_GT(after, before) << "a new controller goes on from the training's step";
  EXPECT_EQ(log.rfind("\"step\":0,"), log.rfind("\"step\":0,", before));
}

TEST_F(TrainMoeLm, BlocksAreAsTheLayerGroupsSayAndTheOthersDense) {
  write("policy.yaml",
        "version: 1\nmodel: {top_k: 2}\nlayers:\n  - {ids: [0, 1], experts: 8}\n"
        "  - {ids: [3], experts: 16, expert_bias: {policy: sign_bias, options: {step: 0.01}}}\n"
        "expert_bias: {policy: adaptive_bias}\n");
  const Outcome outcome = run("--steps 20 --log " + path("run.jsonl"));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const std::string log = read("run.jsonl");
  EXPECT_THAT(log, HasSubstr("\"step\":19,\"layer\":3"));
  EXPECT_EQ(log.find("\"layer\":2,"), std::string::npos);
}

TEST_F(TrainMoeLm, KilledAtAnyMomentItGoesOnFromAnIntactCheckpoint) {
  const Outcome straight = run("--steps 120 --log " + path("straight.jsonl"));
  ASSERT_EQ(straight.code, 0) << straight.output;

  // A checkpoint every step, so that many of the kills fall into one being written.
  const std::string checkpointed =
      "--steps 120 --checkpoint-every 1 --checkpoint " + path("run.pt") + " --log " + path("killed.jsonl");
  std::mt19937 random(1);
  for (int kill_number = 0; kill_number < 20; ++kill_number) {
    const bool begun = fs::exists(path("run.pt"));
    const pid_t trainer = start(checkpointed + (begun ? " --resume " + path("run.pt") : ""));
    std::this_thread::sleep_for(std::chrono::milliseconds(300 + random() % 700));
    kill(trainer, SIGKILL);
    int status = 0;
    waitpid(trainer, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status) || WEXITSTATUS(status) == 0) << read("errors.txt");
  }
  const bool begun = fs::exists(path("run.pt"));
  const Outcome last = run(checkpointed + (begun ? " --resume " + path("run.pt") : ""));
  ASSERT_EQ(last.code, 0) << last.output;
  EXPECT_EQ(final_loss(last.output), final_loss(straight.output));
  EXPECT_TRUE(read("killed.jsonl") == read("straight.jsonl")) << "the run logs differ";
}

TEST_F(TrainMoeLm, TheLogHoldsEveryStepAndTheValidationPasses) {
  const Outcome outcome = run("--steps 40 --log " + path("run.jsonl"));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  std::ifstream in(path("run.jsonl"));
  int train = 0, validation = 0, in_force = 0, with_floor = 0;
  for (std::string line; std::getline(in, line);) {
    if (line.find("\"counts\"") == std::string::npos) continue;
    if (line.find("\"tag\":\"validation\"") != std::string::npos) {
      ++validation;
    } else if (line.find("\"tag\":\"in_force\"") != std::string::npos) {
      ++in_force;
    } else {
      ++train;
    }
    if (line.find("\"sampling_floor_max_vio\"") != std::string::npos) ++with_floor;
  }
  EXPECT_EQ(train, 40 * 2);
  EXPECT_EQ(validation, 2 * 2);
  EXPECT_EQ(in_force, 2) << "of the last pass alone";
  EXPECT_EQ(with_floor, train + validation + in_force);
}

TEST_F(TrainMoeLm, TheLogSaysWhatEachExpertCostsAndWhichDomainItServes) {
  write("policy.yaml", read("policy.yaml") + "collect: {latencies: true}\n");
  const Outcome outcome = run("--steps 20 --log " + path("run.jsonl"));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  const auto lines_with = [log = read("run.jsonl")](const std::string& key) {
    int lines = 0;
    std::istringstream in(log);
    for (std::string line; std::getline(in, line);)
      lines += line.find("\"" + key + "\":") != std::string::npos;
    return lines;
  };
  EXPECT_EQ(lines_with("expert_loss"), 20 * 2) << "of every step and layer";
  EXPECT_EQ(lines_with("latency"), 20 * 2);
  EXPECT_EQ(lines_with("grad_norm"), 2 * 2) << "of every tenth step";
  EXPECT_EQ(lines_with("domain_counts"), 20 * 2 + 2 * 2)
      << "and of the validation pass, with two kinds of biases";
  EXPECT_THAT(outcome.output, HasSubstr("experts that serve each domain most"));
  EXPECT_THAT(outcome.output, HasSubstr("layer 1  first.txt: "));
}

TEST_F(TrainMoeLm, PlainLinesWhereThereIsNoTerminal) {
  const Outcome outcome = run("--steps 40");
  EXPECT_THAT(outcome.output, HasSubstr("policy 40/40  loss "));
  EXPECT_THAT(outcome.output, HasSubstr("MaxVio"));
  EXPECT_EQ(outcome.output.find('\r'), std::string::npos);
}

TEST_F(TrainMoeLm, NamesTheError) {
  EXPECT_EQ(run("--no-such-option").code, 2);
  const Outcome missing = run("--text " + path("none.txt"));
  EXPECT_EQ(missing.code, 1);
  EXPECT_THAT(missing.output, HasSubstr("none.txt"));
  const Outcome nowhere = run("--device toaster");
  EXPECT_EQ(nowhere.code, 1);
  EXPECT_THAT(nowhere.output, HasSubstr("--device toaster: "));
  EXPECT_THAT(run("--width 30").output, HasSubstr("--width: must be a multiple of --heads"));
  write("short.txt", "too short");
  EXPECT_THAT(run("--text " + path("short.txt")).output, HasSubstr("short.txt"));
  write("policy.yaml", "version: 1\nmodel: {layers: 2, experts: 8, top_k: 2}\nexpert_bias: {polcy: fixed}\n");
  const Outcome wrong = run("--steps 5");
  EXPECT_EQ(wrong.code, 1);
  EXPECT_THAT(wrong.output, HasSubstr("policy.yaml:3:"));
}

TEST_F(TrainMoeLm, WorkersApplyTheSameBits) {
  for (const int lag : {0, 1}) {
    write_policy(lag);
    workers_apply_the_same_bits();
  }
}

void TrainMoeLm::workers_apply_the_same_bits() {
  const Outcome outcome = run("--workers 3 --steps 30 --log " + path("run.jsonl"), MOECTL_DISTRIBUTED);
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  std::vector<std::string> states;
  const std::string mark = ": controller state ";
  for (std::size_t at = outcome.output.find(mark); at != std::string::npos;
       at = outcome.output.find(mark, at + 1)) {
    states.push_back(outcome.output.substr(at + mark.size(), 16));
  }
  ASSERT_EQ(states.size(), 3U) << outcome.output;
  EXPECT_THAT(states, ::testing::Each(states[0]));
  // The controllers saw the whole batch: 4 sequences of 32 bytes.
  EXPECT_THAT(read("run.jsonl"), HasSubstr("\"tokens\":128"));
}

TEST_F(TrainMoeLm, AWorkerKilledMidRunIsAnErrorOnTheOthers) {
  a_killed_worker_is_an_error_on_the_others();
}

TEST_F(TrainMoeLm, WithLagAWorkerKilledMidRunIsAnErrorOnTheOthers) {
  write_policy(1);
  a_killed_worker_is_an_error_on_the_others();
}

void TrainMoeLm::a_killed_worker_is_an_error_on_the_others() {
  const pid_t parent =
      start("--workers 3 --steps 1000000 --timeout 10 --log " + path("run.jsonl"), MOECTL_DISTRIBUTED);
  const auto until = [](auto done) {
    for (int i = 0; i < 1200 && !done(); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(50));
    return done();
  };
  ASSERT_TRUE(until([&] {
    return fs::exists(path("run.jsonl")) && fs::file_size(path("run.jsonl")) > 20'000;
  })) << read("errors.txt");
  std::ifstream children("/proc/" + std::to_string(parent) + "/task/" + std::to_string(parent) + "/children");
  pid_t victim = 0;
  children >> victim;
  ASSERT_GT(victim, 0);
  kill(victim, SIGKILL);

  int status = 0;
  const bool ended =
      until([&] { return waitpid(parent, &status, WNOHANG) == parent || kill(parent, 0) != 0; });
  if (!ended) kill(parent, SIGKILL);
  ASSERT_TRUE(ended) << "the others hang";
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_THAT(read("errors.txt"), HasSubstr("worker 0: "));
}

}  // namespace
