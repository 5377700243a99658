// moectl report RUN… -o report.html: one self-contained page, several runs side by side.
#include <algorithm>
#include <fstream>
#include <map>
#include <memory>

#include "base/printable.h"
#include "cli/report_data.h"
#include "cli/report_page.h"
#include "cli/terminal.h"
#include "cli/tool.h"

namespace moectl::cli {
namespace {

struct Options {
  std::vector<std::string> runs;
  std::optional<std::int64_t> shift;
  std::string output;
};

/// JSON that may stand inside a script element: nothing in it can end the element, and nothing steers a terminal. The one
/// way in which text of others comes onto the page; its scripts put it there as text, never as HTML.
std::string embedded(const nlohmann::json& value) {
  std::string text;
  for (const char c : printable(json_text(value))) {
    if (c == '<') {
      text += "\\u003c";
    } else {
      text += c;
    }
  }
  return text;
}

/// The page with its marks filled in. A mark counts where the page itself has it: what is filled in may hold any text.
std::string filled(std::string_view page, const std::map<std::string_view, std::string_view>& texts) {
  std::string out;
  for (std::size_t at = 0; at < page.size();) {
    const auto text = std::ranges::find_if(
        texts, [&](const auto& entry) { return page.substr(at).starts_with(entry.first); });
    if (text == texts.end()) {
      out += page[at++];
    } else {
      out += text->second;
      at += text->first.size();
    }
  }
  return out;
}

int report(const Options& options) {
  keep_inputs("--output", options.output, options.runs);
  auto data = nlohmann::json::array();
  for (const std::string& path : options.runs) {
    ReportRun run(path, options.shift);
    data.push_back(run.json());
  }
  const std::string json = embedded(data);
  const std::string page = filled(
      page_html(),
      {{"/*STYLE*/", page_css()}, {"/*DATA*/", json}, {"/*CHART*/", chart_js()}, {"/*APP*/", page_js()}});
  if (options.output == "-") {
    untouched_output() << page;
    return 0;
  }
  std::ofstream file(options.output, std::ios::binary);
  file << page;
  file.close();
  if (!file) throw InputError(options.output + ": cannot be written");
  return 0;
}

}  // namespace

void add_report(CLI::App& app, Tool& tool) {
  CLI::App* command = app.add_subcommand("report", "Write one self-contained page about one or several runs");
  command->footer(
      R"(The page needs no network. Long runs are downsampled with their extremes kept. Lines that cannot be read are skipped
and reported, here and on the page.

Examples:
  moectl report runs/demo/*.jsonl -o report.html
  moectl report before.jsonl after.jsonl --shift 420 -o report.html)");
  auto options = std::make_shared<Options>();
  command->add_option("RUN", options->runs, "Run logs or traces")->required();
  command->add_option("-o,--output", options->output, "The page to write; - is standard output")->required();
  command->add_option("--shift", options->shift, "Step at which the data changed, for all runs")
      ->check(whole_number(0));
  command->callback([&tool, options] { tool.run = [options] { return report(*options); }; });
}

}  // namespace moectl::cli
