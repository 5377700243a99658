// moectl placement TRACE: copies of experts on devices, planned on the first part of a trace and judged on the rest.
#include "moectl/placement.h"

#include <algorithm>
#include <fstream>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <utility>

#include "base/input_limits.h"
#include "cli/intervals.h"
#include "cli/parts.h"
#include "cli/placement_svg.h"
#include "cli/tool.h"

namespace moectl::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string trace, format, svg, tag = "train";
  PlacementOptions placement;
  double train = 0.5, min_gain = 0.02;
  FaultPolicy fault_policy = FaultPolicy::kRepair;
};

/// Rows of N loads by step. Long traces are kept at half the resolution, again and again: memory stays bounded.
struct History {
  int experts = 0;
  std::vector<float> rows;
  std::size_t steps() const { return experts > 0 ? rows.size() / static_cast<std::size_t>(experts) : 0; }
  std::vector<double> step(std::size_t s) const {
    const auto n = static_cast<std::size_t>(experts);
    return {rows.begin() + static_cast<std::ptrdiff_t>(s * n),
            rows.begin() + static_cast<std::ptrdiff_t>((s + 1) * n)};
  }
};

constexpr std::size_t kMostSteps = 4096;

class Histories {
 public:
  void add(const LogRecord& record) {
    History& history = layers_[record.layer];
    const auto counts = record.stats.counts();
    if (history.experts == 0) history.experts = record.stats.experts();
    if (history.experts != record.stats.experts()) {
      throw InputError("layer " + std::to_string(record.layer) + ": " +
                       std::to_string(record.stats.experts()) + " experts after " +
                       std::to_string(history.experts) + ": a layer must keep its number");
    }
    std::vector<double>& joined = joined_[record.layer];
    joined.resize(counts.size());
    for (std::size_t i = 0; i < counts.size(); ++i) joined[i] += static_cast<double>(counts[i]);
    int& held = held_[record.layer];
    if (++held < step_) return;
    history.rows.insert(history.rows.end(), joined.begin(), joined.end());
    std::ranges::fill(joined, 0.0);
    held = 0;
    if (history.steps() == kMostSteps) halve();
  }
  const std::map<int, History>& layers() const { return layers_; }
  int joined_steps() const { return step_; }

 private:
  void halve() {
    step_ *= 2;
    for (auto& [layer, history] : layers_) {
      const auto n = static_cast<std::size_t>(history.experts);
      const std::size_t half = history.steps() / 2;
      for (std::size_t s = 0; s < half; ++s) {
        for (std::size_t i = 0; i < n; ++i)
          history.rows[s * n + i] = history.rows[2 * s * n + i] + history.rows[(2 * s + 1) * n + i];
      }
      history.rows.resize(half * n);
    }
  }
  std::map<int, History> layers_;
  std::map<int, std::vector<double>> joined_;
  std::map<int, int> held_;
  int step_ = 1;
};

/// Sums of steps [from, to) in at most 32 rows.
std::vector<double> rows_of(const History& history, std::size_t from, std::size_t to) {
  const auto n = static_cast<std::size_t>(history.experts);
  const std::size_t rows = std::min<std::size_t>(32, to - from);
  std::vector<double> sums(rows * n, 0.0);
  for (std::size_t s = from; s < to; ++s) {
    const std::size_t r = (s - from) * rows / (to - from);
    for (std::size_t i = 0; i < n; ++i) sums[r * n + i] += static_cast<double>(history.rows[s * n + i]);
  }
  return sums;
}

/// Shares of single steps, spread over [0, to).
std::vector<double> samples_of(const History& history, std::size_t to) {
  const std::size_t rows = std::min<std::size_t>(128, to);
  std::vector<double> samples;
  for (std::size_t r = 0; r < rows; ++r) {
    const std::vector<double> step = history.step(r * to / rows);
    double sum = 0;
    for (const double load : step) sum += load;
    for (const double load : step) samples.push_back(sum > 0 ? load / sum : 0);
  }
  return samples;
}

