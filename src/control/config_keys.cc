#include "control/config_keys.h"

namespace moectl {
namespace {

template <class T>
std::string range_of(const FieldInfo& field) {
  if (field.range.words) return field.range.words;
  if constexpr (std::is_same_v<T, bool>) {
    return "true, false";
  } else if constexpr (std::is_enum_v<T>) {
    std::vector<std::string> names;
    for (const T choice : choices_of(T{})) names.emplace_back(name_of(choice));
    return listed(names);
  } else if constexpr (std::is_same_v<T, PolicyOptions>) {
    return "the policy's";
  } else if constexpr (std::is_same_v<T, Initial>) {
    return "number, list or file";
  } else if constexpr (kIsOptional<T>) {
    using Inner = typename T::value_type;
    if constexpr (kIsSection<Inner>) {
      return "its keys";
    } else if constexpr (kHasFields<Inner>) {
      return "off, on or its keys";
    } else {
      return "any number";
    }
  } else if constexpr (kIsVector<T>) {
    return "list, each " + range_of<typename T::value_type>(field);
  } else if constexpr (std::is_arithmetic_v<T>) {
    return words_of(field.range);
  } else {
    return "any word";
  }
}

class Flat {
 public:
  explicit Flat(bool complete) : complete_(complete) {}

  template <class T>
  void add(const std::string& path, const FieldInfo& field, const T& value, bool given = true) {
    const auto put = [&](const std::string& key, std::string text, bool is_given) {
      keys_.push_back({key, std::move(text), &field, range_of<T>(field), given && is_given});
    };
    if constexpr (kHasFields<T>) {
      for_each_field(value, [&](const FieldInfo& inner, const auto& v) {
        add((path.empty() ? "" : path + '.') + std::string(inner.key), inner, v, given);
      });
    } else if constexpr (kIsOptional<T>) {
      using Inner = typename T::value_type;
      if constexpr (kIsSection<Inner>) {
        // Its keys are those of the config's own section.
        if (value) {
          add(path, field, *value, given);
        } else if (complete_) {
          put(path, "", false);
        }
      } else if constexpr (kHasFields<Inner>) {
        put(path, value ? "on" : "off", true);
        if (value || complete_) add(path, field, value.value_or(Inner{}), given && value.has_value());
      } else {
        put(path, value ? shown(*value) : "", value.has_value());
      }
    } else if constexpr (kIsVector<T>) {
      using Inner = typename T::value_type;
      if constexpr (kHasFields<Inner>) {
        if (value.empty() && complete_) add(path + "[]", field, Inner{}, false);
        for (std::size_t i = 0; i < value.size(); ++i)
          add(path + '[' + std::to_string(i) + ']', field, value[i], given);
      } else if (complete_) {
        std::vector<std::string> all;
        all.reserve(value.size());
        for (const Inner& one : value) all.push_back(shown(one));
        put(path, '[' + listed(all) + ']', !value.empty());
      } else {
        for (std::size_t i = 0; i < value.size(); ++i)
          put(path + '[' + std::to_string(i) + ']', shown(value[i]), true);
      }
    } else if constexpr (std::is_same_v<T, Bands>) {
      if (value.empty() && complete_) put(path, "", false);
      for (const auto& [metric, band] : value)
        put(path + '.' + metric, '[' + shown(band.low) + ", " + shown(band.high) + ']', true);
    } else if constexpr (std::is_same_v<T, PolicyOptions>) {
      if (value.values().empty() && complete_) put(path, "", false);
      for (const auto& [name, option] : value.values()) put(path + '.' + name, shown(option), true);
    } else {
      bool is_given = true;
      if constexpr (std::is_arithmetic_v<T>) is_given = !is_absent(field, value);
      put(path, shown(value), is_given);
    }
  }
  std::vector<ConfigKey> take() { return std::move(keys_); }

 private:
  bool complete_;
  std::vector<ConfigKey> keys_;
};

std::vector<std::string> lines_of(const ControllerConfig& config, bool state) {
  std::vector<std::string> lines;
  for (const ConfigKey& key : keys_of(config, false)) {
    const Shared shared = key.field->shared;
    if (!key.given || shared < (state ? Shared::kPresent : Shared::kRanks)) continue;
    lines.push_back(state && shared == Shared::kPresent ? key.path : key.path + ": " + key.value);
  }
  return lines;
}

}  // namespace

std::string shown(const Initial& initial) {
  if (!initial.file.empty()) return initial.file;
  if (initial.values.empty()) return shown(initial.value);
  std::vector<std::string> all;
  for (const double value : initial.values) all.push_back(shown(value));
  return '[' + listed(all) + ']';
}

std::string shown(const OptionValue& value) {
  return std::visit([](const auto& typed) { return shown(typed); }, value);
}

std::vector<ConfigKey> keys_of(const ControllerConfig& config, bool complete) {
  Flat flat(complete);
  flat.add("", FieldInfo{}, config);
  return flat.take();
}

std::string describe_for_state(const ControllerConfig& config, const StatsShape& shape) {
  std::string text;
  for (const std::string& line : lines_of(config, true)) text += line + '\n';
  return text + "collected sums: " + std::to_string(shape.flat_size()) + '\n';
}

std::vector<std::string> describe_for_ranks(const ControllerConfig& config, std::size_t sums) {
  std::vector<std::string> lines = lines_of(config, false);
  lines.push_back("collected sums: " + std::to_string(sums));
  return lines;
}

}  // namespace moectl
