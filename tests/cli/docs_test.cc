// The docs against the sources: links, the README's program, and lists that must be whole.
#include <gmock/gmock.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <optional>
#include <regex>
#include <set>

#include "moectl/health.h"
#include "moectl/limits.h"
#include "moectl/metrics.h"
#include "tool.h"

namespace moectl {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

const fs::path kRoot = MOECTL_SOURCE_DIR;

std::string page(const std::string& name) {
  return TempDir::read((kRoot / name).string());
}

/// Every Markdown page of the project.
std::vector<fs::path> pages() {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(kRoot)) {
    if (entry.path().extension() == ".md") found.push_back(entry.path());
  }
  for (const char* folder :
       {"docs", "src", "include", "policies", "examples", "bench", "tests", "monitoring"}) {
    for (const auto& entry : fs::recursive_directory_iterator(kRoot / folder)) {
      if (entry.path().extension() == ".md" &&
          entry.path().string().find("node_modules") == std::string::npos)
        found.push_back(entry.path());
    }
  }
  return found;
}

/// The name that GitHub gives to the place of a heading.
std::string anchor_of(const std::string& heading) {
  std::string anchor;
  for (const char c : heading) {
    if (c == ' ' || c == '-') {
      anchor += '-';
    } else if (std::isalnum(static_cast<unsigned char>(c)) || c == '_' || (c & 0x80)) {
      anchor += static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    }
  }
  return anchor;
}

bool has_anchor(const fs::path& file, const std::string& anchor) {
  std::istringstream lines(TempDir::read(file.string()));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind('#', 0) == 0 && anchor_of(line.substr(line.find(' ') + 1)) == anchor) return true;
  }
  return false;
}

TEST(Docs, EveryLinkLeadsSomewhere) {
  const std::regex link(R"(\]\(([^)#\s]*)(#[^)\s]*)?\))");
  std::size_t links = 0;
  for (const fs::path& from : pages()) {
    const std::string text = TempDir::read(from.string());
    for (std::sregex_iterator it(text.begin(), text.end(), link), end; it != end; ++it) {
      const std::string path = (*it)[1], anchor = (*it)[2];
      if (path.find("://") != std::string::npos) continue;
      ++links;
      const fs::path to = path.empty() ? from : from.parent_path() / path;
      if (to.filename() == "config.md") continue;  // generated
      EXPECT_TRUE(fs::exists(to)) << from << ": " << path;
      EXPECT_TRUE(anchor.empty() || has_anchor(to, anchor.substr(1))) << from << ": " << path << anchor;
    }
  }
  EXPECT_GT(links, 80U);
}

TEST(Docs, EveryFolderHasAReadme) {
  std::vector<fs::path> folders = {
      kRoot,         kRoot / "include/moectl", kRoot / "policies",   kRoot / "bench",
      kRoot / "src", kRoot / "examples",       kRoot / "monitoring", kRoot / "tests"};
  for (const auto& entry : fs::directory_iterator(kRoot / "src")) {
    if (entry.is_directory()) folders.push_back(entry.path());
  }
  EXPECT_GT(folders.size(), 18U);
  for (const fs::path& folder : folders) EXPECT_TRUE(fs::exists(folder / "README.md")) << folder;
}

TEST(Docs, TheReadmesProgramCompiles) {
  const std::string readme = page("README.md"), begin = "```cpp\n";
  const std::size_t from = readme.find(begin);
  ASSERT_NE(from, std::string::npos);
  const std::size_t start = from + begin.size();
  const TempDir dir;
  const std::string source = dir.write("readme.cc", readme.substr(start, readme.find("```", start) - start));
  const std::string command = "c++ -std=c++20 -fsyntax-only -Wall -Wextra -Werror -I'" +
                              (kRoot / "include").string() + "' '" + source + "' 2>'" + dir.path("err") + "'";
  EXPECT_EQ(std::system(command.c_str()), 0) << TempDir::read(dir.path("err"));
}

// Without regard to indentation and line breaks.
std::string squeezed(const std::string& text) {
  std::istringstream words(text);
  std::string out;
  for (std::string word; words >> word;) out += word + ' ';
  return out;
}

