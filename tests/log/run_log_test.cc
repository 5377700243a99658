#include "moectl/run_log.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <cmath>
#include <csignal>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "allocation_counter.h"
#include "temp_dir.h"
#include "test_sums.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::vector<std::int64_t> counts_of(const LogRecord& record) {
  return {record.stats.counts().begin(), record.stats.counts().end()};
}

std::vector<LogRecord> read_all(const std::string& path) {
  LogReader reader(path);
  std::vector<LogRecord> records;
  while (auto record = reader.next()) records.push_back(std::move(*record));
  return records;
}

void write_gzip(const std::string& path, const std::string& text, const char* mode = "wb") {
  gzFile file = gzopen(path.c_str(), mode);
  ASSERT_EQ(gzwrite(file, text.data(), static_cast<unsigned>(text.size())), static_cast<int>(text.size()));
  gzclose(file);
}

const char* const kHeader = R"({"format":"moectl-trace","version":1,"layers":2,"experts":4,"top_k":2})";

// ---- Reading. ----

TEST(LogReader, ReadsEveryFieldOfATrace) {
  const TempDir dir;
  const std::string path = dir.write(
      "t.jsonl", std::string(kHeader) +
                     "\n\n"
                     R"({"step":7,"layer":1,"tokens":10,"top_k":2,"counts":[5,6,7,2],"sequences":2,)"
                     R"("sequence_sq":[13,18,25,2],"sequence_cross":[50,60,70,20],"sequence_len_sq":200,)"
                     R"("gap_sum":1.5,"prob_sum":[2.5,2.5,2.5,2.5],"sqrt_prob_sum":[5,5,5,5],)"
                     R"("token_entropy_sum":13.5,"dropped":3,"domain_counts":{"b":[5,6,0,1],"a":[0,0,7,1]},)"
                     R"("next_mixture":{"a":4,"b":6},"grad_norm":[0.5,0.25,0,1],"expert_loss":[2,null,3,-4],)"
                     R"("domain_loss":{"a":[null,1,3,-4],"b":[2,null,null,0.5]},)"
                     R"("latency":[0.001,0,0,0],"loss":-0.25,"tag":"validation","epoch":3})"
                     "\r\n");
  LogReader reader(path);
  EXPECT_FALSE(reader.header().is_run);
  EXPECT_EQ(reader.header().layers, 2);
  EXPECT_EQ(reader.header().experts, 4);
  EXPECT_EQ(reader.header().top_k, 2);
  const auto record = reader.next();
  ASSERT_TRUE(record);
  EXPECT_EQ(record->line, 3);
  EXPECT_EQ(record->step, 7);
  EXPECT_EQ(record->layer, 1);
  EXPECT_EQ(record->tag, "validation");
  EXPECT_EQ(record->loss, -0.25);
  EXPECT_EQ(record->next_mixture, (std::map<std::string, std::int64_t>{{"a", 4}, {"b", 6}}));
  EXPECT_EQ(record->domains, (std::vector<std::string>{"a", "b"}));
  const RoutingStats& stats = record->stats;
  EXPECT_TRUE(stats.valid());
  EXPECT_EQ(stats.tokens(), 10);
  EXPECT_THAT(counts_of(*record), ElementsAre(5, 6, 7, 2));
  EXPECT_TRUE(stats.has_sequences());
  EXPECT_EQ(stats.scalar(RoutingStats::kSequences), 2);
  EXPECT_EQ(stats.scalar(RoutingStats::kSequenceLenSq), 200);
  EXPECT_THAT(stats.array(RoutingStats::kSequenceSq), ElementsAre(13, 18, 25, 2));
  EXPECT_THAT(stats.array(RoutingStats::kSequenceCross), ElementsAre(50, 60, 70, 20));
  EXPECT_EQ(stats.mean_gap(), 0.15);
  EXPECT_TRUE(stats.has_probabilities());
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kProbSum)[3]), 2.5);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kSqrtProbSum)[0]), 5);
  EXPECT_EQ(from_fixed(stats.scalar(RoutingStats::kTokenEntropySum)), 13.5);
  EXPECT_EQ(stats.dropped(), 3);
  EXPECT_TRUE(stats.has_domains());
  EXPECT_THAT(stats.domain_counts(0), ElementsAre(0, 0, 7, 1));
  EXPECT_THAT(stats.domain_counts(1), ElementsAre(5, 6, 0, 1));
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kGradNormSum)[1]), 0.25);
  EXPECT_EQ(stats.scalar(RoutingStats::kGradRecords), 1);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kExpertLossSum)[2]), 21);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kExpertLossSum)[3]), -8);
  EXPECT_THAT(stats.array(RoutingStats::kExpertLossTokens), ElementsAre(5, 0, 7, 2));
  EXPECT_THAT(stats.array(RoutingStats::kDomainLossTokens), ElementsAre(0, 0, 7, 1, 5, 0, 0, 1));
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kDomainLossSum)[2]), 21);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kDomainLossSum)[3]), -4);
  EXPECT_EQ(from_fixed(stats.array(RoutingStats::kDomainLossSum)[4]), 10);
  EXPECT_EQ(stats.scalar(RoutingStats::kLatencyRecords), 1);
  EXPECT_FALSE(reader.next());
}

TEST(LogReader, TakesFilesWithoutHeaderAndEmptyOnes) {
  const TempDir dir;
  const auto records =
      read_all(dir.write("t", R"({"step":0,"layer":3,"tokens":1,"top_k":1,"counts":[1,0]})"));
  ASSERT_EQ(records.size(), 1U);
  EXPECT_EQ(records[0].layer, 3);
  EXPECT_EQ(records[0].tag, "train");
  EXPECT_FALSE(records[0].stats.has_sequences());
  EXPECT_FALSE(records[0].stats.mean_gap());
  EXPECT_TRUE(read_all(dir.write("empty", "")).empty());
  EXPECT_TRUE(read_all(dir.write("blank", "\n\n \t\n")).empty());
}

TEST(LogReader, GzipIsKnownByItsContent) {
  const TempDir dir;
  const std::string a =
      std::string(kHeader) + "\n" + R"({"step":0,"layer":0,"tokens":1,"counts":[1,1,0,0]})" + "\n";
  const std::string b = R"({"step":1,"layer":0,"tokens":1,"counts":[0,0,1,1]})"
                        "\n";
  write_gzip(dir.path("named.txt"), a);
  write_gzip(dir.path("named.txt"), b, "ab");  // a second member, as after a restart
  const auto records = read_all(dir.path("named.txt"));
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[1].step, 1);
  EXPECT_EQ(records[1].stats.top_k(), 2);
  EXPECT_EQ(records[1].line, 3);

  const std::string bytes = TempDir::read(dir.path("named.txt"));
  const std::string cut = dir.write("cut.gz", bytes.substr(0, bytes.size() - 9));
  EXPECT_THAT([&] { read_all(cut); },
              ::testing::ThrowsMessage<LogError>(HasSubstr("gzip: unexpected end of file")));
}

TEST(LogReader, LinesLongerThanTheFirstBuffer) {
  const TempDir dir;
  std::string counts;
  for (int i = 0; i < 65536; ++i) counts += (i ? ",1000" : "1000");
  const std::string line = R"({"layer":0,"tokens":65536000,"top_k":1,"counts":[)" + counts + "],\"step\":";
  const auto records = read_all(dir.write("t", line + "0}\n" + line + "1}"));
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[1].stats.experts(), 65536);
  EXPECT_EQ(records[1].stats.assignments(), 65536000);
}

