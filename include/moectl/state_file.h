// Saved states as files. A crash at any moment leaves the complete old file or the complete new file.
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
/// Reads the whole file. Throws StateError if it cannot be read. The file's content is checked by Controller::load:
/// format, version, config and checksum.
std::string read_file(const std::string& path);

}  // namespace moectl
