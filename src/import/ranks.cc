#include "import/ranks.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>
#include <tuple>

#include "moectl/run_log.h"

namespace moectl {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kNoStep = std::numeric_limits<std::int64_t>::max();

/// The time in the name of a dump, such as expert_distribution_rank0_timestamp1744347750.37.csv; seconds.
std::optional<double> time_of(const std::string& path) {
  constexpr std::string_view kWord = "timestamp";
  const std::string name = fs::path(path).filename().string();
  const std::size_t at = name.find(kWord);
  if (at == std::string::npos) return std::nullopt;
  double value = 0;
  const char* const from = name.data() + at + kWord.size();
  if (std::from_chars(from, name.data() + name.size(), value, std::chars_format::fixed).ec != std::errc() ||
      !(std::abs(value) < 1e15))
    return std::nullopt;
  return value;
}

}  // namespace

int rank_of(const std::string& path) {
  constexpr std::string_view kWord = "rank";
  const std::string name = fs::path(path).filename().string();
  int rank = -1;
  for (std::size_t at = name.find(kWord); at != std::string::npos; at = name.find(kWord, at + 1)) {
    std::size_t from = at + kWord.size();
    if (from < name.size() && (name[from] == '_' || name[from] == '-')) ++from;
    unsigned value = 0;
    if (std::from_chars(name.data() + from, name.data() + name.size(), value).ec != std::errc()) continue;
    if (rank >= 0)
      throw ImportError(path + ": the name tells two ranks: expected one number for each rank, such as rank" +
                        std::to_string(rank));
    rank = static_cast<int>(std::min(value, 1000000000U));
  }
  return rank;
}

// ---- The files of one rank ----

void RankFiles::sort_by_time() {
  std::ranges::stable_sort(files_, {}, [](const auto& file) { return time_of(file.second).value_or(0); });
}

bool RankFiles::next(ImportedStep& step) {
  if (ends_.empty()) find_starts();
  for (; at_ < files_.size(); ++at_, close()) {
    if (!reader_) open();
    if (!read(step)) continue;
    if (reader_->numbered() && step.step >= ends_[at_]) {
      notes_.say(files_[at_].second + ": left out from step " + std::to_string(step.step) +
                 " on: a later file starts at step " + std::to_string(ends_[at_]) +
                 ", as of a run that was resumed");
      continue;
    }
    // Where steps are counted, each file counts from 0.
    if (first_) offset_ = step.step <= last_ ? last_ + 1 - step.step : 0;
    first_ = false;
    step.step += offset_;
    last_ = step.step;
    return true;
  }
  return false;
}

/// Steps that a run has numbered stay where they are. A file that starts among those before it is of a run that was resumed
/// from a checkpoint: its steps count, as they do in TensorBoard.
void RankFiles::find_starts() {
  ends_.assign(std::max<std::size_t>(files_.size(), 1), kNoStep);
  if (files_.size() < 2) return;
  std::int64_t before = -1;
  std::string name;
  ImportedStep step;
  for (; at_ < files_.size(); ++at_, close()) {
    open();
    if (!read(step) || !reader_->numbered()) continue;
    if (step.step <= before) {
      throw ImportError(
          files_[at_].second + ": starts at step " + std::to_string(step.step) + ", and " + name +
          " before it at step " + std::to_string(before) +
          ": expected rankN in the names of files of ranks, the order of time for parts of a run, and one "
          "import for each run");
    }
    before = step.step;
    name = files_[at_].second;
    for (std::size_t i = 0; i < at_; ++i) ends_[i] = std::min(ends_[i], step.step);
  }
  at_ = 0;
}

void RankFiles::open() {
  const auto& [path, name] = files_[at_];
  bytes_ = std::make_unique<Bytes>(path, name);
  nearest_ = resembles(*bytes_);
  if (nearest_ == "moectl")
    throw ImportError(bytes_->name() + ": this is a trace or run log of moectl already");
  if (nearest_ == "torch")
    throw ImportError(
        bytes_->name() + ": a file of torch.save, which only PyTorch reads: python3 -m moectl.convert " +
        fs::path(name).filename().string() +
        " --top-k K -o TRACE makes a trace of a dump of SGLang; save another one's array as .npy");
  // Rows of layer, expert and count would pass for a matrix.
  if (format_.shown.name == "csv" && (nearest_ == "sglang" || nearest_ == "llama.cpp"))
    fail(OtherFormat(bytes_->name() + ": expected a matrix of numbers"));
  // A row with a count is no single choice.
  if (format_.shown.name == "llama.cpp" && nearest_ == "sglang")
    fail(OtherFormat(bytes_->name() + ": expected CSV with the columns layer,expert, a row for each choice"));
  try {
    reader_ = format_.open(*bytes_, options_, notes_);
  } catch (const OtherFormat& e) {
    fail(e);
  }
  first_ = true;
}

void RankFiles::close() {
  reader_.reset();
  bytes_.reset();
}

bool RankFiles::read(ImportedStep& step) {
  try {
    return reader_->next(step);
  } catch (const OtherFormat& e) {
    fail(e);
  }
}

/// The error, with the format that the file looks like.
void RankFiles::fail(const OtherFormat& e) const {
  if (nearest_.empty() || nearest_ == format_.shown.name) throw e;
  throw ImportError(std::string(e.what()) + "; nearest format: " + std::string(nearest_));
}

// ---- Ranks side by side ----

