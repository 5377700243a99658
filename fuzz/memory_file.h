// A file in memory, for readers that want a path; and what a message of an error must be.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <stdexcept>
#include <string>

#include "base/printable.h"
#include "fuzz/targets.h"

namespace moectl::fuzz {

class MemoryFile {
 public:
  explicit MemoryFile(Bytes bytes) : file_(memfd_create("fuzz", MFD_CLOEXEC)) {
    if (file_ < 0 || write(file_, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
      throw std::runtime_error("memfd_create");
  }
  ~MemoryFile() { close(file_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(file_); }

 private:
  int file_;
};

inline void require_message(const std::exception& error) {
  const std::string what = error.what();
  require(!what.empty() && what == message_line(what),
          "a message is one short line that a terminal can show");
}

}  // namespace moectl::fuzz
