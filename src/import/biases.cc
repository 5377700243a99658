#include "import/biases.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "base/input_limits.h"
#include "base/printable.h"
#include "base/whole_file.h"
#include "import/bytes.h"
#include "import/import.h"
#include "moectl/config.h"
#include "moectl/run_log.h"
#include "moectl/state.h"
#include "moectl/state_file.h"

namespace moectl {
namespace {

using nlohmann::json;

/// Layers × experts of all biases have a limit, which is checked before memory is taken for more.
void check_cells(std::int64_t cells, const std::string& path) {
  if (cells > kMostLayersTimesExperts)
    throw ImportError(path + ": " + std::to_string(cells) + " layers x experts: must be at most " +
                      std::to_string(kMostLayersTimesExperts));
}

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw ImportError(path + ": " + what);
}

// ---- safetensors: 8 bytes of length, a JSON header, the tensors (huggingface.co/docs/safetensors). ----

double half(std::uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const double fraction = bits & 1023, sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction == 0 ? sign * HUGE_VAL : std::numeric_limits<double>::quiet_NaN();
  return sign * (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25));
}

struct Type {
  std::string_view name;
  std::size_t size;
};
constexpr std::array<Type, 4> kTypes = {{{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}}};

double number_at(const char* at, std::string_view type) {
  if (type == "F64") {
    double x = 0;
    std::memcpy(&x, at, 8);
    return x;
  }
  if (type == "F32") {
    float x = 0;
    std::memcpy(&x, at, 4);
    return x;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, at, 2);
  if (type == "F16") return half(bits);
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// The layer's number in a tensor's name: what stands in place of {}, or the number after "layers." or "blocks.", or the
/// first one.
std::optional<int> layer_in(const std::string& name, const std::string& pattern) {
  const auto number = [](std::string_view text) -> std::optional<int> {
    int value = -1;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || error != std::errc() || end != text.data() + text.size() || value < 0)
      return std::nullopt;
    return value;
  };
  if (!pattern.empty()) {
    const std::size_t hole = pattern.find("{}"), after = pattern.size() - hole - 2;
    if (name.size() < hole + after || name.compare(0, hole, pattern, 0, hole) != 0 ||
        name.compare(name.size() - after, after, pattern, hole + 2, after) != 0)
      return std::nullopt;
    return number(std::string_view(name).substr(hole, name.size() - hole - after));
  }
  constexpr std::array<std::string_view, 3> kKnown = {"e_score_correction_bias", "expert_bias", "score_bias"};
  const auto ends = [&](std::string_view known) { return name.ends_with(known); };
  if (std::none_of(kKnown.begin(), kKnown.end(), ends)) return std::nullopt;
  std::optional<int> first;
  std::string_view before;
  for (std::string_view rest = name; !rest.empty();) {
    const std::string_view part = rest.substr(0, rest.find('.'));
    if (const auto found = number(part)) {
      if (before == "layers" || before == "blocks") return found;
      if (!first) first = found;
    }
    before = part;
    rest.remove_prefix(std::min(rest.size(), part.size() + 1));
  }
  return first;
}

