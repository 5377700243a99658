// Responsiveness: does the load of a layer answer the moves of its biases, and the token entropy those of the temperature?
#pragma once

#include <optional>
#include <string_view>

namespace moectl {

/// What is known about one layer's biases. Of a temperature, read "token entropy" for "load".
enum class Response {
  kNotApplicable,  ///< Nothing is applied or checked: mode shadow or off, a frozen layer, `safety.responsiveness: off`.
  kUnknown,       ///< No move so far that is large enough to tell.
  kAnswers,       ///< The load follows the moves.
  kProbing,       ///< A small test move asks.
  kUnresponsive,  ///< The load does not follow, or goes the other way: the actuator is held.
};
inline constexpr int kResponseCount = 5;
std::string_view name_of(Response response);
/// Nothing for an unknown name.
std::optional<Response> response_of(std::string_view name);

struct Responsiveness {
  Response state = Response::kNotApplicable;
  /// Change of load seen over the change expected: 1 = as expected, 0 = the load does not respond, negative = wrong
  /// sign. Absent while unknown.
  std::optional<double> gain{};
  std::optional<double> error{};  ///< Standard error of `gain`.
  /// Steps by which the answer to the last probe came later than the declared delay; more is not tried than 4.
  int late = 0;
  /// Whether the expectation comes from the measured slope at the threshold. If not, only the sign of `gain` counts,
  /// and whether it differs from 0.
  bool scaled = false;
};

}  // namespace moectl
