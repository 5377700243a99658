// Each format from a small file in its exact shape to a trace, by the tool: counts by hand.
#include <gmock/gmock.h>
#include <zlib.h>

#include <cstdlib>
#include <fstream>

#include "import/imported.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(Import, SglangCsvOfRanksIsSummedOrKeptApart) {
  const std::string files = kFiles + "expert_distribution_rank*.csv";
  const auto sum = imported("sglang " + files + " --top-k 2");
  ASSERT_EQ(sum.size(), 2U);
  EXPECT_EQ(at(sum, 0, 3)["counts"], json({18, 14, 2, 6}));
  EXPECT_EQ(at(sum, 0, 3)["tokens"], 20);
  EXPECT_EQ(at(sum, 0, 4)["counts"], json({9, 2, 20, 9}));
  const auto apart = imported("sglang " + files + " --top-k 2 --by rank");
  ASSERT_EQ(apart.size(), 4U);
  EXPECT_EQ(at(apart, 0, 3, "rank0")["counts"], json({10, 6, 2, 2}));
  EXPECT_EQ(at(apart, 0, 3, "rank1")["counts"], json({8, 8, 0, 4}));
  EXPECT_THAT(refused("sglang " + files), HasSubstr("--top-k"));
}

TEST(Import, RanksThatHoldTheSameCountsAreTakenOnce) {
  const TempDir dir;
  const std::string counts = "layer_id,expert_id,count\n0,0,3000\n0,1,1000\n0,2,2010\n0,3,990\n0,4,970\n";
  dir.write("expert_distribution_rank0_timestamp1.csv", counts);
  dir.write("expert_distribution_rank1_timestamp2.csv", counts);
  const ToolResult result = run_tool(dir, "import sglang expert_distribution_rank*.csv --top-k 1 -o -");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(records(result.out)[0]["counts"], json({3000, 1000, 2010, 990, 970}));
  EXPECT_THAT(result.err, HasSubstr("taken once"));
}

// Dumps of one rank follow each other by their time stamps, whatever the order of the arguments.
TEST(Import, SglangDumpsAreStepsInTheOrderOfTheirTimeStamps) {
  const TempDir dir;
  dir.write("expert_distribution_rank0_timestamp100.5.csv", "layer_id,expert_id,count\n0,0,3\n0,1,1\n");
  dir.write("expert_distribution_rank0_timestamp99.5.csv", "layer_id,expert_id,count\n0,0,2\n0,1,2\n");
  const ToolResult result = run_tool(dir, "import sglang expert_distribution_rank*.csv --top-k 1 -o -");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(at(records(result.out), 0, 0)["counts"], json({2, 2}));
  EXPECT_EQ(at(records(result.out), 1, 0)["counts"], json({3, 1}));
}

TEST(Import, SglangLogicalCount) {
  std::string notes;
  const auto all = imported("sglang " + kFiles + "logical_count.npy --top-k 2", &notes);
  ASSERT_EQ(all.size(), 4U);
  EXPECT_EQ(at(all, 0, 1)["counts"], json({5, 3, 1, 1}));
  EXPECT_EQ(at(all, 1, 2)["counts"], json({2, 2, 2, 4}));
  EXPECT_EQ(at(all, 1, 2)["tokens"], 5);
  EXPECT_THAT(notes, HasSubstr("dense"));
}

