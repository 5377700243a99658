// Runs the real binary on files that a test made.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "temp_dir.h"
#include "test_paths.h"

namespace moectl {

struct ToolResult {
  int code = -1;
  std::string out, err;

  std::vector<std::string> lines() const {
    std::vector<std::string> lines;
    std::istringstream stream(out);
    for (std::string line; std::getline(stream, line);) lines.push_back(line);
    return lines;
  }
  nlohmann::json json(std::size_t line = 0) const { return nlohmann::json::parse(lines().at(line)); }
};

/// Runs `moectl ARGUMENTS` in the directory; `arguments` is shell text.
/// `environment`: NAME=VALUE.
inline ToolResult run_tool(const TempDir& dir, const std::string& arguments, const std::string& input = "",
                           const std::string& environment = "") {
  const std::string in = dir.write(".in", input);
  const std::string command = "cd '" + dir.path("") + "' && " + environment + " '" MOECTL_TOOL "' " +
                              arguments + " <'" + in + "' >'" + dir.path(".out") + "' 2>'" +
                              dir.path(".err") + "'";
  const int status = std::system(command.c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, TempDir::read(dir.path(".out")),
          TempDir::read(dir.path(".err"))};
}

/// Containers may have no pseudo-terminals.
inline bool has_terminals() {
  return std::system("script -qec true /dev/null </dev/null >/dev/null 2>&1") == 0;
}

/// `moectl watch run.jsonl --once` as it is drawn in a terminal of that size.
inline std::string drawn_by_watch(const TempDir& dir, int rows, int columns) {
  const std::string command = "cd '" + dir.path("") + "' && script -qec \"stty rows " + std::to_string(rows) +
                              " cols " + std::to_string(columns) +
                              "; '" MOECTL_TOOL "' watch run.jsonl --once\" /dev/null </dev/null >out 2>&1";
  EXPECT_EQ(std::system(command.c_str()), 0);
  std::string out = TempDir::read(dir.path("out"));
  std::erase(out, '\r');
  return out;
}

}  // namespace moectl
