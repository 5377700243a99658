// Cases from runs of others that the tool shows, by the ids of tests/field_cases.md.
#include <gmock/gmock.h>

#include <cmath>
#include <random>

#include "moectl/health.h"
#include "moectl/metrics.h"
#include "moectl/monitor.h"
#include "tool.h"

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string line_of(int step, const std::vector<std::int64_t>& counts, const std::string& more = "") {
  nlohmann::ordered_json record = {{"step", step}, {"layer", 0}};
  std::int64_t sum = 0;
  for (const auto c : counts) sum += c;
  record["tokens"] = sum;
  record["top_k"] = 1;
  record["counts"] = counts;
  std::string text = record.dump();
  text.pop_back();
  return text + more + "}\n";
}

// Random counts about these shares.
std::vector<std::int64_t> counts_of(const std::vector<double>& shares, double tokens,
                                    std::mt19937_64& random) {
  std::vector<std::int64_t> counts;
  for (const double s : shares) counts.push_back(std::poisson_distribution<std::int64_t>(tokens * s)(random));
  return counts;
}

/// The data that a page embeds.
nlohmann::json data_of(const std::string& page) {
  const std::string open = R"(<script type="application/json" id="data">)";
  const std::size_t from = page.find(open) + open.size();
  return nlohmann::json::parse(page.substr(from, page.find("</script>", from) - from));
}

// ---- D1: one definition of balance ----

// Uncontrolled at about three floors, at which the report says No: no record says healthy, but for the first few, of
// which an average does not exist yet.
TEST(FieldCases, D1_ARunAtThreeFloorsIsNeverHealthy) {
  std::vector<double> shares(16, 1.0 / 16);
  shares[0] *= 1.32;
  shares[1] *= 0.68;
  std::mt19937_64 random(3);
  const StatsShape shape{16, 1, {}};
  LayerMonitor monitor(shape, {}, {});
  int healthy = 0;
  double vio = 0, floor = 0;
  for (int step = 0; step < 800; ++step) {
    RoutingStats stats(shape);
    const auto counts = counts_of(shares, 4096, random);
    std::int64_t sum = 0;
    for (const auto c : counts) sum += c;
    ASSERT_TRUE(stats.add_counts(counts, sum));
    Metrics metrics = measure(stats);
    monitor.observe(stats, metrics);
    vio += *metrics.max_vio;
    floor += *metrics.noise_floor_max_vio;
    if (monitor.health() == Health::kHealthy) ++healthy;
  }
  ASSERT_GT(vio / floor, 2.5);
  ASSERT_LT(vio / floor, 3.5);
  EXPECT_LE(healthy, 5);
  EXPECT_EQ(monitor.health(), Health::kImbalanced);
}

// One state on either side of the bound, and the other answers with it.
TEST(FieldCases, D1_HealthReportAndWatchAgreeOnEitherSideOfTheBound) {
  for (const double extra : {0.06, 0.25}) {
    std::vector<double> shares(16, (1 - extra / 16) / 16);
    shares[0] = (1 + extra) / 16;
    std::mt19937_64 random(5);
    const TempDir dir;
    std::string trace = R"({"format":"moectl-trace","version":1,"layers":1,"experts":16,"top_k":1})"
                        "\n";
    for (int step = 0; step < 300; ++step) trace += line_of(step, counts_of(shares, 8192, random));
    dir.write("trace.jsonl", trace);
    dir.write("c.yaml",
              "version: 1\nmodel: {layers: 1, experts: 16, top_k: 1, tokens_per_step: 8192}\nhealth: {}\n");
    ASSERT_EQ(run_tool(dir, "replay c.yaml trace.jsonl -o run.jsonl").code, 0);
    const std::string log = TempDir::read(dir.path("run.jsonl"));
    const std::string last = log.substr(log.rfind('\n', log.size() - 2) + 1);
    ASSERT_EQ(run_tool(dir, "report run.jsonl -o r.html").code, 0);
    const auto now = data_of(TempDir::read(dir.path("r.html"))).at(0)["now"];
    const bool balanced = now["balanced"];
    EXPECT_EQ(balanced, extra < 0.1) << now;
    EXPECT_EQ(now["bound"], kBalancedFloors);
    const auto compare = nlohmann::json::parse(run_tool(dir, "compare run.jsonl --format json").out).at(0);
    EXPECT_EQ(std::max(compare["max_vio_over_floor"].get<double>(), compare["cv_over_floor"].get<double>()) <=
                  kBalancedFloors,
              balanced);
    EXPECT_EQ(nlohmann::json::parse(last)["health"], balanced ? "healthy" : "imbalanced");
    if (has_terminals()) {
      const std::string drawn = drawn_by_watch(dir, 24, 80);
      EXPECT_THAT(drawn.substr(drawn.rfind("step ")), HasSubstr(balanced ? "  healthy" : "  imbalanced"));
    }
  }
}

