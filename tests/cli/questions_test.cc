// Questions that people ask with their counts, answered by `metrics`, `capacity` and `placement` as they would be typed.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>
#include <set>

#include "moectl/figures.h"
#include "tool.h"

namespace moectl {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

/// T tokens of balanced routing: each chooses k of N experts, by `weights` if there are any. [N]
std::vector<std::int64_t> routed(std::mt19937_64& random, int experts, int top_k, int tokens,
                                 const std::vector<double>& weights = {}) {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(experts), 0);
  std::uniform_real_distribution<double> uniform(1e-12, 1);
  std::vector<std::pair<double, std::size_t>> keys(counts.size());
  for (int t = 0; t < tokens; ++t) {
    // The k smallest of exponential times with these rates.
    for (std::size_t i = 0; i < keys.size(); ++i)
      keys[i] = {-std::log(uniform(random)) / (weights.empty() ? 1 : weights[i]), i};
    std::nth_element(keys.begin(), keys.begin() + top_k, keys.end());
    for (int j = 0; j < top_k; ++j) ++counts[keys[static_cast<std::size_t>(j)].second];
  }
  return counts;
}

std::string line(std::int64_t step, int layer, int tokens, int top_k, const std::vector<std::int64_t>& counts,
                 const std::string& tag = "train") {
  return json({{"step", step},
               {"layer", layer},
               {"tokens", tokens},
               {"top_k", top_k},
               {"counts", counts},
               {"tag", tag}})
             .dump() +
         '\n';
}

// "Is a CV of 9.4 % imbalanced?", asked with 6 experts, top-3, 43 decode steps of one token. Two layers whose summed counts have
// CVs of 9.2 and 9.6 %.
std::string cv_of_9_4_percent() {
  std::string text;
  std::vector<std::int64_t> left[] = {{24, 24, 22, 20, 20, 19}, {25, 22, 22, 21, 21, 18}};
  for (int step = 0; step < 43; ++step) {
    for (int layer = 0; layer < 2; ++layer) {
      // The three experts with the most tokens still to place.
      std::vector<std::size_t> order = {0, 1, 2, 3, 4, 5};
      std::ranges::stable_sort(order,
                               [&](std::size_t a, std::size_t b) { return left[layer][a] > left[layer][b]; });
      std::vector<std::int64_t> counts(6, 0);
      for (std::size_t j = 0; j < 3; ++j) {
        ++counts[order[j]];
        --left[layer][order[j]];
      }
      text += line(step, layer, 1, 3, counts);
    }
  }
  return text;
}

TEST(UserReports, Item30_ACvOf9Point4PercentOn43TokensIsChance) {
  const TempDir dir;
  const ToolResult sum = run_tool(dir, "metrics - --sum --format json", cv_of_9_4_percent());
  ASSERT_EQ(sum.code, 0) << sum.err;
  ASSERT_EQ(sum.lines().size(), 2U);
  double mean = 0;
  for (std::size_t layer = 0; layer < 2; ++layer) {
    const json row = sum.json(layer);
    const double cv = row["load_cv"]["value"];
    mean += cv / 2;
    // √((6/3 - 1)/43) = 15.2 %: balanced routing of so few tokens is less even than that.
    EXPECT_NEAR(row["load_cv"]["floor"].get<double>(), std::sqrt(1.0 / 43), 1e-12);
    EXPECT_EQ(row["floor"], "noise floor");
    EXPECT_EQ(row["verdict"], "balanced");
    EXPECT_TRUE(row["hot"].empty());
    // From T on it would surely be more than 1.6 floors, u = CV² T of them: u - 1.96 √((4u - 2)/5) = 2.56; some 800 tokens.
    const double u = cv * cv * row["tokens_to_be_sure"].get<double>();
    EXPECT_NEAR(u - 1.96 * std::sqrt((4 * u - 2) / 5), 2.56, 0.02);
  }
  EXPECT_NEAR(mean, 0.094, 0.0005);
  const ToolResult screen = run_tool(dir, "metrics - --sum", cv_of_9_4_percent());
  EXPECT_THAT(screen.out, HasSubstr("6 experts, top-3, 43 steps"));
  EXPECT_THAT(screen.out, HasSubstr("BALANCED"));
  EXPECT_THAT(screen.out, HasSubstr("noise floor"));
  // The same shares of a thousand times as many tokens are another matter.
  const ToolResult many = run_tool(dir, "metrics - --sum --format json",
                                   line(0, 0, 43000, 3, {24000, 24000, 22000, 20000, 20000, 19000}));
  EXPECT_EQ(many.json()["verdict"], "imbalanced");
}

TEST(Screen, SaysWhichLayersAndExpertsAreOutOfLine) {
  std::mt19937_64 random(1);
  std::string text;
  for (int step = 0; step < 60; ++step) {
    text += line(step, 0, 256, 2, routed(random, 8, 2, 256));
    text += line(step, 1, 256, 2, routed(random, 8, 2, 256, {6, 1, 1, 1, 1, 1, 0.02, 1e-9}));
    text += line(step, 0, 256, 2, routed(random, 8, 2, 256), "validation");
  }
  const TempDir dir;
  dir.write("t.jsonl", text);
  const ToolResult screen = run_tool(dir, "metrics t.jsonl --format screen");
  ASSERT_EQ(screen.code, 0) << screen.err;
  EXPECT_THAT(screen.out, HasSubstr("IMBALANCED: layers 1 "));
  EXPECT_THAT(screen.out, HasSubstr("Balanced: layers 0 "));
  EXPECT_THAT(screen.out, HasSubstr("--by tag"));
  EXPECT_LE(screen.lines().size(), 24U) << "one screen";
  const ToolResult rows = run_tool(dir, "metrics t.jsonl --by tag --format json");
  ASSERT_EQ(rows.lines().size(), 3U);
  EXPECT_EQ(rows.json(0)["tag"], "train");
  EXPECT_EQ(rows.json(1)["tag"], "validation");
  EXPECT_EQ(rows.json(1)["verdict"], "balanced");
  const json one = rows.json(2);
  EXPECT_EQ(one["verdict"], "imbalanced");
  EXPECT_EQ(one["dead"], json({"e7"}));
  ASSERT_EQ(one["cold"].size(), 1U);
  EXPECT_THAT(one["cold"][0].get<std::string>(), HasSubstr("e6 x"));
  ASSERT_EQ(one["hot"].size(), 1U);
  EXPECT_THAT(one["hot"][0].get<std::string>(), HasSubstr("e0 x"));
  EXPECT_GT(one["load_cv"]["low"].get<double>(), 1.6);
  EXPECT_EQ(run_tool(dir, "metrics t.jsonl --by rank").code, 1);
  // In a pipe the default stays one JSON object a record.
  EXPECT_EQ(run_tool(dir, "metrics t.jsonl").lines().size(), 180U);
}

TEST(Screen, AnImbalanceThatAlternatesIsGoneInTheSum) {
  std::string text;
  for (int step = 0; step < 40; ++step) {
    text += step % 2 ? line(step, 0, 400, 1, {80, 80, 80, 80, 20, 20, 20, 20})
                     : line(step, 0, 400, 1, {20, 20, 20, 20, 80, 80, 80, 80});
  }
  const TempDir dir;
  EXPECT_THAT(run_tool(dir, "metrics - --format screen", text).out, HasSubstr("IMBALANCED"));
  EXPECT_EQ(run_tool(dir, "metrics - --sum --format json", text).json()["verdict"], "balanced");
}

