// Files that someone made to do harm: names that steer terminals or pages, sizes that no memory has, links that lead
// elsewhere.
#include <gmock/gmock.h>
#include <sys/resource.h>
#include <zlib.h>

#include <filesystem>
#include <functional>

#include "base/input_limits.h"
#include "moectl/run_log.h"
#include "test_paths.h"
#include "tool.h"

namespace moectl {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const std::string kSteering =
    "\x1b]0;x\x07\xc2\x9b"
    "31m\xe2\x80\xae";  // OSC, CSI of C1, right-to-left override

bool steers(const std::string& text) {
  return text.find_first_of("\x1b\x07") != std::string::npos || text.find("\xc2\x9b") != std::string::npos ||
         text.find("\xe2\x80\xae") != std::string::npos;
}

const std::string kRecord = R"({"step":0,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3]})";

std::string json_of(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', true);
}

/// `text` behind a limit of memory of the tool: 2 GiB. Sanitizers need their own room.
std::string in_little_memory() {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  return "";
#else
  return "ulimit -v 2097152 &&";
#endif
}

void write_gzip(const std::string& path, const std::string& line, int times) {
  const gzFile file = gzopen(path.c_str(), "wb9");
  for (int i = 0; i < times; ++i) gzwrite(file, line.data(), static_cast<unsigned>(line.size()));
  gzclose(file);
}

// Names in a log that are marks of the page's template once blanked the page.
TEST(HostileInput, MarksOfThePageInNamesStayText) {
  const TempDir dir;
  const std::string name = "/*APP*//*CHART*//*STYLE*//*DATA*/</script><script>alert(1)</script><!--";
  dir.write("run.jsonl",
            R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":4,"top_k":2}}})"
            "\n"
            R"({"step":0,"layer":0,"tokens":8,"counts":[5,4,4,3],"alerts":[)" +
                json_of(name) + "]}\n");
  ASSERT_EQ(run_tool(dir, "report run.jsonl -o page.html").code, 0);
  const std::string page = TempDir::read(dir.path("page.html"));
  const std::size_t data = page.find(R"(<script type="application/json" id="data">)");
  ASSERT_NE(data, std::string::npos);
  const std::size_t begin = page.find('[', data), end = page.find("</script>", data);
  const nlohmann::json runs = nlohmann::json::parse(page.substr(begin, end - begin));
  EXPECT_THAT(runs.dump(), HasSubstr(name));
  EXPECT_THAT(page, Not(HasSubstr("<script>alert")));
  // The scripts stand behind the data once each, as without such a name.
  dir.write("plain.jsonl", kRecord + "\n");
  ASSERT_EQ(run_tool(dir, "report plain.jsonl -o plain.html").code, 0);
  const std::string plain = TempDir::read(dir.path("plain.html"));
  const std::size_t plain_end = plain.find("</script>", plain.find("id=\"data\""));
  EXPECT_EQ(page.substr(end), plain.substr(plain_end));
}

TEST(HostileInput, NoNameSteersTheTerminal) {
  const TempDir dir;
  const std::string s = json_of(kSteering);  // JSON's strings are YAML's
  dir.write("good.yaml", "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2, domains: [" + s +
                             ", b]}\nhealth: {alerts: [{metric: max_vio, above: 1, name: " + s + "}]}\n");
  dir.write("key.yaml", "version: 1\n" + s + ": 3\nmodel: {layers: 1, experts: 4, top_k: 2}\n");
  dir.write("word.yaml",
            "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\nexpert_bias: {policy: " + s + "}\n");
  const std::string counts = R"("tokens":8,"top_k":2,"counts":[5,4,4,3])";
  dir.write("good.jsonl",
            R"({"step":0,"layer":0,)" + counts + R"(,"domain_counts":{)" + s + R"(:[1,1,1,1]}})" + "\n");
  dir.write("tag.jsonl", R"({"step":0,"layer":0,"tag":)" + s + ',' + counts + "}\n" +
                             R"({"step":0,"layer":0,"tag":)" + s + ',' + counts + "}\n");
  dir.write("domain.jsonl",
            R"({"step":0,"layer":0,)" + counts + R"(,"domain_counts":{)" + s + R"(:[9,1,1,1]}})" + "\n");
  dir.write("run.jsonl",
            R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":4,"top_k":2}}})"
            "\n"
            R"({"step":0,"layer":0,)" +
                counts + R"(,"health":)" + s + R"(,"alerts":[)" + s + R"(],"metrics":{)" + s +
                R"(:1},"actuators":{)" + s + R"(:{"applied":[1],"reasons":[)" + s + "]}}}\n");
  dir.write("matrix.csv", "step,layer,expert0" + kSteering + ",expert1\n1,0,x" + kSteering + ",2\n");
  int good = 0;
  for (const std::string command : {"check good.yaml",
                                    "check good.yaml --explain",
                                    "check good.yaml --format json",
                                    "check key.yaml",
                                    "check word.yaml",
                                    "metrics good.jsonl",
                                    "metrics good.jsonl --format screen --by domain",
                                    "metrics tag.jsonl --format screen",
                                    "metrics domain.jsonl",
                                    "metrics run.jsonl --trends",
                                    "metrics run.jsonl --format table",
                                    "compare run.jsonl run.jsonl",
                                    "watch run.jsonl --once --plain",
                                    "replay good.yaml good.jsonl",
                                    "capacity good.jsonl",
                                    "placement good.jsonl --devices 2",
                                    "tensorboard run.jsonl -o board",
                                    "import wandb matrix.csv -o out.jsonl",
                                    "report run.jsonl -o r.html",
                                    "check $'none\\033[31m.yaml'",
                                    "metrics $'none\\xc2\\x9b.jsonl'",
                                    "$'\\033[31m'",
                                    "check --$'\\033[31m'"}) {
    const ToolResult result = run_tool(dir, command);
    good += result.code == 0;
    EXPECT_FALSE(steers(result.out)) << command << ": " << result.out;
    EXPECT_FALSE(steers(result.err)) << command << ": " << result.err;
    EXPECT_NE(result.code, -1) << command;
  }
  EXPECT_GT(good, 8);
}

// What is escaped for a terminal reads back as what it was.
TEST(HostileInput, AnEscapedNameReadsBackAsItself) {
  const TempDir dir;
  dir.write("c.yaml", "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2, domains: [" + json_of(kSteering) +
                          ", b]}\n");
  const ToolResult first = run_tool(dir, "check c.yaml");
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_THAT(first.out, HasSubstr("\\u009b31m\\u202e"));
  dir.write("again.yaml", first.out);
  EXPECT_EQ(run_tool(dir, "check again.yaml").out, first.out);
  dir.write("t.jsonl", R"({"step":0,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3],"tag":)" +
                           json_of(kSteering) + "}\n");
  EXPECT_EQ(run_tool(dir, "metrics t.jsonl").json()["tag"], kSteering);
}

TEST(HostileInput, SizesAreCheckedBeforeMemoryIsTaken) {
  const TempDir dir;
  const auto refused = [&](const std::string& arguments, const std::string& words) {
    const ToolResult result = run_tool(dir, arguments, "", in_little_memory());
    EXPECT_EQ(result.code, 1) << arguments << ": " << result.out.substr(0, 300);
    EXPECT_THAT(result.err, HasSubstr(words)) << arguments;
    EXPECT_LT(result.err.size(), 6000U) << arguments;
  };
  const auto config = [&](const std::string& model, const std::string& rest = "") {
    dir.write("c.yaml", "version: 1\nmodel: {" + model + "}\n" + rest);
    return std::string("check c.yaml");
  };
  refused(config("layers: 1000000, experts: 1000000, top_k: 1"),
          "model.layers: 1000000: must be from 1 to 65536");
  refused(config("layers: 65536, experts: 65536, top_k: 1"), "layers × experts: must be at most 4194304");
  refused(config("layers: 64, experts: 65536, top_k: 1, split_sequences: 1000000"),
          "must be at most 134217728");
  refused(config("layers: 64, experts: 64, top_k: 1, delay: 2147483647"),
          "model.delay: 2147483647: must be from 0 to 1000");
  refused(config("layers: 64, experts: 64, top_k: 1", "metrics: {trend_window: 2000000000}\n"),
          "metrics.trend_window: 2000000000: must be from 4 to 10000");
  refused(config("layers: 1, experts: 4, top_k: 1, domains: [" + std::string(1 << 20, 'a') + "]"),
          "a word of 1048576 bytes: must be at most 4096");
  refused(config("layers: 1, experts: 4, top_k: 1", std::string(1 << 24, '#')), "must be at most 16777216");
  refused(config(std::string(70, '[')), "must be at most 64 levels");
  const auto trace = [&](const std::string& lines) {
    dir.write("t.jsonl", lines);
    return std::string("metrics t.jsonl");
  };
  const auto array_of = [](int n) {
    std::string text = "[1";
    for (int i = 1; i < n; ++i) text += ",1";
    return text + "]";
  };
  const std::string start = R"({"step":0,"layer":0,"tokens":1000000,"top_k":1,"counts":)";
  refused(trace(start + array_of(65537) + "}\n"), "t.jsonl:1: counts: 65537 values: must be at most 65536");
  refused(trace(start + array_of(65536) + ",\"margins\":[]}\n"), "margins: 0 values: must have 65536");
  // Two bytes an expert ask for a number for each pair.
  const auto pairs_of = [&](int experts) {
    std::string pairs = array_of(experts) + ",\"pairs\":[[]";
    for (int i = 1; i < experts; ++i) pairs += ",[]";
    return pairs + "]}\n";
  };
  refused(trace(start + pairs_of(17000)),
          "t.jsonl:1: counts: 144508532 numbers in all sums: must be at most 134217728");
  std::string many;
  for (int layer = 0; layer < 79; ++layer) {
    many += R"({"step":0,"layer":)" + std::to_string(layer) + R"(,"tokens":1850,"top_k":1,"counts":)" +
            pairs_of(1850);
  }
  refused(
      trace(many),
      "t.jsonl:79: layer: 135264353 numbers in the sums of all layers and tags: must be at most 134217728");
  std::string domains = "{\"d0\":[]";
  for (int d = 1; d < 50000; ++d) domains += ",\"d" + std::to_string(d) + "\":[]";
  refused(trace(start + array_of(65536) + ",\"domain_counts\":" + domains + "}}\n"),
          "0 values: must have 65536");
  refused(trace(start + "[1],\"" + std::string(10000, 'k') + "\":1}\n"),
          "a key of 10000 bytes: must be at most 4096");
  std::string layers;
  for (int l = 0; l < 65537; ++l) {
    layers += R"({"step":0,"layer":)" + std::to_string(l) +
              R"(,"tokens":1,"top_k":1,"counts":[1,0]})"
              "\n";
  }
  refused(trace(layers), "t.jsonl:65537: layer: 65537 layers and tags");
  const auto npy = [](std::string header) {
    header.resize(118, ' ');
    return std::string("\x93NUMPY\1\0\x76\0", 10) + header;
  };
  dir.write("huge.npy", npy("{'descr': '<i8', 'fortran_order': False, 'shape': (268435456,), }"));
  dir.write("logits.npy", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (268435456, 4), }"));
  refused("import hf logits.npy -o out.jsonl --top-k 1 --mask huge.npy", "huge.npy: ends too early");
}

// Files with holes, which take no room on the disk: the length alone says that they are too long.
TEST(HostileInput, AFileThatIsTooLongIsNotRead) {
  const TempDir dir;
  for (const auto& [begin, words] :
       {std::pair{"moectlst", "must be at most 4294967296 bytes"},
        std::pair{"[", "must be at most 268435456 bytes"},
        std::pair{R"({"format":"moectl-biases",)", "must be at most 268435456 bytes"}}) {
    dir.write("long", begin);
    std::filesystem::resize_file(dir.path("long"), std::uintmax_t{5} << 30);
    const ToolResult result = run_tool(dir, "biases long -o out.json", "", in_little_memory());
    EXPECT_EQ(result.code, 1) << begin;
    EXPECT_THAT(result.err, HasSubstr(words)) << begin;
  }
}

TEST(HostileInput, AFileThatInflatesWithoutEndIsRefused) {
  const TempDir dir;
  write_gzip(dir.path("blank.gz"), std::string(1 << 20, ' '), 256);
  ASSERT_LT(std::filesystem::file_size(dir.path("blank.gz")), 400000U);
  for (const char* command : {"metrics blank.gz", "import csv blank.gz -o out.jsonl --top-k 1"}) {
    const ToolResult result = run_tool(dir, command, "", in_little_memory());
    EXPECT_EQ(result.code, 1) << command;
    EXPECT_THAT(result.err, HasSubstr("longer than 33554432 bytes")) << command;
  }
  write_gzip(dir.path("lines.gz"), std::string(1 << 20, ' ') + '\n', 256);
  for (const char* command : {"metrics lines.gz", "import megatron lines.gz -o out.jsonl --top-k 1"}) {
    const ToolResult result = run_tool(dir, command, "", in_little_memory());
    EXPECT_EQ(result.code, 1) << command;
    EXPECT_THAT(result.err, HasSubstr("must be at most 200 times its size beyond the first 67108864"))
        << command;
  }
}

TEST(HostileInput, TheNumberOfAPieceIsNoLoop) {
  const TempDir dir;
  const auto log = [](const std::string& piece) {
    return R"({"format":"moectl-run","version":1,"piece":)" + piece +
           R"(,"config":{"model":{"layers":1,"experts":4,"top_k":2}}})"
           "\n"
           R"({"step":0,"layer":0,"tokens":8,"counts":[5,4,4,3]})"
           "\n";
  };
  dir.write("run.jsonl", log("9007199254740992"));
  EXPECT_THAT(run_tool(dir, "watch run.jsonl --once --plain").err,
              HasSubstr("piece: 9007199254740992: must be at most 1000000000"));
  // A followed log whose new file claims to be far ahead.
  dir.write("run.jsonl", log("1"));
  dir.write("next.jsonl", log("1000000000"));
  int waits = 0;
  LogReader reader(dir.path("run.jsonl"), FaultPolicy::kSalvage, [&] {
    if (++waits == 1) std::filesystem::rename(dir.path("next.jsonl"), dir.path("run.jsonl"));
    return waits < 3;
  });
  while (reader.next()) continue;
  EXPECT_EQ(reader.header().piece, 1000000000);
}

TEST(HostileInput, ALayerThatChangesIsNamedByFileAndLine) {
  const TempDir dir;
  dir.write("c.yaml", "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2}\n");
  dir.write("experts.jsonl",
            kRecord + "\n" + R"({"step":1,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,2,1]})" + "\n");
  dir.write("k.jsonl",
            kRecord + "\n" + R"({"step":1,"layer":0,"tokens":16,"top_k":1,"counts":[5,4,4,3]})" + "\n");
  for (const std::string command :
       {"metrics FILE", "metrics FILE --trends", "metrics FILE --format screen --sum", "replay c.yaml FILE",
        "compare FILE k.jsonl", "report FILE -o r.html", "watch FILE --once --plain",
        "placement FILE --devices 2", "capacity FILE", "tensorboard FILE -o board"}) {
    for (const auto& [file, words] :
         {std::pair{"experts.jsonl", "experts.jsonl:2: counts: 5 values: must be 4"},
          std::pair{"k.jsonl", "k.jsonl:2: top_k: 1: must be 2"}}) {
      std::string with = command;
      with.replace(with.find("FILE"), 4, file);
      EXPECT_THAT(run_tool(dir, with).err, HasSubstr(words)) << with;
    }
  }
}

// A file beside the one that is written takes its name at the end: a link under that name leads nowhere.
TEST(HostileInput, APlantedLinkIsNotFollowed) {
  const TempDir dir;
  dir.write("victim", "precious");
  dir.write("m.csv", "1,2,3\n1,2,4\n");
  for (const char* output : {"out.jsonl", "out.jsonl.gz"}) {
    std::filesystem::create_symlink(dir.path("victim"), dir.path(std::string(output) + ".part"));
    ASSERT_EQ(run_tool(dir, std::string("import csv m.csv --top-k 1 -o ") + output).code, 0);
    EXPECT_EQ(TempDir::read(dir.path("victim")), "precious");
    EXPECT_FALSE(std::filesystem::is_symlink(dir.path(output)));
  }
}

TEST(HostileInput, ANameOfDotsStaysInItsFolder) {
  const TempDir dir;
  for (const char* name : {"...jsonl", "..jsonl", "...jsonl.gz"}) {
    dir.write(name, kRecord + "\n");
    std::filesystem::remove_all(dir.path("out"));
    ASSERT_EQ(run_tool(dir, std::string("tensorboard ") + name + " -o out/board").code, 0) << name;
    EXPECT_TRUE(std::filesystem::exists(dir.path(std::string("out/board/") + name))) << name;
    for (const auto& entry : std::filesystem::directory_iterator(dir.path("out")))
      EXPECT_EQ(entry.path().filename(), "board") << name;
  }
}

TEST(HostileInput, ALinkInPlaceOfARunIsNotFollowed) {
  const TempDir dir;
  for (const char* name : {"a.jsonl", "b.jsonl"}) dir.write(name, kRecord + "\n");
  std::filesystem::create_directories(dir.path("victim"));
  std::filesystem::create_directories(dir.path("board"));
  std::filesystem::create_directory_symlink("../victim", dir.path("board/b"));
  const ToolResult result = run_tool(dir, "tensorboard a.jsonl b.jsonl -o board");
  EXPECT_EQ(result.code, 1);
  EXPECT_THAT(result.err, HasSubstr("board/b: is a link"));
  EXPECT_TRUE(std::filesystem::is_empty(dir.path("victim")));
}

/// 1025 records of 2^53 tokens: their counts sum to more than 64 bits hold. `varies` is the field that tells them apart.
std::string records_beyond_64_bits(const std::function<std::string(int)>& varies) {
  std::string lines;
  for (int i = 0; i < 1025; ++i)
    lines += "{" + varies(i) +
             R"(,"layer":0,"tokens":9007199254740992,"top_k":1,"counts":[9007199254740990,2]})" + "\n";
  return lines;
}

TEST(HostileInput, CountsThatSumBeyond64BitsAreNamed) {
  const TempDir dir;
  dir.write("parts.jsonl",
            records_beyond_64_bits([](int i) { return R"("step":0,"tag":"mb)" + std::to_string(i) + '"'; }));
  dir.write("steps.jsonl", records_beyond_64_bits([](int i) { return "\"step\":" + std::to_string(i); }));
  for (const auto& [command, words] :
       {std::pair{"compare parts.jsonl",
                  "layer 0: step 0: the parts of the step: their sums must be at most 2^63 - 1"},
        std::pair{"report parts.jsonl -o r.html", "layer 0: step 0: the parts of the step: their sums"},
        std::pair{"metrics --sum steps.jsonl",
                  "layer 0: the records of the trace: their sums must be at most 2^63 - 1"},
        std::pair{"metrics --compare train train steps.jsonl",
                  "layer 0: the records of the window: their sums must be at most 2^63 - 1"},
        std::pair{"compare --sum-steps 0 steps.jsonl",
                  "layer 0: step 1023: counts of the steps up to this one: must be at most 2^63 - 1"}}) {
    const ToolResult result = run_tool(dir, command);
    EXPECT_EQ(result.code, 1) << command;
    EXPECT_THAT(result.err, HasSubstr(words)) << command;
  }
}

// What a log says of parts of its counts is compared with them.
TEST(HostileInput, NoPartOfARecordIsMoreThanItsWhole) {
  const TempDir dir;
  for (const auto& [more, words] :
       {std::pair{R"("gap_sum":1,"gap_width_sum":1,"gap_near":[6,0,0,0])",
                  "gap_near of expert 0: must be at most the count (5)"},
        std::pair{R"("gap_sum":1,"gap_width_sum":1,"gap_near":[5,4,0,0])",
                  "gap_near: the sum: must be at most gap_tokens (8)"},
        std::pair{R"("prob_sum":[4,2,1,1],"sqrt_prob_sum":[4,2,1,1],"token_entropy_sum":900)",
                  "token_entropy_sum: must be at most ln(experts) for each token (12)"},
        std::pair{
            R"("sequences":2,"sequence_sq":[13,8,8,5],"sequence_cross":[0,0,0,0],"sequence_len_sq":128)",
            "sequence_len_sq: must be at most the sum of sequence_cross (0)"},
        std::pair{
            R"("sequences":9,"sequence_sq":[13,8,8,5],"sequence_cross":[40,32,32,24],"sequence_len_sq":128)",
            "sequences: must be at most tokens (8)"},
        std::pair{R"("pairs":[[1,4,4,3],[2,4,3],[3,3],[]])",
                  "pairs: the sum: must be at most pair_tokens * top_k (top_k - 1)/2 (8)"}}) {
    dir.write("t.jsonl",
              R"({"step":0,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3],)" + std::string(more) + "}\n");
    const ToolResult result = run_tool(dir, "metrics t.jsonl");
    EXPECT_EQ(result.code, 1) << more;
    EXPECT_THAT(result.err, HasSubstr("t.jsonl:1: " + std::string(words))) << more;
  }
}

TEST(HostileInput, NoNameMakesALineOrAColumn) {
  const TempDir dir;
  const std::string name = "x,\"y\"\nlayer 7, train: collapsed", s = json_of(name);
  std::string lines;
  for (int step = 0; step < 8; ++step) {
    lines += R"({"step":)" + std::to_string(step) +
             R"(,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3],"tag":)" + s + R"(,"domain_counts":{)" +
             s + ":[5,4,4,3]}}\n";
  }
  dir.write("t.jsonl", lines);
  dir.write("c.yaml", "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2, domains: [" + s + ", b]}\n");
  for (const std::string command :
       {"metrics t.jsonl --trends --format table", "metrics t.jsonl --trends --format csv",
        "metrics t.jsonl --format screen --by tag", "check c.yaml --explain"}) {
    const ToolResult result = run_tool(dir, command);
    EXPECT_EQ(result.code, 0) << command << ": " << result.err;
    EXPECT_THAT(result.out, HasSubstr("collapsed")) << command;
    EXPECT_THAT(result.out, Not(HasSubstr("\nlayer 7"))) << command;
  }
  EXPECT_THAT(run_tool(dir, "metrics t.jsonl --trends --format csv").out,
              HasSubstr(R"(,0,"x,""y""\u000alayer 7, train: collapsed",)"));
}

TEST(HostileInput, NoNameOfAFileMakesALine) {
  const TempDir dir;
  std::string lines;
  for (int line = 0; line < 200; ++line) lines += "torn\n";
  lines += R"({"step":0,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3]})"
           "\n";
  dir.write("a\nFORGED.jsonl", lines);
  for (const std::string command : {"compare 'a\nFORGED.jsonl'", "watch 'a\nFORGED.jsonl' --once"}) {
    const ToolResult result = run_tool(dir, command);
    EXPECT_THAT(result.err, HasSubstr("FORGED")) << command;
    EXPECT_THAT(result.err, Not(HasSubstr("\nFORGED"))) << command;
  }
}

TEST(HostileInput, NamesOfALogMakeNoEndlessSeries) {
  const TempDir dir;
  std::string lines =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":4,"top_k":2}}})"
      "\n";
  for (int step = 0; step < 2000; ++step) {
    const std::string n = std::to_string(step);
    lines += R"({"step":)" + n + R"(,"layer":0,"tokens":8,"counts":[5,4,4,3],"health":"h)" + n +
             R"(","alerts":["a)" + n + "\"]}\n";
  }
  dir.write("run.jsonl", lines);
  ASSERT_EQ(run_tool(dir, "tensorboard run.jsonl -o board").code, 0);
  std::uintmax_t size = 0;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir.path("board")))
    size += entry.is_regular_file() ? entry.file_size() : 0;
  EXPECT_LT(size, 20U << 20);  // without a limit: 2000 names of each kind in the last step
}

TEST(HostileInput, LayersOfTheFirstLineAreCountedAndDiffer) {
  const TempDir dir;
  const auto log = [&](const std::string& ids) {
    dir.write("t.jsonl",
              R"({"format":"moectl-trace","version":1,"experts":4,"top_k":2,"groups":[{"layers":[0)" + ids +
                  "]}]}\n" + kRecord + "\n");
    return run_tool(dir, "metrics t.jsonl");
  };
  std::string many;
  for (int id = 1; id <= 65536; ++id) many += ',' + std::to_string(id);
  EXPECT_THAT(log(many).err,
              HasSubstr("t.jsonl:1: groups[0].layers: 65537 values: must be at most 65536 in all groups"));
  EXPECT_THAT(log(",0").err, HasSubstr("t.jsonl:1: groups[0].layers: 0: must be in one group, once"));
  EXPECT_EQ(log(",1").code, 0);
}

TEST(HostileInput, ASectionOfTheConfigInALogThatIsNoneIsNamed) {
  const TempDir dir;
  for (const char* section : {"5", R"({"policy":5})"}) {
    dir.write(
        "run.jsonl",
        R"({"format":"moectl-run","version":1,"config":{"model":{"layers":1,"experts":4,"top_k":2},"expert_bias":)" +
            std::string(section) + "}}\n" + R"({"step":0,"layer":0,"tokens":8,"counts":[5,4,4,3]})" + "\n");
    const ToolResult result = run_tool(dir, "report run.jsonl -o r.html");
    EXPECT_EQ(result.code, 1);
    EXPECT_THAT(result.err, HasSubstr("run.jsonl:1: config: expert_bias: "));
  }
}

// SGLang's file has a row for each layer from 0 on: a number makes it as long as it likes.
TEST(HostileInput, ALayerFarAwayMakesNoRowForEachBefore) {
  const TempDir dir;
  const auto placed = [&](const std::vector<int>& layers, const std::string& more = "") {
    std::string trace;
    for (int step = 0; step < 4; ++step) {
      for (const int layer : layers) {
        trace += R"({"step":)" + std::to_string(step) + R"(,"layer":)" + std::to_string(layer) +
                 R"(,"tokens":8,"top_k":2,"counts":[5,4,4,3]})" + "\n";
      }
    }
    return run_tool(dir, "placement - --devices 2 --format sglang" + more, trace, in_little_memory());
  };
  const ToolResult far = placed({0, 1 << 30});
  EXPECT_EQ(far.code, 1);
  EXPECT_EQ(
      far.err,
      "moectl: --format: sglang: layer 1073741824: must be below 65536 with 4 slots: the file has a row for "
      "each layer from 0 on\n");
  EXPECT_THAT(placed({40000}, " --slots 128").err,
              HasSubstr("layer 40000: must be below 32768 with 128 slots"));
  EXPECT_THAT(placed({1, 3, 6, 11}).err, HasSubstr("in order: 0, 2, 4, 5, 7 to 10. SGLang"));
  std::vector<int> odd;
  for (int layer = 1; layer < 100; layer += 2) odd.push_back(layer);
  EXPECT_THAT(placed(odd).err, HasSubstr("26, 28, 30 and 34 more gaps. SGLang"));
}

TEST(HostileInput, APageKeepsNoMoreOfTheExpertsThanItCanShow) {
  const TempDir dir;
  std::string counts = "1";
  for (int i = 1; i < 65536; ++i) counts += ",1";
  const auto log = [&](int layers, const std::string& more) {
    std::string lines;
    for (const int step : {0, 599}) {
      for (int l = 0; l < layers; ++l) {
        lines += R"({"step":)" + std::to_string(step) + R"(,"layer":)" + std::to_string(l) +
                 R"(,"tokens":65536,"top_k":1,"counts":[)" + counts + ']' + more + "}\n";
      }
    }
    dir.write("wide.jsonl", lines);
    return run_tool(dir, "report wide.jsonl -o wide.html", "", in_little_memory());
  };
  EXPECT_EQ(log(2, "").code, 0);
  EXPECT_THAT(log(17, "").err, HasSubstr("experts, over all layers: a page must have at most that many"));
  // Names of alerts, each once, far from the first column.
  std::string names = R"({"step":0,"layer":0,"tokens":4,"top_k":1,"counts":[1,3]})"
                      "\n"
                      R"({"step":599,"layer":0,"tokens":4,"top_k":1,"counts":[1,3],"alerts":[)";
  for (int i = 0; i < 100'000; ++i) names += (i ? ",\"n" : "\"n") + std::to_string(i) + '"';
  dir.write("names.jsonl", names + "]}\n");
  EXPECT_EQ(run_tool(dir, "report names.jsonl -o names.html", "", in_little_memory()).code, 0);
}

// `-o "$OUT"` with a variable that nobody has set.
TEST(HostileInput, NoValueIsEmpty) {
  const TempDir dir;
  dir.write("run.jsonl", kRecord + "\n");
  for (const std::string command :
       {"import csv run.jsonl --top-k 1 -o ''", "report run.jsonl -o ''", "tensorboard run.jsonl -o ''",
        "biases run.jsonl -o ''", "placement run.jsonl --devices 2 --svg ''", "compare ''",
        "--plugin '' policies", "report --output= run.jsonl other.jsonl", "compare run.jsonl --format="}) {
    const ToolResult result = run_tool(dir, command);
    EXPECT_EQ(result.code, 2) << command;
    EXPECT_THAT(result.err, HasSubstr(": must not be empty")) << command;
  }
}

// What follows a log keeps something of each layer, with counts or without.
TEST(HostileInput, LayersWithoutCountsAreCountedToo) {
  const TempDir dir;
  std::string lines =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":65536,"experts":2,"top_k":1}}})"
      "\n";
  for (int layer = 0; layer < 65536; ++layer)
    lines += R"({"step":0,"layer":)" + std::to_string(layer) + R"(,"tokens":1,"health":"healthy"})" + "\n";
  // A record of the whole model is no layer.
  lines += R"({"step":0,"layer":null,"actuators":{}})"
           "\n";
  dir.write("thin.jsonl",
            lines + R"({"step":0,"layer":0,"tag":"one more","tokens":1,"health":"healthy"})" + "\n");
  const std::string said =
      "thin.jsonl:65539: layer: 65537 layers and tags, 0 experts in all: must be at most 65536";
  EXPECT_THAT(run_tool(dir, "compare thin.jsonl").err, HasSubstr(said));
  EXPECT_THAT(run_tool(dir, "watch thin.jsonl --once --plain").err, HasSubstr(said));
}

// Two ranks that may be copies of each other are held until they are told apart, with all that comes after them: a reader
// holds no more than it has room for, and does not read on to the fault behind that.
TEST(HostileInput, WhatWaitsForARankHasALimit) {
  const TempDir dir;
  const std::string header =
      R"({"format":"moectl-run","version":1,"config":{"model":{"layers":2,"experts":2,"top_k":1}}})"
      "\n";
  const auto record = [](int step, int layer, const std::string& tag, const std::string& alerts) {
    return R"({"step":)" + std::to_string(step) + R"(,"layer":)" + std::to_string(layer) + R"(,"tag":")" +
           tag + R"(","tokens":2,"top_k":1,"counts":[1,1],"alerts":[)" + alerts + "]}\n";
  };
  const auto said = [&](const std::string& lines) {
    dir.write("waits.jsonl", lines);
    const std::string compared = run_tool(dir, "compare waits.jsonl", "", in_little_memory()).err;
    EXPECT_EQ(run_tool(dir, "watch waits.jsonl --once --plain", "", in_little_memory()).err, compared);
    return compared;
  };
  const std::string doubt = header + record(0, 0, "rank0", "") + record(0, 0, "rank1", ""), fault = "{\n";
  const std::string many = R"("a")" + [] {
    std::string more;
    for (int i = 1; i < 600'000; ++i) more += R"(,"a")";
    return more;
  }();
  std::string lines = doubt;
  for (int step = 1; step <= 20; ++step) lines += record(step, 0, "train", many);
  const std::string in_doubt = "ranks 0 and 1 hold the same counts, of too few tokens to tell";
  EXPECT_THAT(said(lines + fault), AllOf(HasSubstr(in_doubt), Not(HasSubstr("skipped"))));
  // Few, but long.
  const std::string name(4000, 'a');
  std::string longs = '"' + name + '"';
  for (int i = 1; i < 6000; ++i) longs += R"(,")" + name + '"';
  lines = doubt;
  for (int step = 1; step <= 24; ++step) lines += record(step, 0, "train", longs);
  EXPECT_THAT(said(lines + fault), AllOf(HasSubstr(in_doubt), Not(HasSubstr("skipped"))));
  // One step of one rank.
  lines = header;
  for (int part = 0; part < 20; ++part) lines += record(0, 0, "rank0/mb" + std::to_string(part), many);
  EXPECT_THAT(said(lines + fault),
              AllOf(HasSubstr("step 0: its parts take more than 512 MiB"), Not(HasSubstr("skipped"))));
}