/// Slots whose expert is on their device already.
int repeats_in(const Placement& placement) {
  const auto room = placement.experts.size() / static_cast<std::size_t>(placement.devices);
  int repeats = 0;
  for (auto from = placement.experts.begin(); from != placement.experts.end();
       from += static_cast<std::ptrdiff_t>(room)) {
    const std::set<int> held(from, from + static_cast<std::ptrdiff_t>(room));
    repeats += static_cast<int>(room - held.size());
  }
  return repeats;
}

struct Judged {
  int layer = 0, moves = 0;
  bool kept =
      false;  // --max-moves: no plan was found that beats the experts where they are on the steps planned on
  Placement today, start, plan;
  std::vector<double> later;  // loads of the steps that the plan has not seen
  BlockMeans linear, planned, hindsight, gain;
};

/// Plans on the first part, judges on the rest.
Judged judge(int layer, const History& history, const Options& options) {
  const std::size_t steps = history.steps();
  const auto split = std::clamp<std::size_t>(
      static_cast<std::size_t>(options.train * static_cast<double>(steps)), 1, steps - 1);
  const Placement start = single_placement(history.experts, options.placement);
  // Free slots are no reason to fill them with the first experts: what the plan has to beat has one copy of each, if it can.
  PlacementOptions single = options.placement;
  if (history.experts % single.devices == 0) single.slots = history.experts;
  const Placement today = linear_placement(history.experts, single);
  Judged judged;
  judged.layer = layer;
  const bool free = options.placement.max_moves < 0;
  const std::vector<double> samples = samples_of(history, split);
  judged.plan =
      plan_placement(forecast_loads(rows_of(history, 0, split), history.experts), options.placement, samples);
  if (free) judged.plan = renamed_for(judged.plan, start, options.placement.nodes);
  // A few moves may lower the mean of single steps while they lower the load of all steps together.
  const auto mean_of = [&](const Placement& placement) {
    const auto n = static_cast<std::size_t>(history.experts);
    double sum = 0;
    for (std::size_t at = 0; at < samples.size(); at += n) sum += balancedness(placement, {&samples[at], n});
    return sum;
  };
  // The later steps have no say in what is written: they judge it. Free slots hold repeats, which the plan may have to avoid.
  const bool may_stay = options.placement.repeats || repeats_in(start) == 0;
  judged.kept = !free && may_stay && mean_of(judged.plan) <= mean_of(start);
  if (judged.kept) judged.plan = start;
  // The same planner in hindsight, given what came: its mean, without any forecast.
  std::vector<double> later(static_cast<std::size_t>(history.experts), 0.0);
  const auto rows = rows_of(history, split, steps);
  for (std::size_t i = 0; i < rows.size(); ++i) later[i % later.size()] += rows[i];
  judged.today = today;
  judged.start = start;
  judged.later = later;
  const Placement hindsight = plan_placement(later, options.placement, samples);
  for (std::size_t s = split; s < steps; ++s) {
    const std::vector<double> loads = history.step(s);
    double tokens = 0;
    for (const double load : loads) tokens += load;
    const double before = balancedness(today, loads),
                 after = judged.kept ? before : balancedness(judged.plan, loads);
    judged.linear.add(before, tokens);
    judged.planned.add(after, tokens);
    judged.hindsight.add(balancedness(hindsight, loads), tokens);
    judged.gain.add(after - before, tokens);
  }
  judged.moves = moves_between(start, judged.plan);
  return judged;
}

/// What is to be loaded where: experts that a device does not hold yet.
Json loads_of(const Judged& layer) {
  Json list = Json::array();
  const auto room = [](const Placement& p) { return p.experts.size() / static_cast<std::size_t>(p.devices); };
  for (std::size_t d = 0; d < static_cast<std::size_t>(layer.plan.devices); ++d) {
    const auto from = layer.start.experts.begin() + static_cast<std::ptrdiff_t>(d * room(layer.start));
    std::set<int> held(from, from + static_cast<std::ptrdiff_t>(room(layer.start)));
    for (std::size_t s = d * room(layer.plan); s < (d + 1) * room(layer.plan); ++s) {
      if (held.insert(layer.plan.experts[s]).second)
        list.push_back({{"device", d}, {"expert", layer.plan.experts[s]}});
    }
  }
  return list;
}

