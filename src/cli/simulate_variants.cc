#include "cli/simulate_variants.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>
#include <string_view>

#include "base/printable.h"
#include "cli/tool.h"
#include "config/config_yaml.h"

namespace moectl::cli {
namespace {

/// A tree of YAML in which keys can be set: scalars are texts behind '"' if they stood in quotes, else behind '='.
nlohmann::ordered_json tree_of(const YamlNode& node) {
  using Tree = nlohmann::ordered_json;
  if (node.kind == YamlNode::Kind::kScalar) return (node.quoted ? '"' : '=') + node.text;
  if (node.kind == YamlNode::Kind::kNull) return nullptr;
  Tree tree = node.kind == YamlNode::Kind::kList ? Tree::array() : Tree::object();
  if (tree.is_array()) {
    for (const YamlNode* item : node.items) tree.push_back(tree_of(*item));
  } else {
    for (std::size_t i = 0; i + 1 < node.items.size(); i += 2)
      tree[node.items[i]->text] = tree_of(*node.items[i + 1]);
  }
  return tree;
}

/// The tree as YAML in one line. In it, plain words with signs of YAML need quotes; numbers have none.
std::string flow_of(const nlohmann::ordered_json& tree) {
  if (tree.is_string()) {
    const std::string text = tree.get<std::string>().substr(1);
    const bool quoted =
        tree.get<std::string>().front() == '"' || text.find_first_of(",[]{}:#\"' ") != std::string::npos;
    return quoted ? nlohmann::json(text).dump() : text;
  }
  if (!tree.is_structured()) return tree.dump();
  std::string text;
  for (const auto& [key, item] : tree.items()) {
    text += (text.empty() ? "" : ", ") + (tree.is_object() ? json_text(nlohmann::json(key)) + ": " : "") +
            flow_of(item);
  }
  return tree.is_object() ? '{' + text + '}' : '[' + text + ']';
}

/// Sets a key, as "expert_bias.options.step".
void set_key(nlohmann::ordered_json& node, std::string_view key, const nlohmann::ordered_json& value) {
  const std::size_t dot = key.find('.');
  const std::string name(key.substr(0, dot));
  if (!node.is_null() && !node.is_object())
    throw InputError("--set: " + name + ": stands in no map of the config");
  if (dot == std::string_view::npos) {
    node[name] = value;
  } else {
    set_key(node[name], key.substr(dot + 1), value);
  }
}

}  // namespace

std::vector<Variant> variants_of(const std::vector<std::string>& configs,
                                 const std::vector<std::string>& sets) {
  std::vector<Variant> variants;
  variants.reserve(configs.size());
  for (const std::string& config : configs) variants.push_back({config, {}});
  for (const std::string& set : sets) {
    const std::size_t equals = set.find('=');
    if (equals == 0 || equals == std::string::npos || equals + 1 == set.size())
      throw InputError("--set: " + set + ": must be KEY=VALUE or KEY=VALUE,VALUE,...");
    const std::string key = set.substr(0, equals);
    // What is set last would hold, and the runs would be labelled with both.
    for (const auto& [before, value] : variants[0].changes) {
      if (before == key)
        throw InputError("--set: " + key +
                         ": given twice: must be given once; KEY=A,B makes a run with each");
      if (before.starts_with(key + '.') || key.starts_with(before + '.'))
        throw InputError("--set: " + key + ": " + before +
                         " is set as well: one must not be a part of the other");
    }
    // Commas inside brackets belong to a value.
    std::vector<std::string> values(1);
    int depth = 0;
    for (const char c : set.substr(equals + 1)) {
      depth += c == '[' || c == '{' ? 1 : c == ']' || c == '}' ? -1 : 0;
      if (c == ',' && depth == 0) {
        values.emplace_back();
      } else {
        values.back() += c;
      }
    }
    std::vector<Variant> more;
    for (const Variant& variant : variants) {
      for (const std::string& value : values) {
        more.push_back(variant);
        more.back().changes.emplace_back(key, value);
      }
    }
    variants = std::move(more);
    constexpr std::size_t kMost = 10000;
    if (variants.size() > kMost) throw InputError("--set: more than 10000 runs");
  }
  return variants;
}

ControllerConfig load_variant(const Variant& variant, const PolicyRegistry& registry) {
  if (variant.changes.empty()) return load_config(variant.config, registry);
  std::ifstream file(variant.config);
  if (!file) throw InputError(variant.config + ": cannot be opened; with --set a config must be a file");
  std::ostringstream text;
  text << file.rdbuf();
  // A text that is no YAML is reported by the reader, with its place.
  parse_config(text.str(), variant.config, registry);
  nlohmann::ordered_json root = tree_of(YamlFile(text.str(), variant.config).node());
  for (const auto& [key, value] : variant.changes) {
    try {
      set_key(root, key, tree_of(*YamlFile("value: " + value, "--set").node().items[1]));
    } catch (const ConfigError&) {
      throw InputError("--set: " + key + ": " + value + ": must be a value of YAML");
    }
  }
  try {
    return parse_config(flow_of(root), variant.name(), registry);
  } catch (const ConfigError& e) {
    // The config with what was set is one line that nobody has seen: its key is the place, not line and column.
    const std::string said = e.what(), name = printable(variant.name()) + ':';
    if (!said.starts_with(name)) throw;
    static const std::regex place("^[0-9]+:[0-9]+:");
    throw ConfigError(name + std::regex_replace(said.substr(name.size()), place, ""));
  }
}

}  // namespace moectl::cli