// Few tokens reach few experts, however they are routed: that is no collapse.
TEST(FieldCases, D1_AFewTokensAreNoCollapse) {
  const StatsShape shape{64, 2, {}};
  LayerMonitor monitor(shape, {}, {});
  std::mt19937_64 random(7);
  for (int step = 0; step < 200; ++step) {
    RoutingStats stats(shape);
    std::vector<std::int64_t> experts;
    for (int token = 0; token < 3; ++token) {
      const auto first = static_cast<std::int64_t>(random() % 64);
      experts.insert(experts.end(), {first, (first + 1 + static_cast<std::int64_t>(random() % 63)) % 64});
    }
    ASSERT_TRUE(stats.add({.experts = experts}));
    Metrics metrics = measure(stats);
    monitor.observe(stats, metrics);
    EXPECT_EQ(monitor.health(), Health::kHealthy) << step;
  }
}

// An expert that starves while no other is overloaded shows in the CV alone.
TEST(FieldCases, D1_TheReportCountsTheCvAndEachLayer) {
  const TempDir dir;
  std::string run;
  for (int step = 0; step < 120; ++step) {
    run += line_of(step, {130, 130, 130, 130, 130, 130, 130, 130, 130, 130, 130, 130, 130, 130, 130, 0});
  }
  dir.write("run.jsonl", run);
  ASSERT_EQ(run_tool(dir, "report run.jsonl -o r.html").code, 0);
  const auto now = data_of(TempDir::read(dir.path("r.html"))).at(0)["now"];
  EXPECT_LT(now["max_vio_over_floor"], kBalancedFloors);
  EXPECT_GT(now["cv_over_floor"], kBalancedFloors);
  EXPECT_EQ(now["balanced"], false);
  EXPECT_EQ(now["worst_layer"], 0);
  EXPECT_EQ(now["layers_above"], 1);
}

// ---- D2: every floor has its name ----

TEST(FieldCases, D2_EveryFloorIsNamed) {
  const TempDir dir;
  const auto run = [](bool sequences) {
    std::string text;
    for (int step = 0; step < 40; ++step) {
      // Two sequences of 50 tokens: counts [35, 15] and [15, 35].
      text += line_of(step, {50, 50},
                      sequences ? R"(,"sequences":2,"sequence_sq":[1450,1450],"sequence_cross":[2500,2500],)"
                                  R"("sequence_len_sq":5000)"
                                : "");
    }
    return text;
  };
  dir.write("noise.jsonl", run(false));
  dir.write("sampling.jsonl", run(true));
  dir.write(
      "mixed.jsonl", run(false) + [&] {
        std::string more = run(true);
        for (std::size_t at = 0; (at = more.find("\"layer\":0", at)) != std::string::npos; at += 9)
          more[at + 8] = '1';
        return more;
      }());
  for (const std::string name : {"noise", "sampling"}) {
    const std::string floor = name + " floor";
    const ToolResult compare = run_tool(dir, "compare " + name + ".jsonl --format json");
    ASSERT_EQ(compare.code, 0) << compare.err;
    EXPECT_EQ(nlohmann::json::parse(compare.out).at(0)["floor"], floor);
    EXPECT_THAT(run_tool(dir, "compare " + name + ".jsonl").lines()[1], HasSubstr(floor));
    EXPECT_THAT(run_tool(dir, "watch " + name + ".jsonl --once").out, HasSubstr("x " + floor + ")"));
    ASSERT_EQ(run_tool(dir, "report " + name + ".jsonl -o r.html").code, 0);
    EXPECT_EQ(data_of(TempDir::read(dir.path("r.html"))).at(0)["now"]["floor"], floor);
  }
  EXPECT_EQ(nlohmann::json::parse(run_tool(dir, "compare mixed.jsonl --format json").out).at(0)["floor"],
            "mixed floors");
  dir.write("c.yaml", "version: 1\nmodel: {layers: 1, experts: 8, top_k: 2, tokens_per_step: 512}\n");
  const auto simulated = [&](const std::string& more) {
    const ToolResult result = run_tool(dir, "simulate c.yaml --steps 20 --format json " + more);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out).at(0)["floor"];
  };
  EXPECT_EQ(simulated(""), "noise floor");
  EXPECT_EQ(simulated("--sequence-length 64"), "sampling floor");
}

