#include <gmock/gmock.h>

#include <cmath>
#include <map>
#include <random>

#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using Numbers = std::vector<double>;

// The published method: Megatron's form, no limit that acts.
const char* const kSign =
    "version: 1\n"
    "model: {layers: 2, experts: 4, top_k: 2}\n"
    "expert_bias:\n"
    "  policy: sign_bias\n"
    "  options: {step: 1.0e-3, zero_mean_move: false}\n"
    "  limits: {min: -16, max: 16, rate: 0.01, center: false}\n";

TEST(Replay, EqualsSignBiasStepByStep) {
  const TempDir dir;
  std::mt19937_64 random(5);
  std::string trace;
  std::vector<std::vector<std::int64_t>> all;
  for (int step = 0; step < 60; ++step) {
    for (int layer = 0; layer < 2; ++layer) {
      std::vector<std::int64_t> counts(4);
      std::int64_t sum = 0;
      for (auto& c : counts)
        sum += c = static_cast<std::int64_t>(random() % 4);  // small: zeros of the sign occur
      all.push_back(counts);
      trace +=
          nlohmann::json{{"step", step}, {"layer", layer}, {"tokens", sum}, {"top_k", 2}, {"counts", counts}}
              .dump();
      trace += '\n';
    }
  }
  dir.write("t.jsonl", trace);
  dir.write("sign.yaml", kSign);
  const ToolResult result = run_tool(dir, "replay sign.yaml t.jsonl -o run.jsonl");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out,
            "replayed 60 steps of 2 layers, wrote the records of 60 steps to run.jsonl, open loop: the "
            "recorded routes answer no decision, "
            "so none is held "
            "for that\n");
  // Without -o, the same log on standard output.
  const ToolResult log = run_tool(dir, "replay sign.yaml t.jsonl");
  EXPECT_EQ(log.out, TempDir::read(dir.path("run.jsonl")));
  EXPECT_EQ(run_tool(dir, "replay sign.yaml -", trace).out, log.out);
  EXPECT_EQ(log.json()["format"], "moectl-run");
  std::vector<Numbers> bias(2, Numbers(4, 0.0));
  ASSERT_EQ(log.lines().size(), 1 + all.size());
  for (std::size_t r = 0; r < all.size(); ++r) {
    const std::size_t layer = r % 2;
    std::int64_t sum = 0;
    for (const auto c : all[r]) sum += c;
    for (std::size_t i = 0; i < 4; ++i)
      bias[layer][i] += 1e-3 * ((4 * all[r][i] < sum) - (4 * all[r][i] > sum));
    const auto record = log.json(r + 1);
    EXPECT_EQ(record["step"], r / 2);
    EXPECT_EQ(record["counts"], all[r]);
    const auto applied = record["actuators"]["expert_bias"]["applied"].get<Numbers>();
    for (std::size_t i = 0; i < 4; ++i)
      EXPECT_NEAR(applied[i], sum ? bias[layer][i] : applied[i], 1e-12) << r;
  }
}

TEST(Replay, StartsAtInitialAndIsActiveWhateverTheModeIs) {
  const TempDir dir;
  dir.write("c.yaml",
            "version: 1\nmode: off\nmodel: {layers: 1, experts: 2, top_k: 1}\n"
            "expert_bias: {policy: sign_bias, options: {step: 0.25, zero_mean_move: false}, initial: 0.5,"
            " limits: {rate: 1, center: false}}\n");
  const ToolResult result =
      run_tool(dir, "replay c.yaml -", R"({"step":7,"layer":0,"tokens":3,"top_k":1,"counts":[1,2]})");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.json(0)["config"]["mode"], "active");
  EXPECT_EQ(result.json(1)["step"], 7);
  EXPECT_EQ(result.json(1)["actuators"]["expert_bias"]["applied"], (Numbers{0.75, 0.25}));
}

