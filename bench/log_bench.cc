// How long `moectl compare` takes over a plain run log, against a bare simdjson parse of the same file:
//   log_bench [MEGABYTES [FILE]]     (default 64; the file is written, and removed at the end unless it is named)
#include <simdjson.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>

#include "moectl/figures.h"
#include "moectl/metrics.h"
#include "moectl/run_log.h"

namespace {

using namespace moectl;

constexpr int kLayers = 8, kExperts = 64, kTopK = 8;

void write_log(const std::string& path, std::uintmax_t bytes) {
  ControllerConfig config;
  config.model = {.layers = kLayers, .experts = kExperts, .top_k = kTopK, .domains = {}, .targets = {}};
  std::mt19937_64 random(1);
  std::normal_distribution<double> noise(0, 0.01);
  std::vector<RoutingStats> stats(kLayers, RoutingStats({kExperts, kTopK, {}}));
  std::vector<Metrics> metrics(kLayers);
  std::vector<std::vector<double>> bias(kLayers, std::vector<double>(kExperts));
  std::vector<LayerReport> reports(kLayers);
  std::vector<std::int64_t> counts(kExperts);
  RunLogWriter writer(path, config);
  StepReport report;
  for (std::uintmax_t written = 0; written < bytes; ++report.step) {
    for (std::size_t l = 0; l < kLayers; ++l) {
      std::int64_t sum = 0;
      for (auto& count : counts) sum += count = 900 + static_cast<std::int64_t>(random() % 200);
      stats[l].clear();
      stats[l].add_counts(counts, sum);
      metrics[l] = measure(stats[l]);
      for (double& b : bias[l]) b += noise(random);
      reports[l].layer = static_cast<int>(l);
      reports[l].stats = &stats[l];
      reports[l].metrics = &metrics[l];
      reports[l].actuators[0] = {.proposed = bias[l], .applied = bias[l], .reasons = {}};
    }
    report.layers = reports;
    report.info.loss = 2 + noise(random);
    writer.write(report);
    if (report.step % 100 == 0) written = std::filesystem::file_size(path);
  }
}

template <typename F>
double seconds(F work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Each line into simdjson's document, which is not looked into.
std::size_t parse_alone(const std::string& path) {
  simdjson::dom::parser parser;
  simdjson::padded_string text;
  if (simdjson::padded_string::load(path).get(text)) std::abort();
  std::size_t lines = 0;
  const char *at = text.data(), *const end = at + text.size();
  while (at != end) {
    const char* const stop = std::find(at, end, '\n');
    if (parser.parse(at, static_cast<std::size_t>(stop - at), false).error()) std::abort();
    ++lines;
    at = stop == end ? end : stop + 1;
  }
  return lines;
}

}  // namespace

int main(int argc, char** argv) {
  const double megabytes = argc > 1 ? std::atof(argv[1]) : 64;
  const std::string path =
      argc > 2 ? argv[2] : (std::filesystem::temp_directory_path() / "moectl_log_bench.jsonl").string();
  write_log(path, static_cast<std::uintmax_t>(megabytes * 1e6));
  // The least of three each, in turn: other work on the machine only adds.
  double alone = 1e300, compared = 1e300;
  for (int round = 0; round < 3; ++round) {
    alone = std::min(alone, seconds([&] { parse_alone(path); }));
    compared = std::min(compared, seconds([&] { (void)read_figures(path, std::nullopt); }));
  }
  const double size = static_cast<double>(std::filesystem::file_size(path)) / 1e6;
  std::printf("%.0f MB: simdjson alone %.3f s, figures of the run %.3f s: ratio %.2f (budget 3)\n", size,
              alone, compared, compared / alone);
  if (argc <= 2) std::filesystem::remove(path);
}