// Four tokens, {0, 1}, {1, 0}, {2, 3}, {0, 2}, twenty times: lift of (2, 3) 20 · 80/(40 · 20), of (0, 1) 40 · 80/(60 · 40).
TEST(Import, PairsOfExpertsThatTheSameTokensChoose) {
  const TempDir dir;
  std::string tokens, iterations;
  for (int i = 0; i < 20; ++i) {
    tokens += i ? "," : "";
    tokens += "[[0,1]],[[1,0]],[[2,3]],[[0,2]]";
    iterations +=
        R"({"iter":)" + std::to_string(i) + R"(,"layer":0,"top_indices":[[0,1],[1,0],[2,3],[0,2]]})" + "\n";
  }
  dir.write("r.jsonl", R"({"routed_experts":[)" + tokens + "]}\n");
  ASSERT_EQ(run_tool(dir, "import vllm r.jsonl --pairs -o v.jsonl").code, 0);
  EXPECT_THAT(TempDir::read(dir.path("v.jsonl")), HasSubstr(R"("pairs":[[1,40,20],[],[3,20],[]])"));
  const ToolResult loads = run_tool(dir, "metrics v.jsonl --loads --extremes 2 --format json");
  ASSERT_EQ(loads.code, 0) << loads.err;
  const json together = json::parse(loads.lines()[0])["together"];
  EXPECT_EQ(together, json::parse("[[2,3,20,2.0],[0,1,40,1.3333333333333333]]"));
  EXPECT_THAT(run_tool(dir, "metrics v.jsonl --loads --extremes 2 --format table").out,
              HasSubstr("e2+e3 x2 e0+e1 x1.33"));
  // The same tokens as a router trace of twenty steps: they add up.
  dir.write("m.jsonl", iterations);
  ASSERT_EQ(run_tool(dir, "import megatron m.jsonl --pairs -o m2.jsonl").code, 0);
  EXPECT_EQ(json::parse(
                run_tool(dir, "metrics m2.jsonl --loads --extremes 2 --format json").lines()[0])["together"],
            together);
  // Ranks that were kept apart are added up again.
  std::string others = iterations;
  for (std::size_t at = 0; (at = others.find("[1,0]", at)) != std::string::npos;)
    others.replace(at, 5, "[2,3]");
  dir.write("router_trace_rank0.jsonl", iterations);
  dir.write("router_trace_rank1.jsonl", others);
  std::vector<json> of_ranks;
  for (const char* by : {"", " --by rank"}) {
    ASSERT_EQ(
        run_tool(dir,
                 std::string(
                     "import megatron router_trace_rank0.jsonl router_trace_rank1.jsonl --pairs -o r.jsonl") +
                     by)
            .code,
        0);
    of_ranks.push_back(
        json::parse(run_tool(dir, "metrics r.jsonl --loads --format json").lines()[0])["together"]);
  }
  EXPECT_EQ(of_ranks[0], of_ranks[1]);
  EXPECT_EQ(of_ranks[0][0], json::parse("[0,1,60,1.6]"));  // of 160 tokens: c_0 = 100, c_1 = 60
  // A dump that does not say which experts a token chose has none.
  dir.write("c.csv", "layer_id,expert_id,count\n0,0,3\n0,1,1\n");
  const ToolResult none = run_tool(dir, "import sglang c.csv --top-k 1 --pairs -o t.jsonl");
  EXPECT_EQ(none.code, 0);
  EXPECT_THAT(none.err, HasSubstr("do not say which experts a token chose together"));
  EXPECT_THAT(TempDir::read(dir.path("t.jsonl")), ::testing::Not(HasSubstr("pairs")));
}

TEST(Import, VllmRoutedExpertsAsArrayArchiveAndJsonLines) {
  std::string notes;
  const auto one = imported("vllm " + kFiles + "routed_experts.npy", &notes);
  ASSERT_EQ(one.size(), 2U) << "layer 0 is dense";
  EXPECT_THAT(notes, HasSubstr("dense"));
  EXPECT_THAT(notes, HasSubstr("6 experts"));
  const json& record = at(one, 0, 1);
  EXPECT_EQ(record["counts"], json({1, 2, 1, 4, 0, 0}));
  EXPECT_EQ(record["tokens"], 4);
  EXPECT_EQ(record["top_k"], 2);
  EXPECT_EQ(record["sequences"], 1);
  EXPECT_EQ(record["sequence_len_sq"], 64);
  EXPECT_EQ(record["sequence_sq"], json({1, 4, 1, 16, 0, 0}));
  EXPECT_EQ(record["sequence_cross"], json({8, 16, 8, 32, 0, 0}));
  EXPECT_EQ(at(one, 0, 2)["counts"], json({1, 1, 3, 0, 1, 2}));
  const auto archive = imported("vllm " + kFiles + "routed_experts.npz");
  EXPECT_EQ(archive, imported("vllm " + kFiles + "routed_experts.jsonl"));
  EXPECT_EQ(at(archive, 0, 1)["counts"], json({2, 3, 1, 4, 1, 1}));
  EXPECT_EQ(at(archive, 0, 1)["sequence_len_sq"], 80);
  // Requests make steps of at least so many tokens.
  EXPECT_EQ(imported("vllm " + kFiles + "routed_experts.npz --tokens-per-step 3").size(), 4U);
  EXPECT_EQ(imported("vllm " + kFiles + "routed_experts.npy --experts 64")[0]["counts"].size(), 64U);
  EXPECT_THAT(refused("vllm " + kFiles + "routed_experts.npy --experts 5"), HasSubstr("expert 5"));
}

