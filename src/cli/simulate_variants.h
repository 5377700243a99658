// The runs of `moectl simulate`: configs, and what --set changes in them.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "moectl/config.h"

namespace moectl::cli {

/// One run: a config, and what --set changes in it.
struct Variant {
  std::string config;
  std::vector<std::pair<std::string, std::string>> changes;  // key, value

  std::string name() const {
    std::string text = config;
    for (const auto& [key, value] : changes) text += ' ' + key + '=' + value;
    return text;
  }
};

/// Every config with every combination of the values of `sets`, each KEY=VALUE or KEY=VALUE,VALUE,... Throws InputError.
std::vector<Variant> variants_of(const std::vector<std::string>& configs,
                                 const std::vector<std::string>& sets);

/// The config with its changes. Throws ConfigError and InputError.
ControllerConfig load_variant(const Variant& variant, const PolicyRegistry& registry);

}  // namespace moectl::cli