// ---- D4: the summed counts ----

// Two experts that take turns: every step has a MaxVio of .5, and nothing is left of it in the sum.
TEST(FieldCases, D4_CompareShowsTheSummedCounts) {
  const TempDir dir;
  std::string run;
  for (int step = 0; step < 300; ++step) {
    const bool first = step % 2 == 0;
    run += step < 100 ? line_of(step, {90, 10}) : line_of(step, {first ? 75 : 25, first ? 25 : 75});
  }
  dir.write("run.jsonl", run);
  const auto global = [&](const std::string& more) {
    const ToolResult result = run_tool(dir, "compare run.jsonl --format json " + more);
    EXPECT_EQ(result.code, 0) << result.err;
    return nlohmann::json::parse(result.out).at(0)["max_vio_global"].get<double>();
  };
  EXPECT_NEAR(global(""), 0, 1e-12);
  EXPECT_NEAR(global("--sum-steps 1"), 0.5, 1e-12);
  EXPECT_NEAR(global("--sum-steps 0"), 0.8 / 3, 1e-12);          // 100 steps at .8, 200 that cancel
  EXPECT_NEAR(global("--shift 100 --sum-steps 0"), 0.8, 1e-12);  // what came before the shift
}

// ---- D5: actuators that steer one variable ----

const char* const kModel = "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2, tokens_per_step: 2048}\n";

std::string pi_on(const std::string& metric, const std::string& target) {
  return "aux_loss_weight: {policy: pi, initial: 0.01, options: {metric: " + metric + ", target: " + target +
         "}}\n";
}

nlohmann::json verdict_of(const TempDir& dir, const std::string& config, int code) {
  dir.write("c.yaml", config);
  const ToolResult result = run_tool(dir, "check c.yaml --format json");
  EXPECT_EQ(result.code, code) << config << result.out << result.err;
  return result.json();
}

TEST(FieldCases, D5_TwoActuatorsOnTheLoadAreAConflictWithARecipe) {
  const TempDir dir;
  for (const char* metric :
       {"excess_cv", "load_cv", "max_vio", "predicted_drop_rate", "balancedness", "minority_share"}) {
    const auto verdict = verdict_of(
        dir, std::string(kModel) + "expert_bias: {policy: adaptive_bias}\n" + pi_on(metric, "0.3"), 1);
    EXPECT_EQ(verdict["valid"], true);
    EXPECT_EQ(verdict["feasible"], false);
    ASSERT_EQ(verdict["conflicts"].size(), 1U) << metric;
    EXPECT_EQ(verdict["conflicts"][0]["metrics"], (std::vector<std::string>{metric}));
    const std::string message = verdict["conflicts"][0]["message"];
    EXPECT_THAT(message,
                HasSubstr("expert_bias (adaptive_bias) and aux_loss_weight (pi on " + std::string(metric)));
    EXPECT_THAT(message, HasSubstr("steer the same variable"));
  }
  const ToolResult text = run_tool(dir, "check c.yaml");
  EXPECT_EQ(text.code, 1);
  EXPECT_THAT(text.out, HasSubstr("# which policy may hold which variable:\n#   the load (excess_cv"));
  // Each alone, and what the recipe names beside a bias policy.
  verdict_of(dir, std::string(kModel) + pi_on("excess_cv", "0.3"), 0);
  const std::string bias = std::string(kModel) + "expert_bias: {policy: adaptive_bias}\n";
  verdict_of(dir, bias + pi_on("importance_cv", "0.3"), 0);
  verdict_of(dir, bias + "aux_loss_weight: {policy: fixed, initial: 1.0e-3}\n", 0);
  verdict_of(dir, bias + "router_temperature: {policy: entropy_temperature, initial: 1}\n", 0);
  const auto twice =
      verdict_of(dir,
                 std::string(kModel) + pi_on("excess_cv", "0.3") +
                     "router_temperature: {policy: pi, initial: 1, options: {metric: max_vio, target: 1}}\n",
                 1);
  EXPECT_THAT(twice.dump(), HasSubstr("router_temperature (on max_vio) steer the same variable"));
  const auto undecided = verdict_of(dir,
                                    std::string(kModel) + pi_on("token_entropy", "1.5") +
                                        "router_temperature: {policy: entropy_temperature, initial: 1}\n",
                                    1);
  EXPECT_THAT(undecided.dump(), HasSubstr("router_temperature (on token_entropy) steer the same variable"));
  // The recipe is there before there is a conflict.
  dir.write("c.yaml", std::string(kModel) + pi_on("excess_cv", "0.3"));
  EXPECT_THAT(run_tool(dir, "check c.yaml").out, HasSubstr("# which policy may hold which variable:\n"));
}

