// The LibTorch operators that run while it lives, by name: how tests prove that something does not copy or
// wait.
#pragma once

#include <ATen/record_function.h>

#include <mutex>
#include <string>
#include <vector>

namespace moectl {

class OperatorCalls {
 public:
  OperatorCalls() {
    handle_ = at::addGlobalCallback(at::RecordFunctionCallback([](const at::RecordFunction& call) {
                                      const std::lock_guard<std::mutex> lock(mutex());
                                      calls().emplace_back(call.name());
                                      return std::unique_ptr<at::ObserverContext>();
                                    }).scopes({at::RecordScope::FUNCTION}));
  }
  ~OperatorCalls() {
    at::removeCallback(handle_);
    calls().clear();
  }
  OperatorCalls(const OperatorCalls&) = delete;
  OperatorCalls& operator=(const OperatorCalls&) = delete;

  std::vector<std::string> names() const {
    const std::lock_guard<std::mutex> lock(mutex());
    return calls();
  }

 private:
  // The callback must be a plain function, so what it fills has to be reachable without a capture.
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::vector<std::string>& calls() {
    static std::vector<std::string> calls;
    return calls;
  }
  at::CallbackHandle handle_;
};

}  // namespace moectl
