// A registry with one policy of a test beside those of the library.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "moectl/policy.h"

namespace moectl {

inline PolicyRegistry registry_with(
    const std::string& name, Actuator actuator,
    std::function<std::unique_ptr<Policy>(const PolicyContext&, const PolicyOptions&)> make) {
  PolicyRegistry registry;
  register_builtin_policies(registry);
  PolicyDescription description;
  description.name = name;
  description.actuators = {actuator};
  description.make = std::move(make);
  registry.add(std::move(description));
  return registry;
}

}  // namespace moectl