// vLLM 0.21: the experts of the prompt stand beside the choices, those of what was generated in each choice.
TEST(Import, VllmResponsesWithThePromptApart) {
  const TempDir dir;
  const std::string response =
      R"({"prompt_routed_experts":[[[0,1]],[[0,2]]],"choices":[{"routed_experts":[[[3,1]]]},{"routed_experts":[[[2,3]]]}]})"
      "\n"
      R"({"prompt_routed_experts":[[[0,1]]],"choices":[{"routed_experts":null}]})"
      "\n";
  const ToolResult result = run_tool(dir, "import vllm - -o -", response);
  ASSERT_EQ(result.code, 0) << result.err;
  const json record = records(result.out).at(0);
  EXPECT_EQ(record["tokens"], 5);
  EXPECT_EQ(record["counts"], json({3, 3, 2, 2}))
      << "the prompt is routed once, whatever the number of choices";
  // Prompt and first choice are one sequence of 3 tokens; the other choice and the other prompt have one token each.
  EXPECT_EQ(record["sequences"], 3);
  EXPECT_EQ(record["sequence_len_sq"], 36 + 4 + 4);
  EXPECT_THAT(
      refused("vllm -", R"({"prompt_routed_experts":[[[0,1]]],"choices":[{"routed_experts":[[[0]]]}]})"),
      HasSubstr("expected [tokens, 1, 2]"));
  EXPECT_THAT(refused("vllm -", R"({"prompt_routed_experts":null,"choices":[{"routed_experts":null}]})"),
              HasSubstr("--enable-return-routed-experts"));
}

// What torch.save writes: a zip archive with a pickle, or a bare pickle. The message has the command that reads it.
TEST(Import, FilesOfTorchSaveAreNamedWithTheirConverter) {
  const TempDir dir;
  std::string zip("PK\x03\x04\x00\x00\x08\x08", 8);
  zip += std::string(22, '\0') + "expert_distribution/data.pkl" + std::string(100, '\0');
  for (const std::string& bytes : {zip, std::string("\x80\x02\x8a\x0al\xfc\x9c", 7)}) {
    for (const char* format : {"sglang", "vllm", "hf", "csv"}) {
      const std::string error = refused(format + (" " + dir.write("dump.pt", bytes)) + " --top-k 2");
      EXPECT_THAT(error, HasSubstr("python3 -m moectl.convert dump.pt --top-k K -o TRACE")) << format;
    }
  }
}

TEST(Import, MicroBatchesApart) {
  const auto apart = imported("megatron " + kFiles + "router_trace_rank*.jsonl --by micro-batch");
  const json &first = at(apart, 0, 1, "rank0/mb0"), &second = at(apart, 0, 1, "rank0/mb1");
  const auto ranks = imported("megatron " + kFiles + "router_trace_rank*.jsonl --by rank");
  const json& both = at(ranks, 0, 1, "rank0");
  EXPECT_EQ(first["tokens"].get<int>() + second["tokens"].get<int>(), both["tokens"].get<int>());
  for (std::size_t i = 0; i < 4; ++i)
    EXPECT_EQ(first["counts"][i].get<int>() + second["counts"][i].get<int>(), both["counts"][i].get<int>());
  EXPECT_EQ(at(apart, 0, 0, "rank0/mb0/mtp0")["tokens"], 2);
  // The counts of ActivationLogger: a row of tpe for each micro-batch.
  const auto counts =
      imported("megatron " + kFiles + "tokens_per_expert_rank0.jsonl --top-k 2 --by micro-batch");
  EXPECT_EQ(at(counts, 100, 3, "rank0/mb0")["tokens"].get<int>() +
                at(counts, 100, 3, "rank0/mb1")["tokens"].get<int>(),
            24);
  // Forward passes of llama.cpp, without ranks.
  const auto passes = imported("llama.cpp " + kFiles + "moe_trace.csv --top-k 2 --by micro-batch");
  EXPECT_EQ(at(passes, 0, 0, "mb0")["counts"], json({0, 1, 1, 2, 0, 0}));
  EXPECT_EQ(at(passes, 0, 0, "mb1")["counts"], json({1, 0, 0, 1, 0, 0}));
  EXPECT_EQ(imported("hf " + kFiles + "router_logits.npy --top-k 2 --by micro-batch")[0]["tag"], "mb0");
  EXPECT_THAT(refused("sglang " + kFiles + "logical_count.npy --top-k 2 --by micro-batch"),
              HasSubstr("does not tell micro-batches; those of megatron, hf, llama.cpp do"));
}

// vLLM #47785: -1 is a slot that was not routed.
TEST(Import, SlotsOfMinusOneAreNotRouted) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "import vllm - -o -",
                                     R"({"routed_experts":[[[0,1]],[[2,-1]],[[-1,-1]]]})"
                                     "\n");
  ASSERT_EQ(result.code, 0) << result.err;
  const json record = records(result.out)[0];
  EXPECT_EQ(record["counts"], json({1, 1, 1}));
  EXPECT_EQ(record["tokens"], 2);
}

