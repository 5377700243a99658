#include <gmock/gmock.h>
#include <zlib.h>

#include <algorithm>

#include "moectl/metrics.h"
#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// (16, 4, 4, 1)/25 at k = 1, N = 4, T = 25: the values are worked out by hand.
const char* const kTrace =
    R"({"format":"moectl-trace","version":1,"layers":2,"experts":4,"top_k":1})"
    "\n"
    R"({"step":0,"layer":0,"tokens":25,"top_k":1,"counts":[16,4,4,1]})"
    "\n"
    R"({"step":0,"layer":1,"tokens":0,"top_k":1,"counts":[0,0,0,0]})"
    "\n"
    R"({"step":0,"layer":0,"tokens":8,"top_k":1,"counts":[2,2,2,2],"tag":"validation"})"
    "\n";

TEST(MetricsCommand, PrintsEveryMetricOfEveryRecord) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "metrics " + dir.write("t.jsonl", kTrace));
  ASSERT_EQ(result.code, 0) << result.err;
  ASSERT_EQ(result.lines().size(), 3U);
  const auto first = result.json(0);
  EXPECT_EQ(first["step"], 0);
  EXPECT_EQ(first["layer"], 0);
  const auto& metrics = first["metrics"];
  for (const MetricField& field : metric_fields()) EXPECT_TRUE(metrics.contains(field.name)) << field.name;
  EXPECT_NEAR(metrics["max_load"].get<double>(), 0.64, 1e-15);
  EXPECT_NEAR(metrics["max_vio"].get<double>(), 1.56, 1e-14);
  EXPECT_NEAR(metrics["gini"].get<double>(), 0.45, 1e-15);  // Σ|ci-cj| = 2(12+12+15+0+3+3) = 90, over 2·25·4
  // std(p)·N = √((16² + 4² + 4² + 1)/4 - 6.25²)·4/25
  EXPECT_NEAR(metrics["load_cv"].get<double>(), std::sqrt(289 / 4.0 - 39.0625) * 4 / 25, 1e-14);
  EXPECT_NEAR(metrics["noise_floor_cv"].get<double>(), std::sqrt(3 / 25.0), 1e-15);
  EXPECT_TRUE(metrics["drop_rate"].is_null());
  for (const MetricField& field : metric_fields()) {
    EXPECT_TRUE(result.json(1)["metrics"][std::string(field.name)].is_null()) << "no data: " << field.name;
  }
  EXPECT_EQ(result.json(2)["tag"], "validation");
  EXPECT_EQ(result.json(2)["metrics"]["load_cv"], 0.0);
}

TEST(MetricsCommand, LoadsOfSingleExpertsWithinALayerAndOverLayers) {
  const std::string trace =
      R"({"step":0,"layer":0,"tokens":8,"top_k":2,"counts":[5,1,1,1]})"
      "\n"
      R"({"step":1,"layer":0,"tokens":4,"top_k":2,"counts":[3,3,1,1]})"
      "\n"
      R"({"step":1,"layer":1,"tokens":4,"top_k":2,"counts":[2,2,2,2]})"
      "\n"
      R"({"step":1,"layer":1,"tokens":4,"top_k":2,"counts":[8,0,0,0],"tag":"validation"})"
      "\n";
  const TempDir dir;
  dir.write("t.jsonl", trace);
  const ToolResult result = run_tool(dir, "metrics t.jsonl --loads --extremes 1 --format json");
  ASSERT_EQ(result.code, 0) << result.err;
  ASSERT_EQ(result.lines().size(), 4U);
  const auto layer = result.json(0);  // 8, 4, 2, 2 of 16
  EXPECT_EQ(layer["layer"], 0);
  EXPECT_DOUBLE_EQ(layer["p50"].get<double>(), 0.75);
  EXPECT_DOUBLE_EQ(layer["p95"].get<double>(), 1.85);
  EXPECT_EQ(layer["most"], nlohmann::json::parse("[[0,2.0]]"));
  EXPECT_EQ(layer["least"], nlohmann::json::parse("[[2,0.5]]"));
  // Of equals the lower number, at both ends.
  EXPECT_EQ(result.json(1)["most"], nlohmann::json::parse("[[0,1.0]]"));
  EXPECT_EQ(result.json(1)["least"], nlohmann::json::parse("[[0,1.0]]"));
  const auto all = result.json(2);  // ½, ½, 1, 1, 1, 1, 1, 2
  EXPECT_EQ(all["layer"], "all");
  EXPECT_DOUBLE_EQ(all["p5"].get<double>(), 0.5);
  EXPECT_DOUBLE_EQ(all["p25"].get<double>(), 0.875);
  EXPECT_DOUBLE_EQ(all["p50"].get<double>(), 1);
  const auto over_layers = result.json(3);  // MaxVio of the layers: 0 and 1
  EXPECT_EQ(over_layers["layer"], "max_vio");
  EXPECT_DOUBLE_EQ(over_layers["p5"].get<double>(), 0.05);
  EXPECT_DOUBLE_EQ(over_layers["p50"].get<double>(), 0.5);
  EXPECT_DOUBLE_EQ(over_layers["p95"].get<double>(), 0.95);
  EXPECT_THAT(run_tool(dir, "metrics t.jsonl --loads --format table").out, HasSubstr("e0 x2"));
  EXPECT_EQ(run_tool(dir, "metrics t.jsonl --loads --format csv").lines().size(), 5U);
}

