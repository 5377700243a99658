// moectl watch RUN|-: follows a growing log: a live view in a terminal, one line a step elsewhere.
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>
#include <map>
#include <memory>

#include "cli/tool.h"
#include "moectl/figures.h"
#ifdef MOECTL_PROMETHEUS
#include "moectl/prometheus.h"
#endif
#include "moectl/run_log.h"
#include "run_figures.h"

namespace moectl::cli {
namespace {

struct Options {
  std::string run, listen;
  std::int64_t every = 1;
  bool once = false, plain = false;
};

/// What is known of the step that is being read.
struct Step {
  explicit Step(std::int64_t step) : mean(step), number(step) {}
  struct Track {
    double min = 0, max = 0;
    bool any = false;
    std::map<std::string, int> reasons;
  };
  LayerMean mean;
  std::int64_t number;
  std::map<int, LogRecord> layers;
  std::map<int, Metrics> metrics;
  std::map<std::string, Track> tracks;
};

std::string times(const std::optional<double>& value, const std::optional<double>& floor) {
  if (!value || !floor || !(*floor > 0)) return "";
  return " (" + brief(*value / *floor) + "x floor)";
}

std::string decisions(const Step::Track& track) {
  std::string text = track.any ? brief(track.min) : "-";
  if (track.any && track.max != track.min) text += ".." + brief(track.max);
  std::string reasons;
  for (const auto& [reason, count] : track.reasons) {
    reasons += (reasons.empty() ? "" : ", ") + reason + (count > 1 ? " x" + std::to_string(count) : "");
  }
  return reasons.empty() ? text : text + " [" + reasons + "]";
}

std::string line_of(const Step& step) {
  const StepFigures figures = step.mean.figures();
  std::string text = "step " + std::to_string(step.number);
  if (figures.loss) text += "  loss " + brief(figures.loss);
  text += "  max_vio " + brief(figures.max_vio) + times(figures.max_vio, figures.floor_max_vio);
  text += "  cv " + brief(figures.cv) + times(figures.cv, figures.floor_cv);
  text += "  dead " + brief(figures.dead_experts);
  for (const auto& [name, track] : step.tracks) text += "  " + name + ' ' + decisions(track);
  return text;
}

/// One block a column, its height the load over twice the mean; experts that share a column show their
/// largest.
std::string bars(const RoutingStats& stats, std::size_t width) {
  static const char* const kBlocks[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  const auto counts = stats.counts();
  const double mean = static_cast<double>(stats.assignments()) / static_cast<double>(counts.size());
  const std::size_t each = (counts.size() + width - 1) / width;
  std::string text;
  for (std::size_t i = 0; i < counts.size(); i += each) {
    const auto group = counts.subspan(i, std::min(each, counts.size() - i));
    const double load =
        mean > 0 ? static_cast<double>(*std::max_element(group.begin(), group.end())) / mean : 0;
    text += kBlocks[static_cast<std::size_t>(std::clamp(std::lround(load * 4), 0L, 8L))];
  }
  return text;
}

/// What `--listen` asks for; nothing without it.
class Endpoint {
 public:
  explicit Endpoint(const std::string& address) {
    if (address.empty()) return;
#ifdef MOECTL_PROMETHEUS
    feed_ = std::make_unique<PrometheusFeed>(address);
    std::cerr << "serving http://" << address.substr(0, address.rfind(':')) << ':' << feed_->port()
              << "/metrics" << std::endl;
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
        endpoint_(options.listen),
        reader_(
            options.run, Reading::kSalvage,
            options.once ? std::function<void()>() : [this] { draw_pending(); }) {}

  int run() {
    while (const auto record = reader_.next()) {
      say_faults();
      if (record->tag == "train") take(*record);
    }
    say_faults();
    show();
    draw_pending();
    return 0;
  }

 private:
  void take(const LogRecord& record) {
    if (step_ && step_->number != record.step) show();
    if (!step_) step_ = std::make_unique<Step>(record.step);
    Step& step = *step_;
    for (const auto& [name, actuator] : record.actuators) {
      step.mean.add(reasons_of(actuator));
      Step::Track& track = step.tracks[name];
      if (actuator.min && actuator.max) {
        track.min = track.any ? std::min(track.min, *actuator.min) : *actuator.min;
        track.max = track.any ? std::max(track.max, *actuator.max) : *actuator.max;
        track.any = true;
      }
      for (const std::string& reason : actuator.reasons) ++track.reasons[reason];
    }
    if (record.loss) step.mean.set_loss(record.loss);
    const Metrics metrics = record.layer < 0 ? Metrics() : metrics_.of(record);
    endpoint_.write(record, metrics);
    if (record.layer < 0) return;
    step.mean.add(metrics);
    step.metrics[record.layer] = metrics;
    step.layers.insert_or_assign(record.layer, record);
    // A step that is known to be whole need not wait for the next one; the record of whole-model actuators
    // may follow.
    const auto layers = reader_.header().layers;
    if (layers && static_cast<int>(step.layers.size()) == *layers && live_) draw();
  }

  void say_faults() {
    endpoint_.set_faults(reader_.fault_count());
    for (; said_ < reader_.faults().size(); ++said_) {
      if (!live_) std::cerr << reader_.faults()[said_] << '\n';
    }
  }

  void show() {
    if (!step_) return;
    if (live_) {
      draw();
    } else if (shown_++ % options_.every == 0) {
      std::cout << line_of(*step_) << std::endl;
    }
    step_.reset();
  }

  /// Composes the view; what comes too soon after the last frame is left for the next one or for the next
  /// pause.
  void draw() {
    compose();
    if (std::chrono::steady_clock::now() - drawn_ >= std::chrono::milliseconds(50)) draw_pending();
  }

  void draw_pending() {
    if (frame_.empty()) return;
    std::cout << frame_ << std::flush;
    frame_.clear();
    drawn_ = std::chrono::steady_clock::now();
  }

  void compose() {
    winsize window{};
    const bool known =
        ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_row > 4 && window.ws_col > 40;
    const std::size_t rows = known ? window.ws_row : 24, columns = known ? window.ws_col : 80;
    const StepFigures f = step_->mean.figures();
    std::string text = "\x1b[H\x1b[J" + options_.run + "  step " + std::to_string(step_->number) + "\nloss " +
                       brief(f.loss) + "  MaxVio " + brief(f.max_vio) + times(f.max_vio, f.floor_max_vio) +
                       "  CV " + brief(f.cv) + times(f.cv, f.floor_cv) + "  dead " + brief(f.dead_experts) +
                       "\n";
    std::size_t used = 4 + step_->tracks.size();
    for (const auto& [number, record] : step_->layers) {
      if (++used > rows) break;
      text += "layer " + std::to_string(number) + "  MaxVio " + brief(step_->metrics[number].max_vio) + "  " +
              (record.stats.experts() > 0 ? bars(record.stats, columns - 34) : "") +
              (record.health.empty() ? "" : "  " + record.health) + '\n';
    }
    for (const auto& [name, track] : step_->tracks)
      text += (name + ' ' + decisions(track)).substr(0, columns) + '\n';
    if (reader_.fault_count() > 0) text += std::to_string(reader_.fault_count()) + " lines passed over\n";
    frame_ = std::move(text);
  }

  const Options& options_;
  bool live_;
  Endpoint endpoint_;
  std::string frame_;  // composed, but not yet drawn
  LogReader reader_;
  RecordMetrics metrics_;
  std::unique_ptr<Step> step_;
  std::int64_t shown_ = 0;
  std::size_t said_ = 0;
  std::chrono::steady_clock::time_point drawn_{};
};

}  // namespace

void add_watch(CLI::App& app, Tool& tool) {
  CLI::App* command = app.add_subcommand("watch", "Follow a growing run log");
  command->footer(
      "In a terminal, a live view: each layer's load by expert (a full block is twice the mean) and the "
      "last\n"
      "decisions with what limited them. Elsewhere one line a step. A file is followed until interrupted, "
      "standard\n"
      "input until it ends. A log that is rotated is followed from piece to piece.\n\n"
      "With --listen the same data stand at http://ADDR:PORT/metrics for Prometheus: every metric by layer, "
      "load and\n"
      "bias by expert, health, alerts, and what limited the actuators. There is no authentication: listen at "
      "the\n"
      "loopback address unless the network is trusted. Alerts and a dashboard are in "
      "share/moectl/monitoring.\n\n"
      "Examples:\n"
      "  moectl watch runs/demo/run.jsonl\n"
      "  train | moectl watch - --every 10 | tee progress.txt\n"
      "  moectl watch run.jsonl --once --plain\n"
      "  serve | moectl watch - --listen 127.0.0.1:9464 --plain --every 1000");
  auto options = std::make_shared<Options>();
  command->add_option("RUN", options->run, "Run log or trace; - is standard input")->required();
  command->add_option("--every", options->every, "Print every so many steps, when not in a terminal")
      ->check(CLI::PositiveNumber);
  CLI::Option* once =
      command->add_flag("--once", options->once, "Stop at the end of the file instead of waiting for more");
  command
      ->add_option(
          "--listen", options->listen,
          "Serve metrics for Prometheus at this address, as 127.0.0.1:9464; port 0: any that is free")
      ->type_name("ADDR:PORT")
      ->excludes(once);
  command->add_flag("--plain", options->plain, "One line a step in a terminal as well");
  command->callback([&tool, options] { tool.run = [options] { return Watch(*options).run(); }; });
}

}  // namespace moectl::cli
