// PolicyRig: one policy driven by hand-made or random windows, outside the controller, so that tests can look
// at proposals before any limit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "moectl/controller.h"
#include "moectl/policy.h"

namespace moectl::testing {

struct RigOptions {
  Actuator actuator = Actuator::kExpertBias;
  int experts = 16, top_k = 2, delay = 0, domains = 0;
  ScoreSpace score_space = ScoreSpace::kProbability;
  std::map<std::string, OptionValue> options = {};
  std::vector<double> targets = {};
};

class PolicyRig {
 public:
  PolicyRig(const std::string& policy, const RigOptions& rig) : rig_(rig), targets(rig.targets) {
    const PolicyDescription* description = PolicyRegistry::builtin().find(policy);
    if (description == nullptr) throw std::invalid_argument(policy + ": not registered");
    PolicyOptions options;
    for (const OptionSpec& spec : description->options) options.set(spec.name, spec.default_value);
    for (const auto& [name, value] : rig.options) options.set(name, value);
    const Limits limits = default_limits(rig.actuator);
    PolicyContext context{.actuator = rig.actuator,
                          .layer = 0,
                          .experts = rig.experts,
                          .top_k = rig.top_k,
                          .domains = rig.domains,
                          .delay = rig.delay,
                          .score_space = rig.score_space,
                          .initial = rig.actuator == Actuator::kExpertBias
                                         ? 0
                                         : (rig.actuator == Actuator::kAuxLossWeight ? 0.01 : 1.0),
                          .min = limits.min,
                          .max = limits.max};
    if (description->check) {
      const std::string wrong = description->check(context, options);
      if (!wrong.empty()) throw std::invalid_argument(policy + ": " + wrong);
    }
    policy_ = description->make(context, options);
    value.assign(rig.actuator == Actuator::kExpertBias ? static_cast<std::size_t>(rig.experts) : 1,
                 context.initial);
    if (targets.empty()) targets.assign(static_cast<std::size_t>(rig.experts), 1.0 / rig.experts);
    shape_ = {.experts = rig.experts, .top_k = rig.top_k, .needs = policy_->needs()};
    shape_.needs.domains = rig.domains;
    measurer_.emplace(shape_, MetricsOptions{});
    monitor_.emplace(shape_, MonitorOptions{});
  }

  const StatsShape& shape() const { return shape_; }
  Policy& policy() { return *policy_; }

  /// One decision on these sums: returns the proposal, and takes it over as applied.
  const std::vector<double>& step(const RoutingStats& stats, const StepInfo& info = {},
                                  LimitReport why = {}) {
    return settle(propose(stats, info), why);
  }
  const std::vector<double>& propose(const RoutingStats& stats, const StepInfo& info = {}) {
    Metrics metrics;
    measurer_->measure(stats, metrics);
    monitor_->observe(stats, metrics);
    wanted_ = value;
    policy_->propose({.step = now++,
                      .layer = 0,
                      .stats = stats,
                      .metrics = metrics,
                      .worst = metrics,
                      .monitor = *monitor_,
                      .targets = targets,
                      .info = info},
                     wanted_);
    return wanted_;
  }
  const std::vector<double>& settle(const std::vector<double>& applied, LimitReport why = {}) {
    value = applied;
    policy_->on_applied(value, why);
    return value;
  }

  std::string save() {
    StateIo out;
    monitor_->exchange(out);
    policy_->exchange(out);
    return out.bytes();
  }
  void load(const std::string& bytes) {
    StateIo in(bytes);
    monitor_->exchange(in);
    policy_->exchange(in);
    in.finish();
  }

 private:
  RigOptions rig_;
  std::unique_ptr<Policy> policy_;
  StatsShape shape_;
  std::optional<Measurer> measurer_;
  std::optional<LayerMonitor> monitor_;
  std::vector<double> wanted_;

