// Files of layers that differ, and configs that change in the middle of a run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/run_log.h"
#include "moectl/simulation.h"
#include "temp_dir.h"

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

const char* const kGroups =
    "version: 1\nmodel: {score_space: logit}\n"
    "layers: [{first: 1, count: 2, experts: 4, top_k: 1, targets: [0.4, 0.3, 0.2, 0.1]}, {ids: [5], experts: "
    "8, top_k: 2}]\n"
    "expert_bias: {policy: sign_bias}\n";

std::vector<LogRecord> records_of(LogReader& reader) {
  std::vector<LogRecord> all;
  while (auto record = reader.next()) all.push_back(std::move(*record));
  return all;
}

/// Runs `config` for `steps` more steps and logs them.
void run(Controller& controller, const std::string& path, const ControllerConfig& config, int steps,
         bool append) {
  RunLogWriter writer(path, config, append);
  controller.set_log([&](const StepReport& report) { writer.write(report); });
  SimulationOptions plant;
  plant.tokens = 256;
  plant.experts = config.model.experts;
  plant.top_k = config.model.top_k;
  plant.layers = config.model.layers;
  plant.score_space = config.model.score_space;
  simulate(controller, plant, steps);
  controller.set_log({});
}

TEST(FieldCases, C1_ARunOfLayerGroupsIsReadBack) {
  const TempDir dir;
  const ControllerConfig config = parse_config(kGroups);
  Controller controller(config);
  run(controller, dir.path("run.jsonl"), config, 3, false);
  LogReader reader(dir.path("run.jsonl"));
  ASSERT_THAT(reader.header().groups, SizeIs(2));
  EXPECT_THAT(reader.header().groups[0].layers, ElementsAre(1, 2));
  EXPECT_EQ(reader.header().layers, 3);
  EXPECT_EQ(reader.header().experts, std::nullopt);
  const auto records = records_of(reader);
  ASSERT_THAT(records, SizeIs(9));
  EXPECT_EQ(records[2].layer, 5);
  EXPECT_EQ(records[2].stats.experts(), 8);
  EXPECT_EQ(records[2].stats.top_k(), 2);
  EXPECT_EQ(records[2].targets, nullptr);
  ASSERT_NE(records[0].targets, nullptr);
  EXPECT_EQ(records[0].targets->shares()[3], 0.1);
}

TEST(FieldCases, C1_ATraceOfLayerGroups) {
  const TempDir dir;
  const std::string header =
      R"({"format":"moectl-trace","version":1,"groups":[{"layers":[3,4],"experts":2,"top_k":1},{"layers":[7],"experts":4,"top_k":2}]})";
  const auto read = [&](const std::string& line) -> std::string {
    try {
      LogReader reader(dir.write("t.jsonl", header + "\n" + line + "\n"));
      const auto records = records_of(reader);
      return std::to_string(records.at(0).stats.experts()) + '/' +
             std::to_string(records.at(0).stats.top_k());
    } catch (const LogError& error) {
      return error.what();
    }
  };
  EXPECT_EQ(read(R"({"step":0,"layer":3,"tokens":10,"counts":[4,6]})"), "2/1");
  EXPECT_EQ(read(R"({"step":0,"layer":7,"tokens":10,"counts":[4,6,5,5]})"), "4/2");
  EXPECT_THAT(read(R"({"step":0,"layer":7,"tokens":10,"counts":[4,6]})"),
              AllOf(HasSubstr("counts"), HasSubstr("must have 4")));
  EXPECT_THAT(read(R"({"step":0,"layer":5,"tokens":10,"counts":[4,6]})"),
              AllOf(HasSubstr("layer: 5"), HasSubstr("groups")));
}

TEST(FieldCases, B5_AChangedConfigOfAResumedRunIsARecord) {
  const TempDir dir;
  ControllerConfig config =
      parse_config("version: 1\nmodel: {layers: 1, experts: 4, top_k: 1}\nexpert_bias: {policy: sign_bias}");
  Controller first(config);
  run(first, dir.path("run.jsonl"), config, 5, false);
  ControllerConfig changed = config;
  changed.expert_bias.limits.rate = 0.5;
  Controller second(changed);
  second.load(first.save());
  run(second, dir.path("run.jsonl"), changed, 5, true);
  // Once more, without a change.
  Controller third(changed);
  third.load(second.save());
  run(third, dir.path("run.jsonl"), changed, 5, true);
  LogReader reader(dir.path("run.jsonl"));
  EXPECT_THAT(records_of(reader), SizeIs(15));
  ASSERT_THAT(reader.config_changes(), SizeIs(1));
  EXPECT_EQ(reader.config_changes()[0].step, 5);
  EXPECT_THAT(*reader.config_changes()[0].config_json, HasSubstr(R"("rate":0.5)"));
}

