// moectl simulate: the closed loop from the command line.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <numeric>

#include "test_paths.h"
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

TEST_F(SimulateTool, ComparesConfigsOnOneRouter) {
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
                              "+end_over_floor +dead_experts +limit_hits +floor"));
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
  const auto direct =
      json("adaptive.yaml sign.yaml --steps 150 --scenario shift --capacity-factor 1.1 -o run.jsonl");
  const ToolResult compared = run_tool(dir_, "compare run-adaptive.jsonl run-sign.jsonl --format json");
  ASSERT_EQ(compared.code, 0) << compared.err;
  const auto rows = nlohmann::json::parse(compared.out);
  for (std::size_t i = 0; i < 2; ++i) {
    for (const char* name : {"settle", "max_vio", "max_vio_over_floor", "cv_over_floor", "excess_area",
                             "end_over_floor", "dead_experts", "drop_rate", "limit_hits"}) {
      EXPECT_EQ(direct[i][name], rows[i][name]) << i << name;
    }
  }
}

TEST_F(SimulateTool, RunLogsAreNotWrittenTwiceOrInVain) {
  std::filesystem::create_directory(dir_.path("other"));
  dir_.write("other/sign.yaml", kSign);
  const ToolResult twice = run("sign.yaml other/sign.yaml --steps 5 -o run.jsonl");
  EXPECT_EQ(twice.code, 1);
  EXPECT_THAT(twice.err, ::testing::HasSubstr("output: run-sign.jsonl: two configs of the same name"));
  EXPECT_FALSE(std::filesystem::exists(dir_.path("run-sign.jsonl")));
  // Said at once, not after a billion steps.
  const ToolResult nowhere = run("sign.yaml --steps 1000000000 -o missing/run.jsonl");
  EXPECT_EQ(nowhere.code, 1);
  EXPECT_THAT(nowhere.err, ::testing::HasSubstr("output: missing/run.jsonl: cannot be written"));
}

TEST_F(SimulateTool, ARunWithoutMeasurementsIsNotUnsettled) {
  dir_.write("off.yaml", "version: 1\nmode: off\nmodel: {layers: 1, experts: 16, top_k: 2}\n");
  EXPECT_THAT(run("off.yaml --steps 30").lines().at(1), ::testing::MatchesRegex("off.yaml +- .*"));
  EXPECT_THAT(run("sign.yaml --steps 30").lines().at(1), ::testing::MatchesRegex("sign.yaml +never .*"));
}

TEST_F(SimulateTool, CorrelatedTokensAreMeasuredAgainstTheirOwnFloor) {
  const auto rows = json("adaptive.yaml --steps 300 --sequence-length 128");
  EXPECT_GT(rows[0]["max_vio"], 0.25);
  EXPECT_LT(rows[0]["max_vio_over_floor"], 1.25);
}