TEST(MetricsCommand, ChurnOfALogIsThatOfTheController) {
  const TempDir dir;
  const std::string simulate =
      "simulate " MOECTL_SOURCE_DIR "/policies/adaptive_bias.yaml --steps 30 --format json";
  ASSERT_EQ(run_tool(dir, simulate + " --set metrics.details=true -o run.jsonl").code, 0);
  std::istringstream lines(TempDir::read(dir.path("run.jsonl")));
  const ToolResult tool = run_tool(dir, "metrics run.jsonl");
  std::string line;
  std::getline(lines, line);  // the config
  std::map<std::string, int> seen;
  double first = 0, last = 0;
  for (std::size_t i = 0; std::getline(lines, line);) {
    const auto record = nlohmann::json::parse(line);
    if (record["layer"].is_null()) continue;
    const auto &logged = record["metrics"], found = tool.json(i++)["metrics"];
    EXPECT_EQ(logged["load_p95"], found["load_p95"]);
    if (record["step"] < 2) continue;  // gaps are near from the second step on
    ASSERT_TRUE(logged["churn"].is_number()) << line;
    EXPECT_NEAR(logged["churn"].get<double>(), found["churn"].get<double>(), 1e-12);
    ++seen["records"];
    (record["step"] < 5 ? first : last) = logged["churn"];
  }
  EXPECT_GT(seen["records"], 25);
  EXPECT_GT(first, 2 * last) << "the biases come to rest";
  // Without details a step sorts nothing.
  ASSERT_EQ(run_tool(dir, simulate + " -o plain.jsonl").code, 0);
  EXPECT_THAT(TempDir::read(dir.path("plain.jsonl")), HasSubstr("\"churn\":null"));
  EXPECT_THAT(TempDir::read(dir.path("plain.jsonl")), HasSubstr("\"load_p50\":null"));
}

TEST(MetricsCommand, CsvAndTableHaveOneColumnAMetric) {
  const TempDir dir;
  dir.write("t.jsonl", kTrace);
  const ToolResult csv = run_tool(dir, "metrics t.jsonl --format csv");
  ASSERT_EQ(csv.code, 0);
  ASSERT_EQ(csv.lines().size(), 4U);
  EXPECT_THAT(csv.lines()[0], StartsWith("step,layer,entropy,entropy_normalized,"));
  for (const std::string& line : csv.lines()) {
    EXPECT_EQ(static_cast<std::size_t>(std::count(line.begin(), line.end(), ',')),
              metric_fields().size() + 1);
  }
  // No data: cells are empty.
  EXPECT_EQ(csv.lines()[2], "0,1" + std::string(metric_fields().size(), ','));
  const ToolResult table = run_tool(dir, "metrics t.jsonl --format table");
  ASSERT_EQ(table.code, 0);
  ASSERT_EQ(table.lines().size(), 4U);
  EXPECT_EQ(table.lines()[0].size(), table.lines()[1].size());
}

