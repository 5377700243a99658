// Dumps that do not tell all: what a part of them seems to say, the whole may not. What was assumed is said, or the dump is
// refused with what to do.
#include <gmock/gmock.h>

#include <bit>
#include <cmath>
#include <random>
#include <sstream>

#include "import/imported.h"
#include "moectl/tensorboard.h"

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string npy_of(const std::string& type, const std::string& shape, const std::string& data) {
  return npy("{'descr': '" + type + "', 'fortran_order': False, 'shape': (" + shape + "), }", data);
}

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

/// Imports in `dir`, and reads the trace with `metrics`.
std::vector<json> imported_in(const TempDir& dir, const std::string& arguments, std::string* notes = nullptr,
                              const std::string& input = "") {
  const ToolResult result = run_tool(dir, "import " + arguments + " -o t.jsonl", input);
  EXPECT_EQ(result.code, 0) << arguments << ": " << result.err;
  if (notes) *notes = result.err;
  const ToolResult read = run_tool(dir, "metrics t.jsonl --format json");
  EXPECT_EQ(read.code, 0) << arguments << ": " << read.err;
  return records(TempDir::read(dir.path("t.jsonl")));
}

std::string refused_in(const TempDir& dir, const std::string& arguments, const std::string& input = "") {
  std::filesystem::remove(dir.path("t.jsonl"));
  const ToolResult result = run_tool(dir, "import " + arguments + " -o t.jsonl", input);
  EXPECT_EQ(result.code, 1) << arguments;
  EXPECT_FALSE(std::filesystem::exists(dir.path("t.jsonl"))) << arguments;
  return result.err;
}

// ---- Dense layers ----

// Llama 4: k = 1, and vLLM fills the rows of dense layers with 0.
TEST(ImportInDoubt, DenseLayersOfTopOneAreLeftOut) {
  const TempDir dir;
  std::string data;
  for (int t = 0; t < 40; ++t) data += {'\0', static_cast<char>(t % 4), '\0', '\3'};
  dir.write("k1.npy", npy_of("|u1", "40, 4, 1", data));
  // All steps are asked: the first one alone would take layer 1 for dense as well.
  for (const char* more : {"", " --experts 4", " --tokens-per-step 1"}) {
    std::string notes;
    const auto all = imported_in(dir, std::string("vllm k1.npy") + more, &notes);
    for (const json& record : all) EXPECT_TRUE(record["layer"] == 1 || record["layer"] == 3) << more;
    EXPECT_THAT(notes, HasSubstr("every token has expert 0 in layers 0 2: taken for dense layers, left out"))
        << more;
    EXPECT_EQ(at(all, 0, 3)["counts"][3], all[0]["tokens"]) << "all tokens on another expert: a collapse";
  }
  dir.write("none.npy", npy_of("|u1", "40, 2, 1", std::string(80, '\0')));
  EXPECT_THAT(refused_in(dir, "vllm none.npy"), HasSubstr("every token has expert 0 in every layer"));
}

// ---- Ranks that hold the same tokens ----

/// A router trace of one layer with 4 experts, k = 1; the seed says which tokens.
std::string routes(unsigned seed, int steps, int tokens, unsigned seed_from_step_10 = 0) {
  std::mt19937_64 random(seed);
  std::string text;
  for (int step = 0; step < steps; ++step) {
    if (step == 10 && seed_from_step_10) random.seed(seed_from_step_10);
    json indices = json::array();
    for (int t = 0; t < tokens; ++t) indices.push_back({random() % 4});
    text += json({{"step", step}, {"layer", 0}, {"top_indices", indices}}).dump() + '\n';
  }
  return text;
}

std::int64_t tokens_of(const std::vector<json>& all) {
  std::int64_t sum = 0;
  for (const json& record : all) sum += record["tokens"].get<std::int64_t>();
  return sum;
}

TEST(ImportInDoubt, RanksThatAgreeBySteppingOnTheSameExpertAreNoCopies) {
  const TempDir dir;
  dir.write("rank0.jsonl", routes(1, 200, 1));
  dir.write("rank1.jsonl", routes(2, 200, 1));
  std::string notes;
  EXPECT_EQ(tokens_of(imported_in(dir, "megatron rank0.jsonl rank1.jsonl", &notes)), 400);
  EXPECT_THAT(notes, AllOf(HasSubstr("added up"), Not(HasSubstr("taken once"))));
  // One token a step is enough to tell copies, too: over the whole trace.
  dir.write("rank1.jsonl", routes(1, 200, 1));
  EXPECT_EQ(tokens_of(imported_in(dir, "megatron rank0.jsonl rank1.jsonl", &notes)), 200);
  EXPECT_THAT(notes, AllOf(HasSubstr("taken once"), Not(HasSubstr("added up"))));
}

TEST(ImportInDoubt, CopiesInGroupsAreEachTakenOnce) {
  const TempDir dir;
  for (int rank = 0; rank < 4; ++rank)
    dir.write("rank" + std::to_string(rank) + ".jsonl", routes(rank < 2 ? 1 : 2, 20, 64));
  std::string notes;
  for (const char* more : {"", " --experts 8"}) {
    const auto all = imported_in(dir, std::string("megatron rank*.jsonl") + more, &notes);
    EXPECT_EQ(tokens_of(all), 20 * 2 * 64);
    EXPECT_THAT(notes, AllOf(HasSubstr("taken once, as copies of the same tokens: 0 1, 2 3"),
                             HasSubstr("added up, copies once")));
  }
  EXPECT_EQ(tokens_of(imported_in(dir, "megatron rank*.jsonl --by rank")), 20 * 4 * 64);
}