struct WrongLine {
  const char* name;
  std::string text;
  std::string message;  // after "FILE:"
};
void PrintTo(const WrongLine& wrong, std::ostream* out) {
  *out << wrong.name;
}

class WrongTrace : public ::testing::TestWithParam<WrongLine> {};

TEST_P(WrongTrace, NamesLineFieldValueAndConstraint) {
  const TempDir dir;
  const std::string path = dir.write("t.jsonl", GetParam().text);
  try {
    read_all(path);
    FAIL() << "accepted";
  } catch (const LogError& e) {
    const std::string what = e.what();
    EXPECT_EQ(what.substr(0, path.size() + 1), path + ":");
    EXPECT_EQ(what.substr(path.size() + 1, GetParam().message.size()), GetParam().message);
  }
}

std::string record(const std::string& fields) {
  return std::string(kHeader) + "\n{\"step\":0,\"layer\":0,\"tokens\":3" + fields + "}\n";
}

INSTANTIATE_TEST_SUITE_P(
    Table, WrongTrace,
    ::testing::Values(
        WrongLine{"NotJson", "step 0\n", "1: line: not JSON: "},
        WrongLine{"Torn", std::string(kHeader) + "\n{\"step\":0,\"lay", "2: line: not JSON: "},
        WrongLine{"NaN", record(R"(,"counts":[1,1,1,1],"loss":NaN)"), "2: line: not JSON: "},
        WrongLine{"NotAnObject", "[1]\n", "1: line: [1]: must be a JSON object"},
        WrongLine{"OtherFormat", R"({"format":"x","version":1})",
                  "1: format: \"x\": must be moectl-trace or moectl-run"},
        WrongLine{"OtherVersion", R"({"format":"moectl-trace","version":2})",
                  "1: version: 2: must be 1, the only version there is"},
        WrongLine{"NoVersion", R"({"format":"moectl-trace"})", "1: version: missing: required"},
        WrongLine{"HeaderTopK", R"({"format":"moectl-trace","version":1,"experts":2,"top_k":3})",
                  "1: top_k: 3: must be at most experts (2)"},
        WrongLine{"RunWithoutConfig", R"({"format":"moectl-run","version":1})",
                  "1: config: missing: required"},
        WrongLine{"Joined", std::string(kHeader) + "\n" + kHeader,
                  "2: format: \"moectl-trace\": must stand in the first line: two files were joined here"},
        WrongLine{"NoStep", R"({"layer":0})", "1: step: missing: required"},
        WrongLine{"NegativeStep", R"({"step":-1})", "1: step: -1: must be at least 0"},
        WrongLine{"NoCounts", record(""), "2: counts: missing: required"},
        WrongLine{"NoTopK", R"({"step":0,"layer":0,"tokens":3,"counts":[1]})",
                  "1: top_k: missing: required where the first line does not give it"},
        WrongLine{"FewerExpertsThanTheFirstLineChooses",
                  std::string(R"({"format":"moectl-trace","version":1,"top_k":3})") + "\n" +
                      R"({"step":0,"layer":0,"tokens":3,"counts":[1,2]})",
                  "2: counts: 2 values: must be at least top_k (3)"},
        WrongLine{"TopKAboveExperts", R"({"step":0,"layer":0,"tokens":3,"top_k":2,"counts":[1]})",
                  "1: top_k: 2: must be at most 1"},
        WrongLine{"OtherTopK", record(R"(,"top_k":1,"counts":[1,1,1,1])"),
                  "2: top_k: 1: must be 2, as the first line says"},
        WrongLine{"LayerAbove",
                  std::string(kHeader) + "\n" + R"({"step":0,"layer":0,"tokens":1,"counts":[0,0,0,0]})" +
                      "\n" + R"({"step":0,"layer":9,"tokens":1,"counts":[0,0,0,0]})" + "\n" +
                      R"({"step":0,"layer":2,"tokens":1,"counts":[0,0,0,0]})",
                  "4: layer: 2: must be one of 2, as many as the first line says"},
        WrongLine{"NullLayer", std::string(kHeader) + "\n" + R"({"step":0,"layer":null})",
                  "2: layer: null: must be a whole number"},
        WrongLine{"TooManyExperts", record(R"(,"counts":[1,1,1,1,0])"),
                  "2: counts: 5 values: must have 4, one for each expert"},
        WrongLine{"SumAbove", record(R"(,"counts":[4,1,1,1])"),
                  "2: counts: sum 7: must be at most tokens * top_k (6)"},
        WrongLine{"Negative", record(R"(,"counts":[1,-1,1,1])"), "2: counts[1]: -1: must be at least 0"},
        WrongLine{"Fraction", record(R"(,"counts":[1,1.5,1,1])"),
                  "2: counts[1]: 1.5: must be a whole number"},
        WrongLine{"Exponent", record(R"(,"counts":[1,15e-1,1,1])"),
                  "2: counts[1]: 1.5: must be a whole number"},
        WrongLine{"String", record(R"(,"counts":[1,"1",1,1])"),
                  "2: counts[1]: \"1\": must be a whole number"},
        WrongLine{"Null", record(R"(,"counts":[1,null,1,1])"), "2: counts[1]: null: must be a whole number"},
        WrongLine{"Huge", record(R"(,"counts":[1,9007199254740993,1,1])"),
                  "2: counts[1]: 9007199254740993: must be at most 2^53"},
        WrongLine{"Huger", record(R"(,"counts":[1,18446744073709551615,1,1])"),
                  "2: counts[1]: 18446744073709551615: must be at most 2^53"},
        WrongLine{"CountsNotAnArray", record(R"(,"counts":3)"), "2: counts: 3: must be an array"},
        WrongLine{"NegativeTokens",
                  std::string(kHeader) + "\n" + R"({"step":0,"layer":0,"tokens":-3,"counts":[]})",
                  "2: tokens: -3: must be at least 0"},
        WrongLine{"Repeated",
                  std::string(kHeader) + "\n" + R"({"step":4,"layer":0,"tokens":1,"counts":[0,0,0,0]})" +
                      "\n" + R"({"step":2,"layer":0,"tokens":1,"counts":[0,0,0,0]})" + "\n" +
                      R"({"step":4,"layer":0,"tokens":1,"counts":[0,0,0,0],"tag":"validation"})" + "\n" +
                      R"({"step":4,"layer":1,"tokens":1,"counts":[0,0,0,0]})" + "\n" +
                      R"({"step":2,"layer":0,"tokens":1,"counts":[0,0,0,0],"tag":"train"})",
                  "6: step: 2: repeated for layer 0, tag train"},
        WrongLine{"RepeatedInOrder",
                  std::string(kHeader) + "\n" + R"({"step":4,"layer":0,"tokens":1,"counts":[0,0,0,0]})" +
                      "\n" + R"({"step":4,"layer":0,"tokens":1,"counts":[0,0,0,0]})",
                  "3: step: 4: repeated for layer 0, tag train"},
        WrongLine{"PartialSequences", record(R"(,"counts":[1,1,1,1],"sequences":2)"),
                  "2: sequence_sq: missing: required with sequences"},
        WrongLine{"PartialProbabilities", record(R"(,"counts":[1,1,1,1],"prob_sum":[1,1,1,0])"),
                  "2: sqrt_prob_sum: missing: required with prob_sum"},
        WrongLine{"MarginsShort", record(R"(,"counts":[1,1,1,1],"margins":[[0],[0],[0]])"),
                  "2: margins: 3 values: must have 4, one for each expert"},
        WrongLine{"MarginsBeyondTheLastBin",
                  record(R"(,"counts":[1,1,1,1],"margins":[[127,1,1],[0],[0],[0]])"),
                  "2: margins[0]: [127,1,1]: must end by bin 127"},
        WrongLine{"MarginsOfFewerTokens",
                  record(R"(,"counts":[1,1,1,1],"margins":[[64,3],[60,1,1],[0],[0]])"),
                  "2: margins[1]: [60,1,1]: must sum to tokens (3)"},
        WrongLine{"PairsShort", record(R"(,"counts":[1,1,1,1],"pairs":[[],[],[]])"),
                  "2: pairs: 3 values: must have 4, one for each expert"},
        WrongLine{"PairsNotArrays", record(R"(,"counts":[1,1,1,1],"pairs":[3,[],[],[]])"),
                  "2: pairs[0]: 3: must be an array: an expert behind this one, counts"},
        WrongLine{"PairWithItself", record(R"(,"counts":[1,1,1,1],"pairs":[[],[1,1],[],[]])"),
                  "2: pairs[1][0]: 1: must be at least 2"},
        WrongLine{"PairOfTheLast", record(R"(,"counts":[1,1,1,1],"pairs":[[],[],[],[3,1]])"),
                  "2: pairs[3]: [3,1]: must be empty: no expert is behind the last"},
        WrongLine{"PairsBeyondTheLast", record(R"(,"counts":[1,1,1,1],"pairs":[[],[2,1,1,1],[],[]])"),
                  "2: pairs[1]: [2,1,1,1]: must end by expert 3"},
        WrongLine{"PairsOfMoreTokens", record(R"(,"counts":[2,1,1,0],"pairs":[[1,2],[],[],[]])"),
                  "2: pairs[0][1]: 2: must be at most 1"},
        WrongLine{"GapNegative", record(R"(,"counts":[1,1,1,1],"gap_sum":-1)"),
                  "2: gap_sum: -1: must be at least 0"},
        WrongLine{"GapHuge", record(R"(,"counts":[1,1,1,1],"gap_sum":1e12)"),
                  "2: gap_sum: 1000000000000.0: must be at most 5.4e11"},
        WrongLine{"GapOverflow", record(R"(,"counts":[1,1,1,1],"gap_sum":1e999)"), "2: line: not JSON: "},
        WrongLine{"DroppedAbove", record(R"(,"counts":[1,1,1,1],"dropped":5)"),
                  "2: dropped: 5: must be at most 4"},
        WrongLine{"DomainAbove",
                  record(R"(,"counts":[1,1,1,1],"domain_counts":{"a":[1,0,0,0],"b":[1,0,0,0]})"),
                  "2: domain_counts.b[0]: 1: must not sum over domains above counts[0] (1)"},
        WrongLine{"DomainLength", record(R"(,"counts":[1,1,1,1],"domain_counts":{"a":[1]})"),
                  "2: domain_counts.a: 1 values: must have 4, one for each expert"},
        WrongLine{"DomainLossAlone", record(R"(,"counts":[1,1,1,1],"domain_loss":{"a":[1,1,1,1]})"),
                  "2: domain_counts: missing: required with domain_loss"},
        WrongLine{
            "DomainLossUnknown",
            record(R"(,"counts":[1,1,1,1],"domain_counts":{"a":[1,0,0,0]},"domain_loss":{"b":[1,1,1,1]})"),
            "2: domain_loss.b: unknown: must be in domain_counts"},
        WrongLine{
            "DomainLossWord",
            record(R"(,"counts":[1,1,1,1],"domain_counts":{"a":[1,0,0,0]},"domain_loss":{"a":[1,"x",1,1]})"),
            "2: domain_loss.a[1]: \"x\": must be a number"},
        WrongLine{"ExpertLossHuge", record(R"(,"counts":[1,1,1,1],"expert_loss":[1,-4e11,1,1])"),
                  "2: expert_loss[1]: -400000000000.0: must be at most 2.7e11 in sum over its tokens"},
        WrongLine{"Mixture", record(R"(,"counts":[1,1,1,1],"next_mixture":{"a":-1})"),
                  "2: next_mixture.a: -1: must be at least 0"},
        WrongLine{"Loss", record(R"(,"counts":[1,1,1,1],"loss":"low")"),
                  "2: loss: \"low\": must be a number"},
        WrongLine{"Tag", record(R"(,"counts":[1,1,1,1],"tag":1)"), "2: tag: 1: must be a word in quotes"},
        WrongLine{"GradNorm", record(R"(,"counts":[1,1,1,1],"grad_norm":[1,1,1])"),
                  "2: grad_norm: 3 values: must have 4, one for each expert"}),
    [](const ::testing::TestParamInfo<WrongLine>& info) { return info.param.name; });