TEST(Import, MegatronRouterTraces) {
  const auto all =
      imported("megatron " + kFiles + "router_trace_rank0.jsonl " + kFiles + "router_trace_rank1.jsonl");
  EXPECT_EQ(at(all, 0, 1)["counts"], json({4, 4, 3, 1})) << "two micro-batches and two ranks";
  EXPECT_EQ(at(all, 0, 1)["tokens"], 6);
  EXPECT_EQ(at(all, 1, 2)["counts"], json({2, 3, 2, 1}));
  EXPECT_EQ(at(all, 0, 0, "mtp0")["counts"], json({2, 1, 0, 1}))
      << "layers of prediction heads count from 0 again";
  const auto apart = imported("megatron " + kFiles + "router_trace_rank*.jsonl --by rank");
  EXPECT_EQ(at(apart, 0, 1, "rank1")["counts"], json({1, 1, 2, 0}));
  EXPECT_EQ(at(apart, 0, 0, "rank0/mtp0")["tokens"], 2);
}

TEST(Import, MegatronTokensPerExpert) {
  const auto all = imported("megatron " + kFiles + "tokens_per_expert_rank0.jsonl --top-k 2");
  EXPECT_EQ(at(all, 100, 3)["counts"], json({21, 13, 9, 5}));
  EXPECT_EQ(at(all, 100, 3)["tokens"], 24);
  EXPECT_EQ(at(all, 100, 1, "mtp0")["counts"], json({6, 6, 6, 6}));
}

TEST(Import, HuggingFaceRouterLogits) {
  const auto all =
      imported("hf " + kFiles + "router_logits.npy --top-k 2 --mask " + kFiles + "attention_mask.npy");
  ASSERT_EQ(all.size(), 2U);
  const json& record = at(all, 0, 0);
  EXPECT_EQ(record["counts"], json({3, 1, 3, 3}));
  EXPECT_EQ(record["tokens"], 5) << "one token is padding";
  EXPECT_EQ(record["sequences"], 2);
  EXPECT_EQ(record["sequence_len_sq"], 52);
  EXPECT_EQ(record["sequence_sq"], json({9, 1, 5, 5}));
  double sum = 0;
  for (const double p : record["prob_sum"]) sum += p;
  EXPECT_NEAR(sum, 5, 1e-9);
  // exp(0.142), exp(1.875) … of the first token and so on, by hand for expert 1.
  const double rows[5][4] = {{0.142, 1.875, -1.397, 1.489},
                             {-0.389, -0.392, 2.85, 0.236},
                             {0.882, -1.461, -0.55, -0.657},
                             {-1.998, -2.263, -2.44, -0.358},
                             {-0.259, -0.481, 0.104, -2.003}};
  double of_one = 0;
  for (const auto& row : rows)
    of_one += std::exp(row[1]) / (std::exp(row[0]) + std::exp(row[1]) + std::exp(row[2]) + std::exp(row[3]));
  EXPECT_NEAR(record["prob_sum"][1].get<double>(), of_one, 1e-6);
  const auto unmasked = imported("hf " + kFiles + "router_logits.npy --top-k 2 --scores sigmoid");
  EXPECT_EQ(at(unmasked, 0, 0)["tokens"], 6);
  EXPECT_FALSE(at(unmasked, 0, 0).contains("sequences"));
  EXPECT_THAT(refused("hf " + kFiles + "router_logits.npy --top-k 2 --sequence-length 4"),
              HasSubstr("must divide"));
  EXPECT_THAT(refused("hf " + kFiles + "router_logits.npy --top-k 5"), HasSubstr("--top-k"));
  EXPECT_THAT(refused("hf " + kFiles + "router_logits.npy --top-k 2 --mask " + kFiles + "router_logits.npy"),
              HasSubstr("--mask"));
}

TEST(Import, LlamaCppRowsOfChoices) {
  const auto all = imported("llama.cpp " + kFiles + "moe_trace.csv --top-k 2");
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(at(all, 0, 0)["counts"], json({1, 1, 1, 3, 0, 0}));
  EXPECT_EQ(at(all, 0, 1)["counts"], json({1, 0, 1, 0, 3, 1}));
  EXPECT_EQ(at(all, 0, 1)["tokens"], 3);
  const auto passes = imported("llama.cpp " + kFiles + "moe_trace.csv --top-k 2 --tokens-per-step 1");
  EXPECT_EQ(at(passes, 0, 0)["counts"], json({0, 1, 1, 2, 0, 0}));
  EXPECT_EQ(at(passes, 1, 1)["counts"], json({0, 0, 1, 0, 1, 0}));
  // With a wrong k the tokens would be counted wrong: rows of a layer come in groups of k.
  EXPECT_THAT(refused("llama.cpp " + kFiles + "moe_trace.csv --top-k 3"),
              HasSubstr("expected a multiple of --top-k 3"));
}

