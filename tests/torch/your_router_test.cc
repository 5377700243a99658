// examples/your_router.cc as a user runs it: a healthy run, a resumed one, and each classic mistake.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>

#include "moectl/run_log.h"
#include "temp_dir.h"

namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Outcome {
  int code;
  std::string output;
};

Outcome run(const std::string& arguments) {
  FILE* pipe = popen((std::string(MOECTL_YOUR_ROUTER) + ' ' + arguments + " 2>&1").c_str(), "r");
  std::string output;
  std::array<char, 4096> chunk;
  while (const std::size_t size = std::fread(chunk.data(), 1, chunk.size(), pipe))
    output.append(chunk.data(), size);
  const int status = pclose(pipe);
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, output};
}

std::string output_with(const std::string& mistake, int steps = 25) {
  const Outcome outcome = run("--steps " + std::to_string(steps) + " --mistake " + mistake);
  EXPECT_EQ(outcome.code, 0) << outcome.output;
  return outcome.output;
}

// The smoothed MaxVio of each layer at the end of the run.
void expect_balance(const std::string& output) {
  const std::regex ratio(R"(: ([0-9.]+) x its sampling floor)");
  int layers = 0;
  for (std::sregex_iterator it(output.begin(), output.end(), ratio), end; it != end; ++it, ++layers)
    EXPECT_LT(std::stod((*it)[1]), 2) << output;
  EXPECT_EQ(layers, 3) << output;
}

// The step of the first notice.
int noticed_at(const std::string& output) {
  std::smatch found;
  return std::regex_search(output, found, std::regex(R"(step +(\d+) +layer \d+ +NOTICE)"))
             ? std::stoi(found[1])
             : -1;
}

TEST(YourRouter, AHealthyRunIsBalancedAndHearsNothing) {
  const Outcome outcome = run("--steps 60");
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  EXPECT_THAT(outcome.output, Not(HasSubstr("NOTICE")));
  EXPECT_THAT(outcome.output, HasSubstr("reason: skipped_step"));
  expect_balance(outcome.output);
}