TEST(Replay, SkipsOtherTagsAndHoldsLayersWithoutData) {
  const TempDir dir;
  dir.write("sign.yaml", kSign);
  const ToolResult result =
      run_tool(dir, "replay sign.yaml -",
               R"({"step":0,"layer":0,"tokens":4,"top_k":2,"counts":[4,2,1,1],"loss":2.5})"
               "\n"
               R"({"step":0,"layer":1,"tokens":4,"top_k":2,"counts":[4,2,1,1],"tag":"validation"})"
               "\n"
               R"({"step":0,"layer":1,"tokens":0,"top_k":2,"counts":[0,0,0,0]})"
               "\n"
               R"({"step":3,"layer":1,"tokens":4,"top_k":2,"counts":[4,2,1,1]})"
               "\n"
               R"({"step":3,"layer":0,"tokens":4,"top_k":2,"counts":[4,4,0,0],"tag":"validation"})"
               "\n");
  ASSERT_EQ(result.code, 0) << result.err;
  ASSERT_EQ(result.lines().size(), 5U);
  const auto bias = [&](std::size_t line) { return result.json(line)["actuators"]["expert_bias"]; };
  EXPECT_EQ(result.json(1)["loss"], 2.5);
  EXPECT_EQ(bias(1)["applied"], (Numbers{-0.001, 0, 0.001, 0.001}));
  EXPECT_EQ(bias(2)["reasons"], (std::vector<std::string>{"no_data"}));
  EXPECT_EQ(bias(2)["applied"], (Numbers{0, 0, 0, 0}));
  // Step 3: layer 0 is not mentioned under `train`.
  EXPECT_EQ(result.json(3)["step"], 3);
  EXPECT_EQ(bias(3)["reasons"], (std::vector<std::string>{"no_data"}));
  EXPECT_EQ(bias(3)["applied"], (Numbers{-0.001, 0, 0.001, 0.001}));
  EXPECT_EQ(bias(4)["applied"], (Numbers{-0.001, 0, 0.001, 0.001}));
}

TEST(Replay, ARunLogReplaysLikeTheTraceItCameFrom) {
  const TempDir dir;
  dir.write("sign.yaml", kSign);
  const ToolResult once = run_tool(dir, "replay sign.yaml -",
                                   R"({"step":0,"layer":0,"tokens":4,"top_k":2,"counts":[4,2,1,1]})"
                                   "\n"
                                   R"({"step":0,"layer":1,"tokens":4,"top_k":2,"counts":[4,2,1,1]})"
                                   "\n"
                                   R"({"step":1,"layer":0,"tokens":4,"top_k":2,"counts":[3,3,1,1]})"
                                   "\n"
                                   R"({"step":1,"layer":1,"tokens":4,"top_k":2,"counts":[3,2,2,1]})"
                                   "\n");
  EXPECT_EQ(run_tool(dir, "replay sign.yaml -", once.out).out, once.out);
}

TEST(Replay, MismatchesBetweenConfigAndTraceAreNamed) {
  const TempDir dir;
  dir.write("sign.yaml", kSign);
  const std::string header = R"({"format":"moectl-trace","version":1,"layers":3,"experts":4,"top_k":2})";
  const struct {
    std::string trace, message;
  } cases[] = {
      {header, "<stdin>:1: layers: 3: must be 2, model.layers of sign.yaml"},
      {R"({"step":0,"layer":0,"tokens":4,"top_k":2,"counts":[4,2,1]})",
       "<stdin>:1: experts: 3: must be 4, model.experts of sign.yaml"},
      {R"({"step":0,"layer":0,"tokens":4,"top_k":1,"counts":[1,1,1,1]})",
       "<stdin>:1: top_k: 1: must be 2, model.top_k of sign.yaml"},
      {R"({"step":0,"layer":2,"tokens":4,"top_k":2,"counts":[1,1,1,1]})",
       "<stdin>:1: layer: 2: must be below model.layers (2) of sign.yaml"},
      {R"({"step":5,"layer":0,"tokens":4,"top_k":2,"counts":[1,1,1,1]})"
       "\n"
       R"({"step":4,"layer":0,"tokens":4,"top_k":2,"counts":[1,1,1,1]})",
       "<stdin>:2: step: 4: must not be below the step before it (5): sort the records by step"},
  };
  for (const auto& c : cases) {
    const ToolResult result = run_tool(dir, "replay sign.yaml - -o run.jsonl", c.trace);
    EXPECT_EQ(result.code, 1);
    EXPECT_EQ(result.err, "moectl: " + c.message + "\n");
  }
  // A log that exists is not touched for a trace that does not fit.
  dir.write("keep.jsonl", "precious");
  EXPECT_EQ(run_tool(dir, "replay sign.yaml - -o keep.jsonl", header).code, 1);
  EXPECT_EQ(TempDir::read(dir.path("keep.jsonl")), "precious");
}