LayerBiases from_safetensors(const std::string& path, const std::string& pattern) {
  std::ifstream file(path, std::ios::binary);
  char length_bytes[8];
  std::uint64_t length = 0;
  if (!file.read(length_bytes, 8)) fail(path, "cannot be read");
  std::memcpy(&length, length_bytes, 8);
  if (length > kLongestSafetensorsHeader)
    fail(path, "its header has " + std::to_string(length) + " bytes: must be at most 10^8");
  std::string text(static_cast<std::size_t>(length), '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(length))) fail(path, "ends within its header");
  if (nests_deeper(text, kMostLevels))
    fail(path, "nested deeper than " + std::to_string(kMostLevels) + " levels");
  const json header = json::parse(text, nullptr, false);
  if (!header.is_object()) fail(path, "its header is not JSON");
  LayerBiases biases;
  std::set<std::string> others;
  std::int64_t cells = 0;
  for (const auto& [name, tensor] : header.items()) {
    if (name == "__metadata__") continue;
    const std::optional<int> layer = layer_in(name, pattern);
    if (!layer) {
      if (others.size() < 1000 && name.find("bias") != std::string::npos) others.insert(name);
      continue;
    }
    // By value: Clang 14 lets no lambda capture a structured binding by reference.
    const auto wrong = [&path, name = name](const std::string& what) { fail(path, name + ": " + what); };
    if (!tensor.is_object() || !tensor.contains("dtype") || !tensor["dtype"].is_string() ||
        !tensor.contains("data_offsets") || !tensor.contains("shape")) {
      wrong("must have dtype, shape and data_offsets");
    }
    const std::string dtype = tensor["dtype"];
    const auto type =
        std::find_if(kTypes.begin(), kTypes.end(), [&](const Type& one) { return one.name == dtype; });
    if (type == kTypes.end()) wrong("dtype " + dtype + ": must be F32, F64, F16 or BF16");
    const json &shape = tensor["shape"], &offsets = tensor["data_offsets"];
    if (!shape.is_array() || shape.size() != 1 || !shape[0].is_number_integer() || shape[0] < 1 ||
        shape[0] > kMostExperts) {
      wrong("shape " + shape.dump() + ": must be [experts]");
    }
    const auto experts = shape[0].get<std::size_t>();
    if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
        !offsets[1].is_number_unsigned() || offsets[1] < offsets[0] ||
        offsets[1].get<std::uint64_t>() - offsets[0].get<std::uint64_t>() != experts * type->size) {
      wrong("data_offsets " + offsets.dump() + ": must hold its values");
    }
    check_cells(cells += static_cast<std::int64_t>(experts), path);
    std::vector<char> raw(experts * type->size);
    file.clear();
    file.seekg(static_cast<std::streamoff>(8 + length + offsets[0].get<std::uint64_t>()));
    if (!file.read(raw.data(), static_cast<std::streamsize>(raw.size()))) wrong("the file ends within it");
    if (biases.count(*layer) > 0)
      wrong("a second tensor of layer " + std::to_string(*layer) + ": name them with --tensor");
    std::vector<double>& values = biases[*layer];
    for (std::size_t i = 0; i < experts; ++i)
      values.push_back(number_at(raw.data() + i * type->size, type->name));
  }
  if (biases.empty()) {
    std::string near;
    for (const std::string& name : others)
      near += (near.empty() ? "; tensors with bias in their name: " : ", ") + name;
    fail(path, "holds no tensor of selection biases: name them with --tensor, {} for the layer" +
                   near.substr(0, 300));
  }
  return biases;
}

// ---- Others. ----

LayerBiases from_npy(const std::string& path, int first_layer) {
  Bytes bytes(path);
  NpyReader array(bytes, path);
  const std::vector<std::int64_t>& shape = array.shape();
  const bool rows = shape.size() == 2;
  if (shape.empty() || shape.size() > 2 || shape.back() < 1 || shape.back() > kMostExperts ||
      (rows && (shape[0] < 1 || shape[0] > kMostExperts))) {
    fail(path, array.description() + ": must be [layers, experts] or [experts]");
  }
  check_cells((rows ? shape[0] : 1) * shape.back(), path);
  LayerBiases biases;
  for (std::int64_t row = 0; row < (rows ? shape[0] : 1); ++row) {
    std::vector<double>& values = biases[first_layer + static_cast<int>(row)];
    values.resize(static_cast<std::size_t>(shape.back()));
    array.read(values);
  }
  return biases;
}

LayerBiases from_json(const std::string& path, const json& all, int first_layer) {
  LayerBiases biases;
  std::int64_t cells = 0;
  const auto add = [&](int layer, const json& list) {
    check_cells(cells += static_cast<std::int64_t>(list.size()), path);
    std::vector<double>& values = biases[layer];
    for (const json& value : list) {
      if (!value.is_number())
        fail(path, "layer " + std::to_string(layer) + ": " + value.dump() + ": must be a number");
      values.push_back(value.get<double>());
    }
  };
  if (all.is_array() && !all.empty()) {
    if (!all[0].is_array()) {
      add(first_layer, all);
      return biases;
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (!all[i].is_array()) fail(path, "[" + std::to_string(i) + "]: must be a list of biases");
      add(first_layer + static_cast<int>(i), all[i]);
    }
    return biases;
  }
  fail(path, "must be a list of biases or of lists, one a layer, or what `moectl biases -o` writes");
}