enum class Verdict { kWorth, kNotWorth };
/// A gain that may be chance is none.
Verdict verdict_of(const Estimate& gain, double least) {
  return gain.mean >= least && gain.low && *gain.low > 0 ? Verdict::kWorth : Verdict::kNotWorth;
}
const char* name_of(Verdict verdict) {
  return verdict == Verdict::kWorth ? "worth" : "not worth";
}

std::string digits(double value) {
  return fixed(value, 3);
}
std::string range(const Estimate& e) {
  return e.low ? '[' + digits(*e.low) + ", " + digits(*e.high) + ']' : "-";
}

Json json_of(const Estimate& e) {
  return {
      {"mean", e.mean}, {"low", e.low ? Json(*e.low) : Json()}, {"high", e.high ? Json(*e.high) : Json()}};
}

/// The layers that gain most come first.
void write_svg(const std::vector<Judged>& layers, const std::string& path) {
  std::vector<DrawnLayer> drawn;
  drawn.reserve(layers.size());
  for (const Judged& layer : layers) {
    drawn.push_back({layer.layer, layer.today, layer.plan, layer.start, layer.later,
                     layer.linear.estimate().mean, layer.planned.estimate().mean});
  }
  if (drawn.size() > kMostDrawn) {
    std::ranges::stable_sort(drawn, std::greater<>(),
                             [](const DrawnLayer& d) { return d.balanced_plan - d.balanced_today; });
  }
  std::ofstream file(path, std::ios::binary);
  file << placement_svg(drawn);
  file.close();
  if (!file) throw InputError("--svg: " + path + ": cannot be written");
}

/// The numbers between those of the layers, and before the first, as "0 to 5, 7, 8"; cut where they are many.
std::string missing_layers(const std::vector<Judged>& layers) {
  constexpr int kMostShown = 16;
  std::string text;
  int next = 0, ranges = 0;
  for (const Judged& layer : layers) {
    const int first = std::exchange(next, layer.layer + 1), last = layer.layer - 1;
    if (first > last || ++ranges > kMostShown) continue;
    const bool few = last < first + 3;
    for (int number = first; number <= (few ? last : first); ++number)
      text += (text.empty() ? "" : ", ") + std::to_string(number);
    if (!few) text += " to " + std::to_string(last);
  }
  if (ranges > kMostShown) text += " and " + std::to_string(ranges - kMostShown) + " more gaps";
  return text;
}

/// The file that SGLang's --init-expert-location takes: a row for each layer of the model from 0 on, and no other key. Layers that
/// the trace lacks (dense ones) stay in order.
Json sglang_map(const std::vector<Judged>& layers, const PlacementOptions& options) {
  // Before the rows of the layers between take memory: a trace may number its layers as it likes.
  const std::size_t slots = layers[0].plan.experts.size();
  const std::int64_t most = std::min(kMostLayers, kMostLayersTimesExperts / static_cast<std::int64_t>(slots));
  if (const int last = layers.back().layer; last >= most)
    throw InputError("--format: sglang: layer " + std::to_string(last) + ": must be below " +
                     std::to_string(most) + " with " + std::to_string(slots) +
                     " slots: the file has a row for each layer from 0 on");
  Json rows = Json::array();
  for (const Judged& layer : layers) {
    if (layer.plan.experts.size() != slots)
      throw InputError("--format: sglang: layers " + std::to_string(layers[0].layer) + " and " +
                       std::to_string(layer.layer) + " have different numbers of slots: SGLang knows one");
    const int experts = 1 + std::ranges::max(layer.start.experts);
    for (auto missing = static_cast<int>(rows.size()); missing < layer.layer; ++missing) {
      rows.push_back(linear_placement(experts, options).experts);
    }
    rows.push_back(layer.plan.experts);
  }
  std::cerr << rows.size() << " layers, numbered as in the trace";
  const std::string in_order = missing_layers(layers);
  if (!in_order.empty()) std::cerr << "; not in the trace, and so in order: " << in_order;
  std::cerr << ". SGLang wants a row for each hidden layer of the model, and --ep-num-redundant-experts "
            << slots - static_cast<std::size_t>(1 + std::ranges::max(layers[0].start.experts)) << ".\n";
  return {{"physical_to_logical_map", rows}};
}

