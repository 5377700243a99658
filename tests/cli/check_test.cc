#include <gmock/gmock.h>

#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

const char* const kGood = "version: 1\nmodel: {layers: 3, experts: 16, top_k: 2, tokens_per_step: 2048}\n";

std::string with_target(const char* metric, const char* target, const char* limits = "{}") {
  return std::string(kGood) + "aux_loss_weight: {policy: pi, initial: 0.01, options: {metric: " + metric +
         ", target: " + target + "}, limits: " + limits + "}\n";
}

TEST(Check, PrintsAConfigThatIsReadyToUse) {
  const TempDir dir;
  const ToolResult first = run_tool(dir, "check " + dir.write("c.yaml", with_target("load_cv", "0.3")));
  EXPECT_EQ(first.code, 0) << first.err;
  EXPECT_EQ(first.err, "");
  EXPECT_THAT(first.out, HasSubstr("\naux_loss_weight:\n  policy: pi\n"));
  EXPECT_THAT(first.out, HasSubstr("# valid and feasible\n"));
  const ToolResult again = run_tool(dir, "check -", first.out);
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_EQ(again.out, first.out);
}

TEST(Check, ExplainsEveryKey) {
  const TempDir dir;
  dir.write("c.yaml", with_target("load_cv", "0.3", "{rate: 0.2}") + "safety: {rollback: {within: 7}}\n");
  const ToolResult result = run_tool(dir, "check c.yaml --explain");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("model.layers: 3   # required; from 1 to 65536\n    MoE layers.\n"));
  EXPECT_THAT(result.out,
              HasSubstr("\naux_loss_weight.limits.rate: 0.2   # default 0.1; above 0 and at most 1e9\n"));
  EXPECT_THAT(result.out, HasSubstr("\naux_loss_weight.options.target: 0.3   # default "));
  EXPECT_THAT(result.out, HasSubstr("\nsafety.rollback.within: 7   # default 5; at least 1; steps\n"));
  EXPECT_THAT(result.out, HasSubstr("\nsafety.oscillation: off   # default off; off, on or its keys\n"));
  EXPECT_THAT(result.out, HasSubstr("\nsafety.oscillation.min_gain: (not given)   # default 0.05; "));
}

TEST(Check, ExplainsTheDefaultsWithoutAConfig) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "check --explain");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("\nexpert_bias.options: (not given)   # default none; "));
  EXPECT_THAT(result.out, HasSubstr("\nsafety.oscillation: off   # default off; off, on or its keys\n"));
  EXPECT_EQ(run_tool(dir, "check").code, 2);
}

TEST(Check, PrintsTheReferenceWithoutAConfig) {
  const TempDir dir;
  EXPECT_THAT(run_tool(dir, "check --reference").out, HasSubstr("| `capacity_factor` | 1.25 | above 0 |"));
  EXPECT_EQ(run_tool(dir, "check").code, 2);
}

TEST(Check, AWrongConfigNamesThePlace) {
  const TempDir dir;
  dir.write("c.yaml", "version: 1\nmodel: {layers: 3, experts: 16, topk: 2}\n");
  const ToolResult text = run_tool(dir, "check c.yaml");
  EXPECT_EQ(text.code, 1);
  EXPECT_EQ(text.out, "");
  EXPECT_EQ(text.err, "moectl: c.yaml:2:33: model.topk: 2: unknown key; did you mean 'top_k'?\n");
  const ToolResult json = run_tool(dir, "check c.yaml --format json");
  EXPECT_EQ(json.code, 1);
  EXPECT_EQ(json.json()["valid"], false);
  EXPECT_THAT(json.json()["error"].get<std::string>(), HasSubstr("c.yaml:2:33"));
}

