// moectl simulate: the closed loop from the command line.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tool.h"

namespace moectl {
namespace {

const char* const kAdaptive = R"(version: 1
model: {layers: 2, experts: 16, top_k: 2, tokens_per_step: 2048, score_space: probability}
expert_bias:
  policy: adaptive_bias
  limits: {rate: 1}
)";
const char* const kSign = R"(version: 1
model: {layers: 2, experts: 16, top_k: 2, tokens_per_step: 2048, score_space: probability}
expert_bias: {policy: sign_bias}
)";

class SimulateTool : public ::testing::Test {
 protected:
  SimulateTool() {
    dir_.write("adaptive.yaml", kAdaptive);
    dir_.write("sign.yaml", kSign);
  }
  ToolResult run(const std::string& arguments) { return run_tool(dir_, "simulate " + arguments); }
  nlohmann::json json(const std::string& arguments) {
    const ToolResult result = run(arguments + " --format json");
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out);
  }
  TempDir dir_;
};

TEST_F(SimulateTool, ComparesConfigsOnOnePlant) {
  const auto rows = json("adaptive.yaml sign.yaml --steps 400 --scenario shift");
  ASSERT_EQ(rows.size(), 2U);
  EXPECT_EQ(rows[0]["config"], "adaptive.yaml");
  EXPECT_LE(rows[0]["settle"], 30);
  EXPECT_LE(rows[0]["max_vio_over_floor"], 1.25);
  EXPECT_LE(rows[0]["cv_over_floor"], 1.25);
  EXPECT_EQ(rows[0]["dead_experts"], 0);
  EXPECT_EQ(rows[0]["limit_hits"], 0);
  // The fixed step is still on its way when the data shift.
  EXPECT_GT(rows[1]["max_vio"], 2 * rows[0]["max_vio"].get<double>());
  EXPECT_GT(rows[1]["excess_area"], rows[0]["excess_area"]);
}

TEST_F(SimulateTool, PrintsATable) {
  const ToolResult result = run("adaptive.yaml --steps 50");
  EXPECT_EQ(result.code, 0);
  ASSERT_EQ(result.lines().size(), 2U);
  EXPECT_THAT(
      result.lines()[0],
      ::testing::MatchesRegex("config +settle +max_vio +max_vio_over_floor +cv_over_floor +excess_area "
                              "+end_over_floor +dead_experts +limit_hits"));
  EXPECT_THAT(result.lines()[1], ::testing::StartsWith("adaptive.yaml"));
}

TEST_F(SimulateTool, SameSeedSameFigures) {
  const std::string arguments = "adaptive.yaml --steps 60 --scenario noise";
  EXPECT_EQ(json(arguments), json(arguments));
  EXPECT_NE(json(arguments), json(arguments + " --seed 2"));
}

TEST_F(SimulateTool, FlagsOverrideTheModel) {
  const auto narrow = json("adaptive.yaml --steps 120");
  const auto wide =
      json("adaptive.yaml --steps 120 --experts 64 --top-k 6 --tokens 1024 --layers 1 --gate softmax");
  EXPECT_NE(narrow[0]["max_vio"], wide[0]["max_vio"]);
  EXPECT_EQ(run("adaptive.yaml --steps 5 --experts 64 -o -").json()["config"]["model"]["experts"], 64);
}

TEST_F(SimulateTool, WritesRunLogsThatCompareReads) {
  const auto direct = json("adaptive.yaml sign.yaml --steps 150 --scenario shift -o run.jsonl");
  const ToolResult compared = run_tool(dir_, "compare run-adaptive.jsonl run-sign.jsonl --format json");
  ASSERT_EQ(compared.code, 0) << compared.err;
  const auto rows = nlohmann::json::parse(compared.out);
  for (std::size_t i = 0; i < 2; ++i) {
    for (const char* name : {"settle", "max_vio", "max_vio_over_floor", "cv_over_floor", "excess_area",
                             "end_over_floor", "dead_experts", "limit_hits"}) {
      EXPECT_EQ(direct[i][name], rows[i][name]) << i << name;
    }
  }
}

TEST_F(SimulateTool, CorrelatedTokensAreMeasuredAgainstTheirOwnFloor) {
  const auto rows = json("adaptive.yaml --steps 300 --sequence-length 128");
  EXPECT_GT(rows[0]["max_vio"], 0.25);
  EXPECT_LT(rows[0]["max_vio_over_floor"], 1.25);
}

// The steady window ends at the event: whether a law copes with what happens then stands in the other columns.
TEST_F(SimulateTool, TheTableTellsWhoCopesWithAScenario) {
  dir_.write("fixed.yaml", "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2, tokens_per_step: 1024}\n");
  const auto dead = json("adaptive.yaml fixed.yaml --layers 1 --tokens 1024 --steps 400 --scenario dead");
  EXPECT_LE(dead[0]["end_over_floor"], 1.3);
  EXPECT_EQ(dead[0]["dead_experts"], 0);
  EXPECT_GT(dead[1]["end_over_floor"], 10);
  EXPECT_GE(dead[1]["dead_experts"], 1);
  const auto collapse =
      json("adaptive.yaml fixed.yaml --layers 1 --tokens 1024 --steps 400 --scenario collapse");
  EXPECT_LE(collapse[0]["end_over_floor"], 1.3);
  EXPECT_GT(collapse[1]["end_over_floor"], 20);
  EXPECT_TRUE(json("adaptive.yaml --steps 30")[0]["end_over_floor"].is_null());
}

TEST_F(SimulateTool, EveryScenarioRuns) {
  for (const char* scenario : {"steady", "shift", "collapse", "dead", "drift", "delay", "noise"}) {
    EXPECT_EQ(run(std::string("adaptive.yaml --steps 30 --scenario ") + scenario).code, 0) << scenario;
  }
}

TEST_F(SimulateTool, SaysWhatIsWrong) {
  EXPECT_EQ(run("").code, 2);
  EXPECT_EQ(run("adaptive.yaml --scenario storm").code, 2);
  EXPECT_EQ(run("adaptive.yaml --gate hard").code, 2);
  EXPECT_EQ(run("adaptive.yaml --steps 0").code, 2);
  EXPECT_EQ(run("missing.yaml").code, 1);
  const ToolResult top_k = run("adaptive.yaml --top-k 17");
  EXPECT_EQ(top_k.code, 1);
  EXPECT_THAT(top_k.err, ::testing::HasSubstr("top_k: 17"));
  const ToolResult length = run("adaptive.yaml --sequence-length 100");
  EXPECT_EQ(length.code, 1);
  EXPECT_THAT(length.err, ::testing::HasSubstr("sequence_length = 100: must divide tokens"));
  EXPECT_EQ(run("adaptive.yaml sign.yaml -o -").code, 1);
}

}  // namespace
}  // namespace moectl
