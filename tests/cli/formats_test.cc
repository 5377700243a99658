// docs/formats.md against the reader, the writer and the example files: its tables are read and tried row by row.
#include <gmock/gmock.h>

#include <filesystem>
#include <map>
#include <regex>
#include <set>

#include "moectl/notice.h"
#include "tool.h"

namespace moectl {
namespace {

using Json = nlohmann::ordered_json;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const std::string kDocs = MOECTL_SOURCE_DIR "/docs/";

struct Row {
  std::string field, needed;
  Json example;  // an object of this field alone
};
using Rows = std::vector<Row>;

std::string without_ticks(const std::string& cell) {
  const std::size_t from = cell.find('`'), to = cell.rfind('`');
  return from < to ? cell.substr(from + 1, to - from - 1) : cell;
}

/// The tables of the page, by the heading that they stand under.
std::map<std::string, Rows> read_tables() {
  std::map<std::string, Rows> tables;
  std::istringstream page(TempDir::read(kDocs + "formats.md"));
  std::string heading;
  for (std::string line; std::getline(page, line);) {
    if (line.rfind("##", 0) == 0) heading = line.substr(line.find(' ') + 1);
    if (line.rfind("| `", 0) != 0) continue;
    std::vector<std::string> cells;
    std::istringstream cut(line.substr(2));
    for (std::string cell; std::getline(cut, cell, '|');) cells.push_back(cell);
    if (cells.size() < 6) continue;
    const std::string needed = cells[3].substr(1, cells[3].size() - 2);
    tables[heading].push_back(
        {without_ticks(cells[0]), needed, Json::parse('{' + without_ticks(cells[4]) + '}')});
  }
  return tables;
}

Rows table(const std::string& heading) {
  static const std::map<std::string, Rows> kTables = read_tables();
  const auto it = kTables.find(heading);
  if (it == kTables.end()) throw std::runtime_error("no table under " + heading);
  return it->second;
}

const char* const kFirstLine = "Trace: the first line";
const char* const kRecord = "Trace: a record";
const char* const kForeign = "Numbers from elsewhere";
const char* const kRunFirstLine = "Run log: the first line";
const char* const kRunRecord = "Run log: a record";

Json all_of(const Rows& rows) {
  Json object = Json::object();
  for (const Row& row : rows) object.update(row.example);
  return object;
}

Json run_header() {
  Json header = {{"format", "moectl-run"}, {"version", 1}};
  header.update(all_of(table(kRunFirstLine)));
  return header;
}

ToolResult read(const Json& header, const Json& record) {
  const TempDir dir;
  return run_tool(dir, "metrics -", header.dump() + '\n' + record.dump() + '\n');
}

/// No field is true or false: a reader that knows the field refuses such a value by name.
void expect_known(const std::string& field, const ToolResult& result) {
  EXPECT_EQ(result.code, 1) << field;
  EXPECT_THAT(result.err, HasSubstr(field + ": true: must")) << field;
}

TEST(Formats, TheExamplesOfATableAreOneValidLine) {
  const ToolResult result = read(all_of(table(kFirstLine)), all_of(table(kRecord)));
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.json()["metrics"]["drop_rate"], 1 / 16.0);
  Json record = all_of(table(kRecord));
  record.update(all_of(table(kRunRecord)));
  EXPECT_EQ(read(run_header(), record).code, 0);
}

TEST(Formats, TheReaderKnowsEveryFieldOfTheTables) {
  const Json header = all_of(table(kFirstLine)), record = all_of(table(kRecord));
  for (const Row& row : table(kFirstLine)) {
    Json wrong = header;
    wrong[row.field] = true;
    expect_known(row.field, read(wrong, record));
  }
  for (const Row& row : table(kRecord)) {
    Json wrong = record;
    wrong[row.field] = true;
    expect_known(row.field, read(header, wrong));
  }
  Json wrong_header = run_header();
  wrong_header["config"] = true;
  expect_known("config", read(wrong_header, record));
  for (const Row& row : table(kRunRecord)) {
    Json wrong = record;
    wrong[row.field] = true;
    expect_known(row.field, read(run_header(), wrong));
  }
  for (const Row& row : table("A notice")) {
    Json wrong = record;
    wrong["notices"] = all_of(table(kRunRecord))["notices"];
    wrong["notices"][0][row.field] = true;
    expect_known("notices[0]." + row.field, read(run_header(), wrong));
    wrong["notices"][0].erase(row.field);
    EXPECT_THAT(read(run_header(), wrong).err, HasSubstr("notices[0]." + row.field + ": missing: required"));
  }
  for (const Row& row : table("The response of the load")) {
    Json wrong = record;
    wrong["responsiveness"] = all_of(table("The response of the load"));
    EXPECT_EQ(read(run_header(), wrong).code, 0);
    wrong["responsiveness"][row.field] = true;
    expect_known("responsiveness." + row.field, read(run_header(), wrong));
  }
  for (const Row& row : table("An actuator")) {
    Json wrong = record;
    wrong["actuators"]["expert_bias"][row.field] = true;
    expect_known("actuators.expert_bias." + row.field, read(run_header(), wrong));
  }
}

TEST(Formats, WhatIsNeededIsNeededAndTheRestIsNot) {
  Rows needed_rows = table(kRecord);
  std::erase_if(needed_rows, [](const Row& row) { return row.needed != "yes"; });
  const Json header = all_of(table(kFirstLine)), least = all_of(needed_rows);
  EXPECT_EQ(needed_rows.size(), 3U);
  EXPECT_EQ(read(header, least).code, 0) << read(header, least).err;
  for (const Row& row : needed_rows) {
    Json less = least;
    less.erase(row.field);
    EXPECT_THAT(read(header, less).err, HasSubstr(row.field + ": missing: required")) << row.field;
  }
  Rows needed_first = table(kFirstLine);
  std::erase_if(needed_first, [](const Row& row) { return row.needed != "yes"; });
  Json with_top_k = least;
  with_top_k["top_k"] = 2;
  EXPECT_EQ(read(all_of(needed_first), with_top_k).code, 0);
  EXPECT_THAT(read(all_of(needed_first), least).err, HasSubstr("top_k: missing"));
  // A group is whole or absent.
  for (const Row& row : table(kRecord)) {
    if (row.needed.rfind("group", 0) != 0) continue;
    Json part = all_of(table(kRecord));
    part.erase(row.field);
    EXPECT_THAT(read(header, part).err, HasSubstr(row.field + ": missing: required with")) << row.field;
  }
}

void names_of(const Json& object, std::set<std::string>& names) {
  for (const auto& [key, value] : object.items()) names.insert(key);
}

TEST(Formats, TheWriterWritesWhatThePageSaysAndNothingElse) {
  const TempDir dir;
  const std::string config = kDocs + "example_config.yaml", trace = kDocs + "example_trace.jsonl";
  const std::string text = TempDir::read(config);
  dir.write("brief.yaml", text + "log: {per_expert: false, rotate_mb: 100}\n");
  ASSERT_EQ(run_tool(dir, "replay " + config + ' ' + trace + " -o whole.jsonl").code, 0);
  ASSERT_EQ(run_tool(dir, "replay brief.yaml " + trace + " -o brief.jsonl").code, 0);
  std::set<std::string> header, record, actuator, guard;
  for (const char* file : {"whole.jsonl", "brief.jsonl"}) {
    std::istringstream lines(TempDir::read(dir.path(file)));
    for (std::string line; std::getline(lines, line);) {
      const Json object = Json::parse(line);
      names_of(object, object.contains("format") ? header : record);
      if (object.contains("guard")) names_of(object["guard"], guard);
      if (!object.contains("actuators")) continue;
      for (const auto& [name, entry] : object["actuators"].items()) names_of(entry, actuator);
    }
  }
  const auto expect_same = [](std::set<std::string> written, const std::vector<std::string>& headings,
                              const std::set<std::string>& unwritten) {
    std::set<std::string> documented;
    for (const std::string& heading : headings) {
      for (const Row& row : table(heading)) documented.insert(row.field);
    }
    written.insert(unwritten.begin(), unwritten.end());
    EXPECT_EQ(written, documented);
  };
  // A run log's config says the shape; `replay` has no tag but `train`, which is not written. Nothing
  // is wrong with the example, so it has no notices; its recorded loads answer nothing, so the response is not checked;
  // each of its tokens selects k experts; a replay has neither feed-forward nor probes, and judges no response.
  expect_same(header, {kFirstLine, kRunFirstLine}, {"layers", "experts", "top_k"});
  record.erase("guard");  // has a table of its own
  expect_same(record, {kRecord, kRunRecord}, {"tag", "notices", "choices_sq", "responsiveness"});
  expect_same(actuator, {"An actuator"}, {"deployed", "responsiveness"});
  expect_same(guard, {"The guard"}, {});
}

// Fields are the first words that the functions of src/log are called with.
TEST(Formats, EveryFieldThatTheSourcesNameStandsOnThePage) {
  std::set<std::string> documented;
  for (const char* heading :
       {kFirstLine, kRecord, kForeign, kRunFirstLine, kRunRecord, "A notice", "The response of the load",
        "An actuator", "The guard", "The most and the least loaded"}) {
    for (const Row& row : table(heading)) documented.insert(row.field);
  }
  documented.insert({"guard", "update_frequency", "model", "targets"});  // described in the text
  const std::set<std::string> no_fields = {"line", "null", "true", "false"};
  const std::regex call("(?:\\w\\(|\\[)\\s*\"([a-z_]+)\"");
  std::set<std::string> named;
  for (const auto& entry : std::filesystem::directory_iterator(MOECTL_SOURCE_DIR "/src/log")) {
    if (entry.path().extension() != ".cc") continue;
    const std::string text = TempDir::read(entry.path());
    for (std::sregex_iterator it(text.begin(), text.end(), call), end; it != end; ++it)
      named.insert((*it)[1]);
  }
  EXPECT_GT(named.size(), 30U);
  for (const std::string& field : named) {
    EXPECT_TRUE(documented.count(field) || no_fields.count(field)) << field << " is not on the page";
  }
}

TEST(Formats, EveryKindOfNoticeStandsOnThePage) {
  const std::string text = TempDir::read(kDocs + "formats.md");
  for (int k = 0; k < kNoticeKindCount; ++k) {
    EXPECT_THAT(text, HasSubstr('`' + std::string(name_of(static_cast<NoticeKind>(k))) + '`'));
  }
}

TEST(Formats, TheExampleFilesAreReadByTheTool) {
  const TempDir dir;
  const std::string trace = kDocs + "example_trace.jsonl", run = kDocs + "example_run.jsonl";
  const ToolResult metrics = run_tool(dir, "metrics " + trace);
  ASSERT_EQ(metrics.code, 0) << metrics.err;
  EXPECT_EQ(metrics.lines().size(), 7U);
  EXPECT_EQ(metrics.json(2)["metrics"]["max_vio"], 0.5);  // counts 6, 4, 4, 2 of 16
  EXPECT_TRUE(metrics.json(6)["metrics"]["max_vio"].is_null());
  const ToolResult replay = run_tool(dir, "replay " + kDocs + "example_config.yaml " + trace);
  ASSERT_EQ(replay.code, 0) << replay.err;
  EXPECT_EQ(replay.lines().size(), 10U);
  for (const char* command : {"compare ", "metrics "}) {
    const ToolResult result = run_tool(dir, std::string(command) + run);
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_EQ(result.err, "");
  }
  // The first record has every field there is.
  std::istringstream lines(TempDir::read(trace));
  std::string header, record;
  std::getline(lines, header);
  std::getline(lines, record);
  std::set<std::string> there, documented;
  names_of(Json::parse(record), there);
  for (const Row& row : table(kRecord)) documented.insert(row.field);
  EXPECT_EQ(there, documented);
}

TEST(Formats, TheLinesOnThePageStandInTheExampleFiles) {
  const std::string files =
      TempDir::read(kDocs + "example_trace.jsonl") + TempDir::read(kDocs + "example_run.jsonl");
  std::istringstream page(TempDir::read(kDocs + "formats.md"));
  int found = 0;
  for (std::string line; std::getline(page, line);) {
    if (line.rfind('{', 0) != 0) continue;
    ++found;
    EXPECT_THAT(files, HasSubstr(line + '\n'));
  }
  EXPECT_EQ(found, 6);
}

}  // namespace
}  // namespace moectl
