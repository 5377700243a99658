#include "cli/terminal.h"

#include <iostream>
#include <streambuf>
#include <string>
#include <string_view>

#include "base/printable.h"
#include "base/utf8.h"

namespace moectl::cli {
namespace {

std::ostream* untouched = nullptr;

/// The bytes at the end that may be the beginning of a character.
std::size_t begun(std::string_view text) {
  for (std::size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if (byte < 0x80) return 0;
    if (byte < 0xc0) continue;
    const std::size_t size = byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : 2;
    return size > back ? back : 0;
  }
  return 0;
}

}  // namespace

class PrintableOutput::Buffer : public std::streambuf {
 public:
  explicit Buffer(std::ostream& stream) : stream_(stream), to_(stream.rdbuf(this)) {}
  ~Buffer() override {
    pass_on(0);
    stream_.rdbuf(to_);
  }
  std::streambuf* to() const { return to_; }

 protected:
  int_type overflow(int_type c) override {
    if (traits_type::eq_int_type(c, traits_type::eof())) return traits_type::not_eof(c);
    const char byte = traits_type::to_char_type(c);
    return xsputn(&byte, 1) == 1 ? c : traits_type::eof();
  }
  std::streamsize xsputn(const char* text, std::streamsize size) override {
    held_.append(text, static_cast<std::size_t>(size));
    return pass_on(begun(held_)) ? size : 0;
  }
  int sync() override { return pass_on(begun(held_)) ? to_->pubsync() : -1; }

 private:
  bool pass_on(std::size_t keep) {
    const std::string text = printable(std::string_view(held_).substr(0, held_.size() - keep), true);
    held_.erase(0, held_.size() - keep);
    const auto size = static_cast<std::streamsize>(text.size());
    return to_->sputn(text.data(), size) == size;
  }

  std::ostream& stream_;
  std::streambuf* to_;
  std::string held_;
};

PrintableOutput::PrintableOutput()
    : out_(std::make_unique<Buffer>(std::cout)), err_(std::make_unique<Buffer>(std::cerr)) {
  static std::ostream stream(nullptr);
  stream.rdbuf(out_->to());
  untouched = &stream;
}

PrintableOutput::~PrintableOutput() = default;

std::ostream& untouched_output() {
  return untouched != nullptr ? *untouched : std::cout;
}

}  // namespace moectl::cli
