// YAML → ControllerConfig: which keys there are, and where their values go.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>

#include "base/input_limits.h"
#include "base/whole_file.h"
#include "config/config_yaml.h"
#include "control/config_check.h"
#include "control/config_fields.h"
#include "moectl/config.h"
#include "moectl/policy.h"

namespace moectl {
namespace {

/// Reads the keys of a map into the struct that declares them.
class Reader {
 public:
  /// `groups`: the config has layer groups, which say of what the model consists.
  Reader(const PolicyRegistry& registry, bool groups) : registry_(registry), groups_(groups) {}

  template <class Struct>
  void read_fields(YamlMap& map, Struct& all) {
    for_each_field(all, [&](const FieldInfo& field, auto& value) {
      read(map, field, value);
      if (field.presence == Presence::kRequired && !(std::is_same_v<Struct, ModelConfig> && groups_))
        map.require(field.key);
    });
  }

 private:
  template <class T>
  void read(YamlMap& map, const FieldInfo& field, T& value) {
    if constexpr (std::is_same_v<T, Initial>) {
      return;  // with the actuator
    } else if constexpr (std::is_enum_v<T>) {
      read_choice(map, field, value);
    } else if constexpr (kIsOptional<T>) {
      read_optional(map, field, value);
    } else if constexpr (std::is_same_v<T, ActuatorConfig>) {
      if (YamlMap* inner = map.map(field.key)) read_actuator(*inner, field.key, value);
    } else if constexpr (std::is_same_v<T, Bands>) {
      if (YamlMap* inner = map.map(field.key)) read_bands(*inner, value);
    } else if constexpr (kHasFields<T>) {
      if (YamlMap* inner = map.map(field.key)) read_fields(*inner, value);
    } else if constexpr (kIsList<T>) {
      for (YamlMap* inner : map.maps(field.key)) read_fields(*inner, value.emplace_back());
    } else if constexpr (!std::is_same_v<T, PolicyOptions>) {
      if (map.read(field.key, value)) check_read(map, field, value);
    }
  }

  /// What could not be said later: which word is near, and that -1 was written.
  template <class T>
  void check_read(const YamlMap& map, const FieldInfo& field, const T& value) {
    if constexpr (std::is_same_v<T, std::string>) {
      if (const auto wrong = check_value(field, value))
        throw map.error(field.key, value, wrong->constraint + did_you_mean(value, field.range.choices()));
    } else if constexpr (std::is_same_v<T, std::int64_t> || std::is_same_v<T, int>) {
      if (is_absent(field, value)) throw map.error(field.key, shown(value), violated(field.range, -1));
    }
  }

  template <class E>
  void read_choice(YamlMap& map, const FieldInfo& field, E& value) {
    std::string word;
    if (!map.read(field.key, word)) return;
    std::vector<std::string> names;
    for (const E choice : choices_of(E{})) {
      names.emplace_back(name_of(choice));
      if (word != names.back()) continue;
      value = choice;
      return;
    }
    throw map.error(field.key, word, "must be " + listed(names, " or ") + did_you_mean(word, names));
  }

  template <class T>
  void read_optional(YamlMap& map, const FieldInfo& field, std::optional<T>& value) {
    if constexpr (std::is_same_v<T, ActuatorConfig>) {
      if (YamlMap* inner = map.map(field.key)) {
        inner->require(
            "policy");  // the section takes the place of the config's own, whose policy it might mean to keep
        read_actuator(*inner, field.key, value.emplace());
      }
    } else if constexpr (kIsSection<T>) {
      if (YamlMap* inner = map.map(field.key)) read_fields(*inner, value.emplace());
    } else if constexpr (kHasFields<T>) {
      bool on = false;
      YamlMap* inner = map.map_or_switch(field.key, on);
      if (on) value.emplace();
      if (inner) read_fields(*inner, *value);
    } else if (T given{}; map.read(field.key, given)) {
      value = given;
    }
  }

  void read_bands(YamlMap& map, Bands& bands) {
    for (const std::string& metric : metric_names()) {
      std::vector<double> ends;
      if (!map.read(metric, ends)) continue;
      if (ends.size() != 2) {
        throw map.error(metric, std::to_string(ends.size()) + " numbers", "must be [lowest, highest]");
      }
      bands[metric] = {ends[0], ends[1]};
    }
  }