TEST(MetricsCommand, ReadsStandardInputAndGzip) {
  const TempDir dir;
  const ToolResult plain = run_tool(dir, "metrics -", kTrace);
  ASSERT_EQ(plain.code, 0) << plain.err;
  gzFile file = gzopen(dir.path("t").c_str(), "wb");
  gzputs(file, kTrace);
  gzclose(file);
  EXPECT_EQ(run_tool(dir, "metrics t").out, plain.out);
  EXPECT_EQ(run_tool(dir, "metrics -", TempDir::read(dir.path("t"))).out, plain.out);
}

TEST(MetricsCommand, WrongLinesAreNamed) {
  const TempDir dir;
  dir.write("t.jsonl",
            std::string(kTrace) + R"({"step":0,"layer":0,"tokens":25,"top_k":1,"counts":[16,4,4,1]})");
  const ToolResult result = run_tool(dir, "metrics t.jsonl");
  EXPECT_EQ(result.code, 1);
  EXPECT_EQ(result.err, "moectl: t.jsonl:5: step: 0: repeated for layer 0, tag train\n");
  EXPECT_EQ(run_tool(dir, "metrics -", R"({"step":0,"layer":0,"tokens":1,"top_k":1,"counts":[2]})").err,
            "moectl: <stdin>:1: counts: sum 2: must be at most tokens * top_k (1)\n");
}

TEST(MetricsCommand, ListsTheValuesOfExpertsAndDomains) {
  const TempDir dir;
  const auto line = [](int step, const std::string& fields) {
    return "{\"step\":" + std::to_string(step) + R"(,"layer":0,"tokens":8,"top_k":1,"counts":[4,4,0,0])" +
           fields + "}\n";
  };
  const std::string domains = R"(,"domain_counts":{"code":[3,0,0,0],"prose":[1,4,0,0]})";
  dir.write("t.jsonl",
            line(0, domains + R"(,"grad_norm":[1,2,0,0],"domain_loss":{"code":[-1.5,null,null,null],)" +
                        R"("prose":[2,0.25,null,null]})") +
                line(1, domains + R"(,"grad_norm":[1,0,0,0],"expert_loss":[1,-2,null,null])") + line(2, ""));
  const ToolResult result = run_tool(dir, "metrics t.jsonl");
  ASSERT_EQ(result.code, 0) << result.err;
  const auto first = result.json(0)["metrics"], second = result.json(1)["metrics"],
             third = result.json(2)["metrics"];
  EXPECT_EQ(first["domain_share"].dump(), R"({"code":[0.375,0.0,0.0,0.0],"prose":[0.125,0.5,0.0,0.0]})");
  EXPECT_EQ(first["domain_loss"].dump(), R"({"code":[-1.5,null,null,null],"prose":[2.0,0.25,null,null]})");
  EXPECT_EQ(first["update_frequency"].dump(), "[1.0,1.0,0.0,0.0]");
  EXPECT_EQ(second["update_frequency"].dump(), "[1.0,0.5,0.0,0.0]");
  EXPECT_EQ(second["expert_loss"].dump(), "[1.0,-2.0,null,null]");
  EXPECT_FALSE(second.contains("domain_loss"));
  EXPECT_FALSE(third.contains("domain_share"));
}

TEST(MetricsCommand, TheConfigSetsThresholds) {
  const TempDir dir;
  dir.write("t.jsonl", kTrace);
  const std::string model = "version: 1\nmodel: {layers: 2, experts: 4, top_k: 1}\n";
  dir.write("c.yaml", model + "metrics: {capacity_factor: 3, cold_fraction: 1, placement: [0, 0, 1, 1]}\n");
  const auto metrics = run_tool(dir, "metrics t.jsonl --config c.yaml").json()["metrics"];
  EXPECT_EQ(metrics["hot_experts"], 0);   // 16 is under 3 · 6.25
  EXPECT_EQ(metrics["cold_experts"], 3);  // under the mean itself
  EXPECT_EQ(metrics["straggler_slowdown"], 1.6);
  dir.write("other.yaml", "version: 1\nmodel: {layers: 2, experts: 8, top_k: 1}\n");
  const ToolResult other = run_tool(dir, "metrics t.jsonl --config other.yaml");
  EXPECT_EQ(other.code, 1);
  EXPECT_EQ(other.err, "moectl: t.jsonl:2: experts: 4: must be 8, model.experts of other.yaml\n");
}

