#include "cli/metrics_screen.h"

#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "cli/intervals.h"
#include "cli/parts.h"
#include "export/step_sample.h"
#include "log/reshape.h"
#include "measure/cached_measurer.h"
#include "measure/percentiles.h"
#include "moectl/figures.h"
#include "moectl/health.h"

namespace moectl::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr double kSure = 1.959964;        // standard errors of a 95 % interval
constexpr std::int64_t kFewestSteps = 4;  // for an interval from the scatter of steps

/// A value over its floor, with the interval of the quotient.
struct OverFloor {
  double value = 0, floor = 0;
  std::optional<double> low, high;  ///< In floors.
  double ratio() const { return value / floor; }
};

/// One layer of one group.
struct Row {
  RoutingStats sum;
  MetricsOptions options;
  std::int64_t steps = 0;
  BlockMeans cv, max_vio, floor_cv, floor_max_vio;
  FloorKind floor = FloorKind::kNone;             ///< Of its steps.
  std::int64_t sampled_steps = 0, sequences = 0;  ///< Steps with a sampling floor, and their sequences.
  std::int64_t without_sequences = 0, records = 0;
};

enum class Verdict { kNoData, kBalanced, kUnsure, kImbalanced };
const char* name_of(Verdict verdict) {
  const char* const names[] = {"no data", "balanced", "unsure", "imbalanced"};
  return names[static_cast<int>(verdict)];
}

struct Judgement {
  OverFloor cv, max_vio;
  std::string floor;
  Verdict verdict = Verdict::kNoData;
  /// In all, where it is not sure yet. Of a window: from where on a CV like this one is surely imbalanced.
  std::optional<double> tokens_to_be_sure;
  bool few_steps = false;  ///< Too few steps for an interval: kFewestSteps are needed.
  std::vector<std::string> dead, cold, hot;
};

/// Experts of the summed counts that are out of line by more than chance.
void name_experts(const Row& row, double floor_cv, Judgement& out) {
  const auto counts = row.sum.counts();
  const auto n = static_cast<double>(counts.size()), sum = static_cast<double>(row.sum.assignments());
  std::vector<std::pair<double, std::size_t>> relative;
  for (std::size_t i = 0; i < counts.size(); ++i) {
    const double target = row.options.targets.empty() ? 1 / n : row.options.targets[i];
    if (target > 0) relative.emplace_back(static_cast<double>(counts[i]) / sum / target, i);
  }
  std::ranges::sort(relative);
  // Single experts scatter by the floor's CV about 1, and the largest of many goes farther: by chance one is named in less
  // than one of forty layers. Upwards counts have the longer tail (Bernstein's inequality).
  const double z_sq = 2 * std::log(40 * n), dead = 0.01;
  const double chance = std::sqrt(z_sq) * floor_cv, chance_up = chance + z_sq * floor_cv * floor_cv / 3;
  const auto name = [](const auto& entry) {
    return "e" + std::to_string(entry.second) + " x" + moectl::brief(entry.first, 2);
  };
  for (const auto& entry : relative) {
    if (entry.first >= 1 - chance) break;
    if (entry.first < dead) {
      out.dead.push_back("e" + std::to_string(entry.second));
    } else if (entry.first < row.options.cold_fraction) {
      out.cold.push_back(name(entry));
    }
  }
  for (auto entry = relative.rbegin();
       entry != relative.rend() && entry->first > std::max(row.options.capacity_factor, 1 + chance_up);
       ++entry)
    out.hot.push_back(name(*entry));
}