// What `--by rank` keeps apart is judged as the sum that the import makes without it: over the whole trace, from a pipe as well.
TEST(ImportInDoubt, ATraceOfRanksIsJudgedByTheRuleOfTheImport) {
  const TempDir dir;
  const auto write = [&](int rank, const std::string& text) {
    dir.write("rank" + std::to_string(rank) + ".jsonl", text);
  };
  const auto expect_the_same = [&](const std::string& ranks, std::int64_t tokens, const std::string& said) {
    SCOPED_TRACE(said);
    const std::string import = "import megatron " + ranks + " -o ";
    ASSERT_EQ(run_tool(dir, import + "sum.jsonl").code, 0);
    ASSERT_EQ(run_tool(dir, import + "apart.jsonl --by rank").code, 0);
    EXPECT_EQ(tokens_of(records(TempDir::read(dir.path("sum.jsonl")))), tokens);
    const std::string trace = TempDir::read(dir.path("apart.jsonl"));
    for (const std::string command :
         {"metrics - --sum --format json", "metrics - --all --format json", "compare - --format json"}) {
      const ToolResult sum = run_tool(dir, command, TempDir::read(dir.path("sum.jsonl")));
      const ToolResult apart = run_tool(dir, command, trace);
      EXPECT_EQ(apart.out, sum.out) << command;
      if (said.empty()) {
        EXPECT_THAT(apart.err, Not(HasSubstr("taken once"))) << command;
      } else {
        EXPECT_THAT(apart.err, HasSubstr(said)) << command;
      }
    }
  };
  // One token a step: a fourth of the steps agrees by chance.
  write(0, routes(1, 200, 1));
  write(1, routes(2, 200, 1));
  expect_the_same("rank0.jsonl rank1.jsonl", 400, "");
  write(1, routes(1, 200, 1));
  expect_the_same("rank0.jsonl rank1.jsonl", 200, "taken once, as copies of the same tokens: 0 1\n");
  // Tensor parallelism within data parallelism, more than ten ranks among them: 2 comes before 10.
  for (int rank = 0; rank < 12; ++rank) write(rank, routes(static_cast<unsigned>(3 + rank / 2), 20, 64));
  expect_the_same("rank*.jsonl", 20 * 6 * 64,
                  "taken once, as copies of the same tokens: 0 1, 2 3, 4 5, 6 7, ...\n");
}

TEST(ImportInDoubt, ATraceOfRanksThatCannotBeToldIsRefusedAsByTheImport) {
  const TempDir dir;
  const auto refused_of_parts = [&](const std::string& rank1) {
    dir.write("rank1.jsonl", rank1);
    EXPECT_EQ(run_tool(dir, "import megatron rank0.jsonl rank1.jsonl -o apart.jsonl --by rank").code, 0);
    const ToolResult whole = run_tool(dir, "metrics apart.jsonl --sum");
    EXPECT_EQ(whole.code, 1) << whole.out;
    EXPECT_THAT(whole.err, HasSubstr("--by rank"));
    EXPECT_EQ(run_tool(dir, "metrics apart.jsonl --by rank").code, 0);
    return whole.err;
  };
  dir.write("rank0.jsonl", routes(1, 20, 64));
  EXPECT_THAT(refused_of_parts(routes(1, 20, 64, 5)), HasSubstr("step 10: ranks 0 and 1 differ"));
  dir.write("rank0.jsonl", routes(1, 1, 3));
  EXPECT_THAT(refused_of_parts(routes(1, 1, 3)),
              HasSubstr("ranks 0 and 1 hold the same counts, of too few tokens"));
}

// A trace may end within a step: copies are told by the layers that both ranks have.
TEST(ImportInDoubt, CopiesMayLackALayer) {
  const TempDir dir;
  std::string trace = R"({"format":"moectl-trace","version":1})"
                      "\n";
  std::string last;
  for (int step = 0; step < 8; ++step) {
    for (const char* rank : {"rank0", "rank1"}) {
      for (int layer = 0; layer < 2; ++layer) {
        last = json({{"step", step},
                     {"layer", layer},
                     {"tokens", 20},
                     {"top_k", 1},
                     {"tag", rank},
                     {"counts", {9 - step, 5, 4, 2 + step}}})
                   .dump();
        trace += last + '\n';
      }
    }
  }
  const std::string cut = trace.substr(0, trace.size() - last.size() - 1);
  for (const std::string& text : {trace, cut}) {
    const ToolResult result = run_tool(dir, "metrics - --sum --format json", text);
    ASSERT_EQ(result.code, 0) << result.err;
    ASSERT_EQ(result.lines().size(), 2U);
    EXPECT_EQ(json::parse(result.lines()[0])["tokens"], 8 * 20);
    EXPECT_EQ(json::parse(result.lines()[1])["tokens"], 8 * 20) << "of rank 0, which has it";
  }
}

// Ranks that choose nothing in a step agree on nothing; and whose copy a rank is must be clear.
TEST(ImportInDoubt, IdleRanksAreNoCopiesAndARankIsACopyOfOne) {
  const TempDir dir;
  const auto trace_of =
      [](const std::vector<std::vector<std::vector<int>>>& steps) {  // [step][rank][layer]: a count
        std::string trace = R"({"format":"moectl-trace","version":1})"
                            "\n";
        for (std::size_t step = 0; step < steps.size(); ++step) {
          for (std::size_t rank = 0; rank < steps[step].size(); ++rank) {
            for (std::size_t layer = 0; layer < steps[step][rank].size(); ++layer) {
              const int first = steps[step][rank][layer];
              const int all = first == 0 ? 0 : 40;
              trace += json({{"step", step},
                             {"layer", layer},
                             {"tokens", all},
                             {"top_k", 1},
                             {"tag", "rank" + std::to_string(rank)},
                             {"counts", {first, all - first}}})
                           .dump() +
                       '\n';
            }
          }
        }
        return trace;
      };
  std::vector<std::vector<std::vector<int>>> idle;
  for (int step = 0; step < 8; ++step) idle.push_back({{10 + step}, {10 + step}, {0}, {0}});
  for (int step = 0; step < 8; ++step) idle.push_back({{0}, {0}, {20 + step}, {20 + step}});
  const ToolResult pairs = run_tool(dir, "metrics - --sum --format json", trace_of(idle));
  ASSERT_EQ(pairs.code, 0) << pairs.err;
  EXPECT_EQ(json::parse(pairs.lines()[0])["tokens"], 16 * 40);
  EXPECT_THAT(pairs.err, HasSubstr("0 1, 2 3"));

  std::vector<std::vector<std::vector<int>>> torn;
  for (int step = 0; step < 8; ++step)
    torn.push_back({{10 + step}, {10 + step, 20 + step}, {10 + step, 30 - step}});
  const ToolResult result = run_tool(dir, "metrics - --sum", trace_of(torn));
  EXPECT_EQ(result.code, 1) << result.out;
  EXPECT_THAT(result.err, HasSubstr("ranks 1 and 2 differ, and rank 0 holds the same counts as both"));
  EXPECT_EQ(run_tool(dir, "metrics - --by rank", trace_of(torn)).code, 0);
}

