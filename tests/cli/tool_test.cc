// What all subcommands share: usage, exit codes, help, plugins.
#include "tool.h"

#include <gmock/gmock.h>

#include "moectl/version.h"
#include "test_paths.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(Tool, SaysItsVersion) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "--version");
  EXPECT_EQ(result.code, 0);
  EXPECT_EQ(result.out, std::string("moectl ") + kVersion + "\n");
  EXPECT_EQ(std::string(kVersion), std::to_string(MOECTL_VERSION_MAJOR) + "." +
                                       std::to_string(MOECTL_VERSION_MINOR) + "." +
                                       std::to_string(MOECTL_VERSION_PATCH));
}

TEST(Tool, UsageErrorsExitWithTwo) {
  const TempDir dir;
  for (const char* arguments :
       {"", "frobnicate", "check", "check a b c", "compare", "metrics t --format yaml",
        "metrics t --compare one", "replay onlyconfig", "--no-such-option policies", "compare --shift -1 a",
        "compare --shift x a", "--plugin"}) {
    const ToolResult result = run_tool(dir, arguments);
    EXPECT_EQ(result.code, 2) << arguments;
    EXPECT_EQ(result.out, "") << arguments;
    EXPECT_THAT(result.err, HasSubstr("--help")) << arguments;
  }
}

TEST(Tool, ANumberOutOfRangeIsNamedWithItsConstraint) {
  TempDir dir;
  EXPECT_THAT(run_tool(dir, "compare run.jsonl --shift -1").err,
              HasSubstr("--shift: -1: must be a whole number of at least 0"));
  EXPECT_THAT(run_tool(dir, "watch run.jsonl --every 0").err,
              HasSubstr("--every: 0: must be a whole number of at least 1"));
  EXPECT_THAT(run_tool(dir, "watch run.jsonl --pid 9999999999").err,
              HasSubstr("--pid: 9999999999: must be a whole number from 1 to 2147483647"));
  EXPECT_EQ(run_tool(dir, "tensorboard run.jsonl -o out --histogram-every 1.5").code, 2);
}

TEST(Tool, HelpHasExamples) {
  const TempDir dir;
  EXPECT_EQ(run_tool(dir, "--help").code, 0);
  for (const char* command :
       {"check", "compare", "metrics", "policies", "replay", "report", "simulate", "tensorboard", "watch"}) {
    const ToolResult result = run_tool(dir, std::string(command) + " --help");
    EXPECT_EQ(result.code, 0) << command;
    EXPECT_EQ(result.err, "") << command;
    EXPECT_THAT(result.out, HasSubstr("Examples:\n  moectl " + std::string(command))) << command;
  }
}

TEST(Tool, MissingFilesExitWithOne) {
  const TempDir dir;
  for (const char* arguments :
       {"check no.yaml", "metrics no.jsonl", "compare no.jsonl", "replay no.yaml no.jsonl"}) {
    const ToolResult result = run_tool(dir, arguments);
    EXPECT_EQ(result.code, 1) << arguments;
    EXPECT_EQ(result.out, "") << arguments;
    EXPECT_THAT(result.err, HasSubstr(": cannot be opened: No such file or directory\n")) << arguments;
  }
}

TEST(Tool, AFullDiskIsAnError) {
  const TempDir dir;
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  const std::string command = "'" MOECTL_TOOL "' policies > /dev/full 2>'" + dir.path("err") + "'";
  const int status = std::system(command.c_str());
  EXPECT_EQ(WEXITSTATUS(status), 1);
  EXPECT_THAT(TempDir::read(dir.path("err")), HasSubstr("standard output: cannot be written"));
}

TEST(Policies, ListsAndDescribes) {
  const TempDir dir;
  const ToolResult list = run_tool(dir, "policies");
  EXPECT_EQ(list.code, 0);
  EXPECT_THAT(list.out, HasSubstr("\nfixed "));
  EXPECT_THAT(list.out, HasSubstr("\nsign_bias "));
  const ToolResult one = run_tool(dir, "policies sign_bias");
  EXPECT_EQ(one.code, 0);
  EXPECT_THAT(one.out, StartsWith("sign_bias: "));
  EXPECT_THAT(one.out, HasSubstr("serves: expert_bias\n"));
  EXPECT_THAT(one.out, HasSubstr("  step: 0.001 "));
  EXPECT_THAT(run_tool(dir, "policies fixed").out, HasSubstr("options: none\n"));
  const ToolResult wrong = run_tool(dir, "policies sign_bais");
  EXPECT_EQ(wrong.code, 1);
  EXPECT_EQ(wrong.err, "moectl: policies: sign_bais: unknown policy; did you mean 'sign_bias'?\n");
}

TEST(Plugin, AddsPoliciesToEverySubcommand) {
  const TempDir dir;
  EXPECT_EQ(run_tool(dir, "policies nudge").code, 1);
  const std::string plugin = " --plugin '" MOECTL_TEST_PLUGIN "' ";
  EXPECT_THAT(run_tool(dir, plugin + "policies").out, HasSubstr("\nnudge "));
  EXPECT_THAT(run_tool(dir, "policies nudge" + plugin).out, HasSubstr("by: 0.001"));
  dir.write("c.yaml",
            "version: 1\nmodel: {layers: 1, experts: 3, top_k: 1}\n"
            "expert_bias: {policy: nudge, options: {by: 0.25}, limits: {rate: 0.125}}\n");
  const ToolResult replay = run_tool(dir, "replay c.yaml -" + plugin,
                                     R"({"step":0,"layer":0,"tokens":2,"top_k":1,"counts":[1,1,0]})");
  ASSERT_EQ(replay.code, 0) << replay.err;
  const auto bias = replay.json(1)["actuators"]["expert_bias"];
  EXPECT_EQ(bias["proposed"], (std::vector<double>{0.25, -0.25, 0}));
  EXPECT_EQ(bias["applied"], (std::vector<double>{0.125, -0.125, 0}));
  EXPECT_EQ(bias["reasons"], (std::vector<std::string>{"rate"}));
}

TEST(LooseEnds, APluginThatFailsIsReportedByName) {
  const TempDir dir;
  const std::string plugin = " --plugin '" MOECTL_TEST_PLUGIN "' ";
  for (const auto& [policy, words] :
       {std::pair{"absent", "expert_bias.policy: absent: made no policy"},
        {"seven", "expert_bias.policy: seven: threw an exception that is not"}}) {
    dir.write("c.yaml", "version: 1\nmodel: {layers: 1, experts: 3, top_k: 1}\nexpert_bias: {policy: " +
                            std::string(policy) + "}\n");
    const ToolResult result = run_tool(dir, "replay c.yaml -" + plugin, "");
    EXPECT_EQ(result.code, 1);
    EXPECT_THAT(result.err, HasSubstr(words));
  }
  const ToolResult result = run_tool(dir, "policies" + plugin, "", "MOECTL_TEST_PLUGIN_THROWS=1");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("moectl: plugin: "));
  EXPECT_THAT(result.err, HasSubstr("threw an exception that is not a std::exception"));
}

TEST(Plugin, AnObjectThatIsNoPluginIsReported) {
  const TempDir dir;
  ToolResult result = run_tool(dir, "--plugin no.so policies");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, StartsWith("moectl: plugin: ./no.so: "));
  dir.write("text.so", "not an object");
  EXPECT_EQ(run_tool(dir, "--plugin text.so policies").code, 1);
  const std::string plugin = "--plugin '" MOECTL_TEST_PLUGIN "' ";
  result = run_tool(dir, plugin + plugin + "policies");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("nudge"));
}

}  // namespace
}  // namespace moectl
