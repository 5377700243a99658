// PolicyOptions: the options of a policy. Each is declared once; validation, defaults, help and errors use that one
// list.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace moectl {

using OptionValue = std::variant<bool, std::int64_t, double, std::string>;

/// One option of a policy. The default's type is the option's type; an empty string default means "required".
struct OptionSpec {
  std::string name = {};
  OptionValue default_value = {};
  std::string unit = {};         ///< "" = dimensionless.
  std::string description = {};  ///< One line.
  double min = -1e308;           ///< Numbers only, inclusive.
  double max = 1e308;
  std::vector<std::string> choices = {};  ///< Strings only; empty = any.
};

/// Option values after validation: every declared option has one, given or default.
class PolicyOptions {
 public:
  void set(std::string name, OptionValue value) { values_[std::move(name)] = std::move(value); }
  // Each throws std::invalid_argument if the option is not declared with this type: a mistake in the policy.
  double number(std::string_view name) const;
  std::int64_t integer(std::string_view name) const;
  bool flag(std::string_view name) const;
  const std::string& text(std::string_view name) const;
  const std::map<std::string, OptionValue, std::less<>>& values() const { return values_; }

 private:
  std::map<std::string, OptionValue, std::less<>> values_;
};

}  // namespace moectl
