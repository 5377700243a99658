// Gzip by hand: members, what stands behind them, and a file that was torn at any byte.
#include "base/input_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <thread>

#include "temp_dir.h"

namespace moectl {
namespace {

std::string zipped(const std::string& text) {
  const TempDir dir;
  const gzFile file = gzopen(dir.path("x").c_str(), "wb");
  gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
  gzclose(file);
  return TempDir::read(dir.path("x"));
}

struct Read {
  std::string text, fault;
  bool torn;
};

Read read(const std::string& bytes, std::size_t piece) {
  const TempDir dir;
  InputFile file(dir.write("x", bytes));
  std::string text(piece, '\0');
  Read out;
  while (const std::size_t got = file.read(text.data(), piece)) out.text.append(text, 0, got);
  out.fault = file.fault();
  out.torn = file.torn();
  return out;
}

TEST(InputFile, ReadsWhatWasWritten) {
  std::string text;
  for (int i = 0; i < 100000; ++i) text += std::to_string(i * 7919 % 10007) + '\n';
  for (const std::size_t piece : {std::size_t{1}, std::size_t{1000}, std::size_t{1} << 20}) {
    for (const std::string& bytes :
         {text, zipped(text), zipped(text.substr(0, 7)) + zipped("") + zipped(text.substr(7)),
          zipped(text) + std::string(600, '\0'), zipped(text) + '\x1f'}) {
      const Read all = read(bytes, piece);
      EXPECT_TRUE(all.text == text) << all.text.size();
      EXPECT_EQ(all.fault, "");
      EXPECT_FALSE(all.torn);
    }
  }
  for (const std::string bytes : {"", "\x1f", "a", "\x1fz"}) EXPECT_EQ(read(bytes, 10).text, bytes);
}

TEST(InputFile, KnowsThatItWasTornWhereverThatWas) {
  const std::string first = zipped("one\ntwo\n"), both = first + zipped("three\n");
  for (std::size_t length = 2; length < both.size(); ++length) {
    const Read part = read(both.substr(0, length), 1000);
    // Of a second member, two bytes are needed to know it.
    EXPECT_EQ(part.torn, length != first.size() && length != first.size() + 1) << length;
    EXPECT_EQ(part.fault, "");
    EXPECT_TRUE(part.text.starts_with("one\ntwo\n") || length < first.size()) << length;
  }
}

TEST(InputFile, SaysWhatIsDamaged) {
  std::string bytes = zipped(std::string(1000, 'a') + "bcd");
  bytes[bytes.size() - 8] = static_cast<char>(bytes[bytes.size() - 8] ^ 1);  // of the checksum
  EXPECT_EQ(read(bytes, 10000).fault, "gzip: incorrect data check: must be a whole gzip file");
  EXPECT_EQ(read(std::string("\x1f\x8b\x01") + "abcdefgh", 10).fault,
            "gzip: unknown compression method: must be a whole gzip file");
  EXPECT_EQ(InputFile("/").fault(), "is a directory");
  EXPECT_EQ(InputFile("/nowhere/x").fault(), "No such file or directory");
}

TEST(InputFile, GoesOnWhenItsFileGrows) {
  for (const std::string& bytes :
       {std::string("one\ntwo\nthree\n"), zipped("one\ntwo\n") + zipped("three\n")}) {
    const TempDir dir;
    InputFile file(dir.write("x", ""));
    std::string text, piece(100, '\0');
    for (std::size_t i = 0; i < bytes.size(); i += 2) {
      dir.write("x", bytes.substr(0, i + 2));
      while (const std::size_t got = file.read(piece.data(), piece.size())) text.append(piece, 0, got);
    }
    EXPECT_EQ(text, "one\ntwo\nthree\n");
  }
}

}  // namespace
}  // namespace moectl
