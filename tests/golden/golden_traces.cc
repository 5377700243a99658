// golden_traces DIR [--record]: what every policy proposes on one made-up run, against the trace recorded in DIR.
//
// A change of a policy's behaviour shows here first, number by number. If it is meant, record anew and let the
// difference be read: golden_traces tests/golden --record. Windows come from whole numbers alone, and numbers are
// compared within 1e-9, because the C library's exponentials may differ in the last bit.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "policies/policy_rig.h"

namespace moectl::testing {
namespace {

constexpr int kExperts = 8, kTopK = 2, kSteps = 60, kDomains = 2;
constexpr double kTolerance = 1e-9;

struct Case {
  std::string name, policy;
  RigOptions rig;
  bool collapses = false;  // from step 30 on two experts take nearly all
};

// Every policy on every actuator with its defaults, and the variants that run other code.
std::vector<Case> all_cases() {
  std::vector<Case> cases;
  const auto add = [&cases](const std::string& name, const std::string& policy, Actuator actuator,
                            std::map<std::string, OptionValue> options = {}, int delay = 0, int domains = 0) {
    cases.push_back({name, policy,
                     RigOptions{.actuator = actuator,
                                .experts = kExperts,
                                .top_k = kTopK,
                                .delay = delay,
                                .domains = domains,
                                .options = std::move(options)}});
  };
  for (const PolicyDescription* policy : PolicyRegistry::builtin().all()) {
    for (const Actuator actuator : policy->actuators) {
      add(policy->name + "." + std::string(name_of(actuator)), policy->name, actuator);
    }
  }
  const Actuator bias = Actuator::kExpertBias, weight = Actuator::kAuxLossWeight;
  add("adaptive_bias.counts", "adaptive_bias", bias, {{"form", std::string("counts")}});
  add("adaptive_bias.delay", "adaptive_bias", bias, {}, 3);
  add("adaptive_bias.rescue", "adaptive_bias", bias, {{"rescue", true}});
  add("adaptive_bias.feedforward", "adaptive_bias", bias, {{"feedforward", std::string("tags")}}, 0,
      kDomains);
  add("proportional_bias.rms", "proportional_bias", bias, {{"normalise", std::string("rms")}});
  add("quantile_bias.delay", "quantile_bias", bias, {{"gain", 1.0}}, 2);
  add("quantile_bias.local_mean", "quantile_bias", bias, {{"form", std::string("local_mean")}});
  add("quantile_bias.k3", "quantile_bias", bias, {{"form", std::string("k3")}, {"gain", 1.0}});
  add("sign_bias.uncentred", "sign_bias", bias, {{"zero_mean_move", false}});
  // What rests with its defaults on a run like this one.
  add("schedule.path", "schedule", weight,
      {{"peak", 0.05},
       {"warmup", std::int64_t{10}},
       {"final", 0.0005},
       {"decay_start", std::int64_t{20}},
       {"decay_steps", std::int64_t{30}}});
  add("schedule.exponential", "schedule", Actuator::kRouterTemperature,
      {{"final", 0.5}, {"decay_steps", std::int64_t{50}}, {"shape", std::string("exponential")}});
  for (const Actuator actuator : {weight, Actuator::kRouterTemperature}) {
    add("rules.collapse." + std::string(name_of(actuator)), "rules", actuator, {{"wait", std::int64_t{8}}});
    cases.back().collapses = true;
  }
  return cases;
}

// Domains of the next batch: they go up and down against each other, and one is absent at times.
std::vector<std::int64_t> mixture_after(int step) {
  const std::int64_t first = 128 * (step * 5 % 9);
  return {first, 1024 - first};
}

// Window `step` of the run: loads that drift and jitter, an expert without a token from step 20 to 29, and all sums
// that a router can report.
RoutingStats window(const StatsShape& shape, int step, bool collapses, std::span<const double> bias) {
  std::uint64_t random = 88172645463325252ULL + static_cast<std::uint64_t>(step);
  std::vector<std::int64_t> counts;
  std::int64_t total = 0;
  for (int i = 0; i < kExperts; ++i) {
    for (int turn = 0; turn < 3; ++turn) random = random * 6364136223846793005ULL + 1442695040888963407ULL;
    const auto jitter = static_cast<std::int64_t>(random >> 58);
    const std::int64_t drift = (i * 16 + step * (i % 3)) % 160;
    counts.push_back(i == 5 && step >= 20 && step < 30 ? 0 : 64 + drift + jitter);
    if (collapses && step >= 30) counts.back() *= i < 2 ? 100 : 1;
    total += counts.back();
  }
  counts[0] += total % kTopK;
  RoutingStats stats = stats_of(shape, counts);
  if (shape.needs.gap) {
    stats.set_scalar(RoutingStats::kGapSum, stats.tokens() * to_fixed(0.03125 + 0.001 * (step % 7)));
    stats.set_scalar(RoutingStats::kGapTokens, stats.tokens());
  }
  if (shape.needs.domains == kDomains) {  // of expert i's tokens, i in kExperts are of the first
    stats.set_scalar(RoutingStats::kDomainTokens, stats.tokens());
    const auto of_domain = stats.mutable_array(RoutingStats::kDomainCounts);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      const auto of_first = counts[i] * static_cast<std::int64_t>(i) / kExperts;
      of_domain[i] = of_first;
      of_domain[counts.size() + i] = counts[i] - of_first;
    }
  }
  if (shape.needs.required_bins ||
      shape.needs.required_local) {  // a lower required bias for experts with more tokens
    std::ranges::fill(stats.mutable_array(RoutingStats::kRequiredBins), 0);
    std::vector<double> required(counts.size());
    stats.set_routed_under(bias);
    for (std::int64_t t = 0; t < stats.tokens(); ++t) {
      for (std::size_t i = 0; i < counts.size(); ++i) {
        random = random * 6364136223846793005ULL + 1442695040888963407ULL;
        const std::int64_t margin = static_cast<std::int64_t>(random >> 52) - 4 * counts[i];
        required[i] = static_cast<double>(margin) / 4096 + bias[i];
        if (!shape.needs.required_bins) continue;
        const std::size_t bin = required_bin(stats.required_range(), required[i]);
        stats.mutable_array(RoutingStats::kRequiredBins)[i * kRequiredWords + bin / 2] +=
            std::int64_t{1} << (bin % 2 == 0 ? 0 : 32);
      }
    }
    if (shape.needs.required_local) {
      for (std::size_t i = 0; i < counts.size(); ++i)
        stats.mutable_array(RoutingStats::kRequiredSum)[i] = to_fixed(required[i]);
      stats.set_scalar(RoutingStats::kRequiredRecords, 1);
    }
    stats.set_scalar(RoutingStats::kMarginTokens, stats.tokens());
  }
  if (shape.needs.probabilities) {
    stats.set_scalar(RoutingStats::kProbTokens, stats.tokens());
    stats.set_scalar(RoutingStats::kTokenEntropySum, stats.tokens() * to_fixed(1.5 - 0.01 * step));
    const auto sums = stats.mutable_array(RoutingStats::kProbSum);
    const auto roots = stats.mutable_array(RoutingStats::kSqrtProbSum);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      const double mean = static_cast<double>(counts[i]) / static_cast<double>(kTopK * stats.tokens());
      sums[i] = to_fixed(mean * static_cast<double>(stats.tokens()));
      roots[i] = to_fixed(0.9 * std::sqrt(mean) * static_cast<double>(stats.tokens()));
    }
  }
  return stats;
}

