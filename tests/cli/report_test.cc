// What the page holds; how it looks and answers in a browser is tested in tests/browser.
#include <gmock/gmock.h>

#include "tool.h"

namespace moectl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string record(int step, const std::string& counts, const std::string& more = "") {
  return R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":100,"top_k":1,"counts":)" + counts +
         more + "}\n";
}

/// The data that a page embeds.
nlohmann::json data_of(const std::string& page) {
  const std::string open = R"(<script type="application/json" id="data">)";
  const std::size_t from = page.find(open) + open.size();
  return nlohmann::json::parse(page.substr(from, page.find("</script>", from) - from));
}

TEST(Report, IsOnePageThatNeedsNothingElse) {
  const TempDir dir;
  dir.write("a.jsonl", record(0, "[60,40]", R"(,"loss":2.5)"));
  const ToolResult result = run_tool(dir, "report a.jsonl -o report.html");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.out + result.err, "");
  const std::string page = TempDir::read(dir.path("report.html"));
  EXPECT_THAT(page, HasSubstr("Chart.js v"));
  for (const char* outside :
       {" src=", "<link rel=\"stylesheet\"", "@import", "/*DATA*/", "/*APP*/", "/*CHART*/", "/*STYLE*/"}) {
    EXPECT_THAT(page, Not(HasSubstr(outside)));
  }
  EXPECT_EQ(run_tool(dir, "report a.jsonl -o -").out, page);
  EXPECT_EQ(run_tool(dir, "report a.jsonl -o /nonexistent/x.html").code, 1);
  EXPECT_EQ(run_tool(dir, "report a.jsonl").code, 2);
}

TEST(Report, ItsFiguresAreThoseOfCompare) {
  const TempDir dir;
  std::string run;
  for (int step = 0; step < 300; ++step)
    run += record(step, step == 150 ? "[100,0]" : "[55,45]", R"(,"loss":2.5)");
  dir.write("a.jsonl", run);
  ASSERT_EQ(run_tool(dir, "report a.jsonl --shift 150 -o r.html").code, 0);
  const auto page = data_of(TempDir::read(dir.path("r.html"))).at(0);
  const auto compare =
      nlohmann::json::parse(run_tool(dir, "compare a.jsonl --shift 150 --format json").out).at(0);
  for (const auto& [name, value] : page["figures"].items()) {
    if (value.is_null()) {
      EXPECT_TRUE(compare[name].is_null()) << name;
    } else {
      EXPECT_EQ(value.get<double>(), compare[name].get<double>()) << name;
    }
  }
}

TEST(Report, TheWorstStateOfAColumnIsTheOneThatHealthReports) {
  const TempDir dir;
  // 1000 steps share 500 columns: two states in each.
  std::string run =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})"
      "\n";
  for (int step = 0; step < 1000; ++step) {
    run +=
        record(step, "[50,50]", step % 2 == 0 ? R"(,"health":"oscillating")" : R"(,"health":"imbalanced")");
  }
  dir.write("a.jsonl", run);
  ASSERT_EQ(run_tool(dir, "report a.jsonl -o r.html").code, 0);
  const auto page = data_of(TempDir::read(dir.path("r.html"))).at(0);
  ASSERT_FALSE(page["layers"][0]["health"].empty());
  for (const auto& state : page["layers"][0]["health"]) {
    EXPECT_EQ(page["health_names"].at(state.get<std::size_t>()), "oscillating");
  }
}

// Twenty steps of forty tokens each, all of {0, 1}, {0, 2} or {1, 2}.
TEST(Report, ThePairsThatTokensChooseStandByLayer) {
  const TempDir dir;
  std::string run =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":3,"top_k":2}}})"
      "\n";
  for (int step = 0; step < 20; ++step) {
    run += R"({"step":)" + std::to_string(step) +
           R"(,"layer":0,"tokens":40,"counts":[30,30,20],"pairs":[[1,20,10],[2,10],[]]})" + "\n";
  }
  dir.write("a.jsonl", run);
  const ToolResult result = run_tool(dir, "report a.jsonl -o r.html");
  ASSERT_EQ(result.code, 0) << result.err;
  const std::string page = TempDir::read(dir.path("r.html"));
  EXPECT_EQ(data_of(page).at(0)["layers"][0]["pairs"],
            nlohmann::json::parse("[[0,1,400,0.88889],[0,2,200,0.66667],[1,2,200,0.66667]]"));
  EXPECT_THAT(page, HasSubstr("Experts that the same tokens choose"));
}