// The steady window ends at the event: whether a policy copes with what happens then stands in the other columns.
TEST_F(SimulateTool, TheTableShowsWhichPolicyCopesWithAScenario) {
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

// What the options add acts, seen in the run log of a layer that nothing balances.
class SimulateOptions : public SimulateTool {
 protected:
  SimulateOptions() {
    dir_.write("fixed.yaml",
               "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2, tokens_per_step: 1024}\n");
  }
  // The records of a run, without the header.
  std::vector<nlohmann::json> records(const std::string& arguments,
                                      const std::string& config = "fixed.yaml") {
    const ToolResult result = run(config + " " + arguments + " -o -");
    EXPECT_EQ(result.code, 0) << arguments << result.err;
    std::vector<nlohmann::json> records;
    for (std::size_t i = 1; i < result.lines().size(); ++i) records.push_back(result.json(i));
    return records;
  }
  static std::vector<int> counts(const nlohmann::json& record) {
    return record["counts"].get<std::vector<int>>();
  }
  static int chosen_experts(const nlohmann::json& record, int least = 1) {
    const std::vector<int> all = counts(record);
    return static_cast<int>(std::count_if(all.begin(), all.end(), [&](int c) { return c >= least; }));
  }
  // Experts that had tokens before step 300 and hardly any then.
  static int lost(const std::vector<nlohmann::json>& steps) {
    const std::vector<int> before = counts(steps.at(299)), after = counts(steps.at(300));
    int experts = 0;
    for (std::size_t i = 0; i < before.size(); ++i) experts += before[i] > 15 && after[i] <= 5;
    return experts;
  }
  static int largest(const nlohmann::json& record) {
    const std::vector<int> all = counts(record);
    return *std::max_element(all.begin(), all.end());
  }
};

TEST_F(SimulateOptions, CapacityFactorDropsWhatIsAboveIt) {
  const auto step = records("--steps 1 --capacity-factor 1.5")[0];
  int over = 0;
  for (const int c : counts(step)) over += std::max(0, c - 192);  // 1.5 · 2 · 1024 / 16
  EXPECT_GT(over, 0);
  EXPECT_EQ(step["dropped"], over);
  EXPECT_DOUBLE_EQ(step["metrics"]["drop_rate"].get<double>(), over / 2048.0);
  EXPECT_FALSE(records("--steps 1")[0].contains("dropped"));
  // The table has a column for it, but not where nothing can be dropped.
  const auto row = json("fixed.yaml --steps 1 --capacity-factor 1.5")[0];
  EXPECT_DOUBLE_EQ(row["drop_rate"].get<double>(), over / 2048.0);
  EXPECT_THAT(run("fixed.yaml --steps 1 --capacity-factor 1.5").out, ::testing::HasSubstr("drop_rate"));
  EXPECT_THAT(run("fixed.yaml --steps 1").out, ::testing::Not(::testing::HasSubstr("drop_rate")));
}

// Only with jitter does the temperature, which multiplies it, move a load.
TEST_F(SimulateOptions, JitterLetsTheTemperatureMoveTheLoad) {
  dir_.write("hot.yaml",
             "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2, tokens_per_step: 1024}\n"
             "router_temperature: {policy: fixed, initial: 3}\n");
  EXPECT_EQ(counts(records("--steps 1", "hot.yaml")[0]), counts(records("--steps 1")[0]));
  const auto warm = records("--steps 1 --jitter 1")[0], hot = records("--steps 1 --jitter 1", "hot.yaml")[0];
  EXPECT_LT(hot["metrics"]["load_cv"], 0.8 * warm["metrics"]["load_cv"].get<double>());
  EXPECT_LT(warm["metrics"]["load_cv"], 0.95 * records("--steps 1")[0]["metrics"]["load_cv"].get<double>());
}

TEST_F(SimulateOptions, EachKindOfCollapseStrikesAsItSays) {
  const auto collapse = [&](const std::string& kind) {
    return records("--steps 340 --event 300 --scenario collapse" + kind);
  };
  const auto cold = collapse(" --collapse cold_start"), third = collapse(" --collapse dead_third"),
             poisoned = collapse(" --collapse poisoned_bias"), runaway = collapse(" --collapse runaway"),
             steady = records("--steps 340");
  for (const auto* other : {&third, &poisoned, &runaway})
    EXPECT_EQ(counts((*other)[299]), counts(steady[299]));
  EXPECT_GT(largest(cold[0]), 2 * largest(steady[0]));
  EXPECT_GT(largest(cold[339]), 1000);          // nearly every token chooses one expert
  EXPECT_EQ(lost(third), 5);                    // of sixteen
  EXPECT_LE(chosen_experts(poisoned[300]), 5);  // wrong by about a whole probability, in one blow
  EXPECT_LE(lost(runaway), 1);                  // while this one only begins:
  const std::vector<int> before = counts(steady[300]), after = counts(runaway[300]);
  int ahead = 0;
  for (std::size_t i = 0; i < 16; ++i) ahead += after[i] > 1.5 * before[i] + 50;
  EXPECT_EQ(ahead, 1);
  EXPECT_LT(chosen_experts(runaway[339], 10), chosen_experts(steady[339], 10) - 1);
  EXPECT_EQ(runaway, collapse(""));
}

// It holds from the first step on, so there is no event to divide the run by.
TEST_F(SimulateOptions, AColdStartHasNoEvent) {
  const std::string arguments = "fixed.yaml --steps 60 --scenario collapse --collapse ";
  EXPECT_FALSE(run(arguments + "cold_start -o -").json().contains("shift"));
  EXPECT_EQ(run(arguments + "dead_third -o -").json()["shift"], 30);
  EXPECT_GT(json(arguments + "cold_start")[0]["max_vio"], 6);
}

TEST_F(SimulateOptions, MixtureSpreadVariesTheDomains) {
  dir_.write(
      "domains.yaml",
      "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2, tokens_per_step: 1024, domains: [a, b, c]}\n");
  const auto widest = [&](const std::string& arguments) {
    int least = 1024, most = 0;
    for (const auto& step : records("--steps 20 " + arguments, "domains.yaml")) {
      const auto of_a = step["domain_counts"]["a"].get<std::vector<int>>();
      const int tokens = std::accumulate(of_a.begin(), of_a.end(), 0) / 2;
      least = std::min(least, tokens);
      most = std::max(most, tokens);
    }
    return most - least;
  };
  EXPECT_LT(widest(""), 120);  // a third of 1024, give or take what chance does
  EXPECT_GT(widest("--mixture-spread 1"), 300);
}

TEST_F(SimulateOptions, ScoreSpaceAndScaleSetTheUnitOfTheBias) {
  const auto gap = [&](const std::string& arguments) {
    return records("--layers 1 --steps 1 " + arguments, "adaptive.yaml")[0]["gap_sum"].get<double>();
  };
  const double probability = gap("");
  EXPECT_NEAR(gap("--score-scale 100"), 100 * probability, 1e-3 * probability);
  EXPECT_GT(gap("--score-space logit"), 3 * probability);
  EXPECT_EQ(run("fixed.yaml --steps 1 --score-space logit -o -").json()["config"]["model"]["score_space"],
            "logit");
}

// Without a spread of its own every token of a cluster chooses the same two experts.
TEST_F(SimulateOptions, ClustersAndTheirSpreadMakeRoutingLumpy) {
  EXPECT_LE(chosen_experts(records("--steps 1 --clusters 4 --token-spread 0")[0]), 8);
  EXPECT_GT(chosen_experts(records("--steps 1 --clusters 4")[0]), 12);
  EXPECT_GT(chosen_experts(records("--steps 1 --token-spread 0")[0]), 8);
}

TEST_F(SimulateOptions, SunkExpertsSinkTogether) {
  const std::string dead = "--steps 301 --event 300 --scenario dead";
  EXPECT_EQ(lost(records(dead)), 1);
  EXPECT_EQ(lost(records(dead + " --sunk-experts 5")), 5);
}

TEST_F(SimulateOptions, DelayWithholdsTheFirstStatistics) {
  const auto steps = records("--steps 6 --delay 4");
  for (std::size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i]["tokens"], i < 4 ? 0 : 1024) << i;
  EXPECT_EQ(counts(steps[4]), counts(records("--steps 1")[0]));
  EXPECT_EQ(records("--steps 6 --scenario delay"), steps);  // four steps, where the config declares none
}

