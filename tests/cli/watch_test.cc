#include <gmock/gmock.h>

#include <chrono>
#include <thread>

#include "test_paths.h"
#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string record(int step, int layer, const std::string& counts) {
  return R"({"step":)" + std::to_string(step) + R"(,"layer":)" + std::to_string(layer) +
         R"(,"tokens":100,"top_k":1,"loss":2.5,"counts":)" + counts + "}\n";
}

TEST(Watch, PrintsALineAStep) {
  const TempDir dir;
  const ToolResult result = run_tool(
      dir, "watch -", record(3, 0, "[60,40]") + record(3, 1, "[80,20]") + "torn\n" + record(4, 0, "[50,50]"));
  ASSERT_EQ(result.code, 0) << result.err;
  ASSERT_EQ(result.lines().size(), 2U);
  // MaxVio 0.2 and 0.6; the floor of 100 tokens on 2 experts is 0.0823, that of the CV 0.1.
  EXPECT_EQ(result.lines()[0],
            "step 3  loss 2.5  max_vio 0.4 (4.862x noise floor)  cv 0.4 (4x noise floor)  dead 0");
  EXPECT_EQ(result.lines()[1], "step 4  loss 2.5  max_vio 0 (0x noise floor)  cv 0 (0x noise floor)  dead 0");
  EXPECT_THAT(result.err, HasSubstr("skipped: <stdin>:3: line: not JSON"));
}

TEST(Watch, SaysOfAFileWithoutRecordsThatThereAreNone) {
  const TempDir dir;
  dir.write("notes.md", "# Notes\n\nNot a log.\n");
  const auto result = run_tool(dir, "watch notes.md --once");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("notes.md: holds no record that can be read"));
}

TEST(Watch, SaysOfALogWithoutTrainingThatThereIsNone) {
  const TempDir dir;
  dir.write("other.jsonl",
            R"({"step":0,"layer":0,"tag":"validation","tokens":8,"top_k":2,"counts":[5,4,4,3]})"
            "\n");
  for (const auto& [log, name] :
       {std::pair{"/dev/null", "/dev/null"}, {"other.jsonl", "other.jsonl"}, {"-", "<stdin>"}}) {
    const ToolResult result = run_tool(dir, std::string("watch --once ") + log);
    EXPECT_EQ(result.code, 1) << log;
    EXPECT_EQ(result.err, std::string("moectl: ") + name + ": no record tagged 'train'\n");
  }
}

TEST(Watch, ShowsDecisionsAndTheirReasons) {
  const TempDir dir;
  dir.write(
      "c.yaml",
      "version: 1\nmodel: {layers: 1, experts: 2, top_k: 1}\n"
      "expert_bias: {policy: sign_bias, options: {step: 0.5, zero_mean_move: false}, limits: {rate: 0.25, "
      "center: false}}\n");
  ASSERT_EQ(run_tool(dir, "replay c.yaml - -o run.jsonl", record(0, 0, "[60,40]")).code, 0);
  EXPECT_THAT(run_tool(dir, "watch run.jsonl --once").out, HasSubstr("  expert_bias -0.25..0.25 [rate]"));
  std::string many;
  for (int step = 0; step < 10; ++step) many += record(step, 0, "[60,40]");
  EXPECT_EQ(run_tool(dir, "watch - --every 4", many).lines().size(), 3U);
}

// A file that grows, half a line at a time.
TEST(Watch, FollowsAGrowingFile) {
  const TempDir dir;
  dir.write("run.jsonl", record(0, 0, "[60,40]"));
  std::thread writer([&] {
    for (const std::string& text :
         {record(1, 0, "[70,30]"), record(2, 0, "[80,20]"), record(3, 0, "[90,10]")}) {
      for (const std::string& part : {text.substr(0, 20), text.substr(20)}) {
        std::this_thread::sleep_for(std::chrono::milliseconds(150));
        std::ofstream(dir.path("run.jsonl"), std::ios::app) << part;
      }
    }
  });
  const std::string command =
      "timeout 5 '" MOECTL_TOOL "' watch '" + dir.path("run.jsonl") + "' > '" + dir.path("out") + "' 2>&1";
  EXPECT_EQ(WEXITSTATUS(std::system(command.c_str())), 124);  // it would follow for ever
  writer.join();
  const std::string out = TempDir::read(dir.path("out"));
  EXPECT_THAT(out, HasSubstr("step 0 "));
  EXPECT_THAT(out, HasSubstr("step 2  loss 2.5  max_vio 0.6 "));
  EXPECT_THAT(out, Not(HasSubstr("skipped")));
}