// Of two or three steps the scatter of steps tells no interval, and so there is no verdict: it says what is needed.
TEST(Screen, NoVerdictWithoutAnInterval) {
  const TempDir dir;
  for (const int steps : {2, 3, 4}) {
    std::string even, uneven;
    for (int step = 0; step < steps; ++step) {
      even += line(step, 0, 4000, 1, {1000, 1001, 999, 1000});
      uneven += line(step, 0, 4000, 1, {2500, 500, 500, 500});
    }
    for (const std::string& text : {even, uneven}) {
      const json row = run_tool(dir, "metrics - --all --format json", text).json();
      const ToolResult screen = run_tool(dir, "metrics - --format screen", text);
      if (steps < 4) {
        EXPECT_EQ(row["verdict"], "unsure") << steps;
        EXPECT_EQ(row["steps_needed"], 4);
        EXPECT_EQ(row["tokens_to_be_sure"], 16000);
        EXPECT_THAT(screen.out, HasSubstr("too few steps for an interval: at least 4"));
        EXPECT_THAT(screen.out, HasSubstr("16000 tokens"));
      } else {
        EXPECT_TRUE(row["load_cv"]["low"].is_number());
        EXPECT_EQ(row["verdict"], text == even ? "balanced" : "imbalanced");
        EXPECT_TRUE(row["steps_needed"].is_null());
      }
      // The counts of all steps together have an interval of their own.
      const json sum = run_tool(dir, "metrics - --sum --format json", text).json();
      EXPECT_EQ(sum["verdict"], text == even ? "balanced" : "imbalanced");
    }
  }
}

// Of few tokens one expert may well stand at twice its share: the MaxVio of a sum is no proof by its value alone.
TEST(Screen, TheMaxVioOfASumCountsByItsLowerEnd) {
  const TempDir dir;
  const json row =
      run_tool(dir, "metrics - --sum --format json", line(0, 0, 64, 1, {8, 8, 8, 7, 7, 7, 7, 12})).json();
  EXPECT_LT(row["max_vio"]["low"].get<double>(), row["max_vio"]["over_floor"].get<double>());
  // 64 tokens over 64 experts, one of which has 5: far above 1.6 floors by its value alone?
  std::vector<std::int64_t> counts(64, 1);
  counts[0] = 7;
  for (std::size_t i = 1; i < 7; ++i) counts[i] = 0;
  const json few = run_tool(dir, "metrics - --sum --format json", line(0, 0, 64, 1, counts)).json();
  EXPECT_GT(few["max_vio"]["over_floor"].get<double>(), 1.6);
  EXPECT_LT(few["max_vio"]["low"].get<double>(), 1.6);
  EXPECT_EQ(few["verdict"], "unsure");
  EXPECT_TRUE(few["tokens_to_be_sure"].is_number());
}

// At the number of tokens that "sure at" names, the same CV has a verdict.
TEST(Screen, SureAtIsWhereTheVerdictIsSure) {
  const TempDir dir;
  const auto alternating = [&](int tokens) {
    const auto more = static_cast<std::int64_t>(std::llround(0.6 * tokens / 4)), less = tokens / 4 - more;
    return run_tool(dir, "metrics - --format screen",
                    line(0, 0, tokens, 1, {more, less, more, less, more, less, more, less}));
  };
  const json few = json::parse(
      run_tool(dir, "metrics - --all --format json", line(0, 0, 240, 1, {36, 24, 36, 24, 36, 24, 36, 24}))
          .out);
  ASSERT_EQ(few["verdict"], "unsure");
  const double at = few["tokens_to_be_sure"];
  EXPECT_THAT(alternating(static_cast<int>(at / 4 * 0.9) * 4).out, HasSubstr("UNSURE"));
  EXPECT_THAT(alternating(static_cast<int>(at / 4 * 1.02) * 4).out, HasSubstr("IMBALANCED"));
}

TEST(Screen, NoExpertOfABalancedLayerIsNamed) {
  std::mt19937_64 random(3);
  std::string text;
  for (int layer = 0; layer < 100; ++layer) text += line(0, layer, 128, 1, routed(random, 128, 1, 128));
  for (int layer = 100; layer < 200; ++layer) text += line(0, layer, 500, 2, routed(random, 64, 2, 500));
  const TempDir dir;
  int named = 0;
  for (const std::string& row : run_tool(dir, "metrics - --all --format json", text).lines()) {
    const json layer = json::parse(row);
    EXPECT_NE(layer["verdict"], "imbalanced");
    named += layer["hot"].empty() && layer["cold"].empty() && layer["dead"].empty() ? 0 : 1;
  }
  EXPECT_LE(named, 8);  // one in forty
}

// Two sequences tell little of the sampling floor.
TEST(Screen, AFloorFromFewSequencesIsNotSure) {
  std::mt19937_64 random(4);
  std::string text;
  for (int layer = 0; layer < 200; ++layer) {
    std::vector<std::int64_t> sum(4, 0), squares(4, 0);
    for (int sequence = 0; sequence < 2; ++sequence) {
      // Tokens of a sequence are alike: each sequence has preferences of its own.
      std::vector<double> weights(4);
      for (double& w : weights) w = std::exp(std::normal_distribution<double>(0, 1)(random));
      const auto counts = routed(random, 4, 1, 64, weights);
      for (std::size_t i = 0; i < 4; ++i) {
        sum[i] += counts[i];
        squares[i] += counts[i] * counts[i];
      }
    }
    json record = json::parse(line(0, layer, 128, 1, sum));
    record["sequences"] = 2;
    record["sequence_len_sq"] = 2 * 64 * 64;
    record["sequence_sq"] = squares;
    for (std::int64_t& count : sum) count *= 64;
    record["sequence_cross"] = sum;
    text += record.dump() + '\n';
  }
  const TempDir dir;
  int imbalanced = 0;
  for (const std::string& row : run_tool(dir, "metrics - --all --format json", text).lines()) {
    const json layer = json::parse(row);
    EXPECT_EQ(layer["floor"], "sampling floor");
    imbalanced += layer["verdict"] == "imbalanced" ? 1 : 0;
  }
  EXPECT_LE(imbalanced, 10);  // one in twenty
}

// One record without sequences: the floors of the other steps are known as badly as before.
TEST(Screen, ARecordWithoutSequencesMakesTheFloorNoSurer) {
  const TempDir dir;
  std::string all, lacking;
  for (int step = 0; step < 12; ++step) {
    // Two sequences of 50 tokens a step: 20 8 12 10 and 10 12 16 12.
    json record = json::parse(line(step, 0, 100, 1, {30, 20, 28, 22}));
    json with = record;
    with["sequences"] = 2;
    with["sequence_len_sq"] = 5000;
    with["sequence_sq"] = {500, 208, 400, 244};
    with["sequence_cross"] = {1500, 1000, 1400, 1100};
    all += with.dump() + '\n';
    lacking += (step == 5 ? record : with).dump() + '\n';
  }
  const auto width = [&](const std::string& text) {
    const ToolResult result = run_tool(dir, "metrics - --all --format json", text);
    EXPECT_EQ(result.code, 0) << result.err;
    const json cv = json::parse(result.lines().at(0))["load_cv"];
    return (cv["high"].get<double>() - cv["low"].get<double>()) / cv["over_floor"].get<double>();
  };
  const double expected = width(all);
  EXPECT_GT(expected, 0.2);
  EXPECT_GT(width(lacking), 0.9 * expected);
  EXPECT_THAT(run_tool(dir, "metrics - --format screen", lacking).out,
              HasSubstr("1 of 12 records have no sequences: those steps have the noise floor"));
  EXPECT_THAT(run_tool(dir, "metrics - --sum --format screen", lacking).out,
              HasSubstr("1 of 12 records have no sequences: the sum of their layers has the noise floor"));
  EXPECT_THAT(run_tool(dir, "metrics - --format screen", all).out, Not(HasSubstr("have no sequences")));
  json empty = json::parse(line(12, 0, 0, 1, {0, 0, 0, 0}));
  EXPECT_THAT(run_tool(dir, "metrics - --format screen", all + empty.dump() + '\n').out,
              Not(HasSubstr("have no sequences")));
}