TEST(MetricsCommand, ComparesTwoTaggedWindows) {
  const TempDir dir;
  dir.write("t.jsonl",
            std::string(kTrace) +
                R"({"step":1,"layer":0,"tokens":15,"top_k":1,"counts":[4,6,4,1]})"
                "\n" +
                R"({"step":1,"layer":0,"tokens":2,"top_k":1,"counts":[2,0,0,0],"tag":"validation"})"
                "\n");
  const ToolResult json = run_tool(dir, "metrics t.jsonl --compare train validation");
  ASSERT_EQ(json.code, 0) << json.err;
  ASSERT_EQ(json.lines().size(), 1U);  // layer 1 has no validation window
  // Windows: (20, 10, 8, 2)/40 and (4, 2, 2, 2)/10.
  const auto row = json.json();
  EXPECT_EQ(row["layer"], 0);
  EXPECT_EQ(row["metrics"]["max_load"]["train"], 0.5);
  EXPECT_EQ(row["metrics"]["max_load"]["validation"], 0.4);
  EXPECT_NEAR(row["metrics"]["max_load"]["difference"].get<double>(), -0.1, 1e-15);
  // 2 arccos Σ √(p q) = 2 arccos(√.2 + √.05 + √.04 + √.01)
  EXPECT_NEAR(row["load_distance"].get<double>(), 2 * std::acos(std::sqrt(.2) + std::sqrt(.05) + .2 + .1),
              1e-12);
  const ToolResult csv = run_tool(dir, "metrics t.jsonl --compare train validation --format csv");
  EXPECT_EQ(csv.lines()[0], "metric,layer,train,validation,difference");
  EXPECT_THAT(csv.out, HasSubstr("\nmin_load,0,0.05,0.2,0.15"));
  const ToolResult none = run_tool(dir, "metrics t.jsonl --compare train test");
  EXPECT_EQ(none.code, 1);
  EXPECT_EQ(none.err, "moectl: --compare: test: no record is in this window\n");
}

// Before against after, of one tag; what only some records have is kept where it says for how many.
TEST(MetricsCommand, ComparesStepsOfOneTag) {
  const TempDir dir;
  const auto line = [](int step, const std::string& counts, const std::string& more) {
    return "{\"step\":" + std::to_string(step) + R"(,"layer":0,"tokens":8,"top_k":1,"counts":)" + counts +
           more + "}\n";
  };
  const std::string a = R"(,"domain_counts":{"a":[4,0,0,0],"b":[0,4,0,0]})",
                    c = R"(,"domain_counts":{"b":[0,2,2,0],"c":[2,0,0,2]})";
  dir.write("t.jsonl", line(0, "[4,4,0,0]", a + R"(,"loss":3)") +
                           line(1, "[4,4,0,0]", a + R"(,"loss":2,"grad_norm":[1,2,3,4])") +
                           line(2, "[2,2,2,2]", c + R"(,"loss":1)") + line(3, "[2,2,2,2]", c));
  const auto row = run_tool(dir, "metrics t.jsonl --compare train@:2 train@2:9").json()["metrics"];
  EXPECT_EQ(row["load_cv"]["train@:2"], 1);
  EXPECT_EQ(row["load_cv"]["train@2:9"], 0);
  EXPECT_EQ(row["loss"]["train@:2"], 2.5);
  EXPECT_EQ(row["loss"]["difference"], -1.5);
  EXPECT_EQ(row["grad_norm_variance"]["train@:2"], 1.25);
  EXPECT_TRUE(row["grad_norm_variance"]["train@2:9"].is_null());
  EXPECT_EQ(row["domain_exclusivity"]["train@:2"], 1);
  EXPECT_NEAR(row["domain_information"]["train@2:9"].get<double>(), std::log(2), 1e-12);
  // All four steps: (12, 12, 4, 4)/32 by a: (8, 0, 0, 0), b: (0, 12, 4, 0), c: (4, 0, 0, 4).
  const auto all = run_tool(dir, "metrics t.jsonl --compare train train@0:4").json()["metrics"];
  EXPECT_NEAR(all["domain_information"]["train"].get<double>(),
              (8 * std::log(32. / 12) + 12 * std::log(12. * 32 / 16 / 12) + 4 * std::log(4. * 32 / 16 / 4) +
               4 * std::log(4. * 32 / 8 / 12) + 4 * std::log(4. * 32 / 8 / 4)) /
                  32,
              1e-12);
  EXPECT_EQ(all["load_cv"]["difference"], 0);
  for (const char* wrong : {"train@", "train@1", "train@x:", "train@1:2x", "train@-1:"}) {
    const ToolResult result = run_tool(dir, std::string("metrics t.jsonl --compare train '") + wrong + "'");
    EXPECT_EQ(result.code, 1);
    EXPECT_EQ(result.err,
              std::string("moectl: --compare: ") + wrong + ": must be TAG or TAG@FROM:TO, of steps\n");
  }
}

