#include "cli/tool.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <iostream>

namespace moectl::cli {

void add_format(CLI::App& command, std::string& format, std::vector<std::string> formats) {
  format = formats.front();
  command.add_option("--format", format, "How to print")
      ->check(CLI::IsMember(std::move(formats)))
      ->capture_default_str();
}

void say_faults(const LogReader& log, const std::string& path) {
  for (const std::string& fault : log.faults()) std::cerr << fault << '\n';
  if (const auto more = log.fault_count() - static_cast<std::int64_t>(log.faults().size()); more > 0) {
    std::cerr << path << ": " << more << " more faults\n";
  }
}

void add_salvage(CLI::App& command, Reading& reading) {
  reading = Reading::kRepair;
  command.add_flag_callback(
      "--salvage", [&reading] { reading = Reading::kSalvage; },
      "Pass over records that are wrong (damaged ones are passed over in any case); both are said");
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
  char text[40];
  // Counts and steps in full, everything else to four digits.
  const bool whole = *value == std::floor(*value) && std::abs(*value) < 1e15;
  std::snprintf(text, sizeof text, whole ? "%.0f" : "%.4g", *value);
  return text;
}

std::string exact(double value) {
  char text[40];
  return {text, std::to_chars(text, text + sizeof text, value).ptr};
}

}  // namespace moectl::cli