// The interval of a mean holds it as often as it says, also where neighbouring steps are alike.
TEST(Screen, TheIntervalAllowsForStepsThatAreAlike) {
  std::mt19937_64 random(6);
  std::normal_distribution<double> normal;
  constexpr double kAlike = 0.9;
  const auto trace = [&](int layers, int steps) {
    std::string text;
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<double> x(8);
      for (double& v : x) v = normal(random) / std::sqrt(1 - kAlike * kAlike);
      for (int step = 0; step < steps; ++step) {
        std::vector<double> weights;
        for (double& v : x) {
          v = kAlike * v + normal(random);
          weights.push_back(std::exp(0.2 * v));
        }
        text += line(step, layer, 256, 1, routed(random, 8, 1, 256, weights));
      }
    }
    return text;
  };
  const TempDir dir;
  double mean = 0;
  const auto many = run_tool(dir, "metrics - --all --format json", trace(20, 400)).lines();
  for (const std::string& row : many) mean += json::parse(row)["load_cv"]["value"].get<double>() / 20;
  int holds = 0;
  for (const std::string& row : run_tool(dir, "metrics - --all --format json", trace(200, 60)).lines()) {
    const json cv = json::parse(row)["load_cv"];
    const double floor = cv["floor"], low = cv["low"], high = cv["high"];
    holds += low * floor <= mean && mean <= high * floor ? 1 : 0;
  }
  EXPECT_GE(holds, 174) << "of 200";
}

TEST(Screen, OfManyLayersTheWorstComeFirstAndAllStillCanBeSeen) {
  std::mt19937_64 random(5);
  std::string text;
  for (int step = 0; step < 20; ++step) {
    for (int layer = 0; layer < 60; ++layer) {
      std::vector<double> weights(8, 1.0);
      if (layer >= 57) weights[0] = layer == 59 ? 20 : 3;
      text += line(step, layer, 64, 2, routed(random, 8, 2, 64, weights));
    }
  }
  const TempDir dir;
  dir.write("t.jsonl", text);
  const ToolResult screen = run_tool(dir, "metrics t.jsonl --format screen");
  ASSERT_EQ(screen.code, 0) << screen.err;
  EXPECT_LE(screen.lines().size(), 36U) << screen.out;
  for (const std::string& row : screen.lines()) EXPECT_LE(row.size(), 80U) << "a line that breaks is two";
  const auto lines = screen.lines();
  const auto header = std::ranges::find_if(lines, [](const auto& l) { return l.starts_with("layer "); });
  ASSERT_NE(header, lines.end());
  EXPECT_THAT(*(header + 1), ::testing::StartsWith("59 "));
  EXPECT_THAT(screen.out, HasSubstr("the worst 16 of 60"));
  EXPECT_THAT(screen.out, HasSubstr("--all"));
  EXPECT_THAT(screen.out, HasSubstr("Over layers, x floor: CV p5 "));
  const ToolResult all = run_tool(dir, "metrics t.jsonl --all");
  EXPECT_GT(all.lines().size(), 60U);
  EXPECT_EQ(run_tool(dir, "metrics t.jsonl --all --format json").lines().size(), 60U);
}

// ---- records of ranks and micro-batches ----

// Two ranks with two micro-batches each, as `import megatron` reads them.
std::string megatron(int rank, int steps) {
  std::mt19937_64 random(static_cast<std::uint64_t>(rank) + 11);
  std::string text;
  for (int step = 0; step < steps; ++step) {
    for (int part = 0; part < 2; ++part) {
      for (int layer = 0; layer < 2; ++layer) {
        json indices = json::array();
        std::uniform_int_distribution<int> expert(0, 7);
        for (int t = 0; t < 64; ++t) {
          const int first = expert(random) / 2, second = 4 + expert(random) / 2;
          indices.push_back({first, second});
        }
        text +=
            json({{"step", step}, {"layer", layer}, {"rank", rank}, {"top_indices", indices}}).dump() + '\n';
      }
    }
  }
  return text;
}

TEST(Parts, EveryCommandReadsATraceOfRanksAndMicroBatches) {
  const TempDir dir;
  dir.write("router_trace_rank0.jsonl", megatron(0, 40));
  dir.write("router_trace_rank1.jsonl", megatron(1, 40));
  const std::string import = "import megatron router_trace_rank*.jsonl -o ";
  ASSERT_EQ(run_tool(dir, import + "sum.jsonl").code, 0);
  ASSERT_EQ(run_tool(dir, import + "rank.jsonl --by rank").code, 0);
  const ToolResult parts = run_tool(dir, import + "part.jsonl --by micro-batch");
  ASSERT_EQ(parts.code, 0) << parts.err;
  EXPECT_THAT(parts.err, HasSubstr("320 records"));
  EXPECT_THAT(TempDir::read(dir.path("part.jsonl")), HasSubstr("\"tag\":\"rank1/mb1\""));
  // What judges whole steps judges their sum.
  const auto of_each = [&](const std::string& command, const std::string& more) {
    const std::string sum = run_tool(dir, command + " sum.jsonl" + more).out;
    EXPECT_FALSE(sum.empty()) << command;
    for (const char* file : {" rank.jsonl", " part.jsonl"}) {
      const ToolResult result = run_tool(dir, command + file + more);
      EXPECT_EQ(result.out, sum) << command << file << result.err;
    }
  };
  of_each("metrics", " --format screen");
  of_each("metrics", " --sum --format json");
  of_each("metrics", " --loads --format json");
  of_each("placement", " --devices 4 --format json");
  of_each("metrics", " --trends --format json");
  of_each("metrics", " --compare train@0:20 train@20: --format json");
  of_each("watch", " --once --plain");
  dir.write("c.yaml",
            "version: 1\nmodel: {layers: 2, experts: 8, top_k: 2}\nexpert_bias: {policy: sign_bias}\n");
  of_each("replay c.yaml", "");
  const auto figures = [&](const std::string& file) {
    json row = json::parse(run_tool(dir, "compare --format json " + file).out)[0];
    row.erase("run");
    return row;
  };
  const auto board = [&](const std::string& name) {
    EXPECT_EQ(run_tool(dir, "tensorboard " + name + ".jsonl -o board --metric all").code, 0);
    return TempDir::read(std::filesystem::directory_iterator(dir.path("board/" + name))->path().string());
  };
  EXPECT_EQ(figures("sum.jsonl")["steps"], 40);
  EXPECT_FALSE(figures("sum.jsonl")["max_vio_global"].is_null());
  const std::string events = board("sum");
  EXPECT_THAT(events, HasSubstr("max_vio/layer_1"));
  for (const std::string name : {"rank", "part"}) {
    EXPECT_EQ(figures(name + ".jsonl"), figures("sum.jsonl"));
    EXPECT_EQ(board(name), events) << name;
  }
  // The library's own figures are those of whole steps, too.
  EXPECT_EQ(read_figures(dir.path("part.jsonl")).max_vio, read_figures(dir.path("sum.jsonl")).max_vio);
  // Windows of ranks stay ranks.
  EXPECT_EQ(run_tool(dir, "metrics part.jsonl --compare rank0 rank1 --format json").out,
            run_tool(dir, "metrics rank.jsonl --compare rank0 rank1 --format json").out);
  EXPECT_EQ(run_tool(dir, "metrics part.jsonl --compare rank0/mb0 rank1/mb1 --format json").lines().size(),
            2U);
  EXPECT_EQ(run_tool(dir, "metrics part.jsonl --by rank --format json").out,
            run_tool(dir, "metrics rank.jsonl --by rank --format json").out);
  ASSERT_EQ(run_tool(dir, "metrics part.jsonl --by rank --format json").lines().size(), 4U);
  // The page holds the run: a layer's load by expert, its MaxVio, and how many steps.
  const auto page = [&](const std::string& file) {
    EXPECT_EQ(run_tool(dir, "report " + file + " -o page.html").code, 0);
    const std::string text = TempDir::read(dir.path("page.html"));
    const std::string open = R"(<script type="application/json" id="data">)";
    const std::size_t from = text.find(open) + open.size();
    return json::parse(text.substr(from, text.find("</script>", from) - from))[0];
  };
  const json whole = page("sum.jsonl");
  for (const char* file : {"rank.jsonl", "part.jsonl"}) {
    const json of_parts = page(file);
    EXPECT_EQ(of_parts["layers"], whole["layers"]) << file;
    EXPECT_EQ(of_parts["figures"], whole["figures"]) << file;
    EXPECT_TRUE(of_parts["now"]["known"]) << file;
  }
  // Capacity acts in each part, whose loads scatter more.
  const auto capacity = [&](const std::string& arguments) {
    const ToolResult result = run_tool(dir, "capacity " + arguments + " --format json");
    EXPECT_EQ(result.code, 0) << result.err;
    return json::parse(result.out);
  };
  const json of_sum = capacity("sum.jsonl"), of_rank = capacity("rank.jsonl"),
             of_part = capacity("part.jsonl");
  EXPECT_TRUE(of_sum["lower_bound"]);
  EXPECT_FALSE(of_part["lower_bound"]);
  EXPECT_EQ(of_sum["granularity"], "steps");
  EXPECT_EQ(of_rank["granularity"], "ranks");
  EXPECT_EQ(of_part["granularity"], "ranks and micro-batches");
  EXPECT_LT(of_sum["factor"].get<double>(), of_rank["factor"].get<double>());
  EXPECT_LT(of_rank["factor"].get<double>(), of_part["factor"].get<double>());
  EXPECT_THAT(run_tool(dir, "capacity part.jsonl").out, HasSubstr("each micro-batch in each of 2 ranks"));
  EXPECT_THAT(run_tool(dir, "capacity rank.jsonl").out, HasSubstr("LOWER BOUND"));
}

