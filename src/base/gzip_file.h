// A file to read, plain or gzip.
#pragma once

#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>

#include "base/input_limits.h"

namespace moectl {

struct GzipFile {
  gzFile file = nullptr;
  int descriptor = -1;
  std::string fault{};  ///< Why it cannot be opened; then file is null.
};

/// `-` is standard input. The caller closes `file`.
inline GzipFile open_gzip(const std::string& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) return {.fault = "is a directory"};
  errno = 0;
  GzipFile out;
  out.descriptor = path == "-" ? dup(STDIN_FILENO) : open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (out.descriptor >= 0) out.file = gzdopen(out.descriptor, "rb");
  if (out.file == nullptr) {
    out.fault = std::strerror(errno ? errno : ENOMEM);
    if (out.descriptor >= 0) close(out.descriptor);
    return out;
  }
  gzbuffer(out.file, 1U << 17);
  return out;
}

/// What is wrong with a file of which so many bytes were read; empty for a plain one.
inline std::string inflation_fault(gzFile file, std::int64_t inflated) {
  if (inflated <= kFreelyInflated || gzdirect(file) != 0) return "";
  const auto packed = static_cast<std::int64_t>(gzoffset(file));
  if (packed < 0 || !inflates_too_far(inflated, packed)) return "";  // a pipe has no size
  return std::to_string(inflated) + " bytes from " + std::to_string(packed) + ": must be at most " +
         std::to_string(kMostInflation) + " times its size beyond the first " +
         std::to_string(kFreelyInflated) + "; unpack it first if it is meant so";
}

}  // namespace moectl