// A list of two bytes takes twenty times as much in memory.
TEST(HostileInput, ValuesAndConfigsOfALogHaveALimit) {
  const TempDir dir;
  std::string lists = "[]";
  for (int i = 1; i < 2'100'000; ++i) lists += ",[]";
  const std::string model = R"("model":{"layers":1,"experts":2,"top_k":1})",
                    record = R"({"step":0,"layer":0,"tokens":2,"top_k":1,"counts":[1,1]})";
  dir.write("header.jsonl", R"({"format":"moectl-run","version":1,"config":{)" + model + R"(,"x":[)" + lists +
                                "]}}\n" + record + "\n");
  dir.write("trace.jsonl", R"({"format":"moectl-trace","version":1,"layers":1,"experts":2,"top_k":1,"x":[)" +
                               lists + "]}\n" + record + "\n");
  for (const char* command : {"compare", "watch --once --plain", "report -o page.html"}) {
    EXPECT_THAT(run_tool(dir, std::string(command) + " header.jsonl", "", in_little_memory()).err,
                HasSubstr("header.jsonl:1: config: "))
        << command;
    EXPECT_THAT(run_tool(dir, std::string(command) + " trace.jsonl", "", in_little_memory()).err,
                HasSubstr("values: must be at most 2097152"))
        << command;
  }
  const std::string text(std::size_t{30} << 20, 'x');
  const auto compared = [&](bool repeated) {
    std::string log = R"({"format":"moectl-run","version":1,"config":{)" + model + "}}\n";
    for (int step = 1; step < 10; ++step) {
      const std::string at = std::to_string(repeated ? 1 : step);
      log += R"({"step":)" + at + R"(,"config":{)" + model + R"(,"y":)" + at + R"(,"x":")" + text + "\"}}\n";
    }
    dir.write("configs.jsonl", log + record + "\n");
    return run_tool(dir, "compare configs.jsonl", "", in_little_memory());
  };
  EXPECT_THAT(compared(false).err, HasSubstr("bytes of configs so far: must be at most 268435456"));
  // As the pieces of a rotated log repeat the one that holds.
  EXPECT_EQ(compared(true).code, 0);
}

