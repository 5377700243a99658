#include "import/biases.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "base/format.h"
#include "base/input_limits.h"
#include "base/printable.h"
#include "base/whole_file.h"
#include "import/bytes.h"
#include "import/import.h"
#include "log/json.h"
#include "log/log_record.h"
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

/// The numbers of an array of whole numbers from 0 to 2^63 - 1; empty if it is none.
std::vector<std::int64_t> wholes(JsonValue array) {
  std::vector<std::int64_t> numbers;
  if (!array.is_array()) return numbers;
  for (const JsonValue value : array.elements()) {
    if (!value.is_integer() || value.is_large() || value.as_integer() < 0) return {};
    numbers.push_back(value.as_integer());
  }
  return numbers;
}

LayerBiases from_safetensors(const std::string& path, const std::string& pattern) {
  std::ifstream file(path, std::ios::binary);
  char length_bytes[8];
  std::uint64_t length = 0;
  if (!file.read(length_bytes, 8)) fail(path, "cannot be read");
  std::memcpy(&length, length_bytes, 8);
  if (length > kLongestSafetensorsHeader)
    fail(path, "its header has " + std::to_string(length) + " bytes: must be at most 10^8");
  std::string text(static_cast<std::size_t>(length) + JsonParser::kPadding, '\0');
  if (!file.read(text.data(), static_cast<std::streamsize>(length))) fail(path, "ends within its header");
  const auto held = static_cast<std::int64_t>(bytes_left(file));  // of tensors
  JsonParser parser;
  try {
    parser.parse(std::string_view(text).substr(0, static_cast<std::size_t>(length)));
  } catch (const JsonError& error) {
    fail(path, "its header: " + std::string(error.what()));
  }
  if (!parser.value().is_object()) fail(path, "its header: must be a JSON object");
  LayerBiases biases;
  std::map<int, std::string> names;  // of the tensors of `biases`
  std::set<std::string> others;
  std::int64_t cells = 0;
  for (const auto member : parser.value().members()) {
    const std::string name(member.key);
    const JsonValue tensor = member.value;
    if (name == "__metadata__") continue;
    const std::optional<int> layer = layer_in(name, pattern);
    if (!layer) {
      if (others.size() < 1000 && name.find("bias") != std::string::npos) others.insert(name);
      continue;
    }
    const auto wrong = [&](const std::string& what) { fail(path, name + ": " + what); };
    const auto dtype = tensor.find("dtype"), shape = tensor.find("shape"),
               offsets = tensor.find("data_offsets");
    if (!dtype || !dtype->is_string() || !shape || !offsets) wrong("must have dtype, shape and data_offsets");
    const auto type = std::ranges::find(kTypes, dtype->text(), &Type::name);
    if (type == kTypes.end())
      wrong("dtype " + shown_briefly(dtype->text()) + ": must be F32, F64, F16 or BF16");
    const std::vector<std::int64_t> extents = wholes(*shape), range = wholes(*offsets);
    if (extents.size() != 1 || extents[0] < 1 || extents[0] > kMostExperts)
      wrong("shape " + shown_briefly(shape->dump()) + ": must be [experts]");
    const auto experts = static_cast<std::size_t>(extents[0]);
    std::vector<char> raw(experts * type->size);
    // Subtracted rather than added: what the header says may be near the largest number.
    if (range.size() != 2 || range[1] < range[0] || range[1] - range[0] != std::ssize(raw)) {
      wrong("data_offsets " + shown_briefly(offsets->dump()) + ": must be the begin and the end of its " +
            std::to_string(raw.size()) + " bytes");
    }
    if (range[1] > held) {
      wrong("data_offsets " + shown_briefly(offsets->dump()) + ": the file ends within it, after " +
            std::to_string(held) + " bytes of tensors");
    }
    check_cells(cells += extents[0], path);
    const auto [before, fresh] = names.emplace(*layer, name);
    if (!fresh)
      wrong("layer " + std::to_string(*layer) + " has " + before->second +
            " as well: name the tensors with --tensor");
    file.seekg(static_cast<std::streamoff>(8 + length) + range[0]);
    if (!file.read(raw.data(), std::ssize(raw))) wrong("cannot be read");
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
    if (biases.count(id) > 0)
      fail(path, shown_briefly(name) + ": layer " + std::to_string(id) + " stands twice");
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
  const LogHeader header = log.header();
  const LayerGroups groups = groups_of(header);
  LayerBiases biases;
  std::int64_t cells = 0;
  while (const auto record = log.next()) {
    const auto found = record->actuators.find("expert_bias");
    if (record->layer < 0 || record->tag != "train" || found == record->actuators.end()) continue;
    const LoggedActuator& logged = found->second;
    if (logged.applied.empty()) continue;
    const auto group = groups.find(record->layer);
    // Those of its counts, which the reader has compared with the config in force; else those of the first line.
    int experts = record->stats.experts();
    if (experts == 0)
      experts = (group == groups.end() ? header.experts : header.groups[group->second].experts).value_or(0);
    for (const auto& [key, list] :
         {std::pair("applied", &logged.applied), std::pair("deployed", &logged.deployed)}) {
      if (list->empty() || experts == 0 || std::ssize(*list) == experts) continue;
      throw ImportError(path + ':' + std::to_string(record->line) + ": layer " +
                        std::to_string(record->layer) + ": actuators.expert_bias." + key + ": " +
                        std::to_string(list->size()) + " values: must have " + std::to_string(experts) +
                        ", one for each expert");
    }
    std::vector<double>& values = biases[record->layer];
    check_cells(
        cells += static_cast<std::int64_t>(logged.applied.size()) - static_cast<std::int64_t>(values.size()),
        path);
    // In shadow what is logged as applied was never in force.
    const bool shadow = std::ranges::find(logged.reasons, name_of(Reason::kShadow)) != logged.reasons.end();
    values = (deployed || shadow) && !logged.deployed.empty() ? logged.deployed : logged.applied;
  }
  if (biases.empty()) fail(path, "holds no biases of single experts (log.per_expert is off?)");
  return biases;
}

/// Whether the file is JSON whose member "format" is that of a file of biases, however it is laid out. Reads no further than
/// it takes to tell, and of a run log, whose first line tells, that line.
class FindsFormat : public nlohmann::json_sax<json> {
 public:
  bool biases = false;

  bool null() override { return other(); }
  bool boolean(bool) override { return other(); }
  bool number_integer(number_integer_t) override { return other(); }
  bool number_unsigned(number_unsigned_t) override { return other(); }
  bool number_float(number_float_t, const string_t&) override { return other(); }
  bool binary(binary_t&) override { return other(); }
  bool string(string_t& text) override {
    biases = is_format_ && text == "moectl-biases";
    return other();
  }
  bool key(string_t& name) override {
    is_format_ = levels_ == 1 && name == "format";
    return true;
  }
  bool start_object(std::size_t) override {
    ++levels_;
    return other();
  }
  bool start_array(std::size_t) override { return levels_++ > 0 && other(); }
  bool end_object() override { return leave(); }
  bool end_array() override { return leave(); }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception&) override {
    return false;
  }

 private:
  bool other() const { return !is_format_; }
  bool leave() {
    --levels_;
    return true;
  }
  std::size_t levels_ = 0;
  bool is_format_ = false;  // the value of "format" comes next
};