TEST(Parts, RanksThatHoldTheSameTokensAreTakenOnce) {
  const TempDir dir;
  std::string text, once;
  for (int step = 0; step < 6; ++step) {
    once += line(step, 0, 8, 2, {8, 4, 3, 1});
    for (const char* rank : {"rank0", "rank1"}) text += line(step, 0, 8, 2, {8, 4, 3, 1}, rank);
  }
  const ToolResult result = run_tool(dir, "metrics - --all --format json", text);
  EXPECT_EQ(result.out, run_tool(dir, "metrics - --all --format json", once).out);
  EXPECT_THAT(result.err, HasSubstr("taken once"));
  for (const char* command : {"watch - --once --plain", "compare - --format json", "metrics - --trends"}) {
    const ToolResult other = run_tool(dir, command, text);
    EXPECT_EQ(other.out, run_tool(dir, command, once).out) << command;
    EXPECT_THAT(other.err, HasSubstr("taken once")) << command;
  }
}

// What a part says beside its counts: losses are means over tokens, domains are those of all parts.
TEST(Parts, LossesAndDomainsAddUpToo) {
  const auto record = [](const std::string& tag, int tokens, const json& counts, double loss,
                         const json& domains) {
    return json({{"step", 0},
                 {"layer", 0},
                 {"tokens", tokens},
                 {"top_k", 1},
                 {"counts", counts},
                 {"tag", tag},
                 {"loss", loss},
                 {"domain_counts", domains}})
               .dump() +
           '\n';
  };
  const std::string parts = record("rank0", 30, {20, 10}, 2, {{"code", {20, 10}}}) +
                            record("rank1", 10, {3, 7}, 4, {{"code", {1, 0}}, {"prose", {2, 7}}});
  const std::string whole = record("train", 40, {23, 17}, 2.5, {{"code", {21, 10}}, {"prose", {2, 7}}});
  const TempDir dir;
  for (const char* command : {"compare - --format json", "metrics - --by domain --format json",
                              "metrics - --trends --format json"}) {
    const ToolResult result = run_tool(dir, command, parts);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(result.out, run_tool(dir, command, whole).out) << command;
  }
  EXPECT_EQ(json::parse(run_tool(dir, "compare - --format json", parts).out)[0]["loss"], 2.5);
  // Where the whole is there as well, parts are not counted again, whichever comes first.
  for (const std::string& text : {parts + whole, whole + parts})
    EXPECT_EQ(run_tool(dir, "compare - --format json", text).out,
              run_tool(dir, "compare - --format json", whole).out);
  EXPECT_THAT(run_tool(dir, "compare -",
                       record("rank0", 4, {4, 0}, 1, json::object()) +
                           record("rank1", 4, {2, 1, 1}, 1, json::object()))
                  .err,
              HasSubstr("experts and top_k must be the same in all parts of a step"));
}

TEST(Screen, ByDomain) {
  const std::string text =
      R"({"step":0,"layer":0,"tokens":400,"top_k":1,"counts":[200,200],"domain_counts":{"code":[200,0],"prose":[0,200]}})"
      "\n";
  const TempDir dir;
  const ToolResult rows = run_tool(dir, "metrics - --by domain --format json", text);
  ASSERT_EQ(rows.lines().size(), 2U) << rows.err;
  EXPECT_EQ(rows.json(0)["domain"], "code");
  EXPECT_EQ(rows.json(0)["verdict"], "imbalanced");
  EXPECT_EQ(rows.json(0)["tokens"], 200);
}

// What the host measures itself, by hand: of two layers, in two records. Prometheus: tests/prometheus.
TEST(HostNumbers, ReachMetricsReportAndTensorBoard) {
  std::string text;
  for (int step = 0; step < 2; ++step) {
    for (int layer = 0; layer < 2; ++layer) {
      json record = json::parse(line(step, layer, 8, 2, {8, 4, 2, 2}));
      if (layer == 1) {
        record.update({{"balance_loss", 1.5},
                       {"z_loss", 9},
                       {"router_similarity", 0.25},
                       {"router_condition", 3},
                       {"expert_output_norm", 2 + step},
                       {"gradient_ratio", 0.125}});
      }
      text += record.dump() + '\n';
    }
  }
  const TempDir dir;
  dir.write("t.jsonl", text);
  const std::map<std::string, double> means = {{"balance_loss", 1.5},       {"z_loss", 9},
                                               {"router_similarity", 0.25}, {"router_condition", 3},
                                               {"gradient_ratio", 0.125},   {"expert_output_norm", 2.5}};
  const ToolResult metrics = run_tool(dir, "metrics t.jsonl");
  EXPECT_EQ(metrics.json(3)["metrics"]["expert_output_norm"], 3);
  EXPECT_TRUE(metrics.json(2)["metrics"]["expert_output_norm"].is_null()) << "absent where nobody measured";
  ASSERT_EQ(run_tool(dir, "report t.jsonl -o page.html").code, 0);
  const std::string page = TempDir::read(dir.path("page.html"));
  const std::string open = R"(<script type="application/json" id="data">)";
  const std::size_t from = page.find(open) + open.size();
  const json rows = json::parse(page.substr(from, page.find("</script>", from) - from))[0]["metrics"];
  std::string all;
  for (const auto& [name, mean] : means) {
    const auto row =
        std::ranges::find_if(rows, [&name = name](const json& one) { return one["name"] == name; });
    ASSERT_NE(row, rows.end()) << name;
    EXPECT_EQ((*row)["mean"], mean) << name;
    EXPECT_EQ((*row)["over_layers"], json({mean, mean, mean, mean, mean})) << "one layer has it";
    all += " --metric " + name;
  }
  ASSERT_EQ(run_tool(dir, "tensorboard t.jsonl -o board" + all).code, 0);
  const std::string events =
      TempDir::read(std::filesystem::directory_iterator(dir.path("board/t"))->path().string());
  for (const auto& [name, mean] : means) {
    EXPECT_THAT(events, HasSubstr(name + "/layer_1"));
    EXPECT_THAT(events, Not(HasSubstr(name + "/layer_0")));
  }
  EXPECT_THAT(events, Not(HasSubstr("max_vio/layer"))) << "not chosen";
}