TEST(Docs, TheCodeOfYourOwnLoopIsThatOfTheExample) {
  const std::string text = page("docs/your-loop.md"), code = squeezed(page("examples/your_router.cc"));
  int blocks = 0;
  const std::string begin = "```cpp\n", end = "```";
  for (std::size_t at = text.find(begin); at != std::string::npos; at = text.find(begin, at)) {
    at += begin.size();
    const std::string block = text.substr(at, text.find(end, at) - at);
    EXPECT_THAT(code, HasSubstr(squeezed(block)));
    ++blocks;
  }
  EXPECT_GT(blocks, 8);
}

TEST(Docs, EveryReasonAndHealthStateIsExplained) {
  const std::string limits = page("docs/limits.md"), formats = page("docs/formats.md");
  for (int r = 0; r < kReasonCount; ++r) {
    EXPECT_THAT(limits, HasSubstr("\n| `" + std::string(name_of(static_cast<Reason>(r))) + "` |"));
  }
  for (int h = 0; h < kHealthCount; ++h) {
    EXPECT_THAT(formats, HasSubstr('`' + std::string(name_of(static_cast<Health>(h))) + '`'));
  }
}

/// The cells of a line of a table, without spaces around them.
std::vector<std::string> cells_of(const std::string& line) {
  std::vector<std::string> cells;
  std::istringstream parts(line.substr(1));
  for (std::string cell; std::getline(parts, cell, '|');) {
    const std::size_t from = cell.find_first_not_of(' '), to = cell.find_last_not_of(' ');
    cells.push_back(from == std::string::npos ? "" : cell.substr(from, to + 1 - from));
  }
  return cells;
}

/// Rows of the tables of docs/metrics.md, by the metric's name.
std::map<std::string, std::vector<std::string>> metric_rows() {
  std::map<std::string, std::vector<std::string>> rows;
  std::istringstream lines(page("docs/metrics.md"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("| `", 0) != 0) continue;
    const std::vector<std::string> cells = cells_of(line);
    if (cells.size() != 5) continue;
    EXPECT_TRUE(rows.try_emplace(cells[0].substr(1, cells[0].size() - 2), cells).second) << cells[0];
  }
  return rows;
}

/// The number at the end of "1.75/2 = 0.875", and half a unit of its last digit.
std::optional<std::pair<double, double>> last_number(const std::string& cell) {
  const std::size_t space = cell.rfind(' ');
  const std::string word = space == std::string::npos ? cell : cell.substr(space + 1);
  char* end = nullptr;
  const double value = std::strtod(word.c_str(), &end);
  if (word.empty() || *end != '\0') return std::nullopt;
  const std::size_t point = word.find('.');
  const double digits = point == std::string::npos ? 0 : static_cast<double>(word.size() - point - 1);
  return std::pair{value, point == std::string::npos ? 1e-6 : 0.501 * std::pow(10, -digits)};
}

TEST(Docs, EveryMetricStandsOnItsPageWithItsUnitAndItsValueByHand) {
  const auto rows = metric_rows();
  const std::string text = page("docs/metrics.md"), begin = "```json\n";
  const std::size_t from = text.find(begin) + begin.size();
  const TempDir dir;
  const ToolResult result = run_tool(dir, "metrics -", text.substr(from, text.find("```", from) - from));
  ASSERT_EQ(result.code, 0) << result.err;
  ASSERT_EQ(result.lines().size(), 2U);
  const nlohmann::json values = result.json(1)["metrics"];
  // 60 steps in which two loads take turns.
  std::string turns;
  for (int step = 0; step < 60; ++step) {
    turns += nlohmann::json({{"step", step},
                             {"layer", 0},
                             {"tokens", 16},
                             {"top_k", 1},
                             {"counts", step % 2 ? std::vector<int>{6, 10} : std::vector<int>{10, 6}}})
                 .dump() +
             '\n';
  }
  const ToolResult alternating = run_tool(dir, "metrics -", turns);
  ASSERT_EQ(alternating.lines().size(), 60U);
  const nlohmann::json time = alternating.json(59)["metrics"];
  int compared = 0;
  for (const MetricField& field : metric_fields()) {
    const std::string name(field.name);
    const auto row = rows.find(name);
    ASSERT_NE(row, rows.end()) << name << " is not on docs/metrics.md";
    EXPECT_EQ(row->second[1], field.unit) << name;
    EXPECT_GT(row->second[2].size(), 5U) << name;
    const std::string& by_hand = row->second[4];
    if (by_hand == "absent") {
      EXPECT_TRUE(values[name].is_null()) << name << ' ' << values[name];
    } else if (by_hand.rfind("near ", 0) == 0) {
      EXPECT_NEAR(time[name].get<double>(), std::stod(by_hand.substr(5)), 0.15) << name;
    } else if (by_hand == "below 1") {
      EXPECT_LT(time[name].get<double>(), 1) << name;
    } else {
      const auto number = last_number(by_hand);
      ASSERT_TRUE(number) << name << ": " << by_hand;
      ASSERT_TRUE(values[name].is_number()) << name;
      EXPECT_NEAR(values[name].get<double>(), number->first, number->second) << name;
    }
    ++compared;
  }
  EXPECT_EQ(static_cast<std::size_t>(compared), rows.size()) << "the page has a metric that does not exist";
  for (const ExpertField& field : expert_fields())
    EXPECT_THAT(text, HasSubstr('`' + std::string(field.name) + '`'));
  for (const DomainField& field : domain_fields())
    EXPECT_THAT(text, HasSubstr('`' + std::string(field.name) + '`'));
}

