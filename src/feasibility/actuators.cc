#include "feasibility/actuators.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/format.h"
#include "feasibility/load_extents.h"
#include "moectl/metrics.h"

namespace moectl {
namespace {

constexpr double kOpen = std::numeric_limits<double>::infinity();
constexpr double kSlack = 1e-9;

}  // namespace

std::string text_of(const Extent& bounds) {
  return std::isinf(bounds.max) ? "at least " + brief(bounds.min)
                                : "from " + brief(bounds.min) + " to " + brief(bounds.max);
}

bool is_load_metric(std::string_view metric) {
  const MetricField* const field = find_metric(metric);
  return field && field->of_load;
}

std::optional<Extent> bounds_of(std::string_view metric, const LoadSpace& space) {
  const double n = space.experts, k = space.top_k;
  const auto is = [&](auto... names) { return ((metric == names) || ...); };
  const LoadTargets targets(space.experts, space.targets);
  if (is("load_cv", "excess_cv")) {
    return targets.equal() ? whole(kCv, room_of(space)) : whole_relative(kRelativeCv, space, targets);
  }
  if (is("max_vio", "max_vio_global", "max_to_mean")) {
    const Extent relative = targets.equal() ? Extent{0, n / k - 1} : whole_relative(kMaxVio, space, targets);
    const double one = metric == "max_to_mean" ? 1 : 0;
    return Extent{relative.min + one, relative.max + one};
  }
  if (is("load_std")) return Extent{0, 100 * whole(kCv, room_of(space)).max / n};
  if (is("max_load")) return Extent{1 / n, 1 / k};
  if (is("min_load")) return Extent{0, 1 / n};
  if (is("load_p5", "load_p25", "load_p50", "load_p75", "load_p95"))
    return Extent{0, targets.equal() ? n / k : kOpen};
  if (is("sequence_cv")) return Extent{0, std::sqrt(n / k - 1)};
  if (is("gini")) return whole(kGini, room_of(space));
  if (is("entropy")) return Extent{std::log(k), std::log(n)};
  if (is("entropy_normalized") && n > 1) return Extent{std::log(k) / std::log(n), 1};
  if (is("effective_experts")) return Extent{k, n};
  if (is("kl_to_uniform")) return Extent{0, std::log(n / k)};
  if (is("inactive_experts", "dead_experts")) return Extent{0, n - k};
  if (is("inactive_fraction")) return Extent{0, 1 - k / n};
  if (is("hot_experts", "cold_experts", "stagnant_experts")) return Extent{0, n};
  if (is("straggler_slowdown")) return Extent{1, n};
  if (is("balancedness")) return Extent{1 / n, 1};
  if (is("router_condition")) return Extent{1, kOpen};
  if (is("token_entropy", "router_entropy", "expert_token_information", "domain_information"))
    return Extent{0, std::log(n)};
  if (is("importance_cv")) return Extent{0, std::sqrt(n - 1)};
  if (is("fsi")) return Extent{0, 2 * std::acos(std::sqrt(k / n))};
  if (is("router_fsi", "fsi_max")) return Extent{0, 2 * std::acos(1 / std::sqrt(n))};
  if (is("drop_rate", "predicted_drop_rate", "fhs_alarm", "path_efficiency", "domain_exclusivity",
         "oscillation", "swing", "minority_share", "router_similarity", "churn"))
    return Extent{0, 1};
  if (is("load_autocorrelation", "tail_correlation")) return Extent{-1, 1};
  if (is("utilization_variance", "noise_floor_cv", "noise_floor_max_vio", "sampling_floor_cv",
         "sampling_floor_max_vio", "routing_variance", "fhs", "router_fhs", "grad_norm_variance",
         "latency_p50", "latency_p95", "latency_p99", "shift", "pair_lift", "balance_loss", "z_loss",
         "expert_output_norm", "gradient_ratio"))
    return Extent{0, kOpen};
  return std::nullopt;
}

std::optional<Conflict> judge_bounds(const Target& target, const LoadSpace& space) {
  const auto bounds = bounds_of(target.metric, space);
  if (!bounds) return std::nullopt;
  const std::string at = " at N = " + std::to_string(space.experts) + ", k = " + std::to_string(space.top_k);
  const std::string what = target.metric + " = " + brief(target.value);
  if (target.value < bounds->min - kSlack || target.value > bounds->max + kSlack) {
    return Conflict{{target.metric},
                    what + " cannot be: " + target.metric + " is " + text_of(*bounds) + at,
                    target.metric + ": " + brief(std::clamp(target.value, bounds->min, bounds->max))};
  }
  // The root of a mean square: at 0 nothing would be left of what control can remove.
  if (target.metric == "excess_cv" && target.value <= 0) {
    const auto floor = noise_floor_cv(space.experts, space.top_k, static_cast<double>(space.tokens));
    return Conflict{{target.metric},
                    what +
                        " cannot be held: at 0 the load is as even as chance allows, and a weight that only "
                        "grows ever comes closer" +
                        at,
                    target.metric + ": " + brief(std::max(0.05, floor.value_or(0)))};
  }
  return std::nullopt;
}

ActuatorJudgement judge_actuators(const ControllerConfig& config) {
  ActuatorJudgement found;
  std::vector<Target> targets = targets_of(config);
  for (const Actuator which : kActuators) {
    // Its set-point is a share of ln N, and no other policy has one without naming the metric.
    if (config.actuator(which).policy == "entropy_temperature")
      targets.push_back({which, "token_entropy", 0, 0});
  }
  const std::string& bias = config.expert_bias.policy;
  for (const Target& target : targets) {
    const std::string name(name_of(target.actuator));
    if (bias != "fixed" && is_load_metric(target.metric)) {
      found.conflicts.push_back(
          {{target.metric},
           "expert_bias (" + bias + ") and " + name + " (" + config.actuator(target.actuator).policy +
               " on " + target.metric +
               ") steer the same variable, the load: the biases bring it to its floor whatever the "
               "set-point is, and " +
               name + " drifts to a limit. With biases, give " + name +
               " policy fixed or schedule, or a metric that biases do not move (importance_cv, "
               "token_entropy); "
               "or leave the load to " +
               name + " and set expert_bias.policy to fixed",
           ""});
    }
  }
  for (std::size_t i = 0; i < targets.size(); ++i) {
    for (std::size_t j = i + 1; j < targets.size(); ++j) {
      const Target &a = targets[i], &b = targets[j];
      const bool same = a.metric == b.metric || (is_load_metric(a.metric) && is_load_metric(b.metric));
      if (!same || a.actuator == b.actuator) continue;
      std::vector<std::string> metrics = {a.metric};
      if (a.metric != b.metric) metrics.push_back(b.metric);
      found.conflicts.push_back(
          {metrics,
           std::string(name_of(a.actuator)) + " (on " + a.metric + ") and " +
               std::string(name_of(b.actuator)) + " (on " + b.metric +
               ") steer the same variable: each moves on for what the other does. Keep one of "
               "them, and set the other's policy to fixed",
           ""});
    }
  }
  const ActuatorConfig& aux = config.aux_loss_weight;
  if (config.guard.enabled && config.guard.aux_factor > 1 && aux.policy == "fixed" && aux.initial == 0) {
    found.notes.push_back(
        "guard: it cannot raise aux_loss_weight, which is 0: guard.aux_factor times 0 is "
        "0. The biases and the temperature act alone. If the router has an auxiliary loss, give "
        "aux_loss_weight.initial its weight; if it has none, set guard.aux_factor to 1");
  }
  if (config.safety.responsiveness && aux.policy != "fixed") {
    found.notes.push_back(
        "safety.responsiveness: whether the load answers aux_loss_weight is not judged: it acts through the "
        "learning, over tens to hundreds of steps");
  }
  return found;
}

const std::vector<std::string>& actuator_recipe() {
  static const std::vector<std::string> kRecipe = {
      "the load (excess_cv, load_cv, max_vio, entropy, drops, ...): one of expert_bias, aux_loss_weight, "
      "router_temperature",
      "the router's own balance (importance_cv, router_entropy), which biases do not move: aux_loss_weight "
      "(pi), also "
      "beside a bias policy",
      "how undecided tokens are (token_entropy): router_temperature (entropy_temperature, or pi)",
      "nothing: fixed and schedule go beside every policy"};
  return kRecipe;
}

}  // namespace moectl
