#include "log/json_line.h"

#include <gmock/gmock.h>

#include <chrono>
#include <random>

#include "log/log_record.h"

namespace moectl {
namespace {

using nlohmann::json;

/// The same value as nlohmann's parser would have made it.
json rebuilt(const JsonNode& node) {
  if (node.is_object()) {
    json object = json::object();
    for (const JsonNode& member : node) object[std::string(member.key())] = rebuilt(member);
    EXPECT_EQ(object.size(), node.size());
    return object;
  }
  if (node.is_array()) {
    json array = json::array();
    for (const JsonNode& element : node) array.push_back(rebuilt(element));
    EXPECT_EQ(array.size(), node.size());
    return array;
  }
  if (node.is_string()) return std::string(node.text());
  if (node.is_unsigned()) return node.as_unsigned();
  if (node.is_integer()) return node.as_integer();
  if (node.is_number()) return node.as_double();
  if (node.is_null()) return nullptr;
  return json::parse(node.dump());
}

/// Holds JsonLine against nlohmann's parser: accepts the same, and makes the same of it.
void compare(JsonLine& line, const std::string& text) {
  json expected;
  std::string refused;
  try {
    expected = json::parse(text);
  } catch (const json::exception& e) {
    refused = e.what();
  }
  try {
    line.parse(text);
  } catch (const json::exception& e) {
    EXPECT_EQ(refused, e.what()) << text;
    EXPECT_TRUE(line.value().is_null());
    return;
  }
  ASSERT_EQ(refused, "") << text;
  const json actual = rebuilt(line.value());
  EXPECT_EQ(actual, expected) << text;
  EXPECT_EQ(actual.dump(-1, ' ', false, json::error_handler_t::replace),
            expected.dump(-1, ' ', false, json::error_handler_t::replace));
  EXPECT_EQ(line.value().dump(), expected.dump(-1, ' ', false, json::error_handler_t::replace));
  if (expected.is_object()) {
    for (const auto& [key, value] : expected.items()) {
      const JsonNode* member = line.value().find(key);
      ASSERT_NE(member, nullptr) << key;
      EXPECT_EQ(member->dump(), value.dump(-1, ' ', false, json::error_handler_t::replace));
    }
  }
}

TEST(JsonLine, ReadsWhatNlohmannReads) {
  JsonLine line;
  for (const char* text : {"{}",
                           "[]",
                           " { \"a\" : [ 1 , -2 , 3.5 , 1e3 , -0 , -0.0 , true , false , null , \"x y\" ] } ",
                           "7",
                           "\"word\"",
                           "18446744073709551615",
                           "18446744073709551616",
                           "-9223372036854775808",
                           "-9223372036854775809",
                           "9007199254740993",
                           "0.1",
                           "1E+5",
                           "1e-400",
                           "1e400",
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
                           "tru",
                           "nulll",
                           "{\"a\":1,\"a\":2}",
                           "{\"ab\":1,\"ba\":[2],\"ab\":{\"c\":3}}",
                           "{\"a\":1,}",
                           "[1,]",
                           "[,1]",
                           "{\"a\"}",
                           "{\"a\":}",
                           "{a:1}",
                           "{'a':1}",
                           "\"\\u0041\\n\"",
                           "\"\\x\"",
                           "\"\xc3\xa4\"",
                           "\"\xc3\"",
                           "\"a\tb\"",
                           "{\"\xc3\xa4\":{\"b\":[1,2]}}",
                           "{\"a\\\"b\":1}",
                           "[1 2]",
                           "[[1],[2,[3]]]",
                           "{\"\":1}",
                           "",
                           " ",
                           "[",
                           "{\"a\":[1,{\"b\":"}) {
    compare(line, text);
  }
  compare(line, std::string("{}\0", 3));
  compare(line, "\xef\xbb\xbf{\"a\":1}");
}

// Deeper than any record: taken in whole, but not looked into.
TEST(JsonLine, TakesAnyDepth) {
  JsonLine line;
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  line.parse("{\"a\":" + deep + ",\"b\":2}");
  ASSERT_NE(line.value().find("b"), nullptr);
  EXPECT_EQ(line.value().find("b")->as_unsigned(), 2U);
  EXPECT_TRUE(line.value().find("a")->is_array());
  // What it says of itself stays short as well, and is JSON.
  const json said = json::parse(line.value().find("a")->dump());
  EXPECT_LT(said.dump().size(), 60U);
  EXPECT_EQ(json::parse(line.value().dump()), (json{{"a", said}, {"b", 2}}));
  EXPECT_THROW(line.parse(std::string(100000, '[')), json::exception);
  compare(line, std::string(14, '[') + "{\"a\":1}" + std::string(14, ']'));
}

// Members are held against those before them to find a key that comes twice: all against all would take a minute.
TEST(JsonLine, AnObjectOfManyMembersTakesNoLongerThanItsLength) {
  std::string text = "{";
  for (int i = 0; i < 200000; ++i) text += "\"k" + std::to_string(i) + "\":" + std::to_string(i) + ',';
  text += "\"k7\":-1}";
  JsonLine line;
  const auto start = std::chrono::steady_clock::now();
  line.parse(text);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
  EXPECT_EQ(line.value().size(), 200000U);
  EXPECT_EQ(line.value().find("k7")->as_integer(), -1);
  for (const int members : {1023, 1024, 1025, 1500}) {
    std::string some = "{";
    for (int i = 0; i < members; ++i)
      some += (i ? ",\"" : "\"") + std::to_string(i % 1300) + "\":" + std::to_string(i);
    compare(line, some + "}");
  }
}

// As above: elements are walked, not counted from the front each time.
TEST(JsonLine, AWrongElementOfALongArrayIsNamed) {
  std::string text = R"({"step":0,"layer":0,"tokens":0,"top_k":1,"counts":[)";
  for (int i = 0; i < 200000; ++i) text += "0,";
  JsonLine line;
  line.parse(text += "[0]]}");
  const auto start = std::chrono::steady_clock::now();
  try {
    read_record({"t", 1, line.value()}, LogHeader());
    ADD_FAILURE() << "accepted";
  } catch (const LogError& e) {
    EXPECT_STREQ(e.what(), "t:1: counts[200000]: [0]: must be a whole number");
  }
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

// Records that were changed at random: most are no JSON any more, some are another.
TEST(JsonLine, AgreesWithNlohmannOnDamagedRecords) {
  const std::string record =
      R"({"step":12,"layer":0,"tokens":100,"counts":[60,40,0],"metrics":{"max_vio":0.19999999999999996,"load_cv":-1.5e-7},)"
      R"("health":"healthy","alerts":["peaked"],"loss":2.5,"actuators":{"expert_bias":{"applied":[0.1,-0.25],"reasons":[]}}})";
  const std::string alphabet = "{}[]\",:0123456789-+.eEtrufalsn \\\x01\x7f\xc3\xa4";
  std::mt19937_64 random(7);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
  JsonLine line;
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string text = record;
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
    compare(line, text);
    if (::testing::Test::HasFailure()) return;
    accepted += line.value().is_object() ? 1 : 0;
  }
  EXPECT_GT(accepted, 1000);
  EXPECT_LT(accepted, 19000);
}

}  // namespace
}  // namespace moectl
