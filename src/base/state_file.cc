#include "moectl/state_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <utility>

#include "base/input_limits.h"
#include "base/part_file.h"
#include "base/whole_file.h"

namespace moectl {
namespace {

[[noreturn]] void fail(const std::string& path, const char* what) {
  throw StateError(path + ": cannot " + what + ": " + std::strerror(errno));
}

/// Throws away the temporary file unless the rename has made it the real one.
struct Temporary {
  std::string path;
  int file = -1;
  ~Temporary() {
    if (file >= 0) close(file);
    if (!path.empty()) unlink(path.c_str());
  }
};

}  // namespace

void write_file_atomically(const std::string& path, std::string_view bytes) {
  // Two writers, of one process or of two, have files of their own; what a killed one left behind is removed.
  static std::atomic<unsigned> writers{0};
  Temporary temporary{.path = path + ".tmp" + std::to_string(getpid()) + "." + std::to_string(writers++)};
  temporary.file = open_part(temporary.path);
  if (temporary.file < 0) {
    const std::string name = std::exchange(temporary.path, {});
    fail(name, "create");
  }
  for (std::size_t done = 0; done < bytes.size();) {
    const ssize_t size = write(temporary.file, bytes.data() + done, bytes.size() - done);
    if (size < 0 && errno != EINTR) fail(temporary.path, "write");
    if (size > 0) done += static_cast<std::size_t>(size);
  }
  // Without the sync, a power cut may keep the rename and lose the bytes.
  if (fsync(temporary.file) != 0) fail(temporary.path, "sync");
  if (close(std::exchange(temporary.file, -1)) != 0) fail(temporary.path, "close");
  if (rename(temporary.path.c_str(), path.c_str()) != 0) fail(path, "replace");
  temporary.path.clear();
  // The rename itself is on the disk once the folder is. Where a folder cannot be synced there is no more to be done.
  const std::string folder = std::filesystem::absolute(path).parent_path().string();
  if (const int directory = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); directory >= 0) {
    fsync(directory);
    close(directory);
  }
}

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail(path, "read");
  std::optional<std::string> bytes = read_up_to(in, kLargestState);
  if (in.bad()) fail(path, "read");
  if (!bytes) throw StateError(path + ": must be at most " + std::to_string(kLargestState) + " bytes");
  return *std::move(bytes);
}

}  // namespace moectl
