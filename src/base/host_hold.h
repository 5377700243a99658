// The emergency brake that whoever starts a program has, also where the program cannot be changed.
#pragma once

#include <cstdlib>
#include <string_view>

namespace moectl {

/// Whether MOECTL_HOLD holds every actuator: it is set to anything but 0.
inline bool environment_holds() {
  const char* const value = std::getenv("MOECTL_HOLD");
  return value != nullptr && *value != '\0' && std::string_view(value) != "0";
}

}  // namespace moectl