// Every pair of ranks is told by what both have: one that comes late is no copy by a single token.
TEST(ImportInDoubt, ARankThatComesLateIsToldByItsOwnTokens) {
  const TempDir dir;
  std::string late;
  std::istringstream lines(routes(1, 200, 1));
  for (std::string line; std::getline(lines, line);) late = line;
  for (const int late_rank : {0, 2}) {
    for (int rank = 0; rank < 3; ++rank)
      dir.write("rank" + std::to_string(rank) + ".jsonl",
                rank == late_rank ? late + '\n' : routes(1, 200, 1));
    EXPECT_THAT(refused_in(dir, "megatron rank*.jsonl"), HasSubstr("hold the same counts, of too few tokens"))
        << late_rank;
  }
}

// Ranks of one model may compute a last bit of a score in another way.
TEST(ImportInDoubt, CopiesAreThoseOfTheSameChoices) {
  const TempDir dir;
  std::vector<float> logits;
  for (int i = 0; i < 64 * 8; ++i) logits.push_back(static_cast<float>(i * 37 % 101) / 100);
  dir.write("rank0.npy", npy_of("<f4", "1, 64, 8", bytes_of(logits)));
  for (float& logit : logits) logit = std::nextafter(logit, 2.0F);
  dir.write("rank1.npy", npy_of("<f4", "1, 64, 8", bytes_of(logits)));
  EXPECT_EQ(at(imported_in(dir, "hf rank*.npy --top-k 2"), 0, 0)["tokens"], 64);
}

TEST(ImportInDoubt, CopiesThatDifferLaterOrAreTooFewToTellAreRefused) {
  const TempDir dir;
  dir.write("rank0.jsonl", routes(1, 20, 64));
  dir.write("rank1.jsonl", routes(1, 20, 64, 5));
  EXPECT_THAT(refused_in(dir, "megatron rank0.jsonl rank1.jsonl"),
              AllOf(HasSubstr("step 10: ranks 0 and 1 differ"), HasSubstr("--by rank")));
  EXPECT_EQ(tokens_of(imported_in(dir, "megatron rank0.jsonl rank1.jsonl --by rank")), 20 * 2 * 64);
  dir.write("rank0.jsonl", routes(1, 1, 3));
  dir.write("rank1.jsonl", routes(1, 1, 3));
  EXPECT_THAT(
      refused_in(dir, "megatron rank0.jsonl rank1.jsonl"),
      AllOf(HasSubstr("ranks 0 and 1 hold the same counts, of too few tokens"), HasSubstr("--by rank")));
}

// A copy whose file was cut is a copy; a rank of other tokens whose file was cut is missed.
TEST(ImportInDoubt, RanksThatEndEarlyAreCopiesAllTheSame) {
  const TempDir dir;
  dir.write("rank0.jsonl", routes(1, 20, 64));
  dir.write("rank1.jsonl", routes(1, 19, 64));
  std::string notes;
  EXPECT_EQ(tokens_of(imported_in(dir, "megatron rank0.jsonl rank1.jsonl", &notes)), 20 * 64);
  EXPECT_THAT(notes, Not(HasSubstr("no data")));
  dir.write("rank1.jsonl", routes(2, 19, 64));
  EXPECT_EQ(tokens_of(imported_in(dir, "megatron rank0.jsonl rank1.jsonl", &notes)), 39 * 64);
  EXPECT_THAT(notes, HasSubstr("step 19, perhaps others: no data of rank 1"));
}

TEST(ImportInDoubt, RanksAreNamedInTheWaysOfRealSystems) {
  const TempDir dir;
  for (const char* separator : {"", "_", "-"}) {
    const std::string first = std::string("rank_trace_rank") + separator + "0.jsonl",
                      second = std::string("rank_trace_rank") + separator + "1.jsonl";
    dir.write(first, routes(1, 6, 64));
    dir.write(second, routes(2, 6, 64));
    EXPECT_EQ(imported_in(dir, "megatron " + first + " " + second).size(), 6U) << first;
  }
  dir.write("pp_rank0_tp_rank1.jsonl", routes(1, 6, 64));
  EXPECT_THAT(refused_in(dir, "megatron pp_rank0_tp_rank1.jsonl"), HasSubstr("tells two ranks"));
}

// The dumps of ranks are paired by the time of dumping.
TEST(ImportInDoubt, DumpsOfRanksNeedOneOfEachRankForEachTime) {
  const TempDir dir;
  const auto name = [](const char* rank, const char* time) {
    return std::string("expert_distribution_rank") + rank + "_timestamp" + time + ".csv";
  };
  const auto write = [&](const char* rank, const char* time, int count) {
    dir.write(name(rank, time), "layer_id,expert_id,count\n0,0," + std::to_string(count) + "\n0,1,7\n");
  };
  write("0", "1.0", 1);
  write("0", "100.0", 2);
  write("1", "100.2", 4);
  EXPECT_THAT(refused_in(dir, "sglang expert*.csv --top-k 1"),
              HasSubstr(name("0", "1.0") + ": rank 1 has no dump of that time"));
  write("1", "200", 8);
  EXPECT_THAT(refused_in(dir, "sglang expert*.csv --top-k 1"), HasSubstr("rank 1 has no dump of that time"))
      << "as many dumps, of other times";
  write("1", "1.4", 16);
  std::filesystem::remove(dir.path(name("1", "200")));
  std::string notes;
  auto all = imported_in(dir, "sglang expert*.csv --top-k 1", &notes);
  EXPECT_EQ(at(all, 0, 0)["counts"], json({17, 14}));
  EXPECT_EQ(at(all, 1, 0)["counts"], json({6, 14}));
  EXPECT_THAT(notes, Not(HasSubstr(" s later")));
  std::filesystem::remove(dir.path(name("1", "1.4")));
  std::filesystem::remove(dir.path(name("0", "100.0")));
  all = imported_in(dir, "sglang expert*.csv --top-k 1", &notes);
  EXPECT_THAT(notes, HasSubstr("99 s later"));
}

// ---- Values that are not there ----