TEST(FieldCases, D5_AGuardThatCannotRaiseTheWeightIsSaid) {
  const TempDir dir;
  const std::string guard = "expert_bias: {policy: adaptive_bias}\nguard: {enabled: true}\n";
  const auto verdict = verdict_of(dir, kModel + guard, 0);  // it works, with the other levers
  ASSERT_EQ(verdict["notes"].size(), 1U);
  EXPECT_THAT(verdict["notes"][0].get<std::string>(), HasSubstr("aux_loss_weight, which is 0"));
  EXPECT_THAT(run_tool(dir, "check c.yaml").out, HasSubstr("\n# guard: it cannot raise aux_loss_weight"));
  const auto with =
      verdict_of(dir, kModel + guard + "aux_loss_weight: {policy: fixed, initial: 1.0e-3}\n", 0);
  EXPECT_FALSE(with.contains("notes"));
}

TEST(FieldCases, D5_TargetsOutsideWhatAMetricCanBeAreInfeasible) {
  const TempDir dir;
  // √(16/2 - 1) = 2.6458; ln 16 = 2.7726.
  for (const auto& [metric, target, good] : {std::tuple{"excess_cv", "0", false},
                                             {"excess_cv", "6", false},
                                             {"excess_cv", "2.65", false},
                                             {"excess_cv", "2.6", true},
                                             {"excess_cv", "0.15", true},
                                             {"importance_cv", "4", false},
                                             {"importance_cv", "3.8", true},
                                             {"token_entropy", "2.8", false},
                                             {"token_entropy", "2", true},
                                             {"drop_rate", "1.1", false},
                                             {"predicted_drop_rate", "0.05", true},
                                             {"fsi", "2.5", false},
                                             {"fsi", "2.4", true},
                                             {"load_cv", "2.7", false},
                                             {"max_vio", "7.1", false},
                                             {"min_load", "0.07", false},
                                             {"straggler_slowdown", "0.9", false}}) {
    const auto verdict = verdict_of(dir, std::string(kModel) + pi_on(metric, target), good ? 0 : 1);
    ASSERT_EQ(verdict["conflicts"].size(), good ? 0U : 1U) << metric << ' ' << target << verdict;
    if (!good) {
      EXPECT_THAT(verdict.dump(), HasSubstr(std::string("options.target: ") + target)) << metric;
    }
  }
  dir.write("c.yaml", std::string(kModel) + pi_on("excess_cv", "0.15"));
  EXPECT_THAT(run_tool(dir, "check c.yaml").out,
              HasSubstr("# aux_loss_weight.options.target: at N = 16, k = 2 excess_cv is from 0 to 2.646\n"));
}

