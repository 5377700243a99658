#include "control/inputs.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "control/payload.h"

namespace moectl {
namespace {

using S = RoutingStats;

bool any(const RoutingStats& stats, S::Array which) {
  const std::span<const std::int64_t> values = stats.array(which);
  return std::any_of(values.begin(), values.end(), [](std::int64_t v) { return v != 0; });
}

struct Input {
  bool StatsNeeds::*need;
  const char* name;
  bool (*given)(const RoutingStats& stats);
};

// Margins and required biases last: they have one name.
constexpr std::array kInputs = {
    Input{&StatsNeeds::gap, "top_values", [](const S& s) { return s.mean_gap().has_value(); }},
    Input{&StatsNeeds::sequences, "sequence_length or sequence_ids",
          [](const S& s) { return s.has_sequences(); }},
    Input{&StatsNeeds::probabilities, "probabilities", [](const S& s) { return s.has_probabilities(); }},
    Input{&StatsNeeds::gradients, "gradient norms", [](const S& s) { return s.scalar(S::kGradRecords) > 0; }},
    Input{&StatsNeeds::losses, "losses", [](const S& s) { return any(s, S::kExpertLossTokens); }},
    Input{&StatsNeeds::domain_losses, "losses by domain",
          [](const S& s) { return any(s, S::kDomainLossTokens); }},
    Input{&StatsNeeds::latencies, "latencies", [](const S& s) { return s.scalar(S::kLatencyRecords) > 0; }},
    Input{&StatsNeeds::pairs, "the experts of each token, not their counts alone",
          [](const S& s) { return s.has_pairs(); }},
    Input{&StatsNeeds::margins, "biased_scores", [](const S& s) { return s.has_margins(); }},
    Input{&StatsNeeds::required_bins, "biased_scores", [](const S& s) { return s.has_required_bins(); }},
    Input{&StatsNeeds::required_local, "biased_scores", [](const S& s) { return s.has_required_local(); }},
};

}  // namespace

// The first experts of a record tell it from others, if there are enough of them and they are not all alike.
void RepeatWatch::observe(const RoutingBatch& batch, int top_k) {
  constexpr std::size_t kLeast = 64, kMost = 512;
  if (batch.experts.size() < kLeast) return;
  const auto first = batch.experts.first(std::min(kMost, batch.experts.size()));
  const std::uint64_t print = fingerprint_of({.experts = first}) + batch.experts.size();
  if (std::find(prints_.begin(), prints_.end(), print) == prints_.end()) return prints_.push_back(print);
  const auto k = static_cast<std::size_t>(top_k);
  const auto of_first_token = first.first(k);
  repeated_ |= std::any_of(first.begin(), first.end(), [&](std::int64_t expert) {
    return std::find(of_first_token.begin(), of_first_token.end(), expert) == of_first_token.end();
  });
}

void RepeatWatch::end_step() {
  steps_ = repeated_ ? steps_ + 1 : 0;
  repeated_ = false;
  prints_.clear();
}

bool RepeatWatch::is_news() {
  constexpr int kSteps = 3;
  return !said_ && steps_ >= kSteps && (said_ = true);
}

bool leaves_probabilities(const RoutingBatch& batch, int top_k, std::span<const double> bias) {
  constexpr std::size_t kTokens = 8;
  constexpr double kRoom = 0.01;   // bfloat16 rounds less
  constexpr double kMasked = 1e4;  // a value of this size says that an expert is not to be chosen
  const auto k = static_cast<std::size_t>(top_k);
  for (std::size_t t = 0; t < std::min(kTokens, batch.experts.size() / k); ++t) {
    if (!batch.mask.empty() && batch.mask[t] == 0) continue;
    for (std::size_t j = 0; j < k && batch.experts[t * k + j] >= 0; ++j) {
      const double value = batch.top_values[t * (k + 1) + j], room = kRoom * std::max(1.0, std::abs(value));
      const double score = value - bias[static_cast<std::size_t>(batch.experts[t * k + j])];
      if (std::abs(value) < kMasked && (score < -room || score > 1 + room)) return false;
    }
  }
  return true;
}

StatsNeeds missing_in(const RoutingStats& stats, const StatsNeeds& required) {
  StatsNeeds missing;
  if (required == StatsNeeds{}) return missing;
  for (const Input& input : kInputs) missing.*input.need = required.*input.need && !input.given(stats);
  if (required.domains > 0 && !stats.has_domains()) missing.domains = required.domains;
  return missing;
}

std::string_view input_name(const StatsNeeds& needs) {
  for (const Input& input : kInputs) {
    if (needs.*input.need) return input.name;
  }
  return "domain_ids";
}

std::vector<std::string> input_names(const StatsNeeds& needs) {
  std::vector<std::string> names;
  for (const Input& input : kInputs) {
    if (needs.*input.need && (names.empty() || names.back() != input.name)) names.emplace_back(input.name);
  }
  if (needs.domains > 0) names.emplace_back("domain_ids");
  return names;
}

bool InputWatch::observe(const StatsNeeds& missing, std::int64_t steps, std::int64_t dwell) {
  const std::int64_t before = missing_for_;
  missing_for_ = missing == StatsNeeds{} ? 0 : before + steps;
  return before < dwell && missing_for_ >= dwell;
}

}  // namespace moectl
