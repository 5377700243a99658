// A run that was killed within the first bytes of its compressed log is resumed: the log begins anew and goes on.
#include <gtest/gtest.h>

#include <filesystem>

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

}  // namespace
}  // namespace moectl