// A run log knows its own targets; a config given instead says which count.
TEST(MetricsCommand, TakesTheTargetsOfTheRunItself) {
  const TempDir dir;
  const std::string header =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1,)"
      R"("targets":[0.75,0.25]}}})"
      "\n";
  const std::string line = R"({"step":0,"layer":0,"tokens":100,"top_k":1,"counts":[60,40]})"
                           "\n";
  dir.write("run.jsonl", header + line);
  const ToolResult own = run_tool(dir, "metrics run.jsonl");
  ASSERT_EQ(own.code, 0) << own.err;
  EXPECT_NEAR(own.json(0)["metrics"]["max_to_mean"].get<double>(), 1.6, 1e-15);
  dir.write("c.yaml", "version: 1\nmodel: {layers: 1, experts: 2, top_k: 1}\n");
  EXPECT_NEAR(
      run_tool(dir, "metrics run.jsonl --config c.yaml").json(0)["metrics"]["max_to_mean"].get<double>(), 1.2,
      1e-15);
  // What has no metrics of its own is compared by the same.
  const auto compared = nlohmann::json::parse(run_tool(dir, "compare run.jsonl --format json").out).at(0);
  EXPECT_NEAR(compared["max_vio"].get<double>(), 0.6, 1e-15);
  EXPECT_NEAR(compared["cv_over_floor"].get<double>(), std::sqrt(0.2) / std::sqrt((1.0 / 3 + 3) / 200), 1e-9);
  const std::string tags =
      R"({"step":1,"layer":0,"tokens":100,"top_k":1,"counts":[75,25],"tag":"validation"})"
      "\n";
  dir.write("two.jsonl", header + line + tags);
  EXPECT_NEAR(run_tool(dir, "metrics two.jsonl --compare train validation")
                  .json(0)["metrics"]["max_vio"]["validation"]
                  .get<double>(),
              0, 1e-15);

  dir.write("wrong.jsonl", header.substr(0, header.find("0.75")) + "0.7,0.25]}}}\n" + line);
  const ToolResult wrong = run_tool(dir, "metrics wrong.jsonl");
  EXPECT_EQ(wrong.code, 1);
  EXPECT_THAT(wrong.err, HasSubstr("wrong.jsonl:1: config.model.targets: [0.7,0.25]: targets: sum 0.95"));
  // As many as there are experts, or loads would silently be held against equal ones.
  dir.write("short.jsonl", header.substr(0, header.find("0.75")) + "0.75,0.25,0]}}}\n" + line);
  const ToolResult other = run_tool(dir, "metrics short.jsonl");
  EXPECT_EQ(other.code, 1);
  EXPECT_THAT(other.err,
              HasSubstr("short.jsonl:1: config.model.targets: [0.75,0.25,0]: targets: 3 shares: must be "
                        "one for each of 2 experts"));
}

