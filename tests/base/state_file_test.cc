#include "moectl/state_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "moectl/controller.h"

namespace moectl {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

class StateFile : public ::testing::Test {
 protected:
  StateFile() : folder_(fs::temp_directory_path() / ("moectl_state_" + std::to_string(getpid()))) {
    fs::create_directories(folder_);
  }
  ~StateFile() override { fs::remove_all(folder_); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  std::size_t files() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder_), fs::directory_iterator()));
  }
  fs::path folder_;
};

Controller make_controller(int experts = 4) {
  ControllerConfig config;
  config.model = {.layers = 2, .experts = experts, .top_k = 1};
  config.expert_bias.policy = "sign_bias";
  config.expert_bias.limits.rate = 0.01;
  return Controller(config);
}

TEST_F(StateFile, ComesBackToTheByte) {
  std::string bytes(100'000, '\0');
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 31);
  write_file_atomically(path("a"), bytes);
  EXPECT_EQ(read_file(path("a")), bytes);
  write_file_atomically(path("a"), "short");
  EXPECT_EQ(read_file(path("a")), "short");
  EXPECT_EQ(files(), 1U) << "no temporary file is left";
}

TEST_F(StateFile, FailedReadsAndWritesNameTheReason) {
  const auto message = [](auto call) -> std::string {
    try {
      call();
    } catch (const StateError& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_THAT(message([&] { write_file_atomically(path("no/such/folder"), "x"); }),
              HasSubstr("No such file"));
  EXPECT_THAT(message([&] { read_file(path("none")); }), HasSubstr("none: cannot read"));
  fs::create_directory(path("taken"));
  std::ofstream(path("taken") + "/inside") << "x";
  EXPECT_THAT(message([&] { write_file_atomically(path("taken"), "x"); }), HasSubstr("taken"));
  EXPECT_EQ(files(), 1U);
}

TEST_F(StateFile, TruncatedOrAlteredStatesAreRefusedAndLeaveTheControllerAlone) {
  Controller controller = make_controller();
  const std::int64_t chosen[] = {0, 0, 1, 2};
  for (int step = 0; step < 3; ++step) {
    for (int layer = 0; layer < 2; ++layer) controller.record(layer, {.experts = chosen});
    controller.step();
  }
  write_file_atomically(path("state"), controller.save());
  const std::string state = read_file(path("state"));

  Controller other = make_controller();
  other.record(0, {.experts = chosen});
  other.step();
  const std::string before = other.save();
  for (std::size_t size = 0; size < state.size(); size += 1 + state.size() / 97) {
    EXPECT_THROW(other.load(std::string_view(state).substr(0, size)), StateError) << size << " bytes";
  }
  for (std::size_t i = 0; i < state.size(); ++i) {
    std::string altered = state;
    altered[i] = static_cast<char>(altered[i] ^ 0x10);
    EXPECT_THROW(other.load(altered), StateError) << "byte " << i;
  }
  EXPECT_THROW(make_controller(5).load(state), StateError);
  EXPECT_EQ(other.save(), before);
  other.load(state);
  EXPECT_EQ(other.save(), state);
}

}  // namespace
}  // namespace moectl