// Each group of layers has its own N and k, and later entries of the timeline their own policies.
TEST(FieldCases, D5_TheBoundsOfTargetsAreSaidForEachGroupAndInJson) {
  const TempDir dir;
  const std::string config =
      "version: 1\nmodel: {layers: 3, experts: 16, top_k: 2, tokens_per_step: 4096}\n" +
      pi_on("excess_cv", "0.3") + "layers: [{count: 2}, {count: 1, experts: 32, top_k: 4}]\n" +
      "timeline:\n  - {from: 50, aux_loss_weight: {policy: pi, initial: 0.01, options: {metric: max_vio, "
      "target: 1}, "
      "limits: {min: 1.0e-4}}}\n";
  const auto verdict = verdict_of(dir, config, 0);
  std::vector<std::string> said;
  for (const auto& row : verdict["targets"]) {
    said.push_back(row.value("where", "") + '|' + row["actuator"].get<std::string>() + '|' +
                   row["metric"].get<std::string>());
  }
  EXPECT_THAT(said, ::testing::ElementsAre("layers[0]|aux_loss_weight|excess_cv",
                                           "layers[1]|aux_loss_weight|excess_cv",
                                           "from step 50: layers[0]|aux_loss_weight|max_vio",
                                           "from step 50: layers[1]|aux_loss_weight|max_vio"));
  // √(16/2 - 1), and √(32/4 - 1), the same; 16/2 - 1.
  EXPECT_NEAR(verdict["targets"][0]["max"].get<double>(), std::sqrt(7.0), 1e-12);
  EXPECT_NEAR(verdict["targets"][1]["max"].get<double>(), std::sqrt(7.0), 1e-12);
  EXPECT_EQ(verdict["targets"][2]["max"], 7);
  EXPECT_EQ(verdict["targets"][1]["experts"], 32);
  const std::string text = run_tool(dir, "check c.yaml").out;
  EXPECT_THAT(
      text,
      HasSubstr(
          "# layers[1]: aux_loss_weight.options.target: at N = 32, k = 4 excess_cv is from 0 to 2.646\n"));
  EXPECT_THAT(
      text,
      HasSubstr(
          "# from step 50: layers[0]: aux_loss_weight.options.target: at N = 16, k = 2 max_vio is from"));
}

// What the project itself hands out passes its own judgement.
TEST(FieldCases, D5_TheShippedConfigsAreFeasible) {
  const TempDir dir;
  for (const char* name :
       {"adaptive_bias", "entropy_temperature", "fixed", "multiplicative", "pi", "proportional_bias",
        "quantile_bias", "rules", "schedule", "sign_bias", "tanh_momentum_bias"}) {
    const std::string path = std::string(MOECTL_SOURCE_DIR) + "/policies/" + name + ".yaml";
    EXPECT_EQ(run_tool(dir, "check '" + path + "'").code, 0) << name;
  }
}

// ---- A8: advice follows the cause ----

// What the page says to change of a run whose expert_bias carries this reason at every second step.
std::string advice_on(const TempDir& dir, const std::string& reason,
                      const std::string& actuator = "expert_bias", const std::string& policy = "sign_bias") {
  std::string run =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1},")" +
      actuator + R"(":{"policy":")" + policy +
      R"("}}})"
      "\n";
  for (int step = 0; step < 200; ++step) {
    const std::string reasons = reason.empty() || step % 3 == 0 ? "" : '"' + reason + '"';
    run +=
        line_of(step, {90, 10},
                R"(,"actuators":{")" + actuator + R"(":{"applied":[0.5,-0.5],"reasons":[)" + reasons + "]}}");
  }
  dir.write("run.jsonl", run);
  const ToolResult result = run_tool(dir, "report run.jsonl -o r.html");
  EXPECT_EQ(result.code, 0) << result.err;
  std::string all;
  const nlohmann::json advice = data_of(TempDir::read(dir.path("r.html"))).at(0)["advice"];
  for (const auto& says : advice) {
    all += says.get<std::string>() + '\n';
  }
  return all;
}

