// Counts what the test binary allocates, so that "does not allocate in the steady state" is a test and not a
// promise.
#pragma once

#include <cstdint>

namespace moectl::testing {

/// Calls of operator new by this thread so far.
std::int64_t allocations();

/// Calls of operator new by this thread while `work` runs.
template <class Work>
std::int64_t allocations_of(const Work& work) {
  const std::int64_t before = allocations();
  work();
  return allocations() - before;
}

/// While it lives, the `nth` call of operator new by this thread fails, counted from 1.
class FailingAllocation {
 public:
  explicit FailingAllocation(int nth);
  ~FailingAllocation();
  FailingAllocation(const FailingAllocation&) = delete;
  FailingAllocation& operator=(const FailingAllocation&) = delete;
};

}  // namespace moectl::testing
