// One fuzzer: MOECTL_FUZZ_TARGET is the function's name.
#include <cstddef>

#include "fuzz/targets.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  moectl::fuzz::MOECTL_FUZZ_TARGET({data, size});
  return 0;
}
