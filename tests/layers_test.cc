// The layer order of the folders: a folder includes what stands before it, and nothing after it. docs/architecture.md
// shows the same order.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <string>
#include <vector>

#include "test_paths.h"

namespace {

namespace fs = std::filesystem;

// From the ground up. Folders of one row do not know each other. Beside each: the public headers that belong to it.
struct Row {
  std::vector<std::string> folders;
  std::vector<std::string> headers;
};
const std::vector<Row> kOrder = {
    {{"src/base"}, {"types.h", "version.h", "state.h", "state_file.h"}},
    {{"src/measure"}, {"margins.h", "stats_shape.h", "stats.h", "load_targets.h", "metrics.h"}},
    {{"src/watch"}, {"bands.h", "health.h", "monitor.h"}},
    {{"src/control"},
     {"limits.h", "guard.h", "responsiveness.h", "notice.h", "policy_options.h", "policy.h", "config.h",
      "bias_file.h", "controller.h"}},
    {{"policies"}, {}},
    {{"src/config"}, {}},
    {{"src/feasibility"}, {"feasibility.h"}},
    {{"src/placement"}, {"placement.h"}},
    {{"src/log"}, {"run_log.h"}},
    {{"src/export"}, {"figures.h", "tensorboard.h"}},
    {{"src/import"}, {}},
    {{"src/simulation"}, {"simulation.h"}},
    {{"src/torch", "src/prometheus", "src/c"}, {}},
    {{"src/cli", "bench", "examples", "fuzz"}, {}},
};

// Where a file or an included name lives: {row, folder}; row -1 = nowhere in the order.
struct Place {
  int row = -1;
  std::string folder;
};

Place place_of(std::string name) {
  const std::string prefix = "moectl/";
  if (name == "moectl.h") name = "moectl/c.h";  // the header for C
  const bool is_public = name.rfind(prefix, 0) == 0;
  for (std::size_t r = 0; r < kOrder.size(); ++r) {
    for (const std::string& folder : kOrder[r].folders) {
      const std::string short_folder = folder.rfind("src/", 0) == 0 ? folder.substr(4) : folder;
      const std::string in_public = prefix + short_folder + "/";
      if (name.rfind(folder + "/", 0) == 0 || name.rfind(short_folder + "/", 0) == 0 ||
          (is_public && (name.rfind(in_public, 0) == 0 || name == prefix + short_folder + ".h"))) {
        const bool listed =
            is_public && name.rfind(in_public, 0) != 0 &&
            std::any_of(kOrder.begin(), kOrder.end(), [&](const Row& row) {
              return std::count(row.headers.begin(), row.headers.end(), name.substr(prefix.size())) > 0;
            });
        if (!listed) return {static_cast<int>(r), folder};
      }
    }
    if (is_public &&
        std::count(kOrder[r].headers.begin(), kOrder[r].headers.end(), name.substr(prefix.size())) > 0) {
      return {static_cast<int>(r), kOrder[r].folders.front()};
    }
  }
  return {};
}

std::vector<std::string> includes_of(const fs::path& file) {
  static const std::regex kInclude("^\\s*#\\s*include\\s*[\"<]([^\">]+)[\">]");
  std::vector<std::string> found;
  std::ifstream in(file);
  std::smatch match;
  for (std::string line; std::getline(in, line);) {
    if (std::regex_search(line, match, kInclude)) found.push_back(match[1]);
  }
  return found;
}

// What stands against the order in the file `name` (as the repository spells it) that includes `included`.
std::string fault(const std::string& name, const std::string& included) {
  const std::string as_public = name.rfind("include/", 0) == 0 ? name.substr(8) : name;
  const Place from = place_of(as_public), to = place_of(included);
  if (from.row < 0) return name + ": lies in no folder of the order";
  if (to.row < 0)
    return included.rfind("moectl/", 0) == 0 ? name + " includes " + included + ": not in the order" : "";
  if (to.row < from.row || to.folder == from.folder) return "";
  return name + " (" + from.folder + ") includes " + included + " (" + to.folder +
         "): against the layer order";
}

TEST(Layers, EveryIncludePointsDown) {
  const fs::path root(MOECTL_SOURCE_DIR);
  std::vector<std::string> faults;
  std::size_t files = 0;
  for (const char* top : {"include", "src", "policies", "bench", "examples", "fuzz"}) {
    for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
      const std::string extension = entry.path().extension().string();
      if (extension != ".h" && extension != ".cc") continue;
      ++files;
      const std::string name = fs::relative(entry.path(), root).generic_string();
      for (const std::string& included : includes_of(entry.path())) {
        if (std::string why = fault(name, included); !why.empty()) faults.push_back(why);
      }
    }
  }
  EXPECT_GT(files, 100U);
  EXPECT_THAT(faults, testing::IsEmpty());
}

// The test itself can fail.
TEST(Layers, AnIncludeUpwardsIsFound) {
  EXPECT_THAT(fault("src/measure/metrics.cc", "control/loop.h"),
              testing::HasSubstr("against the layer order"));
  EXPECT_THAT(fault("include/moectl/stats.h", "moectl/policy.h"),
              testing::HasSubstr("against the layer order"));
  EXPECT_THAT(fault("src/torch/router.cc", "moectl/prometheus.h"),
              testing::HasSubstr("against the layer order"));
  EXPECT_THAT(fault("src/new/thing.cc", "base/lanes.h"), testing::HasSubstr("no folder"));
  EXPECT_EQ(fault("src/cli/main.cc", "moectl/controller.h"), "");
  EXPECT_EQ(fault("src/torch/controller.cc", "moectl/torch/router.h"), "");
}

// LibTorch's headers cost twelve seconds a file: they stay in the adapter, its tests and the examples.
TEST(Layers, NoLibTorchOutsideTheAdapter) {
  const fs::path root(MOECTL_SOURCE_DIR);
  std::vector<std::string> faults;
  for (const char* top : {"include", "src", "policies"}) {
    for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
      const std::string name = fs::relative(entry.path(), root).generic_string();
      const std::string extension = entry.path().extension().string();
      if ((extension != ".h" && extension != ".cc") || name.find("/torch/") != std::string::npos) continue;
      for (const std::string& included : includes_of(entry.path())) {
        for (const char* prefix : {"torch/", "ATen/", "c10/"}) {
          if (included.rfind(prefix, 0) == 0) faults.push_back(name + " includes " + included);
        }
      }
    }
  }
  EXPECT_THAT(faults, testing::IsEmpty());
}

}  // namespace
