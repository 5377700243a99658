#include <gmock/gmock.h>

#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;

// Three steps of 100 tokens each: expert 0 takes over while the loss falls.
std::string trace(int steps) {
  std::string text = R"({"format":"moectl-trace","version":1,"layers":1,"experts":4,"top_k":1})"
                     "\n";
  for (int t = 0; t < steps; ++t) {
    const int first = 25 + 3 * (t % 20);
    text += "{\"step\":" + std::to_string(t) + ",\"layer\":0,\"tokens\":100,\"counts\":[" +
            std::to_string(first) + "," + std::to_string(75 - 3 * (t % 20)) +
            ",0,0],\"loss\":" + std::to_string(4 - 0.1 * (t % 20)) + "}\n";
  }
  return text;
}

TEST(TrendsCommand, SaysHowEachMetricMovedAndHowItGoesWithTheLoss) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "metrics --trends " + dir.write("t.jsonl", trace(20)));
  ASSERT_EQ(result.code, 0) << result.err;
  ASSERT_EQ(result.lines().size(), 1U);
  const auto line = result.json();
  EXPECT_EQ(line["layer"], 0);
  EXPECT_EQ(line["tag"], "train");
  EXPECT_EQ(line["steps"], 20);
  const auto& floor = line["trends"]["noise_floor_cv"];
  EXPECT_NEAR(floor["ema"].get<double>(), std::sqrt(3 / 100.0), 1e-15);
  EXPECT_EQ(floor["slope"], 0);
  EXPECT_TRUE(floor["loss_correlation"].is_null());
  EXPECT_FALSE(line["trends"].contains("drop_rate"));
  EXPECT_EQ(line["aux_loss_review"]["verdict"], "not_enough_evidence");
}

TEST(TrendsCommand, NamesHealthAndFailureModes) {
  const TempDir dir;
  const ToolResult result =
      run_tool(dir, "metrics --trends --format table " + dir.write("t.jsonl", trace(120)));
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.lines()[0], HasSubstr("loss_correlation"));
  EXPECT_THAT(result.out, HasSubstr("layer 0, train: collapsed; expert_collapse for "));
  EXPECT_THAT(result.out, HasSubstr("silent_capacity_loss for "));
  const ToolResult csv = run_tool(dir, "metrics --trends --format csv t.jsonl");
  EXPECT_EQ(csv.lines()[0], "metric,layer,tag,ema,slope,autocorrelation,oscillation,loss_correlation");
  EXPECT_EQ(run_tool(dir, "metrics --trends --compare a b t.jsonl").code, 2);
}

// A run log whose weight came down from .01 to .001 while the load stayed balanced.
TEST(TrendsCommand, ReviewsTheAuxiliaryLoss) {
  const TempDir dir;
  std::string text =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":4,"top_k":1}}})"
      "\n";
  for (int t = 0; t < 400; ++t) {
    text += "{\"step\":" + std::to_string(t) +
            ",\"layer\":0,\"tokens\":1000,\"top_k\":1,\"counts\":[250,250,250,250],\"actuators\":{\"aux_loss_"
            "weight\":"
            "{\"applied\":[" +
            (t < 200 ? "0.01" : "0.001") + "],\"reasons\":[]}}}\n";
  }
  const ToolResult result = run_tool(dir, "metrics --trends " + dir.write("r.jsonl", text));
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.json()["aux_loss_review"]["verdict"], "switch_off");
  EXPECT_EQ(result.json()["health"], "healthy");
}

}  // namespace
}  // namespace moectl