TEST(LogReader, SumsThatWouldOverflowAreRefused) {
  const TempDir dir;
  std::string counts = "9007199254740992";
  for (int i = 0; i < 2047; ++i) counts += ",9007199254740992";
  const std::string path = dir.write(
      "t", R"({"step":0,"layer":0,"tokens":9007199254740992,"top_k":2048,"counts":[)" + counts + "]}");
  EXPECT_THAT([&] { read_all(path); },
              ::testing::ThrowsMessage<LogError>(HasSubstr(":1: counts: the sum is beyond its range")));
}

TEST(LogReader, SalvageReadsValidRecordsAndReportsTheRest) {
  const TempDir dir;
  const auto line = [](int step, const char* counts) {
    return "{\"step\":" + std::to_string(step) + ",\"layer\":0,\"tokens\":2,\"counts\":" + counts + "}\n";
  };
  const std::string path =
      dir.write("t.jsonl", R"({"format":"moectl-trace","version":3,"layers":1,"experts":4,"top_k":2})"
                           "\n" +
                               line(0, "[1,1,1,1]") + "garbage\n" + line(5, "[9,9,9,9]") +
                               line(6, "[1,1,1,1]") +  // a hole: 1 to 5
                               R"({"format":"moectl-trace","version":3,"layers":1,"experts":4,"top_k":2})"
                               "\n" +
                               line(0, "[2,0,1,1]") + line(7, "[0,2,1,1]") + "{\"step\":8,\"lay");
  LogReader reader(path, FaultPolicy::kSalvage);
  std::vector<std::int64_t> steps;
  while (const auto record = reader.next()) steps.push_back(record->step);
  EXPECT_THAT(steps, ElementsAre(0, 6, 7));
  EXPECT_EQ(reader.fault_count(), 6);
  ASSERT_EQ(reader.faults().size(), 6U);
  const char* said[] = {":1: version: 3: must be 1",    ":3: line: not JSON",    ":4: counts: sum 36",
                        ":6: format: \"moectl-trace\"", ":7: step: 0: repeated", ":9: line: not JSON"};
  for (std::size_t i = 0; i < 6; ++i) EXPECT_THAT(reader.faults()[i], HasSubstr(said[i]));
  EXPECT_THAT(reader.faults()[5], HasSubstr("(the file ends within this line)"));
  EXPECT_THAT(reader.faults()[3], HasSubstr("the same run goes on"));

  write_gzip(dir.path("t.gz"), std::string(kHeader) + "\n" + line(0, "[1,1,1,1]"));
  const std::string bytes = TempDir::read(dir.path("t.gz"));
  LogReader cut(dir.write("cut.gz", bytes.substr(0, bytes.size() - 8)), FaultPolicy::kSalvage);
  int read = 0;
  while (cut.next()) ++read;
  EXPECT_LE(read, 1);
  EXPECT_EQ(cut.fault_count(), 1);
  EXPECT_FALSE(cut.next());  // and does not go round for ever
}