TEST(YourRouter, ItGoesOnFromACheckpoint) {
  const auto folder =
      std::filesystem::temp_directory_path() / ("moectl_your_router_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  const std::string state = (folder / "run.pt").string(), log = (folder / "run.jsonl").string();
  ASSERT_EQ(run("--steps 12 --save " + state + " --log " + log).code, 0);
  const Outcome resumed = run("--steps 20 --resume " + state + " --log " + log);
  EXPECT_EQ(resumed.code, 0) << resumed.output;
  EXPECT_THAT(resumed.output, Not(HasSubstr("NOTICE")));
  std::ifstream in(log);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  EXPECT_THAT(text, HasSubstr("\"step\":19,"));
  std::filesystem::remove_all(folder);
}

TEST(YourRouter, EachMistakeIsNamed) {
  EXPECT_THAT(output_with("forget-bias"), HasSubstr("NOTICE: the router does not add the bias"));
  EXPECT_THAT(output_with("wrong-layer"), HasSubstr("layer 0  NOTICE: the router adds the bias of layer 1"));
  EXPECT_THAT(output_with("wrong-sign"), HasSubstr("NOTICE: the router subtracts the bias"));
  EXPECT_THAT(output_with("swap-storage"),
              HasSubstr("the tensor that the controller handed out now lies elsewhere"));
  EXPECT_THAT(output_with("replayed-routes"),
              HasSubstr("NOTICE: the recorded experts are not the k largest"));
}

// With these seeds the first biases are too small to tell whose they are, and yet make values that no probabilities give.
TEST(YourRouter, NothingElseIsSaidBeforeTheCause) {
  for (const char* mistake : {"forget-bias", "wrong-layer", "wrong-sign", "replayed-routes"})
    EXPECT_THAT(output_with(std::string(mistake) + " --seed 2"),
                AllOf(HasSubstr("NOTICE"), Not(HasSubstr("are no probabilities"))))
        << mistake;
}

TEST(YourRouter, MissingTopValuesAreAnErrorAtTheFirstStep) {
  const Outcome outcome = run("--steps 5 --mistake no-top-values");
  EXPECT_EQ(outcome.code, 1);
  EXPECT_THAT(outcome.output, HasSubstr("needs top_values: not given to record() on this rank"));
}

// Fifty steps after the mending: twenty steps more, over their sampling floor. A run that never made the mistake stands at 1.2
// to 1.6 there, and one that still makes it at 5 and more.
TEST(YourRouter, EachMistakeIsNoticedAndLeavesBalanceOnceItIsMended) {
  constexpr int kMended = 20, kBalanced = kMended + 50, kEnd = kBalanced + 20;
  for (const char* mistake :
       {"forget-bias", "wrong-layer", "wrong-sign", "swap-storage", "replayed-routes"}) {
    SCOPED_TRACE(mistake);
    const moectl::TempDir dir;
    const std::string output = output_with(
        std::string(mistake) + " --mend-at " + std::to_string(kMended) + " --log " + dir.path("run.jsonl"),
        kEnd);
    EXPECT_GE(noticed_at(output), 0) << output;
    EXPECT_LE(noticed_at(output), 20) << output;
    double max_vio = 0, floor = 0;
    int records = 0;
    moectl::LogReader log(dir.path("run.jsonl"));
    while (const auto record = log.next()) {
      if (record->tag != "train" || record->layer < 0 || record->step < kBalanced) continue;
      max_vio += record->metrics.at("max_vio");
      floor += record->metrics.at("sampling_floor_max_vio");
      ++records;
    }
    EXPECT_EQ(records, 3 * (kEnd - kBalanced));
    EXPECT_LT(max_vio / floor, 2.5);
  }
}

// No mistake: this is how a run may begin. What was decided in the shadow never was in force, and nothing jumps.
TEST(YourRouter, FromShadowToActiveNothingIsNoticed) {
  const std::string output = output_with("shadow-then-active", 140);
  EXPECT_EQ(noticed_at(output), -1) << output;
  expect_balance(output);
}

// pi on the weight of the auxiliary loss, while the model learns: at its target after sixty decisions.
TEST(YourRouter, PiIsAtItsTargetWhileTheModelLearns) {
  constexpr double kTarget = 0.25;
  const moectl::TempDir dir;
  dir.write("pi.yaml", R"(
version: 1
model: {layers: 3, experts: 16, top_k: 2}
aux_loss_weight:
  policy: pi
  options: {metric: excess_cv, target: 0.25}
  initial: 0.01
  scope: model
  limits: {max: 1, rate: 0.2, cadence: 5}
)");
  const Outcome outcome =
      run("--steps 450 --policy " + dir.path("pi.yaml") + " --log " + dir.path("run.jsonl"));
  ASSERT_EQ(outcome.code, 0) << outcome.output;
  double squares = 0, first = 0;
  int records = 0, first_records = 0;
  moectl::LogReader log(dir.path("run.jsonl"));
  while (const auto record = log.next()) {
    if (record->tag != "train" || record->layer < 0) continue;
    const double cv = record->metrics.at("load_cv"), floor = record->metrics.at("sampling_floor_cv");
    if (record->step < 25) {
      first += cv * cv - floor * floor;
      ++first_records;
    }
    if (record->step < 300) continue;
    squares += cv * cv - floor * floor;
    ++records;
  }
  ASSERT_EQ(records, 450);  // 150 steps of three layers
  EXPECT_NEAR(std::sqrt(squares / records), kTarget, 0.1 * kTarget);
  EXPECT_GT(std::sqrt(first / first_records), 1.5 * kTarget);  // it was not there by itself
}

TEST(YourRouter, UnknownOptionsAreRefused) {
  EXPECT_EQ(run("--stepz 5").code, 1);
  EXPECT_THAT(run("--mistake none").output, HasSubstr("one of forget-bias"));
}

}  // namespace
