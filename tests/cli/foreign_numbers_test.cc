// Traces that others wrote: counts in floating point, loads instead of counts, what is missing, and layers by any number.
#include <gmock/gmock.h>

#include <cmath>

#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;
using Numbers = std::vector<double>;
using Counts = std::vector<std::int64_t>;

const char* const kConfig =
    "version: 1\n"
    "model: {layers: 3, experts: 4, top_k: 2, tokens_per_step: 16384}\n"
    "expert_bias: {policy: sign_bias, options: {step: 1.0e-3, zero_mean_move: false}, limits: {center: "
    "false}}\n";

std::string line(int step, int layer, const std::string& rest) {
  return "{\"step\":" + std::to_string(step) + ",\"layer\":" + std::to_string(layer) + ',' + rest + "}\n";
}

ToolResult metrics(const std::string& text, const std::string& options = "") {
  const TempDir dir;
  return run_tool(dir, "metrics - " + options, text);
}

TEST(FieldCases, C6_WholeFloatsAreCounts) {
  const std::string whole = line(0, 0, R"("tokens":16384,"top_k":2,"counts":[16384,8192,4096,4096])");
  const ToolResult real =
      metrics(line(0, 0, R"("tokens":16384.0,"top_k":2.0,"counts":[16384.0,8192.0,4.096e3,4096])"));
  ASSERT_EQ(real.code, 0) << real.err;
  EXPECT_EQ(real.out, metrics(whole).out);
  EXPECT_EQ(real.err, "");
  EXPECT_THAT(metrics(line(0, 0, R"("tokens":3,"top_k":2,"counts":[1,1.5,1,1])")).err,
              HasSubstr("counts[1]: 1.5: must be a whole number"));
  EXPECT_THAT(metrics(line(0, 0, R"("tokens":3,"top_k":2,"counts":[1,-1.0,1,1])")).err,
              HasSubstr("counts[1]: -1.0: must be at least 0"));
  EXPECT_THAT(metrics(line(0, 0, R"("tokens":3,"top_k":2,"counts":[1,1e300,1,1])")).err,
              HasSubstr("must be at most 2^53"));
}

TEST(FieldCases, C6_CountsWithoutTokensAreReadAndSaidOnce) {
  std::string bare, full;
  for (int step = 0; step < 3; ++step) {
    bare += line(step, 0, R"("top_k":2,"counts":[5,4,4,3])");
    full += line(step, 0, R"("tokens":8,"top_k":2,"counts":[5,4,4,3])");
  }
  const ToolResult result = metrics(bare);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out, metrics(full).out);
  EXPECT_EQ(result.err, "assumed: <stdin>:1: tokens: missing: read as the sum of the counts / top_k (2)\n");
}

TEST(FieldCases, C6_SharesAndPercentAreLoads) {
  const std::string whole = line(0, 0, R"("tokens":1000,"top_k":2,"counts":[1000,500,300,200])");
  for (const char* const loads :
       {R"("counts":[0.5,0.25,0.15,0.1])", R"("counts":[50,25,15.0,10.0],"load":[50,25,15,10])",
        R"("load":[0.5,0.25,0.15,0.1])", R"("load":[50,25,15,10])", R"("counts":[50.01,24.99,15,10])"}) {
    const ToolResult result = metrics(line(0, 0, std::string(R"("tokens":1000,"top_k":2,)") + loads));
    ASSERT_EQ(result.code, 0) << loads << result.err;
    if (std::string(loads).find("50,25") != std::string::npos &&
        std::string(loads).find("counts") != std::string::npos) {
      // Whole numbers under the name `counts` are counts, whatever they sum to.
      EXPECT_EQ(result.err, "");
      continue;
    }
    EXPECT_THAT(result.err, HasSubstr(" of the load\n")) << loads;
    EXPECT_NEAR(result.json()["metrics"]["max_vio"].get<double>(), 1, 1e-3) << loads;
    EXPECT_EQ(result.json()["metrics"]["noise_floor_cv"], metrics(whole).json()["metrics"]["noise_floor_cv"]);
  }
  EXPECT_THAT(metrics(line(0, 0, R"("tokens":10,"top_k":2,"load":[0.5,0.2,0.2,0.2])")).err,
              HasSubstr("load: [0.5,0.2,0.2,0.2]: must be shares that sum to 1, or percent that sum to 100"));
  EXPECT_THAT(metrics(line(0, 0, R"("tokens":10,"top_k":2)")).err, HasSubstr("counts: missing: required"));
}

