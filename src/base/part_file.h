// A file that is written beside another, and takes the other's name once it is whole.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <string>

namespace moectl {

/// Opens `path` for writing, as a new file: what stands there under this name is removed, and no link is followed, so that
/// a link that someone planted leads nowhere. -1 with errno if that fails.
inline int open_part(const std::string& path) {
  if (unlink(path.c_str()) != 0 && errno != ENOENT) return -1;
  return open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0666);
}

}  // namespace moectl
