// examples/demo.sh around a training that only writes a log: what it shows, and what it does when things go wrong.
#include <gmock/gmock.h>

#include <filesystem>

#include "test_paths.h"
#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

namespace fs = std::filesystem;

class Demo : public ::testing::Test {
 protected:
  /// Lays out a checkout.
  Demo() {
    for (const char* folder : {"examples", "build/release/examples"})
      fs::create_directories(dir_.path(folder));
    fs::copy(MOECTL_SOURCE_DIR "/examples/demo.sh", dir_.path("examples/demo.sh"));
    fs::create_symlink(MOECTL_TOOL, dir_.path("build/release/moectl"));
  }
  /// The training is this shell text, run with its log in $log.
  void train(const std::string& text) {
    const std::string path =
        dir_.write("build/release/examples/train_moe_lm",
                   "#!/bin/sh\nwhile [ $# -gt 0 ]; do [ \"$1\" != --log ] || log=$2; shift; done\n" + text);
    fs::permissions(path, fs::perms::owner_all);
  }
  int run(const std::string& before, const std::string& options = "") {
    const std::string command = "cd '" + dir_.path("") + "' && " + before + " examples/demo.sh --steps 40 " +
                                options + " </dev/null >out 2>err";
    const int status = std::system(command.c_str());
    out_ = TempDir::read(dir_.path("out"));
    err_ = TempDir::read(dir_.path("err"));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  TempDir dir_;
  std::string out_, err_;
};

constexpr const char* kTraining = R"(
echo '{"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}}' >"$log"
i=0
while [ $i -lt 40 ]; do
  echo '{"step":'$i',"layer":0,"tokens":100,"counts":[60,40],"loss":2.5}' >>"$log"
  i=$((i + 1))
  [ $i != 20 ] || sleep 1
done
echo "validation after the last step" >&2
echo "final loss 2.5"
)";

TEST_F(Demo, ShowsEachRunWhileItTrainsAndThenItsResults) {
  train(kTraining);
  ASSERT_EQ(run("sh"), 0) << err_;
  // A line every twentieth of the run, from `watch`; then what the training said; twice.
  std::size_t at = 0;
  for (const char* text :
       {"== uncontrolled, seed 1", "\nstep 0  loss 2.5  max_vio 0.2 ", "\nstep 38  loss",
        "\nvalidation after the last step\nfinal loss 2.5\n", "== controlled, seed 1", "\nstep 38 ",
        "\nfinal loss 2.5\n", "runs/demo/report.html", "\nruns/demo/controlled-s1.jsonl  "}) {
    at = out_.find(text, at);
    ASSERT_NE(at, std::string::npos) << text << " is not in its place in:\n" << out_;
  }
  EXPECT_THAT(out_, Not(HasSubstr("\nstep 39 ")));
  EXPECT_EQ(err_, "");
}

TEST_F(Demo, FailsAsTheTrainingDoes) {
  train("echo 'cannot read the text' >&2; exit 7\n");
  EXPECT_EQ(run("sh"), 7);
  EXPECT_THAT(out_, HasSubstr("cannot read the text"));
  EXPECT_THAT(out_, Not(HasSubstr("== controlled")));
  train(std::string(kTraining) + "exit 3\n");
  EXPECT_EQ(run("sh"), 3);
  EXPECT_THAT(out_, HasSubstr("final loss 2.5"));
}

TEST_F(Demo, AWrongOptionIsNamedBeforeAnythingRuns) {
  for (const auto& [options, said] :
       {std::pair{"--steps many", "--steps: 'many': must be a whole number above 0"},
        std::pair{"--seeds", "--seeds: '': must be a whole number above 0"},
        std::pair{"--seeds 0", "--seeds: '0': must be a whole number above 0"},
        std::pair{"--policy none.yaml", "--policy: 'none.yaml': must be a config"},
        std::pair{"--text", "--text: must be followed by files"},
        std::pair{"--text none.txt", "--text: 'none.txt': must be a file that can be read"},
        std::pair{"--step 3", "no option '--step'"}}) {
    EXPECT_EQ(run("sh", options), 2) << options;
    EXPECT_THAT(err_, HasSubstr(said));
    EXPECT_EQ(out_, "");
  }
  // Nor does ./dev install or build anything before.
  fs::copy(MOECTL_SOURCE_DIR "/dev", dir_.path("dev"));
  EXPECT_EQ(std::system(("cd '" + dir_.path("") + "' && ./dev demo --step 3 >out 2>err").c_str()), 2 << 8);
  EXPECT_EQ(TempDir::read(dir_.path("out")), "");
  EXPECT_THAT(TempDir::read(dir_.path("err")), HasSubstr("no option '--step'"));
}

// The training, which is in the background, must not outlive the demo: not after Ctrl-C, and not when a signal reaches
// the script alone, while `watch` waits for a training that never ends.
TEST_F(Demo, ASignalEndsTheTrainingToo) {
  train("echo $$ >pid; trap 'echo ended >last; exit' TERM; while :; do sleep .1; done\n");
  const auto expect_ended = [this] {
    EXPECT_EQ(TempDir::read(dir_.path("last")), "ended\n");
    const std::string pid = TempDir::read(dir_.path("pid"));
    EXPECT_NE(pid, "");
    EXPECT_FALSE(fs::exists("/proc/" + pid.substr(0, pid.find('\n'))));
  };
  EXPECT_EQ(run("timeout --signal=INT 2 sh"), 124);
  expect_ended();
  fs::remove(dir_.path("last"));
  EXPECT_EQ(run("timeout 60 sh -c 'sh \"$@\" & sleep 2; kill $!; wait $!' sh"), 143);
  expect_ended();
}

}  // namespace
}  // namespace moectl