// ---- capacity ----

TEST(Capacity, RatesByHand) {
  // N = 4, S = 16: capacity 4 · factor, rounded up. [8, 4, 3, 1]: factor 1 drops 4, 1.25 drops 3, 2 none.
  const TempDir dir;
  const ToolResult result = run_tool(dir, "capacity - --factors 1 1.25 2 --drop 0.13 --format json",
                                     line(0, 0, 8, 2, {8, 4, 3, 1}));
  ASSERT_EQ(result.code, 0) << result.err;
  const json all = json::parse(result.out);
  EXPECT_TRUE(all["lower_bound"]);
  const json& rates = all["layers"][0]["rates"];
  EXPECT_DOUBLE_EQ(rates[0]["drop_rate"].get<double>(), 4.0 / 16);
  EXPECT_DOUBLE_EQ(rates[1]["drop_rate"].get<double>(), 3.0 / 16);
  EXPECT_DOUBLE_EQ(rates[2]["drop_rate"].get<double>(), 0);
  // 2 of 16 = 12.5 % at a capacity of 6: the first hundredth above 5/4.
  EXPECT_NEAR(all["factor"].get<double>(), 1.26, 1e-9);
}

// The question: which capacity factor for at most 1 % drops, 128 experts, top-8? Balanced routing, 4096 tokens in each of 8
// micro-batches: 256 assignments an expert, which scatter by √(256 · 15/16) = 6 %.
// Few tokens a part: the exact binomial, not a normal one. 64 assignments of each of 128 experts in 64 parts; Σ (x - c) C(64, x)
// (1/64)^x (63/64)^(64-x) over x > c, c = 1, 3, 4.
TEST(Capacity, SmallPartsByHand) {
  const TempDir dir;
  const json found = json::parse(run_tool(dir, "capacity - --parts 64 --factors 1 3 4 --format json",
                                          line(0, 0, 1024, 8, std::vector<std::int64_t>(128, 64)))
                                     .out);
  const json& rates = found["layers"][0]["rates"];
  EXPECT_NEAR(rates[0]["drop_rate"].get<double>(), 0.364986524, 1e-8);
  EXPECT_NEAR(rates[1]["drop_rate"].get<double>(), 0.021909476, 1e-8);
  EXPECT_NEAR(rates[2]["drop_rate"].get<double>(), 0.003881702, 1e-8);
  // Many: as the normal one says, E max(0, X - mean) = σ/√(2π).
  const json many = json::parse(run_tool(dir, "capacity - --parts 2 --factors 1 --format json",
                                         line(0, 0, 1 << 20, 1, std::vector<std::int64_t>(4, 1 << 18)))
                                    .out);
  EXPECT_NEAR(many["layers"][0]["rates"][0]["drop_rate"].get<double>(),
              std::sqrt((1 << 18) / 4.0 / (2 * std::acos(-1.0))) * 2 / (1 << 18), 1e-8);
}

TEST(Capacity, Of128ExpertsTop8ForOnePercentDrops) {
  std::mt19937_64 random(2);
  std::string parts, whole;
  for (int step = 0; step < 6; ++step) {
    std::vector<std::int64_t> sum(128, 0);
    for (int r = 0; r < 8; ++r) {
      const auto counts = routed(random, 128, 8, 512);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += counts[i];
      parts += line(step, 0, 512, 8, counts, "rank" + std::to_string(r));
    }
    whole += line(step, 0, 4096, 8, sum);
  }
  const TempDir dir;
  const auto factor = [&](const std::string& text, const std::string& more) {
    const ToolResult result = run_tool(dir, "capacity - --drop 0.01 --format json" + more, text);
    EXPECT_EQ(result.code, 0) << result.err;
    return json::parse(result.out);
  };
  // 32 assignments an expert and part, standard deviation √(32 · 15/16) = 5.5, 17 % of them. E max(0, X - c) = 0.32 of a
  // normal X, which is 1 % of the mean, at c = 32 + 1.19 · 5.5 = 38.5; capacities are whole: 39 of 32 from factor 1.19 on.
  const json of_ranks = factor(parts, "");
  EXPECT_FALSE(of_ranks["lower_bound"]);
  EXPECT_NEAR(of_ranks["factor"].get<double>(), 1.2, 0.03);
  // Of whole steps it is a lower bound, and far too low; split into 8 parts it is right again.
  const json bound = factor(whole, "");
  EXPECT_TRUE(bound["lower_bound"]);
  EXPECT_LT(bound["factor"].get<double>(), 1.1);
  EXPECT_NEAR(factor(whole, " --parts 8")["factor"].get<double>(), of_ranks["factor"].get<double>(), 0.035);
  const ToolResult table = run_tool(dir, "capacity - --drop 0.01", whole);
  EXPECT_THAT(table.out, HasSubstr("LOWER BOUND"));
  EXPECT_THAT(table.out, HasSubstr("capacity factor at least 1.0"));
  EXPECT_THAT(run_tool(dir, "capacity -", parts).out, HasSubstr("8 ranks"));
  EXPECT_EQ(run_tool(dir, "capacity -", parts + whole).code, 1) << "steps and their ranks would count twice";
}

TEST(Capacity, TheIntervalHoldsTheMean) {
  std::mt19937_64 random(3);
  std::string text;
  for (int step = 0; step < 64; ++step)
    text +=
        line(step, 0, 256, 2, routed(random, 16, 2, 256, {3, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}));
  const TempDir dir;
  const json all = json::parse(run_tool(dir, "capacity - --factors 1.25 --format json", text).out);
  const json& rate = all["layers"][0]["rates"][0];
  EXPECT_LT(rate["low"].get<double>(), rate["drop_rate"].get<double>());
  EXPECT_GT(rate["high"].get<double>(), rate["drop_rate"].get<double>());
  EXPECT_LT(rate["high"].get<double>() - rate["low"].get<double>(), 0.03);
}

// ---- placement ----

std::string steady(double spread, std::uint64_t seed, int steps = 80) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> weights(16);
  for (double& w : weights) w = std::exp(spread * normal(random));
  std::string text;
  for (int step = 0; step < steps; ++step) text += line(step, 3, 512, 2, routed(random, 16, 2, 512, weights));
  return text;
}