TEST(Report, NoticesStandInTheirOwnWords) {
  const TempDir dir;
  std::string run =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})"
      "\n";
  for (int step = 0; step < 9; ++step) {
    const std::string value = std::to_string(step);
    const std::string notice =
        R"(,"notices":[{"kind":"invalid","step":)" + value + R"(,"text":"experts[)" + value + R"(] = 9"}])";
    run += record(step, "[50,50]", step < 4 ? "" : notice);
  }
  run += R"({"step":8,"layer":null,"notices":[{"kind":"config","step":7,"text":"one"},)"
         R"({"kind":"config","step":8,"text":"two"}]})"
         "\n";
  dir.write("a.jsonl", run);
  const ToolResult result = run_tool(dir, "report a.jsonl -o r.html");
  ASSERT_EQ(result.code, 0) << result.err;
  const auto notices = data_of(TempDir::read(dir.path("r.html"))).at(0)["notices"];
  const auto expected =
      nlohmann::json::parse(R"([{"kind":"config","layer":null,"first":7,"count":1,"text":"one"},)"
                            R"({"kind":"config","layer":null,"first":8,"count":1,"text":"two"},)"
                            R"({"kind":"invalid","layer":0,"first":4,"count":5,"text":"experts[4] = 9"}])");
  EXPECT_EQ(notices, expected);
}

TEST(Report, TheResponseOfEachLayerStandsInATable) {
  const TempDir dir;
  std::string run =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1}}})"
      "\n";
  for (int step = 0; step < 9; ++step) {
    const bool held = step >= 3 && step < 7;
    const std::string temperature =
        R"(,"actuators":{"router_temperature":{"applied":[1],"responsiveness":{"state":"unknown"}}})";
    run += record(
        step, "[50,50]",
        (held ? R"(,"responsiveness":{"state":"unresponsive","gain":0.01,"error":0.1,"slope":"measured"})"
              : R"(,"responsiveness":{"state":"answers","gain":0.95,"error":0.1,"slope":"measured"})") +
            temperature);
  }
  dir.write("a.jsonl", run);
  const ToolResult result = run_tool(dir, "report a.jsonl -o r.html");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(data_of(TempDir::read(dir.path("r.html"))).at(0)["responses"],
            nlohmann::json::parse(
                R"([{"layer":0,"actuator":"expert_bias","state":"answers","gain":0.95,"error":0.1,)"
                R"("slope":"measured","late":0,"held":4,"first_held":3},)"
                R"({"layer":0,"actuator":"router_temperature","state":"unknown","late":0,"held":0}])"));
}

TEST(Report, DownsamplingKeepsExtremes) {
  const TempDir dir;
  std::string run;
  for (int step = 0; step < 5000; ++step) run += record(step, step == 3333 ? "[100,0]" : "[52,48]");
  dir.write("a.jsonl", run);
  ASSERT_EQ(run_tool(dir, "report a.jsonl -o r.html").code, 0);
  const auto page = data_of(TempDir::read(dir.path("r.html"))).at(0);
  EXPECT_EQ(page["width"], 16);  // 5000 steps in at most 600 columns, doubling
  EXPECT_EQ(page["columns"], 313);
  const auto& max = page["series"]["max_vio"]["max"];
  ASSERT_EQ(max.size(), 313U);
  EXPECT_EQ(max[3333 / 16], 1.0);
  EXPECT_NEAR(page["series"]["max_vio"]["mean"][3333 / 16].get<double>(), (1 + 15 * 0.04) / 16, 1e-5);
  EXPECT_EQ(max[0], 0.04);
  EXPECT_EQ(page["layers"][0]["max_vio"][3333 / 16], 1.0);
}