TEST(Docs, EveryPublicHeaderStandsOnTheApiPageAndInTheArchitecture) {
  const std::string api = page("docs/api.md"), architecture = page("docs/architecture.md");
  for (const auto& entry : fs::directory_iterator(kRoot / "include/moectl")) {
    if (entry.path().extension() != ".h") continue;
    const std::string name = '`' + entry.path().filename().string() + '`';
    EXPECT_THAT(api, HasSubstr(name));
    EXPECT_THAT(architecture, HasSubstr(name));
  }
}

// The core's folders, in the order in which CMakeLists.txt and the layer test have them.
TEST(Docs, TheArchitecturesTableIsInLayerOrder) {
  const std::string build = page("CMakeLists.txt"), mark = "set(core_folders ";
  const std::size_t from = build.find(mark);
  ASSERT_NE(from, std::string::npos);
  std::istringstream names(build.substr(from + mark.size(), build.find(')', from) - from - mark.size()));
  const std::string architecture = page("docs/architecture.md");
  std::size_t last = 0, folders = 0;
  for (std::string name; names >> name; ++folders) {
    const std::size_t at = architecture.find("\n| [`" + name + "`]");
    ASSERT_NE(at, std::string::npos) << name;
    EXPECT_GT(at, last) << name;
    last = at;
  }
  EXPECT_EQ(folders, 12U);
}

/// The tests of a file, as SUITE.NAME; those of Python as FILE::NAME.
std::set<std::string> tests_in(const fs::path& file) {
  const std::regex macro(R"(\bTEST(?:_F|_P)?\((\w+),\s*(\w+)\))"), function(R"(\bdef (test_\w+)\()");
  const bool python = file.extension() == ".py";
  const std::string text = TempDir::read(file.string());
  std::set<std::string> found;
  for (std::sregex_iterator it(text.begin(), text.end(), python ? function : macro), end; it != end; ++it) {
    found.insert(python ? file.filename().string() + "::" + (*it)[1].str()
                        : (*it)[1].str() + '.' + (*it)[2].str());
  }
  return found;
}

/// Every test of the sources.
std::set<std::string> tests_of_the_sources() {
  std::set<std::string> found;
  for (const auto& entry : fs::recursive_directory_iterator(kRoot / "tests")) {
    if (entry.path().extension() == ".cc") found.merge(tests_in(entry.path()));
  }
  return found;
}

/// The tests that `text` names in code marks, as `Suite.Name`, `Suite.Begin…`, `Suite.*` or `Suite*`: what each begins with.
std::vector<std::string> tests_named(const std::string& text) {
  const std::regex name("`([A-Z]\\w+(?:\\.[A-Z]\\w+(?:\\*|…)?|\\.\\*|\\*))`");
  std::vector<std::string> found;
  for (std::sregex_iterator it(text.begin(), text.end(), name), end; it != end; ++it) {
    const std::string whole = (*it)[1];
    found.push_back(whole.substr(0, std::min(whole.find('*'), whole.find("…"))));
  }
  return found;
}