TEST(ImportInDoubt, MissingExpertsAreNoZeros) {
  const TempDir dir;
  const std::string header =
      "_step,tok_layer0_expert0,tok_layer0_expert1,tok_layer0_expert2,tok_layer0_expert3\n";
  EXPECT_THAT(refused_in(dir, "wandb - --top-k 1", header + "0,10,10,10,10\n1,10,10,10,\n"),
              HasSubstr("step 1, layer 0, expert 3: expected a number of at least 0: missing"));
  EXPECT_THAT(refused_in(dir, "wandb - --top-k 1 --experts 4", header + "0,10,10,10,\n"),
              HasSubstr("expert 3"));
  // Files of other widths than the rest, in every format with a value for each expert.
  dir.write("a.csv", "3,1\n2,2\n");
  dir.write("b.csv", "3,1,5\n");
  EXPECT_THAT(refused_in(dir, "csv a.csv b.csv --top-k 1"),
              HasSubstr("step 0, layer 0: values of 2 experts: expected 3, as in other steps"));
  EXPECT_THAT(refused_in(dir, "csv a.csv --top-k 1 --experts 4"), HasSubstr("expected 4, as --experts says"));
  dir.write("a.npy", npy_of("<i8", "1, 3", bytes_of<std::int64_t>({1, 2, 3})));
  dir.write("b.npy", npy_of("<i8", "1, 2", bytes_of<std::int64_t>({4, 2})));
  EXPECT_THAT(refused_in(dir, "sglang a.npy b.npy --top-k 1"), HasSubstr("values of 2 experts: expected 3"));
  dir.write("a.jsonl",
            "{\"iter\":0,\"layer\":0,\"tpe\":[[1,2,3]]}\n{\"iter\":1,\"layer\":0,\"tpe\":[[1,2]]}\n");
  EXPECT_THAT(refused_in(dir, "megatron a.jsonl --top-k 1"), HasSubstr("values of 2 experts: expected 3"));
  // A micro-batch without experts is none: millions of them would take memory and hold nothing.
  dir.write("b.jsonl", "{\"iter\":0,\"layer\":0,\"tpe\":[[1,2,3],[]]}\n");
  EXPECT_THAT(refused_in(dir, "megatron b.jsonl --top-k 1 --by micro-batch"),
              HasSubstr("1: tpe: expected [micro-batches, experts]"));
}

std::string varint(std::uint64_t value) {
  std::string bytes;
  for (; value >= 128; value >>= 7) bytes += static_cast<char>((value & 127) | 128);
  return bytes + static_cast<char>(value);
}
std::string little_endian(std::uint64_t value, int size) {
  std::string bytes;
  for (int i = 0; i < size; ++i) bytes += static_cast<char>(value >> 8 * i);
  return bytes;
}
/// A stored entry of a zip archive, as numpy.savez writes it.
std::string entry(const std::string& name, const std::string& data) {
  return std::string("PK\x03\x04\x14\0\0\0\0\0", 10) + std::string(8, '\0') + little_endian(data.size(), 4) +
         little_endian(data.size(), 4) + little_endian(name.size(), 2) + std::string(2, '\0') + name + data;
}
/// One scalar as an event of TensorBoard: a TFRecord.
std::string scalar(int step, const std::string& tag, float value) {
  const auto text = [](int field, const std::string& bytes) {
    return varint(static_cast<std::uint64_t>(field) << 3 | 2) + varint(bytes.size()) + bytes;
  };
  const std::string summary =
      text(1, tag) + varint(2 << 3 | 5) + little_endian(std::bit_cast<std::uint32_t>(value), 4);
  const std::string event =
      varint(2 << 3) + varint(static_cast<std::uint64_t>(step)) + text(5, text(1, summary));
  const std::string size = little_endian(event.size(), 8);
  return size + little_endian(masked_crc32c(size.data(), 8), 4) + event +
         little_endian(masked_crc32c(event.data(), event.size()), 4);
}
/// The events of steps [from, to) of one layer with 4 experts; expert 0 has `base` + step tokens.
std::string events(int from, int to, int base, int experts_of_last = 4) {
  std::string bytes;
  for (int step = from; step < to; ++step) {
    for (int e = 0; e < (step == to - 1 ? experts_of_last : 4); ++e)
      bytes += scalar(step, "moe/tokens_layer0_expert" + std::to_string(e),
                      static_cast<float>(e ? 8 : base + step));
  }
  return bytes;
}

TEST(ImportInDoubt, TheLastStepOfAFileThatIsStillWrittenIsLeftOut) {
  const TempDir dir;
  dir.write("e", events(0, 3, 100, 2));
  std::string notes;
  const auto all = imported_in(dir, "tensorboard e --top-k 1", &notes);
  EXPECT_EQ(all.size(), 2U);
  EXPECT_THAT(notes,
              HasSubstr("e: ends within step 2, in which experts have no value yet: the step is left out"));
  // Within the file it is damage.
  dir.write("e", events(0, 2, 100, 2) + events(2, 3, 100));
  EXPECT_THAT(refused_in(dir, "tensorboard e --top-k 1"), HasSubstr("step 1, layer 0, expert 2"));
  dir.write("e", events(0, 1, 100, 2) + events(1, 3, 100));
  EXPECT_THAT(refused_in(dir, "tensorboard e --top-k 1"),
              HasSubstr("step 0, layer 0: values of 2 experts: expected 4, as in other steps"));
}

TEST(ImportInDoubt, AnEventThatIsTooLongIsToldFromADamagedOne) {
  const TempDir dir;
  const std::string size = little_endian((1U << 26) + 1, 8);
  dir.write("e", events(0, 3, 100) + size + little_endian(masked_crc32c(size.data(), 8), 4));
  EXPECT_THAT(refused_in(dir, "tensorboard e --top-k 1"),
              HasSubstr("e: event 12: 67108865 bytes: must be at most 67108864"));
  dir.write("e", events(0, 3, 100) + size + "abcd");
  EXPECT_THAT(refused_in(dir, "tensorboard e --top-k 1"), HasSubstr("e: event 12: damaged length"));
}

// ---- Parts of a run ----

