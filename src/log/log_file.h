// The file of a run log: where its bytes go, the pieces of a rotated one, and what is left of one whose run is resumed.
#pragma once

#include <unistd.h>
#include <zlib.h>

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

namespace moectl {

/// Where bytes go. Written to at once, so that a reader of a growing log sees whole steps. What fails leaves its cause in
/// errno, if it has one.
class LogSink {
 public:
  enum class How { kAnew, kAppend, kBeside };  // kBeside: a file that takes another's name later
  LogSink(const std::string& path, How how, bool zipped);
  explicit LogSink(std::function<void(std::string_view)> out) : out_(std::move(out)) {}
  ~LogSink();
  LogSink(const LogSink&) = delete;
  LogSink& operator=(const LogSink&) = delete;

  bool is_open() const { return zip_ || file_ >= 0; }
  bool write(std::string_view text);
  bool flush();

 private:
  std::function<void(std::string_view)> out_;
  gzFile zip_ = nullptr;
  int file_ = -1;
  pid_t process_ = getpid();
};

inline bool is_zipped(const std::string& path) {
  return path.ends_with(".gz");
}

/// The number of the piece that a writer left under `path`; 1 for a log that was not rotated.
std::int64_t piece_of(const std::string& path);

/// What is left of a log that was cut.
struct KeptLog {
  std::int64_t bytes = 0;                     // before compression
  std::int64_t header = 0;                    // of which are the first line, and lines of configs behind it
  std::string first_config{}, last_config{};  // of the header, and of the last line that changes it
  std::int64_t last_change = 0;               // the step of that line
};
/// Cuts off a log what stands in it from `step` on, and a last line that was torn. Throws on files that cannot be read or
/// rewritten.
KeptLog keep_before(const std::string& path, std::int64_t step);

}  // namespace moectl