std::vector<std::int64_t> steps_of(const std::string& path, FaultPolicy fault_policy,
                                   std::vector<std::string>* faults) {
  LogReader reader(path, fault_policy);
  std::vector<std::int64_t> steps;
  while (const auto record = reader.next()) steps.push_back(record->step);
  *faults = reader.faults();
  return steps;
}

std::string made_line(int step, const char* counts = "[1,1,1,1]") {
  return "{\"step\":" + std::to_string(step) + ",\"layer\":0,\"tokens\":2,\"top_k\":2,\"counts\":" + counts +
         "}\n";
}

// Damage happens to files; a record that is whole and cannot be true is its writer's.
TEST(LogReader, RepairSkipsDamageButNotWrongRecords) {
  const TempDir dir;
  std::vector<std::string> faults;
  const std::string torn = dir.write("torn", made_line(0) + std::string(3, '\0') + "\n" + made_line(1) +
                                                 "[]\n" + made_line(2).substr(0, 30));
  EXPECT_THAT(steps_of(torn, FaultPolicy::kRepair, &faults), ElementsAre(0, 1));
  EXPECT_THAT(faults, ElementsAre(HasSubstr("torn:2: line: not JSON"), HasSubstr("torn:4: line: []: must be"),
                                  HasSubstr("torn:5: line: not JSON")));
  for (const std::string& wrong :
       {made_line(1, "[9,9,9,9]"), made_line(1, "[-1,1,1,1]"), made_line(1, "[1.5,1,1,1]"), made_line(0)}) {
    const std::string path = dir.write("wrong", made_line(0) + "torn\n" + wrong + made_line(2));
    EXPECT_THAT([&] { steps_of(path, FaultPolicy::kRepair, &faults); },
                ::testing::ThrowsMessage<LogError>(HasSubstr("wrong:3: ")));
    EXPECT_THAT(steps_of(path, FaultPolicy::kSalvage, &faults), ElementsAre(0, 2));
    EXPECT_EQ(faults.size(), 2U);
  }
  // Another version may form its records otherwise: then none of them is called wrong.
  const std::string later = dir.write("later", "{\"format\":\"moectl-trace\",\"version\":2}\n" +
                                                   made_line(0) + "{\"time\":1}\n" + made_line(2));
  EXPECT_THAT(steps_of(later, FaultPolicy::kRepair, &faults), ElementsAre(0, 2));
  EXPECT_THAT(faults, ElementsAre(HasSubstr("later:1: version: 2"), HasSubstr("later:3: step: missing")));
}

TEST(LogReader, ASecondRunIsReadOnIfItIsTheSameAndPassedOverIfNot) {
  const TempDir dir;
  std::vector<std::string> faults;
  const std::string header = std::string(kHeader) + "\n";
  const std::string again =
      dir.write("again", header + made_line(0) + made_line(1) + header + made_line(1) + made_line(2));
  EXPECT_THAT(steps_of(again, FaultPolicy::kRepair, &faults), ElementsAre(0, 1, 2));
  EXPECT_THAT(faults, ElementsAre(HasSubstr("again:4: format: \"moectl-trace\""),
                                  HasSubstr("again:5: step: 1: repeated")));
  const std::string other = dir.write(
      "other", header + made_line(0) + "{\"format\":\"moectl-trace\",\"version\":1,\"layers\":9}\n" +
                   made_line(1) + made_line(2));
  EXPECT_THAT(steps_of(other, FaultPolicy::kSalvage, &faults), ElementsAre(0));
  EXPECT_THAT(faults, ElementsAre(HasSubstr("another run begins, lines 3 to 5 are not of this one")));
  EXPECT_THAT([&] { steps_of(other, FaultPolicy::kStrict, &faults); },
              ::testing::ThrowsMessage<LogError>(HasSubstr("other:3: format: ")));
}

TEST(LogReader, HolesAreSaidOnceTheirSpacingIsKnown) {
  const TempDir dir;
  std::vector<std::string> faults;
  std::string text;
  for (int step = 0; step <= 200; step += 10) {
    if (step < 120 || step > 150) text += made_line(step);
  }
  EXPECT_EQ(steps_of(dir.write("t", text), FaultPolicy::kRepair, &faults).size(), 17U);
  EXPECT_THAT(faults, ElementsAre("missing: " + dir.path("t") + ":13: steps 120 to 150"));
  EXPECT_EQ(steps_of(dir.path("t"), FaultPolicy::kStrict, &faults).size(), 17U);  // a trace may skip
  EXPECT_THAT(faults, ElementsAre());
  // Sampled as it pleased its writer.
  text.clear();
  for (const int step : {0, 1, 2, 5, 6, 7, 12, 13, 30, 31, 32, 33}) text += made_line(step);
  steps_of(dir.write("t", text), FaultPolicy::kRepair, &faults);
  EXPECT_THAT(faults, ElementsAre());
}

TEST(LogReader, FilesThatCannotBeOpened) {
  EXPECT_THAT(
      [] { LogReader("/nonexistent.jsonl"); },
      ::testing::ThrowsMessage<LogError>("/nonexistent.jsonl: cannot be opened: No such file or directory"));
  EXPECT_THAT([] { LogReader("/"); },
              ::testing::ThrowsMessage<LogError>("/: cannot be opened: is a directory"));
}

// Whatever the bytes, the reader answers with records or a LogError.
TEST(LogReader, MutatedTracesAreReadOrRefused) {
  const TempDir dir;
  const std::string good =
      std::string(kHeader) + "\n" +
      R"({"step":0,"layer":0,"tokens":3,"counts":[1,2,3,0],"loss":1.5,"dropped":1,"gap_sum":0.5})" + "\n" +
      R"({"step":0,"layer":1,"tokens":3,"counts":[1,2,3,0],"domain_counts":{"a":[1,2,3,0]}})" + "\n";
  std::mt19937_64 random(7);
  int read = 0, refused = 0;
  for (int i = 0; i < 2000; ++i) {
    std::string text = good;
    const std::size_t at = random() % text.size();
    switch (random() % 3) {
      case 0:
        text[at] = static_cast<char>(random());
        break;
      case 1:
        text.erase(at, 1 + random() % 5);
        break;
      default:
        text.insert(at, text.substr(random() % text.size(), random() % 9));
    }
    try {
      read_all(dir.write("t", text));
      ++read;
    } catch (const LogError& e) {
      ++refused;
      ASSERT_THAT(e.what(), ::testing::StartsWith(dir.path("t") + ":")) << text;
    }
  }
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 1000);
}

// ---- Writing. ----