TEST(PlacementCommand, MovesPayWhereLoadsAreUnevenAndNotWhereTheyAreNoise) {
  const TempDir dir;
  const ToolResult uneven = run_tool(dir, "placement - --devices 4 --slots 20 --format json", steady(1, 1));
  ASSERT_EQ(uneven.code, 0) << uneven.err;
  const json plan = json::parse(uneven.out);
  EXPECT_EQ(plan["verdict"], "worth");
  EXPECT_GT(plan["planned"].get<double>(), plan["linear"].get<double>() + 0.1);
  EXPECT_GT(plan["gain"]["low"].get<double>(), 0);
  EXPECT_LE(plan["planned"].get<double>(), plan["hindsight"].get<double>() + 0.02);
  EXPECT_EQ(plan["layers"][0]["phy2log"].size(), 20U);
  EXPECT_THAT(uneven.err, HasSubstr("Worth its"));
  const ToolResult even = run_tool(dir, "placement - --devices 4", steady(0, 2));
  EXPECT_THAT(even.out, HasSubstr("Not worth its"));
  EXPECT_THAT(even.out, HasSubstr("Leave the experts where they are"));
}

TEST(PlacementCommand, FilesForEngines) {
  const TempDir dir;
  const std::string text = steady(1, 3);
  const json maps =
      json::parse(run_tool(dir, "placement - --devices 4 --slots 20 --format phy2log", text).out);
  EXPECT_EQ(maps["layers"], json({3}));
  ASSERT_EQ(maps["phy2log"][0].size(), 20U);
  // SGLang passes every key on as an argument of ExpertLocationMetadata.init_by_mapping, so that there must be this one
  // alone, and looks a layer up by its number in the model (python/sglang/srt/eplb/expert_location.py).
  const ToolResult result = run_tool(dir, "placement - --devices 4 --slots 20 --format sglang", text);
  const json sglang = json::parse(result.out);
  ASSERT_EQ(sglang.size(), 1U);
  const json& rows = sglang["physical_to_logical_map"];
  ASSERT_EQ(rows.size(), 4U) << "layers 0 to 3 of the model";
  EXPECT_EQ(rows[3], maps["phy2log"][0]);
  EXPECT_EQ(rows[0], json({0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3}));
  EXPECT_THAT(result.err, HasSubstr("in order: 0, 1, 2"));
  EXPECT_THAT(result.err, HasSubstr("--ep-num-redundant-experts 4"));
  const json ascend =
      json::parse(run_tool(dir, "placement - --devices 4 --slots 20 --format ascend", text).out);
  EXPECT_EQ(ascend["moe_layer_count"], 1);
  const json& layer = ascend["layer_list"][0];
  EXPECT_EQ(layer["layer_id"], 0) << "numbered over MoE layers";
  EXPECT_EQ(layer["device_count"], 4);
  std::vector<int> joined;
  for (const json& device : layer["device_list"]) {
    for (const int expert : device["device_expert"]) joined.push_back(expert);
  }
  EXPECT_EQ(json(joined), maps["phy2log"][0]);
}

// Eight steps of the same loads, one assignment a token.
std::string constant(const std::vector<std::int64_t>& counts) {
  std::string text;
  const auto tokens = std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
  for (int step = 0; step < 8; ++step) text += line(step, 0, static_cast<int>(tokens), 1, counts);
  return text;
}

// EPLB's rules put expert 1 on a device twice and reach .994, without that .878. vLLM-Ascend knows one slot of an expert on a device.
TEST(PlacementCommand, RepeatsWhereTheyPayAndNeverForAscend) {
  const TempDir dir;
  const std::string text = constant({591, 637, 442, 184});
  const ToolResult result = run_tool(dir, "placement - --devices 2 --slots 6 --format json", text);
  EXPECT_GT(json::parse(result.out)["planned"].get<double>(), .993);
  EXPECT_THAT(result.err, HasSubstr("1 slot holds an expert that the device has already, in 1 of 1 layers"));
  EXPECT_THAT(result.err, HasSubstr("--format ascend plans without"));
  const auto all_differ = [&](const std::string& arguments, const std::string& input, std::size_t room) {
    const ToolResult ascend = run_tool(dir, "placement - --format ascend " + arguments, input);
    ASSERT_EQ(ascend.code, 0) << ascend.err;
    const json map = json::parse(ascend.out);
    for (const json& device : map["layer_list"][0]["device_list"]) {
      const auto experts = device["device_expert"].get<std::set<int>>();
      EXPECT_EQ(experts.size(), room) << arguments;
      EXPECT_EQ(device["device_expert"].size(), room) << arguments;
    }
    EXPECT_THAT(ascend.err, Not(HasSubstr("has already")));
  };
  all_differ("--devices 2 --slots 6", text, 3);
  const std::string skewed = constant({90, 10, 10, 10, 10, 10, 10, 50});
  all_differ("--devices 4 --slots 12 --max-moves 4", skewed, 3);
  all_differ("--devices 4 --slots 12 --max-moves 9", skewed, 3);
  all_differ("--devices 8 --nodes 2 --slots 24", skewed, 3);
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    all_differ("--devices 4 --slots 20", steady(1.5, seed, 8), 5);
    all_differ("--devices 8 --slots 24 --max-moves 8", steady(1, seed, 8), 3);
    all_differ("--devices 4 --nodes 2 --slots 28", steady(2, seed, 8), 7);
  }
  EXPECT_THAT(run_tool(dir, "placement - --devices 4 --slots 12 --max-moves 1 --format ascend", skewed).err,
              HasSubstr("--max-moves: 1: must be at least 4"));
  EXPECT_THAT(run_tool(dir, "placement - --devices 4 --slots 36 --format ascend", skewed).err,
              AllOf(HasSubstr("--slots: 36: must be at most 32"), HasSubstr("(--format ascend)")));
  EXPECT_THAT(run_tool(dir, "placement - --devices 4 --slots 12 --max-moves 1", skewed).out,
              HasSubstr("3 slots hold an expert that the device has already, in 1 of 1 layers: free slots"));
  EXPECT_THAT(run_tool(dir, "placement - --devices 4 --slots 36", skewed).out,
              HasSubstr("a device has more slots than its node has experts"));
}

// Why slots hold repeats is said of each layer: these two have the same slots, and different experts.
TEST(PlacementCommand, RepeatsOfLayersThatDifferHaveTheirOwnCauses) {
  const TempDir dir;
  std::string text;
  for (int step = 0; step < 8; ++step) {
    text += line(step, 0, 1854, 1, {591, 637, 442, 184});
    text += line(step, 1, 100, 1, {60, 40});
  }
  const std::string out = run_tool(dir, "placement - --devices 2 --slots 6", text).out;
  EXPECT_THAT(
      out, HasSubstr("1 slot holds an expert that the device has already, in 1 of 2 layers: more even than"));
  EXPECT_THAT(out, HasSubstr("in 1 of 2 layers: a device has more slots than its node has experts"));
}

TEST(PlacementCommand, MaxMovesAndWrongOptions) {
  const TempDir dir;
  const std::string text = steady(1, 4);
  const json few =
      json::parse(run_tool(dir, "placement - --devices 4 --max-moves 2 --format json", text).out);
  EXPECT_LE(few["moves"].get<int>(), 2);
  EXPECT_GT(few["planned"].get<double>(), few["linear"].get<double>());
  EXPECT_THAT(run_tool(dir, "placement - --devices 4 --slots 18", text).err, HasSubstr("--slots: 18"));
  EXPECT_THAT(run_tool(dir, "placement - --devices 4 --nodes 2 --max-moves 2", text).err,
              AllOf(HasSubstr("--max-moves: 2: must be left out where there are several nodes (2)"),
                    Not(HasSubstr("-1"))));
  // A plan that is asked to be hierarchical is never global without a word.
  EXPECT_THAT(run_tool(dir, "placement - --devices 8 --nodes 8 --groups 4", text).err,
              AllOf(HasSubstr("--nodes: 8: must be 1 (a global plan) or divide the groups (4)"),
                    HasSubstr("groups that fit 16 experts: 8, 16")));
  EXPECT_THAT(run_tool(dir, "placement - --devices 6 --nodes 3", text).err,
              HasSubstr("--nodes: 3: must be 1 (a global plan) or divide the groups (16)"));
  EXPECT_THAT(run_tool(dir, "placement - --devices 4", steady(1, 4, 1)).err, HasSubstr("at least 2"));
  EXPECT_THAT(run_tool(dir, "placement - --devices 4", line(0, 0, 4, 1, {4, 0}, "other")).err,
              HasSubstr("no record tagged 'train'"));
}

