// What the tests of the importers share: a dump becomes a trace by the tool.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

#include "cli/tool.h"

namespace moectl {

using nlohmann::json;

inline const std::string kFiles = MOECTL_SOURCE_DIR "/tests/import/files/";

/// The records of a trace, its first line left out.
inline std::vector<json> records(const std::string& text) {
  std::vector<json> found;
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  EXPECT_EQ(json::parse(line)["format"], "moectl-trace");
  while (std::getline(lines, line)) found.push_back(json::parse(line));
  return found;
}

/// Imports to standard output, and reads the trace with `metrics`, which refuses what is no trace.
inline std::vector<json> imported(const std::string& arguments, std::string* notes = nullptr) {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "import " + arguments + " -o t.jsonl");
  EXPECT_EQ(result.code, 0) << arguments << ": " << result.err;
  if (notes) *notes = result.err;
  const ToolResult read = run_tool(dir, "metrics t.jsonl --format json");
  EXPECT_EQ(read.code, 0) << arguments << ": " << read.err;
  return records(TempDir::read(dir.path("t.jsonl")));
}

inline std::string refused(const std::string& arguments, const std::string& input = "") {
  const TempDir dir;
  const ToolResult result = run_tool(dir, "import " + arguments + " -o t.jsonl", input);
  EXPECT_EQ(result.code, 1) << arguments;
  EXPECT_FALSE(std::filesystem::exists(dir.path("t.jsonl"))) << arguments;
  EXPECT_FALSE(std::filesystem::exists(dir.path("t.jsonl.part"))) << arguments;
  return result.err;
}

inline const json& at(const std::vector<json>& all, std::int64_t step, int layer,
                      const std::string& tag = "train") {
  for (const json& record : all) {
    if (record["step"] == step && record["layer"] == layer && record.value("tag", "train") == tag)
      return record;
  }
  ADD_FAILURE() << "no record of step " << step << ", layer " << layer << ", " << tag;
  static const json kNone = {{"counts", nullptr}, {"tokens", nullptr}};
  return kNone;
}

/// The bytes of a .npy file.
inline std::string npy(const std::string& header, const std::string& data = "") {
  std::string bytes = "\x93NUMPY";
  bytes += '\x01';
  bytes += '\0';
  bytes += static_cast<char>(header.size() & 255);
  bytes += static_cast<char>(header.size() >> 8);
  return bytes + header + data;
}

}  // namespace moectl