/// The file that vLLM-Ascend's expert_map_path takes: layers are numbered over MoE layers.
Json ascend_map(const std::vector<Judged>& layers) {
  Json list = Json::array();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const Placement& plan = layers[l].plan;
    const auto room = plan.experts.size() / static_cast<std::size_t>(plan.devices);
    Json devices = Json::array();
    for (int d = 0; d < plan.devices; ++d) {
      const auto from = plan.experts.begin() + static_cast<std::ptrdiff_t>(room) * d;
      devices.push_back(
          {{"device_id", d},
           {"device_expert", std::vector<int>(from, from + static_cast<std::ptrdiff_t>(room))}});
    }
    list.push_back({{"layer_id", l}, {"device_count", plan.devices}, {"device_list", devices}});
  }
  return {{"moe_layer_count", layers.size()}, {"layer_list", list}};
}

int placement(Options options) {
  // vLLM-Ascend maps an expert to one slot of a device (its generate_expert_placement_map): a repeat would be lost, and the device would
  // have fewer experts than the others.
  options.placement.repeats = options.format != "ascend";
  keep_inputs("--svg", options.svg, {options.trace});
  LogReader reader(options.trace, options.fault_policy);
  Histories histories;
  WholeRecords records = whole_records(reader);
  while (const auto record = records.next()) {
    if (record->layer < 0 || record->stats.experts() == 0 || record->tag != options.tag ||
        record->stats.assignments() == 0)
      continue;
    histories.add(*record);
  }
  say_faults(reader, options.trace);
  if (histories.layers().empty())
    throw InputError(shown_path(options.trace) + ": no record tagged '" + options.tag + "' has counts");
  if (histories.joined_steps() > 1) {
    std::cerr << "placement: " << histories.joined_steps()
              << " steps are joined to one: balancedness of single steps is lower\n";
  }
  std::vector<Judged> layers;
  for (const auto& [layer, history] : histories.layers()) {
    if (history.steps() < 2)
      throw InputError("layer " + std::to_string(layer) +
                       ": one step: needs at least 2, to plan on and to judge on");
    try {
      layers.push_back(judge(layer, history, options));
    } catch (const std::invalid_argument& e) {
      std::string text = e.what();
      std::replace(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(text.find(':')), '_', '-');
      if (text.find("an expert twice") != std::string::npos) text += " (--format ascend)";
      throw InputError("--" + text);
    }
  }
  // Layers are judged on the same steps: the total is the mean over layers, its interval that of their mean gain.
  Estimate linear, planned, hindsight, gain;
  double low = 0, high = 0;
  bool ranged = true;
  int moves = 0;
  const auto n = static_cast<double>(layers.size());
  for (const Judged& layer : layers) {
    const Estimate g = layer.gain.estimate();
    linear.mean += layer.linear.estimate().mean / n;
    planned.mean += layer.planned.estimate().mean / n;
    hindsight.mean += layer.hindsight.estimate().mean / n;
    gain.mean += g.mean / n;
    ranged = ranged && g.low;
    // As if layers moved together: an interval that is wide enough whatever they have in common.
    low += g.low.value_or(0) / n;
    high += g.high.value_or(0) / n;
    moves += layer.moves;
  }
  if (ranged) {
    gain.low = low;
    gain.high = high;
  }
  const Verdict verdict = verdict_of(gain, options.min_gain);
  if (!options.svg.empty()) write_svg(layers, options.svg);
  if (options.format == "sglang") {
    std::cout << json_text(sglang_map(layers, options.placement)) << '\n';
  } else if (options.format == "ascend") {
    std::cout << json_text(ascend_map(layers)) << '\n';
  } else if (options.format == "phy2log") {
    Json maps = Json::array(), ids = Json::array();
    for (const Judged& layer : layers) {
      maps.push_back(layer.plan.experts);
      ids.push_back(layer.layer);
    }
    std::cout << json_text(Json{{"layers", ids}, {"phy2log", maps}}) << '\n';
  } else if (options.format == "json") {
    Json list = Json::array();
    for (const Judged& layer : layers) {
      const Estimate g = layer.gain.estimate();
      list.push_back({{"layer", layer.layer},
                      {"linear", json_of(layer.linear.estimate())},
                      {"planned", json_of(layer.planned.estimate())},
                      {"hindsight", json_of(layer.hindsight.estimate())},
                      {"gain", json_of(g)},
                      {"moves", layer.moves},
                      {"loads", loads_of(layer)},
                      {"verdict", name_of(verdict_of(g, options.min_gain))},
                      {"phy2log", layer.plan.experts}});
    }
    std::cout << json_text(Json{{"devices", options.placement.devices},
                                {"nodes", options.placement.nodes},
                                {"slots", layers[0].plan.experts.size()},
                                {"linear", linear.mean},
                                {"planned", planned.mean},
                                {"hindsight", hindsight.mean},
                                {"gain", json_of(gain)},
                                {"moves", moves},
                                {"verdict", name_of(verdict)},
                                {"layers", list}},
                           2)
              << '\n';
  } else {
    Table table({"layer", "linear", "planned", "hindsight", "gain", "95 %", "moves", "verdict"});
    for (const Judged& layer : layers) {
      const Estimate g = layer.gain.estimate();
      table.add({std::to_string(layer.layer), digits(layer.linear.estimate().mean),
                 digits(layer.planned.estimate().mean), digits(layer.hindsight.estimate().mean),
                 digits(g.mean), range(g), std::to_string(layer.moves),
                 name_of(verdict_of(g, options.min_gain))});
    }
    table.add({"mean", digits(linear.mean), digits(planned.mean), digits(hindsight.mean), digits(gain.mean),
               range(gain), std::to_string(moves), name_of(verdict)});
    std::cout
        << table.text() << "\nBalancedness (mean over largest device load) of the steps after the first "
        << brief(100 * options.train)
        << " %, on which the plan was made. hindsight: the same planner, given those steps themselves.\n";
  }
  std::ostream& say = options.format == "table" ? std::cout : std::cerr;
  if (options.placement.max_moves >= 0) {
    int most = 0, kept = 0;
    for (const Judged& layer : layers) {
      most = std::max(most, layer.moves);
      kept += layer.kept || layer.moves == 0;
    }
    say << "At most " << options.placement.max_moves << " moves a layer: " << moves << " in all, " << most
        << " in the layer with the most";
    if (kept > 0)
      say << "; " << kept << " of " << layers.size()
          << " layers stay as they are, since no such plan beats today's placement on the steps planned on";
    say << ".\n";
  }
  // Layers may differ in their experts, and so in why slots hold repeats.
  struct Repeats {
    int slots = 0, layers = 0;
  };
  std::map<std::string, Repeats> causes;
  for (const Judged& layer : layers) {
    const int repeats = repeats_in(layer.plan);
    if (repeats == 0) continue;
    const int experts = histories.layers().at(layer.layer).experts;
    const int room = static_cast<int>(layer.plan.experts.size()) / options.placement.devices;
    Repeats& of =
        causes[room > experts / options.placement.nodes ? "a device has more slots than its node has experts"
               : options.placement.max_moves >= 0
                   ? "free slots, to which nothing moves; --format ascend plans without"
                   : "more even than any plan without that was found; --format ascend plans without"];
    of.slots += repeats;
    ++of.layers;
  }
  for (const auto& [cause, of] : causes) {
    say << of.slots << (of.slots == 1 ? " slot holds" : " slots hold")
        << " an expert that the device has already, in " << of.layers << " of " << layers.size()
        << " layers: " << cause << ".\n";
  }
  const std::string change = digits(linear.mean) + " -> " + digits(planned.mean);
  if (moves == 0) {
    say << "No expert moves: balancedness " << digits(linear.mean) << " on the later steps.\n";
    return 0;
  }
  say << (verdict == Verdict::kWorth ? "Worth its " : "Not worth its ") << moves << " moves: " << change
      << " on steps that the plan has not seen";
  if (verdict == Verdict::kWorth) {
    say << ".\n";
  } else if (gain.mean < options.min_gain) {
    say << ", less than --min-gain " << brief(options.min_gain) << ". Leave the experts where they are.\n";
  } else {
    say << ", which may be chance: the interval " << (gain.low ? range(gain) + " reaches 0" : "is not known")
        << ". A longer trace decides.\n";
  }
  return 0;
}

}  // namespace

