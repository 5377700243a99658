// moectl capacity TRACE: how many assignments a capacity factor would drop, and the factor for a wanted drop rate.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "base/format.h"
#include "cli/intervals.h"
#include "cli/parts.h"
#include "cli/tool.h"

namespace moectl::cli {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string trace, format, tag = "train";
  std::vector<double> factors = {1, 1.1, 1.25, 1.5, 2, 3};
  double drop = 0.01;
  std::int64_t parts = 1;
  FaultPolicy fault_policy = FaultPolicy::kRepair;
};

// The factors that are tried for a wanted rate: in hundredths up to 16, then no further. The largest rate that can be asked for, 99 %,
// needs the first one.
constexpr std::size_t kGrid = 1600;

double grid_factor(std::size_t i) {
  return static_cast<double>(i + 1) / 100;
}

/// E max(0, X - c) for X of the binomial distribution: `trials`, each with `probability` up to ½. c: whole number. Above a mean
/// of kMany, X is taken as normal.
class BinomialExcess {
 public:
  BinomialExcess(double trials, double probability)
      : mean_(trials * probability), sigma_(std::sqrt(mean_ * (1 - probability))) {
    if (mean_ > kMany) return;
    const double odds = probability / (1 - probability);
    const double mode = std::min(trials, std::floor((trials + 1) * probability));
    // From the most probable value to both sides, until nothing is left.
    constexpr double kNothing = 1e-18;
    std::vector<double> below;
    for (double x = mode, p = 1; x > 0;) {
      p *= x / ((trials - x + 1) * odds);
      if (p < kNothing) break;
      below.push_back(p);
      x -= 1;
    }
    first_ = mode - static_cast<double>(below.size());
    excess_.assign(below.rbegin(), below.rend());
    excess_.push_back(1);
    for (double x = mode, p = 1; x < trials;) {
      p *= (trials - x) / (x + 1) * odds;
      if (p < kNothing) break;
      excess_.push_back(p);
      x += 1;
    }
    double sum = 0;
    for (const double p : excess_) sum += p;
    // E max(0, X - c) is the sum of P(X > x) over x from c on.
    double beyond = 0, excess = 0;
    for (auto p = excess_.rbegin(); p != excess_.rend(); ++p) {
      const double here = *p / sum;
      *p = excess += beyond;
      beyond += here;
    }
  }
  double operator()(double capacity) const {
    if (excess_.empty()) {
      const double over = mean_ - capacity, z = over / sigma_;
      if (z < -8) return 0;
      return over * 0.5 * std::erfc(-z / std::sqrt(2.0)) +
             sigma_ * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(-1.0));
    }
    if (capacity < first_) return mean_ - capacity;
    const auto at = static_cast<std::size_t>(capacity - first_);
    return at < excess_.size() ? excess_[at] : 0;
  }

 private:
  static constexpr double kMany = 1000;
  double mean_, sigma_, first_ = 0;
  std::vector<double> excess_;  // at first_, first_ + 1, ...
};

/// One record: expected drops at a factor, in assignments.
class Drops {
 public:
  /// Of `counts` that are split over `parts` equal micro-batches or ranks, each with a capacity of its own.
  Drops(std::span<const std::int64_t> counts, std::int64_t parts)
      : parts_(static_cast<double>(parts)), experts_(static_cast<double>(counts.size())) {
    counts_.assign(counts.begin(), counts.end());
    std::ranges::sort(counts_, std::greater<>());
    for (const double c : counts_) sum_ += c;
    if (parts == 1) return;
    // Tokens that are independent fall into a part with probability 1/parts.
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      if (i == 0 || counts_[i] != counts_[i - 1]) in_part_.push_back({0, {counts_[i], 1 / parts_}});
      in_part_.back().experts += 1;
    }
  }
  double assignments() const { return sum_; }
  double at(double factor) const {
    const double capacity = std::ceil(factor * sum_ / parts_ / experts_ - 1e-9);
    double dropped = 0;
    for (const InPart& equal : in_part_) dropped += parts_ * equal.experts * equal.excess(capacity);
    for (std::size_t i = 0; parts_ == 1 && i < counts_.size() && counts_[i] > capacity; ++i)
      dropped += counts_[i] - capacity;
    return dropped;
  }

 private:
  struct InPart {
    double experts;  // with this count
    BinomialExcess excess;
  };
  std::vector<double> counts_;  // largest first
  std::vector<InPart> in_part_;
  double sum_ = 0, parts_, experts_;
};

