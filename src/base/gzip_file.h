// A file to read, plain or gzip.
#pragma once

#include <fcntl.h>
#include <unistd.h>
#include <zlib.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>

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

}  // namespace moectl
