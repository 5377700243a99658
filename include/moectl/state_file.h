// Saved states as files: written so that a crash at any moment leaves the old file or the new one, never half
// of it.
//
//   moectl::write_file_atomically("controller.state", controller.save());
//   controller.load(moectl::read_file("controller.state"));
#pragma once

#include <string>
#include <string_view>

#include "moectl/state.h"

namespace moectl {

/// Writes a temporary file beside `path`, syncs it to the disk and renames it over `path`. Throws StateError
/// with the file's name and the system's reason; `path` is then as it was.
void write_file_atomically(const std::string& path, std::string_view bytes);
/// The whole file. Throws StateError if it cannot be read. What a controller loads checks itself: format,
/// version, config and checksum.
std::string read_file(const std::string& path);

}  // namespace moectl