TEST(ImportInDoubt, OfAResumedRunTheLaterFileCounts) {
  const TempDir dir;
  dir.write("e1", events(0, 5, 100));
  dir.write("e2", events(3, 8, 200));
  std::string notes;
  const auto all = imported_in(dir, "tensorboard e1 e2 --top-k 1", &notes);
  ASSERT_EQ(all.size(), 8U);
  EXPECT_EQ(at(all, 2, 0)["counts"][0], 102);
  EXPECT_EQ(at(all, 3, 0)["counts"][0], 203);
  EXPECT_EQ(at(all, 7, 0)["counts"][0], 207);
  EXPECT_THAT(notes, HasSubstr("e1: left out from step 3 on: a later file starts at step 3"));
  EXPECT_THAT(refused_in(dir, "tensorboard e2 e1 --top-k 1"),
              HasSubstr("e1: starts at step 0, and e2 before it at step 3: expected rankN"));
  // The same in the other formats whose steps have numbers.
  dir.write("a.csv", "step,e0,e1\n0,5,3\n1,5,3\n");
  dir.write("b.csv", "Step,e0,e1\n1,4,4\n2,4,4\n");
  EXPECT_EQ(at(imported_in(dir, "csv a.csv b.csv --top-k 1"), 1, 0)["counts"], json({4, 4}));
  dir.write("x.jsonl", routes(1, 6, 64));
  dir.write("y.jsonl", routes(2, 6, 64));
  EXPECT_THAT(refused_in(dir, "megatron x.jsonl y.jsonl"), HasSubstr("expected rankN in the names"));
  // Files that count from 0 follow each other, as before.
  dir.write("a.csv", "5,3\n");
  dir.write("b.csv", "4,4\n");
  EXPECT_EQ(at(imported_in(dir, "csv a.csv b.csv --top-k 1"), 1, 0)["counts"], json({4, 4}));
}

TEST(ImportInDoubt, AStepThatStandsTwiceInAFileSaysWhereToSplitIt) {
  const TempDir dir;
  dir.write("m.jsonl", routes(1, 3, 64) + routes(2, 2, 64));
  EXPECT_THAT(refused_in(dir, "megatron m.jsonl"),
              AllOf(HasSubstr("m.jsonl:4: step 0 after step 2"), HasSubstr("head -n 3, tail -n +4")));
}

// ---- Kinds of numbers ----

TEST(ImportInDoubt, TheKindOfNumbersFitsEveryRow) {
  const TempDir dir;
  std::string notes;
  // A row that sums to 1 may be shares or one token.
  auto all = imported_in(dir, "csv - --top-k 1 --tokens 100", &notes, "1,0,0,0\n20,10,30,5\n");
  EXPECT_EQ(at(all, 0, 0)["counts"], json({1, 0, 0, 0}));
  EXPECT_EQ(at(all, 1, 0)["counts"], json({20, 10, 30, 5}));
  EXPECT_THAT(notes, HasSubstr("read as counts, which do not need --tokens"));
  all = imported_in(dir, "csv - --top-k 1 --tokens 10", &notes, "1,0,0,0\n0.5,0.5,0,0\n");
  EXPECT_EQ(at(all, 1, 0)["counts"], json({5, 5, 0, 0}));
  // Whole percent first, others later; the same as a file with --experts, and as W&B.
  for (const char* more : {"", " --experts 4"}) {
    all = imported_in(dir, std::string("csv - --top-k 1 --tokens 1000") + more, &notes,
                      "25,25,25,25\n24.5,25.5,25,25\n");
    EXPECT_EQ(at(all, 1, 0)["counts"], json({245, 255, 250, 250}));
  }
  // All rows whole, with the sum of percent: --tokens tells, and else it is said.
  EXPECT_EQ(at(imported_in(dir, "csv - --top-k 1 --tokens 200", &notes, "25,75\n"), 0, 0)["counts"],
            json({50, 150}));
  EXPECT_EQ(at(imported_in(dir, "csv - --top-k 1", &notes, "25,75\n"), 0, 0)["counts"], json({25, 75}));
  EXPECT_THAT(notes, HasSubstr("counts, though they may be percent of the load: --values says which"));
  // No kind fits all rows.
  EXPECT_THAT(
      refused_in(dir, "csv - --top-k 1 --tokens 10", "0.5,0.5\n20,10\n"),
      AllOf(HasSubstr(":2: a sum of 30 is one of counts"), HasSubstr("the rows before it hold shares")));
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1 --values share --tokens 10", "1e308,1e308\n"),
              HasSubstr("finite"));
}

TEST(ImportInDoubt, WholeNumbersByTypeAreCounts) {
  const TempDir dir;
  dir.write("c.npy", npy_of("<i4", "2, 1, 3", bytes_of<std::int32_t>({1, 0, 0, 0, 0, 1})));
  std::string notes;
  const auto all = imported_in(dir, "sglang c.npy --top-k 1", &notes);
  EXPECT_EQ(at(all, 0, 0)["counts"], json({1, 0, 0}));
  EXPECT_EQ(at(all, 1, 0)["counts"], json({0, 0, 1}));
  EXPECT_THAT(notes, Not(HasSubstr("largest number"))) << "a column for each expert";
  EXPECT_THAT(imported_in(dir, "sglang c.npy --top-k 1 --experts 3").size(), 2U);
  const double nan = std::nan("");
  dir.write("n.npy", npy_of("<f8", "1, 1, 3", bytes_of<double>({1, nan, 2})));
  EXPECT_THAT(refused_in(dir, "sglang n.npy --top-k 1"),
              AllOf(HasSubstr("[0, 0]: nan: expected a number of at least 0"), Not(HasSubstr("nearest"))));
}

// The tokens of a column are those that the shares of its row are of.
TEST(ImportInDoubt, SharesTakeTheTokensOfTheirRow) {
  const TempDir dir;
  const auto all =
      imported_in(dir, "csv - --top-k 2", nullptr, "Tokens,Layer,e0,e1\n10,3,0.5,0.5\n20,4,0.5,0.5\n");
  EXPECT_EQ(at(all, 0, 3)["counts"], json({10, 10}));
  EXPECT_EQ(at(all, 0, 4)["tokens"], 20);
}