Judgement judge(const Row& row, bool sum) {
  Judgement out;
  if (row.sum.assignments() <= 0 || row.floor_cv.empty()) return out;
  const Metrics of_sum = measure(row.sum, row.options);
  const FloorInForce sum_floor = floor_of(of_sum);
  if (!of_sum.load_cv || !of_sum.max_vio || !sum_floor.cv || !sum_floor.max_vio || !(*sum_floor.cv > 0))
    return out;
  const auto tokens = static_cast<double>(row.sum.tokens());
  const double n = row.sum.experts();
  out.floor = name_of(row.floor);
  name_experts(row, *sum_floor.cv, out);
  // The relative variance of the square of a sampling floor, which J sequences tell: that of a χ² with (N-1)(J-1) degrees of
  // freedom.
  const bool window = sum || row.steps == 1;
  const double sequences =
      (window ? sum_floor.sampling : row.sampled_steps > 0)
          ? static_cast<double>(window ? row.sum.scalar(RoutingStats::kSequences) : row.sequences)
          : HUGE_VAL;
  const double apart = sequences - (window ? 1 : static_cast<double>(row.sampled_steps));
  const double unsure_floor = apart > 0 ? 2 / ((n - 1) * apart) : HUGE_VAL;
  const auto of_floor = [&](const OverFloor& x) { return x.ratio() * std::sqrt(unsure_floor) / 2; };
  if (window) {
    out.floor = std::string(sum_floor.name());
    out.cv = {*of_sum.load_cv, *sum_floor.cv, {}, {}};
    out.max_vio = {*of_sum.max_vio, *sum_floor.max_vio, {}, {}};
    // (N-1) CV²/floor² is a χ² with N-1 degrees of freedom, with an offset where there is imbalance.
    const double square = out.cv.ratio() * out.cv.ratio();
    const double half =
        kSure * std::sqrt((2 + 4 * std::max(0.0, square - 1)) / (n - 1) + square * square * unsure_floor);
    out.cv.low = std::sqrt(std::max(0.0, square - half));
    out.cv.high = std::sqrt(square + half);
    // The most loaded expert is known to its own standard error, that of a count; which one it is was chosen by its count, so
    // that this bounds its excess from below alone.
    const double own = *sum_floor.cv * std::sqrt(1 + out.max_vio.value) / out.max_vio.floor;
    out.max_vio.low = std::max(0.0, out.max_vio.ratio() - kSure * std::hypot(own, of_floor(out.max_vio)));
  } else {
    const auto over = [&](const BlockMeans& value, const BlockMeans& floor) {
      const Estimate v = value.estimate();
      OverFloor result{v.mean, floor.estimate().mean, {}, {}};
      if (!v.low || !v.high) return result;
      const double half = std::hypot((*v.high - v.mean) / result.floor, kSure * of_floor(result));
      result.low = std::max(0.0, result.ratio() - half);
      result.high = result.ratio() + half;
      return result;
    };
    out.cv = over(row.cv, row.floor_cv);
    out.max_vio = over(row.max_vio, row.floor_max_vio);
  }
  // No verdict without an interval. That of a sum is the CV's; its MaxVio has a lower end alone and must agree by its value.
  const auto beyond = [](const OverFloor& x) { return x.low && *x.low > kBalancedFloors; };
  out.few_steps = !out.cv.low;
  if (beyond(out.cv) || beyond(out.max_vio)) {
    out.verdict = Verdict::kImbalanced;
  } else if (out.cv.high && *out.cv.high <= kBalancedFloors &&
             out.max_vio.high.value_or(out.max_vio.ratio()) <= kBalancedFloors) {
    out.verdict = Verdict::kBalanced;
  } else {
    out.verdict = Verdict::kUnsure;
  }
  if (out.few_steps) {
    out.tokens_to_be_sure = tokens * static_cast<double>(kFewestSteps) / static_cast<double>(row.steps);
  } else if (window) {
    // The floor falls with the root of the tokens, and is known the better the more sequences there are; this CV would stay.
    const double square = out.cv.ratio() * out.cv.ratio(), bound = kBalancedFloors * kBalancedFloors;
    const auto is_sure = [&](double times) {
      const double u = square * times;
      const double half =
          kSure * std::sqrt((2 + 4 * std::max(0.0, u - 1)) / (n - 1) + u * u * unsure_floor / times);
      return u - half > bound;
    };
    double times = 1;
    while (times < 1e9 && !is_sure(times)) times *= 1.001;
    if (is_sure(times) && (sum ? out.verdict != Verdict::kImbalanced : out.verdict == Verdict::kUnsure))
      out.tokens_to_be_sure = tokens * times;
  } else if (out.verdict == Verdict::kUnsure) {
    double times = 1;
    for (const OverFloor& x : {out.cv, out.max_vio}) {
      const double away = std::max(0.02, std::abs(x.ratio() - kBalancedFloors));
      if (x.high) times = std::max(times, std::pow((*x.high - x.ratio()) / away, 2));
    }
    out.tokens_to_be_sure = times * tokens;
  }
  return out;
}

