#include "moectl/policy.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace moectl {
namespace {

template <class T>
const T& value_of(const std::map<std::string, OptionValue, std::less<>>& values, std::string_view name,
                  const char* type) {
  const auto found = values.find(name);
  if (found == values.end()) {
    throw std::invalid_argument("option " + std::string(name) + ": not declared by the policy that reads it");
  }
  const T* value = std::get_if<T>(&found->second);
  if (value == nullptr) {
    throw std::invalid_argument("option " + std::string(name) + ": read as " + type +
                                " but declared otherwise");
  }
  return *value;
}

// Returns what is wrong with the declaration of an option; empty if nothing.
std::string check_spec(const OptionSpec& spec) {
  if (spec.name.empty()) return "has an empty name";
  if (!(spec.min <= spec.max)) return "has min above max";
  double number = 0;
  if (const auto* integer = std::get_if<std::int64_t>(&spec.default_value)) {
    number = static_cast<double>(*integer);
  } else if (const auto* real = std::get_if<double>(&spec.default_value)) {
    number = *real;
  } else {
    const auto* text = std::get_if<std::string>(&spec.default_value);
    if (text == nullptr || text->empty() || spec.choices.empty()) return "";
    if (std::find(spec.choices.begin(), spec.choices.end(), *text) == spec.choices.end()) {
      return "has a default that is not among its choices";
    }
    return "";
  }
  return number >= spec.min && number <= spec.max ? "" : "has a default outside [min, max]";
}

}  // namespace

double PolicyOptions::number(std::string_view name) const {
  return value_of<double>(values_, name, "a number");
}

std::int64_t PolicyOptions::integer(std::string_view name) const {
  return value_of<std::int64_t>(values_, name, "an integer");
}

bool PolicyOptions::flag(std::string_view name) const {
  return value_of<bool>(values_, name, "a flag");
}

const std::string& PolicyOptions::text(std::string_view name) const {
  return value_of<std::string>(values_, name, "text");
}

void PolicyRegistry::add(PolicyDescription description) {
  const std::string where = "policy \"" + description.name + "\": ";
  if (description.name.empty()) throw std::invalid_argument("policy: name must not be empty");
  if (policies_.contains(description.name)) throw std::invalid_argument(where + "already registered");
  if (!description.make) throw std::invalid_argument(where + "make is missing");
  if (description.actuators.empty()) throw std::invalid_argument(where + "names no actuator it can serve");
  for (std::size_t i = 0; i < description.options.size(); ++i) {
    const OptionSpec& spec = description.options[i];
    if (const std::string wrong = check_spec(spec); !wrong.empty()) {
      throw std::invalid_argument(where + "option \"" + spec.name + "\" " + wrong);
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (description.options[j].name == spec.name) {
        throw std::invalid_argument(where + "two options named \"" + spec.name + "\"");
      }
    }
  }
  std::string name = description.name;
  policies_.emplace(std::move(name), std::move(description));
}

const PolicyDescription* PolicyRegistry::find(std::string_view name) const {
  const auto found = policies_.find(name);
  return found == policies_.end() ? nullptr : &found->second;
}

std::vector<const PolicyDescription*> PolicyRegistry::all() const {
  std::vector<const PolicyDescription*> list;
  list.reserve(policies_.size());
  for (const auto& [name, description] : policies_) list.push_back(&description);
  return list;
}

const PolicyRegistry& PolicyRegistry::builtin() {
  static const PolicyRegistry registry = [] {
    PolicyRegistry r;
    register_builtin_policies(r);
    return r;
  }();
  return registry;
}

}  // namespace moectl
