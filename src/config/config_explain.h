// What the field lists say of each key. Internal: `moectl check --explain` and `--reference`.
#pragma once

#include <string>

#include "moectl/config.h"
#include "moectl/policy.h"

namespace moectl {

/// Of a policy's option, in words.
std::string default_of(const OptionSpec& spec);
std::string range_of(const OptionSpec& spec);
/// Every key of a config with its value, default, range, unit and meaning.
std::string explain(const ControllerConfig& config, const PolicyRegistry& registry);
/// The text of docs/config.md.
std::string config_reference(const PolicyRegistry& registry);

}  // namespace moectl