Source::Source(const Format& format, const InputFiles& files, const ImportOptions& options,
               ImportNotes& notes)
    : notes_(notes) {
  std::map<int, RankFiles> ranks;
  for (const auto& [path, name] : files)
    ranks.try_emplace(rank_of(name), format, options, notes).first->second.add(path, name);
  for (auto& [rank, of_rank] : ranks) {
    of_rank.sort_by_time();
    lanes_.push_back({rank, std::move(of_rank), {}, true});
  }
  // Micro-batches of a single process have no rank.
  if (ranks.count(-1) && (options.by_rank || (options.by_micro_batch && ranks.size() > 1)))
    throw ImportError("--by: the names of the files must tell the rank, such as router_trace_rank0.jsonl");
  apart_ = options.by_rank || (options.by_micro_batch && !ranks.count(-1));
  if (lanes_.size() > 1) check_times();
  for (Lane& lane : lanes_) lane.more = lane.files.next(lane.step);
}

/// Dumps of ranks are paired in the order of their time stamps: each time must have one of every rank.
void Source::check_times() const {
  constexpr double kFarApart = 10;  // seconds; ranks dump at the same request
  std::vector<std::tuple<double, std::size_t, std::string>> dumps;
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    for (const auto& [path, name] : lanes_[i].files.files()) {
      const auto time = time_of(name);
      if (!time) return;
      dumps.emplace_back(*time, i, name);
    }
  }
  std::ranges::sort(dumps);
  for (std::size_t at = 0; at < dumps.size(); at += lanes_.size()) {
    std::set<std::size_t> here;
    std::size_t end = at;
    while (end < dumps.size() && here.insert(std::get<1>(dumps[end])).second) ++end;
    for (std::size_t i = 0; i < lanes_.size(); ++i) {
      if (!here.count(i))
        throw ImportError(std::get<2>(dumps[at]) + ": rank " + std::to_string(lanes_[i].rank) +
                          " has no dump of that time: expected one of each rank for each time of dumping");
    }
    const double apart = std::get<0>(dumps[end - 1]) - std::get<0>(dumps[at]);
    if (apart > kFarApart)
      notes_.say(std::get<2>(dumps[at]) + ": the other ranks' dumps of this step are up to " +
                 std::to_string(static_cast<std::int64_t>(apart)) + " s later");
  }
}

RankCopies Source::copies() const {
  RankCopies copies("give the files of one of them, or keep them apart with --by rank");
  for (const Lane& lane : lanes_) copies.add(std::to_string(lane.rank));
  return copies;
}

void Source::show(RankCopies& copies) const {
  std::vector<std::vector<RankLayer>> ranks;
  std::int64_t number = 0;
  for (const ImportedStep* const step : upcoming()) {
    std::vector<RankLayer>& layers = ranks.emplace_back();
    if (!step) continue;
    number = step->step;
    for (const auto& [key, layer] : step->layers)
      layers.push_back({key, layer.top_k, layer.tokens, layer.counts});
  }
  try {
    copies.see(number, ranks);
  } catch (const LogError& e) {
    throw ImportError(e.what());
  }
}

std::vector<const ImportedStep*> Source::upcoming() const {
  std::int64_t first = kNoStep;
  for (const Lane& lane : lanes_) first = lane.more ? std::min(first, lane.step.step) : first;
  std::vector<const ImportedStep*> steps;
  for (const Lane& lane : lanes_)
    steps.push_back(lane.more && lane.step.step == first ? &lane.step : nullptr);
  return steps;
}

bool Source::next(ImportedStep& step, const RankCopies* copies) {
  const std::vector<const ImportedStep*> here = upcoming();
  step.layers.clear();
  std::set<std::size_t> taken;
  const auto group = [&](std::size_t i) { return copies ? copies->first_of(i) : i; };
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (!here[i]) continue;
    step.step = here[i]->step;
    const bool is_first = taken.insert(group(i)).second;
    const std::string rank = apart_ ? "rank" + std::to_string(lanes_[i].rank) : "";
    for (const auto& [key, layer] : here[i]->layers) {
      // Of copies the first one counts that has the layer.
      const auto has_it = [&, &key = key](std::size_t j) {
        return here[j] && group(j) == group(i) && here[j]->layers.count(key);
      };
      bool counts = true;
      for (std::size_t j = 0; !is_first && counts && j < i; ++j) counts = !has_it(j);
      if (!counts) continue;
      const std::string joint = rank.empty() || key.second.empty() ? "" : "/";
      const auto [it, is_new] = step.layers.try_emplace({key.first, rank + joint + key.second}, layer);
      try {
        if (!is_new) it->second += layer;
      } catch (const ImportError& e) {
        throw ImportError("step " + std::to_string(step.step) + ", layer " + std::to_string(key.first) +
                          ", rank " + std::to_string(lanes_[i].rank) + ": " + e.what());
      }
    }
  }
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (here[i]) lanes_[i].more = lanes_[i].files.next(lanes_[i].step);
  }
  const bool any = !taken.empty();
  for (std::size_t i = 0; copies && i < lanes_.size() && !lack_said_; ++i) {
    if (taken.count(group(i))) continue;
    lack_said_ = any;
    if (any)
      notes_.say("step " + std::to_string(step.step) + ", perhaps others: no data of rank " +
                 std::to_string(lanes_[i].rank) + ": the sums hold the other ranks alone");
  }
  return any;
}

}  // namespace moectl