/// What watch shows of a file that another process writes, by the shell text `pieces`.
std::string watched_by_pid(const TempDir& dir, const std::string& pieces, const std::string& options) {
  const std::string script = "cd '" + dir.path("") + "'\n(" + pieces +
                             ") & timeout 20 '" MOECTL_TOOL "' watch run.jsonl --pid $! " + options +
                             " >out 2>err; echo $? >code\n";
  dir.write("watch.sh", script);
  EXPECT_EQ(std::system(("sh '" + dir.path("watch.sh") + "'").c_str()), 0);
  EXPECT_EQ(TempDir::read(dir.path("code")), "0\n");
  return TempDir::read(dir.path("out"));
}

// Begins before the file is there, and ends by itself with all that was written.
TEST(Watch, EndsWithTheProcessThatWrites) {
  const TempDir dir;
  dir.write("a", record(0, 0, "[60,40]") + record(1, 0, "[70,30]"));
  dir.write("b", record(2, 0, "[80,20]") + record(3, 0, "[90,10]"));
  const std::string out =
      watched_by_pid(dir, "sleep .3; cat a >run.jsonl; sleep .5; cat b >>run.jsonl", "--plain");
  EXPECT_THAT(out, HasSubstr("step 0 "));
  EXPECT_THAT(out, HasSubstr("step 3  loss 2.5  max_vio 0.8 "));
  EXPECT_EQ(TempDir::read(dir.path("err")), "");
}

TEST(Watch, StandardInputMayBeGzip) {
  const TempDir dir;
  const std::string command =
      "gzip '" + dir.write("log", record(3, 0, "[60,40]") + record(4, 0, "[50,50]")) + "'";
  ASSERT_EQ(std::system(command.c_str()), 0);
  const std::string zipped = TempDir::read(dir.path("log.gz"));
  const ToolResult whole = run_tool(dir, "watch -", zipped);
  EXPECT_EQ(whole.code, 0) << whole.err;
  EXPECT_THAT(whole.out, HasSubstr("step 4  loss 2.5  max_vio 0 "));
  EXPECT_EQ(whole.err, "");
}

TEST(Watch, RefusesAProcessForStandardInput) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "watch - --pid 1");
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, HasSubstr("standard input ends with its writer"));
}

// A log from elsewhere must not drive the terminal.
TEST(Watch, ShowsNoControlCharactersOfALog) {
  if (!has_terminals()) GTEST_SKIP() << "no terminal can be opened here";
  const TempDir dir;
  dir.write("run.jsonl",
            R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})"
            "\n"
            R"({"step":7,"layer":0,"tokens":100,"counts":[50,50],"health":"fine\u001b[2J",)"
            R"("actuators":{"expert_bias":{"applied":[0,0],"reasons":["rate\u000anext"]}}})"
            "\n");
  const std::string view = drawn_by_watch(dir, 24, 80);
  EXPECT_THAT(view, HasSubstr("fine\\u001b[2J\x1b[K\n"));
  EXPECT_THAT(view, HasSubstr("[rate\\u000anext]\x1b[K\n"));
  EXPECT_THAT(view, Not(HasSubstr("\x1b[2J")));
}

// However few steps are shown.
TEST(Watch, SaysEachNotice) {
  const TempDir dir;
  std::string run =
      "{\"format\":\"moectl-run\",\"version\":1,\"config\":{\"model\":{\"layers\":1,\"experts\":2,\"top_k\":"
      "1}}}\n";
  for (int step = 0; step < 4; ++step) {
    run += R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":100,"counts":[60,40])" +
           (step == 2 ? R"(,"notices":[{"kind":"unresponsive","step":2,"text":"the load does not answer"}])"
                      : "") +
           "}\n";
  }
  dir.write("run.jsonl", run);
  const std::vector<std::string> lines = run_tool(dir, "watch run.jsonl --once --every 10").lines();
  ASSERT_EQ(lines.size(), 2U);
  EXPECT_EQ(lines[1], "step 2  notice: layer 0: the load does not answer");
  if (!has_terminals()) return;
  EXPECT_THAT(drawn_by_watch(dir, 24, 80), HasSubstr("\nnotice: layer 0: the load does not answer\x1b[K\n"));
}