TEST(Replay, DamageIsSkippedAndReportedButWrongRecordsEndIt) {
  const TempDir dir;
  dir.write("sign.yaml", kSign);
  const auto line = [](int step, const char* counts) {
    return R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":4,"top_k":2,"counts":)" + counts +
           "}\n";
  };
  const std::string good = line(0, "[4,2,1,1]") + line(1, "[4,2,1,1]");
  const std::string clean = run_tool(dir, "replay sign.yaml -", good).out;
  // Torn within the last line, and with a line that is no record.
  const ToolResult torn =
      run_tool(dir, "replay sign.yaml -",
               good.substr(0, good.size() / 2) + "garbage\n" + line(1, "[4,2,1,1]") + "{\"st");
  EXPECT_EQ(torn.code, 0);
  EXPECT_EQ(torn.out, clean);
  EXPECT_THAT(torn.err, HasSubstr("skipped: <stdin>:2: line: not JSON"));
  EXPECT_THAT(torn.err, HasSubstr("skipped: <stdin>:4: line: not JSON"));
  // Counts that cannot be true.
  const std::string wrong = line(0, "[4,2,1,1]") + line(0, "[9,9,9,9]") + line(1, "[4,2,1,1]");
  const ToolResult refused = run_tool(dir, "replay sign.yaml -", wrong);
  EXPECT_EQ(refused.code, 1);
  EXPECT_THAT(refused.err, HasSubstr("<stdin>:2: counts: sum 36: must be at most tokens * top_k (8)"));
  const ToolResult salvaged = run_tool(dir, "replay sign.yaml - --salvage", wrong);
  EXPECT_EQ(salvaged.code, 0);
  EXPECT_EQ(salvaged.out, clean);
  EXPECT_THAT(salvaged.err, HasSubstr("skipped: <stdin>:2: counts: sum 36"));
  // Out of order is wrong as well; nothing at all is no trace.
  EXPECT_EQ(run_tool(dir, "replay sign.yaml - --salvage", good + line(-0, "[1,1,1,1]")).out, clean);
  const ToolResult nothing = run_tool(dir, "replay sign.yaml -", "garbage\n");
  EXPECT_EQ(nothing.code, 1);
  EXPECT_THAT(nothing.err, HasSubstr("holds no record that can be read; skipped: <stdin>:1"));
}

TEST(Replay, AnUnwritableLogIsAnError) {
  const TempDir dir;
  dir.write("sign.yaml", kSign);
  const ToolResult result = run_tool(dir, "replay sign.yaml - -o /nonexistent/run.jsonl",
                                     R"({"step":0,"layer":0,"tokens":4,"top_k":2,"counts":[4,2,1,1]})");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("/nonexistent/run.jsonl: run log cannot be written"));
}

TEST(Replay, HonoursTheLogSection) {
  const TempDir dir;
  dir.write("c.yaml", std::string(kSign) + "log: {every: 2, per_expert: false}\n");
  std::string trace;
  for (int step = 0; step < 5; ++step) {
    trace += R"({"step":)" + std::to_string(step) +
             R"(,"layer":0,"tokens":4,"top_k":2,"counts":[4,2,1,1]})"
             "\n";
  }
  const ToolResult result = run_tool(dir, "replay c.yaml -", trace);
  ASSERT_EQ(result.code, 0) << result.err;
  ASSERT_EQ(result.lines().size(), 1U + 3 * 2);  // steps 0, 2, 4 of two layers
  EXPECT_EQ(result.json(3)["step"], 2);
  EXPECT_FALSE(result.json(3).contains("counts"));
  EXPECT_NEAR(result.json(3)["actuators"]["expert_bias"]["max"].get<double>(), 0.003, 1e-12);
}

// Steps of one layer of four experts, of which one has too much and one too little.
std::string steps_of(int from, int to, int by = 1) {
  std::string trace;
  for (int step = from; step < to; step += by) {
    trace += R"({"step":)" + std::to_string(step) +
             R"(,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3]})"
             "\n";
  }
  return trace;
}
const std::string kOneLayer = "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\n";

// What a log says of each step: the bias of the last expert, whose load is too small.
std::map<int, double> biases_in(const ToolResult& log) {
  std::map<int, double> biases;
  for (std::size_t line = 1; line < log.lines().size(); ++line) {
    const auto record = log.json(line);
    if (record.contains("actuators")) {
      const auto& bias = record["actuators"]["expert_bias"];
      biases[record["step"]] = bias["applied"].back();
    }
  }
  return biases;
}

