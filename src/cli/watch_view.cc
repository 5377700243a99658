#include "cli/watch_view.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>

#include "cli/terminal.h"
#include "cli/tool.h"

namespace moectl::cli {
namespace {

std::string times(const std::optional<double>& value, const std::optional<double>& floor, FloorKind kind) {
  if (!value || !floor || !(*floor > 0)) return "";
  return " (" + brief(*value / *floor) + "x " + std::string(name_of(kind)) + ")";
}

std::string decisions(const WatchedStep::Track& track) {
  std::string text = track.any ? brief(track.min) : "-";
  if (track.any && track.max != track.min) text += ".." + brief(track.max);
  std::string reasons;
  for (const auto& [reason, count] : track.reasons) {
    reasons += (reasons.empty() ? "" : ", ") + reason + (count > 1 ? " x" + std::to_string(count) : "");
  }
  return reasons.empty() ? text : text + " [" + reasons + "]";
}

bool starts_character(char byte) {
  return (byte & 0xC0) != 0x80;
}

/// The first `columns` characters of UTF-8, one column each.
std::string cut(std::string text, std::size_t columns) {
  std::size_t seen = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (starts_character(text[i]) && ++seen > columns) return text.substr(0, i);
  }
  return text;
}

std::string padded(std::string text, std::size_t width) {
  if (text.size() < width) text.append(width - text.size(), ' ');
  return text;
}

/// Blocks whose height is half the relative load: up to three columns an expert where there is room; where there is
/// none, experts that share a column show their largest.
std::string bars(const RoutingStats& stats, const LoadTargets* targets, std::size_t width) {
  static const char* const kBlocks[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  std::vector<double> loads;
  relative_loads(stats.counts(), targets, loads);
  loads.resize(static_cast<std::size_t>(stats.experts()), 0);
  const std::size_t each = (loads.size() + width - 1) / width;
  const std::size_t wide = std::clamp<std::size_t>(width / loads.size(), 1, 3);
  std::string text;
  for (std::size_t i = 0; i < loads.size(); i += each) {
    const auto group = std::span(loads).subspan(i, std::min(each, loads.size() - i));
    const double load = *std::max_element(group.begin(), group.end());
    const char* block = kBlocks[static_cast<std::size_t>(std::clamp(std::lround(load * 4), 0L, 8L))];
    for (std::size_t repeat = 0; repeat < wide; ++repeat) text += block;
  }
  return text;
}

}  // namespace

void WatchedStep::add(const LogRecord& record, const Metrics& record_metrics) {
  mean.add(sample_of(record, record_metrics));
  for (const auto& [name, actuator] : record.actuators) {
    Track& track = tracks[name];
    if (actuator.min && actuator.max) {
      track.min = track.any ? std::min(track.min, *actuator.min) : *actuator.min;
      track.max = track.any ? std::max(track.max, *actuator.max) : *actuator.max;
      track.any = true;
    }
    for (const std::string& reason : actuator.reasons) ++track.reasons[reason];
  }
  for (const LoggedNotice& notice : record.notices) {
    notices.push_back((record.layer < 0 ? "" : "layer " + std::to_string(record.layer) + ": ") + notice.text);
  }
  if (record.layer < 0) return;
  metrics[record.layer] = record_metrics;
  layers.insert_or_assign(record.layer, record);
}

std::string plain_line(const WatchedStep& step) {
  const StepFigures figures = step.mean.figures();
  std::string text = "step " + std::to_string(step.number);
  if (figures.loss) text += "  loss " + brief(figures.loss);
  text +=
      "  max_vio " + brief(figures.max_vio) + times(figures.max_vio, figures.floor_max_vio, figures.floor);
  text += "  cv " + brief(figures.cv) + times(figures.cv, figures.floor_cv, figures.floor);
  text += "  dead " + brief(figures.dead_experts);
  for (const auto& [name, track] : step.tracks) text += "  " + name + ' ' + decisions(track);
  return printable(text);
}

std::vector<std::string> view_of(const WatchedStep& step, const std::string& title, const std::string& notice,
                                 std::int64_t faults, std::size_t rows, std::size_t columns) {
  const StepFigures f = step.mean.figures();
  std::vector<std::string> lines = {title + "  step " + std::to_string(step.number),
                                    "loss " + brief(f.loss) + "  MaxVio " + brief(f.max_vio) +
                                        times(f.max_vio, f.floor_max_vio, f.floor) + "  CV " + brief(f.cv) +
                                        times(f.cv, f.floor_cv, f.floor) + "  dead " + brief(f.dead_experts)};
  std::vector<std::string> last;
  for (const auto& [name, track] : step.tracks) last.push_back(name + ' ' + decisions(track));
  if (!notice.empty()) last.push_back("notice: " + notice);
  if (faults > 0) last.push_back(std::to_string(faults) + " lines skipped");

  std::size_t health = 0, number_width = 1;
  for (const auto& [number, record] : step.layers) {
    health = std::max(health, record.health.size());
    number_width = std::max(number_width, std::to_string(number).size());
  }
  const std::size_t room = rows > 2 + last.size() ? rows - 2 - last.size() : 1;
  const bool all = step.layers.size() <= room;
  std::size_t shown = 0;
  for (const auto& [number, record] : step.layers) {
    if (!all && shown + 1 >= room) {
      lines.push_back("… " + std::to_string(step.layers.size() - shown) + " more layers");
      break;
    }
    ++shown;
    std::string line = "layer " + padded(std::to_string(number), number_width) + "  MaxVio " +
                       padded(brief(step.metrics.at(number).max_vio), 8) + ' ';
    const std::size_t taken = line.size() + 2 + health;
    const std::size_t width = columns > taken + 1 ? columns - taken : 1;
    line += (record.stats.experts() > 0 ? bars(record.stats, record.targets.get(), width) : "") + "  " +
            record.health;
    lines.push_back(std::move(line));
  }
  lines.insert(lines.end(), last.begin(), last.end());
  if (lines.size() > rows) lines.resize(rows);
  for (std::string& line : lines) line = cut(printable(line), columns);
  return lines;
}

Screen::Size Screen::size() {
  winsize window{};
  const bool known =
      ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) == 0 && window.ws_row > 4 && window.ws_col > 40;
  // The cursor waits in a line of its own.
  return known ? Size{window.ws_row - 1U, window.ws_col} : Size{23, 80};
}

void Screen::show(std::vector<std::string> lines) {
  pending_ = std::move(lines);
  if (std::chrono::steady_clock::now() - drawn_ >= std::chrono::milliseconds(50)) draw_pending();
}

void Screen::draw_pending() {
  if (pending_.empty()) return;
  std::string text;
  if (drawn_lines_ > 0) text = "\x1b[" + std::to_string(drawn_lines_) + "F";
  // Each line clears the rest of the line that it replaces, so the view does not flicker.
  for (const std::string& line : pending_) text += line + "\x1b[K\n";
  text += "\x1b[J";
  untouched_output() << text << std::flush;  // its lines are printable
  drawn_lines_ = pending_.size();
  pending_.clear();
  drawn_ = std::chrono::steady_clock::now();
}

}  // namespace moectl::cli