ControllerConfig config_of(int layers, int experts, int top_k) {
  ControllerConfig config;
  config.model = {.layers = layers, .experts = experts, .top_k = top_k, .domains = {}, .targets = {}};
  config.expert_bias.limits = default_limits(Actuator::kExpertBias, 0);
  return config;
}

/// A step of `layers` layers with made-up decisions, and the memory it views.
struct MadeStep {
  MadeStep(int layers, const StatsShape& shape, std::uint64_t seed) : random(seed) {
    stats.assign(static_cast<std::size_t>(layers), RoutingStats(shape));
    measured.resize(stats.size());
    bias.assign(stats.size(), std::vector<double>(static_cast<std::size_t>(shape.experts)));
    reports.resize(stats.size());
    refresh();
  }
  void refresh() {
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (std::size_t l = 0; l < stats.size(); ++l) {
      RoutingStats& s = stats[l];
      s.clear();
      std::vector<std::int64_t> counts(static_cast<std::size_t>(s.experts()));
      std::int64_t sum = 0;
      for (auto& c : counts) sum += c = static_cast<std::int64_t>(random() % 1000);
      s.add_counts(counts, sum);
      measured[l] = measure(s);
      for (double& b : bias[l]) b = uniform(random) * std::pow(10, 8 * uniform(random));
      LayerReport& r = reports[l];
      r.layer = static_cast<int>(l);
      r.stats = &s;
      r.metrics = &measured[l];
      r.actuators[0] = {.proposed = bias[l], .applied = bias[l], .reasons = {}};
      r.actuators[0].reasons.add(Reason::kRate);
      r.actuators[0].reasons.add(Reason::kRange);
    }
    report.layers = reports;
  }
  std::mt19937_64 random;
  std::vector<RoutingStats> stats;
  std::vector<Metrics> measured;
  std::vector<std::vector<double>> bias;
  std::vector<LayerReport> reports;
  StepReport report;
};

TEST(RunLogWriter, AWrittenLogReadsBackExactly) {
  const TempDir dir;
  for (const char* name : {"run.jsonl", "run.jsonl.gz"}) {
    const std::string path = dir.path(name);
    const ControllerConfig config = config_of(3, 5, 2);
    std::vector<std::vector<double>> biases;
    std::vector<Metrics> metrics;
    std::vector<std::vector<std::int64_t>> counts;
    MadeStep made(3, {.experts = 5, .top_k = 2, .needs = {}}, 11);
    {
      RunLogWriter writer(path, config, false, 40);
      for (int step = 0; step < 50; ++step) {
        made.refresh();
        made.report.step = step;
        made.report.info.loss = 1.0 / (step + 3);
        writer.write(made.report);
        for (int l = 0; l < 3; ++l) {
          biases.push_back(made.bias[static_cast<std::size_t>(l)]);
          metrics.push_back(made.measured[static_cast<std::size_t>(l)]);
          const auto c = made.stats[static_cast<std::size_t>(l)].counts();
          counts.emplace_back(c.begin(), c.end());
        }
      }
      EXPECT_TRUE(writer.ok());
    }
    LogReader reader(path);
    EXPECT_TRUE(reader.header().is_run);
    EXPECT_EQ(reader.header().layers, 3);
    EXPECT_EQ(reader.header().experts, 5);
    EXPECT_EQ(reader.header().top_k, 2);
    EXPECT_EQ(reader.header().shift, 40);
    EXPECT_EQ(nlohmann::json::parse(*reader.header().config_json), nlohmann::json::parse(to_json(config)));
    std::size_t i = 0;
    while (const auto record = reader.next()) {
      EXPECT_EQ(record->step, static_cast<std::int64_t>(i / 3));
      EXPECT_EQ(record->layer, static_cast<int>(i % 3));
      EXPECT_EQ(record->loss, 1.0 / static_cast<double>(record->step + 3));
      EXPECT_EQ(counts_of(*record), counts[i]);
      const LoggedActuator& bias = record->actuators.at("expert_bias");
      EXPECT_EQ(bias.proposed, biases[i]);
      EXPECT_EQ(bias.applied, biases[i]);
      EXPECT_THAT(bias.reasons, ElementsAre("rate", "range"));
      for (const MetricField& field : metric_fields()) {
        const auto it = record->metrics.find(std::string(field.name));
        const Metrics::Value expected = metrics[i].*field.value;
        ASSERT_EQ(it != record->metrics.end(), expected.has_value()) << field.name;
        if (expected) {
          EXPECT_EQ(it->second, *expected) << field.name;
        }
      }
      ++i;
    }
    EXPECT_EQ(i, 150U);
  }
}

TEST(RunLogWriter, EveryOptionalSumComesBack) {
  const TempDir dir;
  ControllerConfig config = config_of(1, 4, 2);
  config.model.domains = {"z", "a"};
  const StatsShape shape{.experts = 4, .top_k = 2, .needs = every_input()};
  MadeStep made(1, shape, 3);
  RoutingStats& stats = made.stats[0];
  stats.clear();
  const std::vector<std::int64_t> experts = {0, 1, 2, 3, 0, 2, 1, 2};
  const std::vector<float> top = {.5F, .25F, .125F, .5F, .375F, .25F, .75F, .125F, 0, .5F, .25F, .25F};
  const std::vector<float> probabilities = {.5F,  .25F, .125F, .125F, .1F, .2F, .3F, .4F,
                                            .25F, .25F, .25F,  .25F,  0,   .5F, .5F, 0};
  const std::vector<float> scores = {.5F,  .25F,  .125F, 0, .125F, .375F, .5F, .25F,
                                     .75F, .125F, 0,     0, .25F,  .25F,  .5F, 0};
  const std::vector<std::int64_t> domains = {0, 0, 1, 1};
  ASSERT_TRUE(stats.add({.experts = experts,
                         .sequence_length = 2,
                         .top_values = top,
                         .biased_scores = scores,
                         .probabilities = probabilities,
                         .domain_ids = domains,
                         .dropped = 1}));
  ASSERT_TRUE(stats.add_grad_norms(std::vector<double>{1, .5, .25, 0}));
  ASSERT_TRUE(stats.add_latencies(std::vector<double>{1e-3, 2e-3, 0, 0}));
  ASSERT_TRUE(
      stats.add_expert_losses(std::vector<double>{2, -3, 4, 0.5}, std::vector<std::int64_t>{2, 2, 3, 1}));
  ASSERT_TRUE(
      stats.add_domain_losses(0, std::vector<double>{1, 3, -2, 0}, std::vector<std::int64_t>{1, 1, 1, 1}));
  ASSERT_TRUE(
      stats.add_domain_losses(1, std::vector<double>{1, 0, 6, 0}, std::vector<std::int64_t>{1, 1, 2, 0}));
  const std::vector<std::int64_t> mixture = {3, 1};
  made.report.info.next_mixture = mixture;
  const std::string path = dir.path("run.jsonl");
  RunLogWriter(path, config).write(made.report);
  const auto records = read_all(path);
  ASSERT_EQ(records.size(), 1U);
  const RoutingStats& back = records[0].stats;
  EXPECT_EQ(records[0].domains, (std::vector<std::string>{"a", "z"}));
  EXPECT_EQ(records[0].next_mixture, (std::map<std::string, std::int64_t>{{"z", 3}, {"a", 1}}));
  for (int s = 0; s < RoutingStats::kScalarCount; ++s) {
    const auto which = static_cast<RoutingStats::Scalar>(s);
    EXPECT_EQ(back.scalar(which), stats.scalar(which)) << s;
  }
  for (int a = 0; a < RoutingStats::kArrayCount; ++a) {
    const auto which = static_cast<RoutingStats::Array>(a);
    std::vector<std::int64_t> expected(stats.array(which).begin(), stats.array(which).end());
    // A reader sorts domains by name.
    if (expected.size() == 2 * 4) std::rotate(expected.begin(), expected.begin() + 4, expected.end());
    EXPECT_THAT(back.array(which), ::testing::ElementsAreArray(expected)) << a;
  }
}

