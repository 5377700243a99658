#include "cli/advice.h"

#include <algorithm>
#include <cmath>

#include "cli/tool.h"

namespace moectl::cli {
namespace {

constexpr std::size_t kLast = 100;   // records by which the end of a run is judged
constexpr double kOften = 0.05;      // share of the decisions from which a cause is named
constexpr double kAtRange = 0.2;     // share that sits on the range
constexpr double kMostlyRate = 0.5;  // share that the rate shortens
constexpr double kOffTarget = 0.1;   // relative distance of a metric from its set-point
// A weight that rose threefold should have brought the metric a tenth below the highest mean that it had before.
constexpr double kRose = 3, kFell = 0.9;
constexpr std::size_t kFew = 20;  // records of a mean, at least

struct Cause {
  const char* reason;
  const char* says;  // after "ACTUATOR (POLICY) "
};
// Before all advice on limits: where one of these holds, limits are not the cause. The first that holds is said.
const std::vector<Cause> kCauses = {
    {"unresponsive", nullptr},
    {"missing_input",
     "was held for lack of an input: give the missing tensor when recording (entropy_temperature needs the "
     "router's "
     "probabilities, quantile_bias its scores, a step in units of the gap the largest k + 1 scores)"},
    {"policy_failed",
     "was held because its policy threw an exception: mend the policy; the notice has its message"},
    {"fallback",
     "fell back after too many invalid records: find the host's call that records them; the log names the "
     "field and the "
     "value"},
    {"invalid",
     "was held for invalid records: find the host's call that records them; the log names the field and the "
     "value"},
    {"no_data",
     "was often held for lack of data: look whether every step records tokens before it calls step()"},
    {"host_hold", "was held by the host: release it with hold(false) when the measuring is done"},
    {"frozen", "was frozen by the host: unfreeze the layer for control to act"},
    {"shadow", "decided and applied nothing: set mode: active when the decisions look right"},
    {"rollback",
     "was rolled back because the loss or the drop rate jumped after its moves: lower limits.rate"},
    {"oscillation",
     "kept reversing its moves: lower its gain, and declare model.delay if routing is recorded late"},
    {"reach",
     "reached as far as the scores can justify: wider limits would change nothing; look at what holds the "
     "load (few kinds of tokens, masked experts, biases of the router's own: hand them over with adopt())"},
    {"guard",
     "was taken over by the guard: its policy alone does not keep the balance; a faster one, such as "
     "adaptive_bias, would"}};

std::string what_to_look_at(const std::string& actuator) {
  if (actuator == "expert_bias") {
    return "look whether the router adds the bias of this layer, with its sign, before it selects, whether "
           "the engine "
           "that routes gets it, and whether routes are replayed";
  }
  if (actuator == "aux_loss_weight") {
    return "look whether the auxiliary loss is multiplied by the weight in force and added to the loss that "
           "is trained";
  }
  return "look whether the router divides its logits by the temperature in force";
}

constexpr const char* kSetPoints[] = {"aux_loss_weight", "router_temperature"};

/// An option of an actuator's policy; null if there is none.
const nlohmann::json* option_of(const nlohmann::json& config, const std::string& actuator, const char* name) {
  const auto section = config.find(actuator);
  if (section == config.end() || !section->contains("options")) return nullptr;
  const nlohmann::json& options = section->at("options");
  const auto option = options.find(name);
  return option == options.end() ? nullptr : &*option;
}

/// The metric that an actuator holds at a set-point; empty if there is none.
std::string metric_of(const nlohmann::json& config, const std::string& actuator) {
  const nlohmann::json* metric = option_of(config, actuator, "metric");
  return metric ? metric->get<std::string>() : "";
}

}  // namespace

void Advice::take_config(nlohmann::json config) {
  for (const char* name : kSetPoints) {
    if (metric_of(config, name) != metric_of(config_, name)) set_points_.erase(name);
  }
  config_ = std::move(config);
}

std::string Advice::policy_of(const std::string& actuator) const {
  const auto it = config_.find(actuator);
  return it != config_.end() ? it->value("policy", "fixed") : "fixed";
}

void Advice::add(const LogRecord& record, const Metrics& metrics) {
  for (const auto& [name, logged] : record.actuators) {
    const auto& reasons = logged.reasons;
    if (std::find(reasons.begin(), reasons.end(), "cadence") != reasons.end()) continue;
    Actuator& actuator = actuators_[name];
    ++actuator.decisions;
    for (const std::string& reason : reasons) ++actuator.reasons[reason];
    actuator.clipped.push_back(std::find(reasons.begin(), reasons.end(), "range") != reasons.end());
    if (actuator.clipped.size() > kLast) actuator.clipped.pop_front();
    if (logged.max) actuator.applied = *logged.max;
    for (const double value : logged.applied) {
      actuator.applied = &value == &logged.applied.front() ? value : std::max(actuator.applied, value);
    }
    if (actuator.first == 0) actuator.first = actuator.applied;
  }
  if (record.layer < 0) return;
  for (const char* name : kSetPoints) {
    const std::string metric = metric_of(config_, name);
    const MetricField* field = find_metric(metric);
    if (field == nullptr) continue;
    const auto value = metric == "excess_cv" ? signed_excess_cv_sq(metrics) : metrics.*field->value;
    if (!value) continue;
    SetPoint& known = set_points_[name];
    const auto weight = static_cast<double>(std::max<std::int64_t>(record.tokens, 1));
    known.last.emplace_back(*value, weight);
    known.sum += *value * weight;
    known.weights += weight;
    if (known.last.size() > kLast) {
      const auto& [old, old_weight] = known.last.front();
      known.sum -= old * old_weight;
      known.weights -= old_weight;
      known.last.pop_front();
    }
    known.mean = known.sum / known.weights;
    if (known.last.size() >= kFew) known.highest = std::max(known.highest.value_or(known.mean), known.mean);
  }
}

// The actuator is at its limit, and the metric stays away from its set-point.
std::optional<std::string> Advice::out_of_reach(const std::string& name, const Actuator& actuator) const {
  const auto known = set_points_.find(name);
  const nlohmann::json* const given = option_of(config_, name, "target");
  if (known == set_points_.end() || !given) return std::nullopt;
  const std::string metric = metric_of(config_, name);
  const double target = given->get<double>();
  const auto shown = [&](double x) {
    return metric == "excess_cv" ? std::copysign(std::sqrt(std::abs(x)), x) : x;
  };
  const SetPoint& seen = known->second;
  const double mean = shown(seen.mean), highest = shown(seen.highest.value_or(seen.mean));
  if (std::abs(mean - target) <= kOffTarget * std::max(std::abs(target), 1e-12)) return std::nullopt;
  const std::string reach = "the target of " + brief(target) +
                            " lies out of reach; choose one by docs/targets.md, or widen limits.min/max";
  if (name == "aux_loss_weight" && actuator.first > 0 && actuator.applied > kRose * actuator.first &&
      mean > target && mean > kFell * highest) {
    return "rose from " + brief(actuator.first) + " to its limit (" + brief(actuator.applied) + ") and " +
           metric + " did not fall (" + brief(mean) + ", at most " + brief(highest) +
           " before): " + what_to_look_at(name) + ". If it is, " + reach;
  }
  return "is at its limit (" + brief(actuator.applied) + ") and " + metric + " stays at " + brief(mean) +
         ": " + reach;
}

void Advice::say_actuator(const std::string& name, const Actuator& actuator, bool imbalanced,
                          std::vector<std::string>& says) const {
  const auto share = [&](const std::string& reason) {
    const auto it = actuator.reasons.find(reason);
    return it == actuator.reasons.end()
               ? 0.0
               : static_cast<double>(it->second) / static_cast<double>(actuator.decisions);
  };
  const std::string who = name + " (" + policy_of(name) + ") ";
  for (const Cause& cause : kCauses) {
    if (share(cause.reason) <= kOften) continue;
    says.push_back(who + (cause.says ? std::string(cause.says)
                                     : "moved and the load did not answer: " + what_to_look_at(name)));
    return;
  }
  if (policy_of(name) == "fixed") return;
  const auto clipped = std::count(actuator.clipped.begin(), actuator.clipped.end(), true);
  if (static_cast<double>(clipped) > kAtRange * static_cast<double>(actuator.clipped.size())) {
    if (const auto reach = out_of_reach(name, actuator)) {
      says.push_back(who + *reach);
      return;
    }
  }
  if (share("range") > kAtRange) says.push_back(who + "sat on its range for long: widen limits.min/max");
  if (share("rate") > kMostlyRate && imbalanced)
    says.push_back(who + "was held back by limits.rate most of the time: raise it");
}

void Advice::say_dead(double dead, std::vector<std::string>& says) const {
  const bool one = dead < 1.5;
  const std::string who = one ? "one expert" : "about " + brief(std::round(dead)) + " experts",
                    them = one ? "it" : "them", policy = policy_of("expert_bias");
  if (policy == "fixed") {
    says.push_back(who + (one ? " is" : " are") + " dead: a bias policy brings " + them + " back");
    return;
  }
  // A cause that was named for the biases explains the dead ones too.
  for (const std::string& sentence : says)
    if (sentence.starts_with("expert_bias ")) return;
  says.push_back(who + (one ? " stays" : " stay") + " dead though " + policy + " raises " +
                 (one ? "its bias" : "their biases") + ": look whether the router masks " + them +
                 "; if it does not, a larger step or gain brings " + them +
                 " back, or adaptive_bias with rescue: true");
}

std::vector<std::string> Advice::sentences(const nlohmann::json& now, double dead) const {
  std::vector<std::string> says;
  const bool imbalanced = now["known"].get<bool>() && !now["balanced"].get<bool>();
  bool controlled = false;
  for (const auto& [name, actuator] : actuators_) {
    controlled = controlled || policy_of(name) != "fixed";
    say_actuator(name, actuator, imbalanced, says);
  }
  if (imbalanced && !controlled)
    says.emplace_back("no policy controls this run: try policies/adaptive_bias.yaml");
  if (imbalanced && controlled && says.empty()) {
    const nlohmann::json& worst = now["worst"];  // null: more than a double holds
    says.push_back("layer " + now["worst_layer"].dump() + " stands at " +
                   (worst.is_null() ? "more than 1e308" : brief(worst.get<double>())) + " x its " +
                   now["floor"].get<std::string>() +
                   " though nothing holds the controller: let the run go on if MaxVio still falls; "
                   "if it does not, take a larger step or gain, or another policy "
                   "(moectl simulate CONFIG --set compares them)");
  }
  if (dead > 0.5) say_dead(dead, says);
  if (now["floor"] == "noise floor")
    says.emplace_back("only the noise floor is known: collect sequences for the sampling floor of real text");
  if (says.empty()) says.emplace_back("nothing to change");
  return says;
}

}  // namespace moectl::cli
