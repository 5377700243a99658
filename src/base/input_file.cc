#include "base/input_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include "base/input_limits.h"

namespace moectl {
namespace {

constexpr std::size_t kPacked = std::size_t{1} << 17;

}  // namespace

InputFile::InputFile(const std::string& path) : packed_(kPacked) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    fault_ = "is a directory";
    return;
  }
  descriptor_ = path == "-" ? dup(STDIN_FILENO) : open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) fault_ = std::strerror(errno);
}

InputFile::~InputFile() {
  if (gzip_) inflateEnd(&zip_);
  if (descriptor_ >= 0) close(descriptor_);
}

std::size_t InputFile::pull(char* to, std::size_t size) {
  ssize_t got;
  do {
    got = ::read(descriptor_, to, size);
  } while (got < 0 && errno == EINTR);
  if (got < 0) {
    fault_ = std::strerror(errno);
    return 0;
  }
  offset_ += got;
  return static_cast<std::size_t>(got);
}

/// False if the file ends before its next two bytes.
bool InputFile::pull_two() {
  if (zip_.avail_in > 0 && zip_.avail_in < 2) packed_[0] = static_cast<char>(*zip_.next_in);
  while (zip_.avail_in < 2) {
    const std::size_t got = pull(packed_.data() + zip_.avail_in, packed_.size() - zip_.avail_in);
    if (got == 0) return false;
    zip_.next_in = reinterpret_cast<Bytef*>(packed_.data());
    zip_.avail_in += static_cast<uInt>(got);
  }
  return true;
}

std::size_t InputFile::read(char* to, std::size_t size) {
  if (!fault_.empty()) return 0;
  if (!known_) {
    if (!pull_two() && zip_.avail_in == 0) return 0;
    gzip_ = zip_.avail_in >= 2 && zip_.next_in[0] == 0x1f && zip_.next_in[1] == 0x8b;
    if (gzip_ && inflateInit2(&zip_, 16 + MAX_WBITS) != Z_OK) {
      gzip_ = false;
      fault_ = std::strerror(ENOMEM);
      return 0;
    }
    known_ = true;
  }
  if (gzip_) return inflate_some(to, size);
  if (zip_.avail_in == 0) return pull(to, size);
  const std::size_t got = std::min<std::size_t>(size, zip_.avail_in);
  std::memcpy(to, zip_.next_in, got);
  zip_.next_in += got;
  zip_.avail_in -= static_cast<uInt>(got);
  return got;
}

std::size_t InputFile::inflate_some(char* to, std::size_t size) {
  zip_.next_out = reinterpret_cast<Bytef*>(to);
  zip_.avail_out = static_cast<uInt>(std::min(size, std::size_t{1} << 30));
  const uInt room = zip_.avail_out;
  while (zip_.avail_out == room && !ended_) {
    if (!in_member_) {
      if (!pull_two()) break;
      ended_ = zip_.next_in[0] != 0x1f || zip_.next_in[1] != 0x8b;
      if (ended_) break;
      inflateReset(&zip_);
      in_member_ = true;
    }
    if (zip_.avail_in == 0) {
      zip_.avail_in = static_cast<uInt>(pull(packed_.data(), packed_.size()));
      zip_.next_in = reinterpret_cast<Bytef*>(packed_.data());
      if (zip_.avail_in == 0) break;
    }
    const int code = inflate(&zip_, Z_NO_FLUSH);
    if (code == Z_STREAM_END) {
      in_member_ = false;
    } else if (code != Z_OK && code != Z_BUF_ERROR) {
      fault_ = std::string("gzip: ") + (zip_.msg ? zip_.msg : "cannot be unpacked") +
               ": must be a whole gzip file";
      in_member_ = false;
      break;
    }
  }
  const std::size_t got = room - zip_.avail_out;
  inflated_ += static_cast<std::int64_t>(got);
  if (fault_.empty() && inflates_too_far(inflated_, offset_)) {
    fault_ = "gzip: " + std::to_string(inflated_) + " bytes from " + std::to_string(offset_) +
             ": must be at most " + std::to_string(kMostInflation) + " times its size beyond the first " +
             std::to_string(kFreelyInflated) + "; unpack it first if it is meant so";
    return 0;
  }
  return got;
}

}  // namespace moectl
