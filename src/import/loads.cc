#include "import/loads.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/format.h"

namespace moectl {

LoadValues::LoadValues(const Bytes& file, const ImportOptions& options, ImportNotes& notes)
    : options_(options), notes_(notes), top_k_(needed_top_k(file, options)) {
  kind_ = options.values == "counts"    ? Kind::kCounts
          : options.values == "share"   ? Kind::kShare
          : options.values == "percent" ? Kind::kPercent
          : options.values == "ratio"   ? Kind::kRatio
                                        : Kind::kAuto;
}

LoadValues::Kind LoadValues::kind_of(std::span<const double> values, double sum,
                                     const std::string& place) const {
  const bool whole = std::ranges::all_of(values, [](double v) { return v == std::floor(v); });
  const auto near = [&](double total) { return std::abs(sum - total) <= 2e-3 * total; };
  if (near(1)) return Kind::kShare;
  if (whole) return Kind::kCounts;
  if (near(100)) return Kind::kPercent;
  if (near(static_cast<double>(values.size()))) return Kind::kRatio;
  throw ImportError(
      place +
      ": expected counts (whole numbers), shares (sum 1), percent (sum 100) or multiples of the mean (sum " +
      std::to_string(values.size()) + "): found a sum of " + brief(sum) +
      "; --values says which, --metric chooses columns");
}

ImportedLayer LoadValues::counts(std::span<const double> values, const std::string& place) {
  ImportedLayer layer;
  layer.top_k = top_k_;
  layer.counts.resize(values.size());
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  if (!(sum > 0)) return layer;
  if (kind_ == Kind::kAuto) {
    kind_ = kind_of(values, sum, place);
    const char* const names[] = {"", "counts", "shares of the load", "percent of the load",
                                 "multiples of the mean load"};
    notes_.say(std::string("the values are read as ") + names[static_cast<int>(kind_)]);
  }
  if (kind_ == Kind::kCounts) {
    for (std::size_t i = 0; i < values.size(); ++i) layer.counts[i] = whole_of(values[i], place);
    return layer;
  }
  if (options_.tokens < 1)
    throw ImportError(
        place +
        ": these are shares, no counts: --tokens must give the tokens of a step, which the floor depends on");
  // Rounded so that the sum stays: the largest remainders get the rest.
  layer.tokens = options_.tokens;
  const double assignments = static_cast<double>(options_.tokens) * top_k_;
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