// ltp-megatron-lm #36 and exports of it: numbers as floats, a key for each layer and expert.
TEST(UserReports, Item29_WandbExportsAsFloatsWithAKeyForEachExpert) {
  std::string notes;
  const auto all = imported("wandb " + kFiles + "wandb_history.csv --top-k 2", &notes);
  ASSERT_EQ(all.size(), 4U) << "rows of other metrics are skipped";
  EXPECT_EQ(at(all, 10, 0)["counts"], json({16384, 8192, 4096, 4096}));
  EXPECT_EQ(at(all, 10, 0)["tokens"], 16384);
  EXPECT_EQ(at(all, 20, 1)["counts"], json({8190, 8194, 8192, 8192}));
  EXPECT_THAT(notes, HasSubstr("read as counts"));
  // To a report in two commands.
  const TempDir dir;
  ASSERT_EQ(run_tool(dir, "import wandb " + kFiles + "wandb_history.csv --top-k 2 -o t.jsonl.gz").code, 0);
  const ToolResult report = run_tool(dir, "report t.jsonl.gz -o report.html");
  EXPECT_EQ(report.code, 0) << report.err;
  EXPECT_NE(TempDir::read(dir.path("report.html")).find("\"steps\":2.0"), std::string::npos);
}

TEST(Import, WandbPanelsOfSharesNeedTheTokens) {
  EXPECT_THAT(refused("wandb " + kFiles + "wandb_panel.csv --top-k 1"), HasSubstr("--tokens"));
  std::string notes;
  const auto all = imported("wandb " + kFiles + "wandb_panel.csv --top-k 1 --tokens 100", &notes);
  EXPECT_EQ(at(all, 0, 2)["counts"], json({40, 30, 20, 10}));
  EXPECT_EQ(at(all, 1, 2)["tokens"], 100);
  EXPECT_THAT(notes, HasSubstr("shares of the load"));
}

// Rounding keeps the sum: the largest remainders get what is left.
TEST(Import, SharesBecomeCountsOfTheWholeSum) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "import csv - --top-k 2 --tokens 5 -o -", "33.3;33.3;33.4\n");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(records(result.out)[0]["counts"], json({3, 3, 4}));
  const ToolResult ratio = run_tool(dir, "import csv - --top-k 1 --tokens 8 -o -", "2.0,1.5,0.5,0.0\n");
  EXPECT_EQ(records(ratio.out)[0]["counts"], json({4, 3, 1, 0}));
  EXPECT_THAT(ratio.err, HasSubstr("multiples of the mean"));
}

TEST(Import, TwoMetricsAreNotMixed) {
  const std::string header = "Step,a/layer0_expert0,a/layer0_expert1,b/layer0_expert0,b/layer0_expert1\n";
  EXPECT_THAT(refused("wandb - --top-k 1", header + "0,1,2,3,4\n"), HasSubstr("--metric"));
  const TempDir dir;
  const ToolResult result =
      run_tool(dir, "import wandb - --top-k 1 --metric b/ -o -", header + "0,1,2,3,4\n");
  EXPECT_EQ(records(result.out)[0]["counts"], json({3, 4}));
}

// Megatron #5573: layers with different numbers of experts. A missing column is no dead expert.
TEST(Import, LayersMayHaveDifferentNumbersOfExperts) {
  const TempDir dir;
  const ToolResult result = run_tool(
      dir, "import wandb - --top-k 1 -o t.jsonl",
      "Step,layer0_expert0,layer0_expert1,layer1_expert0,layer1_expert1,layer1_expert2\n0,3,5,4,4,0\n");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("different numbers"));
  const auto all = records(TempDir::read(dir.path("t.jsonl")));
  EXPECT_EQ(at(all, 0, 0)["counts"], json({3, 5}));
  EXPECT_EQ(at(all, 0, 1)["counts"], json({4, 4, 0}));
  EXPECT_EQ(run_tool(dir, "metrics t.jsonl --format screen").code, 0);
}