 public:
  std::vector<double> targets, value;
  std::int64_t now = 0;
};

/// Whether an array is [N × width] rather than [width × N].
inline bool expert_major(RoutingStats::Array which) {
  return which == RoutingStats::kMargins || which == RoutingStats::kRequiredBins;
}

inline RoutingStats stats_of(const StatsShape& shape, const std::vector<std::int64_t>& counts) {
  RoutingStats stats(shape);
  std::int64_t total = 0;
  for (const std::int64_t c : counts) total += c;
  stats.add_counts(counts, (total + shape.top_k - 1) / shape.top_k);
  if (!shape.needs.biased_scores()) return stats;
  // Required biases likewise: a tenth below and above that in force. By micro-batch: a tenth of the missing share.
  const auto put = [](std::span<std::int64_t> words, std::size_t bin, std::int64_t count) {
    words[bin / 2] += count << (bin % 2 == 0 ? 0 : 32);
  };
  for (std::size_t i = 0; i < counts.size(); ++i) {
    if (shape.needs.required_bins) {
      const auto words =
          stats.mutable_array(RoutingStats::kRequiredBins).subspan(i * kRequiredWords, kRequiredWords);
      put(words, required_bin({}, -0.1), counts[i]);
      put(words, required_bin({}, 0.1), std::max<std::int64_t>(0, stats.tokens() - counts[i]));
    }
    if (shape.needs.required_local && total > 0) {
      const double share = static_cast<double>(counts[i]) / static_cast<double>(total);
      stats.mutable_array(RoutingStats::kRequiredSum)[i] =
          to_fixed(0.1 * (1 - share * static_cast<double>(counts.size())));
      stats.set_scalar(RoutingStats::kRequiredRecords, 1);
    }
  }
  stats.set_scalar(RoutingStats::kMarginTokens, stats.tokens());
  if (!shape.needs.margins) return stats;
  // Margins that go with the counts: each expert's own tokens a tenth below the threshold, the others above.
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const std::span<std::int64_t> bins =
        stats.mutable_array(RoutingStats::kMargins).subspan(i * kMarginBins, kMarginBins);
    bins[margin_bin(-0.1F)] = counts[i];
    bins[margin_bin(0.1F)] = std::max<std::int64_t>(0, stats.tokens() - counts[i]);
  }
  stats.set_scalar(RoutingStats::kMarginTokens, stats.tokens());
  return stats;
}

/// A batch of `tokens` tokens routed by random scores, with everything a router can report.
inline RoutingStats random_stats(const StatsShape& shape, int tokens, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  const auto n = static_cast<std::size_t>(shape.experts), k = static_cast<std::size_t>(shape.top_k);
  std::vector<double> popularity(n);
  for (double& p : popularity) p = normal(random);
  std::vector<std::int64_t> experts, domains;
  std::vector<float> top, probabilities, biased;
  for (int t = 0; t < tokens; ++t) {
    std::vector<std::pair<double, std::size_t>> scores(n);
    double sum = 0;
    for (std::size_t i = 0; i < n; ++i) {
      scores[i] = {1 / (1 + std::exp(-popularity[i] - normal(random))), i};
      sum += scores[i].first;
    }
    for (std::size_t i = 0; i < n; ++i) probabilities.push_back(static_cast<float>(scores[i].first / sum));
    for (const auto& score : scores) biased.push_back(static_cast<float>(score.first));
    std::sort(scores.rbegin(), scores.rend());
    for (std::size_t j = 0; j < k; ++j) experts.push_back(static_cast<std::int64_t>(scores[j].second));
    for (std::size_t j = 0; j <= k && k < n; ++j) top.push_back(static_cast<float>(scores[j].first));
    if (shape.needs.domains > 0)
      domains.push_back(
          static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(shape.needs.domains)));
  }
  RoutingStats stats(shape);
  RoutingBatch batch{.experts = experts, .sequence_length = tokens / 8};
  const bool margins = shape.needs.biased_scores() && k < n;
  if (shape.needs.gap || margins) batch.top_values = top;
  if (margins) batch.biased_scores = biased;
  if (shape.needs.probabilities) batch.probabilities = probabilities;
  if (shape.needs.domains > 0) batch.domain_ids = domains;
  batch.dropped = static_cast<std::int64_t>(random() % 20);
  if (!stats.add(batch)) throw std::logic_error("random_stats made an invalid batch");
  return stats;
}

}  // namespace moectl::testing