std::string from_base64(const std::string& text) {
  static const std::string kDigits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  unsigned word = 0, bits = 0;
  for (const char c : text.substr(0, text.find('='))) {
    word = word << 6 | static_cast<unsigned>(kDigits.find(c));
    bits += 6;
    if (bits < 8) continue;
    bits -= 8;
    bytes += static_cast<char>(word >> bits & 255);
  }
  return bytes;
}

// Where there are very many experts, fewer columns of each are kept; extremes still are.
TEST(Report, MapsOfManyExpertsAreCoarserAndKeepExtremes) {
  const TempDir dir;
  std::string even = "[1", one = "[0";
  for (int e = 1; e < 256; ++e) {
    even += ",1";
    one += e == 3 ? ",256" : ",0";
  }
  const std::string first = R"({"format":"moectl-trace","version":1,"layers":64,"experts":256,"top_k":1})";
  std::string run = first + "\n";
  for (int step = 0; step < 500; ++step) {
    run += R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":256,"counts":)" +
           (step == 333 ? one : even) + "]}\n";
  }
  dir.write("a.jsonl", run);
  ASSERT_EQ(run_tool(dir, "report a.jsonl -o r.html").code, 0);
  const auto page = data_of(TempDir::read(dir.path("r.html"))).at(0);
  EXPECT_EQ(page["columns"], 500);
  const auto& load = page["layers"][0]["load"];
  EXPECT_EQ(load["rows"], 256);
  ASSERT_EQ(load["each"], 2) << "by the layers that came, whatever the first line says";
  const std::string cells = from_base64(load["data"]);
  ASSERT_EQ(cells.size(), 256U * 250);
  for (std::size_t e = 0; e < 256; ++e) {
    for (std::size_t c = 0; c < 250; ++c) {
      // 127 is the mean load, 0 and 254 an eighth and eight times of it and more.
      const int expected = c != 333 / 2 ? 127 : e == 3 ? 254 : 0;
      ASSERT_EQ(static_cast<unsigned char>(cells[e * 250 + c]), expected) << e << ' ' << c;
    }
  }
}

TEST(Report, UnreadableLinesAreReportedAndNamesCannotEndTheScript) {
  const TempDir dir;
  const std::string name = "x<script>.jsonl";
  dir.write(name, record(0, "[60,40]", R"(,"domain_counts":{"</script><b>":[10,10]})") + "torn </script>\n" +
                      record(2, "[1000,0]") + record(7, "[60,40]") + "{\"step\":8");
  const ToolResult result = run_tool(dir, "report '" + name + "' -o r.html");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_THAT(result.err, HasSubstr("skipped: x<script>.jsonl:2: line: not JSON"));
  EXPECT_THAT(result.err, HasSubstr(":3: counts: sum 1000"));
  EXPECT_THAT(result.err, HasSubstr(":5: line: not JSON"));
  const auto page = data_of(TempDir::read(dir.path("r.html"))).at(0);
  EXPECT_EQ(page["name"], name);
  EXPECT_EQ(page["fault_count"], 3);
  EXPECT_EQ(page["records"], 2);
  EXPECT_EQ(page["last"], 7);
  EXPECT_TRUE(page["layers"][0]["domains"].contains("</script><b>"));
  EXPECT_EQ(run_tool(dir, "report - -o r.html", "nothing\n").code, 1);
}

// A load of 60 % with a target of 75 % is .8 of the target: log2 of that on a scale of ±3 is 127 - 13.6 of 254.
TEST(Report, LoadsAreShownOverTheirTargets) {
  const TempDir dir;
  dir.write("a.jsonl",
            R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":3,"top_k":1,)"
            R"("targets":[0.75,0.25,0]}}})"
            "\n" +
                record(0, "[60,40,0]"));
  const ToolResult result = run_tool(dir, "report a.jsonl -o r.html");
  ASSERT_EQ(result.code, 0) << result.err;
  const auto run = data_of(TempDir::read(dir.path("r.html"))).at(0);
  EXPECT_EQ(run["targets"], (std::vector<double>{0.75, 0.25, 0}));
  // 127 (1 + log2(.8)/3) = 113.4, 127 (1 + log2(1.6)/3) = 155.7, and 127, on target: bytes 113, 156, 127.
  EXPECT_EQ(run["layers"][0]["load"]["data"], "cZx/");
  dir.write("b.jsonl", record(0, "[60,40,0]"));
  ASSERT_EQ(run_tool(dir, "report b.jsonl -o r.html").code, 0);
  EXPECT_FALSE(data_of(TempDir::read(dir.path("r.html"))).at(0).contains("targets"));
}

