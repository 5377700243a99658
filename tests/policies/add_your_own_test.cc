// Does what policies/README.md says under "Add your own": takes its snippets as they stand, compiles them,
// and loads the result through the tool.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "test_paths.h"

namespace moectl {
namespace {

namespace fs = std::filesystem;

std::string slurp(const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// The fenced blocks of one language, without their indentation.
std::vector<std::string> snippets(const std::string& markdown, const std::string& language) {
  std::vector<std::string> found;
  std::istringstream lines(markdown);
  std::string line;
  bool inside = false;
  while (std::getline(lines, line)) {
    const std::size_t start = line.find_first_not_of(' ');
    const std::string text = start == std::string::npos ? "" : line.substr(start);
    if (inside && text == "```") {
      inside = false;
    } else if (inside) {
      found.back() += line.substr(std::min(line.size(), std::size_t{3})) + "\n";
    } else if (text == "```" + language) {
      inside = true;
      found.emplace_back();
    }
  }
  return found;
}

struct Result {
  int status;
  std::string output;
};
Result run(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) return {-1, "popen failed"};
  std::string output;
  char buffer[512];
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) output += buffer;
  return {pclose(pipe), output};
}

TEST(AddYourOwn, TheReadmesFiveStepsWork) {
  const fs::path source(MOECTL_SOURCE_DIR);
  const std::string readme = slurp(source / "policies/README.md");
  const std::vector<std::string> code = snippets(readme, "cpp"), yaml = snippets(readme, "yaml");
  ASSERT_EQ(code.size(), 2U);
  ASSERT_EQ(yaml.size(), 1U);
  const fs::path work = fs::path(::testing::TempDir()) / "moectl_add_your_own";
  fs::create_directories(work);
  std::ofstream(work / "leaky_bias.cc") << code[0] << code[1];
  std::ofstream(work / "leaky_bias.yaml") << yaml[0];
  std::ofstream(work / "trace.jsonl") << R"({"step":0,"layer":0,"tokens":8,"top_k":2,)"
                                      << R"("counts":[8,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0]})"
                                      << "\n";
  const std::string so = (work / "leaky_bias.so").string();
  const Result built = run("c++ -std=c++20 -shared -fPIC -I" + (source / "include").string() + " " +
                           (work / "leaky_bias.cc").string() + " -o " + so);
  ASSERT_EQ(built.status, 0) << built.output;

  const std::string tool = std::string(MOECTL_TOOL) + " --plugin " + so + " ";
  const std::string config = (work / "leaky_bias.yaml").string();
  const Result shown = run(tool + "policies leaky_bias");
  EXPECT_EQ(shown.status, 0) << shown.output;
  EXPECT_NE(shown.output.find("leak"), std::string::npos) << shown.output;
  const Result checked = run(tool + "check " + config);
  EXPECT_EQ(checked.status, 0) << checked.output;
  std::ofstream(work / "one_layer.yaml") << "version: 1\nmodel: {layers: 1, experts: 16, top_k: 2}\n"
                                         << yaml[0].substr(yaml[0].find("expert_bias:"));
  const Result replayed =
      run(tool + "replay " + (work / "one_layer.yaml").string() + " " + (work / "trace.jsonl").string());
  EXPECT_EQ(replayed.status, 0) << replayed.output;
  // Expert 0 has 8 of 16 assignments against a target of 1: e = -7, and 2e-3 · e is past the rate of 0.01.
  EXPECT_NE(replayed.output.find("-0.01"), std::string::npos) << replayed.output;
  EXPECT_NE(replayed.output.find("\"rate\""), std::string::npos) << replayed.output;
  // Without the plugin the same config is refused.
  EXPECT_NE(run(std::string(MOECTL_TOOL) + " check " + config).status, 0);
}

}  // namespace
}  // namespace moectl
