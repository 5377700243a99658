// What simdjson makes of a line is held against nlohmann's parser, which reads it in another way.
#include "log/json.h"

#include <gmock/gmock.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <set>

#include "base/input_limits.h"
#include "log/log_record.h"
#include "temp_dir.h"

namespace moectl {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

json rebuilt(JsonValue value) {
  if (value.is_object()) {
    json object = json::object();
    for (const auto member : value.members()) object[std::string(member.key)] = rebuilt(member.value);
    EXPECT_EQ(object.size(), value.size());
    return object;
  }
  if (value.is_array()) {
    json array = json::array();
    for (const JsonValue element : value.elements()) array.push_back(rebuilt(element));
    EXPECT_EQ(array.size(), value.size());
    return array;
  }
  if (value.is_string()) return std::string(value.text());
  if (value.is_integer() && !value.is_large()) return value.as_integer();
  if (value.is_number() && !value.is_large()) return value.as_double();
  return json::parse(value.dump());
}

std::string text_of(const json& value) {
  return value.dump(-1, ' ', false, json::error_handler_t::replace);
}

void parse(JsonParser& parser, std::string text) {
  const std::size_t size = text.size();
  text.append(JsonParser::kPadding, '7');  // what follows is not looked at
  parser.parse(std::string_view(text).substr(0, size));
}

/// What nlohmann's parser says: nothing where it refuses. Of a key that stands twice it tells, too.
std::optional<json> expected_of(const std::string& text, bool& repeated) {
  std::vector<std::set<std::string>> keys;
  repeated = false;
  const auto watch = [&](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key)
      repeated = !keys.back().insert(value.get<std::string>()).second || repeated;
    return true;
  };
  try {
    return std::make_optional<json>(json::parse(text, watch));  // GCC 16 sees two conversions
  } catch (const json::exception&) {
    return std::nullopt;
  }
}

/// True if both accepted the text.
bool compare(JsonParser& parser, const std::string& text) {
  bool repeated = false;
  const std::optional<json> expected = expected_of(text, repeated);
  try {
    parse(parser, text);
  } catch (const JsonError& e) {
    EXPECT_TRUE(!expected || repeated) << text << ": " << e.what();
    if (expected) {
      EXPECT_THAT(e.what(), HasSubstr("stands twice"));
    }
    return false;
  }
  EXPECT_TRUE(expected && !repeated) << text;
  if (!expected) return false;
  const json actual = rebuilt(parser.value());
  EXPECT_EQ(text_of(actual), text_of(*expected)) << text;
  EXPECT_EQ(text_of(json::parse(parser.value().dump())), text_of(*expected)) << text;
  return true;
}

TEST(Json, ReadsWhatNlohmannReads) {
  JsonParser parser;
  for (const char* text :
       {"{}",
        "[]",
        " { \"a\" : [ 1 , -2 , 3.5 , 1e3 , -0 , -0.0 , true , false , null , \"x y\" ] } ",
        "7",
        "\"word\"",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775808",
        "-9223372036854775809",
        "[18446744073709551616,1.5e-19223372036854775809,-20000000000000000000,\"99999999999999999999\"]",
        "{\"\\\"99999999999999999999\":99999999999999999999}",
        "99999999999999999999x",
        "099999999999999999999",
        "9007199254740993",
        "0.1",
        "1E+5",
        "1e-400",
        "1e400",
        "-1e999",
        "4.9406564584124654e-324",
        "2.2250738585072011e-308",
        "123456789012345678901234567890.5e-10",
        "01",
        "-",
        "-a",
        "1.",
        ".5",
        "+1",
        "1e",
        "1e+",
        "0x10",
        "NaN",
        "Infinity",
        "-Infinity",
        "tru",
        "nulll",
        "{\"a\":1,}",
        "[1,]",
        "[,1]",
        "{\"a\"}",
        "{\"a\":}",
        "{a:1}",
        "{'a':1}",
        "\"\\u0041\\n\"",
        "\"\\ud83d\\ude00\"",
        "\"\\ud83d\"",
        "\"\\x\"",
        "\"\xc3\xa4\"",
        "\"\xc3\"",
        "\"\xed\xa0\x80\"",
        "\"\xf4\x90\x80\x80\"",
        "\"\xc0\x80\"",
        "\"a\tb\"",
        "{\"\xc3\xa4\":{\"b\":[1,2]}}",
        "{\"a\\\"b\":1}",
        "[1 2]",
        "{} {}",
        "{}x",
        "[[1],[2,[3]]]",
        "{\"\":1}",
        "",
        " ",
        "[",
        "{\"a\":[1,{\"b\":"}) {
    compare(parser, text);
  }
  // For nlohmann's parser a byte of 0 is the end of the text; here it is garbage behind the value.
  EXPECT_THROW(parse(parser, std::string("{}\0", 3)), JsonError);
  compare(parser, "\xef\xbb\xbf{\"a\":1}");
}

TEST(Json, AKeyThatStandsTwiceIsNamed) {
  JsonParser parser;
  for (const char* text : {R"({"a":1,"key":2,"b":3,"key":4})", R"({"x":[1,[{"key":1,"key":1}]]})",
                           R"({"x":{"y":{"key":null,"\u006bey":2}}})"}) {
    EXPECT_THAT([&] { parse(parser, text); },
                ThrowsMessage<JsonError>("key \"key\" stands twice in one object"));
  }
  EXPECT_TRUE(compare(parser, R"({"a":{"a":{"a":1}},"b":{"a":2}})"));
  for (const int members : {127, 128, 129, 1500}) {
    std::string text = "{";
    for (int i = 0; i < members; ++i) text += (i ? ",\"" : "\"") + std::to_string(i) + "\":1";
    EXPECT_TRUE(compare(parser, text + "}"));
    EXPECT_THAT([&] { parse(parser, text + ",\"77\":2}"); }, ThrowsMessage<JsonError>(HasSubstr("\"77\"")));
  }
  const TempDir dir;
  const std::string path = dir.write("t", "\n{\"step\":0,\"layer\":0,\"step\":1}\n");
  EXPECT_THAT([&] { LogReader reader(path); },
              ThrowsMessage<LogError>(path + ":2: line: not JSON: key \"step\" stands twice in one object"));
}