std::string trace_of(const Case& one) {
  PolicyRig rig(one.policy, one.rig);
  std::string out;
  for (int step = 0; step < kSteps; ++step) {
    const std::vector<std::int64_t> next = mixture_after(step);
    StepInfo info{.loss = 3 - 0.01 * step};
    if (one.rig.domains > 0) info.next_mixture = next;
    rig.step(window(rig.shape(), step, one.collapses, rig.value), info);
    for (const double value : rig.value) {
      char text[32];
      std::snprintf(text, sizeof text, "%.17g ", value);
      out += text;
    }
    out.back() = '\n';
  }
  return out;
}

// The first number that differs, in words; empty if none does.
std::string difference(const std::string& recorded, const std::string& now) {
  std::istringstream a(recorded), b(now);
  std::string line_a, line_b;
  for (int step = 0; std::getline(b, line_b); ++step) {
    if (!std::getline(a, line_a)) return "the recorded trace ends at step " + std::to_string(step);
    std::istringstream row_a(line_a), row_b(line_b);
    double x = 0, y = 0;
    while (row_b >> y) {
      if (!(row_a >> x) || !(std::abs(x - y) <= kTolerance * std::max({std::abs(x), std::abs(y), 1e-6}))) {
        return "step " + std::to_string(step) + ":\n  recorded " + line_a + "\n  now      " + line_b;
      }
    }
  }
  return std::getline(a, line_a) ? "the recorded trace is longer" : "";
}

int main_of(int argc, char** argv) {
  const bool record = argc == 3 && std::string(argv[2]) == "--record";
  if (argc != 2 && !record) {
    std::fprintf(stderr, "usage: golden_traces DIR [--record]\n");
    return 2;
  }
  int wrong = 0;
  for (const Case& one : all_cases()) {
    const std::filesystem::path path = std::filesystem::path(argv[1]) / (one.name + ".txt");
    const std::string now = trace_of(one);
    if (record) {
      std::ofstream(path) << now;
      continue;
    }
    std::ifstream in(path);
    if (!in) {
      std::printf("%s: not recorded\n", one.name.c_str());
      ++wrong;
      continue;
    }
    const std::string recorded{std::istreambuf_iterator<char>(in), {}};
    if (const std::string found = difference(recorded, now); !found.empty()) {
      std::printf("%s: %s\n", one.name.c_str(), found.c_str());
      ++wrong;
    }
  }
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace moectl::testing

int main(int argc, char** argv) {
  return moectl::testing::main_of(argc, argv);
}