LayerBiases from_state(const std::string& path, bool deployed) {
  LayerBiases biases;
  const std::string bytes = read_file(path);
  StateIo state(bytes);
  std::int64_t steps = 0, cells = 0;
  std::vector<std::int64_t> ids;
  state.value("steps", steps);
  state.value("settings_from", steps);
  // The layers follow one another: each is read as it comes, since to find it by name takes as long as all before it.
  const std::vector<std::string> names = state.names();
  if (!names.empty() && names[0] == "layers") state.list("layers", ids);
  for (std::size_t i = names.empty() || names[0] != "layers" ? 0 : 1; i < names.size(); ++i) {
    const std::string& name = names[i];
    constexpr std::string_view kLayer = "layer ";
    if (!name.starts_with(kLayer)) break;
    int id = -1;
    const char* const end = name.data() + name.size();
    const auto [at, error] = std::from_chars(name.data() + kLayer.size(), end, id);
    if (error != std::errc() || at != end || id < 0)
      fail(path, shown_briefly(name) + ": must be a layer's whole number");
    state.section(name, [&](StateIo& layer) {
      if (auto section = layer.find(deployed ? "deployed" : "expert_bias")) {
        section->list(deployed ? "values" : "applied", biases[id]);
        check_cells(cells += static_cast<std::int64_t>(biases[id].size()), path);
      }
      layer = StateIo();  // the rest of it is not asked for
    });
  }
  if (biases.empty()) fail(path, "holds no biases");
  return biases;
}

LayerBiases from_log(const std::string& path, bool deployed) {
  LogReader log(path, FaultPolicy::kRepair);
  if (!log.header().is_run) {
    fail(path,
         log.next()
             ? "is a trace: it holds counts and no biases"
             : "is none of a run log, a saved state, an .npy array, JSON lists and a safetensors checkpoint");
  }
  LayerBiases biases;
  std::int64_t cells = 0;
  while (const auto record = log.next()) {
    const auto found = record->actuators.find("expert_bias");
    if (record->layer < 0 || record->tag != "train" || found == record->actuators.end()) continue;
    const LoggedActuator& logged = found->second;
    if (logged.applied.empty()) continue;
    std::vector<double>& values = biases[record->layer];
    check_cells(
        cells += static_cast<std::int64_t>(logged.applied.size()) - static_cast<std::int64_t>(values.size()),
        path);
    values = deployed && !logged.deployed.empty() ? logged.deployed : logged.applied;
  }
  if (biases.empty()) fail(path, "holds no biases of single experts (log.per_expert is off?)");
  return biases;
}

}  // namespace

LayerBiases biases_in(const std::string& path, const BiasSource& source) {
  if (!source.tensor.empty() && source.tensor.find("{}") == std::string::npos) {
    throw ImportError("--tensor: " + source.tensor + ": must hold {} in place of the layer's number");
  }
  std::ifstream file(path, std::ios::binary);
  if (!file.is_open()) fail(path, "cannot be opened");
  char start[64] = {};
  file.read(start, sizeof start);
  const std::string_view begin(start, static_cast<std::size_t>(file.gcount()));
  try {
    if (begin.starts_with("moectlst")) return from_state(path, source.deployed);
    if (begin.starts_with("\x93NUMPY")) return from_npy(path, source.first_layer);
    if (begin.size() > 8 && begin[8] == '{' && begin[7] == '\0') return from_safetensors(path, source.tensor);
    if (begin.starts_with("{\"format\":\"moectl-biases\"")) return read_biases(path);
    const std::size_t first = begin.find_first_not_of(" \t\r\n");
    if (first != std::string_view::npos && begin[first] == '[') {
      file.clear();
      file.seekg(0);
      const std::optional<std::string> text = read_up_to(file, kLargestJson);
      if (!text) fail(path, "must be at most " + std::to_string(kLargestJson) + " bytes");
      if (nests_deeper(*text, kMostLevels))
        fail(path, "nested deeper than " + std::to_string(kMostLevels) + " levels");
      const json all = json::parse(*text, nullptr, false);
      if (all.is_discarded()) fail(path, "not JSON");
      return from_json(path, all, source.first_layer);
    }
    return from_log(path, source.deployed);
  } catch (const ImportError&) {
    throw;
  } catch (const std::exception& error) {
    const std::string what = error.what();
    fail(path, what.starts_with(path) ? what.substr(std::min(what.size(), path.size() + 2)) : what);
  }
}

}  // namespace moectl
