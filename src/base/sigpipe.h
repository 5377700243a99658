// NoSigpipe: while it lives, a write of this thread to a pipe without a reader fails with EPIPE and does not end the
// process. The host's signal handling stays as it is: the signal is blocked for this thread, and what our own write
// raised is taken back before the old mask returns.
#pragma once

#include <cerrno>
#include <csignal>
#include <ctime>

namespace moectl {

class NoSigpipe {
 public:
  NoSigpipe() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~NoSigpipe() {
    // Where the host blocks the signal itself, a pending one is the host's.
    if (sigismember(&before_, SIGPIPE) == 1) return;
    const int error = errno;  // of the write
    const timespec now{};
    while (sigtimedwait(&pipe_, nullptr, &now) == SIGPIPE) {
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    errno = error;
  }
  NoSigpipe(const NoSigpipe&) = delete;
  NoSigpipe& operator=(const NoSigpipe&) = delete;

 private:
  sigset_t pipe_, before_;
};

}  // namespace moectl