// Whatever the limit, the loads and the free slots: what is written is chosen by the first part of the trace. Where it is worse on
// the rest, that is shown, and the verdict says so.
TEST(PlacementCommand, WithALimitOfMovesALossOnLaterStepsIsShown) {
  const TempDir dir;
  int moved = 0, kept = 0, lost = 0;
  for (const double spread : {0.0, 0.05, 0.6}) {
    for (std::uint64_t seed = 1; seed <= 3; ++seed) {
      for (const char* slots : {"16", "20", "24"}) {
        for (const int most : {0, 1, 3, 8}) {
          const ToolResult result = run_tool(dir,
                                             std::string("placement - --devices 4 --format json --slots ") +
                                                 slots + " --max-moves " + std::to_string(most),
                                             steady(spread, seed, 24));
          ASSERT_EQ(result.code, 0) << result.err;
          const json plan = json::parse(result.out);
          EXPECT_LE(plan["moves"].get<int>(), most);
          const json& layer = plan["layers"][0];
          EXPECT_EQ(layer["loads"].size(), plan["moves"].get<std::size_t>());
          EXPECT_THAT(result.err, HasSubstr("At most " + std::to_string(most) + " moves a layer: " +
                                            std::to_string(plan["moves"].get<int>()) + " in all"));
          const double gain = plan["planned"].get<double>() - plan["linear"].get<double>();
          EXPECT_NEAR(plan["gain"]["mean"].get<double>(), gain, 1e-12);
          if (plan["moves"] == 0) {
            EXPECT_THAT(result.err, HasSubstr("1 of 1 layers stay as they are"));
            EXPECT_EQ(gain, 0);
          }
          if (gain < 0) {
            ++lost;
            EXPECT_EQ(plan["verdict"], "not worth") << spread << ' ' << seed << ' ' << slots << ' ' << most;
            EXPECT_EQ(layer["verdict"], "not worth");
            EXPECT_THAT(result.err, HasSubstr("Not worth its " + std::to_string(plan["moves"].get<int>())));
            EXPECT_THAT(result.err, HasSubstr("Leave the experts where they are"));
          }
          (plan["moves"] == 0 ? kept : moved) += 1;
        }
      }
    }
  }
  EXPECT_GT(moved, 20);
  EXPECT_GE(kept, 27);
  EXPECT_GT(lost, 5);
}

// The steps that judge a plan do not choose it: another rest of the trace, the same plan, and its loss.
TEST(PlacementCommand, TheLaterStepsDoNotChooseThePlan) {
  const TempDir dir;
  std::mt19937_64 random(21);
  const auto steps = [&](int from, const std::vector<double>& weights) {
    std::string text;
    for (int step = from; step < from + 20; ++step)
      text += line(step, 0, 512, 2, routed(random, 16, 2, 512, weights));
    return text;
  };
  std::vector<double> weights(16, 1.0);
  weights[0] = weights[1] = 4;  // on one device
  const std::string first = steps(0, weights), same = steps(20, weights);
  for (const std::string limit : {"", " --max-moves 2", " --max-moves 6"}) {
    const auto plan = [&](const std::string& rest) {
      const ToolResult result = run_tool(dir, "placement - --devices 4 --format json" + limit, first + rest);
      EXPECT_EQ(result.code, 0) << result.err;
      return json::parse(result.out);
    };
    const json kept = plan(same);
    EXPECT_GT(kept["moves"].get<int>(), 0) << limit;
    EXPECT_EQ(kept["verdict"], "worth") << limit;
    // Then two experts become heavy that the plan has brought onto one device.
    const std::vector<int> slots = kept["layers"][0]["phy2log"];
    std::vector<double> against(16, 1.0);
    bool found = false;
    for (std::size_t i = 0; i < slots.size() && !found; ++i) {
      for (std::size_t j = i - i % 4; j < i && !found; ++j) {
        found = slots[i] / 4 != slots[j] / 4;
        if (found)
          against[static_cast<std::size_t>(slots[i])] = against[static_cast<std::size_t>(slots[j])] = 4;
      }
    }
    ASSERT_TRUE(found) << limit;
    const json lost = plan(steps(20, against));
    EXPECT_EQ(kept["layers"][0]["phy2log"], lost["layers"][0]["phy2log"]) << limit;
    EXPECT_LT(lost["gain"]["mean"].get<double>(), -0.05) << limit;
    EXPECT_EQ(lost["verdict"], "not worth") << limit;
  }
}

TEST(PlacementCommand, DrawsWhatEachDeviceCarries) {
  const TempDir dir;
  const std::string text = steady(1, 5) + steady(1, 6);
  const ToolResult result =
      run_tool(dir, "placement - --devices 4 --slots 20 --format json --svg p.svg", steady(1, 5));
  ASSERT_EQ(result.code, 0) << result.err;
  const json plan = json::parse(result.out);
  const std::string svg = TempDir::read(dir.path("p.svg"));
  EXPECT_THAT(svg, HasSubstr("layer 3, today: balancedness"));
  char planned[64];
  std::snprintf(planned, sizeof planned, "planned: balancedness %.3f", plan["planned"].get<double>());
  EXPECT_THAT(svg, HasSubstr(planned));
  // 16 copies today, 20 as planned; the bars of each add up to four mean device loads.
  const auto count = [&](const std::string& what) {
    std::size_t n = 0;
    for (std::size_t at = svg.find(what); at != std::string::npos; at = svg.find(what, at + 1)) ++n;
    return n;
  };
  EXPECT_EQ(count("<title>device"), 36U);
  EXPECT_EQ(count("moves here</title>"), plan["moves"].get<std::size_t>());
  double sum = 0;
  for (std::size_t at = svg.find("<title>device"); at != std::string::npos;
       at = svg.find("<title>device", at + 1))
    sum += std::stod(svg.substr(svg.find(": ", at) + 2));
  EXPECT_NEAR(sum, 8, 0.05);
  EXPECT_EQ(run_tool(dir, "placement - --devices 4 --svg none/p.svg", text).code, 1);
}

// ---- simulate --like ----

