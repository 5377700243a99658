#include "import/loads.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>

#include "base/format.h"

namespace moectl {
namespace {

std::string names_of(unsigned kinds) {
  std::string names;
  for (const auto& [kind, name] :
       {std::pair(kCounts, "counts"), std::pair(kShares, "shares of the load"),
        std::pair(kPercent, "percent of the load"), std::pair(kMultiples, "multiples of the mean load")}) {
    if (kinds & kind) names += (names.empty() ? "" : " or ") + std::string(name);
  }
  return names;
}

LoadKind lowest(unsigned kinds) {
  return static_cast<LoadKind>(1U << std::countr_zero(kinds));
}

}  // namespace

LoadValues::LoadValues(const Bytes& file, const ImportOptions& options, ImportNotes& notes, bool whole)
    : options_(options), notes_(notes), top_k_(needed_top_k(file, options)) {
  if (whole) told_ = kCounts;
  if (options.values == "counts") told_ = kCounts;
  if (options.values == "share") told_ = kShares;
  if (options.values == "percent") told_ = kPercent;
  if (options.values == "ratio") told_ = kMultiples;
}

/// Takes away what the values cannot be.
LoadKind LoadValues::narrow(std::span<const double> values, double sum, const std::string& place) {
  const auto near = [&](double total) { return std::abs(sum - total) <= 2e-3 * total; };
  unsigned fits = 0;
  if (std::ranges::all_of(values, [](double v) { return v == std::floor(v); })) fits |= kCounts;
  if (near(1)) fits |= kShares;
  if (near(100)) fits |= kPercent;
  if (near(static_cast<double>(values.size()))) fits |= kMultiples;
  if (fits == 0)
    throw ImportError(place +
                      ": expected counts (whole numbers), shares (sum 1), percent (sum 100) or multiples of "
                      "the mean (sum " +
                      std::to_string(values.size()) + "): found a sum of " + brief(sum) +
                      "; --values says which, --metric chooses columns");
  if (!(fits & notes_.load_kinds))
    throw ImportError(place + ": a sum of " + brief(sum) + " is one of " + names_of(fits) +
                      ", but the rows before it hold " + names_of(notes_.load_kinds) +
                      "; --values says which, --metric chooses columns");
  notes_.load_kinds &= fits;
  return lowest(fits);
}

/// What fits all rows. Whole numbers are counts, unless the tokens that only the others need are given.
LoadKind LoadValues::found() const {
  const unsigned kinds = notes_.load_kinds, others = kinds & ~kCounts;
  const LoadKind kind = others && (options_.tokens > 0 || !(kinds & kCounts)) ? lowest(others) : kCounts;
  std::string note = "the values are read as " + names_of(kind);
  if (kind == kCounts && others) note += ", though they may be " + names_of(others) + ": --values says which";
  if (kind == kCounts && options_.tokens > 0) note += ", which do not need --tokens";
  notes_.say(note);
  return kind;
}

ImportedLayer LoadValues::counts(std::span<const double> values, const std::string& place,
                                 std::optional<std::int64_t> tokens) {
  ImportedLayer layer;
  layer.top_k = top_k_;
  layer.every_expert = true;
  layer.counts.resize(values.size());
  layer.tokens = tokens;
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  if (!std::isfinite(sum))
    throw ImportError(place + ": a sum of " + exact(sum) + ": expected finite numbers");
  if (!(sum > 0)) return layer;
  if (!told_ && !notes_.first_reading) told_ = found();
  const LoadKind kind = told_ ? *told_ : narrow(values, sum, place);
  if (kind == kCounts) {
    for (std::size_t i = 0; i < values.size(); ++i) layer.counts[i] = whole_of(values[i], place);
    return layer;
  }
  if (!tokens && options_.tokens > 0) layer.tokens = options_.tokens;
  if (!layer.tokens)
    throw ImportError(
        place +
        ": these are shares, no counts: --tokens must give the tokens of a step, which the floor depends on");
  // Rounded so that the sum stays: the largest remainders get the rest.
  const double assignments = static_cast<double>(*layer.tokens) * top_k_;
  std::vector<std::pair<double, std::size_t>> rest;
  auto left = static_cast<std::int64_t>(assignments);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double wanted = values[i] / sum * assignments;
    layer.counts[i] = static_cast<std::int64_t>(wanted);
    left -= layer.counts[i];
    rest.emplace_back(static_cast<double>(layer.counts[i]) - wanted, i);
  }
  std::ranges::sort(rest);
  for (std::size_t i = 0; i < rest.size() && left > 0; ++i, --left) ++layer.counts[rest[i].second];
  return layer;
}

}  // namespace moectl
