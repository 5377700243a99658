#include "log/log_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <utility>

#include "base/input_limits.h"
#include "base/part_file.h"
#include "base/sigpipe.h"
#include "log/log_lines.h"
#include "moectl/run_log.h"

namespace moectl {
namespace {

constexpr std::size_t kMostAtOnce = std::size_t{1} << 30;

/// The step of a record that this writer wrote, or -1 for a header.
std::int64_t step_of(std::string_view line) {
  constexpr std::string_view kStart = "{\"step\":";
  std::int64_t step = -1;
  if (line.starts_with(kStart)) std::from_chars(line.data() + kStart.size(), line.data() + line.size(), step);
  return step;
}

/// One more than the number of the last finished piece beside `path`.
std::int64_t piece_after_others(const std::string& path) {
  const std::filesystem::path file(path), folder = file.parent_path().empty() ? "." : file.parent_path();
  const std::string start = file.filename().string() + '.';
  std::int64_t last = 0;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    std::int64_t piece = 0;
    if (!name.starts_with(start)) continue;
    const auto [end, error] = std::from_chars(name.data() + start.size(), name.data() + name.size(), piece);
    // A number that no writer gives is some other file's.
    if (error == std::errc() && end == name.data() + name.size() && piece < kMostPieces)
      last = std::max(last, piece);
  }
  return last + 1;
}

/// The config of a header or of a line that changes it, else empty.
std::string config_of(std::string_view line) {
  constexpr std::string_view kKey = ",\"config\":{";
  if (!line.starts_with("{\"format\"") && line.substr(0, 64).find(kKey) == std::string_view::npos) return "";
  const std::size_t at = line.find(kKey);
  return at == std::string_view::npos
             ? ""
             : std::string(line.substr(at + kKey.size() - 1, line.size() - at - kKey.size()));
}

}  // namespace

LogSink::LogSink(const std::string& path, How how, bool zipped) {
  errno = 0;
  file_ = path == "-" ? STDOUT_FILENO
          : how == How::kBeside
              ? open_part(path)
              : open(path.c_str(),
                     O_WRONLY | O_CREAT | O_CLOEXEC | (how == How::kAppend ? O_APPEND : O_TRUNC), 0666);
  if (!zipped || file_ < 0) return;
  zip_ = gzdopen(file_, how == How::kAppend ? "ab" : "wb");
  if (!zip_) close(file_);
  file_ = -1;  // zip_ closes it
}

LogSink::~LogSink() {
  const NoSigpipe guard;
  // A forked child that ends leaves alone what its parent has yet to write: gzclose would write it, too.
  if (zip_ && getpid() == process_) gzclose(zip_);
  if (file_ > STDERR_FILENO) close(file_);
}

bool LogSink::write(std::string_view text) {
  if (out_) {
    if (!text.empty()) out_(text);
    return true;
  }
  const NoSigpipe guard;  // a reader that leaves must not end the training
  errno = 0;
  while (zip_ && !text.empty()) {
    // gzwrite returns an int: it takes no more at once than that can hold.
    const std::string_view part = text.substr(0, kMostAtOnce);
    if (gzwrite(zip_, part.data(), static_cast<unsigned>(part.size())) <= 0) return false;
    text.remove_prefix(part.size());
  }
  while (!text.empty()) {
    const ssize_t wrote = ::write(file_, text.data(), text.size());
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return false;
    text.remove_prefix(static_cast<std::size_t>(wrote));
  }
  return true;
}

bool LogSink::flush() {
  const NoSigpipe guard;
  errno = 0;
  return !zip_ || gzflush(zip_, Z_SYNC_FLUSH) == Z_OK;
}

std::string piece_path(const std::string& path, std::int64_t piece) {
  char number[32];
  std::snprintf(number, sizeof number, ".%06lld", static_cast<long long>(piece));
  return path + number;
}

std::int64_t piece_of(const std::string& path) {
  constexpr std::string_view kStart = "{\"format\":\"moectl-run\",\"version\":1,\"piece\":";
  std::int64_t piece = 1;
  bool damaged = false;
  LogLines lines(path);
  std::string_view line;
  try {
    if (!lines.next(line)) return piece_after_others(path);
    if (line.starts_with(kStart)) {
      const auto [end, error] =
          std::from_chars(line.data() + kStart.size(), line.data() + line.size(), piece);
      damaged = error != std::errc() || piece < 1 || piece > kMostPieces;
    }
  } catch (const LogError&) {
    if (!lines.torn()) throw;
    return piece_after_others(path);  // before its first line was whole
  }
  if (damaged) throw LogError(path + ":1: piece: must be from 1 to " + std::to_string(kMostPieces));
  return piece;
}

KeptLog keep_before(const std::string& path, std::int64_t step) {
  KeptLog result;
  std::int64_t& keep = result.bytes;
  const bool zipped = is_zipped(path);
  const std::string part = path + ".part";
  LogLines lines(path);
  std::optional<LogSink> sink;  // of what is kept of a compressed log, which may not fit into memory
  const auto written = [&](bool good) {
    if (!good) throw LogError(part + ": cannot be written");
  };
  if (zipped) written(sink.emplace(part, LogSink::How::kBeside, true).is_open());
  try {
    std::string_view line;
    while (lines.next(line) && lines.complete() && step_of(line) < step) {
      const std::int64_t before = std::exchange(keep, lines.offset());
      if (lines.number() == 1 && step_of(line) < 0) result.header = keep;
      if (std::string config = config_of(line); !config.empty()) {
        if (lines.number() == 1) {
          result.first_config = config;
        } else {
          result.last_change = step_of(line);
          if (result.header == before) result.header = keep;
        }
        result.last_config = std::move(config);
      }
      if (zipped) written(sink->write(line) && sink->write("\n"));
    }
  } catch (const LogError&) {
    // A run that was killed leaves its gzip file without an end: what came before can be kept. What is damaged in any other
    // way stays as it is: behind the damage there may be more.
    std::error_code ignored;
    if (!zipped || !lines.torn()) {
      if (zipped) std::filesystem::remove(part, ignored);
      throw;
    }
  }
  if (!zipped) {
    std::filesystem::resize_file(path, static_cast<std::uintmax_t>(keep));
    return result;
  }
  written(sink->flush());
  sink.reset();
  std::filesystem::rename(part, path);
  return result;
}

}  // namespace moectl