/// The first line of a run log: the model, and more of its config.
std::string first_line(const std::string& config = "") {
  return R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":2,"top_k":1})" +
         config + "}}\n";
}

/// The page's data, or what was said instead.
nlohmann::json reported(const TempDir& dir, const std::string& log, std::string* said = nullptr) {
  dir.write("run.jsonl", log);
  const ToolResult result = run_tool(dir, "report run.jsonl -o r.html");
  if (said) *said = result.err;
  if (result.code != 0) return nullptr;
  return data_of(TempDir::read(dir.path("r.html"))).at(0);
}

TEST(Report, WithoutTrainingRecordsThereIsNothingToReport) {
  const TempDir dir;
  std::string said;
  EXPECT_TRUE(reported(dir, record(0, "[50,50]", R"(,"tag":"validation")"), &said).is_null());
  EXPECT_EQ(said, "moectl: run.jsonl: no record of a layer tagged 'train'\n");
  EXPECT_TRUE(reported(dir, first_line() + R"({"step":0,"layer":null,"loss":2})" + "\n", &said).is_null());
  EXPECT_EQ(said, "moectl: run.jsonl: no record of a layer tagged 'train'\n");
}

TEST(Report, AdviceIsOnTheConfigInForce) {
  const TempDir dir;
  const auto run = [&](const std::string& before, const std::string& after) {
    const auto section = [](const std::string& policy) {
      return R"(,"expert_bias":{"policy":")" + policy + R"("})";
    };
    std::string log = first_line(section(before));
    for (int step = 0; step < 200; ++step) {
      if (step == 50) {
        log += R"({"step":50,"config":{"model":{"layers":1,"experts":2,"top_k":1})" + section(after) + "}}\n";
      }
      log += record(step, "[90,10]", R"(,"actuators":{"expert_bias":{"applied":[0.5,-0.5],"reasons":[]}})");
    }
    return reported(dir, log);
  };
  const auto started = run("fixed", "sign_bias");
  EXPECT_THAT(started["advice"].dump(), Not(HasSubstr("no policy controls this run")));
  EXPECT_EQ(started["sections"]["expert_bias"]["policies"], nlohmann::json::parse(R"(["sign_bias"])"));
  EXPECT_EQ(started["sections"]["expert_bias"]["policy"], "sign_bias");
  const auto stopped = run("sign_bias", "fixed");
  EXPECT_THAT(stopped["advice"].dump(), HasSubstr("no policy controls this run"));
  EXPECT_EQ(stopped["sections"]["expert_bias"]["policies"], nlohmann::json::parse(R"(["sign_bias"])"));
  EXPECT_EQ(run("sign_bias", "adaptive_bias")["sections"]["expert_bias"]["policies"],
            nlohmann::json::parse(R"(["sign_bias","adaptive_bias"])"));
}

TEST(Report, ASetPointIsThatOfTheConfigInForce) {
  const TempDir dir;
  const auto config = [](const std::string& metric) {
    return R"(,"aux_loss_weight":{"policy":"pi","options":{"metric":")" + metric + R"(","target":0.1}})";
  };
  std::string log = first_line(config("load_cv"));
  for (int step = 0; step < 200; ++step) {
    if (step == 50)
      log +=
          R"({"step":50,"config":{"model":{"layers":1,"experts":2,"top_k":1})" + config("max_load") + "}}\n";
    log +=
        record(step, "[90,10]", R"(,"actuators":{"aux_loss_weight":{"applied":[0.1],"reasons":["range"]}})");
  }
  EXPECT_THAT(
      reported(dir, log)["advice"].dump(),
      HasSubstr("is at its limit (0.1) and max_load stays at 0.9: the target of 0.1 lies out of reach"));
}

