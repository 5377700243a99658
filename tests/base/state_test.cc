#include "moectl/state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "altered_state.h"

namespace moectl {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::state_body;
using testing::with_number;
using testing::with_state_header;

// One of each kind, as a class would exchange them.
struct Sample {
  std::int64_t step = 0;
  double gain = 0;
  bool known = false;
  std::vector<double> bias = std::vector<double>(3);
  std::vector<std::int64_t> counts = std::vector<std::int64_t>(2);
  std::string name;
  std::vector<double> rows, none;

  void exchange(StateIo& io) {
    io.value("step", step);
    io.value("gain", gain);
    io.value("known", known);
    io.values("bias", bias);
    io.values("counts", counts, StateIo::kAnyInteger);
    io.text("name", name);
    io.list("rows", rows);
    io.values("none", none);
  }
};

std::string sample() {
  Sample some{.step = 41,
              .gain = 0.25,
              .known = true,
              .bias = {1, -0.0, std::numeric_limits<double>::denorm_min()},
              .counts = {std::numeric_limits<std::int64_t>::min(), 0},
              .name = std::string("two\0parts", 9),
              .rows = {3, 4},
              .none = {}};
  StateIo out;
  some.exchange(out);
  return out.bytes();
}

// Reads the whole sample; throws StateError or returns.
Sample read(const std::string& bytes) {
  StateIo in(bytes);
  Sample read;
  read.exchange(in);
  in.finish();
  return read;
}

std::int64_t integer(StateIo& io, std::string_view name, IntegerRange range = StateIo::kCount) {
  std::int64_t x = 0;
  io.value(name, x, range);
  return x;
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
  const Sample back = read(sample());
  EXPECT_EQ(back.step, 41);
  EXPECT_EQ(back.gain, 0.25);
  EXPECT_TRUE(back.known);
  EXPECT_EQ(std::bit_cast<std::uint64_t>(back.bias[1]), std::uint64_t{1} << 63);
  EXPECT_EQ(back.bias[2], std::numeric_limits<double>::denorm_min());
  EXPECT_THAT(back.counts, ElementsAre(std::numeric_limits<std::int64_t>::min(), 0));
  EXPECT_EQ(back.name, std::string("two\0parts", 9));
  EXPECT_THAT(back.rows, ElementsAre(3, 4));
}

TEST(State, IsLittleEndian) {
  StateIo out;
  std::int64_t x = 0x0102;
  out.value("x", x);
  const std::string bytes = out.bytes();
  EXPECT_EQ(bytes.substr(0, 12), std::string("moectlst\3\0\0\0", 12));
  EXPECT_EQ(bytes.substr(28), std::string("\1\0\0\0xi\1\0\0\0\0\0\0\0\2\1\0\0\0\0\0\0", 22));
}

TEST(State, ErrorsNameTheEntryTheExpectedAndTheFoundValue) {
  const std::string bytes = sample();
  const auto first = [&](auto read) {
    return error_of([&] {
      StateIo in(bytes);
      read(in);
    });
  };
  EXPECT_EQ(first([](StateIo& in) { integer(in, "epoch"); }),
            "state: 'epoch': expected this entry, found entry 'step'");
  EXPECT_EQ(first([](StateIo& in) {
              double x = 0;
              in.value("step", x);
            }),
            "state: 'step': expected numbers, found integers");
  EXPECT_EQ(first([](StateIo& in) {
              std::string text;
              in.text("step", text);
            }),
            "state: 'step': expected text, found integers");
  EXPECT_EQ(first([](StateIo& in) {
              std::vector<std::int64_t> two(2);
              in.values("step", two);
            }),
            "state: 'step': expected 2 elements, found 1");
  EXPECT_EQ(first([](StateIo& in) { in.finish(); }),
            "state: end: expected no further entry, found entry 'step'");
  EXPECT_EQ(error_of([] {
              const std::string empty = StateIo().bytes();
              StateIo in(empty);
              integer(in, "step");
            }),
            "state: 'step': expected an entry, found the end of the state");
}

TEST(State, ErrorsNameWhatIsOutOfRange) {
  const std::string bytes = sample();
  EXPECT_EQ(error_of([&] {
              StateIo in(bytes);
              integer(in, "step", {0, 40});
            }),
            "state: 'step': expected 0 to 40, found 41");
  EXPECT_EQ(error_of([&] { read(with_number(bytes, "gain", 0, std::nan(""))); }),
            "state: 'gain': expected -1e+100 to 1e+100, found nan");
  EXPECT_EQ(error_of([&] { read(with_number(bytes, "bias", 1, -HUGE_VAL)); }),
            "state: 'bias'[1]: expected -1e+100 to 1e+100, found -inf");
  EXPECT_EQ(error_of([&] { read(with_number(bytes, "known", 0, std::int64_t{2})); }),
            "state: 'known': expected 0 to 1, found 2");
  EXPECT_EQ(error_of([&] {
              StateIo in(bytes);
              in.check(false, "step", "be even");
            }),
            "state: 'step': must be even");
  EXPECT_NO_THROW(StateIo().check(false, "step", "be even")) << "what is written is not checked";
}

// A count that was read can be counted on: the largest is far from an overflow.
TEST(State, ACountIsNeitherNegativeNorNearAnOverflow) {
  for (const std::int64_t bad : {std::int64_t{-1}, std::numeric_limits<std::int64_t>::max()}) {
    EXPECT_THAT(error_of([&] { read(with_number(sample(), "step", 0, bad)); }),
                HasSubstr("'step': expected 0 to"));
  }
}

// An altered state may hold the largest count: a run that goes on from it writes what it can read.
TEST(State, ACountEndsAtTheLargest) {
  std::int64_t count = StateIo::kMostCount + 4, number = count;
  StateIo out;
  out.value("count", count);
  out.value("number", number, StateIo::kAnyInteger);
  const std::string bytes = out.bytes();
  StateIo in(bytes);
  in.value("count", count);
  in.value("number", number, StateIo::kAnyInteger);
  EXPECT_EQ(count, StateIo::kMostCount);
  EXPECT_EQ(number, StateIo::kMostCount + 4);
}

TEST(State, AChoiceIsOneOfItsEnumeration) {
  enum class Colour { kRed, kGreen, kBlue };
  StateIo out;
  Colour colour = Colour::kGreen;
  out.choice("colour", colour, Colour::kBlue);
  const std::string bytes = out.bytes();
  const auto read = [](const std::string& state) {
    StateIo in(state);
    Colour colour = Colour::kRed;
    in.choice("colour", colour, Colour::kBlue);
    return colour;
  };
  EXPECT_EQ(read(bytes), Colour::kGreen);
  EXPECT_THROW(read(with_number(bytes, "colour", 0, std::int64_t{3})), StateError);
}

TEST(State, AFailedReadCanBeFollowedByTheRightOne) {
  const std::string bytes = sample();
  StateIo in(bytes);
  EXPECT_THROW(integer(in, "epoch"), StateError);
  EXPECT_EQ(integer(in, "step"), 41);
}

TEST(State, RefusesOtherFormatsAndVersions) {
  EXPECT_THAT(error_of([] { read(""); }), HasSubstr("header: expected 28 bytes, found 0"));
  EXPECT_THAT(error_of([] { read(std::string(40, 'x')); }),
              HasSubstr("format: expected 'moectlst', found 'xxxxxxxx'"));
  std::string newer = sample();
  newer[8] = 4;
  EXPECT_THAT(error_of([&] { read(newer); }), HasSubstr("version: expected 3, found 4"));
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

// Behind a header that fits them: the lengths inside must not be trusted either.
TEST(State, MalformedEntriesNeverCrash) {
  std::mt19937_64 random(17);
  const std::string body = state_body(sample());
  ASSERT_EQ(with_state_header(body), sample());
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
      read(with_state_header(altered));
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
    if (trial % 2 == 0 && bytes.size() > 12) bytes.replace(0, 12, std::string("moectlst\3\0\0\0", 12));
    EXPECT_THROW(read(bytes), StateError);
  }
}

}  // namespace
}  // namespace moectl