TEST(Import, TensorBoardEventFiles) {
  const auto all = imported("tensorboard " + kFiles + "events.out.tfevents.1700000000.host.1.0 --top-k 2");
  ASSERT_EQ(all.size(), 2U);
  EXPECT_EQ(at(all, 0, 0)["counts"], json({30, 20, 8, 6}));
  EXPECT_EQ(at(all, 5, 0)["counts"], json({18, 18, 16, 12}));
  const TempDir dir;
  std::string damaged = TempDir::read(kFiles + "events.out.tfevents.1700000000.host.1.0");
  damaged[100] = static_cast<char>(damaged[100] ^ 1);
  EXPECT_THAT(refused("tensorboard " + dir.write("e", damaged) + " --top-k 2"), HasSubstr("event"));
}

TEST(Import, PlainMatrix) {
  const auto all = imported("csv " + kFiles + "counts.csv --top-k 2");
  ASSERT_EQ(all.size(), 4U);
  EXPECT_EQ(at(all, 0, 1)["counts"], json({2, 2, 3, 3}));
  EXPECT_EQ(at(all, 4, 1)["counts"], json({2, 2, 2, 4}));
  const TempDir dir;
  const ToolResult bare = run_tool(dir, "import csv - --top-k 1 -o -", "3,1\n2,2\n");
  ASSERT_EQ(bare.code, 0) << bare.err;
  EXPECT_EQ(at(records(bare.out), 1, 0)["counts"], json({2, 2}));
}

TEST(Import, PipesAndGzipGiveTheSameTrace) {
  const TempDir dir;
  const std::string text = TempDir::read(kFiles + "routed_experts.npy");
  const ToolResult file = run_tool(dir, "import vllm " + kFiles + "routed_experts.npy -o -");
  EXPECT_EQ(run_tool(dir, "import vllm - -o -", text).out, file.out) << "kept, to find the number of experts";
  EXPECT_EQ(run_tool(dir, "import vllm - --experts 6 -o -", text).out, file.out) << "the same with --experts";
  gzFile zip = gzopen(dir.path("x.gz").c_str(), "wb");
  gzwrite(zip, text.data(), static_cast<unsigned>(text.size()));
  gzclose(zip);
  EXPECT_EQ(run_tool(dir, "import vllm x.gz -o -").out, file.out);
  EXPECT_EQ(run_tool(dir, "import vllm - -o -", TempDir::read(dir.path("x.gz"))).out, file.out);
}

TEST(Import, OtherFormatsAreNamed) {
  const std::string csv = kFiles + "expert_distribution_rank0_timestamp1744347750.3721356.csv";
  const struct {
    std::string arguments, nearest, expected;
  } cases[] = {
      {"vllm " + kFiles + "router_logits.npy", "hf", "[tokens, layers, k]"},
      {"hf " + kFiles + "routed_experts.npy --top-k 2", "vllm", "router logits"},
      {"llama.cpp " + csv + " --top-k 2", "sglang", "layer,expert"},
      {"csv " + csv + " --top-k 2", "sglang", ""},
      {"sglang " + kFiles + "moe_trace.csv --top-k 2", "llama.cpp", "layer_id,expert_id,count"},
      {"wandb " + kFiles + "router_trace_rank0.jsonl --top-k 2", "megatron", "column for each"},
      {"megatron " + kFiles + "routed_experts.jsonl", "vllm", "top_indices"},
      {"vllm " + kFiles + "router_trace_rank0.jsonl", "megatron", "routed_experts"},
      {"tensorboard " + kFiles + "wandb_history.csv --top-k 2", "wandb", "event file"},
      {"csv " + kFiles + "wandb_history.csv --top-k 2", "wandb", ""},
      {"sglang " + kFiles + "wandb_panel.csv --top-k 2", "wandb", "layer_id"},
      {"wandb " + kFiles + "events.out.tfevents.1700000000.host.1.0 --top-k 2", "tensorboard", "column"}};
  for (const auto& c : cases) {
    const std::string error = refused(c.arguments);
    EXPECT_THAT(error, HasSubstr("nearest format: " + c.nearest)) << c.arguments;
    EXPECT_THAT(error, HasSubstr(c.expected)) << c.arguments;
  }
  EXPECT_THAT(refused("megatron " MOECTL_SOURCE_DIR "/docs/example_trace.jsonl"), HasSubstr("already"));
  // Input that only resembles a format: other names of columns and keys.
  const TempDir dir;
  const struct {
    std::string text, format, nearest;
  } similar[] = {{"step,layer,e0,e1\n0,0,5,3\n", "llama.cpp", "csv"},
                 {"a;b;c\n1;2;3\n", "sglang", "csv"},
                 {"layer,expert,count\n0,1,12\n", "llama.cpp", "sglang"},
                 {"{\"layer\":0,\"topk_indices\":[[0,1]]}\n", "vllm", "megatron"},
                 {"{\"experts\":[[0,1]]}\n", "megatron", "vllm"}};
  for (const auto& c : similar) {
    const ToolResult result = run_tool(dir, "import " + c.format + " - --top-k 1 -o -", c.text);
    EXPECT_EQ(result.code, 1) << c.text;
    EXPECT_THAT(result.err, HasSubstr("expected")) << c.text;
    EXPECT_THAT(result.err, HasSubstr("nearest format: " + c.nearest)) << c.text;
  }
  EXPECT_THAT(run_tool(dir, "import sglang - --top-k 1 -o -", "layer,expert,count\n0,1,12\n").err,
              ::testing::AllOf(HasSubstr("layer_id,expert_id,count"), ::testing::Not(HasSubstr("nearest"))));
}

