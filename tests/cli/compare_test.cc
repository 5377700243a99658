#include <gmock/gmock.h>

#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;

// Two experts, one choice: MaxVio of (c, 100 - c) is (c - 50)/50, and its CV is the same.
std::string record(int step, int most, const std::string& more = "") {
  return R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":100,"top_k":1,"counts":[)" +
         std::to_string(most) + ',' + std::to_string(100 - most) + ']' + more + "}\n";
}

TEST(Compare, FiguresOfAMadeRun) {
  const TempDir dir;
  // 40 steps of collapse, balance within the floor to step 199, 10 steps of shift, balance again to 399.
  std::string run;
  for (int step = 0; step < 400; ++step) {
    const int most = step < 40 ? 90 : step >= 200 && step < 210 ? 75 : 55;
    run += record(step, most, ",\"loss\":" + std::to_string(step < 300 ? 3 : 2));
  }
  run += record(250, 60, R"(,"tag":"validation","loss":4)") +
         record(399, 60, R"(,"tag":"validation","loss":1.5)");
  dir.write("a.jsonl", run);
  const ToolResult json = run_tool(dir, "compare a.jsonl --shift 200 --format json");
  ASSERT_EQ(json.code, 0) << json.err;
  const auto figures = nlohmann::json::parse(json.out).at(0);
  EXPECT_EQ(figures["run"], "a.jsonl");
  EXPECT_EQ(figures["steps"], 400);
  EXPECT_NEAR(figures["max_vio"].get<double>(), 0.1, 1e-12);
  EXPECT_NEAR(figures["cv"].get<double>(), 0.1, 1e-12);
  // √((2/1 - 1)/100) = 0.1: at the floor.
  EXPECT_NEAR(figures["cv_over_floor"].get<double>(), 1, 1e-12);
  EXPECT_NEAR(figures["excess_cv"].get<double>(), 0, 1e-8);
  // MaxVio's floor at N = 2 is 0.1 · z √2 + 0.01 (z² - 1)/6 with z = Φ⁻¹(1.625/2.25) = 0.589456.
  EXPECT_NEAR(figures["max_vio_over_floor"].get<double>(), 0.1 / 0.0822745, 1e-5);
  // The median of steps 38…42 is the first with three values of 0.1 < 1.6 · 0.0823.
  EXPECT_EQ(figures["settle"], 42);
  // Ten steps at 0.5 against a level of 0.1.
  EXPECT_NEAR(figures["excess_area"].get<double>(), 4, 1e-12);
  EXPECT_NEAR(figures["end_over_floor"].get<double>(), 0.1 / 0.0822745, 1e-5);
  EXPECT_EQ(figures["limit_hits"], 0);
  EXPECT_EQ(figures["dead_experts"], 0);
  EXPECT_EQ(figures["loss"], 2);
  EXPECT_EQ(figures["validation_loss"], 1.5);
  // Without a shift there is no area, and the steady window is the run's end.
  const auto plain = nlohmann::json::parse(run_tool(dir, "compare a.jsonl --format json").out).at(0);
  EXPECT_TRUE(plain["excess_area"].is_null());
  EXPECT_TRUE(plain["end_over_floor"].is_null());
  EXPECT_NEAR(plain["max_vio"].get<double>(), 0.1, 1e-12);
}

TEST(FieldCases, D4_StepsAreWeightedByTheirTokens) {
  const TempDir dir;
  // Nine steps in ten route one token, to one expert: MaxVio and CV 1, a floor of CV of √((2/1 - 1)/1) = 1.
  std::string run;
  for (int step = 0; step < 200; ++step) {
    run += step % 10 == 0 ? R"({"step":)" + std::to_string(step) +
                                R"(,"layer":0,"tokens":9991,"top_k":1,"counts":[4995,4996],"loss":2})" + "\n"
                          : R"({"step":)" + std::to_string(step) +
                                R"(,"layer":0,"tokens":1,"top_k":1,"counts":[1,0],"loss":12})" + "\n";
  }
  dir.write("a.jsonl", run);
  const ToolResult json = run_tool(dir, "compare a.jsonl --format json");
  ASSERT_EQ(json.code, 0) << json.err;
  const auto figures = nlohmann::json::parse(json.out).at(0);
  // Settling counts steps.
  EXPECT_EQ(figures["settle"], 4);
  // Ten steps of 9991 tokens and ninety of one: 100,000 tokens.
  EXPECT_NEAR(figures["max_vio"].get<double>(), (90 + 10 * 9991 * (1.0 / 9991)) / 1e5, 1e-9);
  EXPECT_NEAR(figures["cv"].get<double>(), (90 + 10 * 9991 * (1.0 / 9991)) / 1e5, 1e-9);
  EXPECT_NEAR(figures["loss"].get<double>(), (90 * 12 + 10 * 9991 * 2) / 1e5, 1e-9);
}