TEST_F(SimulateOptions, EveryMistakeNamesOptionValueAndConstraint) {
  const auto says = [&](int code, const std::string& arguments, const std::string& message) {
    const ToolResult result = run("fixed.yaml --steps 20 " + arguments);
    EXPECT_EQ(result.code, code) << arguments;
    EXPECT_THAT(result.err, ::testing::HasSubstr(message)) << arguments;
    EXPECT_EQ(result.out, "");
  };
  says(2, "--tokens 0", "--tokens: 0: must be a whole number of at least 1");
  says(2, "--tokens 1e9", "--tokens: 1e9: must be a whole number of at least 1");
  says(2, "--seed -1", "--seed: -1: must be a whole number of at least 0");
  says(2, "--layers 3000000000", "--layers: 3000000000: must be a whole number from 1 to 2147483647");
  says(2, "--delay 3000000000", "--delay: 3000000000: must be a whole number from 0 to 2147483647");
  says(2, "--mixture-spread -1", "--mixture-spread: -1: must be a number of at least 0");
  for (const char* option : {"jitter", "mixture-spread", "token-spread", "capacity-factor", "score-scale"}) {
    says(2, std::string("--") + option + " nan", std::string("--") + option + ": nan: must be a number");
    says(2, std::string("--") + option + " inf", std::string("--") + option + ": inf: must be a number");
  }
  says(2, "--score-scale 0", "--score-scale: 0: must be a number above 0");
  says(2, "--collapse cold", "--collapse: cold not in {runaway,cold_start,dead_third,poisoned_bias}");
  says(1, "--jitter 1e300", "--jitter: 1e+300: must be from 0 to 1000");
  says(1, "--score-scale 1e-30", "--score-scale: 1e-30: must be from 1e-06 to 1e+06");
  says(1, "--tokens 999999999999",
       "--tokens: 999999999999: layers · tokens · top_k must be at most 134217728");
  says(1, "--layers 1000 --experts 30000",
       "--clusters: 48: layers · experts · clusters must be at most 134217728");
  says(1, "--experts 70000", "--experts: 70000: must be from 1 to 65535");
  says(1, "--clusters 3", "--clusters: 3: must be from 4 to 65535");
  says(1, "--top-k 16", "--top-k: 16: must be below --experts");
  says(1, "--top-k 17", "--top-k: 17: must be from 1 to 16");
  says(1, "--sequence-length 100", "--sequence-length: 100: must divide the tokens of a step (1024)");
  says(1, "--event 20 --scenario shift", "--event: 20: must be below --steps (20)");
  says(1, "--event 10", "--event: 10: this scenario has no event");
  says(1, "--event 10 --scenario delay", "--event: 10: this scenario has no event");
  says(1, "--experts 1", "model.top_k: 2: must be from 1 to 1");
  says(1, "--delay 20", "--delay: 20: must be below --steps (20)");
  says(1, "--delay 0 --scenario delay", "--delay: 0: must be at least 1 in scenario delay");
  says(1, "--collapse runaway", "--collapse: runaway: needs --scenario collapse");
  says(1, "--sunk-experts 2", "--sunk-experts: 2: needs --scenario dead");
  says(1, "--sunk-experts 16 --scenario dead", "--sunk-experts: 16: must be at least 1 and below");
  says(1, "--scenario collapse --collapse dead_third --experts 2 --top-k 1",
       "--experts: 2: must be at least 3");
  dir_.write("one.yaml", "version: 1\nmodel: {layers: 1, experts: 8, top_k: 2, domains: [a]}\n");
  EXPECT_THAT(run("one.yaml --scenario shift").err,
              ::testing::HasSubstr("model.domains: 1: must be at least 2 in scenario shift"));
}

