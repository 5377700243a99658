// What the fuzzers call, each with any bytes. A target throws Finding, or dies under a sanitizer, where a promise of
// docs/security.md does not hold. The ordinary tests call the same functions with the inputs in this folder.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace moectl::fuzz {

using Bytes = std::span<const std::uint8_t>;

/// A promise that did not hold.
class Finding : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};
inline void require(bool holds, const std::string& promise) {
  if (!holds) throw Finding(promise);
}

void config(
    Bytes bytes);  ///< A config in YAML: refused with a message, or one that reads back as itself and runs.
void log(Bytes bytes);        ///< How faults are treated, then a trace or a run log.
void json(Bytes bytes);       ///< A line of JSON, against another parser, and as each kind of line.
void importers(Bytes bytes);  ///< Format, options, then a file of it.
void state(
    Bytes bytes);  ///< A controller, and its saved state with numbers altered and the checksum repaired.
void c_abi(Bytes bytes);       ///< A sequence of calls of moectl.h.
void controller(Bytes bytes);  ///< A sequence of steps of a disturbed controller and of an undisturbed twin.

struct Target {
  const char* name;
  void (*run)(Bytes);
};
inline constexpr Target kTargets[] = {
    {"config", config},         {"log", log},     {"json", json},
    {"importers", importers},   {"state", state}, {"c_abi", c_abi},
    {"controller", controller},
};

}  // namespace moectl::fuzz
