#include "base/fields.h"

#include <cmath>

#include "base/format.h"

namespace moectl {

std::string text_of(const std::optional<ConfigProblem>& problem) {
  return problem ? problem->key + ": " + problem->value + ": " + problem->constraint : std::string();
}

std::string shown(double value) {
  return exact(value);
}

std::string shown(std::int64_t value) {
  if (std::abs(static_cast<double>(value)) < 1e15) return std::to_string(value);
  return brief(static_cast<double>(value), 6);
}

std::string listed(const std::vector<std::string>& words, const char* last) {
  std::string text;
  for (std::size_t i = 0; i < words.size(); ++i) {
    text += (i == 0 ? "" : i + 1 < words.size() ? ", " : last) + words[i];
  }
  return text;
}

std::string words_of(const Range& range) {
  if (range.words) return range.words;
  const std::string low = shown(range.low), high = shown(range.high);
  const bool has_low = range.low > -1e308, has_high = range.high < 1e308 && range.high != kMostSteps;
  if (!has_low && !has_high) return "any number";
  if (!has_high) return (range.above_low ? "above " : "at least ") + low;
  if (!has_low) return (range.below_high ? "below " : "at most ") + high;
  if (range.above_low)
    return range.below_high ? "between " + low + " and " + high : "above " + low + " and at most " + high;
  return "from " + low + " to " + (range.below_high ? "below " : "") + high;
}

std::string violated(const Range& range, double value) {
  if (!std::isfinite(value)) return "must be finite";
  if (range.high == kMostSteps && value > kMostSteps) return "must be at most 1e12";
  const bool low = range.above_low ? value > range.low : value >= range.low;
  const bool high = range.below_high ? value < range.high : value <= range.high;
  return low && high ? std::string() : "must be " + words_of(range);
}

}  // namespace moectl