// Layers with their loads and health, then the last decisions; each frame over the one before.
TEST(Watch, DrawsAViewInATerminal) {
  if (!has_terminals()) GTEST_SKIP() << "no terminal can be opened here";
  const TempDir dir;
  const auto line = [](int layer, const std::string& counts, const std::string& health) {
    return R"({"step":7,"layer":)" + std::to_string(layer) + R"(,"tokens":100,"counts":)" + counts +
           R"(,"loss":2.5,"health":")" + health +
           R"(","actuators":{"expert_bias":{"applied":[0.1,-0.25],"reasons":["rate"]}}})" + "\n";
  };
  const std::string header =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":2,"experts":2,"top_k":1}}})"
      "\n";
  dir.write("run.jsonl", header + line(0, "[50,50]", "healthy") + line(1, "[100,0]", "collapsed") + "torn");
  const std::string wide = drawn_by_watch(dir, 24, 80);
  // MaxVio is 0 and 1; an even load is half a block, all of the load a whole one. Three columns an expert.
  EXPECT_THAT(wide, HasSubstr("run.jsonl  step 7\x1b[K\nloss 2.5  MaxVio 0.5 (6.077x noise floor)"));
  EXPECT_THAT(wide, HasSubstr("\nlayer 0  MaxVio 0        ▄▄▄▄▄▄  healthy\x1b[K\n"));
  EXPECT_THAT(wide, HasSubstr("\nlayer 1  MaxVio 1        ███     collapsed\x1b[K\n"));
  EXPECT_THAT(wide, HasSubstr("\nexpert_bias -0.25..0.1 [rate x2]\x1b[K\n"));
  EXPECT_THAT(wide, HasSubstr("\x1b[5F"));  // the view is drawn again with what came last
  EXPECT_THAT(wide, HasSubstr("\n1 lines skipped\x1b[K\n"));
  EXPECT_THAT(wide, HasSubstr("skipped: run.jsonl:4: line: not JSON"));
  // Half a block is the target, where there are any.
  dir.write("run.jsonl",
            R"({"format":"moectl-run","version":1,"config":{"model":{"layers":2,"experts":2,"top_k":1,)"
            R"("targets":[0.75,0.25]}}})"
            "\n" +
                line(0, "[75,25]", "healthy") + line(1, "[50,50]", "imbalanced") + "torn");
  const std::string aimed = drawn_by_watch(dir, 24, 80);
  EXPECT_THAT(aimed, HasSubstr("\nlayer 0  MaxVio 0        ▄▄▄▄▄▄  healthy\x1b[K\n"));
  EXPECT_THAT(aimed, HasSubstr("\nlayer 1  MaxVio 1        ▃▃▃███  imbalanced\x1b[K\n"));
  dir.write("run.jsonl", header + line(0, "[50,50]", "healthy") + line(1, "[100,0]", "collapsed") + "torn");
  // No line is wider than the terminal, and no view higher.
  const std::string narrow = drawn_by_watch(dir, 6, 41);
  EXPECT_THAT(narrow, HasSubstr("\nloss 2.5  MaxVio 0.5 (6.077x noise floor)\x1b[K\n"));
  EXPECT_THAT(narrow, HasSubstr("\n… 2 more layers\x1b[K\nexpert_bias"));
  // Of five rows one is the cursor's: with three lines of the model and the layers, one is left for what comes last.
  const std::string low = drawn_by_watch(dir, 5, 80);
  EXPECT_THAT(low, HasSubstr("\n… 2 more layers\x1b[K\nexpert_bias -0.25..0.1 [rate x2]\x1b[K\n"));
  EXPECT_THAT(low, HasSubstr("\x1b[4F"));
  EXPECT_THAT(low, Not(HasSubstr("lines skipped")));
}

// The log is rotated under the eyes of who follows it, and then a new run takes its place.
TEST(Watch, FollowsARotatedLogAndTheNextRun) {
  const TempDir dir;
  const auto header = [](int piece) {
    return R"({"format":"moectl-run","version":1,"piece":)" + std::to_string(piece) +
           R"(,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})" + "\n";
  };
  dir.write("run.jsonl", header(1) + record(0, 0, "[60,40]"));
  std::thread writer([&] {
    const auto pause = [] { std::this_thread::sleep_for(std::chrono::milliseconds(600)); };
    pause();
    std::ofstream(dir.path("run.jsonl"), std::ios::app) << record(1, 0, "[70,30]");
    for (int piece = 2; piece <= 3; ++piece) {  // twice at once
      std::filesystem::rename(dir.path("run.jsonl"), dir.path("run.jsonl.00000" + std::to_string(piece - 1)));
      dir.write("run.jsonl", header(piece) + record(piece, 0, "[80,20]"));
    }
    pause();
    dir.write("run.jsonl", header(1));  // cut short and begun again
    pause();
    std::ofstream(dir.path("run.jsonl"), std::ios::app)
        << record(0, 0, "[90,10]") << record(1, 0, "[90,10]") << record(2, 0, "[90,10]");
  });
  const std::string command = "timeout 6 '" MOECTL_TOOL "' watch '" + dir.path("run.jsonl") + "' > '" +
                              dir.path("out") + "' 2>'" + dir.path("err") + "'";
  EXPECT_EQ(WEXITSTATUS(std::system(command.c_str())), 124);
  writer.join();
  std::vector<std::string> steps;
  std::istringstream lines(TempDir::read(dir.path("out")));
  for (std::string line; std::getline(lines, line);) steps.push_back(line.substr(0, line.find("  loss")));
  EXPECT_EQ(steps, (std::vector<std::string>{"step 0", "step 1", "step 2", "step 3", "step 0", "step 1"}));
  EXPECT_THAT(TempDir::read(dir.path("err")), HasSubstr("; a new run begins"));
}

}  // namespace
}  // namespace moectl