// Equal experts would be dead under .0025, these are not with .001; one has target 0.
TEST(MetricsCommand, ExpertsWithSmallTargetsAreNotDead) {
  const TempDir dir;
  dir.write("c.yaml",
            "version: 1\nmodel: {layers: 1, experts: 4, top_k: 1, targets: [0.6, 0.399, 0.001, 0]}\n"
            "metrics: {dead_after: 2}\n");
  std::string trace;
  for (int step = 0; step < 30; ++step) {
    trace += R"({"step":)" + std::to_string(step) +
             R"(,"layer":0,"tokens":1000,"top_k":1,"counts":[600,399,1,0]})"
             "\n";
  }
  const ToolResult aimed = run_tool(dir, "metrics - --config c.yaml", trace);
  ASSERT_EQ(aimed.code, 0) << aimed.err;
  EXPECT_EQ(aimed.json(29)["metrics"]["dead_experts"], 0);
  EXPECT_EQ(aimed.json(29)["metrics"]["cold_experts"], 0);
  EXPECT_EQ(aimed.json(29)["metrics"]["inactive_experts"], 1);
  EXPECT_EQ(run_tool(dir, "metrics -", trace).json(29)["metrics"]["dead_experts"], 2);
}

// Each layer is judged by its own group of the config.
TEST(MetricsCommand, LayersThatDifferHaveTheirOwnGroup) {
  const TempDir dir;
  const std::string model = "version: 1\nmodel: {tokens_per_step: 800}\n",
                    policy = "expert_bias: {policy: sign_bias}\n";
  dir.write("c.yaml",
            model +
                "layers: [{ids: [0], experts: 4, top_k: 2}, {ids: [1], experts: 4, top_k: 2, targets: [0.5, "
                "0.25, 0.125, 0.125]}, {ids: [7], experts: 2, top_k: 1}]\n" +
                policy);
  const auto line = [](int layer, int top_k, const std::string& counts) {
    return R"({"step":0,"layer":)" + std::to_string(layer) + R"(,"tokens":800,"top_k":)" +
           std::to_string(top_k) + R"(,"counts":)" + counts + "}\n";
  };
  const std::string two = line(0, 2, "[800,400,200,200]") + line(1, 2, "[800,400,200,200]");
  dir.write("t.jsonl", two + line(7, 1, "[600,200]"));
  const ToolResult result = run_tool(dir, "metrics t.jsonl --config c.yaml");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_NEAR(result.json(0)["metrics"]["max_vio"].get<double>(), 1, 1e-12);
  EXPECT_NEAR(result.json(1)["metrics"]["max_vio"].get<double>(), 0, 1e-12);
  EXPECT_NEAR(result.json(2)["metrics"]["max_vio"].get<double>(), 0.5, 1e-12);
  for (const char* form : {" --trends", " --loads", " --sum --format json", " --format screen",
                           " --compare train@0: train@:1"}) {
    EXPECT_EQ(run_tool(dir, std::string("metrics t.jsonl --config c.yaml") + form).code, 0) << form;
  }
  const ToolResult loads = run_tool(dir, "metrics t.jsonl --config c.yaml --loads --format json");
  EXPECT_DOUBLE_EQ(loads.json(1)["p95"].get<double>(), 1);
  const auto said = [&](const std::string& wrong) {
    return run_tool(dir, "metrics - --config c.yaml", two + wrong).err;
  };
  EXPECT_EQ(said(line(7, 1, "[600,100,100]")),
            "moectl: <stdin>:3: experts: 3: must be 2, layers[2].experts of c.yaml\n");
  EXPECT_EQ(said(line(7, 2, "[800,800]")),
            "moectl: <stdin>:3: top_k: 2: must be 1, layers[2].top_k of c.yaml\n");
  EXPECT_EQ(said(line(2, 2, "[800,400,200,200]")),
            "moectl: <stdin>:3: layer: 2: must be an id of the layer groups of c.yaml\n");
}

