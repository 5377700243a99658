// An option that is one of some words.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moectl/policy_options.h"

namespace moectl::policies {

inline OptionSpec choice(std::string name, std::string_view default_value, std::string description,
                         std::vector<std::string> choices) {
  return {.name = std::move(name),
          .default_value = std::string(default_value),
          .description = std::move(description),
          .choices = std::move(choices)};
}

}  // namespace moectl::policies