// The floor depends on the number of tokens: nobody may make it up.
TEST(FieldCases, C6_SharesWithoutTokensHaveNoFloor) {
  const TempDir dir;
  dir.write("c.yaml", kConfig);
  const std::string shares = line(0, 0, R"("top_k":2,"load":[0.5,0.25,0.15,0.1])");
  const ToolResult unknown = metrics(shares);
  ASSERT_EQ(unknown.code, 0) << unknown.err;
  EXPECT_EQ(
      unknown.err,
      "assumed: <stdin>:1: counts: read as shares of the load of 1048576 tokens, since `tokens` is missing: "
      "without it no floor is known\n");
  EXPECT_NEAR(unknown.json()["metrics"]["max_vio"].get<double>(), 1, 1e-5);
  EXPECT_TRUE(unknown.json()["metrics"]["noise_floor_cv"].is_null());
  EXPECT_TRUE(unknown.json()["metrics"]["excess_cv"].is_null());
  const ToolResult known = run_tool(dir, "metrics - --config c.yaml", shares);
  EXPECT_THAT(known.err, HasSubstr("tokens: missing: taken as 16384, model.tokens_per_step\n"));
  EXPECT_NEAR(known.json()["metrics"]["noise_floor_cv"].get<double>(), std::sqrt(1 / 16384.0), 1e-12);
}

TEST(FieldCases, C6_LayersHaveTheModelsNumbers) {
  const TempDir dir;
  dir.write("c.yaml", kConfig);
  const std::string header = R"({"format":"moectl-trace","version":1,"layers":3,"experts":4,"top_k":2})"
                             "\n";
  std::string ours = header, theirs = header;
  for (int step = 0; step < 4; ++step) {
    for (const int layer : {2, 0, 1}) {
      const std::string rest = R"("tokens":8,"counts":[)" + std::to_string(2 + layer + step) + ",4,4,1]";
      ours += line(step, layer, rest);
      theirs += line(step, layer == 2 ? 30 : layer + 3, rest);
    }
  }
  const ToolResult wanted = run_tool(dir, "replay c.yaml -", ours),
                   found = run_tool(dir, "replay c.yaml -", theirs);
  ASSERT_EQ(found.code, 0) << found.err;
  EXPECT_EQ(found.out, wanted.out);
  EXPECT_EQ(wanted.err, "");
  EXPECT_EQ(found.err, "assumed: <stdin>: layers 3, 4, 30 of the trace are layers 0 to 2 of c.yaml\n");
  EXPECT_EQ(metrics(theirs).code, 0);
  EXPECT_EQ(metrics(theirs).json(0)["layer"], 30);
  // One more layer than there should be.
  EXPECT_THAT(metrics(theirs + line(4, 5, R"("tokens":8,"counts":[4,4,4,4])")).err,
              HasSubstr(":14: layer: 5: must be one of 3, as many as the first line says"));
  // Without a first line.
  const std::string bare = theirs.substr(header.size());
  EXPECT_EQ(run_tool(dir, "replay c.yaml -", bare).out, wanted.out);
  EXPECT_THAT(run_tool(dir, "replay c.yaml -", bare).err,
              HasSubstr("assumed: <stdin>:1: top_k: missing: taken as 2, model.top_k\n"));
  EXPECT_THAT(run_tool(dir, "replay c.yaml -", bare + line(4, 5, R"("tokens":8,"counts":[4,4,4,4])")).err,
              HasSubstr("<stdin>:13: layer: 5: must be one of the layers of the records before it"));
}

TEST(FieldCases, C6_ReplayTakesTheShapeFromItsOptions) {
  const TempDir dir;
  dir.write("c.yaml", kConfig);
  const std::string trace = line(0, 0, R"("tokens":9,"top_k":3,"counts":[9,6,3,3,3,3])");
  EXPECT_EQ(run_tool(dir, "replay c.yaml -", trace).code, 1);
  const ToolResult result = run_tool(dir, "replay c.yaml - --layers 1 --experts 6 --top-k 3", trace);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.json(0)["config"]["model"]["experts"], 6);
  EXPECT_EQ(result.json(1)["counts"], (Counts{9, 6, 3, 3, 3, 3}));
  EXPECT_EQ(run_tool(dir, "replay c.yaml - --experts 2 --top-k 3", trace).code, 1);
}

// bfloat16 has 8 significant bits, float16 has 11: 40840 becomes 40960.
TEST(FieldCases, C7_CountsInHalfPrecisionAreRefused) {
  const char* const reason = "half precision (float16, bfloat16) rounds counts";
  const auto fields = [](const std::string& counts) {
    return line(0, 0, R"("tokens":65536,"top_k":2,"counts":[)" + counts + "]");
  };
  const ToolResult bf16 = metrics(fields("40960.0,32768.0,30720.0,26752.0"));
  EXPECT_EQ(bf16.code, 1);
  EXPECT_THAT(bf16.err, HasSubstr(reason));
  EXPECT_THAT(metrics(fields("40832.0,32752.0,30736.0,26704.0")).err, HasSubstr(reason));
  // The same as whole numbers: nothing says that they were rounded. And true ones in floating point.
  EXPECT_EQ(metrics(fields("40960,32768,30720,26624")).code, 0);
  EXPECT_EQ(metrics(fields("40840.0,32768.0,30720.0,26744.0")).code, 0);
  EXPECT_EQ(metrics(fields("32768.0,32768.0,32768.0,32768.0")).code, 0);
}

