// Programs that a test starts and ends, and what it asks them over the loopback address.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "temp_dir.h"

namespace moectl {

/// A program that runs until this object is gone. Its outputs go to one file.
class Process {
 public:
  Process(const std::vector<std::string>& command, const std::string& output) {
    std::vector<char*> argv;
    for (const std::string& word : command) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      const int file = open(output.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
      dup2(file, STDOUT_FILENO);
      dup2(file, STDERR_FILENO);
      execvp(argv[0], argv.data());
      _exit(127);
    }
  }
  ~Process() {
    if (pid_ <= 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

 private:
  pid_t pid_ = -1;
};

/// Tries until it holds; false if it did not within the seconds.
template <typename Condition>
bool eventually(Condition condition, int seconds = 60) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
  while (std::chrono::steady_clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  return condition();
}

inline int connect_to(int port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  const int socket_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (connect(socket_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0) return socket_;
  close(socket_);
  return -1;
}

/// The body of a page, or nothing if the server does not answer with 200. `query` stands after the path as
/// query=…, percent-encoded here.
inline std::string http_get(int port, std::string path, const std::string& query = "") {
  if (!query.empty()) {
    path += "?query=";
    for (const char c : query) {
      char code[4];
      std::snprintf(code, sizeof code, "%%%02X", static_cast<unsigned char>(c));
      path += code;
    }
  }
  const int connection = connect_to(port);
  if (connection < 0) return "";
  const std::string request = "GET " + path + " HTTP/1.0\r\nHost: localhost\r\n\r\n";
  std::string answer;
  if (write(connection, request.data(), request.size()) == static_cast<ssize_t>(request.size())) {
    char part[65536];
    for (ssize_t got; (got = read(connection, part, sizeof part)) > 0;)
      answer.append(part, static_cast<std::size_t>(got));
  }
  close(connection);
  const std::size_t body = answer.find("\r\n\r\n");
  if (body == std::string::npos || answer.compare(8, 5, " 200 ") != 0) return "";
  return answer.substr(body + 4);
}

/// A port that was free a moment ago.
inline int free_port() {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  const int socket_ = socket(AF_INET, SOCK_STREAM, 0);
  EXPECT_EQ(bind(socket_, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(socket_);
  return ntohs(address.sin_port);
}

/// Where a program is found, or empty.
inline std::string find_program(const std::string& name) {
  const char* const search = std::getenv("PATH");
  std::string rest = search ? search : "";
  while (!rest.empty()) {
    const std::size_t end = rest.find(':');
    const std::filesystem::path file = std::filesystem::path(rest.substr(0, end)) / name;
    if (access(file.c_str(), X_OK) == 0) return file.string();
    rest = end == std::string::npos ? "" : rest.substr(end + 1);
  }
  return "";
}

/// Exit code of a shell command; its outputs go to `output`.
inline int run_shell(const std::string& command, const std::string& output) {
  const int status = std::system(("{ " + command + "; } >'" + output + "' 2>&1").c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace moectl
