// Every command of the tool on a model whose layers differ.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;

constexpr const char* kGroups = R"(version: 1
model: {top_k: 2, score_space: logit}
layers:
  - {ids: [1, 2], experts: 16}
  - {ids: [4], experts: 64, top_k: 6, expert_bias: {policy: sign_bias, options: {step: 0.01}}}
expert_bias: {policy: adaptive_bias}
)";

TEST(FieldCases, C1_EveryCommandReadsLayersThatDiffer) {
  const TempDir dir;
  dir.write("groups.yaml", kGroups);
  ASSERT_EQ(run_tool(dir, "simulate groups.yaml --steps 40 -o run.jsonl").code, 0);
  EXPECT_EQ(run_tool(dir, "check groups.yaml").code, 0);
  const struct {
    const char* command;
    std::vector<std::string> says;
  } kCommands[] = {
      {"metrics run.jsonl --format table", {"4"}},
      {"compare run.jsonl", {"run.jsonl"}},
      {"replay groups.yaml run.jsonl", {R"("layer":1,)", R"("layer":4,)"}},
      {"capacity run.jsonl", {"capacity factor at least"}},
      {"placement run.jsonl --devices 4", {"mean"}},
      {"biases run.jsonl", {"16", "64"}},
      {"watch run.jsonl --once", {"step 39"}},
      {"tensorboard run.jsonl -o events", {}},
      {"report run.jsonl -o report.html", {}},
  };
  for (const auto& [command, says] : kCommands) {
    const ToolResult result = run_tool(dir, command);
    EXPECT_EQ(result.code, 0) << command << ": " << result.err;
    for (const std::string& text : says) EXPECT_THAT(result.out, HasSubstr(text)) << command;
  }
  EXPECT_THAT(TempDir::read(dir.path("report.html")), HasSubstr("\"layer\":4"));
}

}  // namespace
}  // namespace moectl