std::string joined(const std::vector<std::string>& names, std::size_t most) {
  if (names.empty()) return "-";
  std::string text;
  for (std::size_t i = 0; i < std::min(most, names.size()); ++i) text += (i ? " " : "") + names[i];
  return text + (names.size() > most ? " +" + std::to_string(names.size() - most) : "");
}

std::string percent(double value) {
  return moectl::brief(100 * value, 3) + " %";
}
std::string floors_text(const OverFloor& x) {
  std::string text = moectl::brief(x.ratio(), 3);
  const int digits = x.ratio() < 10 ? 2 : 3;
  if (x.low && x.high)
    text += " [" + moectl::brief(*x.low, digits) + ", " + moectl::brief(*x.high, digits) + "]";
  return text;
}

/// "dead e7; cold e6 x0.02; hot e0 x16 e3 x2.1 +4", or nothing.
std::string out_of_line(const Judgement& j) {
  constexpr std::size_t kNames = 2;
  std::string text;
  for (const auto& [kind, names] : {std::pair("dead ", &j.dead), {"cold ", &j.cold}, {"hot ", &j.hot}}) {
    if (!names->empty()) text += (text.empty() ? "" : "; ") + (kind + joined(*names, kNames));
  }
  return text;
}

/// Lines of at most 80 columns, broken at blanks.
std::string wrapped(const std::string& text) {
  std::string out;
  std::size_t begin = 0;
  while (begin < text.size()) {
    constexpr std::size_t kColumns = 80;
    std::size_t end = std::min(text.find('\n', begin), text.size());
    if (end - begin > kColumns) {
      const std::size_t blank = text.rfind(' ', begin + kColumns);
      end = blank == std::string::npos || blank <= begin ? text.find_first_of(" \n", begin) : blank;
      end = std::min(end, text.size());
    }
    out += text.substr(begin, end - begin) + '\n';
    begin = end + 1;
  }
  return out;
}

std::string number_of(std::size_t count, const char* what) {
  return std::to_string(count) + ' ' + what + (count == 1 ? "" : "s");
}

Json json_of(const OverFloor& x) {
  const auto json = [](const std::optional<double>& value) { return value ? Json(*value) : Json(); };
  return {{"value", x.value},
          {"floor", x.floor},
          {"over_floor", x.ratio()},
          {"low", json(x.low)},
          {"high", json(x.high)}};
}

std::string rounded(double tokens) {
  const double unit = std::pow(10, std::max(0.0, std::floor(std::log10(std::max(1.0, tokens))) - 1));
  return std::to_string(static_cast<std::int64_t>(std::ceil(tokens / unit) * unit));
}

}  // namespace

