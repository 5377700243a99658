#include "log/parts.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "base/input_limits.h"
#include "log/reshape.h"

namespace moectl {
namespace {

bool is_numbered(std::string_view text, std::string_view word) {
  return text.size() > word.size() && text.starts_with(word) &&
         text.find_first_not_of("0123456789", word.size()) == std::string_view::npos;
}

/// What two parts of a step say of it together.
void add(LogRecord& to, const LogRecord& more) {
  if (to.stats.experts() != more.stats.experts() || to.stats.top_k() != more.stats.top_k()) {
    throw LogError("layer " + std::to_string(to.layer) + ": step " + std::to_string(to.step) +
                   ": experts and top_k must be the same in all parts of a step");
  }
  // A loss is a mean over tokens.
  const auto before = static_cast<double>(to.stats.tokens()),
             added = static_cast<double>(more.stats.tokens());
  if (to.loss && more.loss && before + added > 0) {
    to.loss = (*to.loss * before + *more.loss * added) / (before + added);
  } else if (!to.loss) {
    to.loss = more.loss;
  }
  add_recorded(to.stats, to.domains, more.stats, more.domains);
  require_range(to.stats, to.layer, "step " + std::to_string(to.step) + ": the parts of the step");
  if (__builtin_add_overflow(to.tokens, more.tokens, &to.tokens))
    to.tokens = std::numeric_limits<std::int64_t>::max();
  // Of a run log: what holds for one part alone is measured anew.
  to.metrics.clear();
  to.health.clear();
  to.alerts.clear();
}

/// A string, or a value with its key, in numbers of eight bytes.
std::int64_t words_of(std::string_view text) {
  return 8 + static_cast<std::int64_t>(text.size() / sizeof(double));
}

/// What a record that is held takes, in numbers of eight bytes.
std::int64_t size_of(const LogRecord& record) {
  std::size_t numbers = sizeof record / sizeof(double) + record.stats.flat().size();
  std::int64_t words = words_of(record.tag) + words_of(record.health);
  const auto add_words = [&](const std::string& text) { words += words_of(text); };
  std::ranges::for_each(record.domains, add_words);
  std::ranges::for_each(record.alerts, add_words);
  for (const auto& [name, tokens] : record.next_mixture) add_words(name);
  for (const auto& [name, value] : record.metrics) add_words(name);
  for (const LoggedNotice& notice : record.notices) words += words_of(notice.kind) + words_of(notice.text);
  for (const auto& [name, actuator] : record.actuators) {
    std::ranges::for_each(actuator.reasons, add_words);
    numbers += sizeof actuator / sizeof(double) + actuator.proposed.size() + actuator.applied.size() +
               actuator.deployed.size();
  }
  return static_cast<std::int64_t>(numbers) + words;
}

}  // namespace

TagParts parts_of(std::string_view tag) {
  TagParts parts;
  const auto append = [](std::string& text, std::string_view segment) {
    if (!text.empty()) text += '/';
    text += segment;
  };
  for (std::size_t from = 0; from <= tag.size();) {
    const std::size_t to = std::min(tag.find('/', from), tag.size());
    const std::string_view segment = tag.substr(from, to - from);
    if (is_numbered(segment, "mb")) {
      parts.micro_batch = true;
    } else {
      append(parts.of_rank, segment);
      if (is_numbered(segment, "rank")) {
        parts.rank = true;
        parts.number = segment.substr(4);
      } else {
        append(parts.rest, segment);
      }
    }
    from = to + 1;
  }
  if (parts.rest.empty()) parts.rest = "train";
  if (parts.of_rank.empty()) parts.of_rank = "train";
  return parts;
}

std::optional<LogRecord> WholeRecords::next() {
  for (;;) {
    if (!ready_.empty()) {
      std::optional<LogRecord> record = std::move(ready_.front());
      ready_.pop_front();
      return record;
    }
    if (end_) return std::nullopt;
    std::optional<LogRecord> record = upcoming_ ? std::exchange(upcoming_, std::nullopt) : reader_.next();
    if (!record) {
      end_ = true;
      if (!parts_.empty()) end_step();
      copies_.decide();
      release();
      continue;
    }
    if (!parts_.empty() && record->step != parts_.front().step) {
      end_step();
      upcoming_ = std::move(record);
      continue;
    }
    const TagParts parts = parts_of(record->tag);
    if (!parts.any()) whole_.insert(record->tag);
    if (!parts.any() || record->layer < 0 || record->stats.experts() == 0 || whole_.contains(parts.rest)) {
      if (held_.empty()) return record;
      count_held(*record);
      held_.emplace_back().passed.push_back(std::move(*record));
      continue;
    }
    count_held(*record);
    parts_.push_back(std::move(*record));
  }
}

/// Throws LogError where no more may be held.
void WholeRecords::count_held(const LogRecord& record) {
  held_numbers_ += size_of(record);
  if (record.config_json && record.config_json != held_config_) {
    held_config_ = record.config_json;
    held_numbers_ += words_of(*held_config_);
  }
  if (held_numbers_ <= kMostHeld) return;
  copies_.decide();
  throw LogError("step " + std::to_string(record.step) + ": its parts take more than " +
                 std::to_string(kMostHeld >> 17) + " MiB: import or log it without `--by`");
}

void WholeRecords::end_step() {
  Step& step = held_.emplace_back();
  const std::int64_t number = parts_.front().step;
  for (LogRecord& part : parts_) {
    const TagParts parts = parts_of(part.tag);
    if (whole_.contains(parts.rest)) {  // it came later in the same step
      step.passed.push_back(std::move(part));
      continue;
    }
    part.tag = keep_ranks_ ? parts.of_rank : parts.rest;
    const std::pair<int, std::string> key(part.layer, part.tag);
    const Rank rank(parts.number.size(), parts.number);
    auto& ranks = step.parts[key];
    if (const auto it = ranks.find(rank); it != ranks.end()) {
      add(it->second, part);
    } else {
      ranks.emplace(rank, std::move(part));
    }
  }
  parts_.clear();
  if (!keep_ranks_) see(number, step);
  if (!copies_.open()) release();
}

void WholeRecords::see(std::int64_t number, const Step& step) {
  std::vector<std::vector<RankLayer>> layers;
  for (const auto& [key, ranks] : step.parts) {
    for (const auto& [rank, record] : ranks) {
      const auto [it, is_new] = places_.try_emplace(rank, places_.size());
      if (is_new) copies_.add(rank.second.empty() ? "none" : rank.second);
      layers.resize(places_.size());
      layers[it->second].push_back({key, record.stats.top_k(), record.stats.tokens(), record.stats.counts()});
    }
  }
  layers.resize(places_.size());
  copies_.see(number, layers);
}

/// Adds up what was held: each rank, and of copies the one with the lowest number that has the layer.
void WholeRecords::release() {
  for (Step& step : held_) {
    for (LogRecord& record : step.passed) ready_.push_back(std::move(record));
    for (auto& [key, ranks] : step.parts) {
      std::set<std::size_t> taken;
      LogRecord* whole = nullptr;
      for (auto& [rank, record] : ranks) {
        if (!keep_ranks_ && !taken.insert(copies_.first_of(places_.at(rank))).second) continue;
        if (whole) add(*whole, record);
        if (!whole) whole = &record;
      }
      if (whole) ready_.push_back(std::move(*whole));  // a layer has records of one rank at least
    }
  }
  held_.clear();
  held_config_.reset();
  held_numbers_ = 0;
  if (std::string note = copies_.note(); note != said_) {
    said_ = std::move(note);
    if (say_ && !said_.empty()) say_(said_);
  }
}

}  // namespace moectl