TEST(RunLogWriter, ModelScopeStandsInARecordWithoutLayer) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  MadeStep made(1, {.experts = 4, .top_k = 2, .needs = {}}, 3);
  const std::vector<double> wanted = {std::numeric_limits<double>::quiet_NaN()}, applied = {0.0125};
  made.report.model[1] = {.proposed = wanted, .applied = applied, .reasons = {}};
  made.report.model[1].reasons.add(Reason::kInvalid);
  RunLogWriter(path, config_of(1, 4, 2)).write(made.report, "validation");
  EXPECT_THAT(TempDir::read(path),
              HasSubstr(R"({"step":0,"layer":null,"tag":"validation","actuators":{"aux_loss_weight":)"
                        R"({"proposed":[null],"applied":[0.0125],"reasons":["invalid"]}}})"));
  const auto records = read_all(path);
  ASSERT_EQ(records.size(), 2U);
  EXPECT_EQ(records[1].layer, -1);
  EXPECT_EQ(records[1].tag, "validation");
  EXPECT_TRUE(std::isnan(records[1].actuators.at("aux_loss_weight").proposed.at(0)));
  EXPECT_EQ(records[1].actuators.at("aux_loss_weight").applied.at(0), 0.0125);
}

TEST(RunLogWriter, TheResponseOfTheLoadComesBack) {
  const TempDir dir;
  MadeStep made(4, {.experts = 4, .top_k = 2, .needs = {}}, 3);
  made.reports[1].responsiveness = {.state = Response::kUnknown};
  made.reports[2].responsiveness = {
      .state = Response::kAnswers, .gain = 0.75, .error = 0.125, .scaled = true};
  made.reports[3].responsiveness = {.state = Response::kUnresponsive, .gain = -40, .error = 2, .late = 3};
  const double temperature = 1;
  made.reports[0].actuators[static_cast<std::size_t>(Actuator::kRouterTemperature)] = {
      .proposed = {},
      .applied = {&temperature, 1},
      .reasons = {},
      .responsiveness = {.state = Response::kAnswers, .gain = 0.5, .error = 0.25}};
  RunLogWriter(dir.path("run.jsonl"), config_of(4, 4, 2)).write(made.report);
  const std::string text = TempDir::read(dir.path("run.jsonl"));
  EXPECT_THAT(text, HasSubstr(R"("responsiveness":{"state":"unknown"})"));
  EXPECT_THAT(
      text,
      HasSubstr(R"("responsiveness":{"state":"answers","gain":0.75,"error":0.125,"slope":"measured"})"));
  EXPECT_THAT(text, HasSubstr(R"("gain":-40,"error":2,"slope":"assumed","late":3})"));
  const auto records = read_all(dir.path("run.jsonl"));
  ASSERT_EQ(records.size(), 4U);
  for (std::size_t l = 0; l < 4; ++l) {
    const Responsiveness &back = records[l].responsiveness, &sent = made.reports[l].responsiveness;
    EXPECT_EQ(back.state, sent.state);
    EXPECT_EQ(back.gain, sent.gain);
    EXPECT_EQ(back.error, sent.error);
    EXPECT_EQ(back.late, sent.late);
    EXPECT_EQ(back.scaled, sent.scaled);
  }
  const Responsiveness& of_temperature = records[0].actuators.at("router_temperature").responsiveness;
  EXPECT_EQ(of_temperature.state, Response::kAnswers);
  EXPECT_EQ(of_temperature.gain, 0.5);
  EXPECT_EQ(of_temperature.error, 0.25);
}

TEST(RunLogWriter, NoticesStandInTheRecordOfTheirLayer) {
  const TempDir dir;
  ControllerConfig config;
  config.model = {.layers = 2, .experts = 4, .top_k = 2};
  LayerReport layers[2];
  layers[1].layer = 1;
  const std::vector<Notice> notices = {
      {.kind = NoticeKind::kInvalid, .layer = 1, .step = 6, .text = "experts[17] = 99: \"out\""},
      {.kind = NoticeKind::kConfig, .layer = -1, .step = 7, .text = "of the model"},
      {.kind = NoticeKind::kFallback, .layer = 1, .step = 7, .text = "held"}};
  StepReport report;
  report.step = 7;
  report.layers = layers;
  report.notices = notices;
  RunLogWriter(dir.path("run.jsonl"), config).write(report);
  std::istringstream lines(TempDir::read(dir.path("run.jsonl")));
  std::vector<nlohmann::json> written;
  for (std::string line; std::getline(lines, line);) written.push_back(nlohmann::json::parse(line));
  ASSERT_EQ(written.size(), 4U);
  EXPECT_FALSE(written[1].contains("notices"));
  EXPECT_EQ(written[2]["notices"][0],
            nlohmann::json({{"kind", "invalid"}, {"step", 6}, {"text", "experts[17] = 99: \"out\""}}));
  EXPECT_EQ(written[2]["notices"][1]["kind"], "fallback");
  EXPECT_TRUE(written[3]["layer"].is_null());
  EXPECT_EQ(written[3]["notices"][0]["text"], "of the model");
}

TEST(RunLogWriter, WithoutPerExpertArraysTheRecordIsShort) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  ControllerConfig config = config_of(1, 256, 8);
  config.log.per_expert = false;
  MadeStep made(1, {.experts = 256, .top_k = 8, .needs = {}}, 3);
  RunLogWriter(path, config).write(made.report);
  const auto records = read_all(path);
  ASSERT_EQ(records.size(), 1U);
  EXPECT_EQ(records[0].stats.experts(), 0);
  EXPECT_EQ(records[0].tokens, made.stats[0].tokens());
  EXPECT_EQ(records[0].metrics.at("load_cv"), *made.measured[0].load_cv);
  EXPECT_TRUE(records[0].actuators.at("expert_bias").applied.empty());
  EXPECT_THAT(records[0].actuators.at("expert_bias").reasons, ElementsAre("rate", "range"));
  const std::string text = TempDir::read(path);
  EXPECT_LT(text.size() - text.find('\n'), 2000U);
}

TEST(RunLogWriter, TheMostAndTheLeastLoadedExpertsWithoutAllOfThem) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  ControllerConfig config = config_of(1, 4, 1);
  config.log.per_expert = false;
  config.log.extremes = 2;
  MadeStep made(1, {.experts = 4, .top_k = 1, .needs = {}}, 3);
  made.stats[0].clear();
  ASSERT_TRUE(made.stats[0].add_counts(std::vector<std::int64_t>{5, 9, 5, 1}, 20));
  RunLogWriter(path, config).write(made.report);
  const std::string text = TempDir::read(path);
  const auto record = nlohmann::json::parse(text.substr(text.find('\n') + 1));
  EXPECT_EQ(record["most_loaded"], nlohmann::json::parse("[[1,9],[0,5]]"));
  EXPECT_EQ(record["least_loaded"], nlohmann::json::parse("[[3,1],[0,5]]"));
  EXPECT_FALSE(record.contains("counts"));
  config.log.extremes = 99;
  RunLogWriter(dir.path("all.jsonl"), config).write(made.report);
  EXPECT_EQ(read_all(dir.path("all.jsonl")).size(), 1U);
}