bool is_file_of_biases(std::ifstream& file) {
  file.clear();
  file.seekg(0);
  // No token is longer than a file of biases may be.
  const auto most = static_cast<std::ptrdiff_t>(std::min(bytes_left(file), kLargestJson));
  using Characters = std::counted_iterator<std::istreambuf_iterator<char>>;
  FindsFormat found;
  json::sax_parse(Characters(std::istreambuf_iterator<char>(file), most), Characters({}, 0), &found,
                  nlohmann::detail::input_format_t::json, false);
  return found.biases;
}

LayerBiases read_any(const std::string& path, const BiasSource& source) {
  std::ifstream file(path, std::ios::binary);
  if (!file.is_open()) fail(path, "cannot be opened");
  char start[64] = {};
  file.read(start, sizeof start);
  std::string_view begin(start, static_cast<std::size_t>(file.gcount()));
  if (begin.starts_with("moectlst")) return from_state(path, source.deployed);
  if (begin.starts_with("\x93NUMPY")) return from_npy(path, source.first_layer);
  if (begin.size() > 8 && begin[8] == '{' && begin[7] == '\0') return from_safetensors(path, source.tensor);
  if (is_file_of_biases(file)) return read_biases(path);
  if (begin.starts_with("\xef\xbb\xbf")) begin.remove_prefix(3);  // what a text editor may put in front
  const std::size_t first = begin.find_first_not_of(" \t\r\n");
  if (first == std::string_view::npos || begin[first] != '[') return from_log(path, source.deployed);
  file.clear();
  file.seekg(0);
  const std::optional<std::string> text = read_up_to(file, kLargestJson);
  if (!text) fail(path, "must be at most " + std::to_string(kLargestJson) + " bytes");
  if (nests_deeper(*text, kMostLevels))
    fail(path, "nested deeper than " + std::to_string(kMostLevels) + " levels");
  if (const std::int64_t values = values_in(*text); values > kMostJsonValues)
    fail(path, std::to_string(values) + " values: must be at most " + std::to_string(kMostJsonValues));
  const json all = json::parse(*text, nullptr, false);
  if (all.is_discarded()) fail(path, "not JSON");
  return from_json(path, all, source.first_layer);
}

/// Whatever wrote them, biases are numbers that a router can add and that a file of biases can hold.
void check(const LayerBiases& biases, const std::string& path) {
  if (biases.empty()) fail(path, "holds no biases");
  for (const auto& [layer, values] : biases) {
    const std::string place = "layer " + std::to_string(layer);
    if (values.empty()) fail(path, place + ": holds no biases: must have one for each expert");
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (values[i] >= StateIo::kFinite.least && values[i] <= StateIo::kFinite.most) continue;
      fail(path, place + ", expert " + std::to_string(i) + ": " + exact(values[i]) +
                     ": must be a number from -1e100 to 1e100");
    }
  }
}

}  // namespace

LayerBiases biases_in(const std::string& path, const BiasSource& source) {
  if (!source.tensor.empty() && source.tensor.find("{}") == std::string::npos) {
    throw ImportError("--tensor: " + source.tensor + ": must hold {} in place of the layer's number");
  }
  try {
    LayerBiases biases = read_any(path, source);
    check(biases, path);
    return biases;
  } catch (const ImportError&) {
    throw;
  } catch (const std::exception& error) {
    const std::string what = error.what();
    if (what.starts_with(path)) throw ImportError(what);  // perhaps with a line
    fail(path, what);
  }
}

}  // namespace moectl
