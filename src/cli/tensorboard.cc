// moectl tensorboard RUN… -o DIR: event files of run logs, a directory a run.
#include "moectl/tensorboard.h"

#include <filesystem>
#include <iostream>
#include <memory>
#include <set>

#include "cli/parts.h"
#include "cli/tool.h"
#include "export/run_figures.h"

namespace moectl::cli {
namespace {

struct Options {
  std::vector<std::string> runs;
  std::string output;
  std::vector<std::string> metrics;
  std::int64_t histogram_every = TensorBoardOptions().histogram_every;
  FaultPolicy fault_policy = FaultPolicy::kRepair;
};

/// The run's name in TensorBoard: the name of its file without the common extensions.
std::string name_of_run(const std::string& path) {
  if (path == "-") return "stdin";
  std::string name = std::filesystem::path(path).filename().string();
  for (const char* end : {".gz", ".jsonl"}) {
    if (name.ends_with(end) && name.size() > std::string_view(end).size()) {
      name.resize(name.size() - std::string_view(end).size());
    }
  }
  // "...jsonl" must not lead out of the folder.
  return name == "." || name == ".." ? std::filesystem::path(path).filename().string() : name;
}

std::vector<std::string> metrics_of(const Options& options) {
  if (options.metrics.empty()) return TensorBoardOptions().metrics;
  if (options.metrics != std::vector<std::string>{"all"}) return options.metrics;
  std::vector<std::string> all;
  for (const MetricField& field : metric_fields()) all.emplace_back(field.name);
  return all;
}

void write(const std::string& run, const std::string& directory, const Options& options) {
  LogReader log(run, options.fault_policy);
  TensorBoardWriter board(
      directory,
      {.histogram_every = options.histogram_every, .metrics = metrics_of(options), .wall_time = {}});
  RecordMetrics metrics(true);
  std::int64_t records = 0;
  WholeRecords whole = whole_records(log);
  while (const auto record = whole.next()) {
    ++records;
    board.write(*record, metrics.of(*record));
  }
  board.flush();
  if (!board.ok()) throw InputError(directory + ": cannot be written");
  if (records == 0 && log.fault_count() > 0) {
    throw InputError(shown_path(run) + ": holds no record that can be read; " + log.faults().front());
  }
  if (records == 0) throw InputError(shown_path(run) + ": holds no record");
  say_faults(log, run);
}

int tensorboard(const Options& options) {
  std::set<std::string> directories;
  std::vector<std::string> each;
  for (const std::string& run : options.runs) {
    const std::filesystem::path folder = std::filesystem::path(options.output) / name_of_run(run);
    if (std::filesystem::is_symlink(folder))
      throw InputError(folder.string() + ": is a link: events are written under their own name only");
    each.push_back(folder.string());
    if (!directories.insert(each.back()).second) {
      throw InputError(run + ": another run goes to " + each.back() +
                       " as well: give each a file name of its own");
    }
    for (const std::string& path : {options.output, each.back()}) keep_inputs("--output", path, options.runs);
    std::error_code ignored;
    if (std::filesystem::exists(each.back(), ignored) && !std::filesystem::is_empty(each.back(), ignored)) {
      throw InputError(each.back() + ": already exists: remove it, or choose another directory");
    }
  }
  for (std::size_t i = 0; i < each.size(); ++i) write(options.runs[i], each[i], options);
  return 0;
}

}  // namespace

void add_tensorboard(CLI::App& app, Tool& tool) {
  CLI::App* command = app.add_subcommand("tensorboard", "Write TensorBoard event files of runs");
  command->footer(
      "Scalars: loss, means over layers beside their floors and percentiles of MaxVio over layers\n"
      "(balance/...), metrics by layer, the scalar actuators, and the number of layers in each state of\n"
      "health, under each alert, and with each reason that kept an actuator from its proposal.\n"
      "Histograms: load over the mean, and bias, of each layer's experts. Logs carry no clock: wall\n"
      "time is the step.\n\n"
      "Examples:\n"
      "  moectl tensorboard runs/demo/*.jsonl -o board && tensorboard --logdir board\n"
      "  moectl tensorboard run.jsonl -o board --metric all --histogram-every 100");
  auto options = std::make_shared<Options>();
  command->add_option("RUN", options->runs, "Run logs or traces")->required();
  command->add_option("-o,--output", options->output, "Directory; each run gets a subdirectory with its name")
      ->required();
  command
      ->add_option("--metric", options->metrics,
                   "Metric to write for each layer, or 'all'; may be given more than once")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  command->add_option("--histogram-every", options->histogram_every, "Steps between histograms; 0: none")
      ->check(whole_number(0))
      ->capture_default_str();
  add_salvage(*command, options->fault_policy);
  command->callback([&tool, options] { tool.run = [options] { return tensorboard(*options); }; });
}

}  // namespace moectl::cli
