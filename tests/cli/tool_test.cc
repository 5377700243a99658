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

// NaN lies in every range that is tested by its ends.
TEST(Tool, ARealNumberThatIsNotFiniteIsRefused) {
  const TempDir dir;
  for (const char* option :
       {"capacity t --drop", "capacity t --factors", "placement t --devices 2 --train",
        "placement t --devices 2 --min-gain", "simulate c --coherence", "simulate c --capacity-factor",
        "simulate c --jitter", "simulate c --score-scale", "simulate c --mixture-spread",
        "simulate c --token-spread", "simulate c --preference"}) {
    for (const char* value : {"nan", "-nan", "inf", "-inf", "1e999"}) {
      const ToolResult result = run_tool(dir, std::string(option) + ' ' + value);
      EXPECT_EQ(result.code, 2) << option << ' ' << value;
      EXPECT_THAT(result.err, HasSubstr(std::string(value) + ": must be a number ")) << option;
    }
  }
  EXPECT_THAT(run_tool(dir, "capacity t --drop 1").err,
              HasSubstr("--drop: 1: must be a number from 0 to 0.99"));
}

TEST(Tool, TheFactorForADropRateAgreesWithTheRateAtThatFactor) {
  const TempDir dir;
  // 400 assignments, 100 an expert: a factor of 0.01 takes one of each, and drops 99 %.
  const std::string trace = R"({"step":0,"layer":0,"tokens":400,"top_k":1,"counts":[100,100,100,100]})";
  for (const char* drop : {"0.99", "0.9", "0.71", "0.29"}) {
    const std::string factor = std::string("capacity - --format json --drop ") + drop;
    const double found = nlohmann::json::parse(run_tool(dir, factor, trace).out)["factor"];
    EXPECT_NEAR(found, 1 - std::stod(drop), 1e-12);
  }
  EXPECT_THAT(run_tool(dir, "capacity - --drop 0.99 --factors 0.01 1", trace).out,
              HasSubstr("At most 99.0 % in every layer: capacity factor at least 0.01."));
}

TEST(Tool, ALogWithoutRecordsIsNoBoard) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "tensorboard /dev/null -o board");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(result.err, "moectl: /dev/null: holds no record\n");
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
