#include "log/log_record.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>

#include "base/input_limits.h"
#include "base/printable.h"
#include "base/whole_file.h"
#include "log/line_reader.h"

namespace moectl {
namespace {

void read_values(const LineReader& line, const std::string& field, JsonValue entry, const char* key,
                 std::vector<double>& out) {
  const auto it = entry.find(key);
  if (!it || it->is_null()) return;
  if (!it->is_array()) line.reject(field + '.' + key, *it, "must be an array");
  out.reserve(it->size());
  for (const JsonValue value : it->elements()) {
    if (value.is_number()) {
      out.push_back(value.as_double());
    } else {
      const std::size_t i = out.size();
      out.push_back(value.is_null() ? std::nan("") : line.real(LineReader::at(field + '.' + key, i), value));
    }
  }
}

void read_extent(const LineReader& line, const std::string& field, JsonValue entry,
                 LoggedActuator& actuator) {
  if (!actuator.applied.empty()) {
    const auto [min, max] = std::minmax_element(actuator.applied.begin(), actuator.applied.end());
    actuator.min = *min;
    actuator.max = *max;
    return;
  }
  for (const auto& [key, out] : {std::pair{"min", &actuator.min}, std::pair{"max", &actuator.max}}) {
    const auto value = entry.find(key);
    if (value && !value->is_null()) *out = line.real(field + '.' + key, *value);
  }
}

void read_words(const LineReader& line, const std::string& field, JsonValue list,
                std::vector<std::string>& out) {
  if (!list.is_array()) line.reject(field, list, "must be an array");
  for (const JsonValue word : list.elements())
    out.push_back(line.text(LineReader::at(field, out.size()), word));
}

void read_notices(const LineReader& line, JsonValue notices, LogRecord& record) {
  if (!notices.is_array()) line.reject("notices", notices, "must be an array");
  for (const JsonValue notice : notices.elements()) {
    const std::string field = LineReader::at("notices", record.notices.size());
    if (!notice.is_object()) line.reject(field, notice, "must be an object");
    const auto part = [&](const char* name) {
      const auto value = notice.find(name);
      if (!value) line.fail(field + '.' + name, "missing", "required");
      return *value;
    };
    record.notices.push_back({.kind = line.text(field + ".kind", part("kind")),
                              .text = line.text(field + ".text", part("text")),
                              .step = line.integer(field + ".step", part("step"))});
  }
}

void read_responsiveness(const LineReader& line, const std::string& field, JsonValue found,
                         Responsiveness& out) {
  if (!found.is_object()) line.reject(field, found, "must be an object");
  const auto state = found.find("state");
  if (!state) line.fail(field + ".state", "missing", "required");
  // A state of a later version cannot be judged.
  out.state = response_of(line.text(field + ".state", *state)).value_or(Response::kNotApplicable);
  for (const auto& [key, value] : {std::pair{"gain", &out.gain}, std::pair{"error", &out.error}}) {
    if (const auto number = found.find(key)) *value = line.real(field + '.' + key, *number);
  }
  if (const auto late = found.find("late")) {
    out.late = static_cast<int>(std::min<std::int64_t>(line.integer(field + ".late", *late), 1000));
  }
  if (const auto slope = found.find("slope")) out.scaled = line.text(field + ".slope", *slope) == "measured";
}

bool is_actuator(std::string_view name) {
  return std::ranges::any_of(kActuators, [&](Actuator which) { return name == name_of(which); });
}

void read_decisions(const LineReader& line, LogRecord& record) {
  if (const auto metrics = line.find("metrics")) {
    if (!metrics->is_object()) line.reject("metrics", *metrics, "must be an object");
    for (const auto member : metrics->members()) {
      const JsonValue value = member.value;
      if (value.is_null() || value.is_array()) continue;
      const std::string name(member.key);
      record.metrics.emplace(name,
                             value.is_number() ? value.as_double() : line.real("metrics." + name, value));
    }
  }
  if (const auto health = line.find("health")) record.health = line.text("health", *health);
  if (const auto alerts = line.find("alerts")) read_words(line, "alerts", *alerts, record.alerts);
  if (const auto found = line.find("responsiveness"))
    read_responsiveness(line, "responsiveness", *found, record.responsiveness);
  if (const auto notices = line.find("notices")) read_notices(line, *notices, record);
  if (const auto actuators = line.find("actuators")) {
    if (!actuators->is_object()) line.reject("actuators", *actuators, "must be an object");
    for (const auto member : actuators->members()) {
      const JsonValue entry = member.value;
      const std::string name(member.key);
      if (!is_actuator(name)) continue;  // like any field that is not known
      const std::string field = "actuators." + name;
      if (!entry.is_object()) line.reject(field, entry, "must be an object");
      LoggedActuator& actuator = record.actuators[name];
      read_values(line, field, entry, "proposed", actuator.proposed);
      read_values(line, field, entry, "applied", actuator.applied);
      read_values(line, field, entry, "deployed", actuator.deployed);
      read_extent(line, field, entry, actuator);
      if (const auto reasons = entry.find("reasons")) {
        read_words(line, field + ".reasons", *reasons, actuator.reasons);
      }
      if (const auto found = entry.find("responsiveness"))
        read_responsiveness(line, field + ".responsiveness", *found, actuator.responsiveness);
    }
  }
}

// Null if they are equal.
std::shared_ptr<const LoadTargets> read_targets(const LineReader& line, const std::string& field,
                                                JsonValue targets, std::optional<int> experts) {
  if (!targets.is_array()) line.reject(field, targets, "must be an array");
  std::vector<double> shares;
  for (const JsonValue share : targets.elements())
    shares.push_back(line.real(LineReader::at(field, shares.size()), share));
  if (shares.empty()) return nullptr;
  try {
    LoadTargets read(experts.value_or(static_cast<int>(shares.size())), shares);
    return read.equal() ? nullptr : std::make_shared<const LoadTargets>(std::move(read));
  } catch (const std::invalid_argument& e) {
    line.reject(field, targets, e.what());
  }
}

/// Groups of layers: those of a trace, or of a run's config. `name`: how messages name them.
void read_groups(const LineReader& line, std::optional<JsonValue> groups, const std::string& name,
                 LogHeader& header) {
  if (!groups) return;
  if (!groups->is_array()) line.reject(name, *groups, "must be an array of groups");
  const std::optional<int> experts = std::exchange(header.experts, std::nullopt);
  const std::optional<int> top_k = std::exchange(header.top_k, std::nullopt);
  std::set<int> met;
  std::int64_t layers = 0;
  std::size_t g = 0;
  for (const JsonValue value : groups->elements()) {
    const std::string group_name = LineReader::at(name, g++), path = group_name + '.';
    if (!value.is_object()) line.reject(group_name, value, "must be an object");
    LogGroup group{{}, experts, top_k, header.targets};
    const std::string ids_key = header.is_run ? "ids" : "layers";
    const auto ids = value.find(ids_key);
    if (!ids || !ids->is_array()) line.fail(path + ids_key, "missing", "required: an array of layer ids");
    if (ids->size() > static_cast<std::size_t>(kMostLayers - layers)) {
      line.fail(path + ids_key, std::to_string(ids->size()) + " values",
                "must be at most " + std::to_string(kMostLayers) + " in all groups");
    }
    for (const JsonValue id : ids->elements()) {
      const auto layer = static_cast<int>(line.integer(path + ids_key, id, 0, 1 << 30));
      if (!met.insert(layer).second) line.reject(path + ids_key, id, "must be in one group, once");
      group.layers.push_back(layer);
    }
    for (const auto& [key, out] : {std::pair{"experts", &group.experts}, std::pair{"top_k", &group.top_k}}) {
      if (const auto number = value.find(key))
        *out = static_cast<int>(line.integer(path + key, *number, 1, kMostExperts));
    }
    if (!group.experts) line.fail(path + "experts", "missing", "required");
    if (!group.top_k) line.fail(path + "top_k", "missing", "required");
    if (*group.top_k > *group.experts) {
      line.fail(path + "top_k", std::to_string(*group.top_k),
                "must be at most experts (" + std::to_string(*group.experts) + ")");
    }
    if (const auto targets = value.find("targets")) {
      group.targets = read_targets(line, path + "targets", *targets, group.experts);
    } else if (group.experts != experts) {
      group.targets = nullptr;
    }
    layers += static_cast<std::int64_t>(group.layers.size());
    header.groups.push_back(std::move(group));
  }
  header.layers = static_cast<int>(layers);
  header.targets = nullptr;
}

/// What all layers have in common, of a trace or of a config's model.
void read_model(const LineReader& line, JsonValue from, const std::string& prefix, LogHeader& header) {
  for (const auto& [key, out] : {std::pair{"layers", &header.layers}, std::pair{"experts", &header.experts},
                                 std::pair{"top_k", &header.top_k}}) {
    if (const auto value = from.find(key)) {
      *out = static_cast<int>(
          line.integer(prefix + key, *value, 1, out == &header.layers ? kMostLayers : kMostExperts));
    }
  }
  if (header.top_k && header.experts && *header.top_k > *header.experts) {
    line.fail(prefix + "top_k", std::to_string(*header.top_k),
              "must be at most experts (" + std::to_string(*header.experts) + ")");
  }
  if (const auto targets = from.find("targets"); targets && header.is_run)
    header.targets = read_targets(line, prefix + "targets", *targets, header.experts);
}

// Keys of a config, which docs/config.md describes.
constexpr const char *kPolicy = "policy", *kOptions = "options", *kMetric = "metric", *kTarget = "target";

/// The actuators' sections of a config, of a group of layers or of an entry of the timeline: what tools take from them has
/// its type.
void check_sections(const LineReader& line, const std::string& path, JsonValue from) {
  for (const Actuator which : kActuators) {
    const auto section = from.find(name_of(which));
    if (!section) continue;
    const std::string field = path + std::string(name_of(which));
    const auto policy = section->find(kPolicy);
    if (!section->is_object() || (policy && !policy->is_string()))
      line.reject(field, *section, "must be an object whose policy is a word");
    const auto options = section->find(kOptions);
    if (!options) continue;
    if (!options->is_object()) line.reject(field + '.' + kOptions, *options, "must be an object");
    // A set-point.
    const auto metric = options->find(kMetric), target = options->find(kTarget);
    const std::string option = field + '.' + kOptions + '.';
    if (metric) line.text(option + kMetric, *metric);
    if (metric && target) line.real(option + kTarget, *target);
  }
}

void read_config(const LineReader& line, LogHeader& header) {
  const JsonValue config = line.need("config");
  if (!config.is_object()) line.reject("config", config, "must be an object");
  header.config_json = std::make_shared<std::string>(config.dump());
  line.require_values("config", *header.config_json);
  const auto model = config.find("model");
  if (!model) line.fail("config.model", "missing", "required");
  if (!model->is_object()) line.reject("config.model", *model, "must be an object");
  const std::string place = "config: ";
  check_sections(line, place, config);
  for (const std::string key : {"layers", "timeline"}) {
    const auto list = config.find(key);
    if (!list) continue;
    if (!list->is_array()) line.reject(place + key, *list, "must be an array");
    std::size_t i = 0;
    for (const JsonValue entry : list->elements()) {
      const std::string field = LineReader::at(place + key, i++);
      if (!entry.is_object()) line.reject(field, entry, "must be an object");
      check_sections(line, field + '.', entry);
    }
  }
  read_model(line, *model, "config.model.", header);
  read_groups(line, config.find("layers"), place + "layers", header);
}

}  // namespace

void LogLine::fail(const std::string& field, const std::string& value, const std::string& constraint) const {
  throw LogError(file + ':' + std::to_string(number) + ": " + field + ": " + value + ": " + constraint);
}

void LogLine::refuse(std::string_view words) const {
  throw LogError(file + ':' + std::to_string(number) + ": " + std::string(words));
}

void LogLine::require_values(const std::string& field, std::string_view text) const {
  if (const std::int64_t values = values_in(text); values > kMostLoggedValues)
    fail(field, std::to_string(values) + " values", "must be at most " + std::to_string(kMostLoggedValues));
}

void LogLine::reject(const std::string& field, JsonValue value, const std::string& constraint) const {
  fail(field, shown_briefly(value.dump()), constraint);
}

LogHeader read_header(const LogLine& at, bool any_version) {
  const LineReader line(at);
  LogHeader header;
  const std::string format = line.text("format", line.need("format"));
  if (format != "moectl-trace" && format != "moectl-run") {
    line.reject("format", line.need("format"), "must be moectl-trace or moectl-run");
  }
  header.is_run = format == "moectl-run";
  if (!any_version && line.integer("version", line.need("version")) != 1) {
    line.reject("version", line.need("version"), "must be 1, the only version there is");
  }
  if (header.is_run) {
    read_config(line, header);
  } else {
    read_model(line, line.object, "", header);
    const char* const key = "groups";
    read_groups(line, line.find(key), key, header);
  }
  if (const auto shift = line.find("shift")) header.shift = line.integer("shift", *shift);
  if (const auto piece = line.find("piece")) header.piece = line.integer("piece", *piece, 1, kMostPieces);
  return header;
}

bool is_config_change(const LogLine& line, const LogHeader& header) {
  return header.is_run && line.object.find("config") && !line.object.find("layer");
}

ChangedConfig read_config_change(const LogLine& at) {
  const LineReader line(at);
  ChangedConfig change;
  change.step = line.integer("step", line.need("step"));
  change.header.is_run = true;
  read_config(line, change.header);
  return change;
}

void Assumptions::say(const LogLine& line, const std::string& field, const std::string& what) {
  if (fields_.insert(field).second)
    said_.push_back("assumed: " + printable(line.file) + ':' + std::to_string(line.number) + ": " + field +
                    ": " + what);
}

LayerGroups groups_of(const LogHeader& header) {
  LayerGroups groups;
  for (std::size_t g = 0; g < header.groups.size(); ++g) {
    for (const int layer : header.groups[g].layers) groups.emplace(layer, g);
  }
  return groups;
}

LogRecord read_record(const LogLine& at, const LogHeader& header, const LayerGroups& groups,
                      const LogDefaults& defaults, Assumptions& assumptions) {
  const LineReader line(at);
  LogRecord record;
  record.line = at.number;
  record.step = line.integer("step", line.need("step"));
  const JsonValue layer = line.need("layer");
  const bool whole_model = header.is_run && layer.is_null();
  if (!whole_model) {
    // A trace may use the model's own numbers.
    const bool numbered = header.layers && header.is_run && header.groups.empty();
    const std::int64_t last = numbered ? *header.layers - 1 : std::int64_t{1} << 30;
    record.layer = static_cast<int>(line.integer("layer", layer, 0, last));
  }
  if (const auto tag = line.find("tag")) record.tag = line.text("tag", *tag);
  if (const auto loss = line.find("loss"); loss && !loss->is_null()) record.loss = line.real("loss", *loss);
  if (const auto mixture = line.find("next_mixture")) {
    if (!mixture->is_object()) line.reject("next_mixture", *mixture, "must be an object of token counts");
    for (const auto [key, tokens] : mixture->members()) {
      const std::string name(key);
      record.next_mixture[name] = line.integer("next_mixture." + name, tokens);
    }
  }
  if (!whole_model) {
    const LogGroup equal{{}, header.experts, header.top_k, header.targets};
    const LogGroup* group = &equal;
    if (!header.groups.empty()) {
      const auto found = groups.find(record.layer);
      if (found == groups.end())
        line.reject("layer", layer, "must be in one of the groups of the first line");
      group = &header.groups[found->second];
    }
    // A run log with `per_expert: false` has no counts; a trace has them, or loads instead.
    const auto load = line.find("load");
    const bool only_load = load && !header.is_run && !line.find("counts");
    const auto counts = only_load       ? load
                        : header.is_run ? line.find("counts")
                                        : std::optional(line.need("counts"));
    std::optional<std::int64_t> tokens;
    if (header.is_run || line.find("tokens")) tokens = line.integer("tokens", line.need("tokens"));
    if (counts) record.stats = read_stats(line, *group, tokens, *counts, only_load, defaults, assumptions);
    record.tokens = counts ? record.stats.tokens() : *tokens;
    if (!counts || !group->targets || group->targets->experts() == record.stats.experts())
      record.targets = group->targets;
    if (const auto domains = line.find("domain_counts"); domains && counts) {
      for (const auto& [name, values] : domains_of(*domains)) record.domains.emplace_back(name);
    }
  }
  if (header.is_run) read_decisions(line, record);
  return record;
}

}  // namespace moectl
