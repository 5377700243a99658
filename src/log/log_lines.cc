#include "log/log_lines.h"

#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <thread>
#include <utility>

#include "base/gzip_file.h"
#include "base/input_limits.h"
#include "base/printable.h"
#include "moectl/run_log.h"

namespace moectl {
namespace {

constexpr std::size_t kFirstBuffer = std::size_t{1} << 18;

}  // namespace

LogError::LogError(const std::string& what) : std::runtime_error(message_line(what)) {}

LogLines::LogLines(const std::string& path, std::function<bool()> follow)
    : name_(path == "-" ? "<stdin>" : path), follow_(std::move(follow)), buffer_(kFirstBuffer + kPadding) {
  const GzipFile opened = open_gzip(path);
  if (opened.file == nullptr) throw LogError(name_ + ": cannot be opened: " + opened.fault);
  file_ = opened.file;
  descriptor_ = opened.descriptor;
}

LogLines::~LogLines() {
  gzclose(file_);
}

int LogLines::read_some(char* to, std::size_t size) {
  // gzread passes plain files through, and reads the members of a file that was appended to one after the
  // other. But it waits for a full buffer, which is not what a pipe that is followed should do.
  if (!follow_) return gzread(file_, to, static_cast<unsigned>(size));
  if (name_ == "<stdin>") {
    // Before a wait, as with files.
    pollfd input{STDIN_FILENO, POLLIN, 0};
    if (poll(&input, 1, 0) == 0) follow_();
    ssize_t got;
    do {
      got = ::read(STDIN_FILENO, to, size);
    } while (got < 0 && errno == EINTR);
    return static_cast<int>(got);
  }
  for (;;) {
    const int got = gzread(file_, to, static_cast<unsigned>(size));
    if (got != 0) return got;
    gzclearerr(file_);
    if (replaced_ || finished_) return 0;
    // What was written between the last read and the replacement, or the end, is still to come.
    replaced_ = was_replaced();
    finished_ = !replaced_ && !follow_();
    if (replaced_ || finished_) continue;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
}

/// Rotation puts a new file under the name; a run that starts again cuts the old one short.
bool LogLines::was_replaced() const {
  struct stat here {
  }, there{};
  if (fstat(descriptor_, &here) != 0 || stat(name_.c_str(), &there) != 0) return false;
  return here.st_ino != there.st_ino || here.st_dev != there.st_dev || here.st_size < gzoffset(file_);
}

bool LogLines::fill() {
  if (begin_ > 0) {
    std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
  }
  if (end_ == buffer_.size() - kPadding) {
    if (end_ >= kLongestLine) {
      broken_ = true;
      throw LogError(name_ + ':' + std::to_string(number_ + 1) + ": line: longer than " +
                     std::to_string(kLongestLine) + " bytes: must hold one record");
    }
    buffer_.resize(end_ * 2 + kPadding);
  }
  const int got = read_some(buffer_.data() + end_, std::min(buffer_.size() - kPadding - end_, kFirstBuffer));
  int code = Z_OK;
  const char* message = gzerror(file_, &code);
  if (got < 0 || (got == 0 && code == Z_BUF_ERROR)) {
    const bool cut = code == Z_BUF_ERROR;
    broken_ = true;
    throw LogError(name_ + ':' + std::to_string(number_ + 1) +
                   ": gzip: " + (cut ? "unexpected end of file" : message) + ": must be a whole gzip file");
  }
  end_ += static_cast<std::size_t>(got);
  // Standard input that is followed is read past zlib, which must not read from it, too.
  if (follow_ && name_ == "<stdin>") return got > 0;
  inflated_ += got;
  if (const std::string fault = inflation_fault(file_, inflated_); !fault.empty()) {
    broken_ = true;
    throw LogError(name_ + ':' + std::to_string(number_ + 1) + ": gzip: " + fault);
  }
  return got > 0;
}

bool LogLines::next(std::string_view& line) {
  std::size_t searched = begin_;
  for (;;) {
    if (const void* found = std::memchr(buffer_.data() + searched, '\n', end_ - searched)) {
      const auto at = static_cast<std::size_t>(static_cast<const char*>(found) - buffer_.data());
      line = {buffer_.data() + begin_, at - begin_};
      offset_ += static_cast<std::int64_t>(at - begin_) + 1;
      begin_ = at + 1;
      break;
    }
    const std::size_t held = end_ - begin_;
    if (!fill()) {
      if (held == 0) return false;
      line = {buffer_.data() + begin_, held};
      offset_ += static_cast<std::int64_t>(held);
      begin_ = end_;
      complete_ = false;
      break;
    }
    searched = begin_ + held;
  }
  ++number_;
  return true;
}

}  // namespace moectl
