#include "moectl/bias_file.h"

#include <charconv>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "base/fields.h"
#include "base/input_limits.h"
#include "base/printable.h"
#include "base/whole_file.h"
#include "moectl/config.h"

namespace moectl {

LayerBiases read_biases(const std::string& path) {
  using nlohmann::json;
  const auto fail = [&](const std::string& what) -> void { throw ConfigError(path + ": " + what); };
  // A config may name any file: a pipe would wait for a writer, and a device may have no end.
  std::error_code ignored;
  if (std::filesystem::exists(path, ignored) && !std::filesystem::is_regular_file(path, ignored))
    fail("must be a regular file");
  std::ifstream file(path, std::ios::binary);
  if (!file.is_open()) fail("cannot be opened");
  const std::optional<std::string> text = read_up_to(file, kLargestJson);
  if (!text) fail("must be at most " + std::to_string(kLargestJson) + " bytes");
  if (nests_deeper(*text, kMostLevels)) fail("nested deeper than " + std::to_string(kMostLevels) + " levels");
  if (const std::int64_t values = values_in(*text); values > kMostJsonValues)
    fail(std::to_string(values) + " values: must be at most " + std::to_string(kMostJsonValues));
  std::map<int, std::set<std::string>> keys;  // of the objects around what is parsed, by their depth
  std::optional<std::string> twice;
  const json all = json::parse(
      *text,
      [&](int depth, json::parse_event_t event, json& parsed) {
        if (event == json::parse_event_t::object_start) keys[depth + 1].clear();
        if (event != json::parse_event_t::key) return true;
        const auto [key, fresh] = keys[depth].insert(parsed.get<std::string>());
        if (!fresh) twice = *key;
        return true;
      },
      false);
  if (all.is_discarded()) fail("not JSON");
  if (twice) fail("key \"" + shown_briefly(*twice) + "\" stands twice in one object");
  if (!all.is_object() || all.value("format", json()) != "moectl-biases") {
    fail("must be a file of biases, as `moectl biases` writes one: {\"format\":\"moectl-biases\",…}");
  }
  if (all.value("version", json()) != 1) fail("version: must be 1");
  if (!all.contains("layers") || !all["layers"].is_object())
    fail("layers: must map layer ids to lists of biases");
  LayerBiases biases;
  for (const auto& [key, list] : all["layers"].items()) {
    int id = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (error != std::errc() || end != key.data() + key.size() || id < 0) {
      fail("layers: " + key + ": must be the id of a layer");
    }
    if (!list.is_array()) fail("layers: " + key + ": must be a list of biases");
    const auto [entry, fresh] = biases.try_emplace(id);
    if (!fresh) fail("layers: " + key + ": layer " + std::to_string(id) + " stands twice");
    std::vector<double>& values = entry->second;
    for (const json& value : list) {
      if (!value.is_number()) {
        fail("layers: " + key + '[' + std::to_string(values.size()) + "]: " + value.dump() +
             ": must be a number");
      }
      values.push_back(value.get<double>());
    }
  }
  return biases;
}

std::string biases_json(const LayerBiases& biases) {
  std::string text = "{\"format\":\"moectl-biases\",\"version\":1,\"layers\":{";
  const char* before = "\n";
  for (const auto& [id, values] : biases) {
    text.append(before).append("\"").append(std::to_string(id)).append("\":[");
    for (std::size_t i = 0; i < values.size(); ++i) text.append(i > 0 ? "," : "").append(shown(values[i]));
    text += ']';
    before = ",\n";
  }
  return text.append("\n}}\n");
}

}  // namespace moectl