TEST(FieldCases, A8_AdviceFollowsTheCauseAndNotTheLimits) {
  const TempDir dir;
  const std::vector<std::pair<std::string, std::string>> causes = {
      {"unresponsive", "look whether the router adds the bias of this layer"},
      {"missing_input", "give the missing tensor when recording"},
      {"policy_failed", "its policy threw an exception"},
      {"fallback", "fell back after too many invalid records"},
      {"invalid", "was held for invalid records"},
      {"no_data", "look whether every step records tokens"},
      {"host_hold", "release it with hold(false)"},
      {"frozen", "was frozen by the host"},
      {"shadow", "set mode: active"},
      {"rollback", "was rolled back"},
      {"oscillation", "declare model.delay"},
      {"reach", "wider limits would change nothing"},
      {"guard", "was taken over by the guard"},
      {"range", "widen limits.min/max"},
      {"rate", "was held back by limits.rate most of the time: raise it"}};
  for (const auto& [reason, sentence] : causes) {
    const std::string says = advice_on(dir, reason);
    EXPECT_THAT(says, HasSubstr("expert_bias (sign_bias) "));
    for (const auto& [other, theirs] : causes) {
      EXPECT_EQ(says.find(theirs) != std::string::npos, other == reason) << reason << ": " << says;
    }
    if (reason != "range") {
      EXPECT_THAT(says, Not(HasSubstr("widen"))) << reason;
    }
  }
  EXPECT_THAT(advice_on(dir, ""), Not(HasSubstr("expert_bias")));
  EXPECT_THAT(advice_on(dir, ""), HasSubstr("x its noise floor though nothing holds the controller"));
  EXPECT_THAT(advice_on(dir, "frozen"), Not(HasSubstr("though nothing holds")));
  EXPECT_THAT(advice_on(dir, "unresponsive", "aux_loss_weight", "pi"),
              HasSubstr("added to the loss that is trained"));
  EXPECT_THAT(advice_on(dir, "unresponsive", "router_temperature", "pi"), HasSubstr("divides its logits"));
}

TEST(FieldCases, A8_ARunWithoutAPolicyIsAdvisedToHaveOne) {
  const TempDir dir;
  EXPECT_THAT(advice_on(dir, "", "expert_bias", "fixed"), HasSubstr("no policy controls this run"));
  EXPECT_THAT(advice_on(dir, "", "expert_bias", "sign_bias"), Not(HasSubstr("no policy controls this run")));
}

TEST(FieldCases, A8_DeadExpertsAndTheFloorAreAdvisedOnlyWhereItHelps) {
  const TempDir dir;
  // Two sequences of 50 tokens: all on the first expert, or 35 and 15, and 15 and 35.
  const std::string uneven =
      R"(,"sequences":2,"sequence_sq":[5000,0],"sequence_cross":[5000,0],"sequence_len_sq":5000)";
  const std::string even =
      R"(,"sequences":2,"sequence_sq":[1450,1450],"sequence_cross":[2500,2500],"sequence_len_sq":5000)";
  const auto says_of = [&](const std::vector<std::int64_t>& counts, const std::string& policy,
                           const std::string& sequences = "") {
    std::string run = R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":)" +
                      std::to_string(counts.size()) + R"(,"top_k":1},"expert_bias":{"policy":")" + policy +
                      R"("}}})"
                      "\n";
    for (int step = 0; step < 200; ++step) run += line_of(step, counts, sequences);
    dir.write("run.jsonl", run);
    const ToolResult result = run_tool(dir, "report run.jsonl -o r.html");
    EXPECT_EQ(result.code, 0) << result.err;
    return data_of(TempDir::read(dir.path("r.html"))).at(0)["advice"].dump();
  };
  EXPECT_THAT(says_of({100, 0}, "fixed"), HasSubstr("one expert is dead: a bias policy brings it back"));
  EXPECT_THAT(
      says_of({100, 0}, "sign_bias"),
      HasSubstr("one expert stays dead though sign_bias raises its bias: look whether the router masks it"));
  EXPECT_THAT(says_of({50, 50}, "fixed"), Not(HasSubstr("dead")));
  EXPECT_THAT(says_of({100, 0, 0, 0}, "fixed"),
              HasSubstr("about 3 experts are dead: a bias policy brings them back"));
  EXPECT_THAT(says_of({100, 0, 0, 0}, "sign_bias"), HasSubstr("about 3 experts stay dead though sign_bias"));
  EXPECT_THAT(says_of({100, 0}, "sign_bias",
                      R"(,"actuators":{"expert_bias":{"applied":[0.5,-0.5],"reasons":["frozen"]}})"),
              Not(HasSubstr("dead")));  // what froze it explains it
  EXPECT_THAT(says_of({97, 1, 1, 1}, "fixed"), Not(HasSubstr("dead")));
  EXPECT_THAT(says_of({50, 50}, "fixed"), HasSubstr("only the noise floor is known"));
  EXPECT_THAT(says_of({100, 0}, "sign_bias", uneven), Not(HasSubstr("only the noise floor is known")));
  EXPECT_EQ(says_of({50, 50}, "sign_bias", even), R"(["nothing to change"])");
  EXPECT_THAT(says_of({100, 0}, "sign_bias", uneven), Not(HasSubstr("nothing to change")));
}