TEST(FieldCases, B5_ATimelineIsLogged) {
  const TempDir dir;
  const ControllerConfig config = parse_config(
      "version: 1\nmodel: {layers: 1, experts: 4, top_k: 1}\nexpert_bias: {policy: sign_bias}\n"
      "timeline: [{from: 3, expert_bias: {policy: proportional_bias}}]");
  Controller controller(config);
  run(controller, dir.path("run.jsonl.gz"), config, 6, false);
  LogReader reader(dir.path("run.jsonl.gz"));
  EXPECT_THAT(records_of(reader), SizeIs(7)) << "one is of the whole model: the notice that the entry holds";
  ASSERT_THAT(reader.config_changes(), SizeIs(1));
  EXPECT_EQ(reader.config_changes()[0].step, 3);
  EXPECT_THAT(*reader.config_changes()[0].config_json,
              AllOf(HasSubstr(R"("policy":"proportional_bias")"), Not(HasSubstr("timeline"))));
}

TEST(FieldCases, B5_AnUnchangedRunHasNoConfigRecord) {
  const TempDir dir;
  const ControllerConfig config =
      parse_config("version: 1\nmodel: {layers: 1, experts: 4, top_k: 1}\nexpert_bias: {policy: sign_bias}");
  Controller controller(config);
  run(controller, dir.path("run.jsonl"), config, 5, false);
  run(controller, dir.path("run.jsonl"), config, 5, true);
  LogReader reader(dir.path("run.jsonl"));
  EXPECT_THAT(records_of(reader), SizeIs(10));
  EXPECT_THAT(reader.config_changes(), IsEmpty());
}

// What the reader takes from a config holds from its step on, wherever the line stands; of two the one read last.
TEST(ConfigChanges, OneHoldsFromItsStepOn) {
  const TempDir dir;
  const auto model = [](const std::string& more) {
    return R"({"model":{"layers":1,"experts":2,"top_k":1)" + more + "}}";
  };
  const auto change = [&](int step, const std::string& targets) {
    return R"({"step":)" + std::to_string(step) + R"(,"config":)" + model(R"(,"targets":)" + targets) + "}\n";
  };
  const std::string header =
      R"({"format":"moectl-run","version":1,"config":)" + model(R"(,"targets":[0.6,0.4])") + "}\n";
  const auto record = [](int step) {
    return R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":4,"counts":[3,1]})" + "\n";
  };
  const auto read = [&](const std::string& text) {
    LogReader reader(dir.write("run.jsonl", text));
    std::vector<double> shares;
    for (const LogRecord& found : records_of(reader))
      shares.push_back(found.targets ? found.targets->shares()[0] : 0.5);
    return shares;
  };
  EXPECT_THAT(read(header + change(2, "[0.75,0.25]") + record(0) + record(1) + change(3, "[]") + record(2) +
                   record(3)),
              ElementsAre(0.6, 0.6, 0.75, 0.5));
  EXPECT_THAT(
      read(header + change(3, "[0.75,0.25]") + record(0) + change(1, "[0.9,0.1]") + record(1) + record(4)),
      ElementsAre(0.6, 0.9, 0.9));
}

// A run that was resumed with other layers, or that names them in groups now, is one log.
TEST(ConfigChanges, LayersMayComeAndGo) {
  const TempDir dir;
  const auto record = [](int step, int layer) {
    return R"({"step":)" + std::to_string(step) + R"(,"layer":)" + std::to_string(layer) +
           R"(,"tokens":4,"counts":[3,1]})" + "\n";
  };
  const std::string header =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})"
      "\n";
  for (const char* now : {R"({"model":{"layers":2,"experts":2,"top_k":1}})",
                          R"({"model":{"top_k":1},"layers":[{"ids":[0,1],"experts":2,"top_k":1}]})"}) {
    LogReader reader(dir.write("run.jsonl", header + record(0, 0) + R"({"step":1,"config":)" + now + "}\n" +
                                                record(1, 0) + record(1, 1)));
    EXPECT_THAT(records_of(reader), SizeIs(3)) << now;
  }
}

// The piece that told of a change may be removed, so each later one says which config holds.
TEST(ConfigChanges, EachPieceOfALogSaysWhatHolds) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl");
  const ControllerConfig config = parse_config(
      "version: 1\nmodel: {layers: 1, experts: 4, top_k: 1}\nexpert_bias: {policy: sign_bias}\n"
      "log: {rotate_mb: 0.006, keep: 1}\n"
      "timeline: [{from: 3, expert_bias: {policy: proportional_bias}}]");
  Controller controller(config);
  run(controller, path, config, 40, false);
  ASSERT_FALSE(std::filesystem::exists(piece_path(path, 1)));
  LogReader reader(path, FaultPolicy::kRepair);
  EXPECT_FALSE(records_of(reader).empty());
  ASSERT_THAT(reader.config_changes(), SizeIs(1));
  EXPECT_EQ(reader.config_changes()[0].step, 3);
  EXPECT_THAT(*reader.config_changes()[0].config_json, HasSubstr(R"("policy":"proportional_bias")"));
}

}  // namespace
}  // namespace moectl
