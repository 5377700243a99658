// moectl compare RUN…: the figures of several runs, side by side.
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/parts.h"
#include "cli/tool.h"
#include "export/run_figures.h"
#include "moectl/figures.h"

namespace moectl::cli {
namespace {

struct Options {
  std::vector<std::string> runs;
  std::optional<std::int64_t> shift;
  std::string format;
  std::size_t summed = kSteadyWindow;
  FaultPolicy fault_policy = FaultPolicy::kRepair;
};

nlohmann::ordered_json json_of(const std::string& run, const Figures& figures) {
  nlohmann::ordered_json row = {{"run", run}};
  for (const auto& [name, value] : fields_of(figures)) {
    if (!value) {
      row[name] = nullptr;
    } else if (name == "steps" || name == "settle" || name == "limit_hits") {
      row[name] = static_cast<std::int64_t>(*value);
    } else {
      row[name] = *value;
    }
  }
  row["floor"] = figures.floor == FloorKind::kNone ? nlohmann::ordered_json(nullptr)
                                                   : nlohmann::ordered_json(name_of(figures.floor));
  return row;
}

Figures figures_of_run(const std::string& run, const Options& options) {
  LogReader log(run, options.fault_policy);
  WholeRecords records = whole_records(log);
  Figures figures = read_figures(records, options.shift ? options.shift : log.header().shift, options.summed);
  if (figures.steps == 0 && log.fault_count() > 0) {
    throw InputError(shown_path(run) + ": holds no record that can be read; " + log.faults().front());
  }
  if (figures.steps == 0)
    throw InputError(shown_path(run) + ": no record of a layer tagged 'train' has counts");
  say_faults(log, run);
  return figures;
}

int compare(const Options& options) {
  std::vector<Figures> figures;
  for (const std::string& run : options.runs) figures.push_back(figures_of_run(run, options));
  if (options.format == "json") {
    auto all = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < figures.size(); ++i) all.push_back(json_of(options.runs[i], figures[i]));
    std::cout << json_text(all, 2) << '\n';
    return 0;
  }
  // Runs as rows, without the columns that none of them has.
  std::vector<std::string> header = {"run"};
  std::vector<std::vector<std::string>> rows;
  for (const std::string& run : options.runs) rows.push_back({run});
  const std::size_t fields = fields_of({}).size();
  for (std::size_t f = 0; f < fields; ++f) {
    bool any = false;
    for (const Figures& run : figures) any = any || fields_of(run)[f].second;
    // "Never settled" is a result.
    const std::string name = fields_of({})[f].first;
    if (!any && name != "settle") continue;
    header.push_back(name);
    for (std::size_t i = 0; i < figures.size(); ++i) {
      const auto value = fields_of(figures[i])[f].second;
      rows[i].push_back(name == "settle" && !value ? "never" : brief(value));
    }
  }
  header.emplace_back("floor");
  for (std::size_t i = 0; i < figures.size(); ++i) {
    rows[i].emplace_back(figures[i].floor == FloorKind::kNone ? "-" : name_of(figures[i].floor));
  }
  Table table(header);
  for (auto& row : rows) table.add(std::move(row));
  std::cout << table.text();
  return 0;
}

}  // namespace

void add_compare(CLI::App& app, Tool& tool) {
  CLI::App* command = app.add_subcommand("compare", "Compare runs by their figures");
  command->footer(
      "Figures, over layers; means over steps are weighted by tokens:\n"
      "  settle              first step after which the 5-step median of MaxVio stays under 1.6 floors for "
      "20 steps\n"
      "  max_vio, cv         mean over the steady window: the last 100 steps before the shift, else of the "
      "run\n"
      "  ..._over_floor      that, over the mean floor; balanced: both at most 1.6\n"
      "  floor               which one: the sampling floor where it is logged, else the noise floor; mixed "
      "where\n"
      "                      some layers or steps have the one and some the other\n"
      "  max_vio_global      MaxVio of the counts summed over that window, or over --sum-steps: what is left "
      "of the\n"
      "                      imbalance of single steps\n"
      "  excess_cv           what of cv control can remove: root of the mean of cv^2 - floor^2, with its "
      "sign\n"
      "  excess_area         sum over the 100 steps from the shift on of MaxVio above its mean over the last "
      "100:\n"
      "                      the way to where the run ends, which is short if it never comes back\n"
      "  end_over_floor      max_vio over the floor in the run's last 100 steps, where there was a shift\n"
      "  dead_experts        all layers together, mean over the run's last 100 steps\n"
      "  drop_rate           share of the assignments that routers dropped, in those steps\n"
      "  limit_hits          actuator moves that a limit cut short, clipped or overrode, in the whole run\n"
      "  loss                mean of the last 100 steps; validation_loss: the last record tagged "
      "'validation'\n"
      "The shift is the step at which the data changed: from the run log's first line ('shift'), or "
      "--shift.\n"
      "A damaged log is compared by what can be read of it, and the rest is said; a record that is wrong "
      "ends "
      "the\n"
      "command, unless --salvage is given.\n\n"
      "Examples:\n"
      "  moectl compare runs/demo/*.jsonl\n"
      "  moectl compare --shift 420 before.jsonl after.jsonl.gz --format json");
  auto options = std::make_shared<Options>();
  command->add_option("RUN", options->runs, "Run logs or traces")->required();
  command->add_option("--shift", options->shift, "Step at which the data changed, for all runs")
      ->check(whole_number(0));
  command
      ->add_option("--sum-steps", options->summed,
                   "Sum counts (max_vio_global) over this many steps before the shift; 0: all of them")
      ->check(whole_number(0))
      ->capture_default_str();
  add_salvage(*command, options->fault_policy);
  add_format(*command, options->format, {"table", "json"});
  command->callback([&tool, options] { tool.run = [options] { return compare(*options); }; });
}

}  // namespace moectl::cli