struct Layer {
  std::vector<BlockMeans> at_factor;
  std::vector<double> at_grid = std::vector<double>(kGrid, 0.0);
  double assignments = 0;
  BlockMeans measured;  ///< Drops that the router reports.

  /// The smallest factor of the grid whose rate is at most `rate`; infinite if none is.
  double factor_for(double rate) const {
    for (std::size_t i = 0; i < kGrid; ++i) {
      if (at_grid[i] <= rate * assignments * (1 + 1e-12)) return grid_factor(i);
    }
    return HUGE_VAL;
  }
};

std::string percent(double rate) {
  return fixed(100 * rate, rate < 0.0995 ? 2 : 1) + " %";
}
std::string factor_text(double factor) {
  return std::isfinite(factor) ? fixed(factor, 2) : "> 16";
}

int capacity(const Options& options) {
  LogReader reader(options.trace, options.fault_policy);
  std::map<int, Layer> layers;
  std::set<std::string> ranks;
  bool of_whole = false, of_parts = false, micro_batches = false;
  while (const auto record = reader.next()) {
    if (record->layer < 0 || record->stats.experts() == 0 || record->stats.assignments() == 0) continue;
    // Records of ranks and micro-batches, as `import --by` writes them, are what capacity acts on.
    const TagParts parts = parts_of(record->tag);
    if (record->tag != options.tag && (!parts.any() || parts.rest != options.tag)) continue;
    if (parts.rank) ranks.insert(parts.of_rank);
    (parts.any() ? of_parts : of_whole) = true;
    micro_batches = micro_batches || parts.micro_batch;
    Layer& layer = layers[record->layer];
    layer.at_factor.resize(options.factors.size());
    const Drops drops(record->stats.counts(), options.parts);
    const double all = drops.assignments();
    for (std::size_t f = 0; f < options.factors.size(); ++f)
      layer.at_factor[f].add(drops.at(options.factors[f]) / all, all);
    for (std::size_t i = 0; i < kGrid; ++i) {
      const double dropped = drops.at(grid_factor(i));
      if (dropped <= 0) break;
      layer.at_grid[i] += dropped;
    }
    layer.assignments += all;
    if (const auto dropped = record->stats.dropped()) layer.measured.add(*dropped / all, all);
  }
  say_faults(reader, options.trace);
  if (layers.empty())
    throw InputError(shown_path(options.trace) + ": no record tagged '" + options.tag + "' has counts");
  if (of_whole && of_parts)
    throw InputError(options.trace +
                     ": holds records of whole steps and of their ranks or micro-batches: --tag chooses");
  const bool bound = of_whole && options.parts == 1;
  const std::string granularity = options.parts > 1                 ? "parts"
                                  : micro_batches && !ranks.empty() ? "ranks and micro-batches"
                                  : micro_batches                   ? "micro-batches"
                                  : of_parts                        ? "ranks"
                                                                    : "steps";
  // The model's factor is one number: the worst layer decides.
  double worst = 0;
  for (const auto& [id, layer] : layers) worst = std::max(worst, layer.factor_for(options.drop));
  const auto json = [](double factor) { return std::isfinite(factor) ? Json(factor) : Json(); };
  if (options.format == "json") {
    Json list = Json::array();
    for (const auto& [id, layer] : layers) {
      Json rates = Json::array();
      for (std::size_t f = 0; f < options.factors.size(); ++f) {
        const Estimate e = layer.at_factor[f].estimate();
        rates.push_back({{"factor", options.factors[f]},
                         {"drop_rate", e.mean},
                         {"low", e.low ? Json(*e.low) : Json()},
                         {"high", e.high ? Json(*e.high) : Json()}});
      }
      list.push_back({{"layer", id},
                      {"rates", rates},
                      {"factor", json(layer.factor_for(options.drop))},
                      {"measured", layer.measured.empty() ? Json() : Json(layer.measured.estimate().mean)}});
    }
    std::cout << json_text(Json{{"wanted_drop_rate", options.drop},
                                {"factor", json(worst)},
                                {"lower_bound", bound},
                                {"granularity", granularity},
                                {"layers", list}},
                           2)
              << '\n';
    return 0;
  }
  std::vector<std::string> header = {"layer"};
  for (const double factor : options.factors) header.push_back("at " + brief(factor));
  header.push_back("factor for " + percent(options.drop));
  Table table(header);
  for (const auto& [id, layer] : layers) {
    std::vector<std::string> row = {std::to_string(id)};
    for (const BlockMeans& rate : layer.at_factor) {
      const Estimate e = rate.estimate();
      row.push_back(percent(e.mean) + (e.low && e.mean > 0 ? " +- " + percent(*e.high - e.mean) : ""));
    }
    row.push_back(factor_text(layer.factor_for(options.drop)));
    table.add(std::move(row));
  }
  std::cout << table.text()
            << "\nShare of the assignments that a capacity of ceil(factor x assignments / experts) drops, "
               "mean over steps, with 95 % interval.\n";
  if (bound) {
    std::cout << "These are LOWER BOUNDS: the counts are those of whole steps. Capacity acts in each rank "
                 "and micro-batch, whose loads scatter "
                 "more.\n--parts N adds what N independent parts of a step would scatter; `import --by "
                 "micro-batch` "
                 "and `--by rank` keep the counts of parts.\n";
  } else if (options.parts == 1) {
    std::cout << "From the counts of " << (micro_batches ? "each micro-batch" : "each step");
    if (!ranks.empty())
      std::cout << " in each of " << ranks.size() << (ranks.size() == 1 ? " rank" : " ranks");
    std::cout << (micro_batches
                      ? ", which is where capacity acts.\n"
                      : "; with several micro-batches in a step it is still a LOWER BOUND: `import --by "
                        "micro-batch`, or --parts N.\n");
  } else {
    std::cout << "As if each "
              << (micro_batches ? "micro-batch"
                  : of_parts    ? "step of a rank"
                                : "step")
              << " were split into " << options.parts
              << " parts of independent tokens; tokens that are alike scatter more.\n";
  }
  std::cout << "At most " << percent(options.drop) << " in every layer: capacity factor "
            << (bound ? "at least " : "") << factor_text(worst) << ".\n";
  for (const auto& [id, layer] : layers) {
    if (layer.measured.empty()) continue;
    std::cout << "layer " << id << ": the router reports " << percent(layer.measured.estimate().mean)
              << " dropped.\n";
  }
  return 0;
}

}  // namespace

