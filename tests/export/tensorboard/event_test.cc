// Event files read back by readers that share nothing with the writer: protobuf of the system with the public schema,
// framing and checksum by hand. Readers that others wrote: readers_test.mjs.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/dynamic_message.h>
#include <google/protobuf/text_format.h>
#include <google/protobuf/util/json_util.h>

#include <signal.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "allocation_counter.h"
#include "cli/tool.h"
#include "moectl/config.h"
#include "moectl/tensorboard.h"
#include "test_paths.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// CRC-32C by the bit, from its definition: not the table of the writer.
std::uint32_t crc32c(const std::string& data) {
  std::uint32_t crc = 0xFFFFFFFF;
  for (const char c : data) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = crc & 1 ? (crc >> 1) ^ 0x82F63B78 : crc >> 1;
  }
  return crc ^ 0xFFFFFFFF;
}

std::uint32_t unmasked(std::uint32_t masked) {
  const std::uint32_t rotated = masked - 0xA282EAD8;
  return (rotated >> 17) | (rotated << 15);
}

/// The events of a file, as protobuf's JSON.
std::vector<nlohmann::json> read_events(const std::string& path) {
  google::protobuf::FileDescriptorProto schema;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(
      TempDir::read(MOECTL_SOURCE_DIR "/tests/export/tensorboard/event.textproto"), &schema));
  google::protobuf::DescriptorPool pool;
  google::protobuf::DynamicMessageFactory factory;
  const auto* type = factory.GetPrototype(pool.BuildFile(schema)->FindMessageTypeByName("Event"));

  const std::string bytes = TempDir::read(path);
  std::vector<nlohmann::json> events;
  for (std::size_t at = 0; at < bytes.size();) {
    std::uint64_t size = 0;
    std::uint32_t head = 0, tail = 0;
    if (bytes.size() - at < 12) {
      ADD_FAILURE() << "torn at " << at;
      break;
    }
    std::memcpy(&size, &bytes[at], 8);
    std::memcpy(&head, &bytes[at + 8], 4);
    EXPECT_EQ(unmasked(head), crc32c(bytes.substr(at, 8)));
    if (bytes.size() - at < 16 + size) {
      ADD_FAILURE() << "torn at " << at;
      break;
    }
    const std::string data = bytes.substr(at + 12, size);
    std::memcpy(&tail, &bytes[at + 12 + size], 4);
    EXPECT_EQ(unmasked(tail), crc32c(data));
    at += 16 + size;
    const std::unique_ptr<google::protobuf::Message> event(type->New());
    EXPECT_TRUE(event->ParseFromString(data));
    EXPECT_EQ(event->GetReflection()->GetUnknownFields(*event).field_count(), 0);
    std::string text;
    EXPECT_TRUE(google::protobuf::util::MessageToJsonString(*event, &text).ok());
    events.push_back(nlohmann::json::parse(text));
  }
  return events;
}

std::string only_file(const std::string& directory) {
  std::string path;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    EXPECT_EQ(path, "");
    path = entry.path().string();
  }
  return path;
}

/// tag → step → value, of the scalars.
std::map<std::string, std::map<int, double>> scalars_of(const std::vector<nlohmann::json>& events) {
  std::map<std::string, std::map<int, double>> scalars;
  for (const auto& event : events) {
    if (!event.contains("summary")) continue;
    const int step = event.contains("step") ? std::stoi(event["step"].get<std::string>()) : 0;
    for (const auto& value : event["summary"]["value"]) {
      if (value.contains("simpleValue")) scalars[value["tag"]][step] = value["simpleValue"];
    }
  }
  return scalars;
}

ControllerConfig small_config() {
  return parse_config(
      "version: 1\n"
      "model: {layers: 2, experts: 4, top_k: 1}\n"
      "expert_bias: {policy: sign_bias, options: {step: 0.5, zero_mean_move: false},"
      " limits: {rate: 0.25, min: -0.5, max: 0.5, center: false}}\n"
      "aux_loss_weight: {policy: fixed, initial: 0.01, scope: model}\n"
      "health: {alerts: [{metric: max_vio, above: 1, name: peaked}]}\n");
}

