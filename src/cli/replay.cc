// moectl replay CONFIG TRACE: the values that a controller would have applied on recorded counts.
//
// Active and without lag, whatever the config says: `applied` at step t uses step t's counts and is in force from the
// next step on; the first proposal starts at `initial`. The routing does not respond, because it was recorded.
#include <algorithm>
#include <cstdio>
#include <deque>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "base/host_hold.h"
#include "cli/parts.h"
#include "cli/tool.h"
#include "log/reshape.h"
#include "moectl/config.h"
#include "moectl/controller.h"
#include "moectl/run_log.h"

namespace moectl::cli {
namespace {

struct Options {
  std::string config, trace, run = "-";
  std::optional<int> layers, experts, top_k;
  FaultPolicy fault_policy = FaultPolicy::kRepair;
};

class Replay {
 public:
  Replay(const Options& options, const PolicyRegistry& registry)
      : options_(options), config_(active(options, registry)), trace_(options.trace, options.fault_policy) {
    const LogHeader& header = trace_.header();
    if (config_.layers.empty()) {
      const ModelConfig& model = config_.model;
      must_agree("layers", header.layers, model.layers, 1);
      must_agree("experts", header.experts, model.experts, 1);
      must_agree("top_k", header.top_k, model.top_k, 1);
    }
    trace_.set_defaults(defaults_of(config_.model));
    std::vector<std::string> inputs = files_of(config_);
    inputs.insert(inputs.end(), {options.config, options.trace});
    keep_inputs("--output", options.run, inputs);
    // Only now: a log that exists is not overwritten for inputs that do not fit together.
    controller_.emplace(config_, registry);
    writer_.emplace(options.run, config_, false, header.shift);
  }

  int run() {
    say_if_held();
    while (writer_->ok()) {
      auto record = next();
      if (!record) break;
      try {
        check(*record);
      } catch (const InputError& e) {
        if (options_.fault_policy != FaultPolicy::kSalvage) throw;
        std::cerr << "skipped: " << e.what() << '\n';
        continue;
      }
      if (record->step != step_) begin_step(*record);
      take(*record);
    }
    finish_step();
    writer_->flush();
    if (steps_ == 0 && trace_.fault_count() > 0) {
      throw InputError(shown_path(options_.trace) + ": holds no record that can be read; " +
                       trace_.faults().front());
    }
    if (steps_ == 0)
      throw InputError(shown_path(options_.trace) + ": no record of a layer tagged 'train' has counts");
    say_faults(trace_, options_.trace);
    if (!writer_->ok()) return 1;  // the writer has reported the error
    if (logged_ == 0) {
      std::cerr << said_path(options_.trace) << ": no step is a multiple of log.every (" << config_.log.every
                << ") of " << said_path(options_.config) << ": the log has no record\n";
    }
    if (options_.run != "-") {
      std::cout << "replayed " << steps_ << " steps of " << config_.model.layers
                << " layers, wrote the records of " << logged_ << " steps to " << said_path(options_.run)
                << ", open loop: the recorded routes answer no decision"
                << (environment_holds() ? "" : ", so none is held for that") << '\n';
    }
    return 0;
  }

 private:
  static ControllerConfig active(const Options& options, const PolicyRegistry& registry) {
    if (options.config == "-" && options.trace == "-") {
      throw InputError("CONFIG and TRACE: -: standard input can be only one of them");
    }
    ControllerConfig config = load_config(options.config, registry);
    config.mode = Mode::kActive;
    config.lag = 0;
    // Recorded loads answer nothing.
    config.safety.responsiveness = false;
    for (LayerGroup& group : config.layers) {
      if (group.safety) group.safety->responsiveness = false;
    }
    for (TimelineEntry& entry : config.timeline) {
      if (entry.safety) entry.safety->responsiveness = false;
    }
    if (options.layers) config.model.layers = *options.layers;
    if (options.experts) config.model.experts = *options.experts;
    if (options.top_k) config.model.top_k = *options.top_k;
    return config;
  }

