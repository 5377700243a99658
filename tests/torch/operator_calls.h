// The LibTorch operators that run while it lives, by name: how tests prove that something does not copy or
// wait.
#pragma once

#include <ATen/record_function.h>

#include <mutex>
#include <string>
#include <vector>

namespace moectl {

struct OperatorCall {
  std::string name;
  int depth = 0;  // 0 = called by our code, more = by another operator
  // Of a copy_: it may block, and it leaves the type as it is (so that it can only move the values).
  bool blocking_move = false;
};

class OperatorCalls {
 public:
  OperatorCalls() {
    handle_ = at::addGlobalCallback(at::RecordFunctionCallback(
                                        [](const at::RecordFunction& call) {
                                          const std::lock_guard<std::mutex> lock(mutex());
                                          calls().push_back(describe(call));
                                          ++depth();
                                          return std::unique_ptr<at::ObserverContext>();
                                        },
                                        [](const at::RecordFunction&, at::ObserverContext*) { --depth(); })
                                        .needsInputs(true)
                                        .scopes({at::RecordScope::FUNCTION}));
  }
  ~OperatorCalls() {
    at::removeCallback(handle_);
    calls().clear();
  }
  OperatorCalls(const OperatorCalls&) = delete;
  OperatorCalls& operator=(const OperatorCalls&) = delete;

  std::vector<OperatorCall> all() const {
    const std::lock_guard<std::mutex> lock(mutex());
    return calls();
  }
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    for (const OperatorCall& call : all()) names.push_back(call.name);
    return names;
  }

 private:
  static OperatorCall describe(const at::RecordFunction& call) {
    OperatorCall out{call.name(), depth()};
    const auto inputs = call.inputs();
    if (out.name == "aten::copy_" && inputs.size() == 3) {
      out.blocking_move =
          !inputs[2].toBool() && inputs[0].toTensor().scalar_type() == inputs[1].toTensor().scalar_type();
    }
    return out;
  }
  // The callback must be a plain function, so what it fills has to be reachable without a capture.
  static std::mutex& mutex() {
    static std::mutex mutex;
    return mutex;
  }
  static std::vector<OperatorCall>& calls() {
    static std::vector<OperatorCall> calls;
    return calls;
  }
  static int& depth() {
    static thread_local int depth = 0;
    return depth;
  }
  at::CallbackHandle handle_;
};

}  // namespace moectl