TEST(Report, TheMeansOfItsTableAreWeightedByTokens) {
  const TempDir dir;
  std::string run;
  for (int step = 0; step < 200; ++step) {
    const bool large = step % 10 == 0;
    run += R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":)" + (large ? "9991" : "1") +
           R"(,"top_k":1,"counts":)" + (large ? "[4995,4996]" : "[1,0]") + "}\n";
  }
  const auto page = reported(dir, run);
  ASSERT_FALSE(page.is_null());
  int found = 0;
  for (const auto& row : page["metrics"]) {
    if (row["name"] != "max_vio") continue;
    ++found;
    // Ten steps of 9991 tokens and ninety of one, as `compare` has it.
    EXPECT_NEAR(row["mean"].get<double>(), 100 / 1e5, 1e-7);
    EXPECT_NEAR(row["mean"].get<double>(), page["figures"]["max_vio"].get<double>(), 1e-7);
  }
  EXPECT_EQ(found, 1);
}

TEST(Report, WrongTypesOfAConfigAreNamed) {
  const TempDir dir;
  const auto weight = [](const std::string& options) {
    return R"(,"aux_loss_weight":{"policy":"pi","options":)" + options + '}';
  };
  const std::pair<std::string, std::string> kWrong[] = {
      {R"(,"expert_bias":5)", "config: expert_bias: 5: must be an object whose policy is a word"},
      {R"(,"expert_bias":{"policy":[1]})",
       R"(config: expert_bias: {"policy":[1]}: must be an object whose policy is a word)"},
      {weight("7"), "config: aux_loss_weight.options: 7: must be an object"},
      {weight(R"({"metric":5})"), "config: aux_loss_weight.options.metric: 5: must be a word in quotes"},
      {weight(R"({"metric":"max_vio","target":"x"})"),
       R"(config: aux_loss_weight.options.target: "x": must be a number)"},
      {R"(,"timeline":7)", "config: timeline: 7: must be an array"},
      {R"(,"timeline":[{},3])", "config: timeline[1]: 3: must be an object"},
      {R"(,"timeline":[{"router_temperature":1}])",
       "config: timeline[0].router_temperature: 1: must be an object whose policy is a word"},
      {R"(,"layers":{})", "config: layers: {}: must be an array"},
      {R"(,"layers":[{"ids":[0],"expert_bias":[]}])",
       "config: layers[0].expert_bias: []: must be an object whose policy is a word"},
  };
  for (const auto& [config, words] : kWrong) {
    std::string said;
    const std::string acted =
        record(0, "[50,50]", R"(,"actuators":{"aux_loss_weight":{"applied":[1],"reasons":["range"]}})");
    EXPECT_TRUE(reported(dir, first_line(config) + acted, &said).is_null()) << config;
    EXPECT_EQ(said, "moectl: run.jsonl:1: " + words + '\n');
    EXPECT_EQ(run_tool(dir, "compare run.jsonl").err, "moectl: run.jsonl:1: " + words + '\n');
    // The same in the middle of a run.
    const std::string change =
        R"({"step":1,"config":{"model":{"layers":1,"experts":2,"top_k":1})" + config + "}}\n";
    EXPECT_FALSE(reported(dir, first_line() + acted + change, &said).is_null()) << config;
    EXPECT_EQ(said, "skipped: run.jsonl:3: " + words + '\n');
  }
  std::string said;
  EXPECT_FALSE(reported(dir, first_line() + record(0, "[50,50]") + R"({"step":1,"config":{}})" + "\n", &said)
                   .is_null());
  EXPECT_EQ(said, "skipped: run.jsonl:3: config.model: missing: required\n");
}

TEST(Report, StrangeNumbersAndActuatorsAreRead) {
  const TempDir dir;
  std::string said;
  const std::string mode = R"(,"mode":"active")";
  const auto page = reported(
      dir,
      first_line(mode) +
          record(0, "[50,50]", R"(,"loss":1e-310,"actuators":{"mode":{"applied":[1],"reasons":["rate"]}})") +
          record(1, "[50,50]", R"(,"loss":1.7976931348623157e308)"),
      &said);
  ASSERT_FALSE(page.is_null()) << said;
  EXPECT_EQ(page["actuators"], nlohmann::json::object());
}

}  // namespace
}  // namespace moectl