  /// A number; of biases also a list or the name of a file.
  Initial read_initial(YamlMap& map, Actuator which) {
    Initial initial = neutral_value(which);
    if (which == Actuator::kExpertBias) {
      if (map.is_list("initial")) {
        map.read("initial", initial.values);
        return initial;
      }
      if (map.is_word("initial")) {
        map.read("initial", initial.file);
        return initial;
      }
    }
    map.read("initial", initial.value);
    return initial;
  }

  void read_actuator(YamlMap& map, std::string_view name, ActuatorConfig& actuator) {
    Actuator which = kActuators[0];
    for (const Actuator one : kActuators) {
      if (name_of(one) == name) which = one;
    }
    // Default limits depend on these two. A policy that moves gets the range that suits one; a fixed value needs no more
    // than to lie in its own.
    map.read("policy", actuator.policy);
    actuator.initial = read_initial(map, which);
    actuator.limits = default_limits(which, actuator.initial);
    if (actuator.policy == "fixed" && (!is_multiplicative(which) || actuator.initial > 0)) {
      actuator.limits.min = std::min(actuator.limits.min, actuator.initial.value);
      actuator.limits.max = std::max(actuator.limits.max, actuator.initial.value);
    }
    read_fields(map, actuator);
    if (const std::string fault = policy_fault(actuator.policy, which, registry_); !fault.empty()) {
      throw map.error("policy", actuator.policy, fault);
    }
    YamlMap* options = map.map("options");
    if (!options) return;
    for (const OptionSpec& spec : registry_.find(actuator.policy)->options) {
      OptionValue value = spec.default_value;
      if (std::visit([&](auto& typed) { return options->read(spec.name, typed); }, value))
        actuator.options.set(spec.name, value);
    }
  }

  const PolicyRegistry& registry_;
  bool groups_;
};

// Files that a config names stand beside it.
void place_files(ControllerConfig& config, const std::filesystem::path& folder) {
  const auto place = [&](ActuatorConfig& actuator) {
    std::string& file = actuator.initial.file;
    if (!file.empty()) file = (folder / file).string();
  };
  place(config.expert_bias);
  for (LayerGroup& group : config.layers) {
    if (group.expert_bias) place(*group.expert_bias);
  }
  for (TimelineEntry& entry : config.timeline) {
    if (entry.expert_bias) place(*entry.expert_bias);
  }
}

// A config as it is, unless it is too long.
std::string config_text(std::istream& in, const std::string& name) {
  std::optional<std::string> text = read_up_to(in, kLargestConfig);
  if (!text) throw ConfigError(name + ": file: must be at most " + std::to_string(kLargestConfig) + " bytes");
  return *std::move(text);
}

}  // namespace

ControllerConfig parse_config(std::string_view text, const std::string& name) {
  return parse_config(text, name, PolicyRegistry::builtin());
}

ControllerConfig parse_config(std::string_view text, const std::string& name,
                              const PolicyRegistry& registry) {
  YamlFile file(text, name);
  YamlMap root = file.root();
  ControllerConfig config;
  std::int64_t version = 0;
  if (root.read("version", version) && version != 1) {
    throw root.error("version", std::to_string(version), "must be 1, the only version there is");
  }
  root.require("version");
  // Who asks for health wants all of it, oscillation included, unless told otherwise.
  config.monitor.trends = root.has("health");
  Reader(registry, root.has("layers")).read_fields(root, config);
  root.finish();
  if (const auto problem = complete(config, registry)) throw file.error(*problem);
  return config;
}

ControllerConfig load_config(const std::string& path) {
  return load_config(path, PolicyRegistry::builtin());
}

ControllerConfig load_config(const std::string& path, const PolicyRegistry& registry) {
  if (path == "-") {
    return parse_config(config_text(std::cin, "<stdin>"), "<stdin>", registry);
  }
  std::ifstream file(path, std::ios::binary);
  if (!file.is_open()) throw ConfigError(path + ": cannot be opened: " + std::strerror(errno));
  const std::string text = config_text(file, path);
  if (file.bad()) throw ConfigError(path + ": cannot be read");  // a directory opens
  ControllerConfig config = parse_config(text, path, registry);
  place_files(config, std::filesystem::path(path).parent_path());
  return config;
}

}  // namespace moectl