int print_screen(LogReader& reader, Counted& counted,
                 const std::function<MetricsOptions(const LogRecord&)>& options_of,
                 const ScreenOptions& options) {
  std::map<std::pair<int, std::string>, Row> rows;
  CachedMeasurer measurer;
  std::set<std::string> other_tags;
  const auto add = [&](int layer, const std::string& group, const RoutingStats& stats,
                       const MetricsOptions& how) {
    Row& row = rows[{layer, group}];
    const bool is_new = row.sum.experts() == 0;
    if (stats.tokens() > 0) {
      ++row.records;
      row.without_sequences += !stats.has_sequences();
    }
    StatsNeeds needs;
    needs.sequences = stats.has_sequences() && (is_new || row.sum.shape().needs.sequences);
    row.options = how;
    if (is_new) {
      row.sum = reshaped(stats, {}, needs, {});
    } else {
      if (row.sum.experts() != stats.experts() || row.sum.top_k() != stats.top_k())
        throw InputError("layer " + std::to_string(layer) +
                         ": experts and top_k must not change within a trace");
      row.sum = reshaped(row.sum, {}, needs, {});
      row.sum += reshaped(stats, {}, needs, {});
      require_range(row.sum, layer, "the records of the trace");
    }
    const Metrics metrics = measurer.measure(stats, how);
    const FloorInForce floor = floor_of(metrics);
    if (!metrics.load_cv || !metrics.max_vio || !floor.cv || !floor.max_vio) return;
    ++row.steps;
    const auto tokens = static_cast<double>(stats.tokens());
    row.cv.add(*metrics.load_cv, tokens);
    row.max_vio.add(*metrics.max_vio, tokens);
    row.floor_cv.add(*floor.cv, tokens);
    row.floor_max_vio.add(*floor.max_vio, tokens);
    row.floor = joined(row.floor, floor.sampling ? FloorKind::kSampling : FloorKind::kNoise);
    if (!floor.sampling) return;
    ++row.sampled_steps;
    row.sequences += stats.scalar(RoutingStats::kSequences);
  };
  // Parts of a step are one sample of the whole, or of their rank.
  WholeRecords whole = whole_records(reader, options.by == "rank");
  const bool joins = options.by != "tag";
  while (const auto record = joins ? whole.next() : reader.next()) {
    if (!counted.has_counts(*record)) continue;
    const MetricsOptions how = options_of(*record);
    if (options.by == "domain") {
      for (std::size_t d = 0; d < record->domains.size() && record->tag == "train"; ++d) {
        const auto domain = static_cast<int>(d);
        RoutingStats stats({.experts = record->stats.experts(), .top_k = record->stats.top_k(), .needs = {}});
        stats.add_counts(record->stats.domain_counts(domain), record->stats.domain_tokens(domain));
        add(record->layer, record->domains[d], stats, how);
      }
      continue;
    }
    if (options.by == "rank" && !parts_of(record->tag).rank) continue;
    if (options.by.empty() && record->tag != "train") other_tags.insert(record->tag);
    // Without --by: the training records.
    if (options.by.empty() && record->tag != "train") continue;
    add(record->layer, options.by.empty() ? "" : record->tag, record->stats, how);
  }
  if (rows.empty()) {
    std::string why = options.by == "domain" ? "no record has domain_counts"
                      : options.by == "rank"
                          ? "no record has a tag rank0, rank1, ...: `moectl import --by rank` writes them"
                          : "no record of a layer tagged 'train' has counts";
    if (!other_tags.empty()) why += "; there are others: --by tag";
    counted.fail(why);
  }
  const std::string group = options.by.empty() ? "" : options.by;
  std::vector<std::string> header = {"layer"};
  if (!group.empty()) header.push_back(group);
  for (const char* name : {"CV", "x floor", "MaxVio", "x floor", "verdict"}) header.emplace_back(name);
  header.emplace_back(options.sum ? "imbalanced from" : "sure at");
  struct Line {
    Verdict verdict;
    double worst;
    std::vector<std::string> cells;
    std::string out_of_line;
  };
  std::vector<Line> lines;
  std::vector<double> cvs, max_vios;  // of the rows, in floors
  std::int64_t with_few_steps = 0;
  Json list = Json::array();
  std::map<Verdict, std::vector<std::string>> by_verdict;
  std::set<std::string> floors;
  std::int64_t steps = 0;
  double tokens = 0;
  std::vector<std::string> shapes;  // of the layers
  for (const auto& [key, row] : rows) {
    const Judgement j = judge(row, options.sum);
    steps = std::max(steps, row.steps);
    tokens = std::max(tokens, static_cast<double>(row.sum.tokens()));
    const std::string shape =
        std::to_string(row.sum.experts()) + " experts, top-" + std::to_string(row.sum.top_k());
    if (std::ranges::find(shapes, shape) == shapes.end()) shapes.push_back(shape);
    const std::string name = std::to_string(key.first) + (group.empty() ? "" : " " + printable(key.second));
    by_verdict[j.verdict].push_back(name);
    if (j.verdict != Verdict::kNoData) floors.insert(j.floor);
    const bool known = j.verdict != Verdict::kNoData;
    std::vector<std::string> cells = {std::to_string(key.first)};
    if (!group.empty()) cells.push_back(key.second);
    for (const std::string& cell : {known ? percent(j.cv.value) : "-", known ? floors_text(j.cv) : "-",
                                    known ? moectl::brief(j.max_vio.value, 3) : "-",
                                    known ? floors_text(j.max_vio) : "-", std::string(name_of(j.verdict)),
                                    j.tokens_to_be_sure ? rounded(*j.tokens_to_be_sure) + " tokens"
                                                        : std::string(options.sum || !known ? "-" : "now")}) {
      cells.push_back(cell);
    }
    const std::string experts = out_of_line(j);
    lines.push_back({j.verdict, known ? std::max(j.cv.ratio(), j.max_vio.ratio()) : 0, std::move(cells),
                     experts.empty() ? "" : name + ": " + experts});
    if (known) {
      cvs.push_back(j.cv.ratio());
      max_vios.push_back(j.max_vio.ratio());
      with_few_steps += j.few_steps;
    }
    Json entry = {{"layer", key.first}};
    if (!group.empty()) entry[group] = key.second;
    entry["steps"] = row.steps;
    entry["tokens"] = row.sum.tokens();
    entry["verdict"] = name_of(j.verdict);
    entry["floor"] = known ? Json(j.floor) : Json();
    entry["load_cv"] = known ? json_of(j.cv) : Json();
    entry["max_vio"] = known ? json_of(j.max_vio) : Json();
    entry["dead"] = j.dead;
    entry["cold"] = j.cold;
    entry["hot"] = j.hot;
    entry["tokens_to_be_sure"] = j.tokens_to_be_sure ? Json(std::ceil(*j.tokens_to_be_sure)) : Json();
    entry["steps_needed"] = known && j.few_steps ? Json(kFewestSteps) : Json();
    list.push_back(entry);
  }
  if (options.json) {
    for (const Json& entry : list) std::cout << json_text(entry) << '\n';
    return 0;
  }
  const auto names = [&](Verdict verdict) { return joined(by_verdict[verdict], 4); };
  // The worst first: imbalanced, unsure, balanced, without data; of each the one that is most floors away.
  const std::size_t shown = options.all ? lines.size() : std::min(lines.size(), kScreenRows);
  if (!options.all) {
    std::ranges::stable_sort(lines, [](const Line& a, const Line& b) {
      return a.verdict != b.verdict ? a.verdict > b.verdict : a.worst > b.worst;
    });
  }
  Table table(header);
  std::vector<std::string> experts;
  for (std::size_t i = 0; i < shown; ++i) {
    table.add(std::move(lines[i].cells));
    if (!lines[i].out_of_line.empty()) experts.push_back(lines[i].out_of_line);
  }
  std::string all_shapes;
  for (const std::string& shape : shapes) all_shapes += (all_shapes.empty() ? "" : " and ") + shape;
  std::cout << number_of(rows.size(), group.empty() ? "layer" : "row") << ", " << all_shapes << ", "
            << number_of(static_cast<std::size_t>(steps), "step") << ", "
            << std::to_string(static_cast<std::int64_t>(tokens)) << " tokens a layer; "
            << (options.sum  ? "counts summed over the steps"
                : steps == 1 ? "one window"
                             : "means over steps,\nwith 95 % intervals")
            << "\n\n"
            << table.text();
  if (shown < lines.size()) {
    std::cout << "... the worst " << shown << " of " << lines.size() << "; --all shows the other "
              << lines.size() - shown << ", in order\n";
  }
  std::cout << '\n';
  if (!experts.empty()) {
    const std::size_t named = options.all ? experts.size() : std::min(experts.size(), kScreenNames);
    std::cout << "Experts out of line (load, as a multiple of the share), layer by layer:\n";
    for (std::size_t i = 0; i < named; ++i) std::cout << "  " << experts[i] << '\n';
    if (named < experts.size())
      std::cout << "  ... and in " << experts.size() - named << " more of these layers\n";
    std::cout << '\n';
  }
  std::ostringstream say;
  if (cvs.size() > 1) {
    const auto spread = [](std::vector<double>& values) {
      Percentiles percentiles(values);
      std::string text;
      for (const auto& [name, share] : {std::pair("p5", 0.05), {"p50", 0.5}, {"p95", 0.95}})
        text +=
            std::string(text.empty() ? "" : ", ") + name + ' ' + moectl::brief(percentiles.next(share), 3);
      return text;
    };
    say << "Over " << (group.empty() ? "layers" : "rows") << ", x floor: CV " << spread(cvs) << "; MaxVio "
        << spread(max_vios) << ".\n";
  }
  const bool noise = floors.count("noise floor") > 0;
  // The sampling floor of a sum needs the sequences of all its tokens.
  std::int64_t lacking = 0, of_records = 0;
  for (const auto& [key, row] : rows) {
    if (row.without_sequences == row.records) continue;
    lacking += row.without_sequences;
    of_records += row.without_sequences > 0 ? row.records : 0;
  }
  if (!by_verdict[Verdict::kImbalanced].empty()) {
    say << "IMBALANCED: layers " << names(Verdict::kImbalanced) << " stand beyond " << kBalancedFloors
        << " floors.\n`moectl check` and policies/adaptive_bias.yaml show how a controller is set up.\n";
  }
  if (!by_verdict[Verdict::kUnsure].empty()) {
    say << "UNSURE: layers " << names(Verdict::kUnsure) << ": ";
    if (with_few_steps > 0) {
      say << "too few steps for an interval: at least " << kFewestSteps
          << " are needed; --sum judges the counts of all steps together.\n";
    } else {
      say << "the interval holds " << kBalancedFloors << " floors; more tokens decide (" << header.back()
          << ").\n";
    }
  }
  if (!by_verdict[Verdict::kBalanced].empty()) {
    say << (by_verdict[Verdict::kImbalanced].empty() && by_verdict[Verdict::kUnsure].empty() ? "BALANCED: "
                                                                                             : "Balanced: ")
        << "layers " << names(Verdict::kBalanced) << " are as even as chance allows (at most "
        << kBalancedFloors << " floors).\n";
  }
  if (!by_verdict[Verdict::kNoData].empty()) say << "No data: layers " << names(Verdict::kNoData) << ".\n";
  for (const std::string& floor : floors)
    say << "x floor: over the " << floor << ", what balanced routing of as many tokens shows. ";
  say << '\n';
  if (lacking > 0) {
    say << lacking << " of " << of_records << " records have no sequences"
        << (options.sum ? ": the sum of their layers has the noise floor alone.\n"
                        : ": those steps have the noise floor.\n");
  }
  if (noise)
    say << "The noise floor takes tokens as independent. Tokens of a text are alike: with sequences in "
           "the trace the higher sampling floor is known.\n";
  if (!other_tags.empty()) say << "Records of other tags are left out: --by tag.\n";
  std::cout << wrapped(say.str());
  return 0;
}

}  // namespace moectl::cli
