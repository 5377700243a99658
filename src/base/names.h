// The words for the values of an enumeration.
#pragma once

#include <algorithm>
#include <cstddef>
#include <optional>
#include <string_view>

namespace moectl {

/// One word for each value, which count from 0 in the order of the words.
template <class Enum, std::size_t size>
struct Names {
  std::string_view words[size];

  constexpr std::string_view operator[](Enum value) const { return words[static_cast<std::size_t>(value)]; }
  std::optional<Enum> find(std::string_view word) const {
    const auto* const at = std::find(words, words + size, word);
    return at == words + size ? std::nullopt : std::optional(static_cast<Enum>(at - words));
  }
};

}  // namespace moectl
