// The inputs of the fuzzers that are kept in fuzz/: seeds that reach far, and each that once found something.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "fuzz/targets.h"
#include "temp_dir.h"
#include "test_paths.h"

namespace moectl {
namespace {

class FuzzInputs : public ::testing::TestWithParam<fuzz::Target> {};

TEST_P(FuzzInputs, KeepEveryPromise) {
  int inputs = 0;
  for (const char* folder : {"corpus", "found"}) {
    const auto path = std::filesystem::path(MOECTL_SOURCE_DIR) / "fuzz" / folder / GetParam().name;
    std::error_code none;
    for (const auto& entry : std::filesystem::directory_iterator(path, none)) {
      const std::string text = TempDir::read(entry.path().string());
      const std::vector<std::uint8_t> bytes(text.begin(), text.end());
      EXPECT_NO_THROW(GetParam().run(bytes)) << entry.path();
      ++inputs;
    }
  }
  EXPECT_GT(inputs, 0);
}

INSTANTIATE_TEST_SUITE_P(All, FuzzInputs, ::testing::ValuesIn(fuzz::kTargets),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace moectl