/// A run of loads that spread for ten steps, and then all go to one expert, as JSON from a program that counts in floating
/// point has them.
std::string collapse(const std::string& spread, const std::string& all) {
  std::string text;
  for (int step = 0; step < 20; ++step)
    text += line(step, 0, R"("top_k":1,"counts":)" + (step < 10 ? spread : all));
  return text;
}

// A row [1,0,0,0] by itself is one token; in a file of shares it is all of the load.
TEST(ForeignNumbers, ACollapsedRowOfAFileOfLoadsIsALoad) {
  for (const auto& [spread, all] : {std::pair{"[0.2722,0.2718,0.2273,0.2287]", "[1.0,0.0,0.0,0.0]"},
                                    {"[40.5,29.5,20.0,10.0]", "[100.0,0.0,0.0,0.0]"},
                                    {"[40.5,29.5,20.0,10.0]", "[100,0,0,0]"}}) {
    const TempDir dir;
    dir.write("t.jsonl", collapse(spread, all));
    const ToolResult result = run_tool(dir, "compare t.jsonl --format json");
    ASSERT_EQ(result.code, 0) << all << result.err;
    // Half of the steps are balanced to less than 0.7, half have all of the load on one of four: 4 - 1.
    EXPECT_GT(nlohmann::json::parse(result.out)[0]["max_vio"].get<double>(), 1.5) << all;
    const ToolResult each = run_tool(dir, "metrics t.jsonl");
    EXPECT_NEAR(each.json(19)["metrics"]["max_vio"].get<double>(), 3, 1e-5) << all;
    EXPECT_TRUE(each.json(19)["metrics"]["noise_floor_cv"].is_null()) << all;
  }
  // Whole percent among others, and a layer without data.
  const ToolResult percent = metrics(line(0, 0, R"("tokens":1000,"top_k":2,"counts":[40.5,29.5,20,10])") +
                                     line(1, 0, R"("tokens":1000,"top_k":2,"counts":[40,30,20,10])") +
                                     line(2, 0, R"("tokens":0,"top_k":2,"counts":[0.0,0.0,0.0,0.0])"));
  ASSERT_EQ(percent.code, 0) << percent.err;
  EXPECT_NEAR(percent.json(1)["metrics"]["max_vio"].get<double>(), 0.6, 1e-12);
  EXPECT_NEAR(percent.json(1)["metrics"]["noise_floor_cv"].get<double>(), std::sqrt((4.0 / 2 - 1) / 1000),
              1e-12);
  EXPECT_TRUE(percent.json(2)["metrics"]["max_vio"].is_null());
}

TEST(ForeignNumbers, RowsOfAnotherKindAreRefusedWithBothLines) {
  const auto row = [](int step, const std::string& counts) {
    return line(step, 0, R"("top_k":1,"counts":)" + counts);
  };
  const std::string shares = row(0, "[0.5,0.25,0.15,0.1]"), percent = row(0, "[50.5,24.5,15,10]"),
                    counts = row(0, "[5,3,2,1]"), zeros = row(0, "[0,0,0,0]"),
                    instead = R"(; write shares of the load as "load", with "tokens")";
  const auto refused = [&](const std::string& text, const std::string& words) {
    const ToolResult result = metrics(text);
    EXPECT_EQ(result.code, 1) << text;
    EXPECT_THAT(result.err, HasSubstr(words + instead)) << text;
  };
  refused(shares + row(1, "[5,3,2,1]"),
          "<stdin>:2: counts: [5,3,2,1]: must be shares that sum to 1, as in <stdin>:1");
  refused(shares + row(1, "[50.5,24.5,15,10]"), "must be shares that sum to 1, as in <stdin>:1");
  refused(percent + row(1, "[5,3,2,1]"), "must be percent that sum to 100, as in <stdin>:1");
  refused(counts + row(1, "[0.5,0.25,0.15,0.1]"),
          "<stdin>:2: counts: [0.5,0.25,0.15,0.1]: must be whole numbers, as in <stdin>:1");
  // The first row tells nothing.
  refused(zeros + row(1, "[5,3,2,1]") + row(2, "[0.5,0.25,0.15,0.1]"), "as in <stdin>:2");
  EXPECT_EQ(metrics(zeros + row(1, "[0.5,0.25,0.15,0.1]") + row(2, "[1,0,0,0]")).code, 0);
  // With --salvage the rows of the other kind are left out, not the file.
  const TempDir dir;
  const ToolResult salvaged =
      run_tool(dir, "compare - --salvage --format json", counts + row(1, "[0.5,0.25,0.15,0.1]"));
  EXPECT_EQ(salvaged.code, 0);
  EXPECT_THAT(salvaged.err, HasSubstr("skipped: <stdin>:2: counts: "));
}

}  // namespace
}  // namespace moectl