// ---- D6: a set-point out of reach is said ----

TEST(FieldCases, D6_ATargetOutOfReachIsSaid) {
  const TempDir dir;
  const auto says_of = [&](const char* target, const char* reasons) {
    std::string run =
        R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1},)"
        R"("aux_loss_weight":{"policy":"pi","options":{"metric":"load_cv","target":)" +
        std::string(target) + "}}}}\n";
    for (int step = 0; step < 200; ++step) {  // load_cv .4
      run += line_of(
          step, {70, 30},
          R"(,"actuators":{"aux_loss_weight":{"applied":[0.1],"reasons":[)" + std::string(reasons) + "]}}");
    }
    dir.write("run.jsonl", run);
    EXPECT_EQ(run_tool(dir, "report run.jsonl -o r.html").code, 0);
    return data_of(TempDir::read(dir.path("r.html"))).at(0)["advice"].dump();
  };
  EXPECT_THAT(
      says_of("0.2", R"("range")"),
      HasSubstr(
          "aux_loss_weight (pi) is at its limit (0.1) and load_cv stays at 0.4: the target of 0.2 lies out "
          "of reach"));
  EXPECT_THAT(says_of("0.41", R"("range")"), Not(HasSubstr("out of reach")));
  EXPECT_THAT(says_of("0.2", ""), Not(HasSubstr("out of reach")));
}

// A weight that nobody adds to the loss looks like a target out of reach, but for one thing: nothing changed on the way.
TEST(FieldCases, A8_AWeightThatRoseForNothingIsAdvisedToBeWired) {
  const TempDir dir;
  using Counts = std::vector<std::int64_t>;
  // Load_cv is .4 from step 40 to 79, while the weight rises.
  const auto says_of = [&](const Counts& early, const Counts& late) {
    std::string run =
        R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1},)"
        R"("aux_loss_weight":{"policy":"pi","options":{"metric":"load_cv","target":0.1}}}})"
        "\n";
    for (int step = 0; step < 220; ++step) {
      const bool low = step < 40, at_limit = step >= 80;
      run += line_of(step,
                     low        ? early
                     : at_limit ? late
                                : Counts{70, 30},
                     R"(,"actuators":{"aux_loss_weight":{"applied":[)" + std::string(low ? "0.01" : "0.1") +
                         R"(],"reasons":[)" + (low ? "" : R"("range")") + "]}}");
    }
    dir.write("run.jsonl", run);
    EXPECT_EQ(run_tool(dir, "report run.jsonl -o r.html").code, 0);
    return data_of(TempDir::read(dir.path("r.html"))).at(0)["advice"].dump();
  };
  EXPECT_THAT(says_of({70, 30}, {70, 30}),
              HasSubstr("aux_loss_weight (pi) rose from 0.01 to its limit (0.1) and load_cv did not fall "
                        "(0.4, at most 0.4 before): look "
                        "whether the auxiliary loss is multiplied by the weight in force and added to the "
                        "loss that is trained. If it is, "
                        "the target of 0.1 lies out of reach"));
  // A fresh router is even; the imbalance grows, and the weight brings it down.
  EXPECT_THAT(says_of({55, 45}, {65, 35}),
              AllOf(HasSubstr("load_cv stays at 0.3"), Not(HasSubstr("look whether"))));
  EXPECT_THAT(says_of({70, 30}, {65, 35}),
              AllOf(HasSubstr("load_cv stays at 0.3"), Not(HasSubstr("look whether"))));
  EXPECT_THAT(says_of({70, 30}, {55, 45}), Not(AnyOf(HasSubstr("out of reach"), HasSubstr("look whether"))));
}

}  // namespace
}  // namespace moectl
