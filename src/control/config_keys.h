// The keys of a config as a flat list, and what of it two runs or two ranks must share.
#pragma once

#include <string>
#include <vector>

#include "control/config_fields.h"

namespace moectl {

/// One key and its value.
struct ConfigKey {
  std::string path, value;
  const FieldInfo* field;
  std::string range;  ///< What is allowed, in words.
  bool given;         ///< False for a key of what is switched off or left out.
};
/// Every key in the order of the lists. `complete`: also the keys of what is switched off or left out, and lists as one
/// value; else one entry for each element.
std::vector<ConfigKey> keys_of(const ControllerConfig& config, bool complete);

/// What the saved state of a layer depends on, as lines "key: value".
std::string describe_for_state(const ControllerConfig& config, const StatsShape& shape);
/// What all ranks must share, as lines "key: value": every key that changes a decision. `sums`: of all layers.
std::vector<std::string> describe_for_ranks(const ControllerConfig& config, std::size_t sums);

/// The value of a policy's option.
std::string shown(const OptionValue& value);

}  // namespace moectl