  /// The next record that says something of a layer's training.
  std::optional<LogRecord> read() {
    for (;;) {
      auto record = records_.next();
      if (!record || (record->layer >= 0 && record->tag == "train")) return record;
    }
  }

  /// The same with the config's number of the layer. The first records tell which numbers the trace has: those of the
  /// first step, and if the config has no such layer, as many as it takes to see all.
  std::optional<LogRecord> next() {
    if (!layers_known_ && config_.layers.empty()) learn_layers();
    auto record = first_.empty() ? read() : std::optional(std::move(first_.front()));
    if (!first_.empty()) first_.pop_front();
    if (record && !layers_.empty()) {
      const auto it = layers_.find(record->layer);
      if (it == layers_.end()) {
        fail(*record, "layer", std::to_string(record->layer),
             "must be one of the layers of the records before it, which are as many as model.layers (" +
                 std::to_string(config_.model.layers) + ") of " + options_.config);
      }
      record->layer = it->second;
    }
    return record;
  }

  void learn_layers() {
    layers_known_ = true;
    std::set<int> seen;
    const int layers = config_.model.layers;
    while (std::ssize(seen) < layers) {
      auto record = read();
      if (!record) break;
      const bool in_first_step = first_.empty() || first_.front().step == record->step;
      if (in_first_step || *seen.rbegin() >= layers) seen.insert(record->layer);
      first_.push_back(std::move(*record));
      if (!in_first_step && *seen.rbegin() < layers) break;
    }
    if (std::ssize(seen) != layers || *seen.rbegin() < layers) return;
    std::string names;
    int index = 0;
    for (const int layer : seen) {
      layers_[layer] = index++;
      names += (names.empty() ? "" : ", ") + std::to_string(layer);
    }
    std::cerr << "assumed: " << said_path(options_.trace) << ": layers " << names
              << " of the trace are layers 0 to " << layers - 1 << " of " << said_path(options_.config)
              << '\n';
  }

  [[noreturn]] void fail(std::int64_t line, const std::string& field, const std::string& value,
                         const std::string& constraint) const {
    throw InputError(shown_path(options_.trace) + ':' + std::to_string(line) + ": " + field + ": " + value +
                     ": " + constraint);
  }
  [[noreturn]] void fail(const LogRecord& record, const std::string& field, const std::string& value,
                         const std::string& constraint) const {
    fail(record.line, field, value, constraint);
  }
  void must_agree(const char* field, std::optional<int> found, int wanted, std::int64_t line) const {
    if (found && *found != wanted) {
      fail(line, field, std::to_string(*found),
           "must be " + std::to_string(wanted) + ", model." + field + " of " + options_.config);
    }
  }

  /// What the file says must fit the config and the order of the steps.
  void check(const LogRecord& record) const {
    const ModelConfig& model = config_.model;
    if (record.step < step_) {
      fail(record, "step", std::to_string(record.step),
           "must not be below the step before it (" + std::to_string(step_) + "): sort the records by step");
    }
    const std::vector<int>& ids = controller_->layers();
    if (std::find(ids.begin(), ids.end(), record.layer) == ids.end()) {
      fail(record, "layer", std::to_string(record.layer),
           config_.layers.empty()
               ? "must be below model.layers (" + std::to_string(model.layers) + ") of " + options_.config
               : "must be an id of the layer groups of " + options_.config);
    }
    if (record.stats.experts() == 0) {
      fail(record, "counts", "missing",
           "required: this log was written with per_expert off, or the step was invalid");
    }
    const StatsShape& shape = controller_->shape(record.layer);
    must_agree("experts", record.stats.experts(), shape.experts, record.line);
    must_agree("top_k", record.stats.top_k(), shape.top_k, record.line);
  }

