// A run that was killed within the first bytes of its compressed log is resumed: the log begins anew and goes on.
#include <gtest/gtest.h>

#include <filesystem>

#include "log/log_file.h"
#include "moectl/run_log.h"
#include "temp_dir.h"

namespace moectl {
namespace {

TEST(TornGzip, AResumedRunGoesOnLogging) {
  for (const std::uintmax_t length : {1U, 10U, 40U, 200U}) {
    const TempDir dir;
    const std::string path = dir.path("run.jsonl.gz");
    Controller controller(parse_config("version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\n"));
    { RunLogWriter(path, controller.config()).write(controller.step()); }
    ASSERT_GT(std::filesystem::file_size(path), length);
    std::filesystem::resize_file(path, length);
    {
      RunLogWriter resumed(path, controller.config(), true);
      resumed.write(controller.step());
      EXPECT_TRUE(resumed.ok()) << length;
    }
    LogReader reader(path);
    const auto record = reader.next();
    ASSERT_TRUE(record) << length;
    EXPECT_EQ(record->step, 1);
  }
}

TEST(TornGzip, ARotatedRunLosesNoneOfItsPieces) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl.gz");
  Controller controller(
      parse_config("version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\nlog: {rotate_mb: 0.004}\n"));
  {
    RunLogWriter writer(path, controller.config());
    for (int step = 0; step < 40; ++step) writer.write(controller.step());
  }
  const std::string first = path + ".000001";
  ASSERT_TRUE(std::filesystem::exists(first));
  const std::string before = TempDir::read(first);
  std::filesystem::resize_file(path, 10);
  {
    RunLogWriter resumed(path, controller.config(), true);
    for (int step = 0; step < 40; ++step) resumed.write(controller.step());
    EXPECT_TRUE(resumed.ok());
  }
  EXPECT_TRUE(TempDir::read(first) == before) << "an old piece was replaced";
}

Controller small_run(const std::string& rest = "") {
  return Controller(parse_config("version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\n" + rest));
}

// What is damaged within, and not cut off, may go on behind the damage: it stays as it is.
TEST(TornGzip, ADamagedLogIsNotCutAtTheDamage) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl.gz");
  Controller controller = small_run();
  {
    RunLogWriter writer(path, controller.config());
    for (int step = 0; step < 200; ++step) {
      writer.write(controller.step());
      writer.flush();
    }
  }
  std::string bytes = TempDir::read(path);
  for (std::size_t i = bytes.size() / 2; i < bytes.size() / 2 + 64; ++i) bytes[i] = '\xff';
  dir.write("run.jsonl.gz", bytes);
  RunLogWriter resumed(path, controller.config(), true);
  resumed.write(controller.step());
  EXPECT_FALSE(resumed.ok());
  EXPECT_TRUE(TempDir::read(path) == bytes) << "the damaged log was rewritten";
  EXPECT_FALSE(std::filesystem::exists(path + ".part"));
}

// Numbers of pieces beyond what a reader takes: one beside the log is no piece, one within it ends logging.
TEST(HostileInput, PiecesOfALogHaveALimit) {
  const TempDir dir;
  const std::string path = dir.path("run.jsonl.gz");
  Controller controller = small_run("log: {rotate_mb: 0.004}\n");
  { RunLogWriter(path, controller.config()).write(controller.step()); }
  std::filesystem::resize_file(path, 10);
  dir.write("run.jsonl.gz.9223372036854775807", "");
  dir.write("run.jsonl.gz.000007", "");
  EXPECT_EQ(piece_of(path), 8);
  const std::string plain = dir.path("run.jsonl");
  for (const std::string piece : {"9223372036854775807", "1000000001", "0", "99999999999999999999"}) {
    const std::string log = R"({"format":"moectl-run","version":1,"piece":)" + piece + ",\"config\":{}}\n";
    dir.write("run.jsonl", log);
    RunLogWriter resumed(plain, controller.config(), true);
    resumed.write(controller.step());
    EXPECT_FALSE(resumed.ok()) << piece;
    EXPECT_EQ(TempDir::read(plain), log);
  }
}

}  // namespace
}  // namespace moectl
