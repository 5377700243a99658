// What the field lists say of each key: for one config, and as docs/config.md.
#include "config/config_explain.h"

#include <algorithm>

#include "base/printable.h"
#include "control/config_fields.h"
#include "control/config_keys.h"

namespace moectl {
namespace {

struct Row {
  std::string path, value, default_value, range, unit, doc;
};

/// Every key of the config with its default: that of a config of the same sections, and of limits that of the same
/// actuator and initial value.
std::vector<Row> rows_of(const ControllerConfig& config, const PolicyRegistry& registry) {
  ControllerConfig defaults;
  for (const Actuator which : kActuators) {
    defaults.actuator(which).limits = default_limits(which, config.actuator(which).initial);
  }
  defaults.monitor.health.phases.resize(config.monitor.health.phases.size());
  defaults.monitor.health.alerts.resize(config.monitor.health.alerts.size());
  const std::vector<ConfigKey> keys = keys_of(config, true), default_keys = keys_of(defaults, true);
  std::vector<Row> rows;
  for (const ConfigKey& key : keys) {
    const FieldInfo& field = *key.field;
    Row row{key.path,  key.given ? key.value : "", "",
            key.range, std::string(field.unit),    std::string(field.doc)};
    const auto same = std::find_if(default_keys.begin(), default_keys.end(),
                                   [&](const ConfigKey& other) { return other.path == key.path; });
    if (same != default_keys.end()) row.default_value = same->value;
    for (const Actuator which : kActuators) {
      const std::string options = std::string(name_of(which)) + ".options.";
      if (key.path.rfind(options, 0) != 0) continue;
      for (const OptionSpec& spec : registry.find(config.actuator(which).policy)->options) {
        if (options + spec.name != key.path) continue;
        row = {key.path, key.value, default_of(spec), range_of(spec), spec.unit, spec.description};
      }
    }
    if (field.presence == Presence::kRequired) row.default_value = "required";
    if (row.default_value.empty() || row.default_value == "[]" ||
        field.presence == Presence::kMinusOneIsAbsent)
      row.default_value = field.presence == Presence::kRequired ? "required" : "none";
    rows.push_back(std::move(row));
  }
  return rows;
}

const char* const kHead = R"(# Every key of a config

<!-- Made by `moectl check --reference`: do not edit. A test compares this file with what the tool writes. -->

A config is one YAML file, read strictly: unknown keys, wrong types and values outside their range are errors that name
the place. `version: 1` and `model` are required; every other key has a default. `moectl check CONFIG --explain` shows the
same for one config, with its values.

The last column says who must agree on a key. **state**: a saved state can only be loaded by a run with the same value
(**state, if given**: the key must be given in both or in neither). **ranks**: all ranks of a run must have the same value.
What a state needs the same, ranks need the same, too. **-**: the key changes no decision.

To add a key: add the member to its struct in `include/moectl/`, and one line to the list of that struct in
`src/control/config_fields.h`, `src/watch/watch_fields.h` or `src/measure/measure_fields.h`. Reading, writing, range
check, comparison of states and ranks, `--explain` and the tests of all that follow from the line. Then write this page anew:
`build/core/moectl check --reference > docs/config.md`. The option of a policy is one line in the list of the policy.
)";

std::string shared_words(Shared shared) {
  constexpr const char* kWords[] = {"-", "ranks", "state, if given", "state"};
  return kWords[static_cast<std::size_t>(shared)];
}

// In a table of Markdown.
std::string cell(std::string text) {
  for (std::size_t at = 0; (at = text.find('|', at)) != std::string::npos; at += 2) text.insert(at, 1, '\\');
  return text;
}

std::string line_of(const Row& row, const std::string& shared) {
  return "| `" + row.path + "` | " + cell(row.default_value) + " | " + cell(row.range) + " | " + row.unit +
         " | " + cell(row.doc) + (shared.empty() ? "" : " | " + shared) + " |\n";
}

}  // namespace

std::string default_of(const OptionSpec& spec) {
  const std::string text = shown(spec.default_value);
  return text.empty() ? "required" : text;
}

std::string range_of(const OptionSpec& spec) {
  if (std::holds_alternative<bool>(spec.default_value)) return "true, false";
  if (std::holds_alternative<std::string>(spec.default_value))
    return spec.choices.empty() ? "any word" : listed(spec.choices);
  return words_of({.low = spec.min, .high = spec.max});
}

std::string explain(const ControllerConfig& config, const PolicyRegistry& registry) {
  std::string text;
  for (const Row& row : rows_of(config, registry)) {
    text += row.path + ": " + (row.value.empty() ? "(not given)" : printable(row.value)) + "   # " +
            (row.default_value == "required" ? "" : "default ") + row.default_value + "; " + row.range +
            (row.unit.empty() ? "" : "; " + row.unit) + "\n    " + row.doc + '\n';
  }
  return text;
}

// What a section of the reference is: "layers[]" is of the list `layers`.
std::string doc_of_section(std::string section) {
  if (section.ends_with("[]")) section.resize(section.size() - 2);
  std::string doc;
  const ControllerConfig config;
  for_each_field(config, [&](const FieldInfo& field, const auto&) {
    if (field.key == section) doc = field.doc;
  });
  return doc;
}

std::string config_reference(const PolicyRegistry& registry) {
  std::string text = kHead;
  const std::vector<Row> rows = rows_of({}, registry);
  const std::vector<ConfigKey> keys = keys_of({}, true);
  const auto table = [](bool shared) {
    return std::string("\n| key | default | range | unit | meaning |") + (shared ? " who agrees |" : "") +
           "\n|---|---|---|---|---|" + (shared ? "---|\n" : "\n");
  };
  text += "\n## Top level\n" + table(true) + "| `version` | required | 1 |  | Version of the format. | - |\n";
  std::string section;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    Row row = rows[i];
    const std::size_t dot = row.path.find('.');
    const std::string at = dot == std::string::npos ? "" : row.path.substr(0, dot);
    // One table for the three actuators, whose keys are the same.
    if (at == name_of(Actuator::kAuxLossWeight) || at == name_of(Actuator::kRouterTemperature)) continue;
    if (at != section) {
      std::string doc = doc_of_section(at);
      if (at == "expert_bias")
        doc += ' ' + doc_of_section("aux_loss_weight") + ' ' + doc_of_section("router_temperature");
      text += "\n## " + (at == "expert_bias" ? "expert_bias, aux_loss_weight, router_temperature" : at) +
              '\n' + (doc.empty() ? "" : '\n' + doc + '\n') + table(true);
    }
    section = at;
    if (!at.empty()) row.path.erase(0, dot + 1);
    if (at == "expert_bias") {
      std::vector<std::string> defaults;
      for (const Actuator which : kActuators) {
        const std::string path = std::string(name_of(which)) + '.' + row.path;
        for (const Row& other : rows) {
          if (other.path == path) defaults.push_back(other.default_value);
        }
      }
      if (std::count(defaults.begin(), defaults.end(), defaults[0]) < 3) row.default_value = listed(defaults);
    }
    text += line_of(row, shared_words(keys[i].field->shared));
  }
  text +=
      "\n# Options of the policies\n\nIn `options` of an actuator; every option is of the kind **state**.\n";
  for (const PolicyDescription* policy : registry.all()) {
    if (policy->options.empty()) continue;
    text += "\n## " + policy->name + "\n\n" + policy->summary + '\n' + table(false);
    for (const OptionSpec& spec : policy->options) {
      text += line_of({spec.name, "", default_of(spec), range_of(spec), spec.unit, spec.description}, "");
    }
  }
  return text;
}

}  // namespace moectl
