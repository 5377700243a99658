// Prints every metric, and what a policy makes of them, in all its bits: for numbers of experts that fill the lanes and
// for numbers that leave some empty. Builds for registers of different widths must print the same.
#include <cstdio>
#include <random>

#include "policies/policy_rig.h"

namespace moectl::testing {
namespace {

RoutingStats window(const StatsShape& shape, std::mt19937_64& random) {
  constexpr std::size_t kTokens = 256;
  const auto n = static_cast<std::uint64_t>(shape.experts);
  const auto of_tokens = [&](std::size_t each) { return kTokens * each; };
  std::vector<std::int64_t> experts(of_tokens(static_cast<std::size_t>(shape.top_k))), domains(kTokens);
  for (auto& expert : experts) expert = static_cast<std::int64_t>(random() % n * (random() % n) / n);
  for (auto& domain : domains) domain = static_cast<std::int64_t>(random() % 4);
  std::vector<float> probabilities(of_tokens(n)), losses(kTokens);
  for (auto& p : probabilities) p = static_cast<float>(1 + random() % 100);
  for (auto& loss : losses) loss = static_cast<float>(1 + random() % 100) / 64;
  std::vector<double> values(n);
  for (auto& value : values) value = static_cast<double>(1 + random() % 100) * 1e-3;
  RoutingStats stats(shape);
  stats.add({.experts = experts, .probabilities = probabilities, .domain_ids = domains, .dropped = 0});
  stats.add_grad_norms(values);
  stats.add_latencies(values);
  stats.add_token_losses({.experts = experts, .losses = losses, .domain_ids = domains});
  return stats;
}

void print(const char* name, double value) {
  std::printf(" %s %a", name, value);
}

void run(int experts, const std::string& policy) {
  StatsShape shape{experts,
                   2,
                   {.probabilities = true,
                    .gradients = true,
                    .losses = true,
                    .domain_losses = true,
                    .latencies = true,
                    .domains = 4}};
  Measurer measurer(shape, {});
  LayerMonitor monitor(shape, MonitorOptions{.trends = true});
  PolicyRig rig(policy, {.experts = experts});
  std::mt19937_64 random(static_cast<std::uint64_t>(experts));
  for (int step = 0; step < 40; ++step) {
    const RoutingStats stats = window(shape, random);
    Metrics metrics;
    measurer.measure(stats, metrics);
    monitor.observe(stats, metrics, 2.0);
    std::printf("%d experts, %s, step %d:", experts, policy.c_str(), step);
    for (const MetricField& field : metric_fields()) {
      if (const auto value = metrics.*field.value) print(std::string(field.name).c_str(), *value);
    }
    const auto counts = stats.counts();
    for (const double value : rig.step(stats_of(rig.shape(), {counts.begin(), counts.end()})))
      print("", value);
    std::printf("\n");
  }
}

}  // namespace
}  // namespace moectl::testing

int main() {
  for (const int experts : {3, 8, 13, 16, 23, 64}) {
    for (const char* policy : {"adaptive_bias", "proportional_bias", "sign_bias", "tanh_momentum_bias"}) {
      moectl::testing::run(experts, policy);
    }
  }
}
