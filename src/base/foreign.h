// Code that others wrote: policies, reductions, plug-ins. Whatever it throws becomes a std::exception, so that every
// caller can say what happened.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>
#include <utility>

namespace moectl {

inline constexpr const char* kNoMessage = "an exception that is not a std::exception";

/// Calls `call`. What it throws that is not a std::exception becomes a std::runtime_error that names `who`.
template <class Call>
decltype(auto) call_foreign(const std::string& who, Call&& call) {
  try {
    return std::forward<Call>(call)();
  } catch (const std::exception&) {
    throw;
  } catch (...) {
    throw std::runtime_error(who + ": threw " + kNoMessage);
  }
}

/// Calls `call`; what it throws goes to `failed(message)`. Allocates nothing. Returns whether it threw nothing.
template <class Call, class Failed>
bool call_held(Call&& call, Failed&& failed) {
  try {
    std::forward<Call>(call)();
    return true;
  } catch (const std::exception& error) {
    std::forward<Failed>(failed)(error.what());
  } catch (...) {
    std::forward<Failed>(failed)(kNoMessage);
  }
  return false;
}

}  // namespace moectl