void add_placement(CLI::App& app, Tool& tool) {
  CLI::App* command =
      app.add_subcommand("placement", "Plan copies of experts on devices, and say whether moving them pays");
  command->footer(
      "The plan follows the rules of DeepSeek's EPLB, on loads that are forecast from the first part of\n"
      "the trace: recent steps count as far as they predict better, and what is noise is shrunk. It is\n"
      "judged on the rest, against the experts in order (linear), one copy each where the devices\n"
      "divide them. From there moves are counted: experts that a device has to load; devices are\n"
      "renamed so that there are few. With --max-moves a layer for which no plan is more even on the\n"
      "first part stays as it is; the rest never chooses. A plan is worth its moves if its gain is at\n"
      "least --min-gain and too large to be chance.\n\n"
      "Formats: table, json; phy2log: {\"layers\", \"phy2log\"}, rows as EPLB names them; sglang: the file\n"
      "of SGLang's --init-expert-location, whose name must end in .json; ascend: the file of\n"
      "vLLM-Ascend's expert_map_path, with no expert twice on a device, which other plans may have\n"
      "where that is more even. With the last three the verdict goes to standard error.\n\n"
      "Examples:\n"
      "  moectl placement trace.jsonl --devices 8\n"
      "  moectl placement trace.jsonl --devices 8 --slots 72 --svg placement.svg\n"
      "  moectl placement trace.jsonl --devices 32 --nodes 4 --groups 8 --slots 288\n"
      "  moectl placement trace.jsonl --devices 8 --slots 72 --format sglang > placement.json\n"
      "  moectl placement trace.jsonl --devices 8 --slots 72 --max-moves 8 --format ascend > "
      "expert_map.json");
  auto options = std::make_shared<Options>();
  PlacementOptions& plan = options->placement;
  constexpr int kMost = 65536;
  command
      ->add_option(
          "TRACE", options->trace,
          "Trace or run log, plain or gzip; - reads standard input. A line of a trace: " + kTraceLine)
      ->required();
  command->add_option("--devices", plan.devices, "Devices that share the experts of a layer")
      ->required()
      ->check(whole_number(1, 4096));
  command
      ->add_option("--nodes", plan.nodes,
                   "Nodes of the devices; copies of an expert stay on one node. Must divide the groups; 1: a "
                   "global plan")
      ->check(whole_number(1, 4096))
      ->capture_default_str();
  command
      ->add_option("--groups", plan.groups,
                   "Groups of experts that stay on one node (n_group); default: every expert for itself")
      ->check(whole_number(1, kMost));
  command
      ->add_option("--slots", plan.slots,
                   "Copies of experts on all devices together; default: one of each expert")
      ->check(whole_number(1, kMost));
  command
      ->add_option("--max-moves", plan.max_moves,
                   "Experts that devices may have to load in a layer, in global plans; default: any number")
      ->check(whole_number(0, kMost));
  command->add_option("--train", options->train, "Share of the steps on which the plan is made")
      ->check(number_between(0.05, 0.95))
      ->capture_default_str();
  command
      ->add_option("--min-gain", options->min_gain, "Balancedness that a plan must add to be worth its moves")
      ->check(number_from_zero())
      ->capture_default_str();
  command
      ->add_option(
          "--svg", options->svg,
          "Also draw what each device carries on the steps that the plan has not seen, today and as planned, "
          "into this file")
      ->type_name("FILE");
  command->add_option("--tag", options->tag, "Which records")->capture_default_str();
  add_salvage(*command, options->fault_policy);
  add_format(*command, options->format, {"table", "json", "phy2log", "sglang", "ascend"});
  command->callback([&tool, options] { tool.run = [options] { return placement(*options); }; });
}

}  // namespace moectl::cli