TEST(ImportInDoubt, ColumnsThatAreNoExpertsAreNotTakenForThem) {
  const TempDir dir;
  const auto all = imported_in(dir, "csv - --top-k 1", nullptr, "Step,Layer,e0,e1\n0,3,5,3\n");
  EXPECT_EQ(at(all, 0, 3)["counts"], json({5, 3}));
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1", "step,loss,e0,e1\n0,3,5,3\n"), HasSubstr("column loss"));
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1", ",0,1\n0,5,3\n"),
              HasSubstr("expected the number of an expert"));
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1", "step,e0,e1,e10,e2\n0,5,3,1,1\n"),
              HasSubstr("e10: expected expert 2"));
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1", "step,Step,e0,e1\n0,0,5,3\n"),
              HasSubstr("expected one of them"));
}

// ---- Router logits ----

// A few bytes must not take gigabytes, or promise steps without end.
TEST(ImportInDoubt, LayersTimesExpertsAreLimitedBeforeMemoryIsTaken) {
  const TempDir dir;
  std::string rows = "layer_id,expert_id,count\n", lines, choices;
  for (int layer = 0; layer < 65; ++layer) {
    const std::string id = std::to_string(layer);
    rows += id + ",65535,1\n";
    lines += R"({"step":0,"layer":)" + id + R"(,"num_tokens":1,"top_indices":[[65535]]})" + "\n";
    choices += id + ",65535\n";
  }
  dir.write("r.csv", rows);
  dir.write("l.jsonl", lines);
  dir.write("c.csv", choices);
  dir.write("z.npy", npy_of("<f4", "65536, 1, 65536", ""));
  dir.write("zero.npy", npy_of("<f4", "281474976710656, 0, 4, 4", ""));
  dir.write("logical_count.npy", npy_of("<i8", "1, 65536, 65536", ""));
  dir.write("empty.npy", npy_of("<i8", "281474976710656, 0, 2", ""));
  for (const char* command : {"sglang r.csv --top-k 1", "megatron l.jsonl", "llama.cpp c.csv --top-k 1",
                              "hf z.npy --top-k 2", "sglang logical_count.npy --top-k 2"})
    EXPECT_THAT(refused_in(dir, command), HasSubstr("must be at most 4194304")) << command;
  for (const char* command : {"hf zero.npy --top-k 2", "sglang empty.npy --top-k 2"})
    EXPECT_THAT(refused_in(dir, command), HasSubstr(".npy shape: (281474976710656, 0, ")) << command;
}

TEST(ImportInDoubt, LogitsThatChooseNothingAreRefused) {
  const TempDir dir;
  const float inf = HUGE_VALF;
  const auto logits = [&](const std::vector<float>& values) {
    dir.write("z.npy", npy_of("<f4", "1, 2, 3", bytes_of(values)));
  };
  for (const char* scores : {"softmax", "sigmoid"}) {
    const std::string command = std::string("hf z.npy --top-k 2 --scores ") + scores;
    logits({1, 2, 3, 1, inf, 0});
    EXPECT_THAT(refused_in(dir, command), HasSubstr("layer 0, token 1: +inf among the logits"));
    logits({1, 2, 3, -inf, -inf, -inf});
    EXPECT_THAT(refused_in(dir, command),
                HasSubstr("layer 0, token 1: 0 logits above -inf: expected at least k = 2"));
    logits({1, 2, 3, -inf, 1, -inf});
    EXPECT_THAT(refused_in(dir, command), HasSubstr("1 logits above -inf"));
    logits({1, 2, 3, -inf, 1, 0});
    EXPECT_EQ(at(imported_in(dir, command), 0, 0)["counts"], json({0, 2, 2})) << "an expert may be taken out";
  }
}

// Scores far below the largest are 0, as that of -inf is: the logits tell them apart.
TEST(ImportInDoubt, TheChoiceIsThatOfTheLogits) {
  const TempDir dir;
  const float inf = HUGE_VALF;
  const auto counts = [&](const std::vector<float>& values, const std::string& scores, int top_k) {
    dir.write("z.npy", npy_of("<f4", "1, 1, " + std::to_string(values.size()), bytes_of(values)));
    return imported_in(dir, "hf z.npy --scores " + scores + " --top-k " + std::to_string(top_k)).at(0);
  };
  EXPECT_EQ(counts({1000, -inf, 0, 1}, "softmax", 2)["counts"], json({1, 0, 0, 1}));
  EXPECT_EQ(counts({1000, -inf, 0, 1}, "softmax", 3)["counts"], json({1, 0, 1, 1}));
  EXPECT_EQ(counts({900, -inf, -801, -800}, "sigmoid", 2)["counts"], json({1, 0, 0, 1}));
  EXPECT_EQ(counts({50, 60, 0}, "sigmoid", 1)["counts"], json({0, 1, 0})) << "both sigmoids are 1";
  // All sigmoids are too small for a number.
  const json small = counts({-inf, -800, -800}, "sigmoid", 1);
  EXPECT_EQ(small["counts"], json({0, 1, 0}));
  EXPECT_EQ(small["prob_sum"], json({0.0, 0.5, 0.5}));
}

TEST(ImportInDoubt, FourExtentsOfLogitsAreSaid) {
  const TempDir dir;
  dir.write("z.npy", npy_of("<f4", "3, 2, 2, 2", bytes_of(std::vector<float>(24, 1.0F))));
  std::string notes;
  EXPECT_EQ(imported_in(dir, "hf z.npy --top-k 1", &notes).size(), 6U);
  EXPECT_THAT(notes, AllOf(HasSubstr("3 steps of 2 layers"),
                           HasSubstr("reshape [layers, batch, sequence, experts]")));
  dir.write("m.npy", npy_of("|b1", "2, 2", std::string(4, '\1')));
  EXPECT_THAT(refused_in(dir, "hf z.npy --top-k 1 --mask m.npy"), HasSubstr("reshape"));
}

// ---- Tokens ----