// The same words as where a controller is set up.
TEST(Check, ReadsTheFileOfBiasesAsAControllerDoes) {
  const TempDir dir;
  dir.write("c.yaml",
            "version: 1\nmodel: {layers: 2, experts: 4, top_k: 1}\n"
            "expert_bias: {policy: sign_bias, initial: b.json}\n");
  dir.write("t.jsonl", R"({"format":"moectl-trace","version":1})"
                       "\n");
  const auto refused = [&](const std::string& words) {
    const ToolResult text = run_tool(dir, "check c.yaml");
    EXPECT_EQ(text.code, 1);
    EXPECT_EQ(text.out, "");
    EXPECT_THAT(text.err, HasSubstr("expert_bias.initial: "));
    EXPECT_THAT(text.err, HasSubstr("b.json: " + words));
    EXPECT_EQ(text.err, run_tool(dir, "replay c.yaml t.jsonl").err);
    EXPECT_EQ(run_tool(dir, "check c.yaml --explain").code, 1);
    const ToolResult json = run_tool(dir, "check c.yaml --format json");
    EXPECT_EQ(json.code, 1);
    EXPECT_EQ(json.json()["valid"], false);
    EXPECT_THAT(json.json()["error"].get<std::string>(), HasSubstr("b.json: " + words));
  };
  refused("cannot be opened");
  dir.write("b.json", "biases");
  refused("not JSON");
  const auto biases = [&](const std::string& second) {
    dir.write("b.json", R"({"format":"moectl-biases","version":1,"layers":{"0":[0,0,0,0])" + second + "}}");
  };
  biases("");
  refused("must hold layer 1");
  biases(R"(,"1":[0,0,0,0,0,0,0,0])");
  refused("adopt: layer 1: expert_bias: 8 values: must be 4");
  biases(R"(,"1":[])");
  refused("adopt: layer 1: expert_bias: 0 values: must be 4");
  biases(R"(,"1":[0,0,0,99])");
  refused("adopt: layer 1: expert_bias[3]: 99: must be within limits.min and limits.max");
  biases(R"(,"1":[0,0,0.5,0])");
  EXPECT_EQ(run_tool(dir, "check c.yaml").code, 0);
}

TEST(Check, ATargetBelowTheNoiseFloorIsInfeasible) {
  const TempDir dir;
  // √((16/2 - 1)/2048) = 0.05846 for one step; over a cadence of 4 steps, half of it.
  dir.write("under.yaml", with_target("load_cv", "0.05"));
  const ToolResult text = run_tool(dir, "check under.yaml");
  EXPECT_EQ(text.code, 1);
  EXPECT_THAT(text.out, HasSubstr("# valid, but infeasible\n"));
  EXPECT_THAT(text.err, HasSubstr("infeasible: aux_loss_weight.options.target: 0.05: load_cv"));
  EXPECT_THAT(text.err, HasSubstr("0.05846"));
  const ToolResult json = run_tool(dir, "check under.yaml --format json");
  EXPECT_EQ(json.code, 1);
  EXPECT_EQ(json.json()["valid"], true);
  EXPECT_EQ(json.json()["feasible"], false);
  ASSERT_EQ(json.json()["conflicts"].size(), 1U);
  EXPECT_EQ(json.json()["conflicts"][0]["metrics"], (std::vector<std::string>{"load_cv"}));

  dir.write("window.yaml", with_target("load_cv", "0.05", "{cadence: 4}"));
  EXPECT_EQ(run_tool(dir, "check window.yaml").code, 0);
  dir.write("over.yaml", with_target("load_cv", "0.06"));
  const ToolResult over = run_tool(dir, "check over.yaml --format json");
  EXPECT_EQ(over.code, 0);
  EXPECT_EQ(over.json()["feasible"], true);
  EXPECT_TRUE(over.json()["conflicts"].empty()) << over.out;
  EXPECT_THAT(over.json()["notes"].dump(), HasSubstr("aux_loss_weight is not judged"));
  dir.write("vio.yaml", with_target("max_vio", "0.05"));
  EXPECT_EQ(run_tool(dir, "check vio.yaml").code, 1);
}

// 58 layers × 256 experts × 500 words of two counts, and under one per cent of other sums.
TEST(Check, SaysWhatKimiK3sBinsCostOverRanksAndRefusesThemForLogits) {
  const TempDir dir;
  const auto config = [](const std::string& space) {
    return "version: 1\nmodel: {layers: 58, experts: 256, top_k: 8, score_space: " + space +
           "}\nexpert_bias: {policy: quantile_bias, options: {form: k3, gain: 1}}\n";
  };
  dir.write("k3.yaml", config("probability"));
  const ToolResult checked = run_tool(dir, "check k3.yaml");
  EXPECT_EQ(checked.code, 0);
  EXPECT_THAT(checked.out, HasSubstr("# form: k3: over ranks, each step sums up 59.64 MB"));
  dir.write("logits.yaml", config("logit"));
  const ToolResult refused = run_tool(dir, "check logits.yaml");
  EXPECT_EQ(refused.code, 1);
  EXPECT_THAT(refused.err, HasSubstr("form: k3: bins scores within [0, 1], and logits are not"));
}

