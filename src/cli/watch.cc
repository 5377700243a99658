// moectl watch RUN|-: follows a growing log: a live view in a terminal, one line per step elsewhere.
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "cli/parts.h"
#include "cli/tool.h"
#include "cli/watch_view.h"
#ifdef MOECTL_PROMETHEUS
#include "moectl/prometheus.h"
#endif
#include "export/run_figures.h"
#include "moectl/run_log.h"
#include "watch/watch_fields.h"

namespace moectl::cli {
namespace {

struct Options {
  std::string run;
  std::optional<std::string> listen;
  std::vector<std::string> metrics;
  int extremes = -1;
  std::int64_t every = 1;
  pid_t process = 0;
  bool once = false, plain = false;
};

/// True while the process runs. A process that has ended counts as ended even before its parent waits for it.
bool is_running(pid_t process) {
  if (kill(process, 0) != 0) return errno == EPERM;
  std::ifstream file("/proc/" + std::to_string(process) + "/stat");
  std::string text;
  std::getline(file, text);
  // "PID (NAME) STATE …", where the name may hold anything.
  const std::size_t name_end = text.rfind(") ");
  return name_end == std::string::npos || name_end + 2 >= text.size() || text[name_end + 2] != 'Z';
}

/// A training that has just been started may not have opened its log yet.
void wait_for_file(const Options& options) {
  while (options.process != 0 && !std::filesystem::exists(options.run) && is_running(options.process)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
}

/// The endpoint of `--listen`; does nothing without it.
class Endpoint {
 public:
  explicit Endpoint(const Options& options) {
    if (!options.listen) return;
    const std::string& address = *options.listen;
#ifdef MOECTL_PROMETHEUS
    feed_ = std::make_unique<PrometheusFeed>(
        address, PrometheusOptions{.metrics = options.metrics, .extremes = options.extremes});
    const std::size_t colon = address.rfind(':');  // a port alone is one of the loopback address
    const std::string host = colon == std::string::npos ? "127.0.0.1" : address.substr(0, colon);
    std::cerr << "serving http://" << host << ':' << feed_->port() << "/metrics" << std::endl;
#else
    throw InputError("--listen: " + address + ": this moectl was built without prometheus-cpp");
#endif
  }
#ifdef MOECTL_PROMETHEUS
  void write(const LogRecord& record, const Metrics& metrics) {
    if (feed_) feed_->write(record, metrics);
  }
  void set_faults(std::int64_t count) {
    if (feed_) feed_->set_log_faults(count);
  }

 private:
  std::unique_ptr<PrometheusFeed> feed_;
#else
  void write(const LogRecord&, const Metrics&) {}
  void set_faults(std::int64_t) {}
#endif
};

class Watch {
 public:
  explicit Watch(const Options& options)
      : options_(options),
        live_(!options.plain && isatty(STDOUT_FILENO) == 1),
        endpoint_(options),
        reader_(
            options.run, FaultPolicy::kSalvage,
            options.once ? std::function<bool()>() : [this] { return pause(); }) {}

  int run() {
    while (const auto record = records_.next()) {
      say_faults();
      if (record->tag == "train") take(*record);
    }
    show();
    screen_.draw_pending();
    live_ = false;
    say_faults();
    if (options_.once && !any_) {
      throw InputError(shown_path(options_.run) + (reader_.fault_count() > 0
                                                       ? ": holds no record that can be read"
                                                       : ": no record tagged 'train'"));
    }
    return 0;
  }

 private:
  /// At the end of what has been written so far.
  bool pause() {
    screen_.draw_pending();
    return options_.process == 0 || is_running(options_.process);
  }

  void take(const LogRecord& record) {
    any_ = true;
    if (step_ && step_->number != record.step) show();
    if (!step_) step_ = std::make_unique<WatchedStep>(record.step);
    const Metrics metrics = metrics_.of(record);
    endpoint_.write(record, metrics);
    step_->add(record, metrics);
    if (!step_->notices.empty()) newest_notice_ = step_->notices.back();
    // A step that is known to be whole need not wait for the next one; the record of whole-model actuators may follow.
    const auto layers = reader_.header().layers;
    if (layers && static_cast<int>(step_->layers.size()) == *layers && live_) draw();
  }

  void say_faults() {
    endpoint_.set_faults(reader_.fault_count());
    if (live_) return;  // the view counts faults, and the end prints them below it
    if (!note_.empty()) std::cerr << std::exchange(note_, {}) << '\n';
    for (; assumed_ < reader_.assumptions().size(); ++assumed_)
      std::cerr << reader_.assumptions()[assumed_] << '\n';
    for (; said_ < reader_.faults().size(); ++said_) std::cerr << reader_.faults()[said_] << '\n';
  }

  void show() {
    if (!step_) return;
    if (live_) {
      draw();
    } else {
      if (shown_++ % options_.every == 0) std::cout << plain_line(*step_) << std::endl;
      for (const std::string& notice : step_->notices) {
        std::cout << printable("step " + std::to_string(step_->number) + "  notice: " + notice) << std::endl;
      }
    }
    step_.reset();
  }

  void draw() {
    const auto [rows, columns] = Screen::size();
    screen_.show(view_of(*step_, options_.run == "-" ? "standard input" : options_.run, newest_notice_,
                         reader_.fault_count(), rows, columns));
  }

  const Options& options_;
  bool live_;
  Endpoint endpoint_;
  Screen screen_;
  LogReader reader_;
  WholeRecords records_{reader_, false, [this](std::string_view text) { note_ = text; }};
  RecordMetrics metrics_{true};
  std::unique_ptr<WatchedStep> step_;
  std::string newest_notice_;
  std::int64_t shown_ = 0;
  std::size_t said_ = 0, assumed_ = 0;
  std::string note_;  // not yet said
  bool any_ = false;  // records were read
};

}  // namespace

void add_watch(CLI::App& app, Tool& tool) {
  CLI::App* command = app.add_subcommand("watch", "Follow a growing run log");
  command->footer(
      "In a terminal, a live view: each layer's load by expert (a full block is twice its target, the\n"
      "mean unless model.targets say otherwise) and the last decisions with what limited them.\n"
      "Elsewhere one line a step. A file is followed until interrupted or, with --pid, until the\n"
      "process that writes it has ended; standard input until it ends. A log that is rotated is\n"
      "followed from piece to piece.\n\n"
      "With --listen the same data are served at http://ADDR:PORT/metrics for Prometheus: every metric\n"
      "by layer, load and bias by expert, health, alerts, and what limited the actuators. There is no\n"
      "authentication: listen at the loopback address unless the network is trusted. Alerts and a\n"
      "dashboard are in share/moectl/monitoring.\n\n"
      "Examples:\n"
      "  moectl watch runs/demo/run.jsonl\n"
      "  train --log run.jsonl & moectl watch run.jsonl --pid $!\n"
      "  train | moectl watch - --every 10 | tee progress.txt\n"
      "  moectl watch run.jsonl --once --plain\n"
      "  serve | moectl watch - --listen 127.0.0.1:9464 --plain --every 1000");
  auto options = std::make_shared<Options>();
  command->add_option("RUN", options->run, "Run log or trace; - is standard input")->required();
  command->add_option("--every", options->every, "Print every so many steps, when not in a terminal")
      ->check(whole_number(1));
  CLI::Option* once =
      command->add_flag("--once", options->once, "Stop at the end of the file instead of waiting for more");
  command
      ->add_option("--pid", options->process,
                   "Stop when this process has ended and all its output has been shown")
      ->check(whole_number(1, std::numeric_limits<pid_t>::max()))
      ->excludes(once);
  CLI::Option* listen =
      command
          ->add_option("--listen", options->listen,
                       "Serve metrics for Prometheus at this address, e.g. 127.0.0.1:9464; a PORT alone "
                       "is one of the loopback address; port 0: any free port")
          ->type_name("ADDR:PORT")
          ->excludes(once);
  command
      ->add_option(
          "--metric", options->metrics,
          "With --listen: serve this metric of each layer, instead of all; may be given more than once")
      ->check(CLI::IsMember(metric_names()))
      ->type_name("NAME")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->needs(listen);
  command
      ->add_option(
          "--extremes", options->extremes,
          "With --listen: instead of series for every expert, this many of the most and of the least "
          "loaded experts of each layer, and of the pairs that the same tokens choose most")
      ->check(whole_number(0, 65536))
      ->needs(listen);
  command->add_flag("--plain", options->plain, "One line per step, in a terminal as well");
  command->callback([&tool, options] {
    if (options->run == "-" && options->process != 0) {
      throw CLI::ValidationError("--pid: standard input ends with its writer, without --pid");
    }
    tool.run = [options] {
      wait_for_file(*options);
      return Watch(*options).run();
    };
  });
}

}  // namespace moectl::cli
