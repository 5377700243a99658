// ControllerConfig → YAML and JSON: one tree for both, since JSON's values are YAML's.
#include <nlohmann/json.hpp>

#include "base/printable.h"
#include "control/config_fields.h"
#include "moectl/config.h"

namespace moectl {
namespace {

using Json = nlohmann::ordered_json;

template <class Struct>
void write_fields(const Struct& all, Json& out);

/// Leaves out what is empty or not given: read back, it is the same.
template <class T>
void write(const FieldInfo& field, const T& value, Json& out) {
  const std::string key(field.key);
  if constexpr (std::is_same_v<T, Initial>) {
    if (!value.file.empty()) {
      out[key] = value.file;
    } else if (!value.values.empty()) {
      out[key] = value.values;
    } else {
      out[key] = value.value;
    }
  } else if constexpr (kHasFields<T>) {
    write_fields(value, out[key]);
  } else if constexpr (std::is_enum_v<T>) {
    out[key] = name_of(value);
  } else if constexpr (kIsOptional<T>) {
    if (value) {
      write(field, *value, out);
    } else if (kHasFields<typename T::value_type> && !kIsSection<typename T::value_type>) {
      out[key] = false;
    }
  } else if constexpr (std::is_same_v<T, PolicyOptions>) {
    out[key] = Json::object();
    for (const auto& [name, option] : value.values()) {
      std::visit([&, &inner = name](const auto& typed) { out[key][inner] = typed; }, option);
    }
  } else if constexpr (std::is_same_v<T, Bands>) {
    for (const auto& [metric, band] : value) out[key][metric] = {band.low, band.high};
  } else if constexpr (std::is_arithmetic_v<T>) {
    if (!is_absent(field, value)) out[key] = value;
  } else if (!value.empty()) {
    if constexpr (kIsList<T>) {
      for (const auto& one : value) write_fields(one, out[key].emplace_back());
    } else {
      out[key] = value;
    }
  }
}

template <class Struct>
void write_fields(const Struct& all, Json& out) {
  if (!out.is_object()) out = Json::object();
  for_each_field(all, [&](const FieldInfo& field, const auto& value) { write(field, value, out); });
}

Json tree(const ControllerConfig& config) {
  Json all = {{"version", 1}};
  write_fields(config, all);
  return all;
}

// What is not UTF-8 cannot be written as JSON; a name made in code may hold anything. What steers a terminal is escaped;
// YAML refuses some of it otherwise.
std::string dumped(const Json& value) {
  return printable(value.dump(-1, ' ', false, Json::error_handler_t::replace));
}

/// A value in YAML's flow style. Words that YAML would read as something else are quoted.
std::string flow(const Json& value) {
  std::string text;
  if (value.is_object() || value.is_array()) {
    for (const auto& [key, item] : value.items()) {
      text += (text.empty() ? "" : ", ") + (value.is_object() ? key + ": " : "") + flow(item);
    }
    return value.is_object() ? '{' + text + '}' : '[' + text + ']';
  }
  if (value.is_boolean()) return value.get<bool>() ? "true" : "false";
  if (value.is_number_float()) return shown(value.get<double>());
  if (!value.is_string()) return dumped(value);
  text = value.get<std::string>();
  for (const char c : text) {
    if (!(c == '_' || (c >= 'a' && c <= 'z'))) return dumped(value);
  }
  for (const char* word : {"", "true", "false", "on", "yes", "no", "y", "n", "null"}) {
    if (text == word) return dumped(value);
  }
  return text;
}

}  // namespace

std::string to_json(const ControllerConfig& config) {
  return dumped(tree(config));
}

std::string to_yaml(const ControllerConfig& config) {
  std::string text;
  const auto is_actuator = [](const std::string& key) {
    for (const Actuator which : kActuators) {
      if (key == name_of(which)) return true;
    }
    return false;
  };
  const Json all = tree(config);
  for (const auto& [key, value] : all.items()) {
    text += key + ':';
    if (is_actuator(key)) {
      text += '\n';
      for (const auto& [inner, item] : value.items()) text += "  " + inner + ": " + flow(item) + '\n';
    } else {
      text += ' ' + flow(value) + '\n';
    }
  }
  return text;
}

}  // namespace moectl