// What a header claims is checked before memory is taken.
TEST(Import, ClaimsOfDamagedFilesTakeNoMemory) {
  const TempDir dir;
  const auto file = [&](const std::string& bytes) { return dir.write("x.npy", bytes); };
  EXPECT_THAT(
      refused("vllm " +
              file(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (9000000000, 9000000000, 2), }"))),
      HasSubstr("shape"));
  EXPECT_THAT(
      refused("vllm " + file(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 3, 100000000), }"))),
      HasSubstr("[tokens, layers, k]"));
  EXPECT_THAT(
      refused("vllm " + file(npy("{'descr': '|u1', 'fortran_order': False, 'shape': (4, 3, 2), }", "abc"))),
      HasSubstr("ends too early"));
  EXPECT_THAT(refused("vllm " + file(npy("{'descr': '|O', 'fortran_order': False, 'shape': (4, 3, 2), }"))),
              HasSubstr("whole numbers or floats"));
  EXPECT_THAT(refused("vllm " + file(npy("{'descr': '<i4', 'fortran_order': True, 'shape': (4, 3, 2), }"))),
              HasSubstr("ascontiguousarray"));
  EXPECT_THAT(
      refused("hf " + file(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 6, 900000), }")) +
              " --top-k 2"),
      HasSubstr("router logits"));
  std::string long_header = std::string("\x93NUMPY\x02\x00", 8) + std::string("\xff\xff\xff\x7f", 4);
  EXPECT_THAT(refused("vllm " + file(long_header)), HasSubstr("header"));
  EXPECT_THAT(refused("llama.cpp - --top-k 1", "layer,expert\n0,99999999\n"), HasSubstr("65535"));
  EXPECT_THAT(refused("llama.cpp - --top-k 1", "layer,expert\n99999,1\n"), HasSubstr("65535"));
  EXPECT_THAT(refused("csv - --top-k 1", std::string(std::size_t{40} << 20, '1')), HasSubstr("longer than"));
  EXPECT_THAT(refused("csv - --top-k 1", "1,2\n3\n"), HasSubstr(":2: 1 columns"));
  EXPECT_THAT(refused("csv - --top-k 1", "1.5,2\n"), HasSubstr("--values"));
  EXPECT_THAT(refused("csv - --top-k 1", "-1,2\n"), HasSubstr("at least 0"));
  EXPECT_THAT(refused("sglang - --top-k 1", "layer_id,expert_id,count\n0,0,-3\n"), HasSubstr(":2: count"));
  EXPECT_THAT(refused("vllm missing.npy"), HasSubstr("missing.npy: cannot be opened"));
  std::string cut = TempDir::read(kFiles + "routed_experts.npz").substr(0, 60);
  EXPECT_THAT(refused("vllm " + dir.write("c.npz", cut)), HasSubstr("ends too early"));
}

// Memory does not grow with the length: 104 MB of text in 100 MB of address space, the program included.
TEST(Import, LongInputsAreStreamed) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "sanitizers take address space of their own";
#endif
  const TempDir dir;
  std::string row, text;
  for (int i = 0; i < 32; ++i) row += i ? ",7.0000000000" : "9.0000000000";
  for (int i = 0; i < 1000; ++i) text += row + '\n';
  {
    std::ofstream file(dir.path("m.csv"), std::ios::binary);
    for (int i = 0; i < 250; ++i) file << text;
  }
  const std::string command = "cd '" + dir.path("") +
                              "' && bash -c 'ulimit -v 100000; exec " MOECTL_TOOL
                              " import csv m.csv --top-k 1 -o m.jsonl' 2>err";
  EXPECT_EQ(std::system(command.c_str()), 0) << TempDir::read(dir.path("err"));
}