// By the cube of the experts, or the square of the domains, these would take many minutes.
TEST(HostileInput, ManyExpertsAndDomainsArePlacedAndCompared) {
  const TempDir dir;
  std::string counts, domains, wide, log;
  for (int i = 0; i < 16384; ++i) counts += (i ? "," : "") + std::to_string(1 + i % 97);
  const int sum = 168 * (97 * 98 / 2) + 88 * 89 / 2;  // 16384 = 168 · 97 + 88
  for (const int step : {0, 1}) {
    wide += R"({"step":)" + std::to_string(step) + R"(,"layer":0,"top_k":1,"tokens":)" + std::to_string(sum) +
            R"(,"counts":[)" + counts + "]}\n";
  }
  dir.write("wide.jsonl", wide);
  const ToolResult placed = run_tool(dir, "placement wide.jsonl --devices 2");
  EXPECT_EQ(placed.code, 0) << placed.err;
  for (int i = 0; i < 200'000; ++i) domains += (i ? ",\"d" : "\"d") + std::to_string(i) + "\":[0,1]";
  for (const int step : {0, 1}) {
    log += R"({"step":)" + std::to_string(step) +
           R"(,"layer":0,"top_k":1,"tokens":400000,"counts":[200000,200000],"domain_counts":{)" + domains +
           "}}\n";
  }
  dir.write("domains.jsonl", log);
  const ToolResult compared = run_tool(dir, "metrics domains.jsonl --compare train@0:1 train@1:");
  EXPECT_EQ(compared.code, 0) << compared.err;
}

TEST(HostileInput, ANameThatIsNoUtf8IsShownInJson) {
  const TempDir dir;
  dir.write("c\xff.yaml", "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2, tokens_per_step: 64}\n");
  const ToolResult result = run_tool(dir, "simulate c*.yaml --steps 20 --format json");
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(nlohmann::json::parse(result.out)[0]["config"], "c\xef\xbf\xbd.yaml");
  const ToolResult key = run_tool(dir, "simulate c*.yaml --steps 20 --set 'expert_bias.\xff=1'");
  EXPECT_EQ(key.code, 1);
  EXPECT_THAT(key.err, HasSubstr("unknown key"));
  dir.write("a.json", "[[1, 2], [3, 4]]");
  dir.write("b\xff.json", "[[1, 2]]");
  const ToolResult biases = run_tool(dir, "biases a.json b*.json --format json");
  ASSERT_EQ(biases.code, 0) << biases.err;
  EXPECT_EQ(biases.json(1)["differs"], "not in b\xef\xbf\xbd.json");
}

// What is written is emptied first: an input that is its own output would be lost.
TEST(HostileInput, NoOutputTakesThePlaceOfAnInput) {
  const TempDir dir;
  std::string trace;
  for (int step = 0; step < 4; ++step) {
    trace += R"({"step":)" + std::to_string(step) + R"(,"layer":0,"tokens":8,"top_k":2,"counts":[5,4,4,3]})" +
             "\n";
  }
  const std::string config =
      "version: 1\nmodel: {layers: 1, experts: 4, top_k: 2, tokens_per_step: 64}\nexpert_bias: {initial: "
      "b.json}\n";
  dir.write("m.csv", "1,2,3\n1,2,4\n");
  dir.write("t", trace);
  dir.write("t.jsonl", trace);
  dir.write("t.jsonl.000001", trace);
  dir.write("gone.jsonl.000001", trace);
  dir.write("q.part", trace);
  write_gzip(dir.path("t.jsonl.gz"), trace, 1);
  const std::string packed = TempDir::read(dir.path("t.jsonl.gz"));
  dir.write("c.yaml", config);
  ASSERT_EQ(run_tool(dir, "replay " MOECTL_SOURCE_DIR
                          "/policies/fixed.yaml t.jsonl --layers 1 --experts 4 --top-k 2 -o fixed.jsonl")
                .code,
            0);
  ASSERT_EQ(run_tool(dir, "biases fixed.jsonl -o b.json").code, 0);
  const std::string biases = TempDir::read(dir.path("b.json"));
  std::filesystem::create_symlink("t.jsonl", dir.path("link"));
  std::filesystem::create_hard_link(dir.path("t.jsonl"), dir.path("other_name"));
  const struct {
    std::string arguments, words;
  } cases[] = {
      {"replay c.yaml t.jsonl -o t.jsonl", "--output: t.jsonl: is the input t.jsonl: must be another file"},
      {"replay c.yaml t.jsonl.gz -o t.jsonl.gz", "--output: t.jsonl.gz: is the input t.jsonl.gz"},
      {"replay c.yaml t.jsonl -o ./t.jsonl", "--output: ./t.jsonl: is the input t.jsonl"},
      {"replay c.yaml t.jsonl -o link", "--output: link: is the input t.jsonl"},
      {"replay c.yaml link -o t.jsonl", "--output: t.jsonl: is the input link"},
      {"replay c.yaml t.jsonl -o other_name", "--output: other_name: is the input t.jsonl"},
      {"replay c.yaml t.jsonl -o t.jsonl.000001",
       "--output: t.jsonl.000001: is a piece of the input t.jsonl"},
      {"replay c.yaml t.jsonl.000001 -o t.jsonl",
       "--output: t.jsonl: has as a piece the input t.jsonl.000001"},
      {"replay c.yaml gone.jsonl.000001 -o gone.jsonl",
       "--output: gone.jsonl: has as a piece the input gone.jsonl.000001"},
      {"import csv q.part --top-k 1 -o q", "--output: q: is written by way of the input q.part"},
      {"replay c.yaml t.jsonl -o c.yaml", "--output: c.yaml: is the input c.yaml"},
      {"replay c.yaml t.jsonl -o b.json", "--output: b.json: is the input b.json"},
      {"simulate c.yaml --steps 20 -o c.yaml", "--output: c.yaml: is the input c.yaml"},
      {"simulate c.yaml --steps 20 -o b.json", "--output: b.json: is the input b.json"},
      {"simulate c.yaml --steps 20 --like t.jsonl -o t.jsonl", "--output: t.jsonl: is the input t.jsonl"},
      {"report t.jsonl -o t.jsonl", "--output: t.jsonl: is the input t.jsonl"},
      {"placement t.jsonl --devices 2 --svg t.jsonl", "--svg: t.jsonl: is the input t.jsonl"},
      {"import csv m.csv --top-k 1 -o m.csv", "--output: m.csv: is the input m.csv"},
      {"import hf x.npy --mask m.csv -o m.csv", "--output: m.csv: is the input m.csv"},
      {"biases b.json -o b.json", "--output: b.json: is the input b.json"},
      {"tensorboard t.jsonl -o t.jsonl", "--output: t.jsonl: is the input t.jsonl"},
      {"tensorboard t -o .", "--output: ./t: is the input t"},
  };
  for (const auto& c : cases) {
    const ToolResult result = run_tool(dir, c.arguments);
    EXPECT_EQ(result.code, 1) << c.arguments;
    EXPECT_THAT(result.err, HasSubstr("moectl: " + c.words)) << c.arguments;
    for (const char* name :
         {"t", "t.jsonl", "t.jsonl.000001", "gone.jsonl.000001", "q.part", "link", "other_name"})
      ASSERT_EQ(TempDir::read(dir.path(name)), trace) << c.arguments << ": " << name;
    ASSERT_EQ(TempDir::read(dir.path("t.jsonl.gz")), packed) << c.arguments;
    ASSERT_EQ(TempDir::read(dir.path("c.yaml")), config) << c.arguments;
    ASSERT_EQ(TempDir::read(dir.path("b.json")), biases) << c.arguments;
    ASSERT_EQ(TempDir::read(dir.path("m.csv")), "1,2,3\n1,2,4\n") << c.arguments;
  }
  const ToolResult redirected = run_tool(dir, "replay c.yaml - -o .in", trace);
  EXPECT_THAT(redirected.err, HasSubstr("--output: .in: is the input <stdin>"));
  EXPECT_EQ(TempDir::read(dir.path(".in")), trace);
  // What is no file keeps nothing that could be lost.
  EXPECT_EQ(run_tool(dir, "replay c.yaml t.jsonl -o /dev/null").code, 0);
  EXPECT_EQ(run_tool(dir, "replay c.yaml - -o run.jsonl", trace).code, 0);
}

}  // namespace
}  // namespace moectl
