#include "moectl/state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <limits>
#include <random>
#include <vector>

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string sample() {
  StateWriter out;
  out.put("step", std::int64_t{41});
  out.put("gain", 0.25);
  out.put("bias", std::vector<double>{1, -0.0, std::numeric_limits<double>::denorm_min()});
  out.put("counts", std::vector<std::int64_t>{std::numeric_limits<std::int64_t>::min(), 0});
  out.put("name", std::string_view("two\0parts", 9));
  out.put("none", std::vector<double>{});
  return out.finish();
}

// Reads the whole sample; throws StateError or returns.
void read(const std::string& bytes) {
  StateReader in(bytes);
  in.get_int("step");
  in.get_double("gain");
  std::vector<double> bias(3);
  in.get("bias", std::span<double>(bias));
  std::vector<std::int64_t> counts(2);
  in.get("counts", std::span<std::int64_t>(counts));
  in.get_text("name");
  in.get("none", std::span<double>());
  in.finish();
}

template <class Work>
std::string error_of(const Work& work) {
  try {
    work();
  } catch (const StateError& error) {
    return error.what();
  }
  return "";
}

TEST(State, ComesBackExactly) {
  const std::string bytes = sample();
  StateReader in(bytes);
  EXPECT_EQ(in.get_int("step"), 41);
  EXPECT_EQ(in.get_double("gain"), 0.25);
  std::vector<double> bias(3);
  in.get("bias", std::span<double>(bias));
  EXPECT_EQ(std::bit_cast<std::uint64_t>(bias[1]), std::uint64_t{1} << 63);
  EXPECT_EQ(bias[2], std::numeric_limits<double>::denorm_min());
  std::vector<std::int64_t> counts(2);
  in.get("counts", std::span<std::int64_t>(counts));
  EXPECT_THAT(counts, ElementsAre(std::numeric_limits<std::int64_t>::min(), 0));
  EXPECT_EQ(in.get_text("name"), std::string("two\0parts", 9));
  in.get("none", std::span<double>());
  in.finish();
}

TEST(State, IsLittleEndian) {
  StateWriter out;
  out.put("x", std::int64_t{0x0102});
  const std::string bytes = out.finish();
  EXPECT_EQ(bytes.substr(0, 12), std::string("moectlst\1\0\0\0", 12));
  EXPECT_EQ(bytes.substr(28), std::string("\1\0\0\0xi\1\0\0\0\0\0\0\0\2\1\0\0\0\0\0\0", 22));
}

TEST(State, ErrorsNameTheEntryTheExpectedAndTheFoundValue) {
  const std::string bytes = sample();
  const auto first = [&](auto read) {
    return error_of([&] {
      StateReader in(bytes);
      read(in);
    });
  };
  EXPECT_EQ(first([](StateReader& in) { in.get_int("epoch"); }),
            "state: 'epoch': expected this entry, found entry 'step'");
  EXPECT_EQ(first([](StateReader& in) { in.get_double("step"); }),
            "state: 'step': expected numbers, found integers");
  EXPECT_EQ(first([](StateReader& in) { in.get_text("step"); }),
            "state: 'step': expected text, found integers");
  EXPECT_EQ(first([](StateReader& in) {
              std::vector<std::int64_t> two(2);
              in.get("step", std::span<std::int64_t>(two));
            }),
            "state: 'step': expected 2 elements, found 1");
  EXPECT_EQ(first([](StateReader& in) { in.finish(); }),
            "state: end: expected no further entry, found entry 'step'");
  EXPECT_EQ(error_of([] {
              const std::string empty = StateWriter().finish();
              StateReader(empty).get_int("step");
            }),
            "state: 'step': expected an entry, found the end of the state");
}

TEST(State, AFailedReadCanBeFollowedByTheRightOne) {
  const std::string bytes = sample();
  StateReader in(bytes);
  EXPECT_THROW(in.get_int("epoch"), StateError);
  EXPECT_EQ(in.get_int("step"), 41);
}

TEST(State, RefusesOtherFormatsAndVersions) {
  EXPECT_THAT(error_of([] { read(""); }), HasSubstr("header: expected 28 bytes, found 0"));
  EXPECT_THAT(error_of([] { read(std::string(40, 'x')); }),
              HasSubstr("format: expected 'moectlst', found 'xxxxxxxx'"));
  std::string newer = sample();
  newer[8] = 2;
  EXPECT_THAT(error_of([&] { read(newer); }), HasSubstr("version: expected 1, found 2"));
}

TEST(State, EveryTruncationIsAnError) {
  const std::string bytes = sample();
  for (std::size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_THROW(read(bytes.substr(0, length)), StateError) << length;
  }
  EXPECT_THAT(error_of([&] { read(bytes.substr(0, bytes.size() - 1)); }), HasSubstr("truncated"));
  EXPECT_THROW(read(bytes + '\0'), StateError);
}

TEST(State, EveryFlippedBitIsAnError) {
  const std::string bytes = sample();
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string altered = bytes;
      altered[i] = static_cast<char>(altered[i] ^ (1 << bit));
      EXPECT_THROW(read(altered), StateError) << "byte " << i << " bit " << bit;
    }
  }
}

// Malformed entries behind a header that fits them: the lengths inside must not be trusted either.
std::string with_header(const std::string& body) {
  const auto word = [](const std::string& bytes, std::size_t at) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < 8 && at + i < bytes.size(); ++i) {
      value |= std::uint64_t{static_cast<unsigned char>(bytes[at + i])} << (8 * i);
    }
    return value;
  };
  const auto bytes_of = [](std::uint64_t value) {
    std::string bytes;
    for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>((value >> (8 * i)) & 0xff));
    return bytes;
  };
  std::uint64_t hash = 0x9e3779b97f4a7c15;
  for (std::size_t at = 0; at < body.size(); at += 8) {
    hash ^= word(body, at);
    hash = (hash ^ (hash >> 33)) * 0xff51afd7ed558ccd;
    hash = (hash ^ (hash >> 33)) * 0xc4ceb9fe1a85ec53;
    hash ^= hash >> 33;
  }
  return std::string("moectlst\1\0\0\0", 12) + bytes_of(body.size()) + bytes_of(hash) + body;
}

TEST(State, MalformedEntriesNeverCrash) {
  std::mt19937_64 random(17);
  const std::string body = sample().substr(28);
  ASSERT_EQ(with_header(body), sample());
  int accepted = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    std::string altered = body;
    for (int edits = 1 + static_cast<int>(random() % 4); edits > 0; --edits) {
      const std::size_t at = random() % altered.size();
      switch (random() % 4) {
        case 0:
          altered[at] = static_cast<char>(random());
          break;
        case 1:
          altered.resize(at + 1);
          break;
        case 2:
          altered[at] = static_cast<char>(0xff);
          break;
        default:
          altered.insert(at, 1, static_cast<char>(random()));
      }
    }
    try {
      read(with_header(altered));
      ++accepted;  // only values were altered
    } catch (const StateError& error) {
      EXPECT_THAT(error.what(), HasSubstr("expected"));
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 10000);
}

TEST(State, RandomBytesNeverCrash) {
  std::mt19937_64 random(23);
  for (int trial = 0; trial < 20000; ++trial) {
    std::string bytes(random() % 200, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    if (trial % 2 == 0 && bytes.size() > 12) bytes.replace(0, 12, std::string("moectlst\1\0\0\0", 12));
    EXPECT_THROW(read(bytes), StateError);
  }
}

}  // namespace
}  // namespace moectl