TEST(ImportInDoubt, RecordsWithoutTokensHaveNoK) {
  const TempDir dir;
  const std::string none = R"({"step":1,"layer":0,"num_tokens":0,"top_indices":[]})"
                           "\n";
  dir.write("rank0.jsonl", R"({"step":0,"layer":0,"top_indices":[[0,1],[2,1]]})"
                           "\n" +
                               none);
  dir.write("rank1.jsonl", R"({"step":1,"layer":0,"top_indices":[[0,2],[2,1]]})"
                           "\n");
  EXPECT_EQ(imported_in(dir, "megatron rank0.jsonl").size(), 1U);
  const auto both = imported_in(dir, "megatron rank0.jsonl rank1.jsonl");
  EXPECT_EQ(at(both, 1, 0)["counts"], json({1, 1, 2}));
  dir.write("rank1.jsonl", R"({"step":0,"layer":0,"top_indices":[[0,1,2]]})"
                           "\n");
  EXPECT_THAT(refused_in(dir, "megatron rank0.jsonl rank1.jsonl"),
              HasSubstr("step 0, layer 0, rank 1: k = 3: expected 2"));
  dir.write("none.jsonl", none);
  EXPECT_THAT(refused_in(dir, "megatron none.jsonl"), HasSubstr("found no counts"));
}

TEST(ImportInDoubt, ATokenChoosesAnExpertOnce) {
  const TempDir dir;
  EXPECT_THAT(refused_in(dir, "vllm -", "{\"routed_experts\":[[[0,1,2]],[[3,1,3]]]}\n"),
              HasSubstr(":1: routed_experts: layer 0: expert 3 stands twice in one token"));
  EXPECT_THAT(refused_in(dir, "megatron -", "{\"iter\":0,\"layer\":0,\"top_indices\":[[0,1],[3,3]]}\n"),
              HasSubstr("expert 3 stands twice in one token"));
  // vLLM fills tokens that it did not capture with 0.
  std::string notes;
  const auto all = imported_in(dir, "vllm -", &notes, "{\"routed_experts\":[[[0,0]],[[3,1]],[[-1,-1]]]}\n");
  EXPECT_EQ(all[0]["tokens"], 1);
  EXPECT_THAT(
      notes,
      HasSubstr("layer 0: 1 tokens hold one number k times: taken for tokens without routes, left out"));
}

TEST(ImportInDoubt, ATokenOfLlamaCppChoosesAnExpertOnce) {
  const TempDir dir;
  EXPECT_THAT(refused_in(dir, "llama.cpp - --top-k 2", "layer,expert\n0,0\n0,1\n1,1\n1,1\n"),
              HasSubstr("<stdin>:5: layer 1: expert 1 stands twice in one token"));
  // Of two tokens, and in the next pass, it is another choice.
  EXPECT_EQ(imported_in(dir, "llama.cpp - --top-k 2", nullptr,
                        "layer,expert\n0,0\n0,1\n0,1\n0,0\n1,1\n1,0\n0,1\n0,0\n1,0\n1,1\n")
                .size(),
            2U);
  // The rows before the cut are whole tokens.
  EXPECT_THAT(refused_in(dir, "llama.cpp - --top-k 2", "layer,expert\n0,3\n0,3\n0,1\n"),
              HasSubstr(":3: layer 0: expert 3 stands twice"));
}

// ---- Two places that contradict each other ----

TEST(ImportInDoubt, RequestsOfOneModelHaveOneK) {
  const TempDir dir;
  for (const char* more : {"", " --tokens-per-step 1"}) {
    EXPECT_THAT(refused_in(dir, std::string("vllm -") + more,
                           "{\"routed_experts\":[[[0,1]]]}\n{\"routed_experts\":[[[0,1,2]]]}\n"),
                HasSubstr("<stdin>:2: routed_experts: [tokens, 1, 3]: expected [tokens, 1, 2], as in "
                          "<stdin>:1: routed_experts"));
  }
  EXPECT_THAT(refused_in(dir, "vllm -", "{\"routed_experts\":[[[0]]]}\n{\"routed_experts\":[[[0],[1]]]}\n"),
              HasSubstr(":2: routed_experts: [tokens, 2, 1]: expected [tokens, 1, 1]"));
  dir.write("r.npz", entry("a.npy", npy_of("|u1", "1, 1, 2", std::string("\0\1", 2))) +
                         entry("b.npy", npy_of("|u1", "1, 1, 3", std::string("\0\1\2", 3))));
  EXPECT_THAT(refused_in(dir, "vllm r.npz"),
              HasSubstr("r.npz: b.npy: [tokens, 1, 3]: expected [tokens, 1, 2], as in r.npz: a.npy"));
  // The option gives what the files do not say, and nothing else.
  EXPECT_THAT(refused_in(dir, "vllm - --top-k 3", "{\"routed_experts\":[[[0,1]]]}\n"),
              HasSubstr("--top-k: 3: step 0, layer 0 has k = 2 in the files"));
}

TEST(ImportInDoubt, WhatARouterTraceSaysOfItsTokensIsTrue) {
  const TempDir dir;
  const auto line = [](const std::string& said) {
    return R"({"step":0,"layer":0,)" + said + R"("top_indices":[[0,1],[2,1]]})" + "\n";
  };
  EXPECT_EQ(imported_in(dir, "megatron -", nullptr, line(R"("num_tokens":2,"topk":2,)"))[0]["tokens"], 2);
  EXPECT_THAT(refused_in(dir, "megatron -", line(R"("num_tokens":2048,"topk":2,)")),
              HasSubstr("<stdin>:1: num_tokens: 2048: expected 2, as many as top_indices has"));
  EXPECT_THAT(refused_in(dir, "megatron -", line(R"("num_tokens":2,"topk":4,)")),
              HasSubstr("<stdin>:1: topk: 4: expected 2, the experts of a token in top_indices"));
  EXPECT_THAT(refused_in(dir, "megatron -", R"({"step":0,"layer":0,"num_tokens":3,"top_indices":[]})"),
              HasSubstr("num_tokens: 3: expected 0"));
}