TEST(Replay, TimelineAndSchedulesCountTheStepsOfTheTrace) {
  const TempDir dir;
  const std::string trace = steps_of(1000, 1020);
  dir.write("late.yaml", kOneLayer + "timeline: [{from: 1005, expert_bias: {policy: sign_bias}}]\n");
  const ToolResult late = run_tool(dir, "replay late.yaml -", trace);
  ASSERT_EQ(late.code, 0) << late.err;
  const auto moved = biases_in(late);
  EXPECT_EQ(moved.at(1004), 0);
  EXPECT_DOUBLE_EQ(moved.at(1005), 0.001);
  EXPECT_DOUBLE_EQ(moved.at(1006), 0.002);
  EXPECT_THAT(late.out,
              HasSubstr(R"("step":1005,"text":"timeline: the entry from step 1005 holds from here on")"));
  EXPECT_EQ(late.err, "");
  // An entry from before the trace holds from its first step on, and a warm-up is over.
  dir.write("early.yaml",
            kOneLayer + "timeline: [{from: 5, expert_bias: {policy: sign_bias, limits: {warmup: 1002}}}]\n");
  const auto early = biases_in(run_tool(dir, "replay early.yaml -", trace));
  EXPECT_EQ(early.at(1001), 0);
  EXPECT_DOUBLE_EQ(early.at(1002), 0.001);
  dir.write("scheduled.yaml",
            kOneLayer +
                "expert_bias: {policy: sign_bias, gain_schedule: {shape: step, from: 1003, until: 1003}}\n");
  const auto scheduled = biases_in(run_tool(dir, "replay scheduled.yaml -", trace));
  EXPECT_DOUBLE_EQ(scheduled.at(1001), 0.002);
  EXPECT_DOUBLE_EQ(scheduled.at(1019), scheduled.at(1004)) << "no move at the end of the schedule";
}

TEST(Replay, SaysWhereTheTraceSkipsSteps) {
  const TempDir dir;
  dir.write("c.yaml", kOneLayer + "expert_bias: {policy: sign_bias}\n");
  EXPECT_EQ(run_tool(dir, "replay c.yaml -", steps_of(7, 20)).err, "");
  const ToolResult sampled = run_tool(dir, "replay c.yaml -", steps_of(0, 500, 100));
  EXPECT_EQ(sampled.code, 0);
  EXPECT_EQ(
      sampled.err,
      "assumed: <stdin>:2: step: 100: the step before it is 0; timeline, schedules, warm-up and cadence "
      "count the steps that are there, from the first one on\n");
}

TEST(Replay, SaysHowManyStepsItsLogHolds) {
  const TempDir dir;
  dir.write("c.yaml", kOneLayer + "log: {every: 10}\n");
  EXPECT_THAT(run_tool(dir, "replay c.yaml - -o run.jsonl", steps_of(0, 20)).out,
              HasSubstr("replayed 20 steps of 1 layers, wrote the records of 2 steps to run.jsonl"));
  for (const char* output : {"", " -o run.jsonl"}) {
    const ToolResult none = run_tool(dir, std::string("replay c.yaml -") + output, steps_of(1, 200, 10));
    EXPECT_EQ(none.code, 0);
    EXPECT_THAT(
        none.err,
        HasSubstr("<stdin>: no step is a multiple of log.every (10) of c.yaml: the log has no record\n"));
  }
}

TEST(Replay, SaysThatTheEnvironmentHoldsEverything) {
  const TempDir dir;
  dir.write("c.yaml", kOneLayer + "expert_bias: {policy: sign_bias}\n");
  const ToolResult held = run_tool(dir, "replay c.yaml - -o run.jsonl", steps_of(0, 3), "MOECTL_HOLD=1");
  EXPECT_EQ(held.err, "MOECTL_HOLD is set: every actuator is held where it is (host_hold)\n");
  EXPECT_THAT(held.out, Not(HasSubstr("none is held")));
  EXPECT_EQ(run_tool(dir, "replay c.yaml - -o run.jsonl", steps_of(0, 3), "MOECTL_HOLD=0").err, "");
}

}  // namespace
}  // namespace moectl
