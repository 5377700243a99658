// A YAML file read strictly: every key is asked for by name and type, what was not asked for is an error, and
// every error knows its place. Knows nothing of what the keys mean.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/fields.h"
#include "moectl/config.h"

namespace moectl {

/// Where something stands in a file, counted from 1.
struct Place {
  int line = 1;
  int column = 1;
};

/// What a file holds, as libyaml hears it.
struct YamlNode {
  enum class Kind { kNull, kScalar, kList, kMap };
  Kind kind = Kind::kNull;
  Place place;
  bool quoted = false;                 ///< A scalar in quotes, or in a block of its own.
  std::string tag;                     ///< Empty unless one was written, as `!!int x`.
  std::string text;                    ///< Of a scalar.
  std::vector<const YamlNode*> items;  ///< Of a list; of a map key, value, key, value, …
  std::size_t nodes = 1;  ///< It and all that it holds, repeated by aliases; 0 while its end is to come.
};

class YamlMap;

/// One document; owns the places of all keys that were read.
class YamlFile {
 public:
  /// Throws ConfigError on anything that is not one YAML document holding a map.
  YamlFile(std::string_view text, std::string name);

  YamlMap root();
  const YamlNode& node() const { return *root_; }
  /// The error for a problem found after reading: at the place of its key, or of the innermost part of it
  /// that stands in the file.
  ConfigError error(const ConfigProblem& problem) const;
  ConfigError error(Place place, const ConfigProblem& problem) const;

 private:
  friend class YamlMap;
  void read(std::string_view text);
  std::string name_;
  std::deque<YamlNode> nodes_;  // which point to each other
  const YamlNode* root_ = nullptr;
  std::map<std::string, Place, std::less<>> places_;
};

/// One map of the file. Each read returns false and leaves `out` alone if the key is absent.
class YamlMap {
 public:
  bool read(std::string_view key, bool& out);
  bool read(std::string_view key, int& out);
  bool read(std::string_view key, std::int64_t& out);
  bool read(std::string_view key, double& out);
  bool read(std::string_view key, std::string& out);
  bool read(std::string_view key, std::vector<int>& out);
  bool read(std::string_view key, std::vector<double>& out);
  bool read(std::string_view key, std::vector<std::string>& out);
  // Maps inside are owned by this one; whoever asks for a key again gets the same map.
  YamlMap* map(std::string_view key);
  /// A list of maps; empty if the key is absent.
  std::vector<YamlMap*> maps(std::string_view key);
  /// For a feature that `off` switches off, and `on` or a map of its options switches on. Sets `out` where
  /// the key is given; returns the map if it was one.
  YamlMap* map_or_switch(std::string_view key, bool& out);

  /// The key must be there, which finish() sees to.
  void require(std::string_view key) { required_.emplace_back(key); }
  /// Throws ConfigError for a key that nobody asked for, naming the nearest one that was asked for, and for a required
  /// one that is absent; in this map and in those inside.
  void finish() const;
  bool has(std::string_view key) const;
  /// Whether the key's value is a list; a word that is no number.
  bool is_list(std::string_view key) const;
  bool is_word(std::string_view key) const;
  /// Where the map stands in the file's tree, as "health.phases[0]".
  const std::string& path() const { return path_; }
  /// The error for one of this map's keys.
  ConfigError error(std::string_view key, std::string value, std::string constraint) const;

 private:
  friend class YamlFile;
  struct Entry {
    Place key_place, place;
    const YamlNode* value = nullptr;
  };
  YamlMap(YamlFile& file, std::string path, const YamlNode& node, Place place);
  YamlMap* inner(std::string path, const YamlNode& node, Place place);
  const Entry* find(std::string_view key);
  template <typename T>
  bool read_scalar(std::string_view key, T& out);
  template <typename T>
  bool read_list(std::string_view key, std::vector<T>& out);
  std::string path_to(std::string_view key) const;

  YamlFile& file_;
  std::string path_;
  Place place_;
  std::vector<std::string> order_;  // of the file
  std::map<std::string, Entry, std::less<>> entries_;
  std::vector<std::string> asked_, required_;
  std::map<std::string, std::unique_ptr<YamlMap>> inner_;  // by path
};

}  // namespace moectl
