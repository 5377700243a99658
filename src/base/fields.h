// Field lists: each key of a config is declared once, in a list of its struct, and is read, written, checked, compared
// and explained from there.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace moectl {

/// What is wrong with one value.
struct ConfigProblem {
  std::string key;  ///< Dotted path, as "expert_bias.limits.rate".
  std::string value;
  std::string constraint;
};
/// "key: value: constraint"; empty if nothing is wrong.
std::string text_of(const std::optional<ConfigProblem>& problem);

/// A value as messages and files show it; a number in the shortest form that reads back exactly.
std::string shown(double value);
std::string shown(std::int64_t value);
inline std::string shown(int value) {
  return shown(std::int64_t{value});
}
inline std::string shown(bool value) {
  return value ? "true" : "false";
}
inline std::string shown(const std::string& value) {
  return value;
}
template <class E>
requires std::is_enum_v<E> std::string shown(E value) {
  return std::string(name_of(value));
}

/// "a, b or c"; `last` stands before the last word.
std::string listed(const std::vector<std::string>& words, const char* last = ", ");

/// Which values are allowed. Numbers must be finite in any case.
struct Range {
  double low = -1e308, high = 1e308;
  bool above_low = false, below_high = false;       ///< The end itself is left out.
  const char* words = nullptr;                      ///< In place of the words made of the ends.
  std::vector<std::string> (*choices)() = nullptr;  ///< Words only.
};
/// No count may overflow when it is doubled or added to another.
inline constexpr double kMostSteps = 1e12;
inline constexpr Range kAny = {};
inline constexpr Range kPositivePart = {.low = 0, .high = 1, .above_low = true};
constexpr Range at_least(double low) {
  return {.low = low};
}
constexpr Range above(double low) {
  return {.low = low, .above_low = true};
}
constexpr Range steps_from(double low) {
  return {.low = low, .high = kMostSteps};
}
/// "at least 1", without "must be".
std::string words_of(const Range& range);
/// "must be …", or empty if the value is allowed.
std::string violated(const Range& range, double value);

/// Who must agree on the value of a key. Each includes those before.
enum class Shared {
  kNone,     ///< Changes no decision: each rank and each run as it likes.
  kRanks,    ///< All ranks of a run.
  kPresent,  ///< Whoever loads a saved state, on whether the key is given; ranks on its value.
  kState,    ///< Whoever loads a saved state.
};

enum class Presence {
  kOptional,
  kRequired,
  kMinusOneIsAbsent,  ///< -1 in the struct: not given.
};

/// What is declared of a key beside its type.
struct FieldInfo {
  std::string_view key;
  Shared shared;
  Range range;
  std::string_view unit;  ///< "" = dimensionless.
  std::string_view doc;   ///< One line.
  Presence presence = Presence::kOptional;
};

/// A key and the member (or the function) that finds its value; range and unit where there are any.
template <class Struct, class Value>
struct Field : FieldInfo {
  constexpr Field(std::string_view key, Value Struct::*member, Shared shared, Range range,
                  std::string_view unit, std::string_view doc, Presence presence = Presence::kOptional)
      : FieldInfo{key, shared, range, unit, doc, presence}, member(member) {}
  constexpr Field(std::string_view key, Value Struct::*member, Shared shared, Range range,
                  std::string_view doc, Presence presence = Presence::kOptional)
      : Field(key, member, shared, range, "", doc, presence) {}
  constexpr Field(std::string_view key, Value Struct::*member, Shared shared, std::string_view doc,
                  Presence presence = Presence::kOptional)
      : Field(key, member, shared, kAny, "", doc, presence) {}
  constexpr Field(std::string_view key, Value& (*get)(Struct&), Shared shared, std::string_view doc)
      : FieldInfo{key, shared, kAny, "", doc}, get(get) {}
  Value& of(Struct& all) const { return get ? get(all) : all.*member; }
  const Value& of(const Struct& all) const { return of(const_cast<Struct&>(all)); }

  Value Struct::*member = nullptr;
  Value& (*get)(Struct&) = nullptr;
};

/// True for the -1 of a key that is not given.
template <class Number>
bool is_absent(const FieldInfo& field, Number value) {
  return field.presence == Presence::kMinusOneIsAbsent && static_cast<double>(value) == -1;
}

/// The list of a struct: std::tuple of Field. A value whose type has one is a map of keys.
template <class Struct>
inline constexpr auto kFieldsOf = nullptr;
template <class T>
inline constexpr bool kHasFields = !std::is_same_v<decltype(kFieldsOf<T>), const std::nullptr_t>;

template <class T>
inline constexpr bool kIsVector = false;
template <class T>
inline constexpr bool kIsVector<std::vector<T>> = true;
/// A list of maps of keys.
template <class T>
inline constexpr bool kIsList = false;
template <class T>
inline constexpr bool kIsList<std::vector<T>> = kHasFields<T>;
template <class T>
inline constexpr bool kIsOptional = false;
template <class T>
inline constexpr bool kIsOptional<std::optional<T>> = true;

/// visit(field, value) for each field of the struct, in the order of its list.
template <class Struct, class Visit>
void for_each_field(Struct& all, Visit&& visit) {
  static_assert(kHasFields<std::remove_const_t<Struct>>, "include the header that declares its fields");
  std::apply([&](const auto&... field) { (visit(field, field.of(all)), ...); },
             kFieldsOf<std::remove_const_t<Struct>>);
}

template <class Struct>
std::optional<ConfigProblem> check_fields(const Struct& all);

/// What is wrong with one value; the key is relative to the struct that holds it.
template <class T>
std::optional<ConfigProblem> check_value(const FieldInfo& field, const T& value) {
  const std::string key(field.key);
  if constexpr (std::is_same_v<T, bool> || std::is_enum_v<T>) {
    return {};
  } else if constexpr (std::is_arithmetic_v<T>) {
    if (is_absent(field, value)) return {};
    std::string constraint = violated(field.range, static_cast<double>(value));
    if (!constraint.empty()) return ConfigProblem{key, shown(value), std::move(constraint)};
  } else if constexpr (std::is_same_v<T, std::string>) {
    if (!field.range.choices) return {};
    const std::vector<std::string> choices = field.range.choices();
    if (std::find(choices.begin(), choices.end(), value) == choices.end())
      return ConfigProblem{key, value, "must be " + words_of(field.range)};
  } else if constexpr (kIsOptional<T>) {
    if (value) return check_value(field, *value);
  } else if constexpr (kIsVector<T>) {
    for (std::size_t i = 0; i < value.size(); ++i) {
      FieldInfo one = field;
      const std::string path = key + '[' + std::to_string(i) + ']';
      one.key = path;
      if (auto problem = check_value(one, value[i])) return problem;
    }
  } else {
    auto problem = check_fields(value);
    if (problem) problem->key = key + '.' + problem->key;
    return problem;
  }
  return {};
}

/// The first value outside its range.
template <class Struct>
std::optional<ConfigProblem> check_fields(const Struct& all) {
  std::optional<ConfigProblem> problem;
  for_each_field(all, [&](const FieldInfo& field, const auto& value) {
    if (!problem) problem = check_value(field, value);
  });
  return problem;
}

}  // namespace moectl