TEST(Compare, TheTableComparesRuns) {
  const TempDir dir;
  std::string never, soon;
  for (int step = 0; step < 60; ++step) {
    never += record(step, 100);
    soon += record(step, 52);
  }
  dir.write("never.jsonl", never);
  dir.write("b.jsonl", soon);
  const ToolResult table = run_tool(dir, "compare never.jsonl b.jsonl");
  ASSERT_EQ(table.code, 0) << table.err;
  const auto lines = table.lines();
  ASSERT_EQ(lines.size(), 3U);
  // Excess CV: √(1² - 0.1²), and -√(0.1² - 0.04²).
  EXPECT_THAT(lines[0],
              ::testing::MatchesRegex("run +steps +settle +max_vio +max_vio_over_floor +max_vio_global +cv "
                                      "+cv_over_floor +excess_cv +dead_experts +limit_hits +floor"));
  EXPECT_THAT(lines[1], ::testing::MatchesRegex(
                            "never.jsonl +60 +never +1 +12.15 +1 +1 +10 +0.995 +[0-9.]+ +0 +noise floor"));
  EXPECT_THAT(lines[2], ::testing::MatchesRegex(
                            "b.jsonl +60 +4 +0.04 +0.4862 +0.04 +0.04 +0.4 +-0.09165 +0 +0 +noise floor"));
  EXPECT_EQ(lines[0].size(), lines[1].size());
  EXPECT_EQ(lines[1].size(), lines[2].size());
}

TEST(Compare, ARunLogCarriesItsShiftAndItsLimits) {
  const TempDir dir;
  dir.write(
      "c.yaml",
      "version: 1\nmodel: {layers: 1, experts: 2, top_k: 1, tokens_per_step: 100}\n"
      "expert_bias: {policy: sign_bias, options: {step: 0.5, zero_mean_move: false}, limits: {rate: 0.25, "
      "center: false}}\n");
  std::string trace = R"({"format":"moectl-trace","version":1,"shift":20})"
                      "\n";
  for (int step = 0; step < 40; ++step) trace += record(step, step == 20 ? 100 : step % 2 ? 50 : 52);
  ASSERT_EQ(run_tool(dir, "replay c.yaml - -o run.jsonl", trace).code, 0);
  const auto figures = nlohmann::json::parse(run_tool(dir, "compare run.jsonl --format json").out).at(0);
  // 0.5 is cut to 0.25 at each of the 20 even steps; at odd ones the sign is zero.
  EXPECT_EQ(figures["limit_hits"], 20);
  // The level is (1 + 19 · 0.04)/40 = 0.044; above it is only the shift itself.
  EXPECT_NEAR(figures["excess_area"].get<double>(), 1 - 0.044, 1e-12);
}

TEST(Compare, WrongRunsAreNamed) {
  const TempDir dir;
  dir.write("good.jsonl", record(0, 50));
  dir.write("bad.jsonl", record(0, 50) + "{}\n");
  const ToolResult result = run_tool(dir, "compare good.jsonl bad.jsonl");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(result.out, "");
  EXPECT_EQ(result.err, "moectl: bad.jsonl:2: step: missing: required\n");
  // With --salvage it is skipped; damage to the file is skipped in any case.
  const ToolResult salvaged = run_tool(dir, "compare good.jsonl bad.jsonl --salvage");
  EXPECT_EQ(salvaged.code, 0);
  EXPECT_EQ(salvaged.err, "skipped: bad.jsonl:2: step: missing: required\n");
  dir.write("torn.jsonl", record(0, 50) + record(1, 50).substr(0, 20));
  const ToolResult torn = run_tool(dir, "compare good.jsonl torn.jsonl");
  EXPECT_EQ(torn.code, 0);
  EXPECT_THAT(torn.err, ::testing::StartsWith("skipped: torn.jsonl:2: line: not JSON"));
}

TEST(Compare, TheNameOfAFileMayHoldAnyByte) {
  const TempDir dir;
  const std::string name = "a\xff.jsonl";
  dir.write(name, record(0, 50));
  const ToolResult json = run_tool(dir, "compare '" + name + "' --format json");
  ASSERT_EQ(json.code, 0) << json.err;
  EXPECT_EQ(nlohmann::json::parse(json.out).at(0)["run"], "a\xef\xbf\xbd.jsonl");
}

// Targets are those of the config in force, not of the first line.
TEST(Compare, ATargetThatChangesHoldsFromItsStepOn) {
  const TempDir dir;
  const std::string header =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})"
      "\n";
  const auto change = [](int step) {
    return R"({"step":)" + std::to_string(step) +
           R"(,"config":{"model":{"layers":1,"experts":2,"top_k":1,"targets":[0.75,0.25]}}})"
           "\n";
  };
  std::string at_once = header + change(0), later = header;
  for (int step = 0; step < 40; ++step) {
    if (step == 20) later += change(20);
    at_once += record(step, 75);
    later += record(step, 75);
  }
  dir.write("at_once.jsonl", at_once);
  dir.write("later.jsonl", later);
  const ToolResult result = run_tool(dir, "compare at_once.jsonl later.jsonl --format json");
  ASSERT_EQ(result.code, 0) << result.err;
  const auto figures = nlohmann::json::parse(result.out);
  EXPECT_NEAR(figures[0]["max_vio"].get<double>(), 0, 1e-12);
  EXPECT_NEAR(figures[1]["max_vio"].get<double>(), 0.25, 1e-12);  // half of the steps at 0.5
  const ToolResult each = run_tool(dir, "metrics later.jsonl");
  EXPECT_NEAR(each.json(19)["metrics"]["max_vio"].get<double>(), 0.5, 1e-12);
  EXPECT_NEAR(each.json(20)["metrics"]["max_vio"].get<double>(), 0, 1e-12);
}

}  // namespace
}  // namespace moectl
