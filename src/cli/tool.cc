#include "cli/tool.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <system_error>

#include "base/format.h"
#include "base/host_hold.h"

namespace moectl::cli {
namespace {

template <typename T>
bool reads_as(const std::string& text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

// `text` is a number of type T that is good; else says what it must be.
template <typename T, typename Good>
CLI::Validator number_where(Good good, const std::string& what, const std::string& kind) {
  const auto check = [good, what](const std::string& text) {
    T value{};
    return reads_as(text, value) && good(value) ? std::string() : text + ": must be " + what;
  };
  return {check, kind};
}

/// Whether a file is a finished piece of a log, RUN.000001 and so on: they are written and read with it.
bool is_piece_of(const std::filesystem::path& file, const std::filesystem::path& log) {
  const std::string number = file.extension().string();
  return number.size() > 6 && number.find_first_not_of("0123456789", 1) == std::string::npos &&
         file.parent_path() / file.stem() == log;
}

}  // namespace

CLI::Validator whole_number(std::int64_t least, std::int64_t most) {
  const bool open = most == std::numeric_limits<std::int64_t>::max();
  const std::string range = open ? "of at least " + std::to_string(least)
                                 : "from " + std::to_string(least) + " to " + std::to_string(most);
  return number_where<std::int64_t>(
      [least, most](std::int64_t value) { return value >= least && value <= most; },
      "a whole number " + range, least > 0 ? "POSITIVE" : "NONNEGATIVE");
}
CLI::Validator number_from_zero() {
  return number_where<double>([](double value) { return value >= 0 && std::isfinite(value); },
                              "a number of at least 0", "NONNEGATIVE");
}
CLI::Validator positive_number() {
  return number_where<double>([](double value) { return value > 0 && std::isfinite(value); },
                              "a number above 0", "POSITIVE");
}
CLI::Validator number_between(double least, double most) {
  const std::string from = moectl::brief(least), to = moectl::brief(most);
  return number_where<double>([=](double value) { return value >= least && value <= most; },  // not NaN
                              "a number from " + from + " to " + to, "in [" + from + ", " + to + ']');
}

void keep_inputs(const std::string& option, const std::string& output,
                 const std::vector<std::string>& inputs) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  if (output == "-" || (fs::exists(output, ignored) && !fs::is_regular_file(output, ignored))) return;
  const fs::path path = fs::weakly_canonical(fs::absolute(output, ignored), ignored);
  for (const std::string& input : inputs) {
    const fs::path given = input == "-" ? "/dev/stdin" : input,
                   file = fs::weakly_canonical(fs::absolute(given, ignored), ignored);
    const char* const is = fs::equivalent(path, given, ignored)       ? ": is"
                           : is_piece_of(path, file)                  ? ": is a piece of"
                           : is_piece_of(file, path)                  ? ": has as a piece"
                           : file.string() == path.string() + ".part" ? ": is written by way of"
                                                                      : nullptr;
    if (is != nullptr)
      throw InputError(option + ": " + output + is + " the input " + shown_path(input) +
                       ": must be another file");
  }
}

std::vector<std::string> files_of(const ControllerConfig& config) {
  std::vector<std::string> files = {config.expert_bias.initial.file};
  for (const LayerGroup& group : config.layers) {
    if (group.expert_bias) files.push_back(group.expert_bias->initial.file);
  }
  for (const TimelineEntry& entry : config.timeline) {
    if (entry.expert_bias) files.push_back(entry.expert_bias->initial.file);
  }
  std::erase(files, "");
  return files;
}

void say_if_held() {
  if (environment_holds())
    std::cerr << "MOECTL_HOLD is set: every actuator is held where it is (host_hold)\n";
}

CLI::Option* add_format(CLI::App& command, std::string& format, std::vector<std::string> formats) {
  format = formats.front();
  return command.add_option("--format", format, "How to print")
      ->check(CLI::IsMember(std::move(formats)))
      ->capture_default_str();
}

LogDefaults defaults_of(const ModelConfig& model) {
  LogDefaults defaults;
  if (model.top_k > 0) defaults.top_k = model.top_k;  // else each layer group has its own
  if (model.tokens_per_step > 0) defaults.tokens = model.tokens_per_step;
  return defaults;
}

void say_faults(const LogReader& log, const std::string& path) {
  for (const std::string& assumption : log.assumptions()) std::cerr << assumption << '\n';
  for (const std::string& fault : log.faults()) std::cerr << fault << '\n';
  if (const auto more = log.fault_count() - static_cast<std::int64_t>(log.faults().size()); more > 0) {
    std::cerr << said_path(path) << ": " << more << " more faults\n";
  }
}

void add_trace(CLI::App& command, std::string& path) {
  command
      .add_option("TRACE", path,
                  "Trace or run log, plain or gzip; - reads standard input. A line of a trace: " + kTraceLine)
      ->required();
}

void add_salvage(CLI::App& command, FaultPolicy& fault_policy) {
  fault_policy = FaultPolicy::kRepair;
  command.add_flag_callback(
      "--salvage", [&fault_policy] { fault_policy = FaultPolicy::kSalvage; },
      "Skip records that are wrong (damaged ones are skipped in any case); both are listed on standard "
      "error");
}

std::string Table::text() const {
  std::vector<std::size_t> widths;
  // Columns are counted in characters, not bytes: names may hold any UTF-8.
  const auto width = [](const std::string& cell) {
    return static_cast<std::size_t>(
        std::count_if(cell.begin(), cell.end(), [](char c) { return (c & 0xC0) != 0x80; }));
  };
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width(row[i]));
  }
  std::string text;
  for (const auto& row : rows_) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string gap(widths[i] - width(row[i]), ' ');
      line += i == 0 ? row[i] + gap : "  " + gap + row[i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + '\n';
  }
  return text;
}

std::string brief(const std::optional<double>& value) {
  if (!value) return "-";
  // Counts and steps in full, everything else to four digits.
  const bool whole = *value == std::floor(*value) && std::abs(*value) < 1e15;
  return whole ? std::to_string(std::llround(*value)) : moectl::brief(*value);
}

}  // namespace moectl::cli