TEST_F(SimulateTool, EveryScenarioRuns) {
  for (const char* scenario : {"steady", "shift", "collapse", "dead", "drift", "delay", "noise"}) {
    EXPECT_EQ(run(std::string("adaptive.yaml --steps 30 --scenario ") + scenario).code, 0) << scenario;
  }
}

TEST_F(SimulateTool, NamesTheError) {
  EXPECT_EQ(run("").code, 2);
  EXPECT_EQ(run("adaptive.yaml --scenario storm").code, 2);
  EXPECT_EQ(run("adaptive.yaml --gate hard").code, 2);
  EXPECT_EQ(run("adaptive.yaml --steps 0").code, 2);
  EXPECT_EQ(run("missing.yaml").code, 1);
  EXPECT_EQ(run("adaptive.yaml sign.yaml -o -").code, 1);
}

TEST_F(SimulateTool, AKeyThatIsSetTwiceIsRefused) {
  const std::string step = "sign.yaml --steps 20 --set expert_bias.options.step=1e-3,1e-2 --set ";
  const struct {
    const char *set, *message;
  } cases[] = {
      {"expert_bias.options.step=1", "--set: expert_bias.options.step: given twice: must be given once"},
      {"'expert_bias={policy: fixed}'", "--set: expert_bias: expert_bias.options.step is set as well"},
      {"expert_bias.options.step.x=1",
       "--set: expert_bias.options.step.x: expert_bias.options.step is set as well"}};
  for (const auto& c : cases) {
    const ToolResult result = run(step + c.set);
    EXPECT_EQ(result.code, 1) << c.set;
    EXPECT_THAT(result.err, ::testing::HasSubstr(c.message));
  }
  EXPECT_EQ(run(step + "expert_bias.options.zero_mean_move=false").code, 0);
}

TEST_F(SimulateTool, SaysThatTheEnvironmentHoldsEverything) {
  const std::string held = "MOECTL_HOLD is set: every actuator is held where it is (host_hold)\n";
  EXPECT_EQ(run_tool(dir_, "simulate sign.yaml --steps 20", "", "MOECTL_HOLD=1").err, held);
  EXPECT_EQ(run("sign.yaml --steps 20").err, "");
}

// docs/targets.md promises what its own commands give.
TEST(Targets, TheCommandsOfThePageReachTheTarget) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "1600 steps for one figure";
#endif
  std::ifstream page(MOECTL_SOURCE_DIR "/docs/targets.md");
  std::vector<std::string> commands;
  const std::string start = "   moectl ";
  for (std::string line; std::getline(page, line);) {
    if (line.starts_with(start)) commands.push_back(line.substr(start.size()));
  }
  ASSERT_THAT(commands, ::testing::ElementsAre(
                            ::testing::HasSubstr("-o before.jsonl"), "compare before.jsonl", "check pi.yaml",
                            ::testing::HasSubstr("-o after.jsonl"), "compare before.jsonl after.jsonl"));
  const TempDir dir;
  std::filesystem::copy(MOECTL_SOURCE_DIR "/policies", dir.path("policies"));
  const auto figures = [&](const std::string& command) {
    return nlohmann::json::parse(run_tool(dir, command + " --format json").out).back();
  };
  ASSERT_EQ(run_tool(dir, commands[0]).code, 0);
  const auto before = figures(commands[1]);
  const double target = 1.25 * before["cv"].get<double>() / before["cv_over_floor"].get<double>();
  std::string config = TempDir::read(dir.path("policies/pi.yaml"));
  const std::string key = "    target: ", old = key + "0.15 ";
  ASSERT_NE(config.find(old), std::string::npos);
  dir.write("pi.yaml", config.replace(config.find(old), old.size(), key + std::to_string(target) + ' '));
  EXPECT_EQ(run_tool(dir, commands[2]).code, 0);
  ASSERT_EQ(run_tool(dir, commands[3]).code, 0);
  EXPECT_NEAR(figures(commands[4])["excess_cv"].get<double>(), target, 0.1 * target);
}

}  // namespace
}  // namespace moectl