TEST(ImportInDoubt, AValueThatStandsTwiceIsRefused) {
  const TempDir dir;
  EXPECT_THAT(
      refused_in(dir, "wandb - --top-k 1",
                 "_step,tok/layer0_expert0,tok/layer0_expert1,tok/layer0_expert1\n0,5,3,4\n"),
      HasSubstr("<stdin>:1: columns 3 and 4: tok/layer0_expert1 and tok/layer0_expert1 are both of layer 0, "
                "expert 1: expected one of them"));
  EXPECT_THAT(refused_in(dir, "wandb - --top-k 1", "_step,_step,t_expert0,t_expert1\n0,1,5,3\n"),
              HasSubstr("<stdin>:1: columns 1 and 2: _step stands twice"));
  EXPECT_THAT(refused_in(dir, "llama.cpp - --top-k 1", "layer,expert,expert\n0,1,0\n"),
              HasSubstr("<stdin>:1: columns 2 and 3: expert stands twice"));
  const std::string sglang = "layer_id,expert_id,count";
  EXPECT_THAT(refused_in(dir, "sglang - --top-k 1", sglang + ",count\n0,1,5,6\n"),
              HasSubstr("<stdin>:1: columns 3 and 4: count stands twice"));
  EXPECT_THAT(refused_in(dir, "sglang - --top-k 1", sglang + "\n0,1,0\n1,1,2\n0,1,6\n"),
              HasSubstr("<stdin>:4: layer 0, expert 1 stands twice: expected one count"));
  const std::string tag = "moe/tokens_layer0_expert";
  dir.write("e", scalar(3, tag + "0", 5) + scalar(3, tag + "1", 3) + scalar(3, tag + "1", 4));
  EXPECT_THAT(refused_in(dir, "tensorboard e --top-k 1"),
              HasSubstr("e: step 3, layer 0, expert 1 stands twice, as 3 and as 4: expected one value"));
  dir.write("e", scalar(3, tag + "0", 5) + scalar(3, tag + "1", 3) + scalar(3, tag + "1", 3));
  EXPECT_EQ(imported_in(dir, "tensorboard e --top-k 1")[0]["counts"], json({5, 3})) << "no contradiction";
}

TEST(ImportInDoubt, WithoutStepNumbersAStepEndsWhereALayerComesAgain) {
  const TempDir dir;
  const auto all =
      imported_in(dir, "csv - --top-k 1", nullptr, "layer,e0,e1\n1,5,3\n0,4,4\n1,6,2\n0,1,7\n2,8,0\n");
  ASSERT_EQ(all.size(), 5U);
  EXPECT_EQ(at(all, 0, 1)["counts"], json({5, 3}));
  EXPECT_EQ(at(all, 0, 0)["counts"], json({4, 4}));
  EXPECT_EQ(at(all, 1, 1)["counts"], json({6, 2}));
  EXPECT_EQ(at(all, 1, 0)["counts"], json({1, 7}));
  EXPECT_EQ(at(all, 1, 2)["counts"], json({8, 0}));
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1", "step,layer,e0,e1\n0,1,5,3\n0,1,4,4\n"),
              HasSubstr("<stdin>:3: step 0, layer 1 stands twice"));
}

TEST(ImportInDoubt, ColumnsOfExpertsBeginAtZero) {
  const TempDir dir;
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1", "step,e4,e5,e6,e7\n0,5,3,1,1\n"),
              HasSubstr("<stdin>:1: column 2: e4: expected expert 0"));
  EXPECT_THAT(refused_in(dir, "csv - --top-k 1", "step,e0,e2\n0,5,3\n"),
              HasSubstr("<stdin>:1: column 3: e2: expected expert 1"));
}

// ---- Formats and names ----

TEST(ImportInDoubt, ArchivesOfCountsAreThoseOfSglang) {
  const TempDir dir;
  dir.write("x.npz", entry("rank.npy", npy_of("<i8", "", bytes_of<std::int64_t>({0}))) +
                         entry("logical_count.npy",
                               npy_of("<i8", "1, 2, 3", bytes_of<std::int64_t>({5, 9, 4, 8, 7, 3}))));
  EXPECT_EQ(at(imported_in(dir, "sglang x.npz --top-k 1"), 0, 1)["counts"], json({8, 7, 3}));
  EXPECT_THAT(refused_in(dir, "vllm x.npz"), HasSubstr("nearest format: sglang"));
  dir.write("y.npz", entry("counts.npy", npy_of("<i8", "1, 2, 3", std::string(48, '\0'))));
  EXPECT_THAT(refused_in(dir, "sglang y.npz --top-k 1"),
              AllOf(HasSubstr("expected an array logical_count: there is none"), Not(HasSubstr("nearest"))));
  EXPECT_THAT(refused_in(dir, "hf - --top-k 1", "step,layer,e0,e1\n0,0,5,3\n"),
              HasSubstr("nearest format: csv"));
  EXPECT_THAT(refused_in(dir, "wandb x.npz --top-k 1"), HasSubstr("found bytes that are no text"));
}

TEST(ImportInDoubt, SglangColumnsAreFoundByName) {
  const TempDir dir;
  for (const char* text : {"layer_id, expert_id, count\n0, 1, 5\n", "expert_id,layer_id,count\n1,0,5\n",
                           "layer_id,expert_id,count,\n0,1,5,\n"})
    EXPECT_EQ(imported_in(dir, "sglang - --top-k 1", nullptr, text)[0]["counts"], json({0, 5})) << text;
  EXPECT_THAT(refused_in(dir, "sglang - --top-k 1", "layer_id,expert_id,count\n0,1\n"),
              HasSubstr(":2: count: missing"));
}

TEST(ImportInDoubt, ATagMustBeText) {
  const TempDir dir;
  for (const char* tag : {"a\\tb", "a\\001b", "a\\042b", "a\\377b"}) {
    const std::string command = std::string("import csv - --top-k 1 -o - --tag \"$(printf '") + tag + "')\"";
    const ToolResult result = run_tool(dir, command, "3,1\n");
    EXPECT_EQ(result.code, 1) << tag;
    EXPECT_EQ(result.out, "") << tag;
    EXPECT_THAT(result.err, HasSubstr("--tag")) << tag;
  }
}

// Tokens · k is a number that does not wrap.
TEST(ImportInDoubt, TokensOfAStepHaveALimit) {
  const TempDir dir;
  const std::string rows = "layer,expert\n0,0\n0,1\n0,1\n0,0\n",
                    command = "import llama.cpp - --top-k 2 -o -";
  const ToolResult result = run_tool(dir, command + " --tokens-per-step 4611686018427387904", rows);
  EXPECT_EQ(result.code, 2);
  EXPECT_THAT(result.err, AllOf(HasSubstr("--tokens-per-step"), HasSubstr("1099511627776")));
  EXPECT_EQ(run_tool(dir, command + " --tokens-per-step 1099511627776", rows).code, 0);
}

}  // namespace
}  // namespace moectl