TEST(Json, DeepNestingIsRefusedWithTheLimit) {
  JsonParser parser;
  const auto nested = [](std::size_t levels) {
    return std::string(levels, '[') + "1" + std::string(levels, ']');
  };
  EXPECT_TRUE(compare(parser, nested(kMostLevels - 1)));
  for (const std::size_t levels : {std::size_t{65}, std::size_t{100000}}) {
    EXPECT_THAT([&] { parse(parser, "{\"a\":" + nested(levels) + "}"); },
                ThrowsMessage<JsonError>("nested deeper than 64 levels"));
  }
  EXPECT_THAT([&] { parse(parser, std::string(100000, '[')); }, ::testing::Throws<JsonError>());
}

// Keys are compared with those before them: each with each would take a minute.
TEST(Json, AnObjectOfManyMembersTakesNoLongerThanItsLength) {
  std::string text = "{";
  for (int i = 0; i < 200000; ++i) text += "\"k" + std::to_string(i) + "\":" + std::to_string(i) + ',';
  JsonParser parser;
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THAT([&] { parse(parser, text + "\"k7\":-1}"); }, ThrowsMessage<JsonError>(HasSubstr("\"k7\"")));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST(Json, AWrongElementFarDownALongArrayIsNamedAtOnce) {
  std::string text = R"({"step":0,"layer":0,"tokens":0,"top_k":1,"counts":[)";
  for (int i = 0; i < 65535; ++i) text += "0,";
  JsonParser parser;
  parse(parser, text += "[0]]}");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_THAT(
      [&] {
        Assumptions assumptions;
        read_record({"t", 1, parser.value()}, LogHeader(), {}, {}, assumptions);
      },
      ThrowsMessage<LogError>("t:1: counts[65535]: [0]: must be a whole number"));
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST(Json, ALineAboveTheLimitIsRefusedBeforeItIsHeld) {
  const TempDir dir;
  const std::string path =
      dir.write("t", "{\"a\":\"" + std::string((std::size_t{1} << 25) + 100, 'x') + "\"}");
  EXPECT_THAT([&] { LogReader reader(path); },
              ThrowsMessage<LogError>(HasSubstr("t:1: line: longer than 33554432 bytes")));
}

/// Records that were changed at random: most are not JSON any more, some are other JSON.
std::string damaged(std::string text, std::mt19937_64& random) {
  static const std::string alphabet = "{}[]\",:0123456789-+.eEtrufalsn \\\x01\x7f\xc3\xa4";
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  for (std::size_t change = 0, changes = 1 + below(3); change < changes && !text.empty(); ++change) {
    const std::size_t at = below(text.size());
    switch (below(4)) {
      case 0:
        text[at] = alphabet[below(alphabet.size())];
        break;
      case 1:
        text.erase(at, 1 + below(4));
        break;
      case 2:
        text.insert(at, 1, alphabet[below(alphabet.size())]);
        break;
      default:
        text.insert(at, text.substr(below(text.size()), below(12)));
    }
  }
  return text;
}

const char* const kRecord =
    R"({"step":12,"layer":0,"tokens":100,"top_k":1,"counts":[60,40,0],"metrics":{"max_vio":0.19999999999999996,"load_cv":-1.5e-7},)"
    R"("health":"healthy","alerts":["peaked"],"loss":2.5,"actuators":{"expert_bias":{"applied":[0.1,-0.25],"reasons":[]}}})";

TEST(Json, AgreesWithNlohmannOnDamagedRecords) {
  std::mt19937_64 random(7);
  JsonParser parser;
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    accepted += compare(parser, damaged(kRecord, random));
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_LT(accepted, 19000);
}

// A file of such lines: the reader calls "not JSON" exactly the lines that nlohmann refuses, by their numbers.
TEST(Json, LineNumbersOfWhatIsNotJson) {
  const TempDir dir;
  std::mt19937_64 random(11);
  for (int round = 0; round < 200; ++round) {
    std::string text = "{\"format\":\"moectl-trace\",\"version\":1}\n";
    std::vector<int> wrong;
    for (int line = 2; line < 17; ++line) {
      std::string record = random() % 2 ? kRecord : damaged(kRecord, random);
      std::erase(record, '\n');
      text += record + '\n';
      bool repeated = false;
      const auto expected = expected_of(record, repeated);
      if (!record.empty() && (!expected || repeated)) wrong.push_back(line);
    }
    const std::string path = dir.write("t", text);
    LogReader reader(path, FaultPolicy::kSalvage);
    while (reader.next()) continue;
    std::vector<int> said;
    for (const std::string& fault : reader.faults()) {
      const std::size_t at = fault.find(": line: not JSON"),
                        start = std::string("skipped: ").size() + path.size() + 1;
      if (at != std::string::npos) said.push_back(std::stoi(fault.substr(start)));
    }
    ASSERT_EQ(said, wrong) << text;
  }
}

}  // namespace
}  // namespace moectl