TEST(MetricsCommand, ATraceWithoutCountsIsRefusedWithTheReason) {
  const TempDir dir;
  dir.write("run.jsonl",
            R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})"
            "\n"
            R"({"step":0,"layer":null})"
            "\n"
            R"({"step":0,"layer":0,"tokens":100,"top_k":1,"metrics":{"max_vio":0.5}})"
            "\n");
  dir.write("none.jsonl", "");
  dir.write("other.jsonl", R"({"step":0,"layer":0,"tokens":2,"top_k":1,"counts":[1,1],"tag":"other"})");
  for (const char* form : {"", " --format csv", " --format table", " --trends", " --loads", " --sum",
                           " --format screen", " --by domain", " --compare train other"}) {
    const ToolResult none = run_tool(dir, std::string("metrics none.jsonl") + form);
    EXPECT_EQ(none.code, 1) << form;
    EXPECT_EQ(none.out, "") << form;
    EXPECT_THAT(none.err, StartsWith("moectl: none.jsonl: no record ")) << form;
    const ToolResult off = run_tool(dir, std::string("metrics run.jsonl") + form);
    EXPECT_EQ(off.code, 1) << form;
    EXPECT_EQ(off.err,
              "moectl: run.jsonl:3: counts: missing: required: this log was written with per_expert off, or "
              "the step was invalid\n")
        << form;
  }
  EXPECT_EQ(
      run_tool(dir, "metrics other.jsonl --sum").err,
      "moectl: other.jsonl: no record of a layer tagged 'train' has counts; there are others: --by tag\n");
  EXPECT_EQ(run_tool(dir, "metrics other.jsonl --loads").err,
            "moectl: other.jsonl: no record of a layer tagged 'train' has counts\n");
}

TEST(MetricsCommand, NoFormatIsDroppedWithoutAWord) {
  const TempDir dir;
  dir.write("t.jsonl", kTrace);
  for (const std::string form : {"--trends", "--loads", "--compare train validation"}) {
    const ToolResult result = run_tool(dir, "metrics t.jsonl --format screen " + form);
    EXPECT_EQ(result.code, 1) << form;
    EXPECT_EQ(result.out, "") << form;
    EXPECT_EQ(result.err, "moectl: --format: screen: must be json, csv or table with " +
                              form.substr(0, form.find(' ')) + '\n');
  }
}

TEST(MetricsCommand, TheScreenNamesEachShapeAndItsOwnColumn) {
  const TempDir dir;
  std::string wide = "[20";
  for (int e = 1; e < 64; ++e) wide += ",20";
  const std::string trace = R"({"step":0,"layer":0,"tokens":640,"top_k":2,"counts":)" + wide + "]}\n" +
                            R"({"step":0,"layer":1,"tokens":640,"top_k":2,"counts":[360,340,300,280]})" +
                            "\n";
  // "4 experts, top-2" is a part of "64 experts, top-2".
  EXPECT_THAT(run_tool(dir, "metrics - --format screen", trace).out,
              StartsWith("2 layers, 64 experts, top-2 and 4 experts, top-2, 1 step"));
  const std::string near = R"({"step":0,"layer":0,"tokens":100,"top_k":1,"counts":[58,42]})"
                           "\n";
  std::string unsure = run_tool(dir, "metrics - --sum --format screen", near).out;
  std::ranges::replace(unsure, '\n', ' ');
  EXPECT_THAT(unsure, HasSubstr("more tokens decide (imbalanced from)"));
  EXPECT_THAT(run_tool(dir, "metrics - --format screen", near).out,
              HasSubstr("more tokens decide (sure at)"));
}

// A loss is a mean over tokens: a step of one token counts for little.
TEST(MetricsCommand, TheLossOfAWindowIsWeightedByTokens) {
  const std::string trace = R"({"step":0,"layer":0,"tokens":99,"top_k":1,"counts":[50,49],"loss":2})"
                            "\n"
                            R"({"step":1,"layer":0,"tokens":1,"top_k":1,"counts":[1,0],"loss":12})"
                            "\n";
  const TempDir dir;
  const ToolResult result = run_tool(dir, "metrics - --compare train train@:1", trace);
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_NEAR(result.json()["metrics"]["loss"]["train"].get<double>(), (99 * 2 + 12) / 100.0, 1e-12);
}

}  // namespace
}  // namespace moectl