void train(Controller& controller, int steps) {
  for (int step = 0; step < steps; ++step) {
    for (int layer = 0; layer < 2; ++layer) {
      RoutingStats stats(controller.shape(0));
      const std::int64_t first = layer == 0 && step < 3 ? 70 : 25;
      const std::int64_t counts[] = {first, 25, 25, 25};
      stats.add_counts(counts, first + 75);
      controller.record(layer, stats);
    }
    controller.step({.loss = 3.0 - 0.25 * step});
  }
}

TEST(TensorBoard, TheChecksumIsCastagnolis) {
  EXPECT_EQ(unmasked(masked_crc32c("123456789", 9)), 0xE3069283U);  // the check value of RFC 3720
  EXPECT_EQ(unmasked(masked_crc32c(std::string(32, '\0').data(), 32)), 0x8A9136AAU);
}

TEST(TensorBoard, ScalarsAndHistogramsReadBack) {
  const TempDir dir;
  Controller controller(small_config());
  {
    TensorBoardWriter board(dir.path("run"), {.histogram_every = 2});
    controller.set_log([&](const StepReport& report) { board.write(report); });
    train(controller, 5);
    EXPECT_TRUE(board.ok());
  }
  const std::string file = only_file(dir.path("run"));
  EXPECT_THAT(file, HasSubstr("/events.out.tfevents.0000000000.moectl"));
  const auto events = read_events(file);
  ASSERT_EQ(events.size(), 6U);
  EXPECT_EQ(events[0], (nlohmann::json{{"fileVersion", "brain.Event:2"}}));
  EXPECT_EQ(events[3]["wallTime"], 2.0);
  auto scalars = scalars_of(events);
  EXPECT_EQ(scalars["loss"], (std::map<int, double>{{0, 3}, {1, 2.75}, {2, 2.5}, {3, 2.25}, {4, 2}}));
  // 70 of 145 on one of four: 4 · 70/145 - 1; the other layer is even.
  EXPECT_FLOAT_EQ(static_cast<float>(scalars["max_vio/layer_0"][0]), static_cast<float>(280.0 / 145 - 1));
  EXPECT_EQ(scalars["max_vio/layer_1"][0], 0);
  EXPECT_FLOAT_EQ(static_cast<float>(scalars["balance/max_vio"][0]),
                  static_cast<float>((280.0 / 145 - 1) / 2));
  EXPECT_GT(scalars["balance/max_vio_floor"][0], 0);
  // Over layers with 0 and x: x times the share.
  for (const auto& [name, share] :
       {std::pair{"p5", 0.05}, {"p25", 0.25}, {"p50", 0.5}, {"p75", 0.75}, {"p95", 0.95}}) {
    EXPECT_FLOAT_EQ(static_cast<float>(scalars[std::string("balance/max_vio_") + name][0]),
                    static_cast<float>((280.0 / 145 - 1) * share));
  }
  EXPECT_EQ(scalars["aux_loss_weight/model"].size(), 5U);
  EXPECT_FLOAT_EQ(static_cast<float>(scalars["aux_loss_weight/model"][4]), 0.01F);
  // The policy wants 0.5 a step and gets 0.25: in one layer of two, while it is uneven.
  EXPECT_EQ(scalars["reasons/expert_bias_rate"][0], 1);
  EXPECT_EQ(scalars["reasons/expert_bias_rate"][4], 0);
  EXPECT_EQ(scalars["response/unknown"][0], 2);
  EXPECT_FALSE(scalars.contains("response_gain/layer_0"));
  EXPECT_FALSE(scalars.contains("drop_rate/layer_0"));  // not measured: not there

  std::map<std::string, nlohmann::json> histograms;
  for (const auto& value : events[1]["summary"]["value"]) {
    if (value.contains("histo")) histograms[value["tag"]] = value["histo"];
  }
  EXPECT_EQ(histograms.size(), 4U);
  const auto& load = histograms["load/layer_0"];
  EXPECT_DOUBLE_EQ(load["max"], 280.0 / 145);
  EXPECT_DOUBLE_EQ(load["min"], 100.0 / 145);
  EXPECT_EQ(load["num"], 4);
  EXPECT_DOUBLE_EQ(load["sum"], 4);
  EXPECT_DOUBLE_EQ(load["sumSquares"], (280.0 * 280 + 3 * 100 * 100) / (145.0 * 145));
  ASSERT_EQ(load["bucketLimit"].size(), 30U);
  ASSERT_EQ(load["bucket"].size(), 30U);
  EXPECT_EQ(load["bucket"][0], 3);
  EXPECT_EQ(load["bucket"][29], 1);
  EXPECT_EQ(load["bucketLimit"][29], load["max"]);
  EXPECT_EQ(histograms["load/layer_1"]["bucket"].size(), 1U);  // all alike: one bucket
  EXPECT_FALSE(events[2].dump().find("histo") != std::string::npos);
}