std::string npy(const std::string& type, const std::string& shape, const std::string& data = "") {
  std::string header = "{'descr': '" + type + "', 'fortran_order': False, 'shape': " + shape + ", }";
  header.resize(118, ' ');
  return std::string("\x93NUMPY\1\0\x76\0", 10) + header + data;
}

// 128 bytes that promise 2^47 steps without a value.
TEST(HostileInput, AnArrayWithoutValuesHasNoEndOfSteps) {
  const TempDir dir;
  const auto wrong = [&](const std::string& format, const std::string& array) {
    dir.write("a.npy", array);
    const ToolResult result = run_tool(dir, "import " + format + " a.npy --top-k 1 --experts 2 -o o.jsonl");
    EXPECT_EQ(result.code, 1);
    EXPECT_FALSE(std::filesystem::exists(dir.path("o.jsonl")));
    return result.err;
  };
  for (const std::string format : {"hf", "vllm", "sglang"}) {
    EXPECT_THAT(
        wrong(format, npy("<f4", "(140737488355328, 1, 0, 2)")),
        HasSubstr(
            "a.npy: .npy shape: [140737488355328, 1, 0, 2] of float32: holds no values: extents beside a "
            "0 must make at most 4194304"));
  }
  EXPECT_THAT(wrong("hf", npy("<f4", "(1000000, 1, 0, 2)")), HasSubstr("expected router logits"));
  EXPECT_THAT(wrong("hf", npy("<f4", "(0, 1, 4, 2)")), HasSubstr("expected router logits"));
}

// A name of 24 bytes asks for 65536 experts.
TEST(HostileInput, ScalarsOfMoreLayersTimesExpertsThanThereMayBeAreRefused) {
  const TempDir dir;
  std::string header = "step", row = "0";
  for (int layer = 0; layer < 70; ++layer) {
    header += ",t_layer" + std::to_string(layer) + "_expert65535";
    row += ",1";
  }
  dir.write("w.csv", header + "\n" + row + "\n");
  const ToolResult result = run_tool(dir, "import wandb w.csv --top-k 1 -o o.jsonl");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("w.csv: 4259840 layers x experts in one step: must be at most 4194304"));
}

// Each comma of a line that shrinks to nothing is a field that takes memory.
TEST(HostileInput, ColumnsHaveALimit) {
  const TempDir dir;
  const std::string commas(std::size_t{1} << 20, ',');
  dir.write("first.csv", "step" + commas + "\n");
  dir.write("later.csv", "layer_id,expert_id,count\n0,0,1\n" + commas + "\n");
  EXPECT_THAT(run_tool(dir, "import wandb first.csv --top-k 1 -o o.jsonl").err,
              HasSubstr("first.csv:1: must have at most 1048576 columns"));
  EXPECT_THAT(run_tool(dir, "import csv first.csv --top-k 1 -o o.jsonl").err,
              HasSubstr("first.csv:1: must have at most 1048576 columns"));
  EXPECT_THAT(run_tool(dir, "import sglang later.csv --top-k 1 -o o.jsonl").err,
              HasSubstr("later.csv:3: must have at most 1048576 columns"));
}

// The layers of one request are as many as a step may have, and those of the next are others.
TEST(HostileInput, RequestsOfAStepHaveTheLimitOfTheStep) {
  const TempDir dir;
  std::string lines;
  for (int request = 0; request < 2; ++request) {
    lines += R"({"routed_experts":[[)";
    for (int layer = 0; layer < 80; ++layer) {
      lines += layer ? "," : "";
      lines += layer / 40 == request ? "[65535]" : "[-1]";
    }
    lines += "]]}\n";
  }
  dir.write("r.jsonl", lines);
  EXPECT_THAT(
      run_tool(dir, "import vllm r.jsonl --tokens-per-step 2 -o o.jsonl").err,
      HasSubstr("r.jsonl:2: routed_experts: 5242880 layers x experts in one step: must be at most 4194304"));
}

// A token of 1024 experts makes half a million pairs.
TEST(HostileInput, PairsOfAStepHaveALimit) {
  std::string data;
  for (int token = 0; token < 40; ++token) {
    for (int i = 0; i < 1024; ++i) {
      const auto expert = static_cast<std::uint16_t>(token * 400 + i);
      data.append(reinterpret_cast<const char*>(&expert), 2);
    }
  }
  const TempDir dir;
  dir.write("p.npy", npy("<u2", "(40, 1, 1024)", data));
  const ToolResult result = run_tool(dir, "import vllm p.npy --pairs -o o.jsonl");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("p.npy: --pairs: "));
  EXPECT_THAT(result.err, HasSubstr(" pairs of experts in one step: must be at most 8388608"));
}

}  // namespace
}  // namespace moectl