// Tokens {0, 1}, {1, 0}, {2, 4}, {0, 4}, ten times each, and what is read back is what was written.
TEST(RunLogWriter, PairsReadBackAndThoseWithTheLargestLiftAreNamed) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  ControllerConfig config = config_of(1, 5, 2);
  config.log.extremes = 2;
  MadeStep made(1, {.experts = 5, .top_k = 2, .needs = {.pairs = true}}, 3);
  made.stats[0].clear();
  const std::vector<std::int64_t> tokens = {0, 1, 1, 0, 2, 4, 0, 4};
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(made.stats[0].add({.experts = tokens}));
  RunLogWriter(path, config).write(made.report);
  const std::string text = TempDir::read(path);
  const auto record = nlohmann::json::parse(text.substr(text.find('\n') + 1));
  EXPECT_EQ(record["pairs"], nlohmann::json::parse("[[1,20,0,0,10],[],[4,10],[],[]]"));
  EXPECT_EQ(record["most_paired"], nlohmann::json::parse("[[0,1,20],[0,4,10]]"));
  const auto records = read_all(path);
  ASSERT_EQ(records.size(), 1U);
  EXPECT_TRUE(std::ranges::equal(records[0].stats.array(RoutingStats::kPairs),
                                 made.stats[0].array(RoutingStats::kPairs)));
  EXPECT_TRUE(records[0].stats.has_pairs());
}

TEST(RunLogWriter, AnInvalidStepCanStillBeRead) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  MadeStep made(1, {.experts = 4, .top_k = 2, .needs = {}}, 3);
  made.stats[0].add_counts(std::vector<std::int64_t>{-1, 0, 0, 0}, 1);
  made.stats[0].set_scalar(RoutingStats::kTokens, -5);
  ASSERT_FALSE(made.stats[0].valid());
  made.measured[0] = Metrics();
  made.report.info.loss = std::numeric_limits<double>::infinity();
  RunLogWriter(path, config_of(1, 4, 2)).write(made.report);
  const auto records = read_all(path);
  ASSERT_EQ(records.size(), 1U);
  EXPECT_EQ(records[0].tokens, 0);
  EXPECT_FALSE(records[0].loss);
  EXPECT_TRUE(records[0].metrics.empty());
}

// A run that was killed at step 7, 3 steps after its last checkpoint, and in the middle of a line.
TEST(RunLogWriter, AppendContinuesAsIfTheRunHadNeverStopped) {
  for (const char* name : {"run.jsonl", "run.jsonl.gz"}) {
    const TempDir dir;
    const ControllerConfig config = config_of(2, 4, 2);
    const auto steps = [&](const std::string& path, int from, int to, bool append) {
      RunLogWriter writer(path, config, append);
      for (int step = from; step < to; ++step) {
        MadeStep made(2, {.experts = 4, .top_k = 2, .needs = {}}, static_cast<std::uint64_t>(step));
        made.report.step = step;
        writer.write(made.report);
        if (step == 3) writer.write(made.report, "validation");
      }
      EXPECT_TRUE(writer.ok());
    };
    const std::string whole = dir.path(std::string("whole.") + name), parts = dir.path(name);
    steps(whole, 0, 12, false);
    steps(parts, 0, 8, true);  // appending to what is not there begins it
    const auto bytes = std::filesystem::file_size(parts);
    std::filesystem::resize_file(parts, bytes - 25);
    steps(parts, 5, 12, true);
    const auto a = read_all(whole), b = read_all(parts);
    ASSERT_EQ(a.size(), b.size()) << name;
    for (std::size_t i = 0; i < a.size(); ++i) {
      EXPECT_EQ(a[i].step, b[i].step);
      EXPECT_EQ(a[i].tag, b[i].tag);
      EXPECT_EQ(a[i].metrics, b[i].metrics);
    }
    if (parts.ends_with(".jsonl")) {
      EXPECT_EQ(TempDir::read(whole), TempDir::read(parts));
    }
  }
}

/// Writes made steps, rotated to pieces of about two and a half.
void write_rotated(const std::string& path, int from, int to, bool append, std::int64_t keep = 0) {
  ControllerConfig config = config_of(2, 4, 2);
  config.log.rotate_mb = 0.012;
  config.log.keep = keep;
  RunLogWriter writer(path, config, append);
  for (int step = from; step < to; ++step) {
    MadeStep made(2, {.experts = 4, .top_k = 2, .needs = {}}, static_cast<std::uint64_t>(step));
    made.report.step = step;
    writer.write(made.report);
  }
  EXPECT_TRUE(writer.ok());
}

/// The number of the piece that stands under the log's own name.
std::int64_t last_piece(const std::string& path) {
  LogReader reader(path);
  while (reader.next()) continue;
  return reader.header().piece;
}

TEST(RunLogWriter, RotatesBySizeIntoPiecesThatReadAsOneLog) {
  for (const char* name : {"run.jsonl", "run.jsonl.gz"}) {
    const TempDir dir;
    const std::string path = dir.path(name);
    write_rotated(path, 0, 30, false);
    std::int64_t pieces = 0;
    while (std::filesystem::exists(piece_path(path, pieces + 1))) {
      ++pieces;
      // Each is a log by itself, and says which piece it is.
      LogReader piece(piece_path(path, pieces), FaultPolicy::kRepair);
      EXPECT_EQ(piece.header().layers, 2);
      if (path.ends_with(".jsonl")) {
        EXPECT_LE(std::filesystem::file_size(piece_path(path, pieces)), 12000U);
      }
    }
    EXPECT_GE(pieces, 4) << name;
    EXPECT_FALSE(std::filesystem::exists(path + ".part"));
    LogReader whole(path);
    EXPECT_EQ(whole.header().piece, 1);
    std::vector<std::int64_t> steps;
    while (const auto record = whole.next()) {
      if (record->layer == 0) steps.push_back(record->step);
    }
    EXPECT_EQ(whole.header().piece, pieces + 1);
    ASSERT_EQ(steps.size(), 30U) << name;
    for (std::size_t i = 0; i < steps.size(); ++i) EXPECT_EQ(steps[i], static_cast<std::int64_t>(i));
    EXPECT_EQ(whole.fault_count(), 0);

    // A piece that is gone is said, and so is what is missing for it.
    std::filesystem::remove(piece_path(path, 1));
    std::vector<std::string> faults;
    EXPECT_LT(steps_of(path, FaultPolicy::kRepair, &faults).size(), 60U);
    EXPECT_THAT(faults, ElementsAre("missing: " + path + ": piece 1 of the log"));
  }
}

TEST(RunLogWriter, KeepsAsManyFinishedPiecesAsAsked) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  write_rotated(path, 0, 40, false, 2);
  const std::int64_t last = last_piece(path);
  ASSERT_GE(last, 5);
  for (std::int64_t piece = 1; piece < last; ++piece) {
    EXPECT_EQ(std::filesystem::exists(piece_path(path, piece)), piece >= last - 2) << piece;
  }
}

