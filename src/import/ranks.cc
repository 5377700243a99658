#include "import/ranks.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>
#include <tuple>

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

// ---- Copies ----

namespace {

constexpr double kChance = -13.8;  // log of 1e-6

double log_factorial(std::int64_t n) {
  return std::lgamma(static_cast<double>(n) + 1);
}

}  // namespace

RankCopies::RankCopies(std::vector<int> ranks)
    : ranks_(std::move(ranks)), layers_(ranks_.size()), told_(ranks_.size()), first_(ranks_.size()) {
  for (std::size_t i = 0; i < ranks_.size(); ++i) {
    met_.emplace_back(i, false);
    differ_.emplace_back(i, false);
    first_[i] = i;
  }
}

namespace {

// Copies hold the same tokens; sums of scores may differ in a last bit.
bool same_choices(const ImportedStep& a, const ImportedStep& b) {
  return std::ranges::equal(a.layers, b.layers, [](const auto& one, const auto& other) {
    const ImportedLayer &x = one.second, &y = other.second;
    return one.first == other.first && x.top_k == y.top_k && x.tokens == y.tokens && x.counts == y.counts;
  });
}

}  // namespace

void RankCopies::see(const std::vector<const ImportedStep*>& steps) {
  std::vector<bool> has_copy(steps.size());
  for (std::size_t i = 0; i < steps.size(); ++i) {
    for (std::size_t j = 0; steps[i] && j < i; ++j) {
      if (!steps[j] || differ_[i][j]) continue;
      if (same_choices(*steps[i], *steps[j])) {
        met_[i][j] = has_copy[i] = has_copy[j] = true;
        continue;
      }
      differ_[i][j] = true;
      if (met_[i][j] && told(i) && told(j))
        throw ImportError(
            "step " + std::to_string(steps[i]->step) + ": ranks " + std::to_string(ranks_[j]) + " and " +
            std::to_string(ranks_[i]) +
            " differ, though they hold the same counts in all steps before, as copies of the same tokens "
            "do: give the files of one of them, or keep them apart with --by rank");
    }
  }
  for (std::size_t i = 0; i < steps.size(); ++i) {
    if (!has_copy[i] || told_[i]) continue;
    for (const auto& [key, layer] : steps[i]->layers) {
      Choices& of = layers_[i][key];
      of.counts.resize(std::max(of.counts.size(), layer.counts.size()));
      std::int64_t sum = 0;
      for (std::size_t e = 0; e < layer.counts.size(); ++e) {
        sum = added(sum, layer.counts[e]);
        of.counts[e] = added(of.counts[e], layer.counts[e]);
        of.orders -= log_factorial(layer.counts[e]);
      }
      of.orders += log_factorial(sum);
    }
    told(i);
  }
}

/// The log of the chance that independent tokens, chosen with the shares of the whole trace, make the counts of each step:
/// Σ over layers of Σ_steps log(T! / Π c_i!) + Σ_i C_i log(C_i / C).
double RankCopies::chance(std::size_t rank) const {
  double sum = 0;
  for (const auto& [key, of] : layers_[rank]) {
    double all = 0;
    for (const std::int64_t count : of.counts) all += static_cast<double>(count);
    sum += of.orders;
    for (const std::int64_t count : of.counts) {
      if (count > 0) sum += static_cast<double>(count) * std::log(static_cast<double>(count) / all);
    }
  }
  return sum;
}

/// Whether the choices of a rank are too many for another to make the same by chance.
bool RankCopies::told(std::size_t rank) {
  if (!told_[rank] && chance(rank) < kChance) {
    told_[rank] = true;
    layers_[rank].clear();
  }
  return told_[rank];
}

void RankCopies::decide(ImportNotes& notes) {
  std::vector<std::string> groups(ranks_.size());
  for (std::size_t i = 0; i < ranks_.size(); ++i) {
    for (std::size_t j = 0; j < i && first_[i] == i; ++j) {
      if (!met_[i][j] || differ_[i][j]) continue;
      const auto empty = [](const auto& entry) {
        return std::ranges::all_of(entry.second.counts, [](std::int64_t count) { return count == 0; });
      };
      if (!told(i) && std::ranges::all_of(layers_[i], empty)) continue;  // nothing to add up
      if (!told(i))
        throw ImportError(
            "ranks " + std::to_string(ranks_[j]) + " and " + std::to_string(ranks_[i]) +
            " hold the same counts, of too few tokens to tell copies of the same tokens (tensor "
            "parallelism) from chance: give the files of one of them, or keep them apart with --by rank");
      first_[i] = first_[j];
      std::string& group = groups[first_[j]];
      if (group.empty()) group = std::to_string(ranks_[first_[j]]);
      group += ' ';
      group += std::to_string(ranks_[i]);
    }
  }
  constexpr std::size_t kShown = 4;
  std::string text;
  std::size_t copied = 0, parts = 0;
  for (std::size_t i = 0; i < ranks_.size(); ++i) {
    parts += first_[i] == i;
    if (groups[i].empty()) continue;
    if (copied < kShown) text += (copied ? ", " : "") + groups[i];
    if (copied == kShown) text += ", ...";
    ++copied;
  }
  if (copied)
    notes.say("ranks that hold the same counts are taken once, as copies of the same tokens: " + text);
  if (parts > 1)
    notes.say(std::string("the counts of the ranks are added up") + (copied ? ", copies once" : "") +
              "; --by rank keeps them apart");
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

std::vector<int> Source::ranks() const {
  std::vector<int> ranks;
  for (const Lane& lane : lanes_) ranks.push_back(lane.rank);
  return ranks;
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
  bool any = false;
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (!here[i]) continue;
    Lane& lane = lanes_[i];
    any = true;
    step.step = lane.step.step;
    if (taken.insert(copies ? copies->first_of(i) : i).second) {
      const std::string rank = apart_ ? "rank" + std::to_string(lane.rank) : "";
      for (auto& [key, layer] : lane.step.layers) {
        const std::string joint = rank.empty() || key.second.empty() ? "" : "/";
        const auto [it, is_new] = step.layers.try_emplace({key.first, rank + joint + key.second}, layer);
        try {
          if (!is_new) it->second += layer;
        } catch (const ImportError& e) {
          throw ImportError("step " + std::to_string(step.step) + ", layer " + std::to_string(key.first) +
                            ", rank " + std::to_string(lane.rank) + ": " + e.what());
        }
      }
    }
    lane.more = lane.files.next(lane.step);
  }
  for (std::size_t i = 0; copies && i < lanes_.size() && !lack_said_; ++i) {
    if (taken.count(copies->first_of(i))) continue;
    lack_said_ = any;
    if (any)
      notes_.say("step " + std::to_string(step.step) + ", perhaps others: no data of rank " +
                 std::to_string(lanes_[i].rank) + ": the sums hold the other ranks alone");
  }
  return any;
}

}  // namespace moectl