  void take(const LogRecord& record) {
    const ModelConfig& model = config_.model;
    controller_->record(record.layer, reshaped(record.stats, record.domains,
                                               controller_->shape(record.layer).needs, model.domains));
    any_ = true;
    if (record.loss) loss_ = record.loss;
    if (!record.next_mixture.empty()) {
      mixture_.assign(model.domains.size(), 0);
      for (std::size_t d = 0; d < mixture_.size(); ++d) {
        const auto it = record.next_mixture.find(model.domains[d]);
        if (it != record.next_mixture.end()) mixture_[d] = it->second;
      }
    }
  }

  /// The controller counts as the trace does: its timeline and schedules name the training's steps. It begins where the trace does; it
  /// cannot skip steps later on, which is said.
  void begin_step(const LogRecord& record) {
    finish_step();
    if (steps_ == 0) {
      controller_->begin_at(record.step);
    } else if (record.step != step_ + 1 && !std::exchange(gap_said_, true)) {
      std::cerr << "assumed: " << said_path(options_.trace) << ':' << record.line << ": step: " << record.step
                << ": the step before it is " << step_
                << "; timeline, schedules, warm-up and cadence count the steps that are there, from the "
                   "first one on\n";
    }
    step_ = record.step;
  }

  void finish_step() {
    if (!any_) return;
    StepInfo info;
    info.loss = loss_;
    info.next_mixture = mixture_;
    StepReport report = controller_->step(info);
    report.step = step_;  // the trace's own number: it may skip some
    ++steps_;
    if (step_ % config_.log.every == 0) {
      writer_->write(report);
      ++logged_;
    }
    any_ = false;
    loss_.reset();
    mixture_.clear();
  }

  const Options& options_;
  ControllerConfig config_;
  LogReader trace_;
  WholeRecords records_ = whole_records(trace_);
  std::deque<LogRecord> first_;  // read to learn the layers
  bool layers_known_ = false;
  std::map<int, int> layers_;  // from the trace's numbers to the config's; empty = the same
  std::optional<Controller> controller_;
  std::optional<RunLogWriter> writer_;
  std::int64_t step_ = -1;
  std::int64_t steps_ = 0, logged_ = 0;  // replayed, and written
  bool gap_said_ = false;
  bool any_ = false;  // something was recorded for step_
  std::optional<double> loss_;
  std::vector<std::int64_t> mixture_;
};

}  // namespace

void add_replay(CLI::App& app, Tool& tool) {
  CLI::App* command =
      app.add_subcommand("replay", "Show what the controller would have commanded on recorded counts");
  command->footer(
      R"(The controller runs active and without lag: the value applied at step t uses the counts of step t.
Records with another tag than 'train' are skipped. A trace may number its layers as it likes. A
layer that a step does not mention has no data in that step. Timeline, schedules and warm-up begin
at the trace's first step, as numbered there; steps that the trace skips are not counted. A
damaged trace (torn or unreadable lines, holes, a second run joined on, another version) is
replayed as far as it can be read, and the rest is reported. A record that is wrong ends the
command, unless --salvage is given.

Examples:
  moectl replay policies/sign_bias.yaml trace.jsonl -o run.jsonl
  moectl replay policies/sign_bias.yaml trace.jsonl --layers 4 --experts 64 --top-k 6 -o run.jsonl
  zcat trace.jsonl.gz | moectl replay policies/sign_bias.yaml - | head)");
  auto options = std::make_shared<Options>();
  command->add_option("CONFIG", options->config, "YAML config")->required();
  command->add_option("TRACE", options->trace, "Trace or run log. A line of a trace: " + kTraceLine)
      ->required();
  command->add_option("-o,--output", options->run, "Run log to write; without it, standard output");
  const auto positive_int = whole_number(1, std::numeric_limits<int>::max());
  command->add_option("--layers", options->layers, "Instead of model.layers")->check(positive_int);
  command->add_option("--experts", options->experts, "Instead of model.experts")->check(positive_int);
  command->add_option("--top-k", options->top_k, "Instead of model.top_k")->check(positive_int);
  add_salvage(*command, options->fault_policy);
  command->callback(
      [&tool, options] { tool.run = [&tool, options] { return Replay(*options, tool.registry).run(); }; });
}

}  // namespace moectl::cli