// What the header promises to the training loop. Histograms, alerts, health and reasons come and go; only a name that
// is met for the first time may allocate.
TEST(TensorBoard, DoesNotAllocateInTheSteadyState) {
  const TempDir dir;
  Controller controller(small_config());
  TensorBoardWriter board(dir.path("run"), {.histogram_every = 10});
  std::set<std::pair<std::string_view, std::string_view>> met;
  std::int64_t first = 0, steady = 0;
  controller.set_log([&](const StepReport& report) {
    const std::size_t known = met.size();
    for (const LayerReport& layer : report.layers) {
      met.emplace("health", name_of(layer.monitor->health()));
      met.emplace("response", name_of(layer.responsiveness.state));
      for (const std::string_view alert : layer.monitor->alerts()) met.emplace("alert", alert);
      for (int r = 0; r < kReasonCount; ++r) {
        const auto reason = static_cast<Reason>(r);
        const auto& bias = layer.actuators[static_cast<std::size_t>(Actuator::kExpertBias)];
        if (bias.reasons.has(reason)) met.emplace("reason", name_of(reason));
      }
    }
    const std::int64_t allocated = testing::allocations_of([&] { board.write(report); });
    (report.step < 20 || met.size() > known ? first : steady) += allocated;
  });
  for (int step = 0; step < 400; ++step) {
    for (int layer = 0; layer < 2; ++layer) {
      RoutingStats stats(controller.shape(0));
      const std::int64_t counts[] = {layer == 0 && step % 50 < 20 ? 90 : 25, 25, 25, step % 40 < 30 ? 0 : 25};
      stats.add_counts(counts, counts[0] + counts[1] + counts[2] + counts[3]);
      controller.record(layer, stats);
    }
    controller.step({.loss = 2.5});
  }
  EXPECT_GT(first, 0);  // it does count
  EXPECT_EQ(steady, 0);
  EXPECT_TRUE(board.ok());
}

TEST(TensorBoard, TheToolWritesTheSameFromALog) {
  const TempDir dir;
  Controller controller(small_config());
  {
    TensorBoardWriter board(dir.path("live"));
    RunLogWriter writer(dir.path("run.jsonl"), controller.config());
    controller.set_log([&](const StepReport& report) {
      board.write(report);
      writer.write(report);
    });
    train(controller, 12);
  }
  const ToolResult result = run_tool(dir, "tensorboard run.jsonl -o board");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(TempDir::read(only_file(dir.path("board/run"))), TempDir::read(only_file(dir.path("live"))));
  // It does not write into what is there, nor two runs into one.
  EXPECT_THAT(run_tool(dir, "tensorboard run.jsonl -o board").err, HasSubstr("board/run: already exists"));
  EXPECT_EQ(run_tool(dir, "tensorboard run.jsonl run.jsonl -o two").code, 1);
  EXPECT_THAT(run_tool(dir, "tensorboard run.jsonl -o x --metric max_voi").err,
              HasSubstr("max_voi: is no metric"));
  ASSERT_EQ(run_tool(dir, "tensorboard run.jsonl -o all --metric all --histogram-every 0").code, 0);
  const auto scalars = scalars_of(read_events(only_file(dir.path("all/run"))));
  EXPECT_EQ(scalars.at("gini/layer_1").size(), 12U);
}

TEST(TensorBoard, ASecondWriterContinuesTheRun) {
  const TempDir dir;
  for (int part = 0; part < 2; ++part) {
    Controller controller(small_config());
    TensorBoardWriter board(dir.path("run"));
    controller.set_log([&](const StepReport& report) { board.write(report); });
    train(controller, 3);
  }
  const auto second = read_events(dir.path("run/events.out.tfevents.0000000001.moectl"));
  ASSERT_EQ(second.size(), 5U);
  EXPECT_EQ(second[1]["sessionLog"]["status"], "START");
}

