#include "moectl/config.h"

#include <algorithm>
#include <cctype>

#include "base/names.h"
#include "base/printable.h"

namespace moectl {

ConfigError::ConfigError(const std::string& what) : std::invalid_argument(message_line(what)) {}

std::string_view name_of(Mode mode) {
  return Names<Mode, 3>{{"active", "shadow", "off"}}[mode];
}

std::string_view name_of(Fallback fallback) {
  return fallback == Fallback::kInitial ? "initial" : "hold";
}

std::string_view name_of(Scope scope) {
  return scope == Scope::kModel ? "model" : "layer";
}

ControllerConfig::ControllerConfig() {
  for (const Actuator which : kActuators) {
    ActuatorConfig& a = actuator(which);
    a.initial = neutral_value(which);
    a.limits = default_limits(which, a.initial);
  }
}

ActuatorConfig& ControllerConfig::actuator(Actuator which) {
  return which == Actuator::kExpertBias      ? expert_bias
         : which == Actuator::kAuxLossWeight ? aux_loss_weight
                                             : router_temperature;
}

MetricsOptions metrics_options(const ControllerConfig& config) {
  MetricsOptions options = config.metrics;
  options.targets = config.model.targets;
  return options;
}

const ActuatorConfig& ControllerConfig::actuator(Actuator which) const {
  return const_cast<ControllerConfig*>(this)->actuator(which);
}

namespace {

/// Insertions, deletions, substitutions and swaps of neighbours (optimal string alignment), case aside.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  const auto same = [](char x, char y) {
    return std::tolower(static_cast<unsigned char>(x)) == std::tolower(static_cast<unsigned char>(y));
  };
  std::vector<std::size_t> before(b.size() + 1), last(b.size() + 1), now(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) last[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    now[0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      now[j] = std::min({last[j] + 1, now[j - 1] + 1, last[j - 1] + (same(a[i - 1], b[j - 1]) ? 0 : 1)});
      if (i > 1 && j > 1 && same(a[i - 1], b[j - 2]) && same(a[i - 2], b[j - 1])) {
        now[j] = std::min(now[j], before[j - 2] + 1);
      }
    }
    before.swap(last);
    last.swap(now);
  }
  return last[b.size()];
}

/// True for what is left of `whole` when letters are dropped: "temp" of "router_temperature".
bool abbreviates(std::string_view part, std::string_view whole) {
  if (part.size() < 3) return false;
  for (const char c : whole) {
    if (!part.empty() && part.front() == c) part.remove_prefix(1);
  }
  return part.empty();
}

}  // namespace

std::string nearest_key(std::string_view key, const std::vector<std::string>& known) {
  key = key.substr(0, 64);
  std::string nearest;
  std::size_t least = 0;
  for (const std::string& candidate : known) {
    const std::size_t distance = edit_distance(key, candidate);
    const std::size_t allowed = std::max<std::size_t>(1, std::max(key.size(), candidate.size()) / 3);
    const bool near = distance < std::max(key.size(), candidate.size()) &&
                      (distance <= allowed || abbreviates(key, candidate));
    if (near && (nearest.empty() || distance < least)) {
      nearest = candidate;
      least = distance;
    }
  }
  return nearest;
}

}  // namespace moectl