// A promise whose test was renamed or taken away must not go on naming it.
TEST(Docs, EveryTestThatAPageNamesIsThere) {
  const std::set<std::string> tests = tests_of_the_sources();
  EXPECT_GT(tests.size(), 500U);
  const auto exists = [&](const std::string& begin) {
    const auto at = tests.lower_bound(begin);
    return at != tests.end() && at->starts_with(begin);
  };
  EXPECT_THAT(tests_named("`Docs.Every…`, `Docs*`, `Docs.*`, `Docs.Xyz`, `docs.x`, `Docs`"),
              ::testing::ElementsAre("Docs.Every", "Docs", "Docs.", "Docs.Xyz"));
  EXPECT_TRUE(exists("Docs.Every"));
  EXPECT_FALSE(exists("Docs.Xyz"));
  for (const fs::path& from : pages()) {
    for (const std::string& name : tests_named(TempDir::read(from.string())))
      EXPECT_TRUE(exists(name)) << from << " names " << name;
  }
  EXPECT_GT(tests_named(page("docs/security.md")).size(), 20U);
  const std::string security = page("docs/security.md");
  const std::regex fuzzer("fuzzer `(\\w+)`");
  for (std::sregex_iterator it(security.begin(), security.end(), fuzzer), end; it != end; ++it)
    EXPECT_TRUE(fs::exists(kRoot / "fuzz" / ((*it)[1].str() + ".cc"))) << (*it)[1];
}

// The list of what failed in other hands names tests that stand in the row's file, and leaves none of theirs out.
TEST(Docs, EachFieldCaseNamesATestThatExists) {
  const std::regex in_marks("`([^`]+)`");
  std::set<std::string> listed;
  std::istringstream lines(page("tests/field_cases.md"));
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("| ", 0) != 0 || line.rfind("| id ", 0) == 0) continue;
    const std::vector<std::string> cells = cells_of(line);
    ASSERT_EQ(cells.size(), 5U) << line;
    const std::string& names = cells[3];
    ASSERT_GT(cells[4].size(), 2U) << line;
    const fs::path file = kRoot / "tests" / cells[4].substr(1, cells[4].size() - 2);
    ASSERT_TRUE(fs::exists(file)) << file;
    const std::set<std::string> there = tests_in(file);
    int named = 0;
    for (std::sregex_iterator it(names.begin(), names.end(), in_marks), end; it != end; ++it) {
      const std::string name = (*it)[1];
      EXPECT_TRUE(there.contains(name)) << file << " has no " << name;
      listed.insert(name);
      ++named;
    }
    EXPECT_GT(named, 0) << line;
  }
  for (const std::string& name : tests_of_the_sources()) {
    if (!name.starts_with("FieldCases.") && !name.starts_with("LooseEnds.")) continue;
    EXPECT_TRUE(listed.contains(name)) << name << " is not in tests/field_cases.md";
  }
}

// ---- D7: figures of others that count otherwise, said where a user would be misled. ----

TEST(FieldCases, D7_WhereOthersCountOtherwiseThePagesSaySo) {
  const std::string concepts = page("docs/concepts.md");
  EXPECT_THAT(concepts, HasSubstr("NeMo AutoModel's CV divides by N - 1"));
  EXPECT_THAT(concepts, HasSubstr("Hugging Face's `router_aux_loss_coef` counts k times as much"));
  // A step is compared with the stacked update, too.
  for (const char* name : {"README.md", "docs/results.md"}) {
    EXPECT_THAT(page(name), HasSubstr("stacked")) << name;
  }
}

TEST(Docs, TheHelpOfCommandsThatReadTracesShowsALineOfOne) {
  const TempDir dir;
  for (const std::string command : {"metrics", "replay"}) {
    const ToolResult help = run_tool(dir, command + " --help");
    const std::size_t from = help.out.find("{\"step\":");
    ASSERT_NE(from, std::string::npos) << command;
    const std::string line = help.out.substr(from, help.out.find('}', from) + 1 - from);
    EXPECT_EQ(run_tool(dir, "metrics -", line + '\n').code, 0) << line;
  }
}

}  // namespace
}  // namespace moectl
