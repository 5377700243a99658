#include "base/printable.h"

#include <gtest/gtest.h>

#include "base/input_limits.h"

namespace moectl {
namespace {

TEST(Printable, WhatSteersATerminalBecomesAnEscape) {
  EXPECT_EQ(printable("a\x1b[31mb"), "a\\u001b[31mb");
  EXPECT_EQ(printable(std::string_view("\0\a\b\r\x7f", 5)), "\\u0000\\u0007\\u0008\\u000d\\u007f");
  EXPECT_EQ(printable("\xc2\x9b"
                      "31m\xc2\x85"),
            "\\u009b31m\\u0085");  // CSI and NEL of C1
  EXPECT_EQ(printable("\u202ecba\u202c \u2066x\u2069 \u200e\u200f\u061c"),
            "\\u202ecba\\u202c \\u2066x\\u2069 \\u200e\\u200f\\u061c");
  EXPECT_EQ(printable("a\u2028b\u2029c"), "a\\u2028b\\u2029c");
}

TEST(Printable, TextStays) {
  const std::string text = "Layer 3: größer ≥ 0, 日本語, \U0001f600, \u00a0, \\u001b";
  EXPECT_EQ(printable(text), text);
}

TEST(Printable, BytesThatAreNotUtf8AreQuestionMarks) {
  EXPECT_EQ(printable("a\x9b\xff\xc0\xaf\xed\xa0\x80"
                      "b\xe2\x82"),
            "a???????b??");
}

TEST(Printable, LinesStayWhereTheyAreOurs) {
  EXPECT_EQ(printable("a\tb\nc\r"), "a\\u0009b\\u000ac\\u000d");
  EXPECT_EQ(printable("a\tb\nc\r", true), "a\tb\nc\\u000d");
}

TEST(Printable, ValuesAndMessagesAreCutBetweenCharacters) {
  EXPECT_EQ(shown_briefly(std::string(60, 'x')), std::string(60, 'x'));
  EXPECT_EQ(shown_briefly(std::string(59, 'x') + "é!"), std::string(59, 'x') + "...");
  EXPECT_EQ(message_line(std::string(1 << 20, 'x')).size(), kLongestWord + 3);
}

}  // namespace
}  // namespace moectl