// A run killed in one piece and resumed from a checkpoint in an earlier one gives the files of a run that was not.
TEST(RunLogWriter, AResumedRotatedLogHasTheSamePieces) {
  for (const char* name : {"run.jsonl", "run.jsonl.gz"}) {
    const TempDir whole, parts;
    write_rotated(whole.path(name), 0, 30, false);
    write_rotated(parts.path(name), 0, 23, true);
    write_rotated(parts.path(name), 7, 30, true);
    const std::int64_t last = last_piece(whole.path(name));
    EXPECT_GE(last, 5);
    EXPECT_EQ(last_piece(parts.path(name)), last) << name;
    for (std::int64_t piece = 1; piece <= last; ++piece) {
      const auto file = [&](const TempDir& dir) {
        return piece == last ? dir.path(name) : piece_path(dir.path(name), piece);
      };
      const auto a = read_all(file(whole)), b = read_all(file(parts));
      ASSERT_EQ(a.size(), b.size()) << name << piece;
      for (std::size_t i = 0; i < a.size(); ++i) EXPECT_EQ(a[i].step, b[i].step);
      if (std::string_view(name) == "run.jsonl") {
        EXPECT_EQ(TempDir::read(file(whole)), TempDir::read(file(parts)));
      }
    }
  }
}

// Where the next piece, and the shortened log of a resumed run, are written, a link may have been planted.
TEST(RunLogWriter, APlantedLinkIsNotFollowed) {
  for (const char* name : {"run.jsonl", "run.jsonl.gz"}) {
    const TempDir dir;
    dir.write("victim", "precious");
    const auto plant = [&] {
      std::filesystem::create_symlink(dir.path("victim"), dir.path(std::string(name) + ".part"));
    };
    plant();
    write_rotated(dir.path(name), 0, 23, true);
    EXPECT_GE(last_piece(dir.path(name)), 2);
    if (std::string_view(name) == "run.jsonl.gz") plant();
    write_rotated(dir.path(name), 7, 30, true);
    EXPECT_EQ(TempDir::read(dir.path("victim")), "precious") << name;
    EXPECT_FALSE(std::filesystem::is_symlink(dir.path(name))) << name;
  }
}

TEST(RunLogWriter, AFailedRotationIsReportedOnceAndKeepsTheLog) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  std::filesystem::create_directory(path + ".part");  // stands where the next piece would be begun
  ControllerConfig config = config_of(2, 4, 2);
  config.log.rotate_mb = 0.004;
  MadeStep made(2, {.experts = 4, .top_k = 2, .needs = {}}, 1);
  ::testing::internal::CaptureStderr();
  RunLogWriter writer(path, config);
  for (int step = 0; step < 20; ++step) {
    made.report.step = step;
    EXPECT_NO_THROW(writer.write(made.report));
  }
  EXPECT_FALSE(writer.ok());
  const std::string said = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(said, "moectl: " + path + ": run log cannot be written (Is a directory); going on without it\n");
  EXPECT_GE(read_all(path).size(), 2U);
}

TEST(RunLogWriter, DoesNotAllocateInTheSteadyState) {
  const TempDir dir;
  for (const char* name : {"run.jsonl", "run.jsonl.gz"}) {
    ControllerConfig config = config_of(4, 64, 8);
    config.log.extremes = 8;
    RunLogWriter writer(dir.path(name), config);
    MadeStep made(4, {.experts = 64, .top_k = 8, .needs = {.pairs = true}}, 1);
    std::vector<std::int64_t> experts;
    for (std::int64_t token = 0; token < 2048; ++token) {
      for (std::int64_t j = 0; j < 8; ++j) experts.push_back((token * token + 5 * j) % 64);
    }
    made.stats[0].clear();
    ASSERT_TRUE(made.stats[0].add({.experts = experts}));
    ASSERT_TRUE(largest_pair_lift(made.stats[0]));
    writer.write(made.report);
    for (int step = 1; step < 20; ++step) {
      made.refresh();
      made.stats[0].clear();
      made.stats[0].add({.experts = experts});
      made.report.step = step;
      const std::int64_t allocated = testing::allocations_of([&] { writer.write(made.report); });
      // The numbers of one step may take a few more characters than those of all before it.
      if (step > 3) {
        EXPECT_EQ(allocated, 0) << step;
      }
    }
  }
}

TEST(RunLogWriter, AFullDiskIsReportedOnceAndNeverStopsTraining) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  MadeStep made(2, {.experts = 4, .top_k = 2, .needs = {}}, 1);
  ::testing::internal::CaptureStderr();
  {
    RunLogWriter writer("/dev/full", config_of(2, 4, 2));
    for (int step = 0; step < 5; ++step) {
      made.report.step = step;
      EXPECT_NO_THROW(writer.write(made.report));
      EXPECT_NO_THROW(writer.flush());
    }
    EXPECT_FALSE(writer.ok());
  }
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "moectl: /dev/full: run log cannot be written (No space left on device); going on without it\n");
}

// A reader that leaves (`moectl watch` on a FIFO, `-o - | head`) must not end the training program.
TEST(RunLogWriter, AReaderThatLeavesIsSaidOnceAndNeverEndsTheProgram) {
  for (const char* name : {"pipe.jsonl", "pipe.jsonl.gz"}) {
    const TempDir dir;
    const std::string path = dir.path(name);
    ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
    const int reader = open(path.c_str(), O_RDONLY | O_NONBLOCK);
    ASSERT_GE(reader, 0);
    struct sigaction before {
    }, after{};
    sigaction(SIGPIPE, nullptr, &before);
    ControllerConfig config;
    config.model = {.layers = 1, .experts = 2, .top_k = 1};
    Controller controller(config);
    ::testing::internal::CaptureStderr();
    {
      RunLogWriter writer(path, config);
      writer.write(controller.step());
      EXPECT_TRUE(writer.ok());
      close(reader);
      for (int step = 0; step < 300 && writer.ok(); ++step) {
        writer.write(controller.step());
        writer.flush();
      }
      EXPECT_FALSE(writer.ok());
      writer.write(controller.step());
    }
    EXPECT_THAT(::testing::internal::GetCapturedStderr(), HasSubstr("Broken pipe"));
    sigaction(SIGPIPE, nullptr, &after);
    EXPECT_EQ(before.sa_handler, after.sa_handler) << "the host's signal handling is the host's";
    sigset_t pending;
    sigpending(&pending);
    EXPECT_EQ(sigismember(&pending, SIGPIPE), 0);
  }
}

TEST(RunLogWriter, AnUnwritablePathIsSaidOnce) {
  MadeStep made(1, {.experts = 4, .top_k = 2, .needs = {}}, 1);
  for (const char* path : {"/nonexistent/run.jsonl", "/nonexistent/run.jsonl.gz"}) {
    ::testing::internal::CaptureStderr();
    RunLogWriter writer(path, config_of(1, 4, 2));
    EXPECT_FALSE(writer.ok());
    writer.write(made.report);
    writer.flush();
    EXPECT_EQ(::testing::internal::GetCapturedStderr(),
              "moectl: " + std::string(path) +
                  ": run log cannot be written (No such file or directory); "
                  "going on without it\n");
  }
}

}  // namespace
}  // namespace moectl