TEST(FieldCases, A4_CheckListsWhatAConfigNeedsFromTheRouter) {
  const TempDir dir;
  const std::string model = "version: 1\nmodel: {layers: 1, experts: 8, top_k: 2}\n";
  dir.write("gap.yaml", model +
                            "expert_bias: {policy: adaptive_bias, options: {form: gap, rescue: true}}\n"
                            "router_temperature: {policy: entropy_temperature}\n");
  EXPECT_THAT(
      run_tool(dir, "check gap.yaml").out,
      HasSubstr("# the router must record: the chosen experts, top_values, probabilities, biased_scores\n"));
  dir.write("auto.yaml", model + "expert_bias: {policy: adaptive_bias}\n");
  const ToolResult uses = run_tool(dir, "check auto.yaml");
  EXPECT_THAT(uses.out, HasSubstr("# the router must record: the chosen experts\n"));
  EXPECT_THAT(uses.out, HasSubstr("# used where it is recorded: top_values\n"));
  // A law that reads counts alone: the check of its moves uses them.
  dir.write("sign.yaml",
            "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2}\nexpert_bias: {policy: sign_bias}\n");
  EXPECT_THAT(run_tool(dir, "check sign.yaml").out, HasSubstr("# used where it is recorded: top_values\n"));
  const ToolResult json = run_tool(dir, "check gap.yaml --format json");
  EXPECT_EQ(json.json()["inputs"]["required"].get<std::vector<std::string>>(),
            (std::vector<std::string>{"top_values", "probabilities", "biased_scores"}));
}

TEST(Check, WithoutTokensItReportsThatTheFloorIsNotJudged) {
  const TempDir dir;
  std::string text = with_target("load_cv", "0.05");
  text.erase(text.find(", tokens_per_step: 2048"), 23);
  const ToolResult result = run_tool(dir, "check " + dir.write("c.yaml", text));
  EXPECT_EQ(result.code, 0);
  EXPECT_THAT(result.out, HasSubstr("# model.tokens_per_step is not given"));
}

// Two experts of sixteen have a target near 0, one a target of 0: the floor of their relative loads is far above that
// of equal ones, and what their loads as such can be is less even.
TEST(Check, HandlesUnequalTargets) {
  const TempDir dir;
  const std::string model =
      "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2, tokens_per_step: 2048, targets: [0.01, 0.01, 0, "
      "0.0754, "
      "0.0754, 0.0754, 0.0754, 0.0754, 0.0754, 0.0754, 0.0754, 0.0754, 0.0754, 0.0754, 0.0754, 0.0752]}\n";
  // √(mean over 15 of (1/(2 w) - 1) / 2048): 49 twice, 5.631 twelve times, 5.649: √(11.415/2048).
  dir.write(
      "c.yaml",
      model + "aux_loss_weight: {policy: pi, initial: 0.01, options: {metric: load_cv, target: 0.07}}\n");
  const ToolResult under = run_tool(dir, "check c.yaml");
  EXPECT_EQ(under.code, 1);
  EXPECT_THAT(under.err, HasSubstr("load_cv = 0.07 lies under the noise floor"));
  EXPECT_THAT(under.err, HasSubstr("load_cv = 0.07466"));
  dir.write(
      "c.yaml",
      model + "aux_loss_weight: {policy: pi, initial: 0.01, options: {metric: load_cv, target: 0.08}}\n");
  const ToolResult over = run_tool(dir, "check c.yaml");
  EXPECT_EQ(over.code, 0) << over.err;
  EXPECT_THAT(over.out,
              HasSubstr("# aux_loss_weight: the auxiliary loss pulls towards equal loads, not towards"));
  dir.write("c.yaml", model + "health: {bands: {entropy_normalized: [0.97, 1], load_cv: [0, 0.3]}}\n");
  const ToolResult even = run_tool(dir, "check c.yaml");
  EXPECT_EQ(even.code, 1);
  EXPECT_THAT(even.err,
              HasSubstr("health.bands: entropy_normalized in [0.97, 1] is more even than model.targets"));
  dir.write("c.yaml", model + "health: {bands: {entropy_normalized: [0.9, 1], load_cv: [0, 0.3]}}\n");
  const ToolResult good = run_tool(dir, "check c.yaml");
  EXPECT_EQ(good.code, 0) << good.err;
  EXPECT_THAT(good.out, HasSubstr("# bands: load_cv is relative to model.targets: judged alone\n"));
}

TEST(Check, ReportsTargetsThatAreTooSmallToMeasure) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "check -",
                                     "version: 1\nmodel: {layers: 1, experts: 3, top_k: 1, tokens_per_step: "
                                     "1000, targets: [0.0005, 0.9995, 0]}\n");
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("# model.targets[0]: 0.5 tokens a step: too few"));
  EXPECT_THAT(result.out, Not(HasSubstr("# model.targets[2]")));
}

}  // namespace
}  // namespace moectl