// Routers of known options, without and under control, are fitted back from their logs: the spread within a quarter, the
// preference within a third; the coherence and the clusters lie in their stated ranges.
TEST(SimulateLike, FindsTheOptionsOfASimulatedTrace) {
  struct Case {
    double spread, coherence;
    bool controlled;
  };
  for (const Case& c : {Case{0.6, 0.3, false}, Case{2, 0.8, true}}) {
    const TempDir dir;
    const std::string config =
        dir.write("c.yaml", std::string("version: 1\n"
                                        "model: {layers: 8, experts: 16, top_k: 2, tokens_per_step: 1024}\n"
                                        "collect: {gap: true, sequences: true}\n") +
                                (c.controlled ? "expert_bias: {policy: adaptive_bias}\n" : ""));
    const std::string run = "simulate " + config + " --steps 1000 --seed 7 --sequence-length 128 " +
                            "--token-spread " + std::to_string(c.spread) + " --coherence " +
                            std::to_string(c.coherence);
    ASSERT_EQ(run_tool(dir, run + " -o run.jsonl").code, 0);
    const ToolResult fit = run_tool(dir, "simulate " + config + " --like run.jsonl --steps 20 --format json");
    ASSERT_EQ(fit.code, 0) << fit.err;
    const auto found = [&](const std::string& option) {
      const std::size_t at = fit.err.find(' ' + option + ' ', fit.err.find("as if given:"));
      EXPECT_NE(at, std::string::npos) << option;
      return at == std::string::npos ? 0 : std::stod(fit.err.substr(at + option.size() + 2));
    };
    EXPECT_NEAR(std::log(found("--token-spread") / c.spread), 0, 0.25) << fit.err;
    std::size_t at = fit.err.find("coherence: ");
    ASSERT_NE(at, std::string::npos);
    const double low = std::stod(fit.err.substr(at + 11)),
                 high = std::stod(fit.err.substr(fit.err.find(" to ", at) + 4));
    EXPECT_LE(low, c.coherence) << fit.err;
    EXPECT_GE(high, c.coherence) << fit.err;
    if (c.controlled) {
      EXPECT_LT(high - low, 0.9) << "a range that says something\n" << fit.err;
    }
    EXPECT_EQ(found("--clusters"), 48) << fit.err;
    at = fit.err.find("clusters: ");
    EXPECT_LE(std::stoi(fit.err.substr(at + 10)), 48) << fit.err;
    EXPECT_GE(std::stoi(fit.err.substr(fit.err.find(" to ", at) + 4)), 48) << fit.err;
    EXPECT_EQ(found("--sequence-length"), 128);
    EXPECT_EQ(found("--mixture-spread"), 0);
    if (!c.controlled) {
      EXPECT_NEAR(std::log(found("--preference")), 0, 0.3) << fit.err;
    }
    at = fit.err.find("misfit ");
    EXPECT_LT(std::stod(fit.err.substr(at + 7)), 0.15) << fit.err;
  }
}

TEST(SimulateLike, SaysWhatATraceDoesNotTell) {
  const TempDir dir;
  const std::string config = MOECTL_SOURCE_DIR "/policies/sign_bias.yaml";
  const ToolResult fit = run_tool(
      dir, "simulate " + config + " --like - --steps 20 --tokens 512 --format json", steady(1, 9, 30));
  ASSERT_EQ(fit.code, 0) << fit.err;
  EXPECT_THAT(fit.err, HasSubstr("neither gaps nor probabilities"));
  EXPECT_THAT(fit.err, HasSubstr("no sums by sequence"));
  EXPECT_THAT(fit.err, HasSubstr("--experts 16"));
  EXPECT_THAT(fit.err, HasSubstr("clusters: "));
  EXPECT_THAT(fit.err, Not(HasSubstr("--tokens"))) << "given, and so kept";
  EXPECT_EQ(run_tool(dir, "simulate " + config + " --like -", "").code, 1);
}

// ---- simulate --set ----

TEST(SimulateSet, RunsTheGridAndSaysWhatEachRunHad) {
  const TempDir dir;
  const std::string config = MOECTL_SOURCE_DIR "/policies/sign_bias.yaml";
  const std::string common = "simulate " + config + " --steps 60 --format json";
  const ToolResult grid =
      run_tool(dir, common + " --set expert_bias.options.step=1e-4,1e-2 --set model.top_k=2,4 -o run.jsonl");
  ASSERT_EQ(grid.code, 0) << grid.err;
  const json runs = json::parse(grid.out);
  ASSERT_EQ(runs.size(), 4U);
  EXPECT_EQ(runs[0]["set"], json({{"expert_bias.options.step", "1e-4"}, {"model.top_k", "2"}}));
  EXPECT_EQ(runs[3]["set"], json({{"expert_bias.options.step", "1e-2"}, {"model.top_k", "4"}}));
  EXPECT_LT(runs[2]["max_vio"].get<double>(), runs[0]["max_vio"].get<double>());
  // The same as a run on its own, whichever thread took it; and a log for each.
  const json alone =
      json::parse(run_tool(dir, common + " --set expert_bias.options.step=1e-2 --set model.top_k=4").out);
  EXPECT_EQ(alone[0]["max_vio"], runs[3]["max_vio"]);
  EXPECT_EQ(run_tool(dir, "compare run-*.jsonl --format json").code, 0);
  EXPECT_TRUE(std::filesystem::exists(dir.path("run-expert_bias.options.step=1e-4-model.top_k=2.jsonl")));
  const ToolResult table =
      run_tool(dir, "simulate " + config + " --steps 60 --set expert_bias.options.step=1e-4,1e-2");
  EXPECT_THAT(table.lines().at(0), HasSubstr("expert_bias.options.step"));
  // A list is one value.
  EXPECT_EQ(json::parse(run_tool(dir, common + " --set 'health.bands.max_vio=[0,1]'").out).size(), 1U);
}

TEST(SimulateSet, ATerminalGetsABar) {
  if (std::system("script -qec true /dev/null </dev/null >/dev/null 2>&1") != 0)
    GTEST_SKIP() << "no script(1)";
  const TempDir dir;
  const std::string command =
      "cd '" + dir.path("") +
      "' && script -qec \"'" MOECTL_TOOL "' simulate " MOECTL_SOURCE_DIR
      "/policies/sign_bias.yaml --steps 60 --set expert_bias.options.step=1e-4,1e-2\" "
      "/dev/null </dev/null >shown 2>&1";
  ASSERT_EQ(std::system(command.c_str()), 0);
  const std::string shown = TempDir::read(dir.path("shown"));
  EXPECT_THAT(shown, HasSubstr("\r[####################"));
  EXPECT_THAT(shown, HasSubstr(" %, 0 of 2 runs"));  // which ones are seen is a matter of time
  EXPECT_THAT(shown, HasSubstr("] 100 %, 2 of 2 runs"));
  EXPECT_THAT(shown, HasSubstr("never"));
}

TEST(SimulateSet, WrongKeysAndValuesAreNamed) {
  const TempDir dir;
  const std::string common = "simulate " MOECTL_SOURCE_DIR "/policies/sign_bias.yaml --steps 20 --set ";
  const struct {
    std::string set, message;
  } cases[] = {{"expert_bias.options.stepp=1", "did you mean 'step'"},
               {"expert_bias.options.step=-1", "expert_bias.options.step"},
               {"mode.x=1", "stands in no map"},
               {"step", "must be KEY=VALUE"},
               {"model.top_k=", "must be KEY=VALUE"},
               {"'model.top_k=[1'", "must be a value of YAML"},
               {"model.experts=4,8 --experts 8", "--experts (or --like) already sets it"}};
  for (const auto& c : cases) {
    const ToolResult result = run_tool(dir, common + c.set);
    EXPECT_EQ(result.code, 1) << c.set;
    EXPECT_THAT(result.err, HasSubstr(c.message)) << c.set;
    EXPECT_THAT(result.err, Not(::testing::ContainsRegex(":1:[0-9]+:")))
        << "a place in a text that nobody has seen";
  }
}

TEST(Compare, ATraceWithoutStepsIsRefused) {
  const TempDir dir;
  for (const std::string& text : {std::string(), line(0, 0, 4, 1, {2, 2}, "validation")}) {
    const ToolResult compared = run_tool(dir, "compare -", text);
    EXPECT_EQ(compared.code, 1);
    EXPECT_THAT(compared.err, HasSubstr("no record"));
  }
}

}  // namespace
}  // namespace moectl