void add_capacity(CLI::App& app, Tool& tool) {
  CLI::App* command =
      app.add_subcommand("capacity", "Drop rates by capacity factor, and the factor for a wanted drop rate");
  command->footer(
      "Examples:\n"
      "  moectl capacity trace.jsonl --drop 0.01\n"
      "  moectl capacity trace.jsonl --factors 1 1.25 2 --parts 64   # 8 ranks x 8 micro-batches\n"
      "  moectl import megatron router_trace_rank*.jsonl --by micro-batch -o - | moectl capacity -");
  auto options = std::make_shared<Options>();
  add_trace(*command, options->trace);
  command->add_option("--factors", options->factors, "Capacity factors of the table")
      ->check(positive_number())
      ->capture_default_str();
  command->add_option("--drop", options->drop, "Wanted drop rate, as a share: 0.01 is 1 %")
      ->check(number_between(0, 0.99))
      ->capture_default_str();
  command
      ->add_option("--parts", options->parts,
                   "Ranks x micro-batches that a step is split into, each with a capacity of its own")
      ->check(whole_number(1, 1 << 24))
      ->capture_default_str();
  command
      ->add_option("--tag", options->tag,
                   "Which records; those of its ranks and micro-batches are taken as well")
      ->capture_default_str();
  add_salvage(*command, options->fault_policy);
  add_format(*command, options->format, {"table", "json"});
  command->callback([&tool, options] { tool.run = [options] { return capacity(*options); }; });
}

}  // namespace moectl::cli