TEST(TensorBoard, TheGainOfTheResponseIsACurveOfEachLayer) {
  const TempDir dir;
  {
    TensorBoardWriter board(dir.path("run"));
    LogRecord record;
    record.layer = 3;
    record.responsiveness = {.state = Response::kAnswers, .gain = 0.75, .error = 0.125};
    record.actuators["router_temperature"].responsiveness = {
        .state = Response::kUnresponsive, .gain = -1, .error = 0.125};
    board.write(record, Metrics());
  }
  auto scalars = scalars_of(read_events(only_file(dir.path("run"))));
  EXPECT_EQ(scalars["response_gain/layer_3"][0], 0.75);
  EXPECT_EQ(scalars["router_temperature_response_gain/layer_3"][0], -1);
  EXPECT_EQ(scalars["router_temperature_response/unresponsive"][0], 1);
  EXPECT_EQ(scalars["response/answers"][0], 1);
}

TEST(TensorBoard, ValidationLossesStandApart) {
  const TempDir dir;
  dir.write("run.jsonl",
            R"({"step":0,"layer":0,"tokens":4,"top_k":1,"counts":[3,1],"loss":2.5})"
            "\n"
            R"({"step":0,"layer":0,"tokens":4,"top_k":1,"counts":[3,1],"loss":2.25,"tag":"validation"})"
            "\n"
            R"({"step":0,"layer":1,"tokens":4,"top_k":1,"counts":[3,1],"loss":2.25,"tag":"validation"})"
            "\n");
  ASSERT_EQ(run_tool(dir, "tensorboard run.jsonl -o board").code, 0);
  const auto events = read_events(only_file(dir.path("board/run")));
  ASSERT_EQ(events.size(), 3U);
  const auto scalars = scalars_of(events);
  EXPECT_EQ(scalars.at("loss").at(0), 2.5);
  EXPECT_EQ(scalars.at("loss/validation").at(0), 2.25);
}

TEST(TensorBoard, AFailedWriteIsReportedOnceAndNeverStopsTraining) {
  const TempDir dir;
  dir.write("file", "");
  ::testing::internal::CaptureStderr();
  {
    Controller controller(small_config());
    TensorBoardWriter board(dir.path("file/run"));
    controller.set_log([&](const StepReport& report) { board.write(report); });
    EXPECT_NO_THROW(train(controller, 3));
    EXPECT_FALSE(board.ok());
  }
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "moectl: " + dir.path("file/run/events.out.tfevents.0000000000.moectl") +
                ": event file cannot be written (Not a directory); going on without it\n");
}

// A file that may not grow stands for a disk that is full.
TEST(TensorBoard, AFullDiskIsReportedOnce) {
  const TempDir dir;
  rlimit before{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 1000;
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  ::testing::internal::CaptureStderr();
  {
    Controller controller(small_config());
    TensorBoardWriter board(dir.path("run"));
    controller.set_log([&](const StepReport& report) { board.write(report); });
    EXPECT_NO_THROW(train(controller, 9));
    EXPECT_FALSE(board.ok());
  }
  const std::string said = ::testing::internal::GetCapturedStderr();
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, handler);
  EXPECT_EQ(said, "moectl: " + dir.path("run/events.out.tfevents.0000000000.moectl") +
                      ": event file cannot be written (File too large); going on without it\n");
}

TEST(TensorBoard, LoadsAreOverTheirTargets) {
  const TempDir dir;
  ControllerConfig config = small_config();
  config.model.targets = {0.25, 0.5, 0.25, 0};
  Controller controller(config);
  {
    TensorBoardWriter board(dir.path("run"), {.histogram_every = 1});
    controller.set_log([&](const StepReport& report) { board.write(report); });
    train(controller, 1);
  }
  const auto events = read_events(only_file(dir.path("run")));
  for (const auto& value : events[1]["summary"]["value"]) {
    if (value["tag"] != "load/layer_1") continue;
    // A quarter each: 1, ½, 1 of the targets, and ¾ (three are wanted, a third each) where none is: 1.75.
    EXPECT_DOUBLE_EQ(value["histo"]["sum"], 1 + 0.5 + 1 + 1.75);
    EXPECT_DOUBLE_EQ(value["histo"]["max"], 1.75);
    return;
  }
  FAIL() << "no load/layer_1";
}

}  // namespace
}  // namespace moectl
