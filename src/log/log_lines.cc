#include "log/log_lines.h"

#include <poll.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "base/input_limits.h"
#include "base/printable.h"
#include "moectl/run_log.h"

namespace moectl {

LogError::LogError(const std::string& what) : std::runtime_error(message_line(what)) {}

LogLines::LogLines(const std::string& path, std::function<bool()> follow)
    : name_(path == "-" ? "<stdin>" : path), follow_(std::move(follow)), file_(path) {
  if (!file_.fault().empty()) throw LogError(name_ + ": cannot be opened: " + file_.fault());
}

std::size_t LogLines::read_some(char* to, std::size_t size) {
  if (!follow_) return file_.read(to, size);
  if (name_ == "<stdin>") {
    // Before a wait, as with files.
    pollfd input{STDIN_FILENO, POLLIN, 0};
    if (poll(&input, 1, 0) == 0) follow_();
    return file_.read(to, size);
  }
  for (;;) {
    const std::size_t got = file_.read(to, size);
    if (got != 0 || !file_.fault().empty() || replaced_ || finished_) return got;
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
  if (fstat(file_.descriptor(), &here) != 0 || stat(name_.c_str(), &there) != 0) return false;
  return here.st_ino != there.st_ino || here.st_dev != there.st_dev || here.st_size < file_.offset();
}

bool LogLines::fill() {
  const std::span<char> room = buffer_.room();
  if (room.empty()) {
    broken_ = true;
    throw LogError(name_ + ':' + std::to_string(number_ + 1) + ": line: longer than " +
                   std::to_string(kLongestLine) + " bytes: must hold one record");
  }
  const std::size_t got = read_some(room.data(), std::min(room.size(), LineBuffer::kFirst));
  torn_ = got == 0 && !follow_ && file_.fault().empty() && file_.torn();
  if (torn_ || !file_.fault().empty()) {
    broken_ = true;
    throw LogError(name_ + ':' + std::to_string(number_ + 1) + ": " +
                   (torn_ ? "gzip: unexpected end of file: must be a whole gzip file" : file_.fault()));
  }
  buffer_.added(got);
  return got > 0;
}

bool LogLines::next(std::string_view& line) {
  if (!buffer_.line(line, complete_, [this] { return fill(); })) return false;
  offset_ += static_cast<std::int64_t>(line.size()) + (complete_ ? 1 : 0);
  ++number_;
  return true;
}

}  // namespace moectl
