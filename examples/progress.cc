#include "progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

Progress::Progress(std::string name, std::int64_t steps)
    : name_(std::move(name)), steps_(steps), terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() {
  if (bar_shown_) std::fputc('\n', stderr);
}

void Progress::show(std::int64_t step, const std::string& line) {
  const std::string place = name_ + " " + std::to_string(step) + "/" + std::to_string(steps_);
  if (!terminal_) {
    if (step % std::max<std::int64_t>(1, steps_ / 20) == 0 || step == steps_) {
      std::fprintf(stderr, "%s  %s\n", place.c_str(), line.c_str());
    }
    return;
  }
  constexpr std::int64_t kWidth = 20;
  const auto done = static_cast<std::size_t>(kWidth * step / steps_);
  const std::string bar = std::string(done, '#') + std::string(kWidth - done, '.');
  std::fprintf(stderr, "\r\033[K%s [%s] %s", place.c_str(), bar.c_str(), line.c_str());
  std::fflush(stderr);
  bar_shown_ = true;
}

void Progress::note(const std::string& line) {
  std::fprintf(stderr, "%s%s\n", bar_shown_ ? "\r\033[K" : "", line.c_str());
  bar_shown_ = false;
}
